"""memory.py: hand-worked sizes of a small Qwen3, and what is proposed when the device is too small."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from settings import default_config
from tiny import make_llama, make_qwen3

from expander.config import load_config
from expander.model import adapter_weights, add_lora, load_base, lora_config, read_chain
from expander.train import memory
from expander.train.memory import (
    Estimate,
    Shape,
    cache_limit,
    estimate,
    preflight,
    recommended,
    savings,
)

# tests.tiny's Qwen3 without the vocabulary: 2 layers, hidden 64, 4 heads and 2 KV heads of 16, ffn 128.
LAYER = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return make_qwen3(tmp_path_factory.mktemp("qwen"))


def shape_of(folder) -> Shape:
    return Shape.of(memory.model_config(folder))


def test_parameters_are_those_of_the_model_but_for_norms(qwen, tmp_path):
    for folder in (qwen, make_qwen3(tmp_path / "u", tied=False), make_llama(tmp_path / "l")):
        model, shape = load_base(folder), shape_of(folder)
        matrices = [p.size for _, p in tree_flatten(model.parameters()) if p.ndim == 2]
        assert shape.parameters() == sum(matrices)
    rows = shape_of(qwen).vocabulary
    assert shape_of(qwen).parameters() == 2 * LAYER + 64 * rows


def test_adapter_counts_the_trainable_numbers(qwen):
    model, targets = load_base(qwen), ["q_proj", "v_proj", "down_proj"]
    add_lora(model, lora_config(model, 4, 8.0, 0.0, targets))
    trainable = sum(array.size for array in adapter_weights(model).values())
    assert shape_of(qwen).adapter(4, targets) == trainable == 2 * 4 * (128 + 96 + 192)


def test_an_estimate_worked_by_hand(qwen):
    config, shape = default_config(), shape_of(qwen)
    config.training.batch_size, config.lora.target_modules = 2, ["q_proj"]
    found = estimate("sft", config, shape, 10, width=2)
    assert found.weights == 2 * shape.parameters()
    assert found.adapter == 4 * 5 * 2 * 16 * 128
    # Six of hidden, five of ffn, three of query, key and value, and a row of scores for each head.
    layer = 6 * 64 + 5 * 128 + 3 * (64 + 32) + 4 * 10
    assert found.activations == 2 * 20 * 2 * layer
    assert found.logits == 4 * 3 * 20 * shape.vocabulary
    assert found.total == found.weights + found.adapter + found.activations + found.logits

    config.training.gradient_checkpointing = True
    assert estimate("sft", config, shape, 10, 2).activations == 2 * 20 * (2 * 64 + layer)
    config.model.load_in_4bit = True
    # Half a byte a weight, and for each 64 a scale and a bias of two bytes.
    assert estimate("sft", config, shape, 10, 2).weights == shape.parameters() * (0.5 + 4 / 64)
    # The SFT adapter is fused for grpo, which leaves nothing quantised.
    assert estimate("grpo", config, shape, 10, 2).weights == 2 * shape.parameters()


def test_the_vocabulary_does_not_set_the_memory(qwen):
    """However many tokens, a few chunks of logits are held."""
    config, shape = default_config(), shape_of(qwen)
    config.training.batch_size = 10_000
    assert estimate("sft", config, shape, 512, 2).logits == 4 * 12 * memory.LOGIT_BUDGET


def test_grpo_counts_the_larger_of_rollout_and_update(qwen):
    config, _ = load_config("grpo")
    shape = shape_of(qwen)
    settings = config.grpo
    config.training.batch_size, config.training.gradient_accumulation_steps = 1, 64
    settings.rollout_batch_size, settings.max_completion_length = 64, 10
    decoding = 2 * 64 * 20 * 2 * 32  # keys and values x rows x tokens x layers x KV width
    update = shape.activations(20, 20, False)
    assert estimate("grpo", config, shape, 10, 1).activations == max(decoding, update) == decoding
    settings.rollout_batch_size = 1
    assert estimate("grpo", config, shape, 10, 1).activations == update


@pytest.fixture
def device(monkeypatch):
    """`device(gigabytes)`: a device that recommends so much."""

    def set_limit(gigabytes: float) -> None:
        info = {"max_recommended_working_set_size": int(gigabytes * 1e9)}
        monkeypatch.setattr(mx, "device_info", lambda: info)

    return set_limit


def test_what_the_device_recommends_or_all_memory(device, monkeypatch):
    device(5.3)
    assert recommended() == 5_300_000_000
    monkeypatch.setattr(mx, "device_info", dict)
    assert recommended() > 2e8  # any machine this runs on


def test_buffers_kept_for_reuse_follow_the_device(device):
    device(5.6)
    assert cache_limit() == 700_000_000
    device(96)
    assert cache_limit() == 2 << 30


def test_a_proposal_fits_and_is_what_the_configuration_takes(qwen, device, monkeypatch):
    monkeypatch.setattr(memory, "LOGIT_BUDGET", 1)
    chain = read_chain(str(qwen))
    config, _ = load_config("sft")
    shape, width = shape_of(qwen), memory.compute_dtype().size
    needed = estimate("sft", config, shape, 500, width)
    device(needed.total / 1e9)
    line, warning = preflight("sft", config, chain, 500)
    assert line.startswith("memory: about ") and warning is None

    device(needed.total / 1e9 * 0.7)
    _, warning = preflight("sft", config, chain, 500)
    sets = warning.split(" with ")[1].split("--set ")[1:]
    assert sets[0].startswith("training.batch_size=")
    smaller, ignored = load_config("sft", settings=[setting.strip() for setting in sets])
    assert not ignored
    assert estimate("sft", smaller, shape, 500, width).total <= recommended()
    effective = smaller.training.batch_size * smaller.training.gradient_accumulation_steps
    assert effective == 16  # the step stays what it was

    device(1e-6)
    _, warning = preflight("sft", config, chain, 500)
    assert warning.endswith("choose a smaller base model")


def test_savings_are_each_smaller_than_the_one_before(qwen):
    for stage in ("sft", "grpo"):
        config, _ = load_config(stage)
        totals = [estimate(stage, config, shape_of(qwen), 300, 2).total]
        for smaller, _ in savings(stage, config):
            totals.append(estimate(stage, smaller, shape_of(qwen), 300, 2).total)
        assert len(totals) > 2
        assert totals == sorted(totals, reverse=True) and totals[-1] < totals[0]


def test_an_estimate_reads_as_one_line():
    text = str(Estimate(weights=3.44e9, adapter=3e8, activations=1.5e9, logits=8e8))
    assert text == (
        "about 6.0 GB: weights 3.4, adapter and optimiser 0.3, activations 1.5, logits 0.8"
    )
