"""The interface to mlx-lm's models: load a base and its adapters, add LoRA, fuse, save.

An adapter folder holds mlx-lm's own adapters.safetensors and adapter_config.json. The latter also
records the base model or, for GRPO, the subfolder ("parent") with a copy of the SFT adapter below
it, so the chain base → SFT → GRPO can be read from its last folder (adapter_config.py).

mlx_lm is imported by the functions that load a model: with transformers it takes two seconds, and a
dry run needs neither.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from expander.adapter_config import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    OTHER_KINDS,
    adapter_file,
    base_digests,
    base_record,
    check_settings,
    find_base,
    read_adapter_config,
    read_adapter_weights,
)
from expander.architectures import ARCHITECTURES, select_projections
from expander.base_config import (
    ModelError,
    check_against_weights,
    read_base_config,
    text_name,
)
from expander.files import atomic_write, read_json, save_arrays, write_json
from expander.peft_adapter import PEFT_FILE
from expander.prompt import Frame, frame_of, render_prompt
from expander.queries import QUERY_DIGESTS
from expander.tokenizer_files import find_tokenizer_fault
from expander.weight_files import digest, equal_tensors, read_header, read_tensors

# Weights, configuration and tokenizer, but never a repository's Python files.
DOWNLOADS = ["*.json", "model*.safetensors", "*.txt", "*.jinja"]
# An adapter at the top of a repository, and the one below it.
ADAPTER_DOWNLOADS = [
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    PEFT_FILE,
    QUERY_DIGESTS,
    f"sft/{ADAPTER_CONFIG}",
    f"sft/{ADAPTER_FILE}",
]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
QUANT_GROUP = 64
WIRED_SHARE = 0.95  # of the recommended memory; more than the system's limit is an error
SAMPLE = "C++ and C#: 42 naïve cafés, don't"
READ_BY_MLX_LM = ("generation_config.json", "hf_quant_config.json")


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
        return {str(folder): digest(adapter_file(folder)) for folder in self.adapters}

    def scales(self) -> list[float | None]:
        """The LoRA scale of each adapter, which is not in the file that is hashed."""
        configs = [read_adapter_config(folder) for folder in self.adapters]
        return [config["lora_parameters"]["scale"] for config in configs]

    def frame(self) -> Frame:
        """How its base writes a chat."""
        return ARCHITECTURES[model_config(self.path)["model_type"]].frame

    def adapted_layers(self) -> set[str]:
        """The names of the modules that an adapter of the chain changes, such as q_proj."""
        configs = [read_adapter_config(folder) for folder in self.adapters]
        keys = [config["lora_parameters"].get("keys") or [] for config in configs]
        keys += [config.get("modules_to_save") or [] for config in configs]
        return {key.split(".")[-1] for part in keys for key in part}

    def base_hashes(self) -> dict[str, str]:
        """SHA-256 of a local base's weight files; a revision identifies a base from the Hub."""
        return {} if self.revision else base_digests(self.path)

    def base_entries(self, folder: Path) -> dict:
        """The entries about the base in the adapter_config.json of an adapter in `folder`."""
        entries = {"model": self.base, "revision": self.revision}
        if self.revision is None:
            config = model_config(self.path)
            entries["base"] = base_record(self.base, self.path, folder, config)
        return entries

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


def recommended_memory() -> int | None:
    """Bytes that the device recommends to stay under; None on the CPU."""
    return mx.device_info().get("max_recommended_working_set_size")


def wire_memory() -> None:
    """Keep the buffers of a GPU in memory, a little below what the device allows."""
    limit = recommended_memory()
    if limit and mx.metal.is_available():
        mx.set_wired_limit(int(WIRED_SHARE * limit))


def fetch(name: str, revision: str | None = None, files: Sequence[str] = DOWNLOADS) -> Path:
    """The folder of a base model: `name` itself, or a download of its `files` from the Hub.

    Args:
        revision: its commit on the Hub; a local folder of the same name is then another model.

    Raises:
        ModelError: the folder does not exist, or the download failed.
    """
    folder, is_id = Path(name).expanduser(), HUB_ID.fullmatch(name)
    if folder.is_dir() and not (revision and is_id):
        return folder
    if not is_id or Path(name).parts[0] in ("outputs", "data", "."):
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


