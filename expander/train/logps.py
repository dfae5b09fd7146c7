"""Log-probabilities of completions and their gradients, without keeping logits.

Each prompt is computed once for all completions of its group.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from expander.decode import batch_caches
from expander.fast_exp import logsumexp, softmax_and_lse
from expander.lora import head_weight
from expander.model import hidden_states, lm_head
from expander.train.memory import LOGIT_BUDGET

TILE = 64  # rows of a matrix product on a Mac's GPU; an incomplete tile costs as much as a full one


def chunk_rows(head: Callable[[mx.array], mx.array], hidden: mx.array) -> int:
    """The number of rows of `hidden` whose logits fit LOGIT_BUDGET, in full tiles if possible."""
    rows = max(1, LOGIT_BUDGET // head(hidden[:1]).shape[-1])
    return rows - rows % TILE if rows > TILE else rows


def token_logps(
    hidden: mx.array,
    targets: mx.array,
    head: Callable[[mx.array], mx.array],
    temperature: float = 1.0,
    with_entropy: bool = False,
    with_gradient: bool = True,
) -> tuple[mx.array, mx.array | None]:
    """log softmax(head(hidden) / T) at the targets, in float32, without keeping the logits.

    The head is frozen, so the gradient with respect to `hidden`, head^T (onehot - softmax) / T, is
    computed together with the value, chunk by chunk, and attached through a term that is zero. Only
    N × D numbers are kept for the backward pass, whatever the size of the vocabulary. A head that is
    trained (lora.modules_to_save) is computed again in the backward pass instead.

    Args:
        hidden: (N, D), the states that predict the targets.
        targets: (N,) token ids.
        head: (n, D) → (n, V), linear; from `lm_head`.

    Returns:
        (N,) log-probabilities, and (N,) entropies in nats (no gradient) or None if not requested.
    """
    chunk, weight = chunk_rows(head, hidden), head_weight(head)
    logps, entropies, done = [], [], []
    for start in range(0, hidden.shape[0], chunk):
        h = hidden[start : start + chunk]  # (n, D)
        ids = targets[start : start + chunk, None]  # (n, 1)
        frozen = mx.stop_gradient(h)
        if done:
            # MLX evaluates breadth first: without this order, all chunks' logits would be held at once.
            [frozen] = mx.depends([frozen], done)
        scaled = head(frozen).astype(mx.float32)  # (n, V)
        if temperature != 1.0:
            scaled = scaled / temperature
        if (with_gradient and weight is None) or with_entropy:
            # One exponential pass serves both.
            probs, lse = softmax_and_lse(scaled)
        else:
            lse = logsumexp(scaled)  # (n, 1)
        logp = (mx.take_along_axis(scaled, ids, axis=-1) - lse)[:, 0]
        if with_gradient and weight is not None:
            [h] = mx.depends([h], done) if done else [h]
            logp = mx.checkpoint(_logps_of_trained_head)(h, weight, ids, mx.array(temperature))
        elif with_gradient:
            at_target = mx.take_along_axis(probs, ids, axis=-1)
            push = mx.put_along_axis(probs, ids, at_target - 1.0, axis=-1)  # softmax - onehot
            slope = mx.vjp(head, [frozen], [push.astype(h.dtype)])[1][0] / temperature  # (n, D)
            zero = ((frozen - h).astype(mx.float32) * mx.stop_gradient(slope)).sum(axis=-1)
            logp = mx.stop_gradient(logp) + zero
        done = [logp]
        if with_entropy:
            entropies.append(mx.stop_gradient(lse[:, 0] - (probs * scaled).sum(axis=-1)))
            done.append(entropies[-1])
        logps.append(logp)
    return mx.concatenate(logps), mx.concatenate(entropies) if with_entropy else None


def _logps_of_trained_head(
    hidden: mx.array, weight: mx.array, ids: mx.array, temperature: mx.array
) -> mx.array:
    """One chunk of `token_logps`: hidden (n, D), weight (V, D) and ids (n, 1) to (n,)."""
    logits = (hidden @ weight.astype(hidden.dtype).T).astype(mx.float32) / temperature  # (n, V)
    picked = mx.take_along_axis(logits, mx.stop_gradient(ids), axis=-1)
    return (picked - mx.logsumexp(logits, axis=-1, keepdims=True))[:, 0]


def pad(
    rows: Sequence[Sequence[int]], left: bool = False, to: int = 1
) -> tuple[mx.array, mx.array]:
    """Pad rows of ids to one (B, T) array with its 0/1 mask; T is rounded up to a multiple of `to`.

    >>> ids, mask = pad([[5, 6, 7], [8]])
    >>> ids.tolist(), mask.tolist()
    ([[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]])
    >>> pad([[5, 6, 7], [8]], left=True)[0].tolist()
    [[5, 6, 7], [0, 0, 8]]
    """
    width = -(-max(map(len, rows)) // to) * to
    fill = [[0] * (width - len(row)) for row in rows]
    pairs = list(zip(rows, fill, strict=True))
    ids = [f + list(row) if left else list(row) + f for row, f in pairs]
    mask = [
        [0] * len(f) + [1] * len(row) if left else [1] * len(row) + [0] * len(f) for row, f in pairs
    ]
    return mx.array(ids), mx.array(mask)


class PromptCache:
    """One layer's keys and values of left-padded prompts, repeated for their completions.

    Unlike mlx-lm's caches it stores only the prompts and updates nothing in place, so gradients flow
    through the prompts and a call can be compiled.
    """

    def __init__(self, padding: mx.array):
        self.padding = padding  # (P,)
        self.offset = -padding  # position of the first token of the next call
        self.keys = self.values = None

    def update_and_fetch(self, keys: mx.array, values: mx.array):
        if self.keys is None:
            self.keys, self.values = keys, values  # (P, H, T, D)
            return keys, values
        return (
            mx.concatenate([self.keys, keys], axis=2),
            mx.concatenate([self.values, values], axis=2),
        )

    def repeat(self, rows: mx.array) -> None:
        """Make row i a copy of prompt `rows[i]`, ready for its completion."""
        self.offset = (self.offset + self.keys.shape[2])[rows]
        self.keys, self.values, self.padding = (
            self.keys[rows],
            self.values[rows],
            self.padding[rows],
        )

    def make_mask(self, length: int, window_size: int | None = None, **_) -> mx.array:
        """(B, 1, length, prompt + length): causal, without the padding of prompts."""
        before = 0 if self.keys is None else self.keys.shape[2]
        row, column = (before + mx.arange(length))[:, None], mx.arange(before + length)
        causal = column[None] <= row
        if window_size is not None:
            causal = causal & (row < column[None] + window_size)
        return causal[None, None] & (column[None] >= self.padding[:, None])[:, None, None]


class PromptState(ArraysCache):
    """One layer's state of a convolution or recurrence after left-padded prompts."""

    def __init__(self, size: int, padding: mx.array):
        super().__init__(size)
        self.left_padding = mx.array(padding)  # (P,); a copy, because a layer changes it in place

    repeat = ArraysCache.filter


