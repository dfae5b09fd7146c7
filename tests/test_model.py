"""model.py: adapters saved and loaded, chains read, exact fusing, clear errors."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from dtypes import tolerance
from mlx.utils import tree_flatten

from expander import model as models
from expander.architectures import PROJECTIONS
from expander.model import ModelError
from expander.prompt import render_prompt

TOKENS = mx.array([[5, 300, 17, 44, 260, 9, 301, 2]])


def logits(model: nn.Module) -> mx.array:
    """(T, V) logits of a fixed text from the model's own forward pass."""
    return model(TOKENS)[0].astype(mx.float32)


def lora(model: nn.Module, rank: int = 4, targets: Sequence[str] = PROJECTIONS) -> dict:
    """Add LoRA layers that clearly change the output; returns their configuration."""
    config = models.lora_config(model, rank, 2.0 * rank, 0.0, targets)
    models.add_lora(model, config)
    weights = [
        (name, mx.random.normal(value.shape, scale=0.1))
        for name, value in models.adapter_weights(model).items()
    ]
    model.load_weights(weights, strict=False)
    return config


def adapter(folder: Path, base: str, **extra) -> Path:
    """A random adapter over a base, in a folder as train.py writes it."""
    mx.random.seed(1)
    model = models.load_base(Path(base), extra.get("quantize_bits"))
    config = lora(model)
    models.save_adapter(folder, models.adapter_weights(model), config | {"model": base} | extra)
    return folder


CLOSE = tolerance(float32=1e-4, bfloat16=0.2)  # logits are up to 3
APART = tolerance(float32=0.1, bfloat16=0.4)


def distance(a: mx.array, b: mx.array) -> float:
    return mx.abs(a - b).max().item()


def close(a: mx.array, b: mx.array, bound: float = CLOSE) -> bool:
    return distance(a, b) < bound


@pytest.fixture(scope="module")
def sft(tiny_qwen3, tmp_path_factory) -> Path:
    return adapter(tmp_path_factory.mktemp("runs") / "sft", str(tiny_qwen3), stage="sft")


@pytest.fixture(scope="module")
def grpo(sft, tmp_path_factory) -> Path:
    """A rank-2 adapter over the fused SFT model, with a copy of the SFT adapter below it."""
    folder = tmp_path_factory.mktemp("runs") / "grpo"
    chain = models.read_chain(str(sft))
    model, _ = models.load_chain(chain, fuse_last=True)
    mx.random.seed(2)
    config = lora(model, rank=2, targets=("q_proj", "v_proj"))
    models.copy_adapters(chain, folder / "sft")
    models.save_adapter(folder, models.adapter_weights(model), config | {"parent": "sft"})
    return folder


# mlx-lm's own tools


def test_mlx_lm_loads_an_adapter(sft, tiny_qwen3):
    from mlx_lm.utils import load

    theirs, _ = load(str(tiny_qwen3), adapter_path=str(sft))
    ours, _ = models.load_chain(models.read_chain(str(sft)))
    base, _ = load(str(tiny_qwen3))
    assert distance(logits(theirs), logits(ours)) <= tolerance(float32=1e-5, bfloat16=0.2)
    assert not close(logits(theirs), logits(base), APART)


