"""Set a GGUF file as QMD's model for query expansion, in its configuration file.

    python examples/qmd_config.py outputs/gguf/NAME-q4_k_m.gguf            show the change
    python examples/qmd_config.py outputs/gguf/NAME-q4_k_m.gguf --write    make it, with a backup

Changes only the text of models.generate: comments and the rest of the file stay the same.
"""

import argparse
import difflib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root

from expander import cli
from expander.files import write_text


def config_path() -> Path:
    """The file that QMD reads its configuration from."""
    config_home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(os.environ.get("QMD_CONFIG_DIR") or Path(config_home, "qmd"), "index.yml")


def check_gguf(path: Path) -> None:
    """Raise ValueError unless the file is a GGUF file; QMD would delete another one."""
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file; convert.py writes them")


def _find(mapping: yaml.MappingNode, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    """The (key, value) nodes of `name`, which have their positions in the text; None if it is missing."""
    return next((pair for pair in mapping.value if pair[0].value == name), None)


def set_generate(text: str, model: str) -> str:
    """Set models.generate in a YAML text; everything else stays the same.

    Raises:
        ValueError: the text is not a mapping, or an edit would change more than this key.
    """
    entry = f"generate: {json.dumps(model, ensure_ascii=False)}"  # JSON strings are valid YAML
    try:
        wanted = yaml.safe_load(text) or {}
        wanted["models"] = (wanted.get("models") or {}) | {"generate": model}
        root = yaml.compose(text, yaml.SafeLoader)
        models = _find(root, "models") if root else None
        if models is None:
            new = f"{text.rstrip()}\nmodels:\n  {entry}\n".lstrip()
        elif not models[1].value:
            new = (
                f"{text[: models[0].end_mark.index]}:\n  {entry}{text[models[1].end_mark.index :]}"
            )
        elif old := _find(models[1], "generate"):
            new = text[: old[0].start_mark.index] + entry + text[old[1].end_mark.index :]
        else:
            first = models[1].value[0][0].start_mark
            apart = ", " if models[1].flow_style else "\n" + " " * first.column
            new = text[: first.index] + entry + apart + text[first.index :]
        understood = yaml.safe_load(new) == wanted
    except (yaml.YAMLError, AttributeError, TypeError, ValueError):
        understood = False
    if not understood:
        raise ValueError(f"cannot be edited safely; set it by hand, under models: {entry}")
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description="Set QMD's model for query expansion.")
    parser.add_argument("gguf", type=Path, metavar="FILE.gguf")
    parser.add_argument(
        "--write", action="store_true", help="change the file instead of showing the change"
    )
    arguments = parser.parse_args()
    check_gguf(arguments.gguf)
    path = config_path().resolve()  # follow links: the file itself is replaced
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    try:
        new = set_generate(old, str(arguments.gguf.resolve()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if new == old:
        print(f"{path} already uses this file")
        return
    names = (str(path), f"{path} (new)")
    print("\n".join(difflib.unified_diff(old.splitlines(), new.splitlines(), *names, lineterm="")))
    if not arguments.write:
        print("\nnothing changed; add --write to change the file")
        return
    if path.is_file():
        backup = path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}.bak")
        shutil.copy2(path, backup)
        print(f"\nbackup: {backup}")
    write_text(path, new)


if __name__ == "__main__":
    cli.run(main)
