"""examples/mac_check.sh as a user runs it, with a tiny model, in a copy of the project."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project's commands, with this Python as its ready-made .venv: nothing is installed."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "examples", folder / "examples")
    for path in (*ROOT.glob("*.py"), ROOT / "configs", ROOT / "dataset", ROOT / "requirements.txt"):
        (folder / path.name).symlink_to(path)
    (folder / "data").mkdir()
    (folder / "data" / "rows.jsonl").symlink_to(ROOT / "tests" / "rows.jsonl")
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    for stamp in ("requirements.seen", "requirements.txt.installed"):
        shutil.copy(ROOT / "requirements.txt", folder / ".venv" / stamp)
    return folder


def check(project: Path, *models: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", project / "examples" / "mac_check.sh", *models],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_one_block_with_the_machine_the_figures_and_what_failed(project):
    tiny.end_early(tiny.make_qwen3(project / "tiny-qwen3", layers=1))
    (project / "empty").mkdir()
    done = check(project, "tiny-qwen3", "empty")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == lines[-1] == "```"
    assert [line.split()[0] for line in lines[1:3]] == ["system", "device"]
    assert any(line.strip().startswith("device_name ") for line in lines)

    figures = r"(?P<steps>\d+\.\d{3}) +(?P<tokens>\d+) +(?P<peak>\d+\.\d)"
    for weights in ("whole", "4-bit"):
        for stage in ("sft", "grpo"):
            (row,) = (x for x in lines if re.match(rf"  tiny-qwen3 +{weights} +{stage} ", x))
            match = re.search(figures + "$", row)
            assert float(match["steps"]) > 0 and int(match["tokens"]) > 0
        (failure,) = (
            x for x in lines if x.startswith(f"failed   empty {weights} sft: exit code 2")
        )
        assert "neither an adapter folder" in failure  # and what the command said of it
        assert not any(f"empty {weights} grpo" in line for line in lines)


def test_nothing_measured_is_a_failure(project):
    (project / "empty").mkdir()
    done = check(project, "empty")
    assert done.returncode == 1 and "failed   empty whole sft" in done.stdout
