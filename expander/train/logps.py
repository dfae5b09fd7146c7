"""Log-probabilities of completions, with their gradients: every prompt computed once."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from expander.model import hidden_states, lm_head
from expander.train.rollout import Rollout

# Logits of one chunk of token_logps, in numbers: 64 MiB of float32.
LOGIT_BUDGET = 1 << 24


def token_logps(
    hidden: mx.array,
    targets: mx.array,
    head: Callable[[mx.array], mx.array],
    temperature: float = 1.0,
    with_entropy: bool = False,
    with_gradient: bool = True,
) -> tuple[mx.array, mx.array | None]:
    """log softmax(head(hidden) / T) at the targets, in float32, without keeping the logits.

    The head is frozen, so the gradient to `hidden`, head^T (onehot - softmax) / T, is computed
    beside the value, chunk by chunk, and attached by a term that is zero: only N × D numbers stay
    for the backward pass, whatever the vocabulary.

    Args:
        hidden: (N, D), the states that predict the targets.
        targets: (N,) token ids.
        head: (n, D) → (n, V), linear and without trainable parameters.

    Returns:
        (N,) log-probabilities, and the (N,) entropies in nats (no gradient) when asked for.
    """
    vocabulary = head(hidden[:1]).shape[-1]
    chunk = max(1, LOGIT_BUDGET // vocabulary)
    logps, entropies, done = [], [], []
    for start in range(0, hidden.shape[0], chunk):
        h = hidden[start : start + chunk]  # (n, D)
        ids = targets[start : start + chunk, None]  # (n, 1)
        frozen = mx.stop_gradient(h)
        if done:
            # MLX evaluates breadth first: without an order it would hold the logits of all chunks.
            [frozen] = mx.depends([frozen], done)
        scaled = head(frozen).astype(mx.float32)  # (n, V)
        if temperature != 1.0:
            scaled = scaled / temperature
        if with_gradient or with_entropy:
            # One exponential pass serves both: lse = max - log(softmax at the maximum).
            probs = mx.softmax(scaled, axis=-1)
            lse = scaled.max(axis=-1, keepdims=True) - mx.log(probs.max(axis=-1, keepdims=True))
        else:
            lse = mx.logsumexp(scaled, axis=-1, keepdims=True)  # (n, 1)
        logp = (mx.take_along_axis(scaled, ids, axis=-1) - lse)[:, 0]
        if with_gradient:
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


def pad(
    rows: Sequence[Sequence[int]], left: bool = False, to: int = 1
) -> tuple[mx.array, mx.array]:
    """Rows of ids as one (B, T) array and its 0/1 mask; T is rounded up to a multiple of `to`.

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

    Unlike mlx-lm's caches it keeps nothing between calls but the prompts and writes nothing in
    place, so gradients flow through the prompts and a call can be compiled.
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
        """Row i becomes the prompt `rows[i]`, ready for completions."""
        self.offset = (self.offset + self.keys.shape[2])[rows]
        self.keys, self.values, self.padding = (
            self.keys[rows],
            self.values[rows],
            self.padding[rows],
        )

    def make_mask(self, length: int, **_) -> mx.array:
        """(B, 1, length, prompt + length): causal, and blind to the prompts' padding."""
        before = 0 if self.keys is None else self.keys.shape[2]
        column = mx.arange(before + length)
        causal = column[None] <= (before + mx.arange(length))[:, None]
        return causal[None, None] & (column[None] >= self.padding[:, None])[:, None, None]


def completion_states(
    model: nn.Module, prompts: mx.array, padding: mx.array, rows: mx.array, completions: mx.array
) -> mx.array:
    """The states that predict each completion token, every prompt computed once.

    Args:
        prompts: (P, S) left-padded ids; padding: (P,) pads of each.
        rows: (B,) the prompt of each completion.
        completions: (B, T) right-padded ids.

    Returns:
        (B, T, D).
    """
    cache = [PromptCache(padding) for _ in model.layers]
    last = hidden_states(model, prompts, cache)[:, -1:]  # (P, 1, D)
    for layer in cache:
        layer.repeat(rows)
    if completions.shape[1] == 1:
        return last[rows]
    following = hidden_states(model, completions[:, :-1], cache)  # (B, T - 1, D)
    return mx.concatenate([last[rows], following], axis=1)


def remember_logps(
    model: nn.Module, batches: Sequence[Sequence[Rollout]], temperature: float, name: str
) -> None:
    """Set `name` ("ref_logps" or "old_logps") of every rollout from the model as it is now."""
    for batch in batches:
        logps, _, _ = completion_logps(model, batch, temperature, with_gradient=False)
        mx.eval(logps)
        for rollout, row in zip(batch, logps, strict=True):
            setattr(rollout, name, row[: len(rollout.tokens)])


def stack(rows: Sequence[mx.array | None], width: int) -> mx.array | None:
    """(T_i,) arrays as one (B, width); None where the first is None."""
    if rows[0] is None:
        return None
    return mx.stack([mx.pad(row, (0, width - row.size)) for row in rows])


def completion_logps(
    model: nn.Module,
    rollouts: Sequence[Rollout],
    temperature: float,
    with_entropy: bool = False,
    with_gradient: bool = True,
) -> tuple[mx.array, mx.array, mx.array | None]:
    """(logps, mask, entropies) of completions given their prompts, each (B, T) float32."""
    unique = list({tuple(r.prompt): None for r in rollouts})
    prompts, prompt_mask = pad(unique, left=True, to=8)
    rows = mx.array([unique.index(tuple(r.prompt)) for r in rollouts])
    tokens, mask = pad([r.tokens for r in rollouts], to=8)  # (B, T)
    padding = prompts.shape[1] - prompt_mask.sum(axis=1)
    states = completion_states(model, prompts, padding, rows, tokens)
    # The head sees real completion positions only.
    where = mx.array([i for i, m in enumerate(mask.flatten().tolist()) if m])
    flat, entropy = token_logps(
        states.reshape(-1, states.shape[-1])[where],
        tokens.flatten()[where],
        lm_head(model),
        temperature,
        with_entropy,
        with_gradient,
    )

    def spread(values: mx.array) -> mx.array:
        return mx.zeros(mask.size).at[where].add(values).reshape(mask.shape)

    return spread(flat), mask, None if entropy is None else spread(entropy)
