"""memory.py: hand-worked sizes of a small Qwen3, and what is proposed when the device is too small."""

import json
import re
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from settings import default_config
from tiny import make_gemma3, make_llama, make_qwen3

from expander import model as models
from expander.config import load_config
from expander.model import adapter_weights, add_lora, load_base, lora_config, read_chain
from expander.train import memory
from expander.train.memory import (
    Estimate,
    Quantization,
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


# What a layer keeps per token for the backward pass, attention weights left out: four of hidden, five
# of ffn, three of queries, keys and values.
KEPT = 4 * 64 + 5 * 128 + 3 * (64 + 32)


def test_an_sft_estimate_worked_by_hand(qwen):
    config, shape = default_config(), shape_of(qwen)
    config.training.batch_size, config.lora.target_modules = 2, ["q_proj"]
    found = estimate("sft", config, shape, 33, width=2)  # 32 inputs per row, 2 x 13 targets
    assert found.weights == 2 * shape.parameters()
    # Six float32 copies, and a cast to the two bytes of the dtype.
    assert found.adapter == (4 * 6 + 2) * 2 * 16 * 128
    # Per layer also a row of float32 attention weights per head; and one layer of temporaries.
    layer = 64 * (2 * KEPT + 4 * 4 * 32)
    assert found.activations == 3 * layer
    # 26 targets are padded to 32. Three float32 arrays; in the dtype, the output, its cast and theirs.
    assert found.logits == 32 * shape.vocabulary * 4 * (3 + 2)
    assert found.peak == found.weights + found.adapter + found.activations + found.logits
    # Lengths are padded to 8, 16, 24, 32 or 40: three shapes for each.
    assert found.compiled == 420_000 * 2 * 3 * 5
    assert found.resident == found.peak + cache_limit() + found.compiled + memory.PROCESS

    config.training.gradient_checkpointing = True
    found = estimate("sft", config, shape, 33, 2)
    assert found.activations == 2 * 2 * 64 * 64 + 2.5 * layer
    assert found.logits == pytest.approx(32 * shape.vocabulary * 4 * (2.4 + 2))


def test_float32_casts_neither_the_adapter_nor_logits(qwen):
    config, shape = default_config(), shape_of(qwen)
    found = estimate("sft", config, shape, 33, width=4)
    rows = config.training.batch_size
    assert found.weights == 4 * shape.parameters()
    assert found.adapter == 4 * 6 * shape.adapter(16, config.lora.target_modules)
    assert found.activations == 3 * rows * 32 * (4 * KEPT + 4 * 4 * 32)
    assert found.logits == 64 * shape.vocabulary * 3 * 4  # 4 x 13 targets are padded to 64


def test_gemma_keeps_more_for_its_norms_and_its_gelu(tmp_path):
    """Eight of hidden and seven of ffn; heads of 16, one of them for keys and values."""
    shape = shape_of(make_gemma3(tmp_path / "gemma"))
    per_token = 4 * (8 * 64 + 7 * 128 + 3 * (64 + 16)) + 4 * 4 * 32
    assert shape.layer_kinds(64, 32, width=4) == {64 * per_token: 7}


def test_a_quantised_base_counts_its_bits_scales_and_biases(qwen):
    config, shape = default_config(), shape_of(qwen)
    config.model.load_in_4bit = True
    # Half a byte per weight, and per 64 weights a scale and a bias of two bytes.
    per_weight = 0.5 + 4 / 64
    assert estimate("sft", config, shape, 10, 2).weights == shape.parameters() * per_weight
    # For GRPO the SFT adapter is fused, and the layers that it changes are not quantised any more.
    rest = 64 * shape.vocabulary + 2 * (LAYER - 64 * 64)
    found = estimate("grpo", load_config("grpo")[0], shape, 10, 2, bits=4, fused={"q_proj"})
    assert found.weights == 2 * 2 * 64 * 64 + rest * per_weight


def test_a_base_that_is_quantised_already_is_read_as_such(qwen, tmp_path):
    """Whatever the configuration adds: such a base is not quantised again."""
    settings = json.loads((qwen / "config.json").read_text())
    packed = settings | {"quantization": {"group_size": 32, "bits": 8}}
    shape, config = Shape.of(packed), default_config()
    assert shape.quantization == Quantization(8, 32)
    for config.model.load_in_4bit in (False, True):
        found = estimate("sft", config, shape, 10, 2)
        assert found.weights == shape.parameters() * (1 + 4 / 32)


@pytest.mark.parametrize("bits", [None, 4])
def test_the_weights_are_those_that_are_loaded(bits, qwen, tmp_path):
    """Before and after an adapter on some layers is fused; norms are not counted."""

    def size(model) -> int:
        arrays = dict(tree_flatten(model.parameters())).items()
        return sum(a.nbytes for name, a in arrays if "norm" not in name and "lora" not in name)

    width, shape = memory.compute_dtype().size, shape_of(qwen)
    model = load_base(qwen, bits)
    quantization = Quantization(bits) if bits else None
    assert size(model) == shape.weights(width, quantization)
    add_lora(model, lora_config(model, 4, 8.0, 0.0, ["q_proj", "up_proj"]))
    models.fuse(model)
    assert size(model) == shape.weights(width, quantization, {"q_proj", "up_proj"})


def test_the_vocabulary_does_not_set_the_memory(qwen):
    """However many tokens, a few chunks of logits are held."""
    config, shape = default_config(), shape_of(qwen)
    config.training.batch_size = 10_000
    assert estimate("sft", config, shape, 512, 2).logits == 4 * (13 + 2) * memory.LOGIT_BUDGET


def test_grpo_counts_the_larger_of_rollout_and_update(qwen):
    config, _ = load_config("grpo")
    shape, settings = shape_of(qwen), config.grpo
    config.training.batch_size, config.training.gradient_accumulation_steps = 2, 16
    settings.max_completion_length, settings.eval_prompts = 246, 0
    # The update of two completions: their prompts of 10 tokens may differ.
    tokens, length = 2 * 256, 256
    update = 3 * tokens * (2 * KEPT + 4 * 4 * length)
    assert estimate("grpo", config, shape, 10, 2).activations == update
    # Decoding: keys and values of 2 heads of 16, 2 layers, in steps of 256 tokens.
    settings.rollout_batch_size, config.training.gradient_accumulation_steps = 512, 256
    decoding = 2 * 512 * 256 * 2 * 32 * 2
    found = estimate("grpo", config, shape, 10, 2)
    assert found.activations == decoding
    assert found.logits == 512 * shape.vocabulary * (2 + 4 * 4)
    assert found.compiled == 0
    # An evaluation may decode more rows than a step.
    config.training.gradient_accumulation_steps, settings.eval_prompts = 16, 512
    assert estimate("grpo", config, shape, 10, 2).activations == decoding


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


@pytest.mark.parametrize(
    ("metal", "gigabytes", "wired"), [(True, 10, [9_500_000_000]), (False, 10, []), (True, 0, [])]
)
def test_wired_memory_stays_below_what_the_device_allows(
    metal, gigabytes, wired, device, monkeypatch
):
    limits = []
    monkeypatch.setattr(mx, "set_wired_limit", limits.append)
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    device(gigabytes)
    models.wire_memory()
    assert limits == wired


def test_a_machine_without_a_gpu_wires_nothing():
    models.wire_memory()


def test_buffers_kept_for_reuse_follow_the_device(device, monkeypatch):
    device(5.6)
    assert cache_limit() == 700_000_000
    device(96)
    assert cache_limit() == 2 << 30
    monkeypatch.setattr(mx, "device_info", dict)  # a CPU
    monkeypatch.setattr(memory, "installed", lambda: 96 * 10**9)
    assert cache_limit() == 256 << 20


def test_a_proposal_fits_and_is_what_the_configuration_takes(qwen, device, monkeypatch):
    monkeypatch.setattr(memory, "LOGIT_BUDGET", 1)
    chain = read_chain(str(qwen))
    config, _ = load_config("sft")
    shape, width = shape_of(qwen), memory.compute_dtype().size
    needed = estimate("sft", config, shape, 500, width)
    device(needed.peak / 1e9 + 1e-6)
    line, warning = preflight("sft", config, chain, 500)
    assert line.startswith("memory: about ") and warning is None

    device(needed.peak / 1e9 * 0.7)
    _, warning = preflight("sft", config, chain, 500)
    sets = warning.split(" with ")[1].split("--set ")[1:]
    assert sets[0].startswith("training.batch_size=")
    smaller, ignored = load_config("sft", settings=[setting.strip() for setting in sets])
    assert not ignored
    assert estimate("sft", smaller, shape, 500, width).peak <= recommended()
    effective = smaller.training.batch_size * smaller.training.gradient_accumulation_steps
    assert effective == 16  # the step stays what it was

    device(1e-6)
    _, warning = preflight("sft", config, chain, 500)
    assert warning.endswith("choose a smaller base model")


def test_savings_are_each_smaller_than_the_one_before(qwen):
    for stage in ("sft", "grpo"):
        config, _ = load_config(stage)
        totals = [estimate(stage, config, shape_of(qwen), 300, 2).peak]
        for smaller, _ in savings(stage, config):
            totals.append(estimate(stage, smaller, shape_of(qwen), 300, 2).peak)
        assert len(totals) > 2
        assert totals == sorted(totals, reverse=True) and totals[-1] < totals[0]


def test_the_preflight_of_grpo_reads_the_chain(qwen, tmp_path):
    """The bits of the base and the layers that SFT adapted are in the adapter's folder."""
    model = load_base(qwen)
    adapter = lora_config(model, 4, 8.0, 0.0, ["q_proj", "v_proj"])
    add_lora(model, adapter)
    folder, record = tmp_path / "sft", {"model": str(qwen), "quantize_bits": 4}
    models.save_adapter(folder, adapter_weights(model), adapter | record)
    chain = read_chain(str(folder))
    assert chain.adapted_layers() == {"q_proj", "v_proj"} and chain.bits == 4
    assert read_chain(str(qwen)).adapted_layers() == set()
    config, _ = load_config("grpo")
    width = memory.compute_dtype().size
    expected = estimate(
        "grpo", config, shape_of(qwen), 64, width, bits=4, fused={"q_proj", "v_proj"}
    )
    line, _ = preflight("grpo", config, chain, 64)
    assert line.startswith(f"memory: {expected}; ")


def test_an_estimate_reads_as_one_line():
    text = str(Estimate(3.44e9, 3e8, activations=1.5e9, logits=8e8, buffers=2.1e9, compiled=3.6e8))
    assert text.startswith(
        "about 6.0 GB: weights 3.4, adapter and optimiser 0.3, activations 1.5, logits 0.8; up to "
        "8.8 GB resident"
    )
    assert "buffers for reuse 2.1" in text and "compiled steps 0.4" in text and "\n" not in text


# The README's table

QWEN3 = {
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
SIZES = {
    "Qwen3-0.6B": {"hidden_size": 1024, "intermediate_size": 3072},
    "Qwen3-1.7B": {"hidden_size": 2048, "intermediate_size": 6144},
}
ROW = re.compile(
    r"^\| \d+ GB \| (\S+) \| (.+) \| ([\d.]+), ([\d.]+) \| ([\d.]+), ([\d.]+) \|$", re.M
)


def test_the_readme_has_the_estimates_in_bfloat16(monkeypatch):
    monkeypatch.setattr(memory, "cache_limit", lambda: 2 << 30)
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    rows = ROW.findall(readme)
    assert len(rows) == 3
    for model, options, *figures in rows:
        settings = re.findall(r"--set ([^ `]+)", options)
        shape, found = Shape.of(QWEN3 | SIZES[model]), []
        for stage, changes, longest in (("sft", settings, 512), ("grpo", [], 64)):
            config, _ = load_config(stage, None, changes)
            result = estimate(stage, config, shape, longest, width=2)
            found += [f"{result.peak / 1e9:.1f}", f"{result.resident / 1e9:.1f}"]
        assert figures == found, model


# The table of other base models in docs/bases.md


LFM2 = {
    "model_type": "lfm2",
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "vocab_size": 65536,
    "layer_types": ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)],
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
}
QWEN35 = {
    "model_type": "qwen3_5",
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "vocab_size": 248320,
    "layer_types": [*["linear_attention"] * 3, "full_attention"] * 6,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
GRANITE = {
    "model_type": "granite",
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 49159,
}
SMOLLM3 = {
    "model_type": "smollm3",
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 128256,
}
# name -> the architecture's settings, heads or layers, hidden size, width of the MLP
OTHERS = {
    "LFM2-350M": (LFM2, {"num_attention_heads": 16}, 1024, 4608),
    "LFM2.5-1.2B": (LFM2, {"num_attention_heads": 32}, 2048, 8192),
    "Gemma 3 270M": (GEMMA3, {"num_hidden_layers": 18}, 640, 2048),
    "Gemma 3 1B": (GEMMA3, {"num_hidden_layers": 26}, 1152, 6912),
    "Qwen3.5-0.8B": (QWEN35, {}, 1024, 3584),
    "Granite 3.3 2B": (GRANITE, {}, 2048, 8192),
    "SmolLM3-3B": (SMOLLM3, {}, 2048, 11008),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_page_of_base_models_has_the_estimates_in_bfloat16(name):
    page = (Path(__file__).parents[1] / "docs/bases.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {re.escape(name)} \| ([\d. |]+) \|$", page, re.M)
    settings, more, hidden, ffn = OTHERS[name]
    shape = Shape.of(settings | more | {"hidden_size": hidden, "intermediate_size": ffn})
    small = ["training.gradient_checkpointing=true"]
    single = [*small, "training.batch_size=1"]
    found = []
    for stage, changes, longest in (
        ("sft", small, 512),
        ("sft", single, 512),
        ("sft", [*single, "model.load_in_4bit=true"], 512),
        ("grpo", [], 64),
    ):
        config, _ = load_config(stage, None, changes)
        found.append(f"{estimate(stage, config, shape, longest, width=2).peak / 1e9:.1f}")
    assert row.split(" | ") == found
