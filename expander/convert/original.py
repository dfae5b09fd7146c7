"""The options of the original's convert_gguf.py, which names the parts of a model one by one."""

import argparse

from expander import cli

# The sizes that the original has published, as OWNER/…-SIZE-sft and OWNER/…-SIZE-grpo.
SIZES = ("1.7B", "4B")
PUBLISHED = "tobil/qmd-query-expansion"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the original's options; --output is a folder here, never a repository."""
    group = parser.add_argument_group("options of the original project")
    add = group.add_argument
    add("--base", metavar="NAME", type=cli.name, help="base model, instead of the recorded one")
    add("--sft", metavar="NAME", type=cli.name, help="SFT adapter, instead of the recorded one")
    add("--grpo", metavar="NAME", type=cli.name, help="GRPO adapter; the same as --model")
    size_help = f"{PUBLISHED}-SIZE-sft and -grpo over Qwen3; the options above override its parts"
    add("--size", choices=SIZES, help=size_help)
    add(
        "--skip-quantize",
        dest="quantize",
        action="store_const",
        const=["f16"],
        help="the same as --quantize f16",
    )
    add(
        "--no-upload",
        dest="push",
        action="store_const",
        const="",
        help="the same as --no-push; without --push, nothing is uploaded anyway",
    )


def choose_model(arguments: argparse.Namespace) -> dict[str, str | None]:
    """The arguments of `read_chain`; its name is None if no option names a model.

    Raises:
        ValueError: --model and --grpo name two models.
    """
    if arguments.model and arguments.grpo:
        raise ValueError("--model and --grpo are both given: use one of them")
    base, sft, top = arguments.base, arguments.sft, arguments.model or arguments.grpo
    if arguments.size:
        base = base or f"Qwen/Qwen3-{arguments.size}"
        sft = sft or f"{PUBLISHED}-{arguments.size}-sft"
        top = top or f"{PUBLISHED}-{arguments.size}-grpo"
    if not top:
        top, sft = sft, None
    if not top:
        top, base = base, None
    return {"name": top, "base": base, "sft": sft}
