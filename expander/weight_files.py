"""The safetensors files of a model folder: which ones are read, their headers, their digests."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

from expander import files
from expander.base_config import ModelError

INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100 << 20  # bytes, as in the safetensors package
PIECE = 16 << 20  # bytes compared at a time
LFS_POINTER = b"version https://git-lfs"


class StoredTensor(NamedTuple):
    """Where a tensor is: bytes `start` to `end` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def weight_files(folder: Path) -> list[Path]:
    """The files that mlx-lm loads as a model's weights; hidden ones, such as ._model, are not."""
    return sorted(path for path in folder.glob("model*.safetensors") if path.is_file())


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, without their values.

    Raises:
        ModelError: the file is not complete, or not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            if (first + stream.read(32)).startswith(LFS_POINTER):
                raise ModelError(f"{path}: a Git LFS pointer, not the file; run git lfs pull")
            if len(first) < 8 or not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise ModelError(f"{path}: not a safetensors file, or cut off; copy it again")
            stream.seek(8)
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: StoredTensor(
                    path,
                    str(entry["dtype"]),
                    tuple(map(int, entry["shape"])),
                    *(8 + length + int(offset) for offset in entry["data_offsets"]),
                )
                for name, entry in header.items()
            }
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ModelError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ModelError(f"{path}: its header is damaged; copy the file again") from None
    end = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if end != size:
        raise ModelError(f"{path}: {size} bytes, but its header describes {end}; copy it again")
    return tensors


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors in a model folder's weight files.

    Raises:
        ModelError: a file is damaged or missing, or two files have the same tensor.
    """
    _check_index(folder)
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        found = read_header(path)
        if both := sorted(found.keys() & tensors.keys()):
            raise ModelError(
                f"{folder}: {tensors[both[0]].file.name} and {path.name} both have {both[0]}; "
                "remove the file that does not belong to this model"
            )
        tensors |= found
    return tensors


def _check_index(folder: Path) -> None:
    """Check that every file in the index exists. mlx-lm loads what is there without reading it."""
    path = folder / INDEX
    if not path.is_file() or not weight_files(folder):
        return
    try:
        index = files.read_json(path).get("weight_map")
    except ValueError as error:
        raise ModelError(str(error)) from None
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise ModelError(f"{path}: weight_map is {index!r:.40}, expected tensor names and files")
    present = {file.name for file in weight_files(folder)}
    if missing := sorted(set(index.values()) - present):
        raise ModelError(
            f"{folder}: {missing[0]} is missing, which {INDEX} names in weight_map; download it"
        )


def equal_tensors(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors have the same bytes."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    times = tuple(x.file.stat().st_mtime_ns for x in (a, b))
    return _equal(a, b, times)


@functools.cache
def _equal(a: StoredTensor, b: StoredTensor, times: tuple[int, ...]) -> bool:
    with a.file.open("rb") as first, b.file.open("rb") as second:
        first.seek(a.start)
        second.seek(b.start)
        left = a.end - a.start
        while left > 0:
            pieces = [stream.read(min(left, PIECE)) for stream in (first, second)]
            if pieces[0] != pieces[1] or not pieces[0]:
                return False
            left -= len(pieces[0])
    return True


def digest(path: Path) -> str:
    """The SHA-256 of a file, computed once per process unless the file changes."""
    status = path.stat()
    return _digest(path.resolve(), status.st_size, status.st_mtime_ns)


@functools.cache
def _digest(path: Path, size: int, mtime: int) -> str:
    return files.digest(path)
