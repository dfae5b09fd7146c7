"""expander/files.py: a file is replaced as a whole or not at all."""

import errno
import fcntl
import hashlib
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from safetensors.numpy import load_file

from expander import files
from expander.files import (
    atomic_write,
    check_writable,
    digest,
    expand_path,
    parse_json,
    read_json,
    save_arrays,
    write_json,
    write_rows,
    write_text,
)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


ROOT = Path(__file__).parent.parent


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


# Targets that are not a plain file


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    target, link, second = tmp_path / "deep" / "a.txt", tmp_path / "link", tmp_path / "second"
    write_text(target, "old")
    link.symlink_to(Path("deep", "a.txt"))
    second.symlink_to(link)
    write_text(second, "new")
    assert second.is_symlink() and link.is_symlink() and target.read_text() == "new"
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "b.txt")
    write_text(dangling, "b")
    assert dangling.is_symlink() and (tmp_path / "b.txt").read_text() == "b"
    assert names(tmp_path / "deep") == ["a.txt"]


def test_a_link_to_itself_is_refused(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for write in (check_writable, lambda path: write_text(path, "x")):
        with pytest.raises(OSError, match="symbolic links"):
            write(loop)
    assert loop.is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o755])
def test_a_file_that_is_replaced_keeps_its_mode(mode, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(mode)
    write_text(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_text() == "new"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any file")
def test_a_read_only_file_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o400)
    with pytest.raises(PermissionError, match="read-only"):
        write_text(path, "new")
    assert path.read_text() == "old"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change owners")
def test_a_file_that_root_replaces_keeps_its_owner(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    os.chown(path, 1234, 1234)
    write_text(path, "new")
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 1234)


def test_a_pipe_with_a_reader_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, {"a": 1})
    assert os.read(reader, 100) == b'{\n  "a": 1\n}\n'
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and names(tmp_path) == ["pipe"]


def test_a_pipe_or_socket_that_nobody_reads_is_refused_and_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name in map(Path, ("pipe", "socket")):
            for write in (check_writable, lambda path: write_text(path, "x")):
                with pytest.raises(OSError, match="nobody reads"):
                    write(name)
    assert stat.S_ISFIFO(Path("pipe").stat().st_mode) and Path("socket").is_socket()
    assert names(tmp_path) == ["pipe", "socket"]


def test_a_device_is_written_to_and_never_replaced(tmp_path, monkeypatch):
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    monkeypatch.setattr(Path, "replace", lambda *paths: pytest.fail("a device was replaced"))
    check_writable(link)
    write_text(link, "x")
    assert link.is_symlink() and Path("/dev/null").is_char_device()
    with pytest.raises(OSError, match="No space left"):
        write_text(Path("/dev/full"), "x")


def test_the_file_that_stdout_writes_to_is_written_to(tmp_path):
    code = (
        "from pathlib import Path; from expander.files import write_text; print('before');"
        "write_text(Path('out'), 'text\\n'); write_text(Path('/dev/stdout'), 'more\\n'); print('after')"
    )
    path = tmp_path / "out"
    with path.open("w") as out:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, "-c", code], stdout=out, cwd=tmp_path, env=environment, check=True
        )
    assert path.read_text() == "before\ntext\nmore\nafter\n"


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match="folder"):
        check_writable(tmp_path)
    with pytest.raises(IsADirectoryError, match="folder"):
        write_text(tmp_path, "x")


def test_the_longest_name_that_a_file_can_have_is_written(tmp_path):
    path = tmp_path / ("ä" * 125 + ".json")
    write_json(path, {})
    assert names(tmp_path) == [path.name]


# Paths and JSON from users


def test_a_path_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("A", "x y")
    assert expand_path("~/a") == expand_path("$HOME/a") == expand_path("${HOME}/a") == "/home/me/a"
    for same in ("Qwen/Qwen3-1.7B", "./~a", "a~b", "a b", "cost$", "ü/\u200c"):
        assert expand_path(same) == same
    assert expand_path("$A/$A") == "x y/x y"
    for text, reason in {
        "": "empty",
        " ": "empty",
        "a\0b": "control character",
        "a\nb": "control character",
        "$NO_SUCH_NAME/a": "is not set",
        "~no-such-user/a": "no such user",
    }.items():
        with pytest.raises(ValueError, match=reason):
            expand_path(text)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is given twice"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b"[-Infinity]", "-Infinity is not a finite number"),
        (b"[1e999]", "1e999 is not a finite number"),
        (b"7" * 5000, "not valid JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": 1,\n}', "at line 2, column 1"),
        (b'{"a\0": 1}', "not valid JSON"),
        (b"\xff\xfe{\0}\0", "not UTF-8"),
        (POINTER, "a Git LFS pointer"),
        (b"", "not valid JSON"),
    ],
)
def test_json_that_could_be_misread_is_refused_with_its_file(raw, reason, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    with pytest.raises(ValueError) as caught:
        parse_json(raw)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"^{path}: "):
        read_json(path)


def test_plain_json_is_read_and_other_values_than_objects_are_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1, 2.5, null, "\xc3\xa9"]}')
    assert read_json(path) == {"a": [1, 2.5, None, "é"]}
    path.write_bytes(b"[]")
    with pytest.raises(ValueError, match="expected a JSON object, found list"):
        read_json(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_json(tmp_path / "none.json")


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
