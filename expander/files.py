"""Files that are never half-written, and training checkpoints that resume exactly.

A checkpoint is a folder step-000120/ of .safetensors files and a state.json with their checksums. It
is written under a temporary name and renamed, so a kill at any moment leaves the one before intact.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a temporary file beside `path`, then put it in place in one step.

    Raises:
        OSError: the disk is full or the folder not writable; `path` is as it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: MLX writes the format that the file name ends in.
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(temporary)
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """JSON Lines: one object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def save_arrays(path: Path, arrays: dict) -> None:
    """Write named MLX arrays as .safetensors; the same arrays give the same bytes."""
    import mlx.core as mx

    def write(temporary: Path) -> None:
        try:
            # The order in which names were inserted shows in MLX's file.
            mx.save_safetensors(str(temporary), dict(sorted(arrays.items())))
        except RuntimeError as error:  # what MLX raises when a write falls short
            raise OSError(f"cannot write {path}: {error}") from None

    atomic_write(path, write)


def digest(path: Path) -> str:
    """The SHA-256 of a file, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
