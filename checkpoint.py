"""Files that are never half-written, and training checkpoints that resume exactly.

A checkpoint is a folder step-000120/ of .safetensors files and a state.json with their checksums. It
is written under a temporary name and renamed, so a kill at any moment leaves the one before intact.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

STATE = "state.json"


def _fsync(path: Path) -> None:
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
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
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


@dataclass
class Checkpoint:
    step: int
    state: dict
    arrays: dict[str, dict]


class Checkpoints:
    """The last few checkpoints of one run, in `folder`."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, newest first."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def save(self, step: int, state: dict, arrays: dict[str, dict]) -> Path:
        """Write one checkpoint, then drop the oldest beyond `keep`.

        Later steps, left by a run that fell back from a damaged checkpoint, are dropped as well.

        Args:
            state: what JSON can hold.
            arrays: file stem → named MLX arrays.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".*"):
            if stale.is_dir():  # and not a file such as Finder's .DS_Store
                shutil.rmtree(stale)
        target, temporary = self._path(step), self.folder / f".{os.getpid()}-{step}"
        try:
            temporary.mkdir()
            for stem, named in arrays.items():
                save_arrays(temporary / f"{stem}.safetensors", named)
            checksums = {path.name: digest(path) for path in sorted(temporary.iterdir())}
            write_json(temporary / STATE, {"step": step, "sha256": checksums, "state": state})
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)
            _fsync(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        kept = [at for at in self.steps() if at <= step][: self.keep]
        for at in set(self.steps()) - set(kept):
            shutil.rmtree(self._path(at))
        return target

    def _read(self, step: int) -> Checkpoint:
        import mlx.core as mx

        path = self._path(step)
        record = json.loads((path / STATE).read_text(encoding="utf-8"))
        for name, expected in record["sha256"].items():
            if digest(path / name) != expected:
                raise ValueError(f"{name} does not match its checksum")
        arrays = {Path(name).stem: mx.load(str(path / name)) for name in record["sha256"]}
        mx.eval(arrays)
        return Checkpoint(record["step"], record["state"], arrays)

    def latest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that reads back whole; damaged ones are named to `warn`."""
        for step in self.steps():
            try:
                return self._read(step)
            except (OSError, ValueError, KeyError) as error:
                warn(f"{self._path(step)} is damaged ({error}): falling back to the one before")
        return None

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
