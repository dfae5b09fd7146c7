"""Resident memory of `train.py sft` per step, for one or several checkouts.

    python -m tests.bench.resident_memory --model outputs/demo/SmolLM2-135M-Instruct \
        --checkout before=../before after=. --steps 300 -o resident.csv --plot resident.png

Each checkout trains for the same steps on the same rows, one after the other. The memory is what the
system reports for the process after each step; MLX's own counters see less of it.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

STEP = re.compile(r"step (\d+)/")


def resident(pid: int) -> float:
    """Resident memory of a process, in GB."""
    done = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True
    )
    return int(done.stdout) * 1024 / 1e9


def measure(checkout: Path, settings: list[str]) -> dict[int, float]:
    """Gigabytes after each step."""
    flags = [part for setting in settings for part in ("--set", setting)]
    process = subprocess.Popen(
        [sys.executable, "-u", str(checkout.resolve() / "train.py"), "sft", *flags],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    found = {}
    for line in process.stdout:
        if step := STEP.match(line):
            found[int(step[1])] = resident(process.pid)
    if process.wait():
        sys.exit(f"{checkout}: train.py exited with {process.returncode}")
    return found


def plot(curves: dict[str, dict[int, float]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, curve in curves.items():
        axes.plot(curve.keys(), curve.values(), label=name)
    axes.set(xlabel="step", ylabel="resident memory, GB", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--rows", default="data/*.jsonl", help="a file, a folder or a glob")
    parser.add_argument("--checkout", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("-o", "--output", type=Path, required=True, help="CSV file")
    parser.add_argument("--plot", type=Path, help="PNG file (needs matplotlib)")
    arguments = parser.parse_args()
    curves = {}
    for checkout in arguments.checkout:
        name, _, folder = checkout.partition("=")
        with tempfile.TemporaryDirectory() as output:
            settings = [
                f"model.base={arguments.model}",
                f"model.output={output}/sft",
                f"dataset.name={Path(arguments.rows).resolve()}",
                "dataset.eval_split=0",
                f"training.max_steps={arguments.steps}",
                "training.gradient_accumulation_steps=1",
                *arguments.set,
            ]
            curves[name] = measure(Path(folder), settings)
        with arguments.output.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["checkout", "step", "resident_gb"])
            writer.writerows((n, s, f"{gb:.3f}") for n, c in curves.items() for s, gb in c.items())
        print(f"{name}: {max(curves[name].values()):.2f} GB at most", flush=True)
    if arguments.plot:
        plot(curves, arguments.plot)


if __name__ == "__main__":
    main()
