"""Fingerprints of a checkout's results, to show that a change of the code changed none of them.

    python -m tests.bench.same_results ../before > before.txt
    python -m tests.bench.same_results . > after.txt
    diff before.txt after.txt

On tiny random models, in float32: the adapters of 6 SFT steps and 4 GRPO steps (in one go, stopped
and resumed, on two ranks), a GGUF file of each type for Qwen3 and llama, and the results file of an
evaluation in both decodings. Each line is a name and a SHA-256; times and speeds are left out.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import tiny
from tests.ports import free_ports

ROWS = Path(__file__).parent.parent / "rows.jsonl"
SHARED = [
    "dataset.eval_split=0.2",
    "training.save_interval_minutes=null",
    "training.save_steps=2",
    "training.eval_steps=2",
]
SFT = [
    "model.base=base",
    f"dataset.name={ROWS}",
    *SHARED,
    "training.max_steps=6",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.learning_rate=1e-4",
    "lora.dropout=0.1",
]
GRPO = [
    f"dataset.name={ROWS}",
    *SHARED,
    "training.max_steps=4",
    "training.learning_rate=1e-3",
    "training.gradient_accumulation_steps=4",
    "grpo.reward=percentage",
    "grpo.num_generations=4",
    "grpo.max_completion_length=12",
    "grpo.eval_prompts=3",
    "grpo.penalties.truncated=0.5",
]
KINDS = ["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Checkout:
    """The commands of a checkout, run in a working directory of their own."""

    def __init__(self, root: Path, work: Path):
        self.root, self.work = root.resolve(), work

    def command(self, script: str, *arguments: str, folder: str = ".", env=None, wait=True):
        process = subprocess.Popen(
            [sys.executable, str(self.root / script), *arguments],
            cwd=self.work / folder,
            env=os.environ | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return self.end(process) if wait else process

    def end(self, process: subprocess.Popen, expected: int = 0) -> None:
        output, _ = process.communicate()
        if process.returncode != expected:
            sys.exit(f"{process.args}: exit code {process.returncode}\n{output}")

    def train(self, stage: str, settings: list[str], *more: str, **options):
        flags = [part for setting in settings for part in ("--set", setting)]
        return self.command("train.py", stage, *flags, *more, **options)


def show(name: str, path: Path) -> None:
    print(f"{name:<28} {sha256(path.read_bytes())}", flush=True)


def train_all(checkout: Checkout, stage: str, settings: list[str]) -> None:
    """One run in one go; one stopped after a step and resumed; one on two ranks."""
    work = checkout.work
    checkout.train(stage, settings)
    show(f"{stage} adapter", work / f"outputs/{stage}/adapters.safetensors")
    show(f"{stage} last adapter", work / f"outputs/{stage}/last/adapters.safetensors")

    resumed = [*settings, f"model.output=outputs/{stage}-resumed"]
    process = checkout.train(stage, resumed, wait=False)
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGTERM)
            break
    checkout.end(process, expected=128 + signal.SIGTERM)
    checkout.train(stage, resumed, "--resume")
    show(f"{stage} resumed", work / f"outputs/{stage}-resumed/last/adapters.safetensors")

    (work / "hosts.json").write_text(
        json.dumps([[f"127.0.0.1:{free_ports(2) + rank}"] for rank in range(2)])
    )
    for folder in ("rank0", "rank1"):
        shutil.rmtree(work / folder, ignore_errors=True)
        (work / folder / "outputs").mkdir(parents=True)
        shutil.copytree(work / "base", work / folder / "base")
        shutil.copytree(work / "outputs/sft", work / folder / "outputs/sft")
    ranks = [
        checkout.train(
            stage,
            [*settings, f"model.output=outputs/{stage}-ranks", "lora.dropout=0"],
            folder=f"rank{rank}",
            env={"MLX_HOSTFILE": str(work / "hosts.json"), "MLX_RANK": str(rank)},
            wait=False,
        )
        for rank in range(2)
    ]
    for process in ranks:
        checkout.end(process)
    show(f"{stage} on two ranks", work / f"rank0/outputs/{stage}-ranks/last/adapters.safetensors")


def export(checkout: Checkout, model: str, label: str) -> None:
    checkout.command(
        "convert.py", "--model", model, "--output", f"gguf-{label}", "--quantize", *KINDS
    )
    for kind in KINDS:
        [path] = (checkout.work / f"gguf-{label}").glob(f"*-{kind}.gguf")
        show(f"{label} {kind}.gguf", path)
    show(f"{label} Modelfile", checkout.work / f"gguf-{label}" / "Modelfile")


def evaluate(checkout: Checkout, decode: str) -> None:
    output = f"{decode}.json"
    checkout.command(
        *("eval.py", "--model", "outputs/grpo", "--decode", decode, "--max-queries", "40"),
        *("--max-new-tokens", "24", "-o", output),
    )
    record = json.loads((checkout.work / output).read_text(encoding="utf-8"))
    del record["speed"]
    print(f"{f'evaluation {decode}':<28} {sha256(json.dumps(record).encode())}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="folder whose commands are run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        checkout = Checkout(arguments.checkout, Path(work))
        tiny.end_early(tiny.make_qwen3(checkout.work / "base"))
        tiny.make_llama(checkout.work / "llama")
        train_all(checkout, "sft", SFT)
        train_all(checkout, "grpo", GRPO)
        export(checkout, "outputs/grpo", "qwen3")
        export(checkout, "llama", "llama")
        evaluate(checkout, "greedy")
        evaluate(checkout, "qmd")


if __name__ == "__main__":
    main()