def read_chain(
    name: str,
    files: Sequence[str] = DOWNLOADS,
    *,
    base: str | None = None,
    sft: str | None = None,
) -> Chain:
    """Follow an adapter folder's records down to its base; a base model is a chain without adapters.

    Args:
        name: an adapter folder, a model folder or a Hub id.
        files: patterns of the files to download for a base on the Hub.
        base: a base model to use instead of the one that the lowest adapter names.
        sft: an adapter to fuse below the last one, instead of what that one records.

    Raises:
        ModelError: `name` is none of these, or its base is missing.
    """
    folder = Path(name).expanduser()
    if not (folder / ADAPTER_CONFIG).is_file():
        folder = fetch(name, files=[*files, *ADAPTER_DOWNLOADS])
    if not (folder / ADAPTER_CONFIG).is_file():
        if base or sft:
            raise ModelError(
                f"model {name}: not an adapter folder ({ADAPTER_CONFIG}), so no other base model or "
                "SFT adapter goes below it"
            )
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"model {name}: neither an adapter folder ({ADAPTER_CONFIG}) nor a model folder "
                "(config.json)"
            )
        return Chain(name, name, folder, _downloaded(folder, name))

    if sft:
        below = read_chain(sft, files, base=base)
        if not below.adapters:
            raise ModelError(f"model {sft}: not an adapter folder ({ADAPTER_CONFIG})")
        return replace(below, name=name, adapters=(*below.adapters, folder))
    adapters, configs = _read_adapters(folder)
    config, lowest = configs[0], adapters[0]
    if base:
        # The weights must be the recorded ones, wherever they are.
        place = str(fetch(base, files=files)) if config.get("base") else base
        config = config | {"model": place}
        config.pop("revision", None)
    base, revision = config.get("model"), config.get("revision")
    if base is None:
        raise ModelError(f"{lowest / ADAPTER_CONFIG}: does not name its base model")
    if config.get("base"):
        path = find_base(config, lowest)
        check_settings(config, lowest, path, model_config(path))
    elif "revision" in config and revision is None and not Path(base).expanduser().is_dir():
        # Written before local bases were recorded; a repository of that name would be another model.
        raise ModelError(
            f"{lowest}: base {base} was a local folder; not found: run the command where it is, or "
            f'set "model" in {lowest / ADAPTER_CONFIG} to its path'
        )
    else:
        if not (HUB_ID.fullmatch(base) or Path(base).expanduser().is_dir()):  # PEFT's records
            raise ModelError(
                f"{lowest / ADAPTER_CONFIG}: base {base}: no such folder, and not a Hub id; name "
                "the base with --base-model (eval.py) or --base (convert.py)"
            )
        path = fetch(base, revision, files)
        revision = revision or _downloaded(path, base)
    return Chain(name, base, path, revision, config.get("quantize_bits"), tuple(adapters))


def _downloaded(path: Path, name: str) -> str | None:
    """The commit of the model `name` that `fetch` found at `path`; None for a local folder."""
    local = path == Path(name).expanduser() or path.parent.name != "snapshots"
    return None if local else path.name


def _read_adapters(folder: Path) -> tuple[list[Path], list[dict]]:
    """The adapter folders from the lowest up to `folder`, and their configurations.

    Raises:
        ModelError: a configuration is damaged, or an adapter is its own parent.
    """
    adapters, configs = [folder], [read_adapter_config(folder)]
    seen = {folder.resolve()}
    while parent := configs[0].get("parent"):
        below = adapters[0] / parent
        if below.resolve() in seen:
            raise ModelError(
                f"{adapters[0] / ADAPTER_CONFIG}: parent {parent!r} leads back to {below.resolve()}; "
                "it must be the folder of the adapter below"
            )
        seen.add(below.resolve())
        adapters.insert(0, below)
        configs.insert(0, read_adapter_config(below))
    return adapters, configs


def _read_json(path: Path) -> dict:
    try:
        return read_json(path)
    except ValueError as error:
        raise ModelError(str(error)) from None


