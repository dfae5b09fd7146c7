"""expander/train/checkpoint.py: whole or absent, damage detected, old checkpoints removed."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from expander.files import write_json
from expander.train import checkpoint
from expander.train.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent


def save(checkpoints: Checkpoints, step: int) -> Path:
    arrays = {"adapters": {"a": mx.full((3, 4), step)}, "optimizer": {"state": mx.array([step])}}
    return checkpoints.save(step, {"value": step / 2, "best": None}, arrays)


def latest(checkpoints: Checkpoints) -> tuple[int | None, list[str]]:
    """(step of the newest whole checkpoint, warnings), having checked what it holds."""
    warnings = []
    found = checkpoints.latest(warnings.append)
    if found is None:
        return None, warnings
    assert found.state == {"value": found.step / 2, "best": None}
    assert set(found.arrays) == {"adapters", "optimizer"}
    assert mx.array_equal(found.arrays["adapters"]["a"], mx.full((3, 4), found.step))
    return found.step, warnings


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_in_the_middle_of_the_arrays(tmp_path):
    """A real short write: the kernel lets no file grow beyond 64 kB."""
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
from pathlib import Path
import mlx.core as mx
from expander.train import checkpoint
from expander.train.checkpoint import Checkpoints
from expander.files import save_arrays
small, big = mx.zeros((8,)), mx.zeros((100_000,))
folder = Path({str(tmp_path)!r})
save_arrays(folder / "a.safetensors", {{"x": small}})
checkpoints = Checkpoints(folder / "checkpoints", keep=1)
checkpoints.save(1, {{}}, {{"adapters": {{"x": small}}}})
for attempt in (
    lambda: save_arrays(folder / "a.safetensors", {{"x": big}}),
    lambda: checkpoints.save(2, {{}}, {{"adapters": {{"x": big}}}}),
):
    try:
        attempt()
    except OSError as error:
        assert "adapters.safetensors" in str(error) or "a.safetensors" in str(error), error
    else:
        raise SystemExit("the write did not fail")
assert checkpoints.latest(print).step == 1
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == ["a.safetensors", "checkpoints"]
    assert names(tmp_path / "checkpoints") == ["step-000001"]
    assert mx.load(str(tmp_path / "a.safetensors"))["x"].shape == (8,)


def test_save_and_read_back(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.steps() == [] and latest(checkpoints) == (None, [])
    path = save(checkpoints, 7)
    assert path == tmp_path / "c" / "step-000007"
    assert names(path) == ["adapters.safetensors", "optimizer.safetensors", "state.json"]
    assert latest(checkpoints) == (7, [])


def test_arrays_are_held_in_memory_once_read(tmp_path):
    """MLX reads lazily, and a later save replaces the files."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    path = save(checkpoints, 1)
    found = checkpoints.latest(print)
    (path / "adapters.safetensors").write_bytes(b"")
    assert found.arrays["adapters"]["a"].sum().item() == 12


def test_only_the_last_ones_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (5, 10, 100, 1_000_000, 1_000_001):
        save(checkpoints, step)
    assert checkpoints.steps() == [1_000_001, 1_000_000, 100]
    assert len(names(tmp_path)) == 3


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "bit flipped":
        data[-1] ^= 1
    elif how == "zeros":  # what a power cut can leave
        data = bytearray(len(data))
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(data)


@pytest.mark.parametrize("name", ["adapters.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["truncated", "bit flipped", "zeros", "missing"])
def test_damage_falls_back_to_the_checkpoint_before(name, how, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        save(checkpoints, step)
    if (name, how) == ("state.json", "bit flipped"):  # the last byte is a newline
        record = json.loads((tmp_path / "step-000003" / name).read_text())
        record["sha256"]["optimizer.safetensors"] = "0" * 64
        write_json(tmp_path / "step-000003" / name, record)
    else:
        damage(tmp_path / "step-000003" / name, how)
    step, warnings = latest(checkpoints)
    assert step == 2
    [warning] = warnings
    assert "step-000003 is damaged" in warning and "\n" not in warning


def test_a_run_that_fell_back_keeps_what_it_saves(tmp_path):
    """The damaged checkpoint counts as the newest by its name, and must not push the others out."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 90)
    damage(tmp_path / "step-000090" / "adapters.safetensors", "truncated")
    assert latest(checkpoints)[0] is None
    save(checkpoints, 10)
    assert latest(checkpoints) == (10, [])
    assert checkpoints.steps() == [10]


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1)
    damage(tmp_path / "step-000001" / "adapters.safetensors", "truncated")
    save(checkpoints, 1)
    assert latest(checkpoints) == (1, [])


def test_what_a_killed_process_left_is_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1)
    stale = tmp_path / ".99999-2"
    stale.mkdir()
    (stale / "adapters.safetensors").write_bytes(b"half")
    assert checkpoints.steps() == [1] and latest(checkpoints) == (1, [])
    save(checkpoints, 3)
    assert names(tmp_path) == ["step-000001", "step-000003"]


def test_a_kill_while_a_checkpoint_is_deleted_leaves_nothing_for_good(tmp_path, monkeypatch):
    def killed(path: Path, **_) -> None:
        for name in ("state.json", "optimizer.safetensors"):
            (path / name).unlink()
        raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    save(checkpoints, 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        checkpoints.clear()
    save(checkpoints, 2)
    assert names(tmp_path / "run") == ["step-000002"]
    checkpoints.clear()
    assert not (tmp_path / "run").exists()


def test_other_files_in_the_folder_do_no_harm(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    (tmp_path / ".DS_Store").write_bytes(b"Finder's")
    (tmp_path / "step-000009 copy").mkdir()
    (tmp_path / "config.yaml").write_text("model: {}\n")
    save(checkpoints, 1)
    save(checkpoints, 2)
    assert checkpoints.steps() == [2]
    assert latest(checkpoints) == (2, [])
    assert (tmp_path / "config.yaml").is_file()


def test_a_failed_checkpoint_leaves_those_before(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)

    def disk_full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save(checkpoints, 2)
    assert names(tmp_path) == ["step-000001"]
    assert latest(checkpoints) == (1, [])


def test_clear(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.clear()
    save(checkpoints, 1)
    checkpoints.clear()
    assert not (tmp_path / "c").exists()
