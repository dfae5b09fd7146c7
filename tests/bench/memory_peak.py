"""Compare memory.py's estimate with the measured peak of real training steps.

    python -m tests.bench.memory_peak -o memory.txt

Every case trains a random model by `train_sft` or `train_grpo`, in a process of its own, and reads
MLX's peak. The models are Qwen3 with the real vocabulary, a quarter of the width of Qwen3-0.6B and
Qwen3-1.7B, and Gemma 3 as wide as 270M with a small vocabulary. They have 8 layers; the files are
bfloat16, as on the Hub. `--case NAME` runs the cases whose name contains NAME.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from expander.config import Config, load_config
from expander.model import compute_dtype, model_config
from expander.rows import Rows
from expander.train import grpo, sft
from expander.train.batches import Row
from expander.train.memory import Shape, estimate, peak_resident
from tests.chains import make_adapter
from tests.tiny import make_gemma3, make_qwen3

MB = 1e6
# Rows of the embedding, fewer for a 4-bit or bfloat16 head, whose product is slow on a CPU; ids that
# the rows use.
VOCABULARY, PACKED_VOCABULARY, TOKENS = 151_936, 32_768, 400
SIZES = {"layers": 8, "heads": 4, "kv_heads": 2, "head_dim": 128}
MODELS = {"0.6B": {"hidden": 256, "ffn": 768}, "1.7B": {"hidden": 512, "ffn": 1536}}
GEMMA = {
    "layers": 8,
    "hidden": 640,
    "heads": 4,
    "kv_heads": 1,
    "head_dim": 256,
    "ffn": 2048,
    "window": 512,
}
PROMPT = 24


@dataclass(frozen=True)
class Case:
    stage: str
    model: str
    dtype: str
    base: str  # full, 4-bit (quantised in training) or 4-bit files
    checkpointing: bool
    rows: int
    length: int  # tokens of a row (sft) or completion (grpo)

    def __str__(self) -> str:
        parts = [self.stage, self.model, self.dtype, self.base, f"{self.rows}x{self.length}"]
        return " ".join(parts + ["checkpointing"] * self.checkpointing)


def cases() -> Iterator[Case]:
    for dtype in ("float32", "bfloat16"):
        for model in MODELS:
            for base in ("full", "4-bit"):
                for rows, length in ((1, 161), (3, 113)):
                    for checkpointing in (False, True):
                        yield Case("sft", model, dtype, base, checkpointing, rows, length)
                for rows, length in ((2, 48), (3, 96)):
                    yield Case("grpo", model, dtype, base, False, rows, length)
        yield Case("sft", "1.7B", dtype, "4-bit files", False, 2, 113)
        yield Case("grpo", "1.7B", dtype, "4-bit files", False, 2, 64)
        for checkpointing in (False, True):
            yield Case("sft", "Gemma", dtype, "full", checkpointing, 3, 113)
        yield Case("grpo", "Gemma", dtype, "full", False, 3, 96)


def make_base(folder: Path, model: str, dtype: str, base: str) -> Path:
    """A random model in bfloat16 files or 4-bit ones."""
    if model == "Gemma":
        make_gemma3(folder, **GEMMA)
    else:
        small = make_qwen3(folder, **SIZES, **MODELS[model], vocab_pad=0)
        fast = base == "full" and dtype == "float32"
        rows = VOCABULARY if fast else PACKED_VOCABULARY
        rows -= model_config(small)["vocab_size"]
        make_qwen3(folder, **SIZES, **MODELS[model], vocab_pad=rows)
    path = folder / "model.safetensors"
    weights = {name: value.astype(mx.bfloat16) for name, value in mx.load(str(path)).items()}
    mx.save_safetensors(str(path), weights, {"format": "pt"})
    if base == "4-bit files":
        packed, config = quantize_model(*load_model(folder), group_size=64, bits=4)
        save_model(folder, packed)
        save_config(config, folder / "config.json")
    return folder


def configure(case: Case, base: Path, output: Path) -> Config:
    """Two steps of one micro-batch (sft) or of two (grpo), each followed by an evaluation."""
    config, _ = load_config(case.stage)
    config.model.base, config.model.output = str(base), str(output / case.stage)
    config.model.sft = str(output / "adapter")
    training = config.training
    training.batch_size, training.max_steps, training.eval_steps = case.rows, 2, 1
    training.gradient_checkpointing = case.checkpointing
    if case.stage == "sft":
        config.model.load_in_4bit = case.base == "4-bit"
        training.gradient_accumulation_steps = 1
    else:
        training.gradient_accumulation_steps = 2
        config.grpo.reward = "percentage"
        config.grpo.num_generations = 2 * case.rows
        config.grpo.max_completion_length = case.length
    return config


def ids(count: int, seed: int) -> list[int]:
    return [(7 * i + seed) % TOKENS + 30 for i in range(count)]


def measure(case: Case, base: Path) -> dict[str, float]:
    """Run a case in this process: MLX's peak, the estimate and resident memory in bytes."""
    shape, width = Shape.of(model_config(base)), compute_dtype().size
    with tempfile.TemporaryDirectory() as folder:
        config = configure(case, base, Path(folder))
        if case.stage == "sft":
            rows = [Row(ids(case.length, seed), PROMPT, "") for seed in range(2 * case.rows)]
            sft.read_rows = lambda config: Rows([])
            sft.tokenize_rows = lambda *_: (rows, rows[: case.rows])
            expected = estimate("sft", config, shape, case.length, width)
            sft.train_sft(config, resume=False, overwrite=False)
        else:
            bits = 4 if case.base == "4-bit" else None
            make_adapter(Path(config.model.sft), base, rank=16, bits=bits)
            prompts = [(f"query {seed}", ids(PROMPT, seed)) for seed in range(4)]
            grpo.read_rows = lambda config: Rows([])
            grpo.split_prompts = lambda *_: (prompts, prompts[:2])
            fused = shape.projections
            expected = estimate("grpo", config, shape, PROMPT, width, bits=bits, fused=fused)
            grpo.train_grpo(config, resume=False, overwrite=False)
        return {
            "peak": mx.get_peak_memory(),
            "estimate": expected.peak,
            "resident": peak_resident(),
            "resident_estimate": expected.resident - expected.buffers,  # the CPU keeps no buffers
            **asdict(expected),
        }


