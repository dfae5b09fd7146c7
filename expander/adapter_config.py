"""adapter_config.json: mlx-lm's keys and ours, checked; and the record of a local base model.

Ours are "stage", "model", "revision", "quantize_bits", "parent" and, for a base that is a local
folder, "base": where it is, and by which weights, tokenizer and settings it is recognised. A base from
the Hub is identified by its commit.
"""

import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from expander.base_config import ModelError
from expander.config import TRAINED
from expander.files import read_json
from expander.peft_adapter import PEFT_FILE, is_peft, mlx_config, mlx_weights
from expander.weight_files import digest, weight_files

ADAPTER_FILE, ADAPTER_CONFIG = "adapters.safetensors", "adapter_config.json"
TOKENIZER = "tokenizer.json"
MAX_RANK = MAX_LAYERS = 1 << 12
MAX_SCALE = 10_000
MAX_TEXT = 1000
# Settings of a base that its weights do not show.
SETTINGS = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
)

OTHER_KINDS = {
    "dora": "a DoRA adapter; only LoRA adapters are supported: train with fine_tune_type lora",
    "full": "full weights, not a LoRA adapter; fuse them with mlx_lm.fuse --save-path DIR and use "
    "that folder as the model",
}


def _text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and "\0" not in value


def _integer(low: int, high: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _scale(value: object) -> bool:
    return type(value) in (int, float) and 0 < value <= MAX_SCALE  # nan fails too


def _dropout(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def _names(value: object) -> bool:
    return isinstance(value, list) and all(map(_text, value))


Rules = dict[str, tuple[Callable[[object], bool], str]]

# key -> (its check, what is expected). A key that is null counts as missing.
KEYS: Rules = {
    "model": (_text, "a folder or Hub id"),
    "revision": (_text, "a commit"),
    "parent": (_text, "the folder of the adapter below"),
    "quantize_bits": (lambda value: type(value) is int and value in (4, 8), "4 or 8"),
    "num_layers": (_integer(-1, MAX_LAYERS), f"an integer from -1 to {MAX_LAYERS}"),
    "lora_parameters": (lambda value: isinstance(value, dict), "an object"),
    "base": (lambda value: isinstance(value, dict), "an object"),
    "modules_to_save": (
        lambda value: _names(value) and set(value) <= TRAINED.keys(),
        "a list of " + " and ".join(TRAINED),
    ),
    "tied": (lambda value: isinstance(value, bool), "true or false"),
}
LORA_KEYS: Rules = {
    "rank": (_integer(1, MAX_RANK), f"an integer from 1 to {MAX_RANK}"),
    "scale": (_scale, f"a number above 0, at most {MAX_SCALE}"),
    "dropout": (_dropout, "a number from 0 to below 1"),
    "keys": (_names, "a list of layer names"),
}
BASE_KEYS: Rules = {
    "name": (_text, "a folder"),
    "path": (_text, "a folder"),
    "relative": (_text, "a folder"),
    "tokenizer": (_text, f"the SHA-256 of {TOKENIZER}"),
    "settings": (lambda value: isinstance(value, dict), "settings of config.json"),
    "weights": (
        lambda value: isinstance(value, dict) and all(map(_text, value.values())),
        "file names and their SHA-256",
    ),
}


def _check(
    path: Path, values: dict, rules: Rules, required: tuple[str, ...] = (), prefix=""
) -> None:
    for key, (valid, expected) in rules.items():
        value = values.get(key)
        if value is None and key in required:
            raise ModelError(f"{path}: {prefix}{key} is missing, expected {expected}")
        if value is not None and not valid(value):
            raise ModelError(f"{path}: {prefix}{key} is {value!r:.60}, expected {expected}")


def adapter_file(folder: Path) -> Path:
    """The weights of the adapter in a folder, mlx-lm's or PEFT's."""
    peft = folder / PEFT_FILE
    return (
        peft if peft.is_file() and not (folder / ADAPTER_FILE).is_file() else folder / ADAPTER_FILE
    )


def read_adapter_weights(folder: Path) -> dict[str, mx.array]:
    """The weights of the adapter in a folder by mlx-lm's names; they have not been checked.

    Raises:
        RuntimeError: the file is missing or damaged.
        ModelError: of a PEFT adapter, as `read_adapter_config`.
    """
    path = folder / ADAPTER_CONFIG
    if is_peft(config := read_json(path)):
        return mlx_weights(path, config)
    return mx.load(str(folder / ADAPTER_FILE))


def read_adapter_config(folder: Path) -> dict:
    """The configuration of the LoRA adapter in a folder, in mlx-lm's form also if it is PEFT's.

    Raises:
        ModelError: it cannot be read, is incomplete or mistyped, or is of another kind of adapter.
    """
    path = folder / ADAPTER_CONFIG
    try:
        config = read_json(path)
    except ValueError as error:
        raise ModelError(str(error)) from None
    if is_peft(config):
        config = mlx_config(path, config)
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        what = OTHER_KINDS.get(kind) if isinstance(kind, str) else None
        raise ModelError(f"{path}: fine_tune_type {kind!r:.40}: {what or 'expected lora'}")
    _check(path, config, KEYS, ("num_layers", "lora_parameters"))
    lora = config["lora_parameters"]
    _check(path, lora, LORA_KEYS, ("rank", "scale", "dropout"), "lora_parameters.")
    if config.get("base") is not None:
        _check(path, config["base"], BASE_KEYS, ("weights",), "base.")
    return config


# The record of a local base


def base_digests(base: Path) -> dict[str, str]:
    """SHA-256 of a base model's weight files, by name."""
    return {path.name: digest(path) for path in weight_files(base)}


def base_record(name: str, base: Path, folder: Path, config: dict) -> dict:
    """The "base" entry of an adapter in `folder`, trained over the local base model in `base`.

    Args:
        name: how the user named it, also the adapter's "model".
        config: the base's, from `model_config`.
    """
    base = base.resolve()
    return {
        "name": name,
        "path": str(base),
        "relative": os.path.relpath(base, folder.resolve()),
        "weights": base_digests(base),
        "tokenizer": digest(base / TOKENIZER),
        "settings": {key: config[key] for key in SETTINGS},
    }


def find_base(config: dict, folder: Path) -> Path:
    """The local base model of the adapter in `folder`, wherever the command was started.

    It is looked for relative to the adapter, then at its absolute path; or, if the user has edited
    "model", only there. It must have the recorded weights.

    Args:
        config: from `read_adapter_config`, with a "base" entry.

    Raises:
        ModelError: it is in none of these places, or has other weights.
    """
    record, name = config["base"], config.get("model", "")
    places = [Path(name).expanduser()]
    if name == record.get("name"):
        if record.get("path"):
            places.insert(0, Path(record["path"]))
        if record.get("relative"):
            places.insert(0, (folder.resolve() / record["relative"]).resolve())
    found = [place for place in places if (place / "config.json").is_file()]
    if not found:
        of = f" of {Path(record['path']).parent}" if record.get("path") else ""
        raise ModelError(
            f"{folder}: base {record.get('name', name)} was a folder{of}; not found: move it back, "
            f'or set "model" in {folder / ADAPTER_CONFIG} to where it is now'
        )
    differences = [_difference(place, record) for place in found]
    for place, difference in zip(found, differences, strict=True):
        if difference is None:
            return place
    raise _other_base(found[0], folder, differences[0])


def _other_base(base: Path, folder: Path, difference: str) -> ModelError:
    return ModelError(
        f"{base} is not the base model that {folder} was trained on: {difference}; restore it, or "
        "train again"
    )


def check_settings(config: dict, folder: Path, base: Path, base_config: dict) -> None:
    """Compare the settings of a base with those in the record of the adapter in `folder`.

    Raises:
        ModelError: they differ.
    """
    for key, value in (config["base"].get("settings") or {}).items():
        if (now := base_config.get(key)) != value:
            difference = f"{key} in config.json is {now!r:.40}, expected {value!r:.40}"
            raise _other_base(base, folder, difference)


def _difference(base: Path, record: dict) -> str | None:
    """The first difference between a base model's files and their record."""
    expected, names = record["weights"], {path.name for path in weight_files(base)}
    if missing := sorted(expected.keys() - names):
        return f"it has no {missing[0]}"
    if added := sorted(names - expected.keys()):
        return f"it also has {added[0]}"
    if record.get("tokenizer"):
        if not (base / TOKENIZER).is_file():
            return f"it has no {TOKENIZER}"
        expected = expected | {TOKENIZER: record["tokenizer"]}
    for name, sha256 in expected.items():
        if (now := digest(base / name)) != sha256:
            return f"{name} has SHA-256 {now[:12]}, expected {sha256[:12]}"
    return None
