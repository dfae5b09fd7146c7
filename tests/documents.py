"""The commands in README.md and docs/."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
PROGRAMS = (
    *("python", "python3.12", "pip", "uv", "bash", ".", "ruff", "git", "cd", "brew", "rsync"),
    *("hf", "ollama", "mlx.launch", "mlx.distributed_config", "mlx_lm.generate"),
)


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def block_commands(name: str) -> list[str]:
    """The commands in a document's ```bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", _text(name), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [re.sub(r"(^|\s+)# .*", "", line).strip() for line in lines]
    return [part for command in commands if command for part in command.split(" && ")]


def inline_commands(name: str) -> list[str]:
    """The commands in a document's running text; `python train.py sft | grpo` is not one."""
    text = re.sub(r"^```.*?^```", "", _text(name), flags=re.DOTALL | re.MULTILINE)
    found = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    return [x for x in found if x.startswith(tuple(f"{p} " for p in PROGRAMS)) and " | " not in x]


def commands() -> list[str]:
    """Every command of every document, once."""
    found = [c for name in DOCUMENTS for c in [*block_commands(name), *inline_commands(name)]]
    return list(dict.fromkeys(found))
