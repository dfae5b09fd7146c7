"""Export a trained model: `python convert.py`, then `ollama create` or a line in QMD's config.

Fuses base → SFT → GRPO in float32 and writes GGUF files that llama.cpp, QMD and Ollama run as
trained, and a Modelfile; --push publishes them with their evaluation. Left out: importance matrices,
RoPE scaling, other architectures than qwen3, qwen2 and llama.
"""

import argparse
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from expander import cli
from expander.prompt import IM_END, IM_START, user_message
from expander.qmd import SAMPLING

TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
# q4_k_m is the type QMD's own model comes in, half the size of q8_0, which keeps more.
DEFAULT_TYPES = ("q4_k_m", "q8_0")
MAX_NAME = 80
NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{MAX_NAME - 1}}}")
NAME_RULE = (
    f"a name has at most {MAX_NAME} letters, digits, dots, dashes and underscores, "
    "and starts with a letter, digit or underscore"
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Export a trained model as GGUF files for QMD, Ollama and llama.cpp.",
        epilog="example: python convert.py --quantize q4_k_m --ollama qmd-expand",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="adapter folder, model folder or Hub id (default: outputs/grpo, else outputs/sft)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("outputs/gguf"),
        help="where the GGUF files and the Modelfile go (default: %(default)s)",
    )
    parser.add_argument(
        "--quantize",
        metavar="TYPE",
        nargs="+",
        help=f"{', '.join(TYPES)} (default: {' '.join(DEFAULT_TYPES)}; none with --mlx or --peft)",
    )
    parser.add_argument("--name", help="of the files (default: qmd-query-expansion-BASE)")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="check the tokenizer, and read each file back before it takes its name",
    )
    parser.add_argument("--ollama", metavar="NAME", help="run ollama create NAME at the end")
    parser.add_argument("--mlx", metavar="DIR", type=Path, help="write the fused model for MLX")
    parser.add_argument("--peft", metavar="DIR", type=Path, help="write the adapter for PEFT")
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="publish on the Hub, when better than what is there; the GGUF files in OWNER/NAME-gguf",
    )
    parser.add_argument(
        "--no-push",
        dest="push",
        action="store_const",
        const="",
        help="not even when the run's configuration has model.push_to_hub: true",
    )
    parser.add_argument(
        "--evaluation",
        metavar="FILE",
        type=Path,
        help="of the model, from eval.py -o; it is published too (default: MODEL/evaluation.json)",
    )
    parser.add_argument(
        "--force", metavar="REASON", help="publish what is not better; the card gives the reason"
    )
    arguments = parser.parse_args()
    if arguments.quantize is None:
        arguments.quantize = [] if arguments.mlx or arguments.peft else DEFAULT_TYPES
    arguments.quantize = list(dict.fromkeys(kind.lower() for kind in arguments.quantize))
    return arguments


def check(arguments: argparse.Namespace) -> None:
    """Fail on what cannot work before anything is read."""
    if unknown := [kind for kind in arguments.quantize if kind not in TYPES]:
        raise ValueError(f"--quantize {unknown[0]}: no such type; choose from {', '.join(TYPES)}")
    if arguments.name and not NAME.fullmatch(arguments.name):
        raise ValueError(f"--name {arguments.name}: {NAME_RULE}")
    if arguments.ollama:
        check_ollama(arguments.ollama)
        if not arguments.quantize:
            raise ValueError("--ollama needs a GGUF file: name a type with --quantize")
    if arguments.push and not arguments.quantize:
        raise ValueError("--push needs a GGUF file: name a type with --quantize")


def check_ollama(name: str) -> None:
    """Raises ValueError for a [namespace/]name[:tag] that Ollama refuses, or when it is not there."""
    path, colon, tag = name.partition(":")
    parts = path.split("/") + ([tag] if colon else [])
    if path.count("/") > 1 or not all(NAME.fullmatch(part) for part in parts):
        raise ValueError(f"--ollama {name}: Ollama refuses it; {NAME_RULE}")
    if shutil.which("ollama") is None:
        raise ValueError("--ollama: there is no ollama command here; install it from ollama.com")


def default_name(base: str) -> str:
    """
    >>> default_name("Qwen/Qwen3-1.7B")
    'qmd-query-expansion-qwen3-1.7b'
    """
    safe = re.sub(r"[^a-z0-9_.-]+", "-", Path(base).name.lower())
    return f"qmd-query-expansion-{safe}"[:MAX_NAME].rstrip("-.")


def modelfile(gguf: str) -> str:
    """Ollama's Modelfile for the GGUF file beside it: prompt.py's frame to the byte, QMD's sampling.

    It ranges over .Messages, so that a chat's turns are framed as well, and names no tools and no
    thinking: the file's own template has neither, so this one stands.
    """
    return f'''FROM ./{gguf}
TEMPLATE """{{{{- range .Messages }}}}{IM_START}{{{{ .Role }}}}
{{{{ .Content }}}}{IM_END}
{{{{ end }}}}{IM_START}assistant
"""
PARAMETER stop "{IM_END}"
PARAMETER temperature {SAMPLING.temperature}
PARAMETER top_k {SAMPLING.top_k}
PARAMETER top_p {SAMPLING.top_p}
PARAMETER presence_penalty {SAMPLING.presence_penalty}
PARAMETER repeat_penalty 1
PARAMETER repeat_last_n {SAMPLING.penalty_last_n}
PARAMETER num_predict {SAMPLING.max_tokens}
PARAMETER num_ctx 4096
'''


