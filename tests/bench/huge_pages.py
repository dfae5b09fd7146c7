"""What huge pages save on Linux: the passes of fast_exp.py with them and with pages of 4 KB.

    . examples/fast_blas.sh && python -m tests.bench.huge_pages MODEL [--rounds 9]

Both sides run in processes of their own and take turns, with the same BLAS; one has no GLIBC_TUNABLES.
Milliseconds on the clock, medians: other load on the machine counts, and makes the gain larger. Last
comes the resident memory, in GB, which may grow with the pages.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx

from tests.bench.fast_exp import passes
from tests.bench.turns import alternate, peaks, print_table, working

SIDES = ("huge pages", "4 KB pages")


def work(arguments: argparse.Namespace, log: Path) -> None:
    with working(log) as turn:
        found = passes(arguments.model, wanted=True)
        milliseconds: dict[str, list[float]] = {name: [] for name in found}
        for number in range(arguments.rounds + 1):
            turn.pause(f"round {number}" if number else "ready")
            for name, run in found.items():
                started = time.perf_counter()
                mx.eval(run())
                if number:  # the first warms up
                    milliseconds[name].append(1000 * (time.perf_counter() - started))
        medians = {name: statistics.median(values) for name, values in milliseconds.items()}
        turn.finish(medians | {"resident set": peaks()["resident set"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a base model's folder")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.log:
        return work(arguments, arguments.log)
    if "GLIBC_TUNABLES" not in os.environ:
        parser.error("GLIBC_TUNABLES is not set; source examples/fast_blas.sh first, on Linux")
    with tempfile.TemporaryDirectory() as folder:

        def command(side: str) -> list:
            without = [] if side == SIDES[0] else ["env", "-u", "GLIBC_TUNABLES"]
            module = [sys.executable, "-m", "tests.bench.huge_pages", arguments.model]
            options = ["--rounds", str(arguments.rounds), "--log", Path(folder) / f"{side}.txt"]
            return without + module + options

        print_table(alternate(SIDES, command), goals={})


if __name__ == "__main__":
    main()
