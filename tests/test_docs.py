"""README.md and docs/: every command parses, every module is listed, every link and name exists."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from documents import DOCUMENTS, ROOT, commands

from expander.config import load_config

BIN = Path(sys.executable).parent
PLACEHOLDERS = ("<this repository>", "<its folder>")
# Packages that the project does not pin, installed for an option.
OPTIONAL = ("anthropic", "matplotlib", "trackio")


class Parsed(BaseException):
    """The arguments of a command were accepted; carries them."""


@pytest.fixture
def parse(monkeypatch):
    """`parse("eval", ["--help"])`: parse a module's arguments, without running it."""

    def stop(parser, args=None, namespace=None):
        raise Parsed(original(parser, args, namespace))

    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)

    def call(module: str, arguments: list[str]) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", [f"{module}.py", *arguments])
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(module).main()
        return parsed.value.args[0]

    return call


@cache
def help_of(*command: str) -> str:
    done = subprocess.run(
        [BIN / command[0], *command[1:], "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def check_options(arguments: list[str], *command: str) -> None:
    """Check that a program installed with the project knows the options of `arguments`."""
    for option in (word.split("=")[0] for word in arguments if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){option}\b", help_of(*command)), option


def check_python(arguments: list[str], parse) -> None:
    if arguments[:2] == ["-m", "venv"]:
        return
    if arguments[:2] == ["-m", "pytest"]:
        check_paths(arguments[2:])
        return
    module = arguments.pop(0).removesuffix(".py").replace("/", ".")
    if module == "-m":
        module = arguments.pop(0)
    parsed = parse(module, arguments)
    if module == "train":
        load_config(parsed.stage, parsed.config, parsed.set)


def check_paths(arguments: list[str]) -> None:
    for path in (word for word in arguments if "/" in word and not word.startswith("-")):
        assert (ROOT / path).exists(), path


def check_installs(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    names = arguments[1:]
    if names[0] == "-r":
        assert (ROOT / names[1]).is_file()
    else:
        assert set(names) <= set(OPTIONAL)


def check(command: str, parse) -> None:
    """Check one command; an unknown program fails: no test covers it."""
    for text in PLACEHOLDERS:
        command = command.replace(text, "placeholder")
    program, *arguments = shlex.split(command)
    match program:
        case "python" | "python3.12" | ".venv/bin/python":
            check_python(arguments, parse)
        case "uv" if arguments[:3] == ["run", "--group", "dev"]:
            assert arguments[3:] == ["pytest"]
        case "uv" if arguments[0] == "run":
            check_python(arguments[1:], parse)
        case "uv":
            assert arguments == ["lock"]
        case "bash" | ".":
            assert (ROOT / arguments[0]).is_file() or arguments == [".venv/bin/activate"]
            check_paths(arguments[1:])
        case "pip":
            check_installs(arguments)
        case "hf" if arguments[0] == "jobs":
            script = next(number for number, word in enumerate(arguments) if word.endswith(".py"))
            check_paths([arguments[script]])
            check_options(arguments[:script], "hf", "jobs", "uv", "run")
        case "hf":
            assert arguments == ["auth", "login"]
        case "mlx.launch":
            separator = arguments.index("--")
            check_options(arguments[:separator], program)
            check(shlex.join(arguments[separator + 1 :]), parse)
        case "mlx.distributed_config" | "mlx_lm.generate" | "mlx_lm.server":
            check_options(arguments, program)
        case "ollama":
            assert arguments[0] in ("create", "pull", "run")
        case "ruff":
            assert arguments in (["check", "."], ["format", "--check", "."])
        case _:
            assert program in ("git", "cd", "brew", "rsync"), f"no test covers {command}"


@pytest.mark.parametrize("command", commands())
def test_the_command_parses(command, parse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(command, parse)


def test_a_wrong_command_is_found(parse, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for wrong in (
        "python train.py sft --set training.epoch=1",
        "bash examples/none.sh",
        "mlx.launch -n 2 --backends ring -- python train.py sft",
        "make all",
    ):
        with pytest.raises((AssertionError, ValueError)):
            check(wrong, parse)
    with pytest.raises(SystemExit):
        check("python eval.py --modell x", parse)
    assert "--modell" in capsys.readouterr().err


def slugs(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*DOCUMENTS, "examples/README.md"])
def test_links_lead_to_files_and_headings(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (ROOT / name).parent / path
            assert target.is_file(), link
            assert not anchor or anchor in slugs(target.read_text(encoding="utf-8")), link


def development() -> str:
    return (ROOT / "docs" / "development.md").read_text(encoding="utf-8")


def test_every_module_has_a_line_in_the_layout():
    layout = development().partition("## Layout")[2].partition("\n## ")[0]
    listed = set()
    folder = ROOT
    for line in layout.splitlines():
        if found := re.search(r"`(expander/(?:\w+/)?)`:$", line):
            folder = ROOT / found[1]
        elif row := re.match(r"\| `(\w+\.py)` \| .+ \|$", line):
            listed.add(folder / row[1])
    modules = {path for path in (ROOT / "expander").rglob("*.py") if path.name != "__init__.py"}
    assert listed == modules | set(ROOT.glob("*.py"))


def test_everything_is_computed_where_the_document_says():
    section = development().partition("## Where things are computed")[2].partition("\n## ")[0]
    places = re.findall(r"`(\w+)` in `([\w/.]+)`", section)
    assert len(places) > 8
    for function, path in places:
        assert re.search(rf"def {function}\(", (ROOT / path).read_text(encoding="utf-8")), function


def test_names_and_paths_in_the_guides_exist():
    guides = development().partition("## Add a reward")[2]
    names = set(re.findall(r"`([\w/.]+)`", guides)) - {"gguf", "model_type", "grpo.reward"}
    source = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "expander").rglob("*.py"))
    for name in names - {"grpo.penalties"}:
        assert (ROOT / name).exists() if "/" in name or "." in name else name in source, name
