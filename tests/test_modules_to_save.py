"""lora.modules_to_save: the embedding and the head trained as a whole, saved, resumed and exported."""

import json
import shutil
import signal
import sys

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from dtypes import tolerance
from mlx.utils import tree_flatten
from safetensors.numpy import load_file
from settings import default_config, section
from test_grpo import plain_logps
from test_peft_adapter import EMBEDDING, HEAD, fused, loaded
from test_train import GRPO, SFT, files, sets, stop, train

import convert
from expander import model as models
from expander.config import ConfigError, load_config
from expander.lora import TrainedEmbedding, TrainedHead
from expander.model import read_chain
from expander.train import logps
from expander.train.memory import Shape, estimate

MODULES = "lora.modules_to_save=[embed_tokens, lm_head]"
TOKENS = mx.array([[5, 300, 17, 44, 260, 9, 301, 2]])
BOUND = tolerance(float32=1e-4, bfloat16=3e-2)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return tiny.make_qwen2(tmp_path_factory.mktemp("models") / "qwen2", tied=False)


def adapted(base, modules, bits=None):
    model = models.load_base(base, bits)
    models.add_lora(model, models.lora_config(model, 4, 8.0, 0.0, ["q_proj"], modules))
    return model


@pytest.mark.parametrize("bits", [None, 4])
def test_nothing_changes_before_training(tiny_qwen3, untied, bits):
    for base in (tiny_qwen3, untied):
        before = models.load_base(base, bits)(TOKENS)
        after = adapted(base, ["embed_tokens", "lm_head"], bits)(TOKENS)
        np.testing.assert_allclose(np.array(after), np.array(before), atol=BOUND)


def test_a_tied_head_is_the_embedding(tiny_qwen3, untied):
    for modules in (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]):
        model = adapted(tiny_qwen3, modules)
        assert isinstance(model.model.embed_tokens, TrainedEmbedding) and "lm_head" not in model
        trained = models.adapter_weights(model)
        assert [name for name in trained if "lora" not in name] == [EMBEDDING]
        assert trained[EMBEDDING].dtype == mx.float32
    model = adapted(untied, ["lm_head"])
    assert isinstance(model.lm_head, TrainedHead)
    assert type(model.model.embed_tokens) is nn.Embedding
    names = set(models.adapter_weights(adapted(untied, ["embed_tokens", "lm_head"])))
    assert {EMBEDDING, HEAD} <= names


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("budget", [1, 50 * 10, 1 << 25])
def test_the_gradient_of_a_trained_head(temperature, budget, monkeypatch):
    """Next to autodiff: of the states, and of the weight, whatever the chunks."""
    monkeypatch.setattr(logps, "LOGIT_BUDGET", budget)
    mx.random.seed(3)
    head = TrainedHead(nn.Linear(8, 50, bias=False))
    hidden, targets = 2 * mx.random.normal((23, 8)), mx.random.randint(0, 50, (23,))
    cotangent = mx.random.normal((23,))

    def ours(h, weight):
        head.weight = weight
        return (logps.token_logps(h, targets, head, temperature)[0] * cotangent).sum()

    def plain(h, weight):
        return (plain_logps(h, targets, lambda x: x @ weight.T, temperature) * cotangent).sum()

    weight = head.weight
    value, gradients = mx.value_and_grad(ours, (0, 1))(hidden, weight)
    expected, slopes = mx.value_and_grad(plain, (0, 1))(hidden, weight)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, slope in zip(gradients, slopes, strict=True):
        np.testing.assert_allclose(np.array(gradient), np.array(slope), atol=2e-5)
    head.weight = weight
    _, entropy = logps.token_logps(hidden, targets, head, 1.0, with_entropy=True)
    full = head(hidden) - mx.logsumexp(head(hidden), axis=-1, keepdims=True)
    np.testing.assert_allclose(
        np.array(entropy), np.array(-(mx.exp(full) * full).sum(axis=-1)), atol=1e-4
    )


def test_the_reference_model_has_the_old_embedding(tiny_qwen3):
    model = adapted(tiny_qwen3, ["embed_tokens"])
    before = models.load_base(tiny_qwen3)(TOKENS)
    module = model.model.embed_tokens
    module.weight = module.weight + 1
    with models.adapters_off(model):
        assert mx.array_equal(model(TOKENS), before)
    assert model.model.embed_tokens is module and not mx.array_equal(model(TOKENS), before)


@pytest.fixture(scope="module")
def base(tiny_qwen3, tmp_path_factory):
    return tiny.end_early(shutil.copytree(tiny_qwen3, tmp_path_factory.mktemp("base") / "qwen3"))


@pytest.fixture(scope="module")
def options(base, rows) -> list[str]:
    return sets([f"model.base={base}", f"dataset.name={rows}", *SFT, MODULES])