def write_gguf_files(chain, arguments: argparse.Namespace, name: str) -> list[Path]:
    """One GGUF file a type, each checked before it takes its name."""
    from expander.convert import gguf_file
    from expander.convert.gguf_tokenizer import check_vocabulary, read_vocabulary
    from expander.convert.weights import FusedWeights
    from expander.files import atomic_write
    from expander.model import load_tokenizer, model_config

    config = model_config(chain.path)
    vocabulary = read_vocabulary(chain.path, config["vocab_size"])
    if arguments.verify:
        tokenizer = load_tokenizer(chain.path)
        check_vocabulary(vocabulary, lambda text: tokenizer.encode(text, add_special_tokens=False))

    def write(path: Path, kind: str, temporary: Path) -> None:
        # Read anew for each type: what has been read leaves memory.
        weights = FusedWeights(chain)
        file = gguf_file.plan(config, vocabulary, name, kind, weights.shapes)
        free = shutil.disk_usage(temporary.parent).free
        if file.nbytes > free:
            raise OSError(f"{file.nbytes / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")
        bar = cli.Progress(f"{path.name}: MB", file.nbytes // 10**6)
        samples = file.write(temporary, weights, lambda done: bar(done // 10**6))
        if arguments.verify:
            try:
                file.check(temporary, samples)
            except ValueError as error:
                raise ValueError(f"{path} was written wrong and is dropped: {error}") from None

    paths = []
    for kind in arguments.quantize:
        path = arguments.output / f"{name}-{kind}.gguf"
        started = time.monotonic()
        try:
            atomic_write(path, partial(write, path, kind))
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror or error}") from None
        took = cli.duration(time.monotonic() - started)
        print(f"{path}: {path.stat().st_size / 1e6:,.0f} MB, {took}")
        paths.append(path)
    return paths


def prepare_publication(chain, arguments: argparse.Namespace, name: str):
    """What may be published after the export; None where nobody asked for it.

    Raises:
        ValueError: it is refused.
    """
    from expander.convert import publish

    repo = publish.target(arguments.push, chain, name)
    if repo is None:
        if arguments.evaluation or arguments.force:
            raise ValueError(
                "--evaluation and --force say how to publish: name a --push OWNER/NAME"
            )
        return None
    publication = publish.prepare(repo, chain, arguments.evaluation, arguments.force)
    print(f"{repo}: {publication.record['publication']['verdict']}")
    return publication


def run_ollama(name: str, path: Path) -> None:
    """Raises OSError when `ollama create` fails, after its own output."""
    command = ["ollama", "create", name, "-f", str(path)]
    print(shlex.join(command), flush=True)
    if code := subprocess.run(command, check=False).returncode:
        raise OSError(f"ollama create failed with exit code {code}; is `ollama serve` running?")


def show_next(name: str, gguf: Path, path: Path) -> None:
    query = user_message("auth config")
    print(f"""
Ollama:
  {shlex.join(["ollama", "create", name, "-f", str(path)])}
  {shlex.join(["ollama", "run", name, query])}

QMD, in ~/.config/qmd/index.yml:
  models:
    generate: {json.dumps(str(gguf.resolve()))}""")


def main() -> None:
    arguments = parse_arguments()
    check(arguments)
    # What is half-written goes on the way out.
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    import mlx.core as mx

    from expander.files import write_text
    from expander.model import read_chain, trained_model

    mx.set_cache_limit(0)  # freed tensors go back to the system
    chain = read_chain(arguments.model or trained_model())
    print(" + ".join([chain.base, *map(str, chain.adapters)]))
    name = (arguments.name or default_name(chain.base)).lower()
    publication = prepare_publication(chain, arguments, name) if arguments.quantize else None
    if arguments.mlx or arguments.peft:
        from expander.convert.formats import write_mlx, write_peft

        if arguments.mlx:
            write_mlx(chain, arguments.mlx)
            print(f"{arguments.mlx}: the fused model for mlx_lm and transformers")
        if arguments.peft:
            rank = write_peft(chain, arguments.peft)
            print(f"{arguments.peft}: a PEFT adapter of rank {rank} over {chain.base}")
    if not arguments.quantize:
        return
    paths = write_gguf_files(chain, arguments, name)
    path = arguments.output / "Modelfile"
    write_text(path, modelfile(paths[0].name))
    if arguments.ollama:
        run_ollama(arguments.ollama, path)
    if publication:
        from expander.convert.publish import upload

        upload(publication, paths, path)
    show_next(arguments.ollama or name, paths[0], path)


if __name__ == "__main__":
    cli.run(main)
