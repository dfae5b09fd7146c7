"""Atomic writes, and digests of files.

A file is written under a temporary name, flushed to disk and renamed: at any moment it has either its
old content or all of its new content.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path


def fsync(path: Path) -> None:
    """Flush a file to the drive."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # On macOS fsync leaves the data in the drive's cache, which a power cut empties.
        if full := getattr(fcntl, "F_FULLFSYNC", None):
            with suppress(OSError):  # file systems such as SMB do not have it
                fcntl.fcntl(descriptor, full)
                return
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Flush the names in a folder to the drive, where the file system can; SMB and exFAT may not."""
    with suppress(OSError):
        fsync(path)


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path in the folder of `path`, then rename it to `path`.

    Folders are created as needed.

    Raises:
        OSError: the disk is full or the folder is not writable; `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays at the end: MLX chooses the format by it.
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(temporary)
        fsync(temporary)
        temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file."""
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write an indented JSON file."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Write a JSON Lines file: one object per line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def save_arrays(path: Path, arrays: dict) -> None:
    """Write named MLX arrays as .safetensors; equal arrays give equal bytes.

    Raises:
        OSError: the write failed; `path` is unchanged.
    """
    import mlx.core as mx  # here, because most commands that write files do not need MLX

    def write(temporary: Path) -> None:
        try:
            # MLX writes arrays in insertion order.
            mx.save_safetensors(str(temporary), dict(sorted(arrays.items())))
        except RuntimeError as error:  # MLX's error for a short write
            raise OSError(f"cannot write {path}: {error}") from None

    atomic_write(path, write)


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {value!r:.60}")
    return value


def json_digest(value: object) -> str:
    """SHA-256 of a value that JSON can hold, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
