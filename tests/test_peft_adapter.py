"""PEFT's adapters: fused as PEFT merges them, trained on from, exported; other kinds are refused.

tests/bench/peft_in.py compares the logits with PEFT's own.
"""

import json
import shutil
import sys

import mlx.core as mx
import numpy as np
import pytest
from dtypes import tolerance
from peft_folders import PREFIX, make_peft, merged
from safetensors.numpy import load_file, save_file
from test_train import GRPO, sets

import convert
from expander import model as models
from expander.convert.weights import FusedWeights
from expander.model import ModelError, load_chain, read_chain

BOUND = tolerance(float32=1e-5, bfloat16=3e-2)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def fused(chain) -> dict[str, np.ndarray]:
    weights = FusedWeights(chain)
    return {name: np.array(weights.tensor(name, mx.float32)) for name in list(weights.shapes)}


def loaded(chain) -> dict[str, np.ndarray]:
    """The weights of the model that eval.py runs."""
    model, _ = load_chain(chain, fuse_last=True)
    parameters = models.tree_flatten(model.parameters())
    return {name: np.array(value.astype(mx.float32)) for name, value in parameters}


def check(folder, model, alphas, **options) -> None:
    """Both ways to fuse an adapter give PEFT's merged weights."""
    expected = merged(folder, load_file(model / "model.safetensors"), alphas)
    chain = read_chain(str(folder), **options)
    for found in (fused(chain), loaded(chain)):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert np.abs(found[name] - value).max() < BOUND, name


@pytest.mark.parametrize("rslora", [False, True])
def test_each_layer_has_its_rank_and_alpha(tiny_qwen3, tmp_path, rslora):
    folder = make_peft(
        tmp_path / "peft",
        tiny_qwen3,
        ranks={"q_proj": 4, "v_proj": 2, "up_proj": 6},
        rank_pattern={"v_proj": 2, "up_proj": 6},
        alpha_pattern={"v_proj": 3, r"layers\.\d\.mlp\.up_proj": 20},
        use_rslora=rslora,
    )
    check(folder, tiny_qwen3, {"q_proj": 8, "v_proj": 3, "up_proj": 20})
    lora = models.read_adapter_config(folder)["lora_parameters"]
    assert lora["rank"] == 6


def test_an_adapter_of_some_layers(tiny_qwen3, tmp_path):
    folder = make_peft(tmp_path / "peft", tiny_qwen3, layers=(1,), layers_to_transform=[1])
    check(folder, tiny_qwen3, {"q_proj": 8, "down_proj": 8})


def other(base, seed: int) -> np.ndarray:
    shape = load_file(base / "model.safetensors")[EMBEDDING].shape
    return np.random.default_rng(seed).normal(0, 0.2, shape).astype(np.float32)


def test_trained_embeddings_stay_tied_if_they_are_equal(tiny_qwen3, tmp_path):
    """The original's adapters: both saved, with ensure_weight_tying."""
    new = other(tiny_qwen3, 1)
    both = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    folder = make_peft(tmp_path / "peft", tiny_qwen3, whole={EMBEDDING: new, HEAD: new}, **both)
    chain = read_chain(str(folder))
    assert HEAD not in loaded(chain) and HEAD not in fused(chain)
    np.testing.assert_allclose(loaded(chain)[EMBEDDING], new, atol=BOUND)
    assert chain.adapted_layers() == {"q_proj", "down_proj", "embed_tokens", "lm_head"}


@pytest.mark.parametrize("saved", ["both", "embed_tokens", "lm_head"])
def test_trained_embeddings_that_differ_untie_the_model(tiny_qwen3, tmp_path, saved):
    old = load_file(tiny_qwen3 / "model.safetensors")[EMBEDDING]
    whole = {EMBEDDING: other(tiny_qwen3, 1), HEAD: other(tiny_qwen3, 2)}
    if saved == "embed_tokens":
        del whole[HEAD]
    if saved == "lm_head":
        del whole[EMBEDDING]
    folder = make_peft(tmp_path / "peft", tiny_qwen3, whole=whole, modules_to_save=["lm_head"])
    weights = load_file(tiny_qwen3 / "model.safetensors") | {HEAD: old}
    expected = merged(folder, weights, {"q_proj": 8, "down_proj": 8})
    chain = read_chain(str(folder))
    for found in (fused(chain), loaded(chain)):
        for name, value in expected.items():
            assert np.abs(found[name] - value).max() < BOUND, name


