"""base_config.py: one form for every config.json; what mlx-lm or llama.cpp would ignore is refused."""

import json
import math

import pytest
import tiny

from expander.base_config import check_against_weights, read_base_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
)


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, dict]:
    root = tmp_path_factory.mktemp("models")
    makers = {"llama": tiny.make_llama, "qwen2": tiny.make_qwen2, "qwen3": tiny.make_qwen3}
    return {
        kind: json.loads((make(root / kind) / "config.json").read_text())
        for kind, make in makers.items()
    }


def without(config: dict, *keys: str, **changes) -> dict:
    return {key: value for key, value in config.items() if key not in keys} | changes


def refused(config: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        read_base_config(config)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


# RoPE


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_rope_parameters_are_the_same_as_the_old_keys(configs, kind):
    old = without(configs[kind], rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4.0})
    both = {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}
    new = without(old, "rope_theta", "rope_scaling", rope_parameters=both)
    mixed = without(old, rope_parameters=both)
    for config in (old, new, mixed):
        read = read_base_config(config)
        assert read["rope_theta"] == 5e5 and read["rope_parameters"] is None
        assert read["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_scaling": None, "rope_parameters": None},
        {"rope_theta": 1e6, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {}},
        {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 1.0}},
        {"rope_scaling": {"rope_theta": 1e6, "type": "default", "rope_type": "default"}},
    ],
)
def test_plain_rope_in_every_form(configs, rope):
    read = read_base_config(without(configs["qwen2"], "rope_theta", "rope_scaling", **rope))
    assert (read["rope_theta"], read["rope_scaling"]) == (1e6, None)


def test_yarn_takes_its_original_context_from_the_model(configs):
    config = without(configs["qwen3"], rope_scaling={"rope_type": "yarn", "factor": 4.0})
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40960}
    assert read_base_config(config)["rope_scaling"] == scaling
    defaults = {"beta_fast": 32.0, "beta_slow": 1, "attention_factor": 0.1 * math.log(4) + 1}
    config["rope_scaling"] |= defaults | {"truncate": True, "mscale": None}
    assert read_base_config(config)["rope_scaling"] == scaling


def test_llama3_scaling_of_a_llama(configs):
    assert (
        read_base_config(without(configs["llama"], rope_scaling=LLAMA3))["rope_scaling"] == LLAMA3
    )
    refused(without(configs["qwen3"], rope_scaling=LLAMA3), "rope_type 'llama3' is not supported")


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type 'longrope'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}, "'mrope'"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope_type"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "remove the wrong one"),
        ({"rope_parameters": {"rope_theta": 10000.0}}, "rope_theta is 100000, but rope_parameters"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        ({"rope_parameters": [1]}, "rope_parameters is"),
        ({"rope_scaling": {"type": "linear"}}, "linear: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor is '4'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {"type": "linear", "factor": math.nan}}, "factor is nan"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "low_freq_factor": 1}},
            "low_freq_factor",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 16}}, "beta_fast 16"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 0.7}}, "mscale 0.7"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": 1.0}}, "attention_f"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "not below high_freq_factor"),
        ({"rope_scaling": without(LLAMA3, "original_max_position_embeddings")}, "is missing"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "by layer"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25"),
        ({"rope_traditional": True}, "rope_traditional True"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"rope_theta": True}, "rope_theta is True"),
    ],
)
def test_rope_that_is_not_the_same_everywhere_is_refused(configs, rope, message):
    refused(without(configs["llama"], **rope), message)


# Other settings


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_missing_key_is_named(configs, kind):
    for key in REQUIRED:
        refused(without(configs[kind], key), f"^{key} is missing")
        refused(without(configs[kind], **{key: None}), f"^{key} is missing")
    needed = {"llama": (), "qwen2": ("num_key_value_heads",)}
    for key in needed.get(kind, ("num_key_value_heads", "head_dim")):
        refused(without(configs[kind], key), f"^{key} is missing")


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", *REQUIRED])
@pytest.mark.parametrize("value", [0, -1, 1e400, math.nan, "64", [64], {}, True, 10**18, 10**30])
def test_a_mistyped_or_absurd_number_is_named(configs, key, value):
    for config in configs.values():
        refused(without(config, **{key: value}), f"^{key} ")


def test_a_llama_without_optional_keys(configs):
    read = read_base_config(without(configs["llama"], "num_key_value_heads", "head_dim"))
    assert read["num_key_value_heads"] == read["num_attention_heads"] == 4


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("qwen3", {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ("qwen3", {"head_dim": 15}, "head_dim 15 is odd"),
        ("qwen2", {"head_dim": 32}, "head_dim 32 is not hidden_size / num_attention_heads"),
        ("llama", {"head_dim": None, "hidden_size": 66}, "hidden_size 66 is not a multiple"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("llama", {"attention_bias": "yes"}, "attention_bias is 'yes'"),
        ("llama", {"mlp_bias": 1}, "mlp_bias is 1"),
        ("llama", {"tie_word_embeddings": "true"}, "tie_word_embeddings is 'true'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("llama", {"layer_types": ["full_attention"]}, "expected a list of num_hidden_layers 2"),
        ("llama", {"model_type": "mistral"}, "model_type 'mistral' is not supported"),
        ("llama", {"model_type": ["llama"]}, "model_type"),
        ("llama", {"model_type": None}, "model_type None"),
        ("llama", {"quantization": 4}, "quantization.bits"),
        ("llama", {"quantization": {"bits": 4}}, "quantization.group_size is None"),
        ("llama", {"quantization": {"bits": 7, "group_size": 64}}, "quantization.bits is 7"),
        ("llama", {"torch_dtype": ["float32"]}, "torch_dtype"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(configs, kind, changes, message):
    refused(without(configs[kind], **changes), message)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": None},
        {"layer_types": ["full_attention"] * 2, "attention_bias": True, "partial_rotary_factor": 1},
        {"quantization": {"bits": 4, "group_size": 64, "mode": "affine", "lm_head": False}},
    ],
)
def test_settings_without_effect_are_accepted(configs, changes):
    read_base_config(without(configs["qwen2"], **changes))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("num_hidden_layers", 1000, "num_hidden_layers is 1000, but the weights have 2 layers"),
        ("num_hidden_layers", 1, "num_hidden_layers is 1"),
        ("vocab_size", 100, "vocab_size is 100, but model.embed_tokens.weight has 512 rows"),
        ("hidden_size", 128, "hidden_size is 128"),
        ("intermediate_size", 64, "intermediate_size is 64"),
        ("num_attention_heads", 8, "num_attention_heads x head_dim is 128"),
        ("num_key_value_heads", 4, "num_key_value_heads x head_dim is 64"),
        ("head_dim", 32, "num_attention_heads x head_dim is 128"),
    ],
)
def test_sizes_that_contradict_the_weights(configs, key, value, named):
    shapes = {
        "model.embed_tokens.weight": (512, 64),
        "model.norm.weight": (64,),
        "model.layers.1.mlp.gate_proj.weight": (128, 8),
        "model.layers.0.mlp.gate_proj.weight": (128, 8),  # four bits packed into a word
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.layers.0.self_attn.k_proj.weight": (32, 64),
    }
    config = read_base_config(configs["llama"])
    check_against_weights(config, shapes)
    check_against_weights(config, {})
    with pytest.raises(ValueError, match=named):
        check_against_weights(config | {key: value}, shapes)
