"""convert.py and its modules: exported files compared with the models they were made from."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gguf
import mlx.core as mx
import numpy as np
import pytest
import tiny
from chains import fused, make_adapter, make_chain
from dtypes import tolerance
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file, save_file

import convert
from examples import get_smollm2
from expander import model as models
from expander.convert import formats, gguf_file, kquants, weights
from expander.convert import modelfile as modelfile_module
from expander.convert.gguf_tokenizer import PROBES, check_tokenizer, read_tokenizer
from expander.convert.modelfile import modelfile, ollama_command
from expander.model import read_chain
from expander.prompt import CHATML, render_prompt, user_message
from expander.qmd import SAMPLING

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# Base weights are rounded to the dtype of training; the adapters are added in float32.
WEIGHT_BOUND = tolerance(float32=3e-6, bfloat16=1e-2)
TOKENS = mx.array([[5, 300, 17, 44, 260, 9, 301, 2]])


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`export("--model", folder)` runs the command in this process."""

    def export(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        convert.main()

    return export


@pytest.fixture(scope="module")
def chain(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chain(tmp_path_factory.mktemp("chain"), tiny_qwen3)


@pytest.fixture(scope="module")
def llama_chain(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chain(tmp_path_factory.mktemp("llama"), tiny_llama)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied Qwen2, with biases of q, k and v."""
    return tiny.make_qwen2(tmp_path_factory.mktemp("models") / "qwen2", tied=False)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def read(path: Path) -> tuple[dict, dict[str, np.ndarray], dict[str, Kind]]:
    """Keys, dequantised tensors and their types, read by the gguf package's own reader."""
    reader = gguf.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return keys, tensors, {t.name: t.tensor_type for t in reader.tensors}


# The tensors


def test_qwen3_tensors_are_the_fused_weights(chain, export, tmp_path):
    export("--model", chain, "--output", tmp_path, "--quantize", "f32")
    _, tensors, kinds = read(tmp_path / "qmd-query-expansion-tiny-qwen3-f32.gguf")
    expected = fused(chain)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    parts = get_smollm2.LAYER_NAMES | {
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
    }
    for layer in range(2):
        for ours, theirs in parts.items():
            names[f"model.layers.{layer}.{theirs}.weight"] = f"blk.{layer}.{ours}.weight"
    assert names.keys() == expected.keys()
    assert set(names.values()) == tensors.keys()
    assert set(kinds.values()) == {Kind.F32}
    for source, target in names.items():
        np.testing.assert_allclose(tensors[target], expected[source], rtol=0, atol=WEIGHT_BOUND)
    # The adapters are included: without them the same comparison fails.
    base = fused(read_chain(str(chain)).path)
    changed = tensors["blk.0.attn_q.weight"] - base["model.layers.0.self_attn.q_proj.weight"]
    assert np.abs(changed).max() > 0.1


def test_llama_rows_of_q_and_k_are_permuted(llama_chain, export, tmp_path):
    """The reader in examples/get_smollm2.py undoes the permutation."""
    export("--model", llama_chain, "--output", tmp_path, "--quantize", "f32", "--name", "llama")
    reader = gguf.GGUFReader(tmp_path / "llama-f32.gguf")
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    found, expected = get_smollm2.weights(reader, metadata), fused(llama_chain)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=WEIGHT_BOUND)
    q = gguf.dequantize(
        *next((t.data, t.tensor_type) for t in reader.tensors if "attn_q" in t.name)
    )
    assert not np.allclose(q, expected["model.layers.0.self_attn.q_proj.weight"])


def test_permutation_by_hand():
    """Two heads of four rows: the halves are 0 1 and 2 3, the pairs that rotate 0 2 and 1 3."""
    rows = np.arange(8.0)[:, None]
    assert gguf_file.permute(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_qwen2_has_biases_and_an_untied_output(qwen2, export, tmp_path):
    export("--model", qwen2, "--output", tmp_path, "--quantize", "q8_0")
    keys, tensors, kinds = read(tmp_path / "qmd-query-expansion-qwen2-q8_0.gguf")
    source = load_file(qwen2 / "model.safetensors")
    assert keys["general.architecture"] == "qwen2"
    assert "blk.0.attn_q_norm.weight" not in tensors
    for part in "qkv":
        name = f"blk.1.attn_{part}.bias"
        assert kinds[name] == Kind.F32
        expected = source[f"model.layers.1.self_attn.{part}_proj.bias"]
        bound = tolerance(float32=0.0, bfloat16=1e-2)
        np.testing.assert_allclose(tensors[name], expected, rtol=0, atol=bound)
    assert kinds["output.weight"] == kinds["token_embd.weight"] == Kind.Q8_0
    error = np.abs(tensors["output.weight"] - source["lm_head.weight"]).max()
    assert 0 < error < np.abs(source["lm_head.weight"]).max() / 200


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with rows of 256 values, as K-quants need."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    return tiny.make_qwen3(folder, hidden=256, layers=8, heads=2, kv_heads=1, ffn=256)


@pytest.mark.parametrize(
    ("kind", "base", "attn_v_0", "embedding", "bound"),
    [
        ("f16", Kind.F16, Kind.F16, Kind.F16, 3e-4),
        ("bf16", Kind.BF16, Kind.BF16, Kind.BF16, 2e-3),
        ("q8_0", Kind.Q8_0, Kind.Q8_0, Kind.Q8_0, 0.008),
        ("q6_k", Kind.Q6_K, Kind.Q6_K, Kind.Q6_K, 0.025),
        ("q5_k_m", Kind.Q5_K, Kind.Q6_K, Kind.Q6_K, 0.045),
        ("q4_k_m", Kind.Q4_K, Kind.Q6_K, Kind.Q6_K, 0.09),
    ],
)
def test_types(wide, export, tmp_path, kind, base, attn_v_0, embedding, bound):
    """The tensor types of each file type, and the error of their values."""
    export("--model", wide, "--output", tmp_path, "--quantize", kind.upper(), "--name", "Wide")
    keys, tensors, kinds = read(tmp_path / f"wide-{kind}.gguf")
    assert kinds["blk.0.ffn_up.weight"] == kinds["blk.1.attn_v.weight"] == base
    assert (kinds["blk.0.attn_v.weight"], kinds["token_embd.weight"]) == (attn_v_0, embedding)
    assert {kinds[name] for name in kinds if "norm" in name} == {Kind.F32}
    assert keys["general.file_type"] == gguf_file.FILE_TYPES[kind]
    expected = fused(wide)
    bound += tolerance(float32=0.0, bfloat16=3e-3)  # the base is rounded first
    for target, source in (
        ("blk.0.ffn_up", "layers.0.mlp.up_proj"),
        ("blk.0.attn_v", "layers.0.self_attn.v_proj"),
        ("token_embd", "embed_tokens"),
    ):
        values = tensors[f"{target}.weight"]
        assert 0 < gguf_file.relative_error(values, expected[f"model.{source}.weight"]) < bound


def test_a_tensor_read_in_pieces_is_the_same(llama_chain, monkeypatch):
    """Pieces are complete heads, and get the matching columns of an adapter."""
    name = "model.layers.1.self_attn.q_proj.weight"
    (expected,) = weights.FusedWeights(read_chain(str(llama_chain))).read(name)
    monkeypatch.setattr(weights, "PIECE", 40 * 64)  # 40 of the 64 rows; 32 are complete heads
    pieces = list(weights.FusedWeights(read_chain(str(llama_chain))).read(name, multiple=16))
    assert [len(piece) for piece in pieces] == [32, 32]
    np.testing.assert_allclose(np.concatenate(pieces), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_quantised_in_training_is_exported_as_trained(tiny_qwen3, tmp_path, bits):
    adapter = make_adapter(tmp_path / "sft", tiny_qwen3, bits=bits)
    model, _ = models.load_chain(read_chain(str(adapter)), fuse_last=True)
    source = weights.FusedWeights(read_chain(str(adapter)))
    plain = fused(adapter)
    assert source.shapes["model.embed_tokens.weight"] == plain["model.embed_tokens.weight"].shape
    for name, layer in (
        ("model.layers.0.mlp.down_proj", model.layers[0].mlp.down_proj),
        ("model.layers.1.self_attn.q_proj", model.layers[1].self_attn.q_proj),
    ):
        (found,) = source.read(f"{name}.weight")
        expected = np.array(layer.weight.astype(mx.float32))
        bound = tolerance(float32=1e-6, bfloat16=1e-2)
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound)
        assert np.abs(found - plain[f"{name}.weight"]).max() > 1e-3


def test_a_base_with_quantised_files(tiny_qwen3, tmp_path):
    from mlx_lm.utils import load, quantize_model, save_model

    base = copy_of(tiny_qwen3, tmp_path / "base-4bit")
    model, _, config = load(str(tiny_qwen3), return_config=True)
    model, config = quantize_model(model, config, group_size=32, bits=4)
    (base / "model.safetensors").unlink()
    save_model(base, model)
    edit_json(base / "config.json", quantization=config["quantization"])
    source = weights.FusedWeights(read_chain(str(base)))
    for name in ("model.embed_tokens", "model.layers.1.mlp.gate_proj"):
        module = dict(model.named_modules())[name]
        (found,) = source.read(f"{name}.weight")
        expected = mx.dequantize(module.weight, module.scales, module.biases, 32, 4)
        bound = tolerance(float32=0.0, bfloat16=1e-2)
        np.testing.assert_allclose(found, np.array(expected), rtol=0, atol=bound)


# The keys


def test_keys_of_qwen3(chain, export, tmp_path):
    export("--model", chain, "--output", tmp_path, "--quantize", "f16")
    keys, _, _ = read(tmp_path / "qmd-query-expansion-tiny-qwen3-f16.gguf")
    tokens, kinds = keys.pop("tokenizer.ggml.tokens"), keys.pop("tokenizer.ggml.token_type")
    merges = keys.pop("tokenizer.ggml.merges")
    end_of_text, im_end = tokens.index("<|endoftext|>"), tokens.index("<|im_end|>")
    keys = {key: value for key, value in keys.items() if not key.startswith("GGUF.")}
    assert keys.pop("qwen3.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert keys == {
        "general.architecture": "qwen3",
        "general.type": "model",
        "general.name": "qmd-query-expansion-tiny-qwen3",
        "general.finetune": "query-expansion",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "qwen3.block_count": 2,
        "qwen3.context_length": 40960,
        "qwen3.embedding_length": 64,
        "qwen3.feed_forward_length": 128,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 16,
        "qwen3.attention.value_length": 16,
        "qwen3.rope.freq_base": 1e6,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.bos_token_id": end_of_text,
        "tokenizer.ggml.eos_token_id": im_end,
        "tokenizer.ggml.padding_token_id": end_of_text,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML.jinja(),
    }
    # 267 rows of the embedding have no token.
    assert len(tokens) == len(kinds) == fused(chain)["model.embed_tokens.weight"].shape[0]
    assert tokens[-267] == f"[PAD{len(tokens) - 267}]"
    assert set(kinds[-267:]) == {UNUSED}
    assert kinds[tokens.index("<|im_start|>")] == CONTROL
    assert kinds[tokens.index("<|fim_prefix|>")] == CONTROL  # not special in tokenizer.json
    assert kinds[tokens.index("<think>")] == USER_DEFINED
    assert kinds[tokens.index("a")] == NORMAL
    source = json.loads((read_chain(str(chain)).path / "tokenizer.json").read_text())["model"]
    assert merges == [" ".join(pair) for pair in source["merges"]]


def test_keys_of_llama(llama_chain, export, tmp_path):
    export("--model", llama_chain, "--output", tmp_path, "--quantize", "f16")
    keys, _, _ = read(tmp_path / "qmd-query-expansion-tiny-llama-f16.gguf")
    tokens = keys["tokenizer.ggml.tokens"]
    assert keys["llama.vocab_size"] == len(tokens)
    assert keys["llama.rope.dimension_count"] == 16
    assert keys["llama.rope.freq_base"] == 1e5
    assert keys["tokenizer.ggml.pre"] == "smollm"
    # The model's own BOS opens a turn; in front of a prompt it would open the turn twice.
    assert tokens[keys["tokenizer.ggml.bos_token_id"]] == "<|endoftext|>"
    assert tokens[keys["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert keys["tokenizer.ggml.token_type"][: len(tiny.LLAMA_SPECIAL)] == [CONTROL] * 17


@pytest.mark.parametrize("kind", ["tiny_qwen3", "tiny_llama"])
def test_the_tokenizer_equals_the_base_models(kind, request):
    folder = request.getfixturevalue(kind)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    vocabulary, tokenizer = read_tokenizer(folder, size), models.load_tokenizer(folder)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    assert len(PROBES) == len(set(PROBES)) >= 50
    check_tokenizer(vocabulary, encode)
    vocabulary.merges.reverse()
    with pytest.raises(ValueError, match="would tokenise"):
        check_tokenizer(vocabulary, encode)


def test_the_pre_tokenizer_is_recognised_by_its_steps(tiny_llama, tmp_path):
    path = copy_of(tiny_llama, tmp_path / "llama") / "tokenizer.json"
    found = json.loads(path.read_text())
    # Llama 3: digits in threes, no merging for words in the vocabulary.
    split = tiny.QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    found["pre_tokenizer"]["pretokenizers"] = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    found["model"]["ignore_merges"] = True
    path.write_text(json.dumps(found))
    assert read_tokenizer(path.parent, 600).pre == "llama-bpe"
    found["model"]["ignore_merges"] = False
    path.write_text(json.dumps(found))
    assert read_tokenizer(path.parent, 600).pre == "smaug-bpe"
    found["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\s+"}
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="supported: qwen2, qwen35, llama-bpe"):
        read_tokenizer(path.parent, 600)


# The prompt


def test_modelfile_bytes():
    assert modelfile("demo-q8_0.gguf") == (
        "FROM ./demo-q8_0.gguf\n"
        'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n'
        "{{ .Content }}<|im_end|>\n"
        "{{ end }}<|im_start|>assistant\n"
        '"""\n'
        'PARAMETER stop "<|im_end|>"\n'
        "PARAMETER temperature 0.7\n"
        "PARAMETER top_k 20\n"
        "PARAMETER top_p 0.8\n"
        "PARAMETER presence_penalty 0.5\n"
        "PARAMETER repeat_penalty 1\n"
        "PARAMETER repeat_last_n 64\n"
        "PARAMETER num_predict 600\n"
        "PARAMETER num_ctx 4096\n"
    )
    assert SAMPLING.max_tokens == 600


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_both_templates_render_the_trained_prompt(system):
    import jinja2

    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": user_message("auth config")})
    expected = render_prompt("auth config", system)
    jinja = jinja2.Environment().from_string(CHATML.jinja())
    assert jinja.render(messages=messages, add_generation_prompt=True) == expected

    text = re.search(r'TEMPLATE """(.*?)"""', modelfile("x"), re.DOTALL)[1]
    turn, rest = re.fullmatch(
        r"\{\{- range \.Messages \}\}(.*)\{\{ end \}\}(.*)", text, re.DOTALL
    ).groups()
    turns = [
        turn.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"])
        for m in messages
    ]
    assert "".join(turns) + rest == expected


def test_the_next_steps_name_the_first_file(chain, export, tmp_path, capsys):
    output = tmp_path / "g g"
    export("--model", chain, "--output", output, "--quantize", "q8_0", "f16")
    printed = capsys.readouterr().out
    name = "qmd-query-expansion-tiny-qwen3"
    assert sorted(path.name for path in output.iterdir()) == [
        "Modelfile",
        "params",
        f"{name}-f16.gguf",
        f"{name}-q8_0.gguf",
        "template",
    ]
    assert (output / "Modelfile").read_text().startswith(f"FROM ./{name}-q8_0.gguf\n")
    assert f"ollama create {name} -f '{output}/Modelfile'" in printed
    assert f'models:\n    generate: "{output}/{name}-q8_0.gguf"' in printed


def test_the_default_model_is_the_last_stage(chain, export, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"run python train\.py sft first"):
        export()
    copy_of(chain / "sft", tmp_path / "outputs" / "sft")
    export()
    assert "tiny-qwen3 + outputs/sft\n" in capsys.readouterr().out
    copy_of(chain, tmp_path / "outputs" / "grpo")
    export("--quantize", "f16")
    assert "tiny-qwen3 + outputs/grpo/sft + outputs/grpo\n" in capsys.readouterr().out
    found = {path.name for path in (tmp_path / "outputs" / "gguf").iterdir()}
    assert found == {"Modelfile", "template", "params"} | {
        f"qmd-query-expansion-tiny-qwen3-{kind}.gguf" for kind in ("q4_k_m", "q8_0", "f16")
    }


# Checking what was written


@pytest.fixture
def written(chain, tmp_path) -> tuple[gguf_file.GGUFFile, Path, dict]:
    source = weights.FusedWeights(read_chain(str(chain)))
    base = read_chain(str(chain)).path
    config = models.model_config(base)
    vocabulary = read_tokenizer(base, config["vocab_size"])
    file = gguf_file.plan(config, vocabulary, "demo", "q8_0", source.shapes)
    path = tmp_path / "demo.gguf"
    samples = file.write(path, source, lambda done: None)
    file.check(path, samples)
    return file, path, samples


def test_check_finds_a_damaged_tensor(written):
    file, path, samples = written
    _, tensors, start = gguf_file.read_header(path)
    offset = next(offset for name, *_, offset in tensors if name == "blk.1.ffn_down.weight")
    with path.open("r+b") as stream:
        stream.seek(start + offset)
        stream.write(bytes(34))  # the first block of the first row
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_down\.weight in Q8_0"):
        file.check(path, samples)


def test_check_finds_weights_without_the_adapter(written, chain):
    file, path, samples = written
    plain = weights.FusedWeights(read_chain(str(read_chain(str(chain)).path)))
    file.write(path, plain, lambda done: None)
    with pytest.raises(ValueError, match="from the fused weights"):
        file.check(path, samples)


def test_check_finds_another_key(written):
    file, path, samples = written
    path.write_bytes(path.read_bytes().replace(b"query-expansion", b"query-expansioN", 1))
    with pytest.raises(ValueError, match=r"key general\.finetune"):
        file.check(path, samples)


def test_check_finds_a_short_file(written):
    file, path, samples = written
    path.write_bytes(path.read_bytes()[:-32])
    with pytest.raises(ValueError, match="file's size"):
        file.check(path, samples)


def test_a_file_that_fails_verification_is_deleted(chain, export, tmp_path, monkeypatch):
    arguments = ("--model", chain, "--output", tmp_path, "--quantize", "f16")
    monkeypatch.setattr(kquants, "quantize", lambda rows, kind: (rows * 1.01).astype(np.float16))
    with pytest.raises(ValueError, match="verification failed"):
        export(*arguments)
    assert list(tmp_path.iterdir()) == []
    export(*arguments, "--no-verify")
    assert len(list(tmp_path.glob("*.gguf"))) == 1


# RoPE

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("rope", "keys"),
    [
        ({"rope_type": "default"}, {}),
        ({"type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096},
            {"type": "yarn", "factor": 2.0, "original_context_length": 4096},
        ),
        (LLAMA3, {}),
    ],
)
@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
def test_scaled_rope_is_the_same_in_every_export(tiny_llama, export, tmp_path, rope, keys, form):
    from mlx_lm import load
    from transformers import AutoConfig

    base = copy_of(tiny_llama, tmp_path / "base")
    theta = {"rope_theta": 20000.0}
    if form == "rope_parameters":
        tiny.configure(base, "rope_theta", "rope_scaling", rope_parameters=rope | theta)
    else:
        tiny.configure(base, rope_scaling=rope, **theta)
    export("--model", base, "--output", tmp_path, "--quantize", "f32", "--name", "tiny")
    fields, tensors, _ = read(tmp_path / "tiny-f32.gguf")
    assert fields["llama.rope.freq_base"] == 20000
    start = "llama.rope.scaling."
    assert {k.removeprefix(start): v for k, v in fields.items() if k.startswith(start)} == keys

    model = models.load_base(base)
    assert ("rope_freqs.weight" in tensors) == (rope is LLAMA3)
    if rope is LLAMA3:
        ours = tensors["rope_freqs.weight"] * 20000.0 ** (np.arange(0, 16, 2) / 16)
        assert np.allclose(ours, np.array(model.layers[0].self_attn.rope._freqs), rtol=1e-5)
        assert tensors["rope_freqs.weight"][0] == 1 and tensors["rope_freqs.weight"][-1] == 8

    export("--model", base, "--mlx", tmp_path / "mlx")
    theirs, _ = load(str(tmp_path / "mlx"))
    assert mx.allclose(theirs(TOKENS), model(TOKENS), atol=1e-4).item()
    config = AutoConfig.from_pretrained(tmp_path / "mlx").rope_parameters
    assert config["rope_theta"] == 20000
    assert config["rope_type"] == rope.get("rope_type", rope.get("type"))


# Errors: one line each, and no file is left behind


def break_architecture(base: Path) -> None:
    edit_json(base / "config.json", model_type="gemma3")


def break_rope(base: Path) -> None:
    edit_json(base / "config.json", rope_scaling={"rope_type": "dynamic", "factor": 2.0})


def break_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").unlink()


def break_vocabulary(base: Path) -> None:
    """Fewer embeddings than the tokenizer has ids."""
    tensors = load_file(base / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file(tensors | {name: tensors[name][:100]}, base / "model.safetensors")
    edit_json(base / "config.json", vocab_size=100)


def break_values(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, base / "model.safetensors")


def break_weights(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_architecture, r"'gemma3' is not supported; supported: qwen3, qwen2, llama"),
        (break_rope, r"config\.json: rope_scaling\.rope_type 'dynamic' is not supported"),
        (break_tokenizer, r"tokenizer\.json"),
        (break_vocabulary, r"tokens, but config\.json's vocab_size is 100"),
        (break_values, r"model\.layers\.0\.mlp\.up_proj\.weight: .*found nan"),
        (break_weights, r"model\.safetensors: .* bytes, but its header describes"),
    ],
)
def test_bases_that_cannot_be_exported(tiny_llama, export, tmp_path, damage, message):
    base = copy_of(tiny_llama, tmp_path / "base")
    damage(base)
    with pytest.raises(ValueError, match=message) as caught:
        export("--model", base, "--output", tmp_path / "gguf", "--quantize", "f16")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "gguf").exists() or list((tmp_path / "gguf").iterdir()) == []


def test_an_adapter_of_another_base(chain, tiny_llama, export, tmp_path):
    adapter = copy_of(chain / "sft", tmp_path / "sft")
    other = tiny.make_qwen3(tmp_path / "other", hidden=96)
    edit_json(adapter / "adapter_config.json", model=str(other))
    with pytest.raises(ValueError, match=r"other is not the base model that .*sft was trained on"):
        export("--model", adapter, "--output", tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def test_an_adapter_tensor_that_fusing_would_ignore(chain, export, tmp_path):
    adapter = copy_of(chain / "sft", tmp_path / "sft")
    tensors = load_file(adapter / "adapters.safetensors")
    tensors["model.layers.0.self_attn.q_norm.lora_a"] = np.ones((16, 4), np.float32)
    save_file(tensors, adapter / "adapters.safetensors")
    with pytest.raises(ValueError, match=r"1 adapter tensors do not fit .*q_norm"):
        export("--model", adapter, "--output", tmp_path / "gguf")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantize", "q4"], r"--quantize q4: .*f32, f16"),
        (["--name", "a/b"], r"--name a/b: a name has at most 80"),
        (["--name", "x" * 81], r"a name has at most 80"),
        (["--ollama=-x"], r"--ollama -x: not a valid Ollama name"),
        (["--ollama", "a/b/c"], r"not a valid Ollama name"),
        (["--ollama", "a:"], r"not a valid Ollama name"),
        (["--peft", "p", "--ollama", "a"], r"--ollama needs a GGUF file"),
    ],
)
def test_arguments_that_cannot_work(chain, export, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(shutil, "which", lambda command: "/bin/ollama")
    with pytest.raises(ValueError, match=message):
        export("--model", chain, "--output", tmp_path / "gguf", *arguments)
    assert not (tmp_path / "gguf").exists()


def test_a_full_disk(chain, export, tmp_path, monkeypatch):
    arguments = ("--model", chain, "--output", tmp_path, "--quantize", "f16")
    name = "qmd-query-expansion-tiny-qwen3-f16.gguf"

    def fill(file, *arguments):
        file.write(bytes(1000))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "_write_tensor", fill)
        with pytest.raises(OSError, match=f"cannot write {tmp_path}/{name}: No space left"):
            export(*arguments)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(OSError, match=r"MB needed, 0 MB free"):
        export(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_a_file(chain, export, tmp_path):
    (tmp_path / "gguf").write_text("mine")
    with pytest.raises(OSError, match=r"^cannot write .*: (File exists|Not a directory)$"):
        export("--model", chain, "--output", tmp_path / "gguf")
    assert (tmp_path / "gguf").read_text() == "mine"


def test_sigterm_leaves_no_file(tiny_qwen3, export, tmp_path, monkeypatch):
    """SIGTERM while a file is being written leaves no file behind."""
    write = gguf_file._write_tensor

    def stop(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments)

    monkeypatch.setattr(gguf_file, "_write_tensor", stop)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            export("--model", tiny_qwen3, "--output", tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


# Ollama


@pytest.fixture
def ollama(tmp_path, monkeypatch) -> Path:
    """The folder of a fake ollama command, which writes its `arguments` and exits with `code`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "ollama"
    script.write_text(
        f'#!/bin/sh\necho "$@" >"{folder}/arguments"\nexit "$(cat "{folder}/code")"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


def test_ollama_create(chain, export, tmp_path, ollama):
    (ollama / "code").write_text("0")
    output = tmp_path / "gguf"
    export("--model", chain, "--output", output, "--quantize", "f16", "--ollama", "me/Expand:v1")
    assert (ollama / "arguments").read_text() == f"create me/Expand:v1 -f {output}/Modelfile\n"


def test_ollama_fails(chain, export, tmp_path, ollama):
    (ollama / "code").write_text("3")
    with pytest.raises(OSError, match="ollama create failed with exit code 3"):
        export(
            "--model", chain, "--output", tmp_path / "gguf", "--quantize", "f16", "--ollama", "a"
        )


def test_the_command_inside_ollama_app_is_found(
    chain, export, tmp_path, ollama, monkeypatch, capsys
):
    app = tmp_path / "My Apps" / "Ollama.app" / "Contents" / "Resources"
    app.parent.mkdir(parents=True)
    (ollama / "code").write_text("0")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(modelfile_module, "APPLICATIONS", (str(tmp_path / "My Apps"),))
    assert ollama_command() is None
    shutil.copytree(ollama, app)
    assert ollama_command() == f"{app}/ollama"
    output = tmp_path / "gguf"
    export("--model", chain, "--output", output, "--quantize", "f16", "--ollama", "expand")
    assert (ollama / "arguments").read_text() == f"create expand -f {output}/Modelfile\n"
    assert f"'{app}/ollama' run expand" in capsys.readouterr().out


def test_no_ollama(chain, export, tmp_path, monkeypatch):
    monkeypatch.setattr(modelfile_module, "APPLICATIONS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="ollama not found"):
        export("--model", chain, "--output", tmp_path / "gguf", "--ollama", "a")
    assert not (tmp_path / "gguf").exists()


# Other forms


def test_mlx_folder(chain, export, tmp_path, monkeypatch):
    from mlx_lm import load
    from transformers import AutoConfig

    monkeypatch.setattr(formats, "SHARD", 100_000)  # several files
    export("--model", chain, "--mlx", tmp_path / "mlx")
    assert [path.name for path in tmp_path.iterdir()] == ["mlx"]
    assert len(list((tmp_path / "mlx").glob("model-*-of-*.safetensors"))) > 2
    model, tokenizer = load(str(tmp_path / "mlx"))
    expected, _ = models.load_chain(read_chain(str(chain)), fuse_last=True)
    assert mx.abs(model(TOKENS) - expected(TOKENS)).max().item() < tolerance(
        float32=1e-4, bfloat16=0.25
    )
    base = models.load_base(read_chain(str(chain)).path)
    assert mx.abs(model(TOKENS) - base(TOKENS)).max().item() > tolerance(float32=0.1, bfloat16=0.5)
    messages = [{"role": "user", "content": user_message("auth config")}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == render_prompt("auth config")
    assert AutoConfig.from_pretrained(tmp_path / "mlx").model_type == "qwen3"


def test_a_folder_that_is_not_empty_is_left_alone(chain, export, tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "model.safetensors").write_text("another")
    with pytest.raises(ValueError, match=r"mlx already exists and is not empty"):
        export("--model", chain, "--mlx", tmp_path / "mlx")
    assert [path.name for path in (tmp_path / "mlx").iterdir()] == ["model.safetensors"]


def test_a_folder_that_only_a_file_browser_has_seen_counts_as_empty(tmp_path):
    folder, link = tmp_path / "mlx", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    for name in (".DS_Store", "._a"):
        (folder / name).write_text("theirs")
    with formats.new_folder(link) as made:
        (made / "config.json").write_text("ours")
    assert link.is_symlink() and (folder / ".DS_Store").read_text() == "theirs"
    assert sorted(x.name for x in folder.iterdir()) == [".DS_Store", "._a", "config.json"]
    with pytest.raises(ValueError, match="is not empty"), formats.new_folder(folder):
        pass
    with (
        pytest.raises(ValueError, match="is not a folder"),
        formats.new_folder(folder / "config.json"),
    ):
        pass
    assert (folder / "config.json").read_text() == "ours"


@pytest.mark.parametrize(("part", "rank"), [("sft", 4), (".", 6)])
def test_peft_adapter(chain, export, tmp_path, part, rank):
    """W + lora_alpha / r · B A equals the fused weight; two adapters become one of the summed rank."""
    export("--model", chain / part, "--peft", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    base = read_chain(str(chain)).path
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", rank, 2.0 * rank)
    assert config["base_model_name_or_path"] == str(base)
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7
    plain, expected = fused(base), fused(chain / part)
    for layer in config["target_modules"]:
        a = tensors[f"base_model.model.{layer}.lora_A.weight"].astype(np.float64)  # (r, in)
        b = tensors[f"base_model.model.{layer}.lora_B.weight"].astype(np.float64)  # (out, r)
        found = plain[f"{layer}.weight"] + config["lora_alpha"] / config["r"] * b @ a
        np.testing.assert_allclose(found, expected[f"{layer}.weight"], rtol=0, atol=1e-5)


def test_peft_needs_an_adapter(tiny_qwen3, export, tmp_path):
    with pytest.raises(ValueError, match=r"--peft: .* has no adapter"):
        export("--model", tiny_qwen3, "--peft", tmp_path / "peft")
    assert list(tmp_path.iterdir()) == []


def test_the_help_names_every_type():
    assert tuple(gguf_file.FILE_TYPES) == convert.TYPES
    kinds = set(kquants.BASE_TYPES.values()) | set(kquants.NARROW_TYPES.values())
    assert kinds == gguf_file.ERROR_BOUNDS.keys()


def test_help_imports_nothing_heavy(tmp_path):
    command = [sys.executable, "-X", "importtime", Path(convert.__file__), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--quantize" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"gguf", "huggingface_hub", "mlx.core", "mlx_lm", "numpy", "transformers"}


def test_the_originals_options_name_the_parts_of_a_model(
    chain, tiny_qwen3, export, tmp_path, monkeypatch
):
    parts = ("--base", tiny_qwen3, "--sft", chain / "sft", "--grpo", chain, "--no-upload")
    export(*parts, "--skip-quantize", "--output", tmp_path / "parts")
    export("--model", chain, "--quantize", "f16", "--output", tmp_path / "whole")
    parts, whole = (next((tmp_path / x).glob("*.gguf")) for x in ("parts", "whole"))
    assert parts.name == whole.name and parts.read_bytes() == whole.read_bytes()

    asked = []
    monkeypatch.setattr(models, "read_chain", lambda **parts: asked.append(parts) or 1 / 0)
    for options in (["--size", "1.7B"], ["--size", "4B", "--sft", "a"], ["--base", "b"]):
        with pytest.raises(ZeroDivisionError):
            export(*options)
    published = "tobil/qmd-query-expansion-{}-{}"
    assert asked == [
        {
            "name": published.format("1.7B", "grpo"),
            "base": "Qwen/Qwen3-1.7B",
            "sft": published.format("1.7B", "sft"),
        },
        {"name": published.format("4B", "grpo"), "base": "Qwen/Qwen3-4B", "sft": "a"},
        {"name": "b", "base": None, "sft": None},
    ]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_quantised_mlx_folder_is_what_mlx_lm_makes(chain, export, tmp_path, bits):
    """The same bytes as mlx_lm.convert makes of the unquantised folder, and the same configuration."""
    from mlx_lm.utils import load, quantize_model

    export("--model", chain, "--mlx", tmp_path / "full")
    export("--model", chain, "--mlx", tmp_path / "small", "--mlx-bits", bits)
    model, _, config = load(str(tmp_path / "full"), return_config=True)
    model, config = quantize_model(model, config, group_size=64, bits=bits)
    expected = dict(models.tree_flatten(model.parameters()))
    [path] = (tmp_path / "small").glob("*.safetensors")
    found = mx.load(str(path))
    assert found.keys() == expected.keys()
    assert any(name.endswith(".scales") for name in found)
    assert all(mx.array_equal(found[name], value) for name, value in expected.items())
    written = json.loads((tmp_path / "small" / "config.json").read_text())
    assert written["quantization"] == written["quantization_config"] == config["quantization"]
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    read, _ = load(str(tmp_path / "small"))
    ours, _ = models.load_chain(read_chain(str(tmp_path / "small")))
    bound = tolerance(float32=1e-4, bfloat16=0.25)
    assert mx.abs(read(TOKENS) - model(TOKENS)).max().item() < bound
    assert mx.abs(ours(TOKENS) - model(TOKENS)).max().item() < bound


def test_mlx_bits_without_a_folder(chain, export):
    with pytest.raises(ValueError, match="--mlx-bits needs --mlx DIR"):
        export("--model", chain, "--mlx-bits", "4")


def test_the_files_for_ollama_run_say_what_the_modelfile_says(chain, export, tmp_path, capsys):
    export("--model", chain, "--quantize", "q8_0", "--output", tmp_path)
    text = (tmp_path / "Modelfile").read_text()
    template, params = ((tmp_path / name).read_text() for name in ("template", "params"))
    assert f'TEMPLATE """{template}"""' in text
    assert template.endswith("<|im_start|>assistant\n")
    params = json.loads(params)
    assert params["stop"] == ["<|im_end|>"]
    assert (params["temperature"], params["top_k"]) == (SAMPLING.temperature, SAMPLING.top_k)
    assert len(params) == text.count("PARAMETER")
    gguf_path = next(tmp_path.glob("*.gguf"))
    assert f"lms import {gguf_path}" in capsys.readouterr().out
