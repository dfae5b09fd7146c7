"""The supported model architectures, and everything in which they differ.

To add one:

1. Check that mlx-lm has it (mlx_lm/models/MODEL_TYPE.py) with the layout that model.py uses:
   `model.model` returns the normed hidden states, `model.layers` holds the layers, and the logits
   come from `lm_head` or from the tied embeddings, divided by `model.logits_scaling` if it has
   one (model.hidden_states does that). Its layers must keep their state in mlx-lm's
   KVCache, RotatingKVCache or ArraysCache: decode.py and train/logps.py batch these.
2. Check that the gguf package has it (gguf.MODEL_ARCH) with a name for each of its tensors.
3. Add an entry to ARCHITECTURES. llama.cpp's converter shows the keys and how it changes the
   tensors; mlx-lm's ModelArgs shows the keys of config.json that it needs, and those that it
   ignores. Refuse in `normalize` what either would ignore. `projections` are LoRA's targets.
4. If its chat has another frame than ChatML, add a Frame to prompt.py.
5. If its tokenizer.json splits text in a new way, add llama.cpp's name for that to PRE_TOKENIZERS in
   convert/gguf_tokenizer.py. It is chosen by the tokenizer, not by the architecture.
6. If it has layers without attention, `mixer` gives their share in the memory estimate; if it has more
   norms or another activation than llama, so does `kept`.
7. Add a tiny random model to tests/tiny.py and to BASES in tests/test_llama_cpp.py, which compares
   its greedy tokens with those of a real llama.cpp; and to docs/bases.md.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from expander.prompt import CHATML, GEMMA, GRANITE, LFM2, Frame

# LoRA's default targets: attention and the gated MLP, by the names in most models.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def head_dim(config: dict) -> int:
    """The size of an attention head, from a model's config.json."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


ANY = object()


class Layout(NamedTuple):
    """A tensor of the model as it is stored in a GGUF file.

    Attributes:
        name: what gguf calls it is looked up by this name.
        change: from some of its rows, in float32, to the same rows of the file.
        rows: `change` needs a multiple of so many rows.
    """

    name: str
    shape: tuple[int, ...]
    change: Callable[[np.ndarray], np.ndarray] | None = None
    rows: int = 1


class Projection(NamedTuple):
    """A linear map of the layers: its sizes, and how many layers have it."""

    inputs: int
    outputs: int
    layers: int


def _same(config: dict) -> dict:
    return config


def _no_keys(config: dict) -> dict[str, int | float]:
    return {}


def _no_mixer(config: dict) -> tuple[int, int]:
    return 0, 0


def _as_it_is(config: dict, name: str, shape: tuple[int, ...]) -> Layout:
    return Layout(name, shape)


def attention_layers(config: dict) -> list[int]:
    """The indices of the layers that have attention over all or the last tokens."""
    kinds = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
    return [i for i, kind in enumerate(kinds) if kind in ("full_attention", "sliding_attention")]


def _set_layer_types(config: dict, kind: str, period: int) -> None:
    """Set layer_types: `kind`, but every `period`th layer is full_attention.

    Raises:
        ValueError: the configuration has others.
    """
    layers = config.get("num_hidden_layers")
    if type(layers) is not int:
        return  # base_config.py refuses it
    kinds = [kind if (i + 1) % period else "full_attention" for i in range(layers)]
    if config.setdefault("layer_types", kinds) not in (None, kinds):
        raise ValueError(f"layer_types: only every {period}th layer may be full_attention")
    config["layer_types"] = kinds


