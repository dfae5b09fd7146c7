"""PEFT's LoRA adapters, read as mlx-lm's.

PEFT adds s B A x to a layer's output, with A (r, in) and B (out, r); mlx-lm's matrices are the transposed
ones. PEFT may have another rank and alpha in each layer, mlx-lm has one of both: smaller ranks are padded
with zeros, and the ratio of the scales goes into lora_b. Left out: DoRA and everything else that
is not a plain LoRA, refused by its name.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from expander.base_config import ModelError
from expander.config import TRAINED
from expander.weight_files import StoredTensor, read_header

PEFT_FILE, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
LORA_TENSOR = re.compile(r"(.+)\.lora_([AB])\.weight")
# A trained module as PEFT writes it: alone, or inside its wrappers.
WHOLE_TENSOR = re.compile(r"(.+?)(\.base_layer|\.modules_to_save)?\.weight")
MAX_PATTERN = 300
# Keys of adapter_config.json whose effect is not a plain LoRA, and their names.
OTHER_KINDS = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "lora_bias": "LoRA with a bias",
    "target_parameters": "LoRA of single parameters",
    "trainable_token_indices": "single trained tokens",
    "fan_in_fan_out": "LoRA of transposed weights",
}
# Initialisations that leave the base's weights as they are.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def is_peft(config: Mapping) -> bool:
    """Whether an adapter_config.json is PEFT's."""
    return "peft_type" in config


def mlx_config(path: Path, config: dict) -> dict:
    """A PEFT adapter's configuration as mlx-lm's, with "model", "modules_to_save" and "tied".

    Args:
        path: of the adapter_config.json.
        config: its contents.

    Raises:
        ModelError: it is no plain LoRA, is mistyped, or its tensors cannot be read.
    """
    _check_kind(path, config)
    layers, whole = _layers(path.parent)
    scales = {name: _scale(path, config, name, a.shape[0]) for name, (a, _) in layers.items()}
    saved = [name for name, module in TRAINED.items() if module in whole]
    found = {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": max(a.shape[0] for a, _ in layers.values()),
            "scale": max(scales.values()),
            "dropout": config.get("lora_dropout", 0.0),
            "keys": sorted(layers),
        },
    }
    for ours, theirs in {"model": "base_model_name_or_path", "revision": "revision"}.items():
        if config.get(theirs) is not None:
            found[ours] = config[theirs]
    if saved:
        # Unless PEFT was asked to keep them tied, a new embedding leaves a tied head as it was.
        found |= {"modules_to_save": saved, "tied": config.get("ensure_weight_tying") is True}
    return found


def mlx_weights(path: Path, config: dict) -> dict[str, mx.array]:
    """The tensors of a PEFT adapter by their names in mlx-lm, in float32.

    Args:
        path, config: as for `mlx_config`, which has accepted them.
    """
    layers, whole = _layers(path.parent)
    common = mlx_config(path, config)["lora_parameters"]
    arrays = mx.load(str(path.parent / PEFT_FILE))
    weights = {
        f"{name}.weight": arrays[stored].astype(mx.float32) for name, stored in whole.items()
    }
    for name, (a, _) in layers.items():
        stored = f"{PREFIX}{name}.lora_{{}}.weight"
        ratio = _scale(path, config, name, a.shape[0]) / common["scale"]
        pad = [(0, common["rank"] - a.shape[0])]
        down, up = (arrays[stored.format(part)].astype(mx.float32).T for part in "AB")
        weights[f"{name}.lora_a"] = mx.pad(down, [(0, 0), *pad])  # (in, rank)
        weights[f"{name}.lora_b"] = mx.pad(up if ratio == 1 else ratio * up, [*pad, (0, 0)])
    return weights


def _check_kind(path: Path, config: dict) -> None:
    def refuse(kind: str) -> ModelError:
        return ModelError(f"{path}: {kind}; of PEFT's adapters, only LoRA ones are supported")

    if (kind := config["peft_type"]) != "LORA":
        raise refuse(f"peft_type {kind!r:.40}")
    for key, name in OTHER_KINDS.items():
        if config.get(key):
            raise refuse(f"{name} ({key})")
    for key, value in config.items():  # what newer versions add
        if key.startswith("use_") and value and key != "use_rslora":
            raise refuse(f"{key} {value!r:.40}")
    if (bias := config.get("bias", "none")) != "none":
        raise refuse(f"trained biases (bias {bias!r:.40})")
    if (start := config.get("init_lora_weights")) not in PLAIN_STARTS:
        raise refuse(f"init_lora_weights {start!r:.40}, which changes the base's own weights")
    others = set(_names(path, config, "modules_to_save")) - {
        *TRAINED,
        *TRAINED.values(),
    }
    if others:
        raise refuse(f"modules_to_save {min(others)!r:.40}")


def _names(path: Path, config: dict, key: str) -> list[str]:
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ModelError(f"{path}: {key} is {value!r:.60}, expected a list of names")
    return value


def _layers(
    folder: Path,
) -> tuple[dict[str, tuple[StoredTensor, StoredTensor]], dict[str, str]]:
    """A and B by layer, and the stored names of the modules trained as a whole.

    Raises:
        ModelError: the file is missing, or has a tensor that is neither.
    """
    path = folder / PEFT_FILE
    if not path.is_file():
        if (folder / PICKLE).is_file():
            raise ModelError(
                f"{folder / PICKLE}: a pickle, which is never loaded; save the adapter with "
                "safe_serialization=True"
            )
        raise ModelError(f"{folder}/adapter_config.json: PEFT's, but there is no {PEFT_FILE}")
    parts: dict[str, dict[str, StoredTensor]] = {}
    whole = {}
    for stored, tensor in read_header(path).items():
        name = stored.removeprefix(PREFIX)
        if lora := LORA_TENSOR.fullmatch(name):
            parts.setdefault(lora[1], {})[lora[2]] = tensor
        elif (found := WHOLE_TENSOR.fullmatch(name)) and found[1] in TRAINED.values():
            whole[found[1]] = stored
        else:
            kind = "an embedding" if "lora_embedding" in name else "another kind of adapter"
            raise ModelError(f"{path}: {stored} belongs to {kind}; only LoRA is supported")
    layers = {}
    for name, found in parts.items():
        a, b = found.get("A"), found.get("B")
        fits = a and b and len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] > 0
        if not fits:
            raise ModelError(f"{path}: {name} has no lora_A and lora_B that fit together")
        layers[name] = (a, b)
    if not layers:
        raise ModelError(f"{path}: no LoRA layer in this file")
    return layers, whole


def _scale(path: Path, config: dict, name: str, rank: int) -> float:
    """The scale of a layer's update: alpha / rank, or alpha / √rank with use_rslora."""
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ModelError(f"{path}: alpha_pattern is {patterns!r:.60}, expected an object")
    try:
        keys = [
            key
            for key in patterns
            if len(key) <= MAX_PATTERN and re.match(rf"(.*\.)?({key})$", name)  # as PEFT does
        ]
    except (re.error, RecursionError):
        raise ModelError(f"{path}: a key of alpha_pattern is no regular expression") from None
    if keys:
        alpha = patterns[keys[0]]
    if type(alpha) not in (int, float) or not 0 < alpha < float("inf"):
        raise ModelError(f"{path}: the alpha of {name} is {alpha!r:.40}, expected a number above 0")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
