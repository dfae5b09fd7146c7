"""The CI workflow: it runs the README's commands, with pinned actions, limited time and rights."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.name)
def workflow(request) -> dict:
    return yaml.safe_load(request.param.read_text(encoding="utf-8"))


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_the_scripts_exist(workflow):
    commands = "\n".join(step["run"] for step in steps(workflow) if "run" in step)
    scripts = re.findall(r"[\w./-]+\.(?:sh|py)\b", commands)
    assert scripts and [name for name in scripts if not (ROOT / name).is_file()] == []


def test_actions_are_pinned_by_commit(workflow):
    uses = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert (
        uses
        and [name for name in uses if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", name)] == []
    )


def test_rights_and_time_are_limited(workflow):
    assert workflow["permissions"] == {"contents": "read"}
    assert all(0 < job["timeout-minutes"] <= 120 for job in workflow["jobs"].values())


def test_ci_runs_the_readmes_commands_on_apple_silicon_and_linux():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    systems = [row["os"] for row in job["strategy"]["matrix"]["include"]]
    assert sorted(name.split("-")[0] for name in systems) == ["macos", "ubuntu"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = "\n".join(step.get("run", "") for step in job["steps"])
    for command in ("bash tests/run.sh", "bash examples/demo.sh"):
        assert command in readme and command in commands