def model_config(path: Path) -> dict:
    """The config.json in a base model's folder, in the form of `read_base_config`.

    Every part of the project that needs a base's settings takes them from here.

    Raises:
        ModelError: it cannot be read or used, its architecture is not supported, or the weight files
            in the folder are damaged or belong to another configuration.
    """
    file = path / "config.json"
    try:
        for other in READ_BY_MLX_LM:
            if (path / other).is_file():
                _read_json(path / other)
        config = read_base_config(_read_json(file))
        tensors = read_tensors(path)
        check_against_weights(config, {name: tensor.shape for name, tensor in tensors.items()})
        named = {text_name(name): tensor for name, tensor in tensors.items()}
        head, embedding = (named.get(f"{x}.weight") for x in ("lm_head", "model.embed_tokens"))
        if tensors and "tie_word_embeddings" not in config:
            # transformers' default is untied, mlx-lm's is tied: the weights decide.
            config["tie_word_embeddings"] = head is None
        tied = config.get("tie_word_embeddings")
        if tied and head and embedding and not equal_tensors(head, embedding):
            raise ModelError(
                f"{file}: tie_word_embeddings is true, but lm_head.weight differs from "
                "model.embed_tokens.weight; set it to false if the model has a head of its own"
            )
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"{file}: {error}") from None
    return config


def load_tokenizer(path: Path):
    """mlx-lm's tokenizer of a base model's folder, with the model's `frame`.

    Raises:
        ModelError: it cannot be loaded, differs from the tokenizer.json that is exported, or has ids
            that the model has no embedding for.
    """
    from mlx_lm.utils import load_tokenizer as load
    from tokenizers import Tokenizer

    if not (path / "tokenizer.json").is_file():  # transformers would invent an empty tokenizer
        raise ModelError(f"{path}: no tokenizer.json in this folder")
    if fault := find_tokenizer_fault(path):
        raise ModelError(fault)
    config = model_config(path)
    architecture = ARCHITECTURES[config["model_type"]]
    frame = architecture.frame
    sample = render_prompt(SAMPLE, frame=frame)
    try:
        tokenizer = load(path)
        tokenizer.frame = frame
        ids = tokenizer.encode(sample, add_special_tokens=False)
        stored = Tokenizer.from_file(str(path / "tokenizer.json"))
        same = ids == stored.encode(sample, add_special_tokens=False).ids
        embedded = tokenizer.get_vocab().items()
        embedded = [i for token, i in embedded if token not in architecture.without_embedding]
        largest = max(embedded, default=-1)
    except Exception as error:  # whatever transformers and tokenizers raise on a damaged file
        raise ModelError(f"{path}: the tokenizer cannot be loaded: {_first_line(error)}") from None
    if not same:
        raise ModelError(
            f"{path}: transformers tokenises a prompt otherwise than tokenizer.json, which is "
            "exported; tokenizer_config.json contradicts it: take both from the original model"
        )
    size = config["vocab_size"]
    if largest >= size:
        raise ModelError(
            f"{path}: the tokenizer has ids up to {largest}, but config.json's vocab_size is {size}"
        )
    return tokenizer


def _first_line(error: Exception) -> str:
    """An error of a library in one line; a KeyError, say, is nothing without its type."""
    text = next(iter(str(error).strip().splitlines()), "")
    known = isinstance(error, OSError) or type(error) in (ValueError, RuntimeError)
    return text if known and text else f"{type(error).__name__}: {text}"


def end_token(tokenizer) -> int:
    """The id of the frame's end, the last token of every completion.

    Raises:
        ModelError: the vocabulary has no such token, so this model has another frame.
    """
    end = frame_of(tokenizer).end
    ids = tokenizer.encode(end, add_special_tokens=False)
    if len(ids) != 1:
        raise ModelError(f"the tokenizer has no {end} token, which the model's chat needs")
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

    from expander.fast_exp import use_fast_swiglu

    config = model_config(path)
    try:
        model, _ = load_model(path, lazy=True, model_config=config)
    except Exception as error:  # whatever mlx-lm raises on files that do not fit its classes
        raise ModelError(f"{path}: cannot be loaded: {_first_line(error)}") from None
    kept = []  # mlx-lm names the weights that a model needs in float32
    if hasattr(model, "cast_predicate"):
        weights = tree_flatten(model.parameters())
        kept = [(name, value) for name, value in weights if not model.cast_predicate(name)]
    model.set_dtype(compute_dtype())
    model.load_weights(kept, strict=False)
    if bits:
        nn.quantize(
            model,
            QUANT_GROUP,
            bits,
            class_predicate=lambda _, module: (
                hasattr(module, "to_quantized") and module.weight.shape[-1] % QUANT_GROUP == 0
            ),
        )
    if compute_dtype() == mx.float32:
        use_fast_swiglu(model)
    model.freeze()
    if not lazy:
        for _, array in tree_flatten(model.parameters()):  # never all unquantised weights at once
            mx.eval(array)
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


