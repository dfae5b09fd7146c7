"""The commands of README.md and docs/, run as printed and in order, with a local Hub."""

import json
import re
import shlex
import shutil

from clone import QUERIES, make_clone
from documents import ROOT, block_commands

# Longer than a test: results.md trains for hours. Two Macs, a GPU of the Hub, an endpoint that has
# a large model: not here. test_docs.py parses these commands, as it does every other.
RUN = ("README.md", "docs/rows.md", "docs/publishing.md")


def runnable(command: str) -> bool:
    return command.startswith("python ") and "dataset/generate_data" not in command


def test_every_command_as_printed(run, hub, hub_root, tmp_path):
    clone = make_clone(tmp_path / "clone")
    shutil.copy(clone / "data" / "errors.jsonl", clone / "rows.jsonl")  # the reader's own
    commands = [command for name in RUN for command in block_commands(name) if runnable(command)]
    printed = {}
    for command in dict.fromkeys(commands):
        _, script, *options = shlex.split(command.replace("OWNER/NAME", "tester/expander"))
        if "--compare" in options:
            for name in ("before.json", "after.json"):
                shutil.copy(clone / "results.json", clone / name)
        # Nothing is uploaded unless it was requested.
        assert "--push" in options or not (hub_root / "uploads").exists()
        done = run([clone / script, *options], cwd=clone, env=hub, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        printed[command] = done.stdout

    assert (
        "48 rows read, 24 duplicate queries dropped: 22 to train on, 2 to validate on"
        in (printed["python train.py sft"])
    )
    grpo = clone / "outputs" / "grpo"
    beneath = json.loads((grpo / "sft" / "adapter_config.json").read_text())
    assert beneath["model"] == "Qwen/Qwen3-1.7B" and len(beneath["revision"]) == 40
    assert beneath["lora_parameters"]["scale"] == 2.0
    result = json.loads((grpo / "run.json").read_text())
    assert result["steps"] == 28 and 0 < result["prompts"] <= 22
    gguf = clone / "outputs" / "gguf"
    assert (gguf / (gguf / "Modelfile").read_text().split()[1]).is_file()
    assert "ollama create" in printed["python convert.py"]
    published = hub_root / "uploads" / "models" / "tester" / "expander"
    summary = json.loads((published / "evaluation.json").read_text())["summary"]
    assert summary["queries"] == QUERIES


def test_the_readme_shows_the_figures_of_the_results():
    readme, results = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md")
    )
    (demo,) = re.findall(r"```\n(  unseen queries.*?)```", readme, re.DOTALL)
    assert demo in results
    shown = readme.partition("## Results")[2].partition("\n## ")[0]
    figures = re.findall(r"[+-]\d\.\d{3}", shown) + re.findall(r"\d+(?:\.\d)? %", shown)
    assert len(figures) > 20 and [figure for figure in figures if figure not in results] == []


def test_the_messages_in_the_troubleshooting_table_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("## When something goes wrong")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    source = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "expander").rglob("*.py"))
    assert len(messages) >= 4 and [text for text in messages if text not in source] == []
