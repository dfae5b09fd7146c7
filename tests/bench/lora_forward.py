"""Our LoRA forward pass next to mlx-lm's: peak memory, time and gradients of one SFT pass.

    python -m tests.bench.lora_forward

On a random Qwen3, in float32 and in bfloat16, both with the same weights and rows. The
gradients are compared with those of mlx-lm's layer in float32.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear as MlxLoRALinear

from expander import model as models
from expander.architectures import PROJECTIONS
from expander.lora import LoRALinear, lora_layers
from expander.train.batches import Row, collate
from expander.train.sft import completion_loss
from tests.tiny import make_qwen3

ROWS, LENGTH, PROMPT = 4, 256, 32
LAYERS = {"mlx-lm": MlxLoRALinear, "ours": LoRALinear}


def measure(path: Path, layer: type) -> tuple[float, float, dict[str, np.ndarray]]:
    """(peak in bytes, seconds, gradients) of the second of two passes."""
    model = models.load_base(path)
    mx.random.seed(0)
    models.add_lora(model, models.lora_config(model, 16, 32.0, 0.0, PROJECTIONS))
    fresh = {n: mx.random.normal(v.shape) * 0.02 for n, v in models.adapter_weights(model).items()}
    model.load_weights(list(fresh.items()), strict=False)
    for _, module in lora_layers(model):
        module.__class__ = layer
    rng = np.random.default_rng(0)
    rows = [Row(rng.integers(0, 500, LENGTH).tolist(), PROMPT, "") for _ in range(ROWS)]
    batch = collate(rows)
    gradient_of = nn.value_and_grad(model, lambda m, *b: completion_loss(m, *b)[0])
    for _ in range(2):
        mx.reset_peak_memory()
        started = time.perf_counter()
        _, gradient = gradient_of(model, *batch)
        mx.eval(gradient)
        seconds = time.perf_counter() - started
    return mx.get_peak_memory(), seconds, {n: np.array(g) for n, g in tree_flatten(gradient)}


def flat(gradients: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([gradients[name].ravel() for name in sorted(gradients)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden": 512, "heads": 8, "kv_heads": 4, "head_dim": 64, "ffn": 1536}
        path = make_qwen3(Path(folder) / "qwen3", layers=arguments.layers, **sizes)
        exact = None
        for dtype in ("float32", "bfloat16"):
            os.environ["QMD_DTYPE"] = dtype
            peaks = {}
            for name, layer in LAYERS.items():
                peaks[name], seconds, gradients = measure(path, layer)
                vector = flat(gradients)
                exact = vector if exact is None else exact
                cosine = vector @ exact / np.linalg.norm(vector) / np.linalg.norm(exact)
                distance = np.linalg.norm(vector - exact) / np.linalg.norm(exact)
                print(
                    f"{dtype:9} {name:7} peak {peaks[name] / 1e6:7.1f} MB  {seconds:6.2f} s  "
                    f"gradient: cosine {cosine:.6f}, relative distance {distance:.1e}"
                )
            print(f"{dtype:9} peak ours / mlx-lm {peaks['ours'] / peaks['mlx-lm']:.3f}")


if __name__ == "__main__":
    main()
