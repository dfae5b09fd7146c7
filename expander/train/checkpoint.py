"""Training checkpoints that resume exactly.

A checkpoint is a folder step-000120/ of .safetensors files and a state.json with their checksums. It
is written under a temporary name and renamed, so a kill at any moment leaves the previous one intact.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from expander.files import digest, fsync_folder, save_arrays, write_json

STATE = "state.json"
OURS = (STATE, "optimizer.safetensors")  # one of them marks a folder as a checkpoint
STEP = re.compile(r"step-\d{6,}")
TEMPORARY = re.compile(r"\.\d+-\d+")  # .PID-STEP


@dataclass
class Checkpoint:
    step: int
    state: dict
    arrays: dict[str, dict]


class Checkpoints:
    """The last few checkpoints of one run, in `folder`.

    The folder may hold files of other programs: only what is recognised as ours is deleted.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, newest first."""
        ours = {path.parent.name for name in OURS for path in self.folder.glob(f"step-*/{name}")}
        return sorted((int(name[5:]) for name in ours if STEP.fullmatch(name)), reverse=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def save(self, step: int, state: dict, arrays: dict[str, dict]) -> Path:
        """Write one checkpoint, then delete the oldest beyond `keep`.

        Later steps, left by a run that fell back from a damaged checkpoint, are deleted as well.

        Args:
            state: any JSON object.
            arrays: file stem → named MLX arrays.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._delete_unfinished()
        target, temporary = self._path(step), self.folder / f".{os.getpid()}-{step}"
        try:
            temporary.mkdir()
            for stem, named in arrays.items():
                save_arrays(temporary / f"{stem}.safetensors", named)
            checksums = {path.name: digest(path) for path in sorted(temporary.iterdir())}
            write_json(temporary / STATE, {"step": step, "sha256": checksums, "state": state})
            if target.exists():
                self._delete(step)
            temporary.rename(target)
            fsync_folder(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        kept = [at for at in self.steps() if at <= step][: self.keep]
        for at in set(self.steps()) - set(kept):
            self._delete(at)
        return target

    def _read(self, step: int) -> Checkpoint:
        path = self._path(step)
        record = json.loads((path / STATE).read_text(encoding="utf-8"))
        for name, expected in record["sha256"].items():
            if digest(path / name) != expected:
                raise ValueError(f"{name} does not match its checksum")
        arrays = {Path(name).stem: mx.load(str(path / name)) for name in record["sha256"]}
        mx.eval(arrays)
        return Checkpoint(record["step"], record["state"], arrays)

    def latest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest intact checkpoint; `warn` is called with each damaged one."""
        for step in self.steps():
            try:
                return self._read(step)
            except (OSError, ValueError, KeyError) as error:
                warn(f"{self._path(step)} is damaged ({error}); falling back to the previous one")
        return None

    def _delete(self, step: int) -> None:
        """Delete a checkpoint, by way of a temporary name: a kill may leave only some of its files,
        which nobody would recognise as ours."""
        doomed = self.folder / f".0-{step}"
        self._path(step).rename(doomed)
        shutil.rmtree(doomed)

    def _delete_unfinished(self) -> None:
        """Delete what a killed run left half-written or half-deleted."""
        for path in self.folder.glob(".*"):
            if path.is_dir() and TEMPORARY.fullmatch(path.name):
                shutil.rmtree(path)

    def clear(self, *names: str) -> None:
        """Delete all checkpoints and the files `names`; the folder only if it is empty then."""
        self._delete_unfinished()
        for step in self.steps():
            self._delete(step)
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()
