"""Ollama's side of an export: the names it accepts, the Modelfile, and `ollama create`."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from expander.files import write_text
from expander.prompt import CHATML, Frame
from expander.qmd import SAMPLING

TEMPLATE, PARAMS = "template", "params"  # of the Hub's bridge to Ollama
MAX_NAME = 80
NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{MAX_NAME - 1}}}")
NAME_RULE = (
    f"a name has at most {MAX_NAME} letters, digits, dots, dashes and underscores, "
    "and starts with a letter, digit or underscore"
)
# Where macOS keeps apps.
APPLICATIONS = ("/Applications", "~/Applications")


def default_name(base: str) -> str:
    """The name of a model trained from `base`, for its files and for Ollama.

    >>> default_name("Qwen/Qwen3-1.7B")
    'qmd-query-expansion-qwen3-1.7b'
    """
    safe = re.sub(r"[^a-z0-9_.-]+", "-", Path(base).name.lower())
    return f"qmd-query-expansion-{safe}"[:MAX_NAME].rstrip("-.")


def check_ollama(name: str) -> None:
    """Check a [NAMESPACE/]NAME[:TAG] for `ollama create`.

    Raises:
        ValueError: Ollama does not accept the name, or is not installed.
    """
    path, colon, tag = name.partition(":")
    parts = path.split("/") + ([tag] if colon else [])
    if path.count("/") > 1 or not all(NAME.fullmatch(part) for part in parts):
        raise ValueError(f"--ollama {name}: not a valid Ollama name; {NAME_RULE}")
    if ollama_command() is None:
        raise ValueError("--ollama: command ollama not found; install it from ollama.com")


def ollama_command() -> str | None:
    """The ollama command: "ollama" if it is on PATH, else the one inside Ollama.app; None if neither.

    The macOS app links its command into /usr/local/bin only with an administrator's password.
    """
    if shutil.which("ollama"):
        return "ollama"
    for folder in APPLICATIONS:
        command = Path(folder, "Ollama.app/Contents/Resources/ollama").expanduser()
        if shutil.which(command):
            return str(command)
    return None


def go_template(frame: Frame) -> str:
    """The frame as Ollama's template, which ranges over .Messages, so that every turn is framed.

    It has no tools and no thinking: Ollama uses it because the file's own template has neither. It
    has no BOS either, which llama.cpp adds if the file says so.
    """
    if frame.system_role and frame.assistant == "assistant":
        opening = frame.opening("{{ .Role }}")
        turns = f"{{{{- range .Messages }}}}{opening}{{{{ .Content }}}}{frame.end}\n"
    else:
        turns = (
            '{{- $system := "" }}{{ range .Messages }}'
            '{{ if eq .Role "system" }}{{ $system = .Content }}'
            f'{{{{ else if eq .Role "assistant" }}}}{frame.opening(frame.assistant)}'
            f"{{{{ .Content }}}}{frame.end}\n"
            f"{{{{ else }}}}{frame.opening('user')}{{{{ if $system }}}}{{{{ $system }}}}\n\n"
            f'{{{{ $system = "" }}}}{{{{ end }}}}{{{{ .Content }}}}{frame.end}\n{{{{ end }}}}'
        )
    return f"{turns}{{{{ end }}}}{frame.opening(frame.assistant)}"


def parameters(frame: Frame) -> dict[str, object]:
    """Ollama's parameters: the end of a turn, QMD's sampling."""
    return {
        "stop": frame.end,
        "temperature": SAMPLING.temperature,
        "top_k": SAMPLING.top_k,
        "top_p": SAMPLING.top_p,
        "presence_penalty": SAMPLING.presence_penalty,
        "repeat_penalty": 1,
        "repeat_last_n": SAMPLING.penalty_last_n,
        "num_predict": SAMPLING.max_tokens,
        "num_ctx": 4096,
    }


def modelfile(gguf: str, frame: Frame = CHATML) -> str:
    """Ollama's Modelfile for a GGUF file in the same folder: the prompt's frame and `parameters`."""
    lines = [f"PARAMETER {name} {json.dumps(x)}\n" for name, x in parameters(frame).items()]
    return f'FROM ./{gguf}\nTEMPLATE """{go_template(frame)}"""\n{"".join(lines)}'


def write_hub_files(folder: Path, frame: Frame) -> None:
    """Write `template` and `params`, for `ollama run hf.co/OWNER/NAME-gguf`.

    The Hub hands them to Ollama with the GGUF file; a Modelfile in a repository is not read.
    """
    params = parameters(frame) | {"stop": [frame.end]}
    write_text(folder / TEMPLATE, go_template(frame))
    write_text(folder / PARAMS, json.dumps(params, indent=2) + "\n")


def create_command(name: str, path: Path) -> str:
    """The shell command that creates the Ollama model `name` from the Modelfile at `path`."""
    return shlex.join([ollama_command() or "ollama", "create", name, "-f", str(path)])


def run_ollama(name: str, path: Path) -> None:
    """Print and run `create_command`.

    Raises:
        OSError: the command failed; its own output explains why.
    """
    command = create_command(name, path)
    print(command, flush=True)
    if code := subprocess.run(shlex.split(command), check=False).returncode:
        raise OSError(f"ollama create failed with exit code {code}; is `ollama serve` running?")
