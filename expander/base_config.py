"""A base model's config.json, checked, and in the form that mlx-lm and llama.cpp read alike.

The same setting has had several places in config.json (transformers 5 moved RoPE's settings into
rope_parameters), and mlx-lm ignores those it does not know. A setting is either moved to where mlx-lm
reads it, or refused here, before anything is trained: training, evaluation and every export then
compute the same model.
"""

import math

from expander.architectures import (
    ALIASES,
    ANY,
    ARCHITECTURES,
    Architecture,
    attention_layers,
    head_dim,
)


class ModelError(ValueError):
    """A model or adapter that cannot be used."""


# Integers that every config.json must have, and others that it may have: their largest sensible value.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
LARGEST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 13,
    "max_position_embeddings": (1 << 31) - 1,
    "original_max_position_embeddings": (1 << 31) - 1,
    "conv_L_cache": 1 << 6,
    "sliding_window": (1 << 31) - 1,
    "linear_num_key_heads": 1 << 12,
    "linear_num_value_heads": 1 << 12,
    "linear_key_head_dim": 1 << 13,
    "linear_value_head_dim": 1 << 13,
    "linear_conv_kernel_dim": 1 << 6,
}
# What each type of RoPE is computed from.
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
# Settings of YaRN that are not exported, with the values that all three implementations assume.
YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True}


