"""Measure two trainers in one run: each in its own process, taking turns.

Each process has its own memory peak, and other load on the machine affects both. A worker reports in
lines of JSON on its standard output, and continues when it receives a line.
"""

import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mlx.core as mx
from mlx_lm.cli_ui import make_console


class Turn:
    """The worker's side; counts the wall and CPU time between its pauses."""

    def __init__(self):
        self.channel, self.since = sys.stdout, None
        self.seconds = self.cpu_seconds = 0.0

    def stop(self) -> None:
        """Stop the clocks."""
        if self.since is not None:
            wall, cpu = self.since
            self.seconds += time.perf_counter() - wall
            self.cpu_seconds += time.process_time() - cpu
            self.since = None

    def restart(self) -> None:
        """Count from now on only."""
        self.seconds = self.cpu_seconds = 0.0
        self.since = time.perf_counter(), time.process_time()

    def pause(self, news: str = "") -> None:
        """Let the other side take its turn. The clocks start after the first pause."""
        self.stop()
        self._send({"news": news})
        if not sys.stdin.readline():
            sys.exit("the parent process has ended")
        self.since = time.perf_counter(), time.process_time()

    def finish(self, figures: dict[str, float]) -> None:
        """Report the figures of this side, with its seconds."""
        clocks = {"seconds": self.seconds, "CPU seconds": self.cpu_seconds}
        self._send({"figures": figures | clocks})

    def _send(self, message: dict) -> None:
        print(json.dumps(message), file=self.channel, flush=True)


@contextlib.contextmanager
def working(log: Path) -> Iterator[Turn]:
    """A worker's context: prints go to `log`, and the turn's lines to standard output."""
    make_console().quiet = True
    turn = Turn()
    with log.open("w", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
        yield turn


def peaks() -> dict[str, float]:
    """Peak memory so far in GB: MLX's allocations, and the resident set of the process."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak memory": mx.get_peak_memory() / 1e9, "resident set": resident / 1e9}


def alternate(sides: Sequence[str], command: Callable[[str], list]) -> dict[str, dict[str, float]]:
    """Run `command(side)` for each side, in turns until all have ended; returns each side's figures."""
    workers = {
        side: subprocess.Popen(
            command(side), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for side in sides
    }

    def receive(side: str) -> dict:
        line = workers[side].stdout.readline()
        if not line:
            sys.exit(f"error: {side} ended with {workers[side].wait()}")
        return json.loads(line)

    for side in sides:
        receive(side)  # it has loaded its model
    figures: dict[str, dict[str, float]] = {}
    while len(figures) < len(sides):
        for side in sides:
            if side in figures:
                continue
            workers[side].stdin.write("\n")
            workers[side].stdin.flush()
            message = receive(side)
            if "figures" in message:
                figures[side] = message["figures"]
            else:
                print(f"{side:12} {message['news']}", flush=True)
    return figures


def print_table(figures: dict[str, dict[str, float]], goals: dict[str, str]) -> None:
    """Print one row per figure: both sides, the ratio of the first to the second, and its goal."""
    ours, theirs = figures
    print(f"\n{'':18}{ours:>12}{theirs:>14}     ratio  goal")
    for name, value in figures[ours].items():
        other = figures[theirs][name]
        ratio = f"{value / other:10.3f}  {goals.get(name, '')}".rstrip()
        print(f"{name:18}{value:12.5g}{other:14.5g}{ratio}")
