"""Atomic writes, strict JSON, paths as users write them, and digests of files.

A file is written under a temporary name, flushed to disk and renamed: at any moment it has either its
old content or all of its new content.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

# The first bytes of the file that Git LFS leaves in place of one that it has not downloaded.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
VARIABLE = re.compile(r"\$(?:\w+|\{\w+\})")


def expand_path(text: str) -> str:
    """A path or name as a user writes it, with `~`, `$NAME` and `${NAME}` expanded.

    Raises:
        ValueError: it is empty, has a control character, or names an unknown variable or user.
    """
    if not text.strip():
        raise ValueError("the name is empty")
    if len(text) > 1000:
        raise ValueError(f"{text[:40]!r}... has {len(text)} characters, more than a path can have")
    if any(ord(char) < 32 for char in text):
        raise ValueError(f"{text!r} contains a control character")
    path = os.path.expandvars(os.path.expanduser(text))  # noqa: PTH111, keeps "./" and "a//b"
    if unset := VARIABLE.search(path):
        raise ValueError(f"{text}: the environment variable {unset[0]} is not set")
    if path.startswith("~"):
        raise ValueError(f"{text}: no such user's home; for a name that begins with ~ write ./~")
    return path


def pointer_error(start: bytes) -> ValueError | None:
    """An error if a file begins as a Git LFS pointer, which stands in for the file itself."""
    if start.removeprefix(b"\xef\xbb\xbf").startswith(LFS_POINTER):
        return ValueError("a Git LFS pointer, not the file itself; run git lfs pull where it is")
    return None


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


def _own_stream(status: os.stat_result) -> int | None:
    """The descriptor of stdout or stderr if it writes to the file of that status."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(status, os.fstat(descriptor)):
                return descriptor
    return None


def _open_stream(path: Path) -> int | None:
    """A descriptor to write to, if `path` must be written to rather than replaced.

    That is a device, a pipe, or the file that stdout or stderr already writes to.

    Raises:
        OSError: the path is a folder, a read-only file, a socket, or a pipe without a reader.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "Is a folder; choose the name of a file", str(path))
    if own := _own_stream(status):
        (sys.stdout if own == 1 else sys.stderr).flush()
        return os.dup(own)
    if stat.S_ISREG(status.st_mode):
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "Is a read-only file", str(path))
        return None
    try:
        # Opening a pipe waits for its reader, who may never come.
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        reason = "Is a pipe or socket that nobody reads; start its reader, or choose a file"
        raise OSError(errno.ENXIO, reason, str(path)) from None
    os.set_blocking(descriptor, True)
    return descriptor


def check_writable(path: Path) -> None:
    """Create the folder of a file to be written, and fail now if the file cannot be written.

    Raises:
        OSError: as `atomic_write`.
    """
    descriptor = _open_stream(path)
    if descriptor is not None:
        os.close(descriptor)
        return
    folder = Path(os.path.realpath(path)).parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "Is in a read-only folder", str(path))


def _write_stream(descriptor: int, path: Path, write: Callable[[Path], None]) -> None:
    with os.fdopen(descriptor, "wb") as stream, tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / path.name
        write(temporary)
        with temporary.open("rb") as made:
            shutil.copyfileobj(made, stream)


def _keep_mode(path: Path, temporary: Path) -> None:
    """Give `temporary` the mode and, where allowed, the owner of the file that it replaces."""
    with suppress(FileNotFoundError):
        old, new = path.stat(), temporary.stat()
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            with suppress(OSError):
                os.chown(temporary, old.st_uid, old.st_gid)
        temporary.chmod(stat.S_IMODE(old.st_mode))


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path in the folder of `path`, then rename it to `path`.

    Folders are created as needed. A link is followed, a file keeps its mode, and a device or pipe is
    written to instead of being replaced.

    Raises:
        OSError: the disk is full or the folder is not writable; `path` is unchanged. Or `path` is
            a folder, a read-only file, a socket, or a pipe without a reader.
    """
    descriptor = _open_stream(path)
    if descriptor is not None:
        _write_stream(descriptor, path, write)
        return
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays at the end: MLX chooses the format by it. A name has at most 255 bytes.
    temporary = path.with_name(f".{os.getpid()}-{path.name[-60:]}")
    try:
        write(temporary)
        _keep_mode(path, temporary)
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


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:60]!r} is given twice")
        found[name] = value
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # NaN, Infinity, 1e999
        raise ValueError(f"{text:.40} is not a finite number")
    return value


def parse_json(raw: bytes) -> object:
    """Parse UTF-8 JSON in which no key is given twice and every number is finite.

    Raises:
        ValueError: it is not; the message is one line.
    """
    if error := pointer_error(raw[:100]):
        raise error
    try:
        return json.loads(
            raw.decode("utf-8-sig"),
            object_pairs_hook=_object,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not valid JSON ({error.msg} at {line}column {error.colno})") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None
    except ValueError as error:  # a key given twice, a number that is too long or not finite
        raise ValueError(f"not valid JSON ({error})") from None


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def json_digest(value: object) -> str:
    """SHA-256 of a value that JSON can hold, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
