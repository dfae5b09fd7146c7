"""Export a trained model: python convert.py, then `ollama create` or one line in QMD's config.

Fuses base → SFT → GRPO in float32 and writes GGUF files for llama.cpp, QMD and Ollama, with a
Modelfile; --push publishes them with their evaluation. Left out: importance matrices, and
architectures that expander/architectures.py does not list.
"""

import argparse
import json
import shlex
import signal
import sys
from pathlib import Path

from expander import cli
from expander.convert import original
from expander.convert.modelfile import (
    NAME,
    NAME_RULE,
    check_ollama,
    create_command,
    default_name,
    modelfile,
    ollama_command,
    run_ollama,
    write_hub_files,
)
from expander.files import write_text
from expander.prompt import user_message

TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
# q4_k_m is the type of QMD's own model; q8_0 is twice as large and loses less.
DEFAULT_TYPES = ("q4_k_m", "q8_0")
MLX_BITS = (4, 6, 8)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Export a trained model as GGUF files for QMD, Ollama and llama.cpp.",
        epilog="example: python convert.py --quantize q4_k_m --ollama qmd-expand",
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="MODEL",
        type=cli.name,
        help="adapter folder, model folder or Hub id (default: outputs/grpo, else outputs/sft)",
    )
    add(
        "--output",
        metavar="DIR",
        type=cli.path,
        default=Path("outputs/gguf"),
        help="folder for the GGUF files and the Modelfile (default: %(default)s)",
    )
    add(
        "--quantize",
        metavar="TYPE",
        nargs="+",
        help=f"any of {', '.join(TYPES)} (default: {' '.join(DEFAULT_TYPES)}; with --mlx or "
        "--peft, no GGUF file)",
    )
    add("--name", help="base name of the files (default: qmd-query-expansion-BASE)")
    add(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="check the tokenizer, and read each file back before it gets its name",
    )
    add("--ollama", metavar="NAME", help="run ollama create NAME at the end")
    add("--mlx", metavar="DIR", type=cli.path, help="write the fused model for MLX")
    bits_help = "bits per weight of the --mlx folder (default: not quantised)"
    add("--mlx-bits", metavar="N", type=int, choices=MLX_BITS, help=bits_help)
    add("--peft", metavar="DIR", type=cli.path, help="write the adapter for PEFT")
    add(
        "--push",
        metavar="OWNER/NAME",
        help="publish on the Hub if better than the published model; GGUF files in OWNER/NAME-gguf",
    )
    add(
        "--no-push",
        dest="push",
        action="store_const",
        const="",
        help="do not publish, even if the run's configuration has model.push_to_hub: true",
    )
    add(
        "--evaluation",
        metavar="FILE",
        type=cli.path,
        help="the model's results from eval.py -o, also published (default: MODEL/evaluation.json)",
    )
    add("--force", metavar="REASON", help="publish a model that is not better; the card says why")
    original.add_options(parser)
    arguments = parser.parse_args()
    if arguments.quantize is None:
        arguments.quantize = [] if arguments.mlx or arguments.peft else DEFAULT_TYPES
    arguments.quantize = list(dict.fromkeys(kind.lower() for kind in arguments.quantize))
    return arguments


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for arguments that cannot work, before anything is read."""
    if unknown := [kind for kind in arguments.quantize if kind not in TYPES]:
        raise ValueError(f"--quantize {unknown[0]}: unknown type; choose from {', '.join(TYPES)}")
    if arguments.name and not NAME.fullmatch(arguments.name):
        raise ValueError(f"--name {arguments.name}: {NAME_RULE}")
    if arguments.mlx_bits and not arguments.mlx:
        raise ValueError("--mlx-bits needs --mlx DIR")
    if arguments.ollama:
        check_ollama(arguments.ollama)
    for option in ("ollama", "push"):
        if getattr(arguments, option) and not arguments.quantize:
            raise ValueError(f"--{option} needs a GGUF file; add --quantize TYPE")


def print_next_steps(name: str, gguf: Path, path: Path, message: str) -> None:
    """Print the commands that run the GGUF file.

    Args:
        path: its Modelfile.
        message: a user turn as trained.
    """
    print(f"""
Ollama:
  {create_command(name, path)}
  {shlex.join([ollama_command() or "ollama", "run", name, message])}

QMD, in ~/.config/qmd/index.yml:
  models:
    generate: {json.dumps(str(gguf.resolve()))}

LM Studio:
  {shlex.join(["lms", "import", str(gguf)])}""")


def main() -> None:
    arguments = parse_arguments()
    check(arguments)
    # Exit instead of dying, so that temporary files are removed.
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    import mlx.core as mx

    from expander.convert import formats, publish
    from expander.model import read_chain, trained_model

    mx.set_cache_limit(0)  # return freed tensors to the system
    chosen = original.choose_model(arguments)
    chain = read_chain(**chosen | {"name": chosen["name"] or trained_model()})
    print(" + ".join([chain.base, *map(str, chain.adapters)]))
    name, kinds = (arguments.name or default_name(chain.base)).lower(), arguments.quantize
    publication = None
    if kinds:  # before the export, because it may be refused
        publication = publish.prepare(
            arguments.push, chain, name, arguments.evaluation, arguments.force
        )
    if arguments.mlx:
        formats.write_mlx(chain, arguments.mlx, arguments.mlx_bits)
        readers = "mlx_lm" if arguments.mlx_bits else "mlx_lm and transformers"
        print(f"{arguments.mlx}: the fused model for {readers}")
    if arguments.peft:
        rank = formats.write_peft(chain, arguments.peft)
        print(f"{arguments.peft}: a PEFT adapter of rank {rank} over {chain.base}")
    if not kinds:
        return
    paths = formats.write_gguf_files(chain, arguments.output, name, kinds, arguments.verify)
    path = arguments.output / "Modelfile"
    write_text(path, modelfile(paths[0].name, chain.frame()))
    write_hub_files(path.parent, chain.frame())
    if arguments.ollama:
        run_ollama(arguments.ollama, path)
    if publication:
        publish.upload(publication, paths, path)
    message = user_message("auth config", instruction=chain.frame().instruction)
    print_next_steps(arguments.ollama or name, paths[0], path, message)


if __name__ == "__main__":
    cli.run(main)
