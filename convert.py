"""Export a trained model: `python convert.py && ollama create …`.

Fuses base → SFT → GRPO in float32, writes GGUF files that llama.cpp, QMD and Ollama run, and a
Modelfile. Left out: uploading, vision towers, architectures other than qwen3, qwen2 and llama.
"""

import argparse
import re
import signal
import sys
import time
from pathlib import Path

import cli
from prompt import IM_END, IM_START
from qmd import SAMPLING

TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
# q4_k_m is the type of QMD's own file; q8_0 is for those who would rather have the last percent.
DEFAULT_TYPES = ["q4_k_m", "q8_0"]
TRAINED = (Path("outputs/grpo"), Path("outputs/sft"))


def modelfile(gguf: str) -> str:
    """Ollama's Modelfile for a GGUF file beside it: prompt.py's frame to the byte, QMD's sampling."""
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Export a trained model as GGUF files.")
    parser.add_argument(
        "--model", help="adapter folder, model folder or Hub id (default: outputs/grpo, else sft)"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/gguf"), metavar="DIR")
    parser.add_argument(
        "--quantize",
        nargs="+",
        default=DEFAULT_TYPES,
        metavar="TYPE",
        help=f"any of {' '.join(TYPES)}",
    )
    parser.add_argument("--name", help="of the files (default: qmd-query-expansion-BASE)")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def trained_model() -> str:
    for folder in TRAINED:
        if (folder / "adapter_config.json").is_file():
            return str(folder)
    raise ValueError("no model yet: run python train.py sft first, or name one with --model")


def main() -> None:
    arguments = parse_arguments()
    import mlx.core as mx

    from checkpoint import atomic_write, write_text
    import gguf_file
    from model import model_config, read_chain
    from vocabulary import read_vocabulary
    from weights import FusedWeights

    chain = read_chain(arguments.model or trained_model())
    config = model_config(chain.path)
    vocabulary = read_vocabulary(chain.path, config["vocab_size"])
    base = re.sub(r"[^a-z0-9._-]+", "-", Path(chain.base).name.lower()).strip("-.")
    name = arguments.name or f"qmd-query-expansion-{base}"
    for kind in arguments.quantize:
        path = arguments.output / f"{name}-{kind}.gguf"
        started = time.monotonic()
        weights = FusedWeights(chain)
        file_type = gguf_file.FILE_TYPES[kind]
        keys = gguf_file.metadata(config, vocabulary, name, file_type)
        tensors = gguf_file.plan(config, weights.shapes, file_type)

        def write(temporary: Path) -> None:
            progress = cli.Progress(path.name, len(tensors))
            samples = gguf_file.write(
                temporary, config["model_type"], keys, tensors, weights, progress
            )
            if arguments.verify:
                gguf_file.check(temporary, config["model_type"], keys, tensors, samples)

        atomic_write(path, write)
        print(
            f"{path}: {path.stat().st_size / 1e6:.0f} MB, {cli.duration(time.monotonic() - started)}"
        )
    first = f"{name}-{arguments.quantize[0]}.gguf"
    write_text(arguments.output / "Modelfile", modelfile(first))
    print(f"ollama create {name} -f {arguments.output / 'Modelfile'}")


if __name__ == "__main__":
    cli.run(main)