def _projections(
    config: dict,
    output: str = "o_proj",
    mlp: Sequence[str] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
) -> dict[str, Projection]:
    """The maps of attention and of a gated MLP; `mlp` has the names of gate, up and down."""
    hidden, ffn, layers = (
        config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    attention, heads = len(attention_layers(config)), config["num_attention_heads"]
    query = heads * head_dim(config)
    key_value = (config.get("num_key_value_heads") or heads) * head_dim(config)
    gate, up, down = mlp
    return {
        "self_attn.q_proj": Projection(hidden, query, attention),
        "self_attn.k_proj": Projection(hidden, key_value, attention),
        "self_attn.v_proj": Projection(hidden, key_value, attention),
        f"self_attn.{output}": Projection(query, hidden, attention),
        gate: Projection(hidden, ffn, layers),
        up: Projection(hidden, ffn, layers),
        down: Projection(ffn, hidden, layers),
    }


def select_projections(names: Collection[str], targets: Collection[str]) -> list[str]:
    """The linear maps that LoRA adapts.

    Args:
        names: of all maps, within a layer: self_attn.q_proj, conv.in_proj.
        targets: names, or their last parts, as PEFT matches them. The default, all of PROJECTIONS,
            stands for every map, whatever the model calls them.

    Raises:
        ValueError: there is no map of that name.
    """
    if set(targets) == set(PROJECTIONS):
        return sorted(names)
    found = {target: [x for x in names if f".{x}".endswith(f".{target}")] for target in targets}
    if missing := sorted(target for target, matches in found.items() if not matches):
        raise ValueError(
            f"lora.target_modules: the model has no layer {', '.join(missing)}; it has "
            f"{', '.join(sorted(names))}"
        )
    return sorted(set().union(*found.values()))


@dataclass(frozen=True)
class Architecture:
    """One architecture. Biases and head norms need no field: gguf names the tensors a model has.

    Attributes:
        model_type: its name in config.json and in mlx-lm.
        gguf_name: its name in GGUF files, also the prefix of its keys.
        frame: how its chat is written.
        normalize: brings a config.json into the form that base_config.py checks and mlx-lm reads,
            or raises ValueError.
        projections: the linear maps of its layers, by their names in a layer.
        mixer: from config.json to what a layer without attention keeps for the backward pass:
            numbers per token, and float32 numbers of a recurrence's state per token.
        kept: how many times its hidden size and the width of its MLP a layer keeps per token for the
            backward pass: inputs of norms and LoRA layers, both halves of SwiGLU.
        gguf_keys: from config.json to the keys that it has in addition to those of
            gguf_file.hyperparameters, or instead of them, without the prefix.
        gguf_layout: from config.json and a tensor's name and shape to how it is stored.
        interleaved_rope: llama.cpp rotates neighbouring rows of q and k, not the two halves of a
            head as Hugging Face does, so the rows are reordered on export.
        sizes: integers that config.json must have in addition to base_config.SIZES.
        numbers: numbers above 0 that config.json must have.
        layer_types: the kinds of layers that config.json may name.
        free_head_dim: a head may have another size than hidden_size / num_attention_heads.
        biases: switches of config.json that mlx-lm obeys; in other architectures they must be off.
        fixed: other keys of config.json, and the only value that they may have, or ANY.
        rope_types: the kinds of RoPE that transformers, mlx-lm and llama.cpp compute alike.
        without_embedding: tokens of its tokenizer that may lie beyond the vocabulary.
    """

    model_type: str
    gguf_name: str
    frame: Frame = CHATML
    normalize: Callable[[dict], dict] = _same
    projections: Callable[[dict], dict[str, Projection]] = _projections
    mixer: Callable[[dict], tuple[int, int]] = _no_mixer
    kept: tuple[int, int] = (4, 5)
    gguf_keys: Callable[[dict], dict[str, int | float | list[int]]] = _no_keys
    gguf_layout: Callable[[dict, str, tuple[int, ...]], Layout] = _as_it_is
    interleaved_rope: bool = False
    sizes: tuple[str, ...] = ("num_key_value_heads",)
    numbers: tuple[str, ...] = ()
    layer_types: tuple[str, ...] = ("full_attention",)
    free_head_dim: bool = True
    biases: tuple[str, ...] = ()
    fixed: dict[str, object] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    without_embedding: tuple[str, ...] = ()


# llama


def _llama_keys(config: dict) -> dict[str, int | float]:
    return {"vocab_size": config["vocab_size"], "rope.dimension_count": head_dim(config)}


# SmolLM3: a llama without RoPE in every fourth layer


def _smollm3_config(config: dict) -> dict:
    """Check which layers have no RoPE: llama.cpp leaves it out of every fourth, and has no key for it."""
    layers, period = config.get("num_hidden_layers"), 4
    if type(layers) is not int:
        return config  # base_config.py refuses it
    rotated = [int((i + 1) % period != 0) for i in range(layers)]
    found, interval = config.get("no_rope_layers"), config.get("no_rope_layer_interval")
    if found is None and interval not in (None, period):
        raise ValueError(f"no_rope_layer_interval {interval!r:.40} is not supported, only {period}")
    if found not in (None, rotated):
        raise ValueError(f"no_rope_layers: only every {period}th layer may be without RoPE")
    return config | {"no_rope_layers": rotated, "no_rope_layer_interval": period}


# Granite: a llama with four factors


GRANITE_FACTORS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)


