"""The optimiser: PyTorch's AdamW with gradient clipping, on Hugging Face's schedules."""

import math

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from expander.config import Training


def schedule(training: Training, total: int):
    """The learning rate at each 0-based optimiser step, as in Hugging Face's schedulers.

    It rises linearly from 0 over ceil(warmup_ratio * total) steps, then decays to 0 along a half
    cosine or a line, or stays constant.
    """
    warmup = math.ceil(training.warmup_ratio * total)

    def rate(step: mx.array) -> mx.array:
        step = step.astype(mx.float32)
        passed = mx.clip((step - warmup) / max(total - warmup, 1), 0.0, 1.0)
        decay = {
            "cosine": 0.5 * (1.0 + mx.cos(math.pi * passed)),
            "linear": 1.0 - passed,
            "constant": mx.ones_like(passed),
        }[training.lr_scheduler]
        return training.learning_rate * mx.where(step < warmup, step / max(warmup, 1), decay)

    return rate


class AdamW(optim.AdamW):
    """AdamW as in PyTorch (with bias correction), with gradients clipped by their global norm.

    state["grad_norm"] holds the norm before clipping. A `max_grad_norm` of 0 disables clipping. A
    gradient that is not finite changes nothing: neither weights, moments nor the schedule.
    """

    def __init__(self, training: Training, total: int):
        super().__init__(
            schedule(training, total), weight_decay=training.weight_decay, bias_correction=True
        )
        self.max_grad_norm = training.max_grad_norm
        self.state["grad_norm"] = mx.array(0.0)

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        squares = [g.astype(mx.float32).square().sum() for _, g in tree_flatten(gradients)]
        norm = mx.sqrt(mx.stack(squares).sum())
        if self.max_grad_norm:
            factor = mx.minimum(1.0, self.max_grad_norm / (norm + 1e-6))
            gradients = tree_map(lambda g: g * factor, gradients)
        if not self._initialized:
            self.init(gradients)
        before = tree_map(lambda value: value, self.state)
        updated = super().apply_gradients(gradients, parameters)
        finite = mx.isfinite(norm)
        _select(finite, self.state, before)
        self.state["grad_norm"] = norm
        return tree_map(lambda new, old: mx.where(finite, new, old), updated, parameters)


def _select(condition: mx.array, state: dict | list, before: dict | list) -> None:
    """Put the arrays of `before` back into `state`, in place, unless the condition holds."""
    for key, value in list(state.items()) if isinstance(state, dict) else enumerate(state):
        if isinstance(value, dict | list):
            _select(condition, value, before[key])
        else:
            state[key] = mx.where(condition, value, before[key])