def lora_config(
    model: nn.Module,
    rank: int,
    alpha: float,
    dropout: float,
    targets,
    modules_to_save: Sequence[str] | None = None,
) -> dict:
    """mlx-lm's adapter configuration, with scale alpha / rank.

    Args:
        targets: see `select_projections`.
        modules_to_save: names in TRAINED of the modules to train as a whole.

    Raises:
        ModelError: the model has no layer of that name.
    """
    linear = (nn.Linear, nn.QuantizedLinear)
    names = {name for x in model.layers for name, m in x.named_modules() if isinstance(m, linear)}
    try:
        keys = select_projections(names, targets)
    except ValueError as error:
        raise ModelError(str(error)) from None
    config = {
        "fine_tune_type": "lora",
        "num_layers": len(model.layers),
        "lora_parameters": {"rank": rank, "scale": alpha / rank, "dropout": dropout, "keys": keys},
    }
    if modules_to_save:
        config["modules_to_save"] = sorted(set(modules_to_save))
    return config


def add_lora(model: nn.Module, config: dict) -> None:
    """Add fresh LoRA layers and trainable modules, the only trainable ones, by an adapter's
    configuration."""
    from expander.lora import add_lora_layers, train_modules

    model.freeze()
    add_lora_layers(model, config["num_layers"], config["lora_parameters"])
    train_modules(model, config.get("modules_to_save") or ())


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """The trainable weights by name."""
    return dict(tree_flatten(model.trainable_parameters()))


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Add the adapter in `folder` to the model as LoRA layers.

    Raises:
        ModelError: the adapter cannot be read, is not a LoRA adapter of finite numbers, or its
            tensors differ in name or shape from those that the model needs.
    """
    from expander.lora import fit_tied

    config = read_adapter_config(folder)
    _check_adapter_names(folder, config)
    try:
        weights = read_adapter_weights(folder)
        saved = fit_tied(model, weights, config.get("tied") is not False)
        add_lora(model, config | {"modules_to_save": saved})
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder}: the adapter cannot be loaded: {_first_line(error)}") from None
    needed = adapter_weights(model)
    both = weights.keys() & needed.keys()
    reshaped = {name for name in both if weights[name].shape != needed[name].shape}
    wrong = sorted((weights.keys() ^ needed.keys()) | reshaped)
    if wrong:
        raise ModelError(
            f"{folder}: {len(wrong)} adapter tensors do not fit this base model, first {wrong[0]}; "
            "the adapter was trained on another base"
        )
    for name, value in weights.items():
        if not mx.issubdtype(value.dtype, mx.floating) or not mx.isfinite(value).all().item():
            raise ModelError(
                f"{adapter_file(folder)}: {name} has values that are not finite numbers"
            )
    model.load_weights(list(weights.items()), strict=False)


def _check_adapter_names(folder: Path, config: dict) -> None:
    """Tell a full-weight, DoRA or wrong-rank adapter from one that was trained on another base.

    Raises:
        ModelError: it is not a LoRA adapter of the rank in its configuration.
    """
    path = adapter_file(folder)
    if path.name != ADAPTER_FILE:
        return  # `read_adapter_config` has checked the tensors of a PEFT adapter
    tensors = read_header(path)
    if any(name.endswith(".m") for name in tensors):
        raise ModelError(f"{path}: {OTHER_KINDS['dora']}")
    rank = config["lora_parameters"]["rank"]
    shapes = {name: x.shape for name, x in tensors.items() if name.endswith(".lora_a")}
    if tensors and not shapes:
        raise ModelError(f"{path}: {OTHER_KINDS['full']}")
    for name, shape in shapes.items():
        if shape and shape[-1] != rank:
            raise ModelError(
                f"{folder}: lora_parameters.rank in {ADAPTER_CONFIG} is {rank}, but {name} in "
                f"{ADAPTER_FILE} has rank {shape[-1]}"
            )


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
        config = read_adapter_config(source)
        if source != chain.adapters[0]:
            for key in ("model", "revision", "base"):  # of an adapter that names no parent
                config.pop(key, None)
            config["parent"] = "sft"
        else:
            config |= chain.base_entries(folder)
        for name in (ADAPTER_FILE, QUERY_DIGESTS):
            if (source / name).is_file():
                atomic_write(folder / name, partial(shutil.copyfile, source / name))
        if not (source / ADAPTER_FILE).is_file():  # PEFT's: the copy is mlx-lm's
            save_arrays(folder / ADAPTER_FILE, read_adapter_weights(source))
        write_json(folder / ADAPTER_CONFIG, config)
        folder = folder / "sft"


def fused_weight(weight: mx.array, lora_a: mx.array, lora_b: mx.array, scale: float) -> mx.array:
    """W + scale (A B)^T in float32; A is (in, rank), B (rank, out), W (out, in)."""
    delta = lora_b.astype(mx.float32).T @ lora_a.astype(mx.float32).T
    return weight.astype(mx.float32) + scale * delta


def fuse(model: nn.Module) -> None:
    """Replace every LoRA layer with a linear layer that has the adapter in its weights, and every
    trained module with a plain one.

    A quantised layer becomes a plain one, because quantising it again would lose the adapter.
    """
    from expander.lora import full_weight, lora_layers, trained_modules

    for name, module in trained_modules(model):
        plain = module.plain(compute_dtype())
        model.update_modules(tree_unflatten([(name, plain)]))
        mx.eval(plain.parameters())
    layers = lora_layers(model)
    while layers:  # one at a time: its old weights go before the next one is fused
        name, layer = layers.pop(0)
        linear = layer.linear
        weight = full_weight(linear)
        out_dims, in_dims = weight.shape
        plain = nn.Linear(in_dims, out_dims, bias="bias" in linear)
        plain.weight = fused_weight(weight, layer.lora_a, layer.lora_b, layer.scale).astype(
            compute_dtype()
        )
        if "bias" in linear:
            plain.bias = linear.bias
        model.update_modules(tree_unflatten([(name, plain)]))
        mx.eval(plain.parameters())
    model.freeze()


@contextmanager
def _replaced(
    model: nn.Module, modules: list[tuple[str, nn.Module]], replacements: Sequence[nn.Module]
) -> Iterator[None]:
    """Put replacements of (name, module) pairs into the model in this context."""
    names = [name for name, _ in modules]
    model.update_modules(tree_unflatten(list(zip(names, replacements, strict=True))))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(modules))


def adapters_off(model: nn.Module) -> AbstractContextManager[None]:
    """Take out the adapter in this context: the same weights are then the reference model."""
    from expander.lora import lora_layers, trained_modules

    layers, modules = lora_layers(model), trained_modules(model)
    before = [layer.linear for _, layer in layers] + [module.replaced for _, module in modules]
    return _replaced(model, layers + modules, before)


def adapters_ready(model: nn.Module) -> AbstractContextManager[None]:
    """Compute LoRA from matrices that are cast and scaled once, for inference in this context."""
    from expander.lora import ReadyLoRALinear, lora_layers

    layers = lora_layers(model)
    ready = [ReadyLoRALinear(layer, compute_dtype()) for _, layer in layers]
    return _replaced(model, layers, ready)


def adapters_are_zero(model: nn.Module) -> bool:
    """Whether every LoRA layer adds zero, as before the first update of B.

    A module that is trained as a whole counts as changed, which is safe.
    """
    from expander.lora import lora_layers, trained_modules

    if trained_modules(model):
        return False
    nonzero = [mx.any(layer.lora_b) for _, layer in lora_layers(model)]
    mx.eval(nonzero)
    return not any(flag.item() for flag in nonzero)


def hidden_states(model: nn.Module, tokens: mx.array, cache=None) -> mx.array:
    """The last layer's normed states, before the vocabulary head: (B, T) → (B, T, D).

    Granite divides its logits by a constant. The head is linear, so the states are divided instead,
    in this one place.
    """
    states = model.model(tokens, cache=cache)
    scaling = getattr(model, "logits_scaling", 1.0)
    return states if scaling == 1.0 else states / scaling


def lm_head(model: nn.Module) -> Callable[[mx.array], mx.array]:
    """The vocabulary head: (..., D) → (..., V)."""
    owner = getattr(model, "language_model", model)
    return owner.lm_head if "lm_head" in owner else model.model.embed_tokens.as_linear