def _granite_config(config: dict) -> dict:
    """Add the keys that mlx-lm needs and transformers does not."""
    defaults = dict.fromkeys(GRANITE_FACTORS, 1.0) | {"attention_bias": False, "mlp_bias": False}
    found = {key: value for key, value in config.items() if value is not None}
    return config | defaults | {key: found[key] for key in defaults.keys() & found.keys()}


def _granite_keys(config: dict) -> dict[str, int | float]:
    embedding, attention, residual, logits = (float(config[key]) for key in GRANITE_FACTORS)
    return _llama_keys(config) | {
        "embedding_scale": embedding,
        "attention.scale": attention,
        "residual_scale": residual,
        "logit_scale": logits,
    }


# LFM2: a short convolution in most layers, attention in the others


def _lfm2_config(config: dict) -> dict:
    """Give LFM2's settings the common names, the real width of the MLP, and both forms of the
    layers' kinds."""
    config = dict(config)
    layers, hidden = config.get("num_hidden_layers"), config.get("hidden_size")
    if config.get("layer_types") is None:
        full = config.get("full_attn_idxs")
        if not isinstance(full, list) or type(layers) is not int:
            raise ValueError("layer_types is missing")
        config["layer_types"] = ["full_attention" if i in full else "conv" for i in range(layers)]
    kinds = config["layer_types"]
    if not isinstance(kinds, list) or "full_attention" not in kinds or "conv" not in kinds:
        raise ValueError(f"layer_types is {kinds!r:.40}, expected conv and full_attention layers")
    config["full_attn_idxs"] = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    if config.get("block_dim") not in (None, hidden):
        raise ValueError(f"block_dim {config['block_dim']!r:.40} is not hidden_size {hidden}")
    for key in ("tie_embedding", "tie_word_embeddings"):
        if config.get(key) not in (None, True):
            raise ValueError(
                f"{key} {config[key]!r:.40} is not supported for lfm2 models, only True"
            )
    width = config.get("block_ff_dim") or config.get("intermediate_size")
    if config.get("block_auto_adjust_ff_dim") and type(width) is int:
        multiple, factor = config.get("block_multiple_of"), config.get("block_ffn_dim_multiplier")
        if type(multiple) is not int or multiple < 1:
            raise ValueError(f"block_multiple_of is {multiple!r:.40}, expected an integer from 1")
        if type(factor) not in (int, float, type(None)):
            raise ValueError(f"block_ffn_dim_multiplier is {factor!r:.40}, expected a number")
        width = int(2 * width / 3)
        width = int(width if factor is None else factor * width)
        width = -(-width // multiple) * multiple
    epsilon = config.get("norm_eps") or config.get("block_norm_eps")
    return config | {
        "intermediate_size": width,
        "block_ff_dim": width,
        "block_auto_adjust_ff_dim": False,
        "block_multiple_of": config.get("block_multiple_of") or 1,
        "block_ffn_dim_multiplier": None,
        "block_dim": hidden,
        "conv_bias": config.get("conv_bias") or False,
        "norm_eps": epsilon,
        "rms_norm_eps": epsilon,
        "tie_word_embeddings": True,
    }


def _lfm2_projections(config: dict) -> dict[str, Projection]:
    hidden = config["hidden_size"]
    convolutions = config["num_hidden_layers"] - len(attention_layers(config))
    mlp = ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
    return _projections(config, "out_proj", mlp) | {
        "conv.in_proj": Projection(hidden, 3 * hidden, convolutions),
        "conv.out_proj": Projection(hidden, hidden, convolutions),
    }


def _lfm2_mixer(config: dict) -> tuple[int, int]:
    """Three gates and values, their product, the convolution's output and its product."""
    return 6 * config["hidden_size"], 0


def _lfm2_keys(config: dict) -> dict[str, int | float | list[int]]:
    heads, attention = config["num_key_value_heads"], attention_layers(config)
    return {
        "vocab_size": config["vocab_size"],
        "shortconv.l_cache": config["conv_L_cache"],
        "attention.head_count_kv": [
            heads if i in attention else 0 for i in range(config["num_hidden_layers"])
        ],
    }


def _flat(rows: np.ndarray) -> np.ndarray:
    """The kernels of a convolution within channels, (C, K, 1), without the last axis."""
    return rows[..., 0]


def _lfm2_layout(config: dict, name: str, shape: tuple[int, ...]) -> Layout:
    return (
        Layout(name, shape[:2], _flat) if name.endswith("conv.conv.weight") else Layout(name, shape)
    )


# Gemma 3: five layers with a sliding window, then one without


def _gemma3_config(config: dict) -> dict:
    """Bring RoPE's two bases and the pattern of the windows into the form that mlx-lm reads. llama.cpp
    knows the pattern and the local base of Gemma 3 only."""
    config = dict(config)
    pattern, local = 6, 10_000
    found = config.pop("_sliding_window_pattern", None) or config.get("sliding_window_pattern")
    if found not in (None, pattern):
        raise ValueError(f"sliding_window_pattern {found!r:.40} is not supported, only {pattern}")
    _set_layer_types(config, "sliding_attention", pattern)
    rope = config.get("rope_parameters") or {}
    if isinstance(rope, dict) and isinstance(rope.get("full_attention"), dict):
        sliding = rope.get("sliding_attention") or {}
        config["rope_parameters"] = rope["full_attention"]
        config.setdefault("rope_local_base_freq", sliding.get("rope_theta"))
    if config.get("rope_local_base_freq") not in (None, local):
        raise ValueError(
            f"rope_local_base_freq {config['rope_local_base_freq']!r:.40} is not supported, only "
            f"{local}"
        )
    size, scalar = config.get("head_dim"), config.get("query_pre_attn_scalar", 256)
    if scalar != size:
        raise ValueError(f"query_pre_attn_scalar {scalar!r:.40} is not head_dim {size!r:.40}")
    return config | {
        "sliding_window_pattern": pattern,
        "rope_local_base_freq": local,
        "query_pre_attn_scalar": size,
    }


def _gemma3_keys(config: dict) -> dict[str, int]:
    return {"attention.sliding_window": config["sliding_window"]}


def _plus_one(rows: np.ndarray) -> np.ndarray:
    return rows + 1


def _gemma3_layout(config: dict, name: str, shape: tuple[int, ...]) -> Layout:
    """The weights of norms are stored as they are multiplied; Gemma's own files have them less 1."""
    return Layout(name, shape, _plus_one if name.endswith("norm.weight") else None)


# Qwen3.5: three layers with a gated delta net, a recurrence, then one with attention


def _qwen35_config(config: dict) -> dict:
    """The settings of the text part of a model that also reads images, with RoPE's in one form."""
    text = config.get("text_config")
    if text is not None:
        if not isinstance(text, dict):
            raise ValueError(f"text_config is {text!r:.40}, expected an object")
        outer = ("tie_word_embeddings", "quantization", "dtype", "torch_dtype")
        config = {key: config[key] for key in outer if key in config} | text
    config = config | {"model_type": "qwen3_5"}
    for key in ("vision_config", "quantization_config"):
        config.pop(key, None)
    interval = config.get("full_attention_interval") or 4
    if type(interval) is not int or interval < 2:
        raise ValueError(f"full_attention_interval is {interval!r:.40}, expected an integer from 2")
    keys, values = config.get("linear_key_head_dim"), config.get("linear_value_head_dim")
    if keys != values:
        raise ValueError(
            f"linear_value_head_dim {values!r:.40} is not linear_key_head_dim {keys!r:.40}"
        )
    _set_layer_types(config, "linear_attention", interval)
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict | None):
        raise ValueError(f"rope_parameters is {rope!r:.40}, expected an object")
    rope = dict(rope or {})
    rope.pop("mrope_interleaved", None)  # without images, all three sections have equal positions
    sections = rope.pop("mrope_section", None) or [11, 11, 10]
    share = rope.pop("partial_rotary_factor", config.get("partial_rotary_factor") or 0.25)
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise ValueError(f"partial_rotary_factor is {share!r:.40}, expected a number up to 1")
    if not isinstance(sections, list) or not all(type(x) is int for x in sections):
        raise ValueError(f"mrope_section is {sections!r:.40}, expected a list of integers")
    return config | {
        "full_attention_interval": interval,
        "rope_parameters": rope,
        "mrope_section": sections,
        "partial_rotary_factor": share,
    }


