"""The exporters: GGUF files, a fused model folder for MLX and transformers, an adapter for PEFT.

Each writes under a temporary name first, so a failed export leaves nothing behind.
"""

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mlx.core as mx

from expander import cli
from expander.architectures import ARCHITECTURES
from expander.config import TRAINED
from expander.convert import gguf_file
from expander.convert.gguf_tokenizer import check_tokenizer, read_tokenizer
from expander.convert.weights import FusedWeights, take_adapters
from expander.files import atomic_write, save_arrays, write_json, write_text
from expander.model import QUANT_GROUP, Chain, load_base, load_tokenizer, model_config

# Files that file browsers leave in folders they have shown, and ._NAME for NAME's attributes.
FINDER_FILES = (".DS_Store", ".localized", "Icon\r", "Thumbs.db", "desktop.ini")
SHARD = 500 << 20  # maximum bytes of weights per file, except for a larger tensor
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
)


def write_gguf_files(
    chain: Chain, folder: Path, name: str, kinds: Sequence[str], verify: bool = True
) -> list[Path]:
    """Write folder/NAME-KIND.gguf for each kind, and print its size and the time it took.

    Args:
        kinds: keys of `gguf_file.FILE_TYPES`.
        verify: compare the tokenizer with the base model's, and read each file back.

    Raises:
        ValueError: the model cannot be exported, or verification found a difference.
        OSError: a file cannot be written.
    """
    config = model_config(chain.path)
    tokenizer = read_tokenizer(
        chain.path,
        config["vocab_size"],
        chain.frame(),
        ARCHITECTURES[config["model_type"]].without_embedding,
    )
    if verify:
        base = load_tokenizer(chain.path)
        check_tokenizer(tokenizer, partial(base.encode, add_special_tokens=False))
    paths = [folder / f"{name}-{kind}.gguf" for kind in kinds]
    for path, kind in zip(paths, kinds, strict=True):
        plan = partial(gguf_file.plan, config, tokenizer, name, kind)
        started = time.monotonic()
        try:
            atomic_write(path, partial(_write_gguf, chain, plan, path, verify))
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror or error}") from None
        took = cli.duration(time.monotonic() - started)
        print(f"{path}: {path.stat().st_size / 1e6:,.0f} MB, {took}")
    return paths