def completion_states(
    model: nn.Module, prompts: mx.array, padding: mx.array, rows: mx.array, completions: mx.array
) -> mx.array:
    """The hidden states that predict each completion token; each prompt is computed once.

    Args:
        prompts: (P, S) left-padded ids; padding: (P,) pad tokens of each.
        rows: (B,) index of the prompt of each completion.
        completions: (B, T) right-padded ids.

    Returns:
        (B, T, D).
    """
    cache = batch_caches(model, padding, PromptCache, PromptState)
    last = hidden_states(model, prompts, cache)[:, -1:]  # (P, 1, D)
    for layer in cache:
        layer.repeat(rows)
    if completions.shape[1] == 1:
        return last[rows]
    following = hidden_states(model, completions[:, :-1], cache)  # (B, T - 1, D)
    return mx.concatenate([last[rows], following], axis=1)


def completion_logps(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    temperature: float,
    with_entropy: bool = False,
    with_gradient: bool = True,
) -> tuple[mx.array, mx.array, mx.array | None]:
    """Log-probabilities of B completions, each given its prompt.

    Args:
        prompts: B lists of token ids; equal ones are computed once.
        completions: B lists of token ids, the end token included.

    Returns:
        logps, mask and entropies (None unless requested), each (B, T) float32 except the mask,
        where T is the longest completion rounded up to a multiple of 8.
    """
    numbers: dict[tuple[int, ...], int] = {}  # of the unique prompts
    rows = mx.array([numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts])  # (B,)
    padded, _ = pad(list(numbers), left=True, to=8)  # (P, S)
    padding = mx.array([padded.shape[1] - len(prompt) for prompt in numbers])  # (P,)
    tokens, mask = pad(completions, to=8)  # (B, T)
    states = completion_states(model, padded, padding, rows, tokens)  # (B, T, D)
    # The head sees real completion positions only. They come from the lists: reading the mask would
    # wait for the device.
    width = tokens.shape[1]
    where = mx.array([i * width + j for i, row in enumerate(completions) for j in range(len(row))])
    flat, entropy = token_logps(
        states.reshape(-1, states.shape[-1])[where],
        tokens.flatten()[where],
        lm_head(model),
        temperature,
        with_entropy,
        with_gradient,
    )

    def unflatten(values: mx.array) -> mx.array:
        return mx.zeros(mask.size).at[where].add(values).reshape(mask.shape)

    return unflatten(flat), mask, None if entropy is None else unflatten(entropy)