def _delta(config: dict) -> tuple[int, int, int]:
    """Sizes of the gated delta net: all keys, all values, heads of values."""
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    heads = config["linear_num_value_heads"]
    return keys, heads * config["linear_value_head_dim"], heads


def _qwen35_projections(config: dict) -> dict[str, Projection]:
    hidden, (keys, values, heads) = config["hidden_size"], _delta(config)
    attention = len(attention_layers(config))
    recurrent = config["num_hidden_layers"] - attention
    query = config["num_attention_heads"] * head_dim(config)
    return _projections(config) | {
        # Each query has a gate.
        "self_attn.q_proj": Projection(hidden, 2 * query, attention),
        "linear_attn.in_proj_qkv": Projection(hidden, 2 * keys + values, recurrent),
        "linear_attn.in_proj_z": Projection(hidden, values, recurrent),
        "linear_attn.in_proj_a": Projection(hidden, heads, recurrent),
        "linear_attn.in_proj_b": Projection(hidden, heads, recurrent),
        "linear_attn.out_proj": Projection(values, hidden, recurrent),
    }


def _qwen35_mixer(config: dict) -> tuple[int, int]:
    """The input and output of the convolution, queries and keys normed, gates and outputs."""
    keys, values, heads = _delta(config)
    return 8 * keys + 7 * values, heads * config["linear_key_head_dim"] * (values // heads)


def _qwen35_keys(config: dict) -> dict[str, int | list[int]]:
    _, values, heads = _delta(config)
    return {
        "rope.dimension_count": int(head_dim(config) * config["partial_rotary_factor"]),
        "rope.dimension_sections": [*config["mrope_section"], 0, 0, 0, 0][:4],
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": heads,
        "ssm.inner_size": values,
        "full_attention_interval": config["full_attention_interval"],
    }


def _regroup(array: np.ndarray, groups: int, heads: int, axis: int = 0) -> np.ndarray:
    """Reorder heads: Hugging Face has those of a group next to each other, llama.cpp the first of
    all groups, then the second of all, ..."""
    shape = array.shape
    split = (*shape[:axis], groups, heads // groups, -1, *shape[axis + 1 :])
    return array.reshape(split).swapaxes(axis, axis + 1).reshape(shape)


def _qwen35_layout(config: dict, name: str, shape: tuple[int, ...]) -> Layout:
    """llama.cpp stores the decay -exp(A_log), and the heads of values in another order."""
    name = name.removeprefix("language_model.")
    groups, (keys, _, heads) = config["linear_num_key_heads"], _delta(config)
    if "linear_attn." not in name or name.endswith("linear_attn.norm.weight"):
        return Layout(name, shape)

    def values_only(rows: np.ndarray) -> np.ndarray:  # queries and keys come first
        rows = rows.reshape(shape[0], -1)
        values = _regroup(rows[2 * keys :], groups, heads)
        return np.concatenate([rows[: 2 * keys], values])

    def all_rows(rows: np.ndarray) -> np.ndarray:
        return _regroup(rows, groups, heads)

    part = name.split("linear_attn.")[1]
    if part == "A_log":
        return Layout(name, shape, lambda rows: -np.exp(all_rows(rows)), shape[0])
    if part == "dt_bias":
        return Layout(name.replace("dt_bias", "dt_proj.bias"), shape, all_rows, shape[0])
    if part in ("conv1d.weight", "in_proj_qkv.weight"):
        return Layout(name, shape[:2], values_only, shape[0])
    if part == "out_proj.weight":
        return Layout(name, shape, lambda rows: _regroup(rows, groups, heads, axis=1))
    return Layout(name, shape, all_rows, shape[0])


# Names that transformers gives the text part of a model.
ALIASES = {"qwen3_5_text": "qwen3_5"}
ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("qwen3", gguf_name="qwen3", sizes=("num_key_value_heads", "head_dim")),
        Architecture("qwen2", gguf_name="qwen2", free_head_dim=False),
        Architecture(
            "llama",
            gguf_name="llama",
            gguf_keys=_llama_keys,
            interleaved_rope=True,
            sizes=(),
            biases=("attention_bias", "mlp_bias"),
            rope_types=("default", "linear", "yarn", "llama3"),
        ),
        Architecture(
            "smollm3",
            gguf_name="smollm3",
            normalize=_smollm3_config,
            gguf_keys=_llama_keys,
            interleaved_rope=True,
            sizes=(),
            fixed={"mlp_bias": False, "use_sliding_window": False},
        ),
        Architecture(
            "granite",
            gguf_name="granite",
            frame=GRANITE,
            normalize=_granite_config,
            gguf_keys=_granite_keys,
            interleaved_rope=True,
            numbers=GRANITE_FACTORS,
            free_head_dim=False,
            biases=("attention_bias", "mlp_bias"),
        ),
        Architecture(
            "lfm2",
            gguf_name="lfm2",
            frame=LFM2,
            normalize=_lfm2_config,
            projections=_lfm2_projections,
            mixer=_lfm2_mixer,
            gguf_keys=_lfm2_keys,
            gguf_layout=_lfm2_layout,
            sizes=("num_key_value_heads", "conv_L_cache"),
            layer_types=("full_attention", "conv"),
            free_head_dim=False,
            fixed={"conv_bias": False},
            rope_types=("default",),
        ),
        Architecture(
            "gemma3_text",
            gguf_name="gemma3",
            frame=GEMMA,
            normalize=_gemma3_config,
            kept=(8, 7),  # measured: two more norms, and a GELU by tanh
            gguf_keys=_gemma3_keys,
            gguf_layout=_gemma3_layout,
            sizes=("num_key_value_heads", "head_dim", "sliding_window"),
            layer_types=("sliding_attention", "full_attention"),
            fixed={
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_activation": "gelu_pytorch_tanh",
                "final_logit_softcapping": None,
                "attn_logit_softcapping": None,
                "use_bidirectional_attention": False,
            },
            rope_types=("default",),
            without_embedding=("<image_soft_token>",),
        ),
        Architecture(
            "qwen3_5",
            gguf_name="qwen35",
            normalize=_qwen35_config,
            projections=_qwen35_projections,
            mixer=_qwen35_mixer,
            gguf_keys=_qwen35_keys,
            gguf_layout=_qwen35_layout,
            sizes=(
                "num_key_value_heads",
                "head_dim",
                "linear_num_key_heads",
                "linear_num_value_heads",
                "linear_key_head_dim",
                "linear_value_head_dim",
                "linear_conv_kernel_dim",
            ),
            layer_types=("linear_attention", "full_attention"),
            fixed={"partial_rotary_factor": ANY, "attn_output_gate": True, "num_experts": 0},
            rope_types=("default",),
        ),
    )
}
