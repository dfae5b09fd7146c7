"""Shared by all commands: the Python version check, one-line errors, argument types, progress."""

import sys

if sys.version_info < (3, 11):
    found = ".".join(map(str, sys.version_info[:3]))
    sys.exit(f"error: Python 3.11 or newer is required, this is {found}; recreate .venv with it")

import argparse
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from expander.files import expand_path


class Interrupted(Exception):
    """A command saved its work and stopped because of a signal."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


def silence(name: str) -> None:
    """Discard what is still written to stdout or stderr (`name`), such as a pipe without a reader."""
    setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115, open until the end


def tell(text: str) -> None:
    """Print to stderr, if anybody still reads it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        silence("stderr")


def flush_stdout() -> None:
    """Print what is buffered, while an error can still be reported and change the exit code.

    Raises:
        OSError: stdout is full or has no reader.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        silence("stdout")
        raise OSError(f"cannot print the rest of the output: {error.strerror}") from None


def run(main: Callable[[], int | None]) -> None:
    """Run a command: user errors print one line with the fix and exit with 2, never a traceback."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the shell: >&-
            silence(stream)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rank = int(os.environ.get("MLX_RANK", "0"))  # set by mlx.launch
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")  # an ASCII terminal must not end a run
    if rank:  # only rank 0 prints
        silence("stdout")
    label = f"rank {rank}: error" if rank else "error"
    try:
        code = main() or 0
        flush_stdout()
        sys.exit(code)
    except Interrupted as stop:
        if not rank:
            tell(str(stop))
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        silence("stdout")
        sys.exit(141)
    except (ValueError, OSError) as error:
        tell(f"{label}: {error}")
        try:
            flush_stdout()
        except OSError:
            silence("stdout")
        sys.exit(2)


def integer_from(minimum: int) -> Callable[[str], int]:
    """An argument type: integers of at least `minimum` that fit into 32 bits."""

    def integer(text: str) -> int:
        if not text.isdecimal() or len(text) > 10 or not minimum <= int(text) < 2**32:
            raise argparse.ArgumentTypeError(
                f"{text[:40]} is not an integer >= {minimum} and below 2^32"
            )
        return int(text)

    return integer


def number_up_to(maximum: float, meaning: str) -> Callable[[str], float]:
    """An argument type: a number from 0 to `maximum`.

    Args:
        meaning: completes the error "x is not ...".
    """

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= maximum:  # nan fails too
            raise argparse.ArgumentTypeError(f"{text[:40]} is not {meaning}")
        return value

    return number


seconds = number_up_to(sys.float_info.max, "a number of seconds")


def name(text: str) -> str:
    """An argument type: a path or Hub id, with `~` and environment variables expanded."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path(text: str) -> Path:
    """An argument type: a file or folder, with `~` and environment variables expanded."""
    return Path(name(text))


def new_file(text: str) -> Path:
    """An argument type: a file to write that does not exist yet."""
    file = path(text)
    if file.exists():
        raise argparse.ArgumentTypeError(f"{text} already exists; choose another name or delete it")
    return file


def keep_awake() -> None:
    """On a Mac, prevent idle sleep until this process ends."""
    if command := shutil.which("caffeinate"):
        subprocess.Popen(
            [command, "-i", "-w", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run, which may save before it ends
        )


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
    """A counter on stderr: redrawn in place on a terminal, otherwise a line every few seconds."""

    def __init__(self, label: str, total: int, every_seconds: float = 15.0):
        self.label, self.total, self.every = label, total, every_seconds
        self.start = self.last = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        left = duration((now - self.start) / done * (self.total - done)) if done else "?"
        line = f"{self.label} {done}/{self.total}, {left} left"
        if sys.stderr.isatty():
            shown = line if done < self.total else ""
            print(f"\r\x1b[K{shown}", end="", file=sys.stderr, flush=True)
        elif done < self.total and now - self.last >= self.every:
            print(line, file=sys.stderr, flush=True)
            self.last = now
