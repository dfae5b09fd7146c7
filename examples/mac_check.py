"""Measure short runs of train.py on this machine; examples/mac_check.sh sets up and calls it.

For each model in full precision and in 4 bits: a few steps of SFT with the default batch, of GRPO from
its adapter with the defaults, and of GRPO as others have published it (4 completions of 256 tokens); then
the decoding speed of eval.py. The figures come from metrics.jsonl and from eval.py's results. After so
few steps, completions run to the token limit, so GRPO is slower here than in a real run.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from expander import cli
from expander.text import table

MODELS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B")
STEPS = {"sft": 6, "grpo": 3}
SETTINGS = ("dataset.name=data/*.jsonl", "dataset.eval_split=0")
OUTPUT = Path("outputs/mac_check")
# One prompt with 4 completions of 256 tokens per step, as in the figures below.
AS_PUBLISHED = (
    "grpo.reward=percentage",
    "grpo.num_generations=4",
    "grpo.max_completion_length=256",
    "training.batch_size=4",
    "training.gradient_accumulation_steps=1",
)
# What the authors of other trainers report, to read next to this machine's figures.
PUBLISHED = [
    ("published by", "machine", "run", "steps/s", "tokens/s", "peak GB"),
    ("mlxrl 0.2.4", "M4 Max", "Qwen3-0.6B 4-bit, GRPO 4 x 256", "0.283", "454", "6.25"),
    ("mlx-lm-lora", "M4 Max", "Qwen3-0.6B 4-bit, GRPO 4 x 256", "0.412", "558", "5.3"),
    ("mlx-tune", "M4 Max", "Qwen3-0.6B 4-bit, GRPO 4 x 256", "0.130", "", ""),
    ("mlx-tune", "M4 Pro", "Qwen3-0.6B bf16, SFT", "2.2", "", "2.6"),
]


def train(stage: str, folder: Path, *settings: str) -> Path:
    """Run a stage of train.py into `folder`, and return it.

    Raises:
        ValueError: the run failed; with its exit code and the last line of its errors.
    """
    command = [sys.executable, "train.py", stage, "--overwrite"]
    for setting in (
        *SETTINGS,
        *settings,
        f"model.output={folder}",
        f"training.max_steps={STEPS[stage]}",
    ):
        command += ["--set", setting]
    done = subprocess.run(
        command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        reason = (
            done.stderr.strip() or "no message; perhaps killed for lack of memory"
        ).splitlines()[-1]
        raise ValueError(f"exit code {done.returncode}: {reason}")
    return folder


def figures(folder: Path) -> tuple[str, str, str]:
    """(steps per second, tokens per second, peak memory in GB) of a run, without its first step."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    first, *rest = map(json.loads, text.splitlines())  # the first step compiles kernels
    seconds = rest[-1]["seconds"] - first["seconds"]
    tokens = sum(record["tokens_per_second"] for record in rest) / len(rest)
    peak = max(record["peak_memory_gb"] for record in (first, *rest))
    return f"{len(rest) / seconds:.3f}", f"{tokens:.0f}", f"{peak:.1f}"


def decode(model: Path) -> tuple[str, str, str]:
    """eval.py's tokens per second for 32 queries; the other columns of `figures` are empty.

    Raises:
        ValueError: the command failed.
    """
    output = model / "decode.json"
    command = [sys.executable, "eval.py", "--model", str(model), "--max-queries", "32"]
    done = subprocess.run(
        [*command, "-o", str(output)],
        stdout=sys.stderr,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
    speed = json.loads(output.read_text(encoding="utf-8"))["speed"]
    return "", f"{speed['tokens_per_second']:.0f}", ""


def measure(models: list[str]) -> tuple[list[tuple[str, ...]], list[str]]:
    """Run each model; return (rows of figures, a line per failed run)."""
    rows, failed = [], []
    for model in models:
        for weights, four_bits in (("full", "false"), ("4-bit", "true")):
            folder = OUTPUT / f"{Path(model).name}-{weights}"
            sft, grpo = folder / "sft", folder / "grpo"
            base = (f"model.base={model}", f"model.load_in_4bit={four_bits}")
            start = (f"model.sft={sft}", "grpo.eval_prompts=0")
            # The others need the SFT run's adapter, so a failed SFT run skips them.
            runs = {
                "sft": lambda sft=sft, base=base: figures(train("sft", sft, *base)),
                "grpo": lambda grpo=grpo, start=start: figures(train("grpo", grpo, *start)),
                "grpo 4 x 256": lambda grpo=grpo, start=start: figures(
                    train("grpo", grpo, *start, *AS_PUBLISHED)
                ),
                "decoding": lambda sft=sft: decode(sft),
            }
            for name, run in runs.items():
                print(f"== {model} {weights} {name}", file=sys.stderr, flush=True)
                try:
                    rows.append((model, weights, name, *run()))
                except ValueError as error:
                    failed.append(f"failed   {model} {weights} {name}: {error}")
                    if name == "sft":
                        break
    return rows, failed


def machine() -> list[str]:
    import mlx.core as mx

    from expander.model import compute_dtype
    from expander.train.memory import installed

    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform()
    packages = ("mlx", "mlx-lm")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    dtype = str(compute_dtype()).removeprefix("mlx.core.")
    return [
        f"system   {system}, {platform.machine()}, {installed() / 2**30:.0f} GB, {os.cpu_count()} cores",
        f"device   {mx.default_device()}, weights in {dtype}",
        # The chip's name and, on Metal, its memory limits.
        *(f"         {name} {value}" for name, value in mx.device_info().items()),
        f"versions Python {platform.python_version()}, {', '.join(versions)}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure SFT and GRPO on this machine.")
    parser.add_argument(
        "models",
        nargs="*",
        default=MODELS,
        metavar="MODEL",
        help="Hub id or folder (default: Qwen3-0.6B and Qwen3-1.7B)",
    )
    rows, failed = measure(parser.parse_args().models)
    head = ("model", "weights", "run", "steps/s", "tokens/s", "peak GB")
    print("```", *machine(), table([head, *rows]), *failed, table(PUBLISHED), "```", sep="\n")
    return 0 if rows else 1


if __name__ == "__main__":
    cli.run(main)
