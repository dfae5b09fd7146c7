"""expander/files.py: a file is replaced as a whole or not at all."""

import errno
import fcntl
import hashlib
import os
import stat
from pathlib import Path

import mlx.core as mx
import pytest
from safetensors.numpy import load_file

from expander import files
from expander.files import atomic_write, digest, save_arrays, write_json, write_rows, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folders_are_created_and_files_replaced(tmp_path):
    path = tmp_path / "new" / "deep" / "a.json"
    write_json(path, {"é": 1})
    assert path.read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'
    write_text(path, "again")
    assert path.read_text() == "again"
    assert names(path.parent) == ["a.json"]


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(moment, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def disk_full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(temporary: Path) -> None:
        temporary.write_text("new, but")
        if moment == "write":
            disk_full()

    if moment == "fsync":
        monkeypatch.setattr(os, "fsync", disk_full)
    if moment == "replace":
        monkeypatch.setattr(Path, "replace", disk_full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, write)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_data_reach_the_disk_before_the_rename(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(files, "fsync", lambda path: order.append(path.name))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: order.append("replace") or replace(a, b))
    write_text(tmp_path / "a.txt", "x")
    assert order == [f".{os.getpid()}-a.txt", "replace", tmp_path.name]


def test_arrays_are_a_plain_safetensors_file_with_the_same_bytes_in_any_order(tmp_path):
    arrays = {"x": mx.arange(4), "a": mx.zeros((2,))}
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_arrays(first, arrays)
    save_arrays(second, dict(reversed(arrays.items())))
    assert load_file(first)["x"].tolist() == [0, 1, 2, 3]
    assert digest(first) == digest(second) == hashlib.sha256(first.read_bytes()).hexdigest()


def test_rows_are_one_object_per_line(tmp_path):
    write_rows(tmp_path / "a.jsonl", iter([{"é": 1}, {"b": "c\nd"}]))
    text = (tmp_path / "a.jsonl").read_text(encoding="utf-8")
    assert text == '{"é": 1}\n{"b": "c\\nd"}\n'


# macOS and network drives


def test_a_mac_flushes_the_drives_cache(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda descriptor, command: flushed.append(command))
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append("fsync"))
    write_text(tmp_path / "a", "text")
    assert flushed == [51, 51]  # the file and its folder


def test_a_drive_that_cannot_flush_its_cache_is_synced(tmp_path, monkeypatch):
    def unsupported(descriptor, command):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    synced = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", unsupported)
    monkeypatch.setattr(os, "fsync", synced.append)
    write_text(tmp_path / "a", "text")
    assert len(synced) == 2


def test_a_drive_that_cannot_sync_folders_takes_files(tmp_path, monkeypatch):
    fsync = os.fsync

    def files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"