def _write_gguf(
    chain: Chain,
    plan: Callable[[dict[str, tuple[int, ...]]], gguf_file.GGUFFile],
    path: Path,
    verify: bool,
    temporary: Path,
) -> None:
    """Fill `temporary`, which becomes `path`; `plan` makes the file's layout from its shapes."""
    weights = FusedWeights(chain)
    file = plan(weights.shapes)
    free = shutil.disk_usage(temporary.parent).free
    if file.nbytes > free:
        raise OSError(f"{file.nbytes / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")
    bar = cli.Progress(f"{path.name}: MB", file.nbytes // 10**6)
    samples = file.write(temporary, weights, lambda done: bar(done // 10**6))
    if verify:
        try:
            file.check(temporary, samples)
        except ValueError as error:
            raise ValueError(f"{path}: deleted, because verification failed: {error}") from None


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `folder` at the end, or deleted on an error.

    Raises:
        ValueError: `folder` is not empty; another model's files would be loaded with the new ones.
    """
    folder = Path(os.path.realpath(folder))  # a link to a folder stays a link
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} already exists and is not a folder; choose another")
    kept = sorted(folder.iterdir()) if folder.is_dir() else []
    if not all(path.name in FINDER_FILES or path.name.startswith("._") for path in kept):
        raise ValueError(f"{folder} already exists and is not empty; choose another or delete it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        yield made
        for path in kept:  # a folder takes the name only of an empty one
            path.replace(made / path.name)
        made.replace(folder)


def quantized(name: str, weight: mx.array, bits: int | None) -> dict[str, mx.array]:
    """A fused tensor as mlx_lm.convert stores it: matrices that fill whole groups are quantised."""
    if not bits or weight.ndim != 2 or weight.shape[1] % QUANT_GROUP:
        return {name: weight}
    stem = name.removesuffix(".weight")
    packed, scales, biases = mx.quantize(weight, QUANT_GROUP, bits)
    return {name: packed, f"{stem}.scales": scales, f"{stem}.biases": biases}


def write_mlx(chain: Chain, folder: Path, bits: int | None = None) -> None:
    """Write the fused model as a folder that mlx_lm.load and transformers read, in the base's dtype.

    Its chat template is that of the GGUF file, because the base's own may add a system turn.

    Args:
        bits: quantise to so many bits per weight, as mlx_lm.convert does; only MLX reads that.

    Raises:
        ValueError: `folder` is not empty, or the model cannot be loaded.
    """
    config = model_config(chain.path)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    if bits:
        config["quantization"] = {"group_size": QUANT_GROUP, "bits": bits, "mode": "affine"}
        config["quantization_config"] = config["quantization"]
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    dtype = {"float32": mx.float32, "float16": mx.float16}.get(name, mx.bfloat16)

    weights = FusedWeights(chain)
    shards, room = [], 0
    for name, shape in weights.shapes.items():
        size = dtype.size * math.prod(shape)
        if size > room:
            shards.append([])
            room = SHARD
        shards[-1].append(name)
        room -= size
    with new_folder(folder) as made:
        index = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name in names:
                tensors |= quantized(name, weights.tensor(name, dtype), bits)
            save_arrays(made / file, tensors)
            index |= dict.fromkeys(tensors, file)
        write_json(made / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
        if "lm_head.weight" in weights.shapes:  # an adapter may have untied it
            config["tie_word_embeddings"] = False
        write_json(made / "config.json", config)
        write_text(made / "chat_template.jinja", chain.frame().jinja())
        for name in TOKENIZER_FILES:
            if (chain.path / name).is_file():
                shutil.copy(chain.path / name, made / name)


def write_peft(chain: Chain, folder: Path) -> int:
    """Write the chain's adapters as one PEFT LoRA over the base; returns its rank.

    A PEFT folder holds one adapter, scaled by lora_alpha / r. Two adapters are one of the summed
    rank: s1 (A1 B1) + s2 (A2 B2) = s1 [A1 A2] [B1; s2/s1 B2], with zeros where a layer is in only
    one of them.

    Raises:
        ValueError: the chain has no adapter, or `folder` is not empty.
    """
    model = load_base(chain.path, lazy=True)
    adapters = take_adapters(model, chain)
    if not adapters:
        raise ValueError(
            f"--peft: {chain.name} has no adapter; choose a folder that train.py wrote"
        )
    first = [next(iter(adapter.lora.values())) for adapter in adapters]
    ranks, scales = [lora.a.shape[1] for lora in first], [lora.scale for lora in first]
    tensors = {}
    names = sorted(set().union(*(adapter.lora for adapter in adapters)))
    for name in names:
        known = next(adapter.lora[name] for adapter in adapters if name in adapter.lora)
        downs, ups = [], []
        for adapter, rank, scale in zip(adapters, ranks, scales, strict=True):
            lora = adapter.lora.get(name)
            downs.append(lora.a.T if lora else mx.zeros((rank, known.a.shape[0])))  # (r, in)
            ups.append(
                lora.b.T * (scale / scales[0]) if lora else mx.zeros((known.b.shape[1], rank))
            )  # (out, r)
        tensors[f"base_model.model.{name}.lora_A.weight"] = mx.concatenate(downs)
        tensors[f"base_model.model.{name}.lora_B.weight"] = mx.concatenate(ups, axis=1)
    whole = {name: weight for adapter in adapters for name, weight in adapter.whole.items()}
    head, embedding = (f"{TRAINED[name]}.weight" for name in ("lm_head", "embed_tokens"))
    if embedding in whole and "lm_head" not in model:
        whole[head] = whole[embedding] + 0  # PEFT leaves a tied head as it was
    tensors |= {f"base_model.model.{name}": weight for name, weight in whole.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": chain.base,
        "revision": chain.revision,
        "r": sum(ranks),
        "lora_alpha": scales[0] * sum(ranks),
        "lora_dropout": 0.0,
        "target_modules": names,
        "modules_to_save": [name for name, x in TRAINED.items() if f"{x}.weight" in whole] or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_folder(folder) as made:
        save_arrays(made / "adapter_model.safetensors", tensors)
        write_json(made / "adapter_config.json", config)
    return sum(ranks)
