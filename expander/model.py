"""The interface to mlx-lm's models: load a base and its adapters, add LoRA, fuse, save.

An adapter folder holds mlx-lm's own adapters.safetensors and adapter_config.json. The latter also
records the base model or, for GRPO, the subfolder ("parent") with a copy of the SFT adapter below
it, so the chain base → SFT → GRPO can be read from its last folder.

mlx_lm is imported by the functions that load a model: with transformers it takes two seconds, and a
dry run needs neither.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from expander.architectures import ARCHITECTURES
from expander.files import atomic_write, digest, save_arrays, write_json
from expander.prompt import IM_END
from expander.queries import QUERY_DIGESTS

ADAPTER_FILE, ADAPTER_CONFIG = "adapters.safetensors", "adapter_config.json"
# Weights, configuration and tokenizer, but never a repository's Python files.
DOWNLOADS = ["*.json", "model*.safetensors", "*.txt", "*.jinja"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
QUANT_GROUP = 64


class ModelError(ValueError):
    """A model or adapter that cannot be used."""


@dataclass(frozen=True)
class Chain:
    """A base model and the adapters trained over it, the oldest first.

    Attributes:
        name: the folder or Hub id that was asked for.
        base: the base model's folder or Hub id.
        path: the folder with the base model's files.
        revision: the base's commit on the Hub; None for a local base.
        bits: the base is quantised to so many bits when it is loaded; None if it is not.
    """

    name: str
    base: str
    path: Path
    revision: str | None = None
    bits: int | None = None
    adapters: tuple[Path, ...] = ()

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each adapter file, by its folder."""
        return {str(folder): digest(folder / ADAPTER_FILE) for folder in self.adapters}

    def scales(self) -> list[float | None]:
        """The LoRA scale of each adapter, which is not in the file that is hashed."""
        configs = [_read_json(folder / ADAPTER_CONFIG) for folder in self.adapters]
        return [config.get("lora_parameters", {}).get("scale") for config in configs]

    def base_hashes(self) -> dict[str, str]:
        """SHA-256 of a local base's weight files; a revision identifies a base from the Hub."""
        files = [] if self.revision else sorted(self.path.glob("*.safetensors"))
        return {path.name: digest(path) for path in files}

    def describe(self) -> dict:
        """The "model" entry of a results file of eval.py."""
        return {
            "name": self.name,
            "base": self.base,
            "revision": self.revision,
            "quantize_bits": self.bits,
            "adapters_sha256": self.hashes(),
            "adapters_scale": self.scales(),
        }


def compute_dtype() -> mx.Dtype:
    """bfloat16 on a GPU; float32 on the CPU, where half precision is slow.

    The environment variable QMD_DTYPE overrides it, to measure one device's dtype on the other.

    Raises:
        ModelError: QMD_DTYPE is neither float32 nor bfloat16.
    """
    if name := os.environ.get("QMD_DTYPE"):
        if name not in ("float32", "bfloat16"):
            raise ModelError(f"QMD_DTYPE {name}: expected float32 or bfloat16")
        return getattr(mx, name)
    return mx.bfloat16 if mx.default_device().type == mx.gpu else mx.float32


