"""expander/cli.py: exit codes, one-line errors, argument types, progress."""

import argparse
import os
import subprocess
import sys
import time
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
def test_the_result_of_main_is_the_exit_code(result, code, capsys):
    assert ending(lambda: result) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("rows.jsonl:3: no query"), 2, "error: rows.jsonl:3: no query\n"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
        (cli.Interrupted(15, "stopped at step 4"), 143, "stopped at step 4\n"),
        (cli.Interrupted(2, "stopped at step 4"), 130, "stopped at step 4\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_a_user_error_prints_one_line(error, code, message, capsys):
    assert ending(raising(error)) == code
    assert capsys.readouterr() == ("", message)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(TypeError):
        cli.run(raising(TypeError("a bug")))


def test_a_reader_that_stops_early_causes_no_error_message():
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
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141 and errors == b""


def test_a_full_or_closed_stdout_is_an_error_of_one_line_or_none(tmp_path):
    def ended(redirection: str) -> tuple[int, str]:
        code = "from expander import cli; cli.run(lambda: print('x'))"
        command = f'"{sys.executable}" -c "{code}" {redirection}'
        done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stderr

    code, error = ended(">/dev/full")
    assert code == 2 and error.startswith("error: ") and error.endswith("No space left on device\n")
    assert ended(">&-") == (0, "") and ended("2>&-") == (0, "")


def test_progress_without_a_terminal_prints_a_line_at_intervals(capsys):
    silent = cli.Progress("queries", 3)
    for done in (1, 2, 3):
        silent(done)
    assert capsys.readouterr().err == ""
    progress = cli.Progress("queries", 3, every_seconds=0.0)
    for done in (0, 1, 2, 3):
        progress(done)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["queries 0/3", "queries 1/3", "queries 2/3"]
    assert all(line.endswith("left") for line in lines)


def test_progress_on_a_terminal_redraws_one_line_and_clears_it(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = cli.Progress("queries", 2)
    progress(1)
    progress(2)
    text = capsys.readouterr().err
    assert "queries 1/2" in text and "\n" not in text and text.endswith("\r\x1b[K")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599, "59m59s"), (3600, "1h00m")],
)
def test_durations(seconds, text):
    assert cli.duration(seconds) == text


def test_argument_types(tmp_path):
    assert cli.integer_from(0)("0") == 0 and cli.integer_from(1)("12") == 12
    for text in ("0", "-1", "1.5", "x", "", "9" * 30, "9" * 5000):
        with pytest.raises(argparse.ArgumentTypeError, match=">= 1"):
            cli.integer_from(1)(text)
    assert cli.new_file(str(tmp_path / "new")) == tmp_path / "new"
    with pytest.raises(argparse.ArgumentTypeError, match=f"{tmp_path} already exists"):
        cli.new_file(str(tmp_path))
    assert cli.path("$HOME/a") == Path.home() / "a" and cli.name("~/a") == str(Path.home() / "a")
    for text in ("", "$NO_SUCH_NAME"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"empty|not set"):
            cli.path(text)


def test_a_mac_is_kept_awake_until_the_process_ends(tmp_path, monkeypatch):
    """caffeinate is told the process to wait for; where there is no such command, nothing happens."""
    monkeypatch.setenv("PATH", str(tmp_path))
    cli.keep_awake()
    command = tmp_path / "caffeinate"
    command.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path / "called.part"}\n/bin/mv {tmp_path}/called.part {tmp_path}/called\n'
    )
    command.chmod(0o755)
    cli.keep_awake()
    deadline = time.monotonic() + 10
    while not (tmp_path / "called").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "called").read_text().split() == ["-i", "-w", str(os.getpid())]
