"""Random adapters over a base model, in folders as train.py writes them."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file

from expander import model as models
from expander.architectures import PROJECTIONS


def make_adapter(
    folder: Path,
    below: Path,
    *,
    rank: int = 4,
    scale: float = 2.0,
    targets: tuple[str, ...] = PROJECTIONS,
    bits: int | None = None,
    seed: int = 1,
) -> Path:
    """An adapter over `below`, a base model or an adapter folder; it clearly changes the output."""
    chain = models.read_chain(str(below))
    model = models.load_base(chain.path)
    config = models.lora_config(model, rank, scale * rank, 0.0, targets)
    models.add_lora(model, config)
    mx.random.seed(seed)
    weights = {
        name: mx.random.normal(value.shape, scale=0.1)
        for name, value in models.adapter_weights(model).items()
    }
    if chain.adapters:
        models.copy_adapters(chain, folder / "sft")
        record = {"stage": "grpo", "parent": "sft"}
    else:
        record = {"stage": "sft", "quantize_bits": bits} | chain.base_entries(folder)
    models.save_adapter(folder, weights, config | record)
    return folder


def make_chain(root: Path, base: Path, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> Path:
    """base → SFT → GRPO; the second adapter has another scale and only the projections `targets`."""
    sft = make_adapter(root / "sft", base)
    return make_adapter(root / "grpo", sft, rank=2, scale=3.0, targets=targets, seed=2)


def fused(folder: Path) -> dict[str, np.ndarray]:
    """The fused weights of a chain in float64, computed from its files."""
    chain = models.read_chain(str(folder))
    weights = {
        name: value.astype(np.float64)
        for name, value in load_file(chain.path / "model.safetensors").items()
    }
    for adapter in chain.adapters:
        scale = json.loads((adapter / "adapter_config.json").read_text())["lora_parameters"][
            "scale"
        ]
        tensors = load_file(adapter / "adapters.safetensors")
        for name in sorted(name for name in tensors if name.endswith(".lora_a")):
            layer = name.removesuffix(".lora_a")
            a, b = (tensors[f"{layer}.{part}"].astype(np.float64) for part in ("lora_a", "lora_b"))
            weights[f"{layer}.weight"] += scale * (a @ b).T
    return weights
