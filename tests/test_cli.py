"""cli.py: how a command ends, and what it says meanwhile."""

import subprocess
import sys
from pathlib import Path

import pytest

from expander import cli

ROOT = Path(__file__).parent.parent


def ending(main) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    return caught.value.code


def raising(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3)])
def test_a_result_is_the_exit_code(result, code, capsys):
    assert ending(lambda: result) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("rows.jsonl:3: no query"), 2, "error: rows.jsonl:3: no query\n"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
        (cli.Interrupted(15, "stopped at step 4"), 143, "stopped at step 4\n"),
        (cli.Interrupted(2, "stopped at step 4"), 130, "stopped at step 4\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_an_error_of_the_user_is_one_line(error, code, said, capsys):
    assert ending(raising(error)) == code
    assert capsys.readouterr() == ("", said)


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(TypeError):
        cli.run(raising(TypeError("a bug")))


def test_a_reader_that_stops_early_is_no_error():
    """train.py --dry-run | head -1"""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from expander import cli\ncli.run(lambda: print('y\\n' * 1_000_000))",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141 and said == b""


def test_progress_off_a_terminal_is_a_line_now_and_then(capsys):
    silent = cli.Progress("queries", 3)
    for done in (1, 2, 3):
        silent(done)
    assert capsys.readouterr().err == ""
    told = cli.Progress("queries", 3, every_seconds=0.0)
    for done in (0, 1, 2, 3):
        told(done)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["queries 0/3", "queries 1/3", "queries 2/3"]
    assert all(line.endswith("left") for line in lines)


def test_progress_on_a_terminal_stays_on_one_line_and_goes(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    told = cli.Progress("queries", 2)
    told(1)
    told(2)
    text = capsys.readouterr().err
    assert "queries 1/2" in text and "\n" not in text and text.endswith("\r\x1b[K")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599, "59m59s"), (3600, "1h00m")],
)
def test_durations(seconds, text):
    assert cli.duration(seconds) == text
