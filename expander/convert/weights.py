"""The fused weights of a chain, base + adapters in float32, read a few rows at a time.

The base is loaded lazily from its safetensors files and a tensor is freed once it is read, so memory
holds one tensor at a time instead of the model.
"""

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from expander.lora import lora_layers, trained_modules
from expander.model import (
    Chain,
    ModelError,
    adapter_weights,
    fused_weight,
    load_adapter,
    load_base,
)

PIECE = 8 << 20  # values read at a time, 32 MB in float32


class Lora(NamedTuple):
    """One adapter of one layer, W + scale (A B)^T: a is (in, rank), b (rank, out)."""

    a: mx.array
    b: mx.array
    scale: float


class Adapter(NamedTuple):
    """One adapter: its LoRA by layer, and the weights that it replaces, by tensor."""

    lora: dict[str, Lora]
    whole: dict[str, mx.array]


def take_adapters(model: nn.Module, chain: Chain) -> list[Adapter]:
    """Each adapter of the chain, the oldest first; the model is unchanged, but may be untied.

    Raises:
        ModelError: an adapter does not fit this base, or has tensors that fusing would ignore.
    """
    adapters = []
    for folder in chain.adapters:
        load_adapter(model, folder)
        layers, modules = lora_layers(model), trained_modules(model)
        if 2 * len(layers) + len(modules) != len(adapter_weights(model)):
            raise ModelError(
                f"{folder}: only adapters of linear layers can be fused; this has others"
            )
        adapters.append(
            Adapter(
                {name: Lora(m.lora_a, m.lora_b, m.scale) for name, m in layers},
                {f"{name}.weight": m.weight for name, m in modules},
            )
        )
        before = [(name, m.linear) for name, m in layers]
        before += [(name, m.replaced) for name, m in modules]
        model.update_modules(tree_unflatten(before))
        model.freeze()
    return adapters


class FusedWeights:
    """The names, shapes and values of a chain's fused tensors; each value can be read once.

    The base has the dtype it was trained and evaluated in and is dequantised if it was quantised.
    The adapters are added in float32, with no rounding in between.

    Raises:
        ModelError: the base or an adapter cannot be loaded.
    """

    def __init__(self, chain: Chain):
        model = load_base(chain.path, chain.bits, lazy=True)
        self._adapters = take_adapters(model, chain)
        self._quantised = {name: m for name, m in model.named_modules() if "scales" in m}
        packed = {f"{name}.{part}" for name in self._quantised for part in ("scales", "biases")}
        # Keep the arrays but not the model, so that each is freed once it is read.
        self._arrays = {
            name: array for name, array in tree_flatten(model.parameters()) if name not in packed
        }
        self.shapes = {name: self._shape(name) for name in self._arrays}
        self._dtypes = {name: array.dtype for name, array in self._arrays.items()}
        # Prefer the arrays as stored: casting a model array would load the full tensor.
        for file in chain.path.glob("model*.safetensors"):
            for name, array in mx.load(str(file)).items():
                if self.shapes.get(name) == array.shape:
                    self._arrays[name] = array

    def _shape(self, name: str) -> tuple[int, ...]:
        *rows, width = self._arrays[name].shape
        layer = self._quantised.get(name.removesuffix(".weight"))
        return (*rows, width * 32 // layer.bits if layer else width)

    def read(self, name: str, multiple: int = 1) -> Iterator[np.ndarray]:
        """Yield a tensor's rows in order in float32, in pieces of a multiple of `multiple` rows."""
        array, layer_name = self._arrays.pop(name), name.removesuffix(".weight")
        layer = self._quantised.pop(layer_name, None)
        adapters: list[Lora] = []
        for adapter in self._adapters:
            if name in adapter.whole:  # replaces what is below
                array, layer, adapters = adapter.whole[name], None, []
            elif layer_name in adapter.lora:
                adapters.append(adapter.lora[layer_name])
        rows, width = self.shapes[name][0], self.shapes[name][-1]
        step = max(PIECE // width // multiple, 1) * multiple
        for first in range(0, rows, step):
            part = slice(first, first + step)
            if layer is None:
                piece = array[part].astype(self._dtypes[name]).astype(mx.float32)
            else:
                piece = _dequantised(layer, part)
            # On the CPU, because a GPU may round the factors of a float32 product.
            with mx.stream(mx.cpu):
                for a, b, scale in adapters:
                    piece = fused_weight(piece, a, b[:, part], scale)
                values = np.array(piece)
            yield values

    def tensor(self, name: str, dtype: mx.Dtype) -> mx.array:
        """Read all of a tensor, rounded once to `dtype`."""
        return mx.concatenate([mx.array(piece).astype(dtype) for piece in self.read(name)])


def _dequantised(layer: nn.Module, part: slice) -> mx.array:
    """Some rows of a quantised layer, with affine scales in float32 as a matrix product uses them."""
    scales, biases = layer.scales[part], layer.get("biases")
    if layer.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases[part].astype(mx.float32)
    return mx.dequantize(
        layer.weight[part], scales, biases, layer.group_size, layer.bits, mode=layer.mode
    )
