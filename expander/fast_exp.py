"""A faster exponential for the CPU on Linux.

MLX computes exp and sigmoid there by a polynomial, one number at a time; pow calls the C library,
which is 2.5 times faster and more exact. It serves SwiGLU and the softmax over the vocabulary. On a
Mac everything stays as it is in MLX and mlx-lm.
"""

import math
import sys
from functools import cache

import mlx.core as mx
import mlx.nn as nn

# The names of a gated MLP's layers: gate, up, down.
GATED_MLPS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


def is_wanted() -> bool:
    """Whether the default device is a CPU without vector code for exp."""
    return mx.default_device().type == mx.cpu and not mx.metal.is_available()


def softmax_and_lse(logits: mx.array) -> tuple[mx.array, mx.array]:
    """Softmax and log-sum-exp (with a last axis of 1) over the last axis, from one exponential."""
    highest = logits.max(axis=-1, keepdims=True)
    if is_wanted():
        powers = mx.power(math.e, logits - highest)
        total = powers.sum(axis=-1, keepdims=True)
        return powers / total, highest + mx.log(total)
    probs = mx.softmax(logits, axis=-1)
    return probs, highest - mx.log(probs.max(axis=-1, keepdims=True))


def logsumexp(logits: mx.array) -> mx.array:
    """log Σ exp over the last axis, which becomes 1."""
    if not is_wanted():
        return mx.logsumexp(logits, axis=-1, keepdims=True)
    highest = logits.max(axis=-1, keepdims=True)
    return highest + mx.log(mx.power(math.e, logits - highest).sum(axis=-1, keepdims=True))


@mx.custom_function
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """gate · sigmoid(gate) · up."""
    return gate / (1.0 + mx.power(1 / math.e, gate)) * up


@swiglu.vjp
def _(primals, cotangent, output):
    gate, up = primals
    sigmoid = 1.0 / (1.0 + mx.power(1 / math.e, gate))
    silu = gate * sigmoid
    return cotangent * up * (sigmoid + silu * (1.0 - sigmoid)), cotangent * silu


@cache
def _with_fast_swiglu(mlp: type, gate: str, up: str, down: str) -> type:
    """A subclass of mlx-lm's gated MLP with the function above."""

    def call(self, x: mx.array) -> mx.array:
        return self[down](swiglu(self[gate](x), self[up](x)))

    return type(mlp.__name__, (mlp,), {"__call__": call})


def use_fast_swiglu(model: nn.Module) -> None:
    """Compute the gated MLPs of a loaded model with the faster exponential, where it is faster."""
    from mlx_lm.models.activations import swiglu as slow

    if not is_wanted():
        return
    for module in model.modules():
        if getattr(sys.modules[type(module).__module__], "swiglu", None) is not slow:
            continue  # another activation
        for names in GATED_MLPS:
            if all(name in module for name in names):
                module.__class__ = _with_fast_swiglu(type(module), *names)