def fetch(name: str, revision: str | None = None, files: Sequence[str] = DOWNLOADS) -> Path:
    """The folder of a base model: `name` itself, or a download of its `files` from the Hub.

    Raises:
        ModelError: the folder does not exist, or the download failed.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(name) or Path(name).parts[0] in ("outputs", "data", "."):
        raise ModelError(f"model {name}: no such folder, and not a Hub id (OWNER/NAME)")
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(files))
        )
    except Exception as error:  # requests, httpx, OSError and the Hub's own types
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ModelError(
            f"model {name}: could not download it from the Hub ({type(error).__name__}: {reason}); "
            "to work offline, copy the model's folder to this machine and use its path"
        ) from None


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {value!r:.60}")
    return value


def trained_model() -> str:
    """The default model of a command: the folder of the last stage that has been trained.

    Raises:
        ModelError: neither stage has been trained.
    """
    for folder in ("outputs/grpo", "outputs/sft"):
        if Path(folder, ADAPTER_CONFIG).is_file():
            return folder
    raise ModelError(
        "no trained model in outputs/grpo or outputs/sft; run python train.py sft first, or choose "
        "a model with --model"
    )


def read_chain(name: str, files: Sequence[str] = DOWNLOADS) -> Chain:
    """Follow an adapter folder's records down to its base; a base model is a chain without adapters.

    Args:
        name: an adapter folder, a model folder or a Hub id.
        files: patterns of the files to download for a base on the Hub.

    Raises:
        ModelError: `name` is none of these, or its base is missing.
    """
    folder = Path(name).expanduser()
    if not (folder / ADAPTER_CONFIG).is_file():
        path = fetch(name, files=files)
        if not (path / "config.json").is_file():
            raise ModelError(
                f"model {name}: neither an adapter folder ({ADAPTER_CONFIG}) nor a model folder "
                "(config.json)"
            )
        revision = path.name if path.parent.name == "snapshots" else None
        return Chain(name, name, path, revision)

    adapters = [folder]
    record = _read_json(folder / ADAPTER_CONFIG)
    while parent := record.get("parent"):
        adapters.insert(0, adapters[0] / parent)
        record = _read_json(adapters[0] / ADAPTER_CONFIG)
    if "model" not in record:
        raise ModelError(f"{adapters[0] / ADAPTER_CONFIG}: does not name its base model")
    base, revision = record["model"], record.get("revision")
    path = fetch(base, revision, files)
    return Chain(name, base, path, revision, record.get("quantize_bits"), tuple(adapters))


def model_config(path: Path) -> dict:
    """The config.json in a base model's folder.

    Raises:
        ModelError: it cannot be read, or its architecture is not supported.
    """
    config = _read_json(path / "config.json")
    if config.get("model_type") not in ARCHITECTURES:
        raise ModelError(
            f"{path}: architecture {config.get('model_type')!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    return config


def load_tokenizer(path: Path):
    """mlx-lm's tokenizer of a base model's folder.

    Raises:
        ModelError: it cannot be loaded.
    """
    from mlx_lm.utils import load_tokenizer as load

    if not (path / "tokenizer.json").is_file():  # transformers would invent an empty tokenizer
        raise ModelError(f"{path}: no tokenizer.json in this folder")
    try:
        return load(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path}: the tokenizer cannot be loaded: {reason}") from None


def end_token(tokenizer) -> int:
    """The id of <|im_end|>, the last token of every completion.

    Raises:
        ModelError: the vocabulary has no such token, so this is not a ChatML model.
    """
    ids = tokenizer.encode(IM_END, add_special_tokens=False)
    if len(ids) != 1:
        raise ModelError(f"the tokenizer has no {IM_END} token; only ChatML models are supported")
    return ids[0]


def load_base(path: Path, bits: int | None = None, lazy: bool = False) -> nn.Module:
    """A base model in the device's dtype, with frozen weights.

    Args:
        bits: quantise the weights to so many bits, in groups of QUANT_GROUP.
        lazy: read each weight when it is first used.

    Raises:
        ModelError: the architecture is not supported, or the weights cannot be loaded.
    """
    from mlx_lm.utils import load_model

    model_config(path)
    try:
        model, _ = load_model(path, lazy=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{path}: cannot be loaded: {str(error).splitlines()[0]}") from None
    model.set_dtype(compute_dtype())
    if bits:
        nn.quantize(
            model,
            QUANT_GROUP,
            bits,
            class_predicate=lambda _, module: (
                hasattr(module, "to_quantized") and module.weight.shape[-1] % QUANT_GROUP == 0
            ),
        )
    model.freeze()
    if not lazy:
        mx.eval(model.parameters())
    return model


def load_chain(chain: Chain, fuse_last: bool = False) -> tuple[nn.Module, object]:
    """The (model, tokenizer) of a chain, in evaluation mode.

    Its adapters are fused one after another; the last one stays as LoRA layers unless `fuse_last`.
    """
    model, tokenizer = load_base(chain.path, chain.bits), load_tokenizer(chain.path)
    for folder in chain.adapters:
        load_adapter(model, folder)
        if fuse_last or folder != chain.adapters[-1]:
            fuse(model)
    model.eval()
    return model, tokenizer


def lora_config(model: nn.Module, rank: int, alpha: float, dropout: float, targets) -> dict:
    """mlx-lm's adapter configuration, with scale alpha / rank.

    Args:
        targets: the last part of each linear layer's name, such as "q_proj".

    Raises:
        ModelError: the model has no layer of that name.
    """
    linear = (nn.Linear, nn.QuantizedLinear)
    names = {name for name, m in model.layers[0].named_modules() if isinstance(m, linear)}
    keys = sorted(name for name in names if name.split(".")[-1] in targets)
    missing = sorted(set(targets) - {name.split(".")[-1] for name in keys})
    if missing:
        raise ModelError(f"lora.target_modules: the model has no layer {', '.join(missing)}")
    return {
        "fine_tune_type": "lora",
        "num_layers": len(model.layers),
        "lora_parameters": {"rank": rank, "scale": alpha / rank, "dropout": dropout, "keys": keys},
    }


def add_lora(model: nn.Module, config: dict) -> None:
    """Add fresh LoRA layers, the only trainable ones, from mlx-lm's adapter configuration."""
    from expander.lora import add_lora_layers

    model.freeze()
    add_lora_layers(model, config["num_layers"], config["lora_parameters"])


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """The trainable weights by name."""
    return dict(tree_flatten(model.trainable_parameters()))


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Add the adapter in `folder` to the model as LoRA layers.

    Raises:
        ModelError: the adapter cannot be read, or its tensors differ in name or shape from those
            that the model needs.
    """
    config = _read_json(folder / ADAPTER_CONFIG)
    try:
        weights = mx.load(str(folder / ADAPTER_FILE))
        add_lora(model, config)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder}: the adapter cannot be loaded: {error}") from None
    needed = adapter_weights(model)
    both = weights.keys() & needed.keys()
    reshaped = {name for name in both if weights[name].shape != needed[name].shape}
    wrong = sorted((weights.keys() ^ needed.keys()) | reshaped)
    if wrong:
        raise ModelError(
            f"{folder}: {len(wrong)} adapter tensors do not fit this base model, first {wrong[0]}; "
            "the adapter was trained on another base"
        )
    model.load_weights(list(weights.items()), strict=False)


def save_adapter(folder: Path, weights: dict[str, mx.array], config: dict) -> None:
    """Write an adapter folder that mlx-lm's own tools load.

    Args:
        weights: from `adapter_weights`.
        config: from `lora_config`, with "model", "revision" and "quantize_bits", or "parent", added.
    """
    save_arrays(folder / ADAPTER_FILE, weights)
    write_json(folder / ADAPTER_CONFIG, config)


def copy_adapters(chain: Chain, folder: Path) -> None:
    """Copy the chain's last adapter into `folder` and the one before it into `folder`/sft.

    An adapter trained over the copy stays complete when the original is trained again.
    """
    for source in reversed(chain.adapters):
        config = _read_json(source / ADAPTER_CONFIG)
        if config.get("parent"):
            config["parent"] = "sft"
        for name in (ADAPTER_FILE, QUERY_DIGESTS):
            if (source / name).is_file():
                atomic_write(folder / name, partial(shutil.copyfile, source / name))
        write_json(folder / ADAPTER_CONFIG, config)
        folder = folder / "sft"


def fused_weight(weight: mx.array, lora_a: mx.array, lora_b: mx.array, scale: float) -> mx.array:
    """W + scale (A B)^T in float32; A is (in, rank), B (rank, out), W (out, in)."""
    delta = lora_b.astype(mx.float32).T @ lora_a.astype(mx.float32).T
    return weight.astype(mx.float32) + scale * delta


def fuse(model: nn.Module) -> None:
    """Replace every LoRA layer with a linear layer that has the adapter in its weights.

    A quantised layer becomes a plain one, because quantising it again would lose the adapter.
    """
    from expander.lora import lora_layers

    fused = []
    for name, layer in lora_layers(model):
        linear = layer.linear
        weight = linear.weight
        if isinstance(linear, nn.QuantizedLinear):
            weight = mx.dequantize(
                weight,
                linear.scales,
                linear.biases,
                linear.group_size,
                linear.bits,
                mode=linear.mode,
            )
        out_dims, in_dims = weight.shape
        plain = nn.Linear(in_dims, out_dims, bias="bias" in linear)
        plain.weight = fused_weight(weight, layer.lora_a, layer.lora_b, layer.scale).astype(
            compute_dtype()
        )
        if "bias" in linear:
            plain.bias = linear.bias
        fused.append((name, plain))
    model.update_modules(tree_unflatten(fused))
    model.freeze()
    mx.eval(model.parameters())


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Take out the LoRA layers in this context: the same weights are then the reference model."""
    from expander.lora import lora_layers

    layers = lora_layers(model)
    model.update_modules(tree_unflatten([(name, layer.linear) for name, layer in layers]))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(layers))


def hidden_states(model: nn.Module, tokens: mx.array, cache=None) -> mx.array:
    """The last layer's normed states, before the vocabulary head: (B, T) → (B, T, D)."""
    return model.model(tokens, cache=cache)


def lm_head(model: nn.Module) -> Callable[[mx.array], mx.array]:
    """The vocabulary head: (..., D) → (..., V)."""
    return model.lm_head if "lm_head" in model else model.model.embed_tokens.as_linear
