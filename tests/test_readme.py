"""The README's commands, run as printed and in order, against a Hub on the loopback."""

import json
import re
import shlex
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What the README prints besides our own commands; the demo and this suite are run by themselves.
ELSEWHERE = ("git clone", "python3 -m venv", "pip install", "ollama create", "bash ", ". ")


def printed_commands() -> list[str]:
    """The `python …` lines of the README's shell blocks, comments off, without repeats."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    lines = [line for line in lines if line]
    unknown = [x for x in lines if not x.startswith(("python ", *ELSEWHERE))]
    assert not unknown, f"commands that no test runs: {unknown}"
    return list(dict.fromkeys(line for line in lines if line.startswith("python ")))


def test_every_command_as_printed(run, hub, hub_root, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(ROOT / "data", folder / "data", ignore=shutil.ignore_patterns("train"))
    shutil.copy(ROOT / "data" / "errors.jsonl", folder / "rows.jsonl")  # the reader's own
    commands = printed_commands()
    assert {shlex.split(command)[1] for command in commands} >= {
        "train.py",
        "eval.py",
        "convert.py",
    }
    printed = {}
    for command in commands:
        _, script, *rest = shlex.split(command)
        if "--compare" in rest:
            for name in ("before.json", "after.json"):
                shutil.copy(folder / "results.json", folder / name)
        done = run([script, *rest], cwd=folder, env=hub, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        printed[command] = done.stdout

    assert (
        "48 rows read, 24 duplicate queries dropped: 22 to train on, 2 to validate on"
        in (printed["python train.py sft"])
    )
    grpo = folder / "outputs" / "grpo"
    beneath = json.loads((grpo / "sft" / "adapter_config.json").read_text())
    assert beneath["model"] == "Qwen/Qwen3-1.7B" and len(beneath["revision"]) == 40
    assert beneath["lora_parameters"]["scale"] == 2.0
    result = json.loads((grpo / "run.json").read_text())
    assert result["steps"] == 28 and result["prompts"] == 22
    gguf = folder / "outputs" / "gguf"
    assert (gguf / (gguf / "Modelfile").read_text().split()[1]).is_file()
    assert "ollama create" in printed["python convert.py"]
    # Nothing is uploaded that nobody asked for.
    assert not (hub_root / "uploads").exists()
    requests = (hub_root / "requests.log").read_text().splitlines()
    assert {line.split()[0] for line in requests} <= {"GET", "HEAD"}


def test_the_two_commands_are_scripts_of_the_project():
    for script in re.findall(r"^bash (\S+)", README, re.MULTILINE):
        assert (ROOT / script).is_file()


def test_every_file_of_the_root_is_in_the_table():
    missing = [p.name for p in ROOT.glob("*.py") if f"`{p.name}`" not in README]
    assert not missing