def read_base_config(config: dict) -> dict:
    """Check the parsed config.json of a supported architecture, and bring it into one form.

    Returns:
        A copy with `rope_theta` and `rope_scaling` (None, or a type and its numbers) as mlx-lm reads
        them, `rope_parameters` None, and `num_key_value_heads` set. `tie_word_embeddings` is missing
        if config.json does not set it.

    Raises:
        ValueError: a key is missing, mistyped, out of range, or asks for something that mlx-lm or
            llama.cpp would ignore. The message starts with the key.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str):
        model_type = ALIASES.get(model_type, model_type)
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ValueError(
            f"model_type {model_type!r:.40} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[model_type]
    config = dict(architecture.normalize(config))
    _check_sizes(config, architecture)
    _number(config, "rms_norm_eps", largest=1)
    for key in architecture.numbers:
        _number(config, key)
    _check_switches(config, architecture)
    _check_attention(config, architecture)
    _check_quantization(config)
    theta, scaling = _rope(config, architecture)
    return config | {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": None}


def _integer(config: dict, key: str) -> int:
    value, largest = config.get(key), LARGEST[key]
    if value is None:
        raise ValueError(f"{key} is missing")
    if type(value) is not int or not 1 <= value <= largest:
        raise ValueError(f"{key} is {value!r:.40}, expected an integer from 1 to {largest}")
    return value


def _number(config: dict, key: str, largest: float = 1e12) -> float:
    value = config.get(key)
    if value is None:
        raise ValueError(f"{key} is missing")
    if type(value) not in (int, float) or not 0 < value <= largest:  # nan fails too
        raise ValueError(f"{key} is {value!r:.40}, expected a number above 0, at most {largest:g}")
    return value


def _check_sizes(config: dict, architecture: Architecture) -> None:
    """Check the integers and how they divide; set `num_key_value_heads` if it may be missing."""
    for key in (*SIZES, *architecture.sizes):
        _integer(config, key)
    for key in ("num_key_value_heads", "head_dim"):
        if config.get(key) is not None:
            _integer(config, key)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = heads
    if heads % config["num_key_value_heads"]:
        raise ValueError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads "
            f"{config['num_key_value_heads']}"
        )
    even = hidden % heads == 0
    if config.get("head_dim") is None and not even:
        raise ValueError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim "
            "is missing"
        )
    if not architecture.free_head_dim and (not even or head_dim(config) != hidden // heads):
        raise ValueError(
            f"head_dim {head_dim(config)} is not hidden_size / num_attention_heads "
            f"({hidden} / {heads}); mlx-lm supports no other for {architecture.model_type}"
        )
    if head_dim(config) % 2:
        raise ValueError(f"head_dim {head_dim(config)} is odd, but RoPE rotates pairs")


def _check_switches(config: dict, architecture: Architecture) -> None:
    """Check the switches, and refuse those that mlx-lm or llama.cpp would ignore."""
    for key in ("tie_word_embeddings", *architecture.biases):
        if config.get(key) is None:
            config.pop(key, None)  # null is mlx-lm's False, but its default may be True
        elif not isinstance(config[key], bool):
            raise ValueError(f"{key} is {config[key]!r:.40}, expected true or false")
    fixed = {"hidden_act": "silu", "rope_traditional": False, "partial_rotary_factor": 1}
    if "attention_bias" not in architecture.biases:
        # Qwen2 always has biases of q, k and v and none of o; this switch does not change it.
        fixed |= {} if architecture.model_type == "qwen2" else {"attention_bias": False}
    for key, value in (fixed | architecture.fixed).items():
        if value is not ANY and config.get(key) not in (None, value):
            raise ValueError(
                f"{key} {config[key]!r:.40} is not supported for {architecture.model_type} models, "
                f"only {value!r}"
            )
    for key in ("dtype", "torch_dtype"):
        if not isinstance(config.get(key), str | None):
            raise ValueError(f"{key} is {config[key]!r:.40}, expected a name such as bfloat16")


def _check_attention(config: dict, architecture: Architecture) -> None:
    """Refuse other kinds of layers, such as sliding windows: mlx-lm or llama.cpp would attend to all
    tokens instead."""
    kinds, layers = config.get("layer_types"), config["num_hidden_layers"]
    if kinds is None:
        first = config.get("max_window_layers") or 0
        slides = (
            config.get("use_sliding_window") is True
            and config.get("sliding_window") is not None
            and (not isinstance(first, int) or first < layers)
        )
    else:
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise ValueError(
                f"layer_types is {kinds!r:.40}, expected a list of num_hidden_layers {layers}"
            )
        slides = (
            "sliding_attention" in kinds and "sliding_attention" not in architecture.layer_types
        )
        if not slides and (other := [x for x in kinds if x not in architecture.layer_types]):
            raise ValueError(
                f"layer_types has {other[0]!r:.40}, expected only "
                f"{' and '.join(architecture.layer_types)}"
            )
    if slides:
        key = "use_sliding_window" if kinds is None else "layer_types"
        raise ValueError(f"{key}: sliding-window attention is not supported, only full attention")


def _check_quantization(config: dict) -> None:
    """Check the entry of a base whose weights MLX has quantised."""
    quantization = config.get("quantization")
    if quantization is None:
        config.pop("quantization", None)
        return
    numbers = quantization if isinstance(quantization, dict) else {}
    for key, allowed in (("bits", (2, 3, 4, 5, 6, 8)), ("group_size", (16, 32, 64, 128))):
        if type(numbers.get(key)) is not int or numbers[key] not in allowed:
            raise ValueError(
                f"quantization.{key} is {numbers.get(key)!r:.40}, expected one of "
                f"{', '.join(map(str, allowed))}"
            )


def _rope(config: dict, architecture: Architecture) -> tuple[float, dict | None]:
    """RoPE's base, and its scaling: None, or rope_type and the keys of ROPE_KEYS.

    They may be in rope_theta and rope_scaling, or in rope_parameters; both must agree.
    """
    found: dict[str, tuple[object, str]] = {}  # name -> (value, the key it was found at)
    for place in ("rope_parameters", "rope_scaling"):
        values = config.get(place)
        if not isinstance(values, dict | None):
            raise ValueError(f"{place} is {values!r:.40}, expected an object")
        for name, value in (values or {}).items():
            if value is not None:
                name = "rope_type" if name == "type" else name
                _agree(found, name, value, f"{place}.{name}")
    if config.get("rope_theta") is not None:
        _agree(found, "rope_theta", config["rope_theta"], "rope_theta")
    settings = {name: value for name, (value, _) in found.items()}
    theta = _number(settings, "rope_theta")

    kind = settings.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in architecture.rope_types:
        raise ValueError(
            f"{found['rope_type'][1]} {kind!r:.40} is not supported for "
            f"{architecture.model_type} models, only {', '.join(architecture.rope_types)}"
        )
    if settings.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"{found['partial_rotary_factor'][1]} {settings['partial_rotary_factor']!r:.40} is not "
            "supported, only 1"
        )
    if kind == "default":
        if nested := [name for name, value in settings.items() if isinstance(value, dict)]:
            raise ValueError(f"{found[nested[0]][1]}: RoPE settings by layer are not supported")
        return theta, None
    return theta, {"rope_type": kind} | _scaling(kind, settings, found, config)


def _agree(found: dict, name: str, value: object, place: str) -> None:
    """Add a setting to `found`. Raise ValueError if it is there with another value."""
    if name in found and found[name][0] != value:
        raise ValueError(
            f"{place} is {value!r:.40}, but {found[name][1]} is {found[name][0]!r:.40}; remove the "
            "wrong one"
        )
    found.setdefault(name, (value, place))


def _scaling(kind: str, settings: dict, found: dict, config: dict) -> dict[str, float]:
    """The numbers of a scaled RoPE."""
    if kind == "yarn":
        settings = {
            "original_max_position_embeddings": config["max_position_embeddings"]
        } | settings
    numbers = {}
    for key in ROPE_KEYS[kind]:
        try:
            numbers[key] = (_integer if key in LARGEST else _number)(settings, key)
        except ValueError as error:
            raise ValueError(f"RoPE scaling {kind}: {error}") from None
    if numbers.get("low_freq_factor", 0) >= numbers.get("high_freq_factor", math.inf):
        raise ValueError("RoPE scaling llama3: low_freq_factor is not below high_freq_factor")
    defaults = YARN_DEFAULTS | {"attention_factor": 0.1 * math.log(numbers["factor"]) + 1}
    for name in settings.keys() - {"rope_type", "rope_theta", "partial_rotary_factor", *numbers}:
        known = kind == "yarn" and name in defaults and type(settings[name]) in (int, float, bool)
        if not known or not math.isclose(settings[name], defaults[name], rel_tol=1e-6):
            raise ValueError(
                f"{found[name][1]} {settings[name]!r:.40} is not supported with RoPE scaling {kind}"
            )
    return numbers


def text_name(name: str) -> str:
    """The name of a tensor in the files of a text model, if the model also reads images."""
    for prefix in ("model.language_model.", "language_model.model."):
        if name.startswith(prefix):
            return f"model.{name.removeprefix(prefix)}"
    return name.removeprefix("language_model.")


def check_against_weights(config: dict, shapes: dict[str, tuple[int, ...]]) -> None:
    """Compare the sizes in config.json with the weights' own; rows are not packed by quantising.

    Args:
        config: from `read_base_config`.
        shapes: of the tensors in the weight files, by name.

    Raises:
        ValueError: they differ.
    """
    shapes = {text_name(name): shape for name, shape in shapes.items()}
    indices = {name.split(".")[2] for name in shapes if name.startswith("model.layers.")}
    found = max((int(index) for index in indices if index.isdecimal()), default=-1) + 1
    if found and found != config["num_hidden_layers"]:
        raise ValueError(
            f"num_hidden_layers is {config['num_hidden_layers']}, but the weights have {found} layers"
        )
    maps = ARCHITECTURES[config["model_type"]].projections(config)
    layer, heads, groups = "model.layers.0", "num_attention_heads", "num_key_value_heads"
    attention = f"model.layers.{attention_layers(config)[0]}"
    for name, key, rows in (
        ("model.embed_tokens", "vocab_size", config["vocab_size"]),
        ("model.norm", "hidden_size", config["hidden_size"]),
        (f"{layer}.mlp.gate_proj", "intermediate_size", config["intermediate_size"]),
        (f"{layer}.feed_forward.w1", "intermediate_size", config["intermediate_size"]),
        (f"{attention}.self_attn.q_proj", f"{heads} x head_dim", maps["self_attn.q_proj"].outputs),
        (f"{attention}.self_attn.k_proj", f"{groups} x head_dim", maps["self_attn.k_proj"].outputs),
    ):
        shape = shapes.get(f"{name}.weight")
        if shape and shape[0] != rows:
            raise ValueError(f"{key} is {rows}, but {name}.weight has {shape[0]} rows")