def test_an_embedding_that_peft_tied_stays_tied(tiny_qwen3, tmp_path):
    folder = make_peft(
        tmp_path / "peft",
        tiny_qwen3,
        whole={EMBEDDING: other(tiny_qwen3, 1)},
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    assert HEAD not in loaded(read_chain(str(folder)))


def test_a_grpo_adapter_over_an_sft_adapter_and_another_base(tiny_qwen3, tmp_path):
    """PEFT records no adapter below, and perhaps a base that was merged in memory."""
    sft = make_peft(tmp_path / "sft", tiny_qwen3)
    grpo = make_peft(tmp_path / "grpo", tiny_qwen3, seed=2, base_model_name_or_path="/tmp/merged")
    with pytest.raises(ModelError, match=r"/tmp/merged: no such folder.*--base-model"):
        read_chain(str(grpo))
    chain = read_chain(str(grpo), sft=str(sft))
    assert chain.adapters == (sft, grpo) and chain.path == tiny_qwen3
    alphas = {"q_proj": 8, "down_proj": 8}
    expected = merged(
        grpo, merged(sft, load_file(tiny_qwen3 / "model.safetensors"), alphas), alphas
    )
    found = fused(chain)
    assert all(np.abs(found[name] - value).max() < BOUND for name, value in expected.items())
    models.copy_adapters(chain, tmp_path / "copy")
    copied = read_chain(str(tmp_path / "copy"))
    assert copied.adapters == (tmp_path / "copy" / "sft", tmp_path / "copy")
    assert all((fused(copied)[name] == value).all() for name, value in found.items())
    check(grpo, tiny_qwen3, alphas, base=str(tiny_qwen3))


def test_mlx_lm_loads_the_copy(tiny_qwen3, tmp_path):
    """The copy below a GRPO result is mlx-lm's, with other ranks in other layers and some left out."""
    from mlx_lm.tuner.utils import load_adapters

    ranks = {"q_proj": 4, "v_proj": 2}
    chain = read_chain(str(make_peft(tmp_path / "peft", tiny_qwen3, ranks=ranks, layers=(1,))))
    models.copy_adapters(chain, tmp_path / "copy")
    theirs = load_adapters(models.load_base(tiny_qwen3), str(tmp_path / "copy"))
    ours, _ = load_chain(chain)
    tokens = mx.array([[5, 300, 17, 44]])
    assert mx.abs(theirs(tokens) - ours(tokens)).max().item() < BOUND


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"lora_bias": True}, "LoRA with a bias"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights 'pissa_niter_16'"),
        ({"trainable_token_indices": [1]}, "single trained tokens"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"layer_replication": [[0, 2]]}, "layer replication"),
        ({"use_something_new": True}, "use_something_new True"),
        ({"modules_to_save": ["norm"]}, "modules_to_save 'norm'"),
        ({"modules_to_save": 5}, "modules_to_save is 5"),
        ({"lora_alpha": "8"}, "the alpha of .* is '8'"),
        ({"lora_alpha": -1}, "the alpha of .* is -1"),
        ({"alpha_pattern": {"q_proj(": 2}}, "no regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern is"),
        ({"lora_dropout": "x"}, "dropout"),
        ({"base_model_name_or_path": 5}, "model is 5"),
        ({"base_model_name_or_path": None}, "does not name its base model"),
    ],
)
def test_other_kinds_and_damaged_configurations_are_named(tiny_qwen3, tmp_path, config, message):
    folder = make_peft(tmp_path / "peft", tiny_qwen3, **config)
    with pytest.raises(ModelError, match=message) as caught:
        read_chain(str(folder))
    assert "\n" not in str(caught.value) and "adapter_config.json" in str(caught.value)


