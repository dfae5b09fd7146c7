"""The weights of a chain, base + adapters fused in float32, read a few rows at a time.

The base comes lazily from its safetensors and a tensor is freed once it is read, so that memory
holds one tensor of the model and never the whole model.
"""

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from expander.model import (
    Chain,
    ModelError,
    adapter_weights,
    adapters_off,
    compute_dtype,
    fused_weight,
    load_adapter,
    load_base,
)

PIECE = 8 << 20  # values a piece of a tensor: 32 MB in float32


class Lora(NamedTuple):
    """One adapter of one layer, W + scale (A B)^T: a is (in, rank), b (rank, out)."""

    a: mx.array
    b: mx.array
    scale: float


def take_adapters(model: nn.Module, chain: Chain) -> list[dict[str, Lora]]:
    """Each adapter of the chain as layer name -> Lora, the oldest first; the model stays as it was.

    Raises:
        ModelError: an adapter does not fit this base, or holds tensors that fusing would leave out.
    """
    adapters = []
    for folder in chain.adapters:
        load_adapter(model, folder)
        layers = adapters_off(model).layers
        if 2 * len(layers) != len(adapter_weights(model)):
            raise ModelError(f"{folder}: it adapts more than linear layers, which cannot be fused")
        adapters.append({name: Lora(m.lora_a, m.lora_b, m.scale) for name, m in layers})
        model.update_modules(tree_unflatten([(name, m.linear) for name, m in layers]))
        model.freeze()
    return adapters


class FusedWeights:
    """Names and shapes of a chain's fused tensors, and their values, each readable once.

    The base is what training and evaluation saw, in their dtype, de-quantised where it was
    quantised. The adapters are added to it in float32 and nothing is rounded in between.
    """

    def __init__(self, chain: Chain):
        model = load_base(chain.path, chain.bits, lazy=True)
        self._adapters = take_adapters(model, chain)
        self._quantised = {name: m for name, m in model.named_modules() if "scales" in m}
        packed = {f"{name}.{part}" for name in self._quantised for part in ("scales", "biases")}
        # The model goes, so that a tensor that has been read leaves memory.
        self._arrays = {
            name: array for name, array in tree_flatten(model.parameters()) if name not in packed
        }
        self.shapes = {name: self._shape(name) for name in self._arrays}
        # As stored: the model's arrays are whole tensors in another dtype, pieces are cast one by one.
        for file in chain.path.glob("model*.safetensors"):
            for name, array in mx.load(str(file)).items():
                if self.shapes.get(name) == array.shape:
                    self._arrays[name] = array

    def _shape(self, name: str) -> tuple[int, ...]:
        *rows, width = self._arrays[name].shape
        layer = self._quantised.get(name.removesuffix(".weight"))
        return (*rows, width * 32 // layer.bits if layer else width)

    def read(self, name: str, multiple: int = 1) -> Iterator[np.ndarray]:
        """A tensor's rows from first to last in float32, in pieces of a multiple of so many rows."""
        array, layer_name = self._arrays.pop(name), name.removesuffix(".weight")
        layer = self._quantised.pop(layer_name, None)
        adapters = [adapter[layer_name] for adapter in self._adapters if layer_name in adapter]
        rows, width = self.shapes[name][0], self.shapes[name][-1]
        step = max(PIECE // width // multiple, 1) * multiple
        for first in range(0, rows, step):
            part = slice(first, first + step)
            if layer is None:
                piece = array[part].astype(compute_dtype()).astype(mx.float32)
            else:
                piece = _dequantised(layer, part)
            # On the CPU: a GPU may shorten the factors of a float32 product.
            with mx.stream(mx.cpu):
                for a, b, scale in adapters:
                    piece = fused_weight(piece, a, b[:, part], scale)
                values = np.array(piece)
            yield values

    def whole(self, name: str, dtype: mx.Dtype) -> mx.array:
        """A tensor in one piece, rounded to `dtype` once."""
        return mx.concatenate([mx.array(piece).astype(dtype) for piece in self.read(name)])


def _dequantised(layer: nn.Module, part: slice) -> mx.array:
    """Some rows of a quantised layer; the affine scales multiply in float32, as in a product."""
    scales, biases = layer.scales[part], layer.get("biases")
    if layer.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases[part].astype(mx.float32)
    return mx.dequantize(
        layer.weight[part], scales, biases, layer.group_size, layer.bits, mode=layer.mode
    )
