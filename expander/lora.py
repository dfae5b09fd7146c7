"""What an adapter adds to a model: LoRA layers, and embeddings or a head that are trained as a whole.

LoRA layers are mlx-lm's, computed in the dtype of their input.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.lora import LoRALinear as MlxLoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from expander.config import TRAINED


class LoRALinear(MlxLoRALinear):
    """y = x W^T + s (dropout(x) A) B, with the float32 A and B cast to the dtype of x.

    mlx-lm's layer multiplies a bfloat16 x by a float32 A, which promotes x and keeps a float32 copy
    of it for the backward pass: a fifth more memory at the peak. Casting the small matrices instead
    keeps no copy. A, B, their gradients and the optimiser stay float32, and the saved adapter is
    mlx-lm's.
    """

    def __call__(self, x: mx.array) -> mx.array:
        a, b = self.matrices(x.dtype)
        return mx.addmm(self.linear(x), self.dropout(x) @ a, b)

    def matrices(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """A (in, r) and s B (r, out)."""
        return self.lora_a.astype(dtype), (self.scale * self.lora_b).astype(dtype)


class ReadyLoRALinear(nn.Module):
    """A LoRALinear for inference: without dropout, its matrices cast and scaled once."""

    def __init__(self, layer: LoRALinear, dtype: mx.Dtype):
        super().__init__()
        self.linear = layer.linear
        self.a, self.b = layer.matrices(dtype)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.addmm(self.linear(x), x @ self.a, self.b)


def lora_layers(model: nn.Module) -> list[tuple[str, MlxLoRALinear]]:
    """The (name, layer) pairs of a model's LoRA layers."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, MlxLoRALinear)]


def add_lora_layers(model: nn.Module, num_layers: int, parameters: dict) -> None:
    """Wrap linear layers by mlx-lm's own rules and random numbers, with the forward pass above."""
    linear_to_lora_layers(model, num_layers, parameters)
    for _, layer in lora_layers(model):
        layer.__class__ = LoRALinear


def full_weight(module: nn.Module) -> mx.array:
    """The weight of a linear layer or an embedding, dequantised if it was quantised."""
    if "scales" not in module:
        return module.weight
    biases = module.get("biases")
    options = {"mode": module.mode}
    return mx.dequantize(
        module.weight, module.scales, biases, module.group_size, module.bits, **options
    )


class TrainedModule:
    """An embedding or a head that is trained as a whole: a float32 weight, cast to the model's dtype.

    The module that it replaces is kept for the reference model, outside of the model's parameters.
    """

    def __init__(self, replaced: nn.Module):
        nn.Module.__init__(self)
        weight = full_weight(replaced)
        self.weight = weight.astype(mx.float32)  # (V, D)
        self.__dict__["replaced"] = replaced
        self.__dict__["dtype"] = weight.dtype

    def plain(self, dtype: mx.Dtype) -> nn.Module:
        """The module as mlx has it, with the trained weight."""
        if isinstance(self, nn.Embedding):
            plain = nn.Embedding(1, 1)
        else:
            plain = nn.Linear(1, 1, bias=False)
        plain.weight = self.weight.astype(dtype)
        plain.freeze()
        return plain


class TrainedEmbedding(TrainedModule, nn.Embedding):
    def __call__(self, x: mx.array) -> mx.array:
        return self.weight[x].astype(self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        return x @ self.weight.astype(x.dtype).T


class TrainedHead(TrainedModule, nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight.astype(x.dtype).T


def trained_modules(model: nn.Module) -> list[tuple[str, TrainedModule]]:
    """The (name, module) pairs of the modules that are trained as a whole."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, TrainedModule)]


def head_weight(head: Callable[[mx.array], mx.array]) -> mx.array | None:
    """The weight (V, D) of a vocabulary head from `model.lm_head`, if it is trained."""
    module = getattr(head, "__self__", head)
    return module.weight if isinstance(module, TrainedModule) else None


def train_modules(model: nn.Module, names: Sequence[str]) -> None:
    """Make modules trainable as a whole. A tied head is the embedding.

    Args:
        names: keys of TRAINED.
    """
    tied = "lm_head" not in model
    chosen = {"embed_tokens" if tied else name for name in names}
    modules = dict(model.named_modules())
    for name in sorted(chosen):
        kind = TrainedHead if name == "lm_head" else TrainedEmbedding
        model.update_modules(tree_unflatten([(TRAINED[name], kind(modules[TRAINED[name]]))]))


def untie(model: nn.Module) -> None:
    """Give a model whose head is its embedding a head of its own, with the same weight."""
    weight = full_weight(model.model.embed_tokens)
    model.lm_head = nn.Linear(1, 1, bias=False)
    model.lm_head.weight = weight
    model.args.tie_word_embeddings = False


def fit_tied(model: nn.Module, weights: dict[str, mx.array], tied: bool) -> list[str]:
    """Prepare a model for an adapter's trained modules; return their names.

    Over a tied base, a head that equals the embedding is dropped from `weights`. One that differs
    unties the model, and so does a single module that was trained without the other (not `tied`).
    """
    head, embedding = (f"{TRAINED[name]}.weight" for name in ("lm_head", "embed_tokens"))
    if "lm_head" not in model:
        both = head in weights and embedding in weights
        if both and mx.array_equal(weights[head], weights[embedding]).item():
            del weights[head]
        elif both or (not tied and (head in weights or embedding in weights)):
            untie(model)
        elif head in weights:
            weights[embedding] = weights.pop(head)
    return [name for name, module in TRAINED.items() if f"{module}.weight" in weights]