@pytest.fixture(scope="module")
def sft_run(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    train(folder, "sft", *options)
    return folder


def test_a_stopped_run_resumes_to_the_same_bytes(sft_run, options, tmp_path):
    stop(tmp_path, ["sft", *options], "step 2/6", signal.SIGTERM)
    assert "resuming at step" in train(tmp_path, "sft", *options, "--resume")
    output, whole = tmp_path / "outputs" / "sft", sft_run / "outputs" / "sft"
    for name in ("adapters.safetensors", "last/adapters.safetensors", "adapter_config.json"):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name
    assert files(output) == files(whole)
    tensors = load_file(output / "last" / "adapters.safetensors")
    old = load_file(read_chain(str(output)).path / "model.safetensors")[EMBEDDING]
    assert tensors[EMBEDDING].dtype == np.float32 and HEAD not in tensors
    assert 1e-4 < np.abs(tensors[EMBEDDING] - old).max() < 0.1
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["embed_tokens", "lm_head"]


def test_mlx_lms_commands_refuse_it_rather_than_leave_the_embedding_out(sft_run, base):
    from mlx_lm.tuner.utils import load_adapters

    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight: not an adapter parameter"):
        load_adapters(models.load_base(base), str(sft_run / "outputs" / "sft"))


def test_grpo_trains_on_it_and_every_export_has_it(sft_run, rows, tmp_path, monkeypatch):
    shutil.copytree(sft_run / "outputs", tmp_path / "outputs")
    settings = [*GRPO, "training.max_steps=2", f"dataset.name={rows}", MODULES]
    train(tmp_path, "grpo", *sets(settings))
    folder = tmp_path / "outputs" / "grpo" / "last"
    chain = read_chain(str(folder))
    sft, grpo = (load_file(x / "adapters.safetensors")[EMBEDDING] for x in chain.adapters)
    assert np.abs(grpo - sft).max() > 0
    weights = fused(chain)
    for found in (weights, loaded(chain)):
        np.testing.assert_allclose(found[EMBEDDING], grpo, atol=BOUND)

    monkeypatch.chdir(tmp_path)
    exports = ["--mlx", "mlx", "--peft", "peft", "--quantize", "f32", "--output", "gguf"]
    monkeypatch.setattr(sys, "argv", ["convert.py", "--model", str(folder), *exports])
    convert.main()
    exported = load_file(next((tmp_path / "mlx").glob("*.safetensors")))
    np.testing.assert_allclose(exported[EMBEDDING], weights[EMBEDDING], atol=BOUND)
    reader = gguf.GGUFReader(next((tmp_path / "gguf").glob("*.gguf")))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert "output.weight" not in tensors
    np.testing.assert_allclose(tensors["token_embd.weight"].data, weights[EMBEDDING], atol=BOUND)
    # PEFT does not tie them by itself, so its folder has both; read back, they are one again.
    again = read_chain(str(tmp_path / "peft"))
    for name, value in fused(again).items():
        np.testing.assert_allclose(value, weights[name], atol=BOUND)
    saved = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert saved["modules_to_save"] == ["embed_tokens", "lm_head"]


def test_an_untied_model_is_trained_and_exported(untied, tmp_path):
    model = adapted(untied, ["embed_tokens", "lm_head"])
    mx.random.seed(0)
    weights = {
        name: value + 0.1 * mx.random.normal(value.shape)
        for name, value in models.adapter_weights(model).items()
    }
    model.load_weights(list(weights.items()), strict=False)
    config = models.lora_config(
        models.load_base(untied), 4, 8.0, 0.0, ["q_proj"], ["embed_tokens", "lm_head"]
    )
    folder = tmp_path / "adapter"
    models.save_adapter(folder, weights, config | {"model": str(untied)})
    chain = read_chain(str(folder))
    found = fused(chain)
    assert loaded(chain).keys() == found.keys()
    for name in (EMBEDDING, HEAD):
        np.testing.assert_allclose(found[name], np.array(weights[name]), atol=BOUND)
    again, _ = models.load_chain(chain)
    np.testing.assert_allclose(np.array(again(TOKENS)), np.array(model(TOKENS)), atol=BOUND)
    models.fuse(again)
    assert not tree_flatten(again.trainable_parameters())
    np.testing.assert_allclose(np.array(again(TOKENS)), np.array(model(TOKENS)), atol=10 * BOUND)


def test_unknown_modules_are_refused():
    with pytest.raises(ConfigError, match="modules_to_save: 'norm'; it takes embed_tokens and lm_"):
        load_config("sft", None, ["lora.modules_to_save=[norm]"])
    with pytest.raises(ConfigError, match=r"modules_to_save: 'embed_tokens' is not allowed.*list"):
        load_config("sft", None, ["lora.modules_to_save=embed_tokens"])
    assert load_config("sft")[0].lora.modules_to_save is None


def test_the_estimate_has_their_cost():
    sizes = {"num_hidden_layers": 28, "hidden_size": 2048, "intermediate_size": 6144}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936}
    shape = Shape.of(sizes | {"tie_word_embeddings": True})
    config = default_config()
    with_modules = default_config(lora=section("lora", modules_to_save=["embed_tokens", "lm_head"]))
    more = (
        estimate("sft", with_modules, shape, 512, 2).adapter
        - estimate("sft", config, shape, 512, 2).adapter
    )
    assert more == 151936 * 2048 * (4 * 6 + 2)  # 8.1 GB: the figure in configs/
    untied = Shape.of(sizes | {"tie_word_embeddings": False})
    assert untied.whole(["embed_tokens", "lm_head"]) == 2 * shape.whole(["lm_head"])
