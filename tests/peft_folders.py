"""PEFT adapter folders with random weights, written without PEFT, and what they do to the weights."""

import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

PREFIX = "base_model.model."


def make_peft(
    folder: Path,
    base: Path,
    *,
    ranks: dict[str, int] | None = None,
    whole: dict[str, np.ndarray] | None = None,
    layers: tuple[int, ...] = (0, 1),
    seed: int = 1,
    **config: object,
) -> Path:
    """A LoRA of `base`, as PEFT saves it.

    Args:
        ranks: by the last part of a module's name; default: q_proj and down_proj of rank 4.
        whole: tensors of modules that were trained as a whole, by name.
        config: keys of adapter_config.json to change.
    """
    rng = np.random.default_rng(seed)
    weights = load_file(base / "model.safetensors")
    tensors = {f"{PREFIX}{name}": value for name, value in (whole or {}).items()}
    for name, weight in weights.items():
        parts = name.split(".")
        rank = (ranks or {"q_proj": 4, "down_proj": 4}).get(parts[-2])
        if rank and parts[1] == "layers" and int(parts[2]) in layers:
            stem = PREFIX + name.removesuffix(".weight")
            rows, width = weight.shape
            for part, shape in {"A": (rank, width), "B": (rows, rank)}.items():
                value = rng.normal(0, 0.1, shape).astype(np.float32)
                tensors[f"{stem}.lora_{part}.weight"] = value
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "revision": None,
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": ["q_proj", "down_proj"],
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(record | config))
    return folder


def merged(
    folder: Path, weights: dict[str, np.ndarray], alphas: dict[str, float]
) -> dict[str, np.ndarray]:
    """The weights with the adapter in `folder` merged by PEFT's formula, in float64.

    Args:
        alphas: alpha by the last part of a module's name.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    merged = {name: value.astype(np.float64) for name, value in weights.items()}
    for stored, a in tensors.items():
        name = stored.removeprefix(PREFIX)
        if name.endswith(".lora_A.weight"):
            b = tensors[stored.replace("lora_A", "lora_B")]
            name = name.removesuffix(".lora_A.weight")
            rank = math.sqrt(a.shape[0]) if config["use_rslora"] else a.shape[0]
            scale = alphas[name.split(".")[-1]] / rank
            merged[f"{name}.weight"] += scale * b.astype(np.float64) @ a.astype(np.float64)
        elif "lora_" not in name:
            merged[name] = a.astype(np.float64)
    return merged
