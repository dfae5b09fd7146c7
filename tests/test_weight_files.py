"""weight_files.py: which files are a model's weights, damage in them, digests."""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from expander import files
from expander.base_config import ModelError
from expander.weight_files import digest, read_header, read_tensors, weight_files


@pytest.fixture
def base(tiny_qwen3, tmp_path):
    return shutil.copytree(tiny_qwen3, tmp_path / "base")


def split(base, index: bool = True) -> None:
    """Store a model in two files."""
    tensors, weight_map = load_file(base / "model.safetensors"), {}
    for number, names in enumerate((sorted(tensors)[:5], sorted(tensors)[5:]), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({key: tensors[key] for key in names}, base / name, {"format": "pt"})
        weight_map |= dict.fromkeys(names, name)
    (base / "model.safetensors").unlink()
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (base / "model.safetensors.index.json").write_text(text)


def test_the_header_describes_each_tensor(base):
    path, tensors = base / "model.safetensors", load_file(base / "model.safetensors")
    found = read_header(path)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        stored = found[name]
        assert (stored.shape, stored.dtype) == (value.shape, "F32")
        data = path.read_bytes()[stored.start : stored.end]
        assert data == value.tobytes()


def test_hidden_files_are_not_weights(base):
    for name in ("._model.safetensors", ".model.safetensors", "adapters.safetensors"):
        (base / name).write_bytes(b"Mac OS X")
    (base / "model-folder.safetensors").mkdir()
    assert [path.name for path in weight_files(base)] == ["model.safetensors"]
    assert read_tensors(base)


@pytest.mark.parametrize("index", [True, False])
def test_a_model_in_two_files(base, index):
    before = read_tensors(base).keys()
    split(base, index)
    assert read_tensors(base).keys() == before


def test_a_file_that_the_index_names_is_missing(base):
    split(base)
    (base / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is missing"):
        read_tensors(base)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", "[" * 10**5]
)
def test_a_damaged_index_is_named(base, content):
    (base / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json") as caught:
        read_tensors(base)
    assert "\n" not in str(caught.value)


def test_weights_of_two_models_in_one_folder(base):
    whole = (base / "model.safetensors").read_bytes()
    split(base)
    (base / "model.safetensors").write_bytes(whole)
    with pytest.raises(ModelError, match=r"model-00001.* and model\.safetensors both have"):
        read_tensors(base)


def header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\x10", "not a safetensors file"),
        (b"PK\x03\x04 a zip file, say", "not a safetensors file"),
        (b"\xff" * 100, "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (header(b"[]"), "header is damaged"),
        (header(b"not json"), "header is damaged"),
        (header(b"[" * 100_000), "header is damaged"),
        (header(b'{"a": 1}'), "header is damaged"),
        (header(b'{"a": {"dtype": "F32", "shape": [2]}}'), "header is damaged"),
        (header(b'{"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}'), "is damaged"),
        (header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'), "bytes, but"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_file_is_hashed_once_unless_it_changes(tmp_path, monkeypatch):
    hashed, path = [], tmp_path / "model.safetensors"
    save_file({"a": np.zeros(3, np.float32)}, path)
    original = files.digest
    monkeypatch.setattr(files, "digest", lambda path: hashed.append(path) or original(path))
    first = digest(path)
    monkeypatch.chdir(tmp_path)
    assert first == digest(path) == digest(path.relative_to(tmp_path)) == original(path)
    assert len(hashed) == 1
    save_file({"a": np.ones(3, np.float32)}, path)
    os.utime(path, ns=(1, 1))
    assert digest(path) == original(path) != first
