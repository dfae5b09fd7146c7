"""What the commands share: the Python check, one-line errors, plain progress."""

import sys

if sys.version_info < (3, 11):
    found = ".".join(map(str, sys.version_info[:3]))
    sys.exit(f"error: Python 3.11 or newer is needed, this is {found}; make .venv with a newer one")

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path


class Interrupted(Exception):
    """Stopped by a signal after saving; carries the signal's number."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


def run(main: Callable[[], int | None]) -> None:
    """Run a command: user mistakes end in one line and exit code 2, never in a traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rank = int(os.environ.get("MLX_RANK", "0"))  # of the processes that mlx.launch starts
    if rank:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115, till the end
    label = f"rank {rank}: error" if rank else "error"
    try:
        sys.exit(main() or 0)
    except Interrupted as stop:
        if not rank:
            print(stop, file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except (ValueError, OSError) as error:
        print(f"{label}: {error}", file=sys.stderr)
        sys.exit(2)


def whole(least: int) -> Callable[[str], int]:
    """The type of an argument that takes whole numbers from `least` on."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} on")
        return int(text)

    return number


def new_file(text: str) -> Path:
    """The type of an argument that names a file to be written, which must not be there yet."""
    if Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} is there already: name another, or delete it")
    return Path(text)


def duration(seconds: float) -> str:
    """Seconds as 45s, 3m10s or 2h05m.

    >>> duration(45), duration(190), duration(7500)
    ('45s', '3m10s', '2h05m')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest}s"
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


class Progress:
    """A counter redrawn in place on a terminal; elsewhere a plain line now and then."""

    def __init__(self, what: str, total: int, every_seconds: float = 15.0):
        self.what, self.total, self.every = what, total, every_seconds
        self.start = self.last = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        left = duration((now - self.start) / done * (self.total - done)) if done else "?"
        line = f"{self.what} {done}/{self.total}, {left} left"
        if sys.stderr.isatty():
            print(
                f"\r\x1b[K{line if done < self.total else ''}", end="", file=sys.stderr, flush=True
            )
        elif done < self.total and now - self.last >= self.every:
            print(line, file=sys.stderr, flush=True)
            self.last = now
