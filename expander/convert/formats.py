"""Other forms of a trained model: a fused folder for MLX and transformers, an adapter for PEFT."""

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from expander.convert.gguf_tokenizer import CHAT_TEMPLATE
from expander.convert.weights import FusedWeights, take_adapters
from expander.files import save_arrays, write_json, write_text
from expander.model import Chain, load_base, model_config

SHARD = 500 << 20  # bytes of weights a file
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, and goes otherwise.

    Raises:
        ValueError: `folder` is in use; files of another model in it would be loaded with the new.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: remove it or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        yield made
        made.replace(folder)


def write_mlx(chain: Chain, folder: Path) -> None:
    """The fused model as a folder that mlx_lm.load and transformers read, in the base's own dtype.

    Its chat template is the one of the GGUF file: the base's own may add a system turn.
    """
    config = model_config(chain.path)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
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
            save_arrays(made / file, {name: weights.whole(name, dtype) for name in names})
            index |= dict.fromkeys(names, file)
        write_json(made / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
        write_json(made / "config.json", config)
        write_text(made / "chat_template.jinja", CHAT_TEMPLATE)
        for name in TOKENIZER_FILES:
            if (chain.path / name).is_file():
                shutil.copy(chain.path / name, made / name)


def write_peft(chain: Chain, folder: Path) -> int:
    """The chain's adapters as one PEFT LoRA over the base; returns its rank.

    PEFT holds one adapter, scaled by lora_alpha / r. Two of them are one of the summed rank:
    s1 (A1 B1) + s2 (A2 B2) = s1 [A1 A2] [B1; s2/s1 B2]. A layer that one of them leaves out gets
    zeros in its place.

    Raises:
        ValueError: the chain has no adapter.
    """
    adapters = take_adapters(load_base(chain.path, lazy=True), chain)
    if not adapters:
        raise ValueError(f"{chain.name} has no adapter: --peft needs one, as train.py leaves it")
    first = [next(iter(adapter.values())) for adapter in adapters]
    ranks, scales = [lora.a.shape[1] for lora in first], [lora.scale for lora in first]
    tensors = {}
    names = sorted(set().union(*adapters))
    for name in names:
        known = next(adapter[name] for adapter in adapters if name in adapter)
        downs, ups = [], []
        for adapter, rank, scale in zip(adapters, ranks, scales, strict=True):
            lora = adapter.get(name)
            downs.append(lora.a.T if lora else mx.zeros((rank, known.a.shape[0])))  # (r, in)
            ups.append(
                lora.b.T * (scale / scales[0]) if lora else mx.zeros((known.b.shape[1], rank))
            )  # (out, r)
        tensors[f"base_model.model.{name}.lora_A.weight"] = mx.concatenate(downs)
        tensors[f"base_model.model.{name}.lora_B.weight"] = mx.concatenate(ups, axis=1)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": chain.base,
        "revision": chain.revision,
        "r": sum(ranks),
        "lora_alpha": scales[0] * sum(ranks),
        "lora_dropout": 0.0,
        "target_modules": names,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_folder(folder) as made:
        save_arrays(made / "adapter_model.safetensors", tensors)
        write_json(made / "adapter_config.json", config)
    return sum(ranks)
