"""examples/mac_check.sh with a tiny model, in a copy of the project."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from clone import ROOT, make_clone

from examples import mac_check


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A clone with few rows, and this Python as its finished .venv: nothing is installed."""
    folder = make_clone(tmp_path / "project")
    shutil.rmtree(folder / "data")
    (folder / "data").mkdir()
    shutil.copy(ROOT / "tests" / "rows.jsonl", folder / "data")
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    installed = (ROOT / "requirements.txt").read_text(encoding="utf-8") * 2
    (folder / ".venv" / "requirements.txt.installed").write_text(installed, encoding="utf-8")
    return folder


def check(project: Path, *models: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", project / "examples" / "mac_check.sh", *models],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_report_has_the_machine_the_figures_and_the_failures(project):
    tiny.end_early(tiny.make_qwen3(project / "tiny-qwen3", layers=1))
    (project / "empty").mkdir()
    done = check(project, "tiny-qwen3", "empty")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == lines[-1] == "```"
    assert [line.split()[0] for line in lines[1:3]] == ["system", "device"]
    assert any(line.strip().startswith("device_name ") for line in lines)
    assert any("mlxrl 0.2.4" in line and "0.283" in line for line in lines)

    figures = r"(?P<steps>\d+\.\d{3}) +(?P<tokens>\d+) +(?P<peak>\d+\.\d)"
    for weights in ("full", "4-bit"):
        for run in ("sft", "grpo", "grpo 4 x 256"):
            (row,) = (x for x in lines if re.match(rf"  tiny-qwen3 +{weights} +{run}  ", x))
            match = re.search(figures + "$", row)
            assert float(match["steps"]) > 0 and int(match["tokens"]) > 0
        assert any(re.match(rf"  tiny-qwen3 +{weights} +decoding +[1-9]", x) for x in lines)
        (failure,) = (
            x for x in lines if x.startswith(f"failed   empty {weights} sft: exit code 2")
        )
        assert "neither an adapter folder" in failure  # the command's own message
        assert not any(f"empty {weights} grpo" in line for line in lines)


def test_it_fails_if_every_run_failed(monkeypatch, capsys):
    def fail(*_):
        raise ValueError("exit code 2: error: no memory")

    monkeypatch.setattr(mac_check, "train", fail)
    monkeypatch.setattr("sys.argv", ["mac_check.py", "a-model"])
    assert mac_check.main() == 1
    printed = capsys.readouterr().out
    assert "failed   a-model full sft: exit code 2: error: no memory" in printed
    assert "grpo" not in printed