def change(folder, rename=None, **tensors) -> None:
    path = folder / "adapter_model.safetensors"
    found = load_file(path) | tensors
    for old, new in (rename or {}).items():
        found[new] = found.pop(old)
    save_file(found, path)


def test_damaged_tensors_are_named(tiny_qwen3, tmp_path):
    first = f"{PREFIX}model.layers.0.self_attn.q_proj"

    numbers = iter(range(99))

    def refused(message: str, **changes) -> None:
        folder = make_peft(tmp_path / str(next(numbers)), tiny_qwen3)
        change(folder, **changes)
        with pytest.raises(ModelError, match=message) as caught:
            load_chain(read_chain(str(folder)))
        assert "\n" not in str(caught.value)

    a, b = f"{first}.lora_A.weight", f"{first}.lora_B.weight"
    one = np.ones((1, 1), np.float32)
    refused("no lora_A and lora_B that fit", rename={a: f"{first}x.lora_A.weight"})
    refused("no lora_A and lora_B that fit", **{b: one})
    refused("belongs to an embedding", **{f"{PREFIX}model.embed_tokens.lora_embedding_A": one})
    refused("another kind of adapter", **{f"{first}.lora_magnitude_vector.weight": one})
    refused("do not fit this base model", **{a: np.ones((4, 9), np.float32)})
    refused("not finite", **{a: np.full((4, 64), np.nan, np.float32)})
    refused("do not fit this base model", **{PREFIX + EMBEDDING: one})
    folder = make_peft(tmp_path / "pickle", tiny_qwen3)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="a pickle, which is never loaded"):
        read_chain(str(folder))


def test_grpo_trains_on_from_it_and_convert_fuses_the_chain(
    tiny_qwen3, rows, run, tmp_path, monkeypatch
):
    new = other(tiny_qwen3, 1)
    both = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    make_peft(tmp_path / "sft", tiny_qwen3, whole={EMBEDDING: new, HEAD: new}, **both)
    settings = [*GRPO, "training.max_steps=2", "model.sft=sft", f"dataset.name={rows}"]
    done = run(["train.py", "grpo", *sets(settings)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    output = tmp_path / "outputs" / "grpo"
    shutil.rmtree(tmp_path / "sft")  # the copy below the result is complete
    chain = read_chain(str(output / "last"))
    assert (chain.adapters[0] / "adapters.safetensors").is_file()
    found = fused(chain)
    np.testing.assert_allclose(found[EMBEDDING], new, atol=BOUND)
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", str(output), "--mlx", "fused", "--quantize", "f16", "--output", "gguf"]
    monkeypatch.setattr(sys, "argv", ["convert.py", *arguments])
    convert.main()
    exported = load_file(next((tmp_path / "fused").glob("*.safetensors")))
    np.testing.assert_allclose(exported[EMBEDDING], new, atol=BOUND)
    assert HEAD not in exported
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True


def test_an_adapter_on_the_hub(hub, hub_root, run, tmp_path):
    """The original's names: an adapter's repository, which names its base on the Hub."""
    base = hub_root / "models" / "Qwen" / "Qwen3-1.7B"
    name = "tobil/qmd-query-expansion-1.7B-sft"
    folder = make_peft(
        hub_root / "models" / name, base, layers=(0,), base_model_name_or_path="Qwen/Qwen3-1.7B"
    )
    (folder / "training_args.bin").write_bytes(b"a pickle")
    env = {"env": hub, "cwd": tmp_path}
    args = ["eval.py", name, "--query", "auth config", "--max-tokens", "3", "-o", "r.json"]
    done = run(args, **env)
    assert done.returncode == 0, done.stderr
    assert "training_args.bin" not in (hub_root / "requests.log").read_text()
    described = json.loads((tmp_path / "r.json").read_text())["model"]
    assert described["base"] == "Qwen/Qwen3-1.7B" and len(described["revision"]) == 40
    done = run(["train.py", "grpo", "--dry-run", "--set", f"model.sft={name}"], **env)
    assert done.returncode == 0 and "# memory: about" in done.stdout, done.stderr