def test_the_saved_configuration_is_mlx_lms(sft):
    config = json.loads((sft / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == 2
    parameters = config["lora_parameters"]
    assert (parameters["rank"], parameters["scale"], parameters["dropout"]) == (4, 2.0, 0.0)
    assert "self_attn.q_proj" in parameters["keys"] and "mlp.down_proj" in parameters["keys"]
    assert len(parameters["keys"]) == 7


def test_save_and_load_are_inverse(sft, tiny_qwen3):
    model = models.load_base(tiny_qwen3)
    models.load_adapter(model, sft)
    saved = mx.load(str(sft / "adapters.safetensors"))
    loaded = models.adapter_weights(model)
    assert saved.keys() == loaded.keys() and len(saved) == 2 * 7 * 2
    assert all(mx.array_equal(saved[name], loaded[name]) for name in saved)


# LoRA layers


def test_a_fresh_adapter_changes_nothing_and_only_it_is_trainable(tiny_qwen3):
    model = models.load_base(tiny_qwen3)
    before = logits(model)
    models.add_lora(model, models.lora_config(model, 4, 8.0, 0.0, ("q_proj", "v_proj")))
    names = {name.rsplit(".", 2)[-2] for name in models.adapter_weights(model)}
    assert names == {"q_proj", "v_proj"}
    assert {name.rsplit(".")[-1] for name in models.adapter_weights(model)} == {"lora_a", "lora_b"}
    assert len(models.adapter_weights(model)) == 2 * 2 * 2
    assert mx.array_equal(logits(model), before)


def test_the_scale_is_alpha_over_rank(tiny_qwen3):
    model = models.load_base(tiny_qwen3)
    assert models.lora_config(model, 16, 32.0, 0.05, PROJECTIONS)["lora_parameters"]["scale"] == 2.0
    assert models.lora_config(model, 4, 2.0, 0.0, PROJECTIONS)["lora_parameters"]["scale"] == 0.5


def test_an_unknown_target_is_named(tiny_qwen3):
    model = models.load_base(tiny_qwen3)
    with pytest.raises(ModelError, match="no layer qkv_proj, w_proj"):
        models.lora_config(model, 4, 8.0, 0.0, ("q_proj", "w_proj", "qkv_proj"))


def test_with_adapters_off_the_model_is_the_base(tiny_qwen3):
    model = models.load_base(tiny_qwen3)
    base = logits(model)
    lora(model)
    adapted = logits(model)
    assert not close(adapted, base, APART)
    with models.adapters_off(model):
        assert mx.array_equal(logits(model), base)
    assert mx.array_equal(logits(model), adapted)
    with pytest.raises(RuntimeError, match="inside"), models.adapters_off(model):
        raise RuntimeError("inside")
    assert mx.array_equal(logits(model), adapted)
    assert len(models.adapter_weights(model)) == 2 * 7 * 2


# Fusing


@pytest.mark.parametrize("make", [tiny.make_qwen3, tiny.make_llama])
@pytest.mark.parametrize("tied", [True, False])
def test_fusing_does_not_change_the_output(make, tied, tmp_path):
    model = models.load_base(make(tmp_path, tied=tied))
    lora(model)
    unfused = logits(model)
    models.fuse(model)
    assert close(logits(model), unfused)
    names = [name for name, _ in tree_flatten(model.parameters())]
    assert not any("lora" in name for name in names)
    assert not models.adapter_weights(model)


def test_fused_weight_by_hand():
    fused = models.fused_weight(
        mx.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),  # (out 3, in 2)
        mx.array([[1.0], [10.0]]),  # (in 2, rank 1)
        mx.array([[1.0, 2.0, 3.0]]),  # (rank 1, out 3)
        0.5,
    )
    assert fused.tolist() == [[1.5, 7.0], [4.0, 14.0], [6.5, 21.0]]


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_on_a_quantised_base_is_fused_into_plain_weights(bits, tiny_qwen3, tmp_path):
    folder = adapter(tmp_path / "a", str(tiny_qwen3), quantize_bits=bits)
    chain = models.read_chain(str(folder))
    assert chain.bits == bits
    model, _ = models.load_chain(chain)
    assert isinstance(model.layers[0].self_attn.q_proj.linear, nn.QuantizedLinear)
    unfused = logits(model)
    fused, _ = models.load_chain(chain, fuse_last=True)
    assert type(fused.layers[0].self_attn.q_proj) is nn.Linear
    assert close(logits(fused), unfused, tolerance(float32=1e-3, bfloat16=0.2))
    plain, _ = models.load_chain(models.read_chain(str(tiny_qwen3)))
    assert not close(logits(plain), unfused, APART)


def test_biases_survive_fusing(tiny_qwen3, tmp_path):
    """Qwen2's q, k and v have biases."""
    shutil.copytree(tiny_qwen3, tmp_path / "q2")
    path = tmp_path / "q2" / "model.safetensors"
    weights = {k: v for k, v in mx.load(str(path)).items() if "_norm" not in k.split(".")[-2]}
    weights["model.norm.weight"] = mx.ones((64,))
    for name, value in list(weights.items()):
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
            bias = name.replace("weight", "bias")
            weights[bias] = mx.array(np.linspace(-1, 1, value.shape[0]), mx.float32)
    for i in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{norm}.weight"] = mx.ones((64,))
    mx.save_safetensors(str(path), weights)
    config_path = tmp_path / "q2" / "config.json"
    config = json.loads(config_path.read_text()) | {"model_type": "qwen2"}
    config_path.write_text(json.dumps(config))

    model = models.load_base(tmp_path / "q2")
    lora(model)
    unfused = logits(model)
    models.fuse(model)
    assert "bias" in model.layers[0].self_attn.q_proj
    assert close(logits(model), unfused)


# Chains


def test_a_base_model_is_a_chain_without_adapters(tiny_qwen3):
    chain = models.read_chain(str(tiny_qwen3))
    assert (chain.path, chain.adapters, chain.bits) == (tiny_qwen3, (), None)
    model, tokenizer = models.load_chain(chain)
    assert not model.training
    assert models.end_token(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_chain_is_read_from_its_last_folder(grpo, sft, tiny_qwen3):
    chain = models.read_chain(str(grpo))
    assert chain.path == tiny_qwen3
    assert chain.adapters == (grpo / "sft", grpo)
    model, _ = models.load_chain(chain)

    by_hand = models.load_base(tiny_qwen3)
    models.load_adapter(by_hand, sft)
    models.fuse(by_hand)
    models.load_adapter(by_hand, grpo)
    assert mx.array_equal(logits(model), logits(by_hand))
    sft_model, _ = models.load_chain(models.read_chain(str(sft)))
    assert not close(logits(model), logits(sft_model), APART)
    fused, _ = models.load_chain(chain, fuse_last=True)
    assert close(logits(fused), logits(model))


def test_a_copied_chain_does_not_need_the_original(grpo, tmp_path):
    before, _ = models.load_chain(models.read_chain(str(grpo)))
    models.copy_adapters(models.read_chain(str(grpo)), tmp_path / "copy")
    shutil.copytree(grpo, tmp_path / "grpo")
    copy = models.read_chain(str(tmp_path / "copy"))
    assert len(copy.adapters) == 2
    assert list(copy.hashes().values()) == list(models.read_chain(str(grpo)).hashes().values())
    shutil.rmtree(tmp_path / "grpo")
    after, _ = models.load_chain(copy)
    assert mx.array_equal(logits(after), logits(before))


def test_adapters_have_different_hashes(grpo):
    hashes = list(models.read_chain(str(grpo)).hashes().values())
    assert len(set(hashes)) == 2 and all(len(h) == 64 for h in hashes)


# Errors


def test_the_adapter_of_another_base_is_refused(sft, tmp_path):
    other = models.load_base(tiny.make_qwen3(tmp_path, hidden=32, heads=2, kv_heads=1))
    with pytest.raises(
        ModelError, match=r"do not fit this base model, first model\.layers\.0\.mlp"
    ):
        models.load_adapter(other, sft)
    deeper = models.load_base(tiny.make_qwen3(tmp_path / "deep", layers=3))
    with pytest.raises(ModelError, match="do not fit this base model"):
        models.load_adapter(deeper, sft)


@pytest.mark.parametrize("change", ["drop", "add"])
def test_an_adapter_with_missing_or_extra_tensors_is_refused(change, sft, tiny_qwen3, tmp_path):
    shutil.copytree(sft, tmp_path / "a")
    weights = mx.load(str(sft / "adapters.safetensors"))
    if change == "drop":
        weights.popitem()
    else:
        weights["model.layers.9.mlp.up_proj.lora_a"] = mx.zeros((64, 4))
    mx.save_safetensors(str(tmp_path / "a" / "adapters.safetensors"), weights)
    with pytest.raises(ModelError, match="1 adapter tensors do not fit"):
        models.load_adapter(models.load_base(tiny_qwen3), tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapters.safetensors", None),
        ("adapters.safetensors", b""),
        ("adapters.safetensors", b"half"),
        ("adapter_config.json", b""),
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", b'{"fine_tune_type": "lora", "model": "x"}'),
    ],
)
def test_a_broken_adapter_folder_is_refused(name, content, sft, tiny_qwen3, tmp_path):
    shutil.copytree(sft, tmp_path / "a")
    if content is None:
        (tmp_path / "a" / name).unlink()
    else:
        (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        models.load_adapter(models.load_base(tiny_qwen3), tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_is_neither_adapter_nor_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the project's own folder may hold outputs/grpo
    with pytest.raises(ModelError, match=r"neither an adapter folder .* nor a model folder"):
        models.read_chain(str(tmp_path))
    for name in ("outputs/grpo", "nowhere", "./a/b", str(tmp_path / "none"), "a/b/c"):
        with pytest.raises(ModelError, match="no such folder, and not a Hub id"):
            models.read_chain(name)


def test_an_adapter_folder_that_names_no_base(sft, tmp_path):
    shutil.copytree(sft, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["model"]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not name its base model"):
        models.read_chain(str(tmp_path / "a"))


def copy_with_config(source: Path, target: Path, **changes) -> Path:
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_an_unsupported_architecture_lists_the_supported_ones(tiny_qwen3, tmp_path):
    folder = copy_with_config(tiny_qwen3, tmp_path / "m", model_type="gemma3")
    with pytest.raises(ModelError, match=r"'gemma3' is not supported; supported: qwen3, .*llama"):
        models.load_base(folder)


def test_code_in_a_model_folder_is_never_run(tiny_qwen3, tmp_path):
    folder = copy_with_config(tiny_qwen3, tmp_path / "m", model_file="evil.py")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(ModelError, match="cannot be loaded"):
        models.load_base(folder)
    assert not (tmp_path / "ran").exists()
    assert not any("py" in pattern for pattern in models.DOWNLOADS)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_a_broken_model_folder_is_refused(name, how, tiny_qwen3, tmp_path):
    folder = shutil.copytree(tiny_qwen3, tmp_path / "m")
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if how == "truncated":
        (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError) as caught:
        models.load_chain(models.read_chain(str(folder)))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_that_is_not_chatml_is_refused(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("<|im_end|>", "</s>"), encoding="utf-8")
    with pytest.raises(ModelError, match=r"no <\|im_end\|> token"):
        models.end_token(models.load_tokenizer(folder))


def damaged(folder: Path, match: str) -> None:
    """Loading the model in a folder fails in one line that matches."""
    with pytest.raises(ModelError, match=match) as caught:
        models.load_chain(models.read_chain(str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("content", ["", "{", "[]", "5", "null", '{"a": ' * 10**5])
def test_a_file_that_is_not_a_json_object_is_named(file, content, tiny_qwen3, tmp_path):
    folder = shutil.copytree(tiny_qwen3, tmp_path / "m")
    (folder / file).write_text(content)
    damaged(folder, rf"m/{file}: ")


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("config.json", {"hidden_size": "64"}, r"config\.json: hidden_size is '64'"),
        (
            "config.json",
            {"num_hidden_layers": 10**9},
            r"config\.json: num_hidden_layers is 1000000000",
        ),
        ("config.json", {"num_hidden_layers": 3000}, "but the weights have 2 layers"),
        ("config.json", {"num_attention_heads": 0}, r"config\.json: num_attention_heads is 0"),
        ("config.json", {"quantization": {"bits": 4}}, r"config\.json: quantization\.group_size"),
        ("config.json", {"architectures": 5}, "cannot be loaded: TypeError"),
        ("tokenizer.json", {"model": None}, r"tokenizer\.json: model is None"),
        ("tokenizer.json", {"model": {"type": "BPE"}}, r"tokenizer\.json: model\.vocab is None"),
        ("tokenizer.json", {"added_tokens": 5}, r"tokenizer\.json: added_tokens is 5"),
        ("tokenizer.json", {"added_tokens": [{"id": "1"}]}, r"tokenizer\.json: added_tokens is"),
        ("tokenizer.json", {"pre_tokenizer": []}, r"tokenizer\.json: pre_tokenizer is \[\]"),
        ("tokenizer_config.json", {"added_tokens_decoder": 5}, "added_tokens_decoder is 5"),
        ("tokenizer_config.json", {"tokenizer_class": 5}, "tokenizer_class is 5"),
        ("tokenizer.json", {"model": {"vocab": {}}}, r"tokenizer\.json: model\.vocab is \{\}"),
        ("tokenizer.json", {"model": {"vocab": {"a": "1"}}}, r"tokenizer\.json: model\.vocab is"),
    ],
)
def test_a_damaged_key_is_named(file, changes, match, tiny_qwen3, tmp_path):
    folder = shutil.copytree(tiny_qwen3, tmp_path / "m")
    tiny.configure(folder, file=file, **changes)
    damaged(folder, match)


@pytest.mark.parametrize("make", [tiny.make_llama, tiny.make_qwen2])
def test_a_tokenizer_that_contradicts_the_exported_one(make, tmp_path):
    folder = make(tmp_path)
    path = folder / "tokenizer_config.json"
    added = json.loads(path.read_text())["added_tokens_decoder"]
    start = next(key for key, token in added.items() if token["content"] == "<|im_start|>")
    added[start]["content"] = "<|begin|>"
    tiny.configure(folder, file=path.name, added_tokens_decoder=added)
    damaged(folder, r"contradicts|tokenizer has ids up to")


def test_the_file_is_named_whatever_the_folder_is_called(tiny_qwen3, tmp_path, monkeypatch):
    """A folder m, and a message that begins with max_position_embeddings."""
    tiny.configure(shutil.copytree(tiny_qwen3, tmp_path / "m"), "max_position_embeddings")
    monkeypatch.chdir(tmp_path)
    damaged(Path("m"), r"^m/config\.json: max_position_embeddings is missing")


def test_embeddings_for_fewer_ids_than_the_tokenizer_has(tiny_llama, tmp_path):
    """MLX would read past the end of the table without an error."""
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    weights = dict(mx.load(str(folder / "model.safetensors")))
    name = "model.embed_tokens.weight"
    mx.save_safetensors(str(folder / "model.safetensors"), weights | {name: weights[name][:500]})
    tiny.configure(folder, vocab_size=500)
    damaged(folder, "tokenizer has ids up to 511, but config.json's vocab_size is 500")


# A head of its own


@pytest.mark.parametrize("make", [tiny.make_llama, tiny.make_qwen2, tiny.make_qwen3])
@pytest.mark.parametrize("tied", [True, False])
def test_without_the_key_the_weights_decide_whether_the_head_is_tied(make, tied, tmp_path):
    folder = make(tmp_path, tied=tied)
    expected = logits(models.load_base(folder))
    tiny.configure(folder, "tie_word_embeddings")
    assert mx.array_equal(logits(models.load_base(folder)), expected)
    tiny.configure(folder, tie_word_embeddings=None)
    assert mx.array_equal(logits(models.load_base(folder)), expected)
    assert models.model_config(folder)["tie_word_embeddings"] is tied


def test_a_tied_head_that_is_stored_as_well(tmp_path):
    """Qwen3-1.7B's files have both; they are equal."""
    folder = tiny.make_qwen3(tmp_path)
    path, expected = folder / "model.safetensors", logits(models.load_base(folder))
    weights = dict(mx.load(str(path)))
    head = mx.array(weights["model.embed_tokens.weight"])
    mx.save_safetensors(str(path), weights | {"lm_head.weight": head})
    assert mx.array_equal(logits(models.load_base(folder)), expected)
    head[7, 3] += 1e-3
    mx.save_safetensors(str(path), weights | {"lm_head.weight": head})
    damaged(folder, r"config\.json: tie_word_embeddings is true, but lm_head\.weight differs")
    tiny.configure(folder, tie_word_embeddings=False)
    models.load_base(folder)


# The forward pass in two parts


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_on_the_hidden_states_is_the_forward_pass(tied, tmp_path):
    model = models.load_base(tiny.make_qwen3(tmp_path, tied=tied))
    states = models.hidden_states(model, TOKENS)
    assert states.shape == (1, 8, 64)
    assert mx.array_equal(models.lm_head(model)(states)[0], logits(model))


def test_the_prompt_survives_tokenising(tiny_qwen3, tiny_llama):
    text = render_prompt("auth config")
    for folder in (tiny_qwen3, tiny_llama):
        tokenizer = models.load_tokenizer(folder)
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
