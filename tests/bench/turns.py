"""Two trainers measured in one run: each in a process of its own, one training while the other waits.

Peaks of memory are then each one's own, and whatever else the machine does meets both alike. A worker
tells what it has done in a line of JSON on its standard output, and goes on when it is sent a line.
"""

import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


class Turn:
    """A worker's side. Seconds are those between its pauses alone."""

    def __init__(self):
        self.channel, self.seconds, self.since = sys.stdout, 0.0, None

    def stop(self) -> None:
        """End the time that is counted."""
        if self.since is not None:
            self.seconds += time.perf_counter() - self.since
            self.since = None

    def pause(self, news: str = "") -> None:
        """Let the other side have its turn; time is counted from the end of the first pause on."""
        self.stop()
        self._tell({"news": news})
        if not sys.stdin.readline():
            sys.exit("the other process has gone")
        self.since = time.perf_counter()

    def finish(self, figures: dict[str, float]) -> None:
        self._tell({"figures": figures | {"seconds": self.seconds}})

    def _tell(self, what: dict) -> None:
        print(json.dumps(what), file=self.channel, flush=True)


@contextlib.contextmanager
def working(log: Path) -> Iterator[Turn]:
    """A worker's process: all that is printed goes to `log`, the turn's lines to standard output."""
    from mlx_lm.cli_ui import make_console

    make_console().quiet = True
    turn = Turn()
    with log.open("w", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
        yield turn


def peaks() -> dict[str, float]:
    """The most memory so far in GB: what MLX held, and the resident set of the process."""
    import mlx.core as mx

    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak memory": mx.get_peak_memory() / 1e9, "resident set": resident / 1e9}


def alternate(sides: Sequence[str], command: Callable[[str], list]) -> dict[str, dict[str, float]]:
    """Run `command(side)` of each side in turns until all have ended; the figures of each."""
    workers = {
        side: subprocess.Popen(
            command(side), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for side in sides
    }

    def listen(side: str) -> dict:
        line = workers[side].stdout.readline()
        if not line:
            sys.exit(f"error: {side} ended with {workers[side].wait()}")
        return json.loads(line)

    for side in sides:
        listen(side)  # loaded
    figures: dict[str, dict[str, float]] = {}
    while len(figures) < len(sides):
        for side in sides:
            if side in figures:
                continue
            workers[side].stdin.write("\n")
            workers[side].stdin.flush()
            heard = listen(side)
            if "figures" in heard:
                figures[side] = heard["figures"]
            else:
                print(f"{side:12} {heard['news']}", flush=True)
    return figures


def print_table(figures: dict[str, dict[str, float]], goals: dict[str, str]) -> None:
    """One row a figure: the first side, the second, the first over the second, the goal for that."""
    ours, theirs = figures
    print(f"\n{'':18}{ours:>12}{theirs:>14}     ratio  goal")
    for name, value in figures[ours].items():
        other = figures[theirs][name]
        ratio = f"{value / other:10.3f}  {goals.get(name, '')}".rstrip()
        print(f"{name:18}{value:12.5g}{other:14.5g}{ratio}")