def run_apart(case: Case, base: Path) -> dict[str, float]:
    """`measure` in a new process."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.bench.memory_peak",
            "--measure",
            json.dumps(asdict(case)),
            "--base",
            str(base),
        ],
        env=os.environ | {"QMD_DTYPE": case.dtype},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{case}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("-o", "--output", type=Path, help="also write each case's figures as JSON")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # a case, in this process
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Case(**json.loads(arguments.measure)), arguments.base)))
        return

    print(f"{'case':44} estimate  measured  ratio   resident: estimate  measured")
    ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        bases: dict[tuple[str, str, str], Path] = {}
        for case in cases():
            if arguments.case not in str(case):
                continue
            key = case.model, case.dtype, case.base
            if key not in bases:
                bases[key] = make_base(Path(folder) / str(len(bases)), *key)
            found = run_apart(case, bases[key])
            ratios[str(case)] = found["estimate"] / found["peak"]
            if arguments.output:
                with arguments.output.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(asdict(case) | found) + "\n")
            print(
                f"{case!s:44} {found['estimate'] / MB:5.0f} MB  {found['peak'] / MB:5.0f} MB  "
                f"{ratios[str(case)]:5.2f}   {found['resident_estimate'] / MB:15.0f} MB  "
                f"{found['resident'] / MB:5.0f} MB",
                flush=True,
            )
    worst = max(ratios, key=lambda name: abs(ratios[name] - 1))
    print(f"worst: {worst}, {ratios[worst]:.2f}")


if __name__ == "__main__":
    main()
