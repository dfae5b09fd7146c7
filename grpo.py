"""The maths of GRPO: advantages, log-probabilities, loss, padding. Arrays in, arrays out.

The formulas are TRL's forms of GRPO (Shao et al. 2024, arXiv:2402.03300), Dr. GRPO (Liu et al. 2025,
arXiv:2503.20783), DAPO (Yu et al. 2025, arXiv:2503.14476) and, for level="sequence", GSPO (Zheng et
al. 2025, arXiv:2507.18071). Left out on purpose: a value model, a learned reward model, a second
copy of the weights as reference (the LoRA layers are taken out instead), importance sampling
correction (the same weights in the same dtype sample and train).
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from model import hidden_states

# Logits of one chunk of token_logps, in numbers: 64 MiB of float32.
LOGIT_BUDGET = 1 << 24


def sample_std(rewards: mx.array) -> mx.array:
    """The standard deviation of each row with ddof 1, as PyTorch's; 0 for a row of one. (P, G) → (P,)."""
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    return mx.sqrt((centred**2).sum(axis=1) / max(rewards.shape[1] - 1, 1))


def group_advantages(rewards, scale: str = "group") -> mx.array:
    """A = (r - mean of its group) / (std + 1e-4), with TRL's sample standard deviation (ddof 1).

    Args:
        rewards: (P, G), one row a prompt.
        scale: "group" divides by the group's std, "batch" by that of all rewards, "none" by nothing.

    Returns:
        (P, G) float32. A group of equal rewards, or of one, has advantages 0.
    """
    rewards = mx.array(rewards, dtype=mx.float32)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if scale == "none":
        return centred
    if scale == "group":
        deviation = sample_std(rewards)[:, None]
    elif scale == "batch":
        deviation = sample_std(rewards.reshape(1, -1))
    else:
        raise ValueError(f"scale {scale!r}: expected group, batch or none")
    return centred / (deviation + 1e-4)


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


def grpo_loss(
    logps: mx.array,
    mask: mx.array,
    advantages: mx.array,
    *,
    old_logps: mx.array | None = None,
    ref_logps: mx.array | None = None,
    beta: float = 0.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    loss_type: str = "dapo",
    level: str = "token",
    normalizer: float | mx.array | None = None,
    max_completion_length: int | None = None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """The clipped surrogate with a k3 penalty towards the reference.

        ρ = exp(ℓ - ℓ_old), or the exponential of its masked mean over the sequence
        L = -min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A) + β (exp(ℓ_ref - ℓ) - (ℓ_ref - ℓ) - 1)

    Args:
        logps: (B, T) ℓ of the completion tokens.
        mask: (B, T), 1 up to and including the end token, 0 on padding.
        advantages: (B,).
        old_logps: (B, T) ℓ at sampling time; None when the rollout is used once (ρ is then 1).
        ref_logps: (B, T) ℓ of the reference; needed when beta is above 0.
        loss_type: how L is averaged: "grpo" per sequence, then over sequences; "bnpo" over the
            active tokens of this batch; "dr_grpo" over B × max_completion_length; "dapo" over
            `normalizer`.
        level: "token" or "sequence", the level of ρ.
        normalizer: dapo's active tokens of the whole generation batch; None takes this batch's.
        max_completion_length: dr_grpo's constant; None takes T.

    Returns:
        The loss, and sums over active tokens for metrics: "tokens", "kl", "clip_low", "clip_high".

    Raises:
        ValueError: an unknown loss_type or level, or beta without ref_logps.
    """
    mask = mask.astype(mx.float32)
    length = mx.maximum(mask.sum(axis=1), 1.0)  # (B,)
    # Padding may hold anything, infinities too: it must not reach exp, nor 0 × inf the sum.
    active = mask > 0
    logps = mx.where(active, logps.astype(mx.float32), 0.0)
    old = mx.stop_gradient(logps) if old_logps is None else mx.where(active, old_logps, 0.0)
    log_ratio = logps - old
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(axis=1) / length)[:, None]  # (B, 1)
    elif level != "token":
        raise ValueError(f"level {level!r}: expected token or sequence")

    ratio = mx.exp(log_ratio)
    clipped = mx.clip(ratio, 1.0 - epsilon_low, 1.0 + epsilon_high)
    gain = advantages.astype(mx.float32)[:, None]  # (B, 1)
    per_token = -mx.minimum(ratio * gain, clipped * gain) * mask  # (B, T)

    low = (ratio < 1.0 - epsilon_low) & (gain < 0)
    high = (ratio > 1.0 + epsilon_high) & (gain > 0)
    stats = {
        "tokens": mask.sum(),
        "clip_low": (low * mask).sum(),
        "clip_high": (high * mask).sum(),
        "kl": mx.array(0.0),
    }
    if beta:
        if ref_logps is None:
            raise ValueError("beta is above 0: ref_logps are needed")
        gap = mx.where(active, ref_logps, 0.0) - logps
        kl = (mx.exp(gap) - gap - 1.0) * mask
        per_token = per_token + beta * kl
        stats["kl"] = kl.sum()

    if loss_type == "grpo":
        loss = (per_token.sum(axis=1) / length).mean()
    elif loss_type == "bnpo":
        loss = per_token.sum() / mx.maximum(mask.sum(), 1.0)
    elif loss_type == "dr_grpo":
        width = max_completion_length or logps.shape[1]
        loss = per_token.sum() / (logps.shape[0] * width)
    elif loss_type == "dapo":
        loss = per_token.sum() / mx.maximum(mask.sum() if normalizer is None else normalizer, 1.0)
    else:
        raise ValueError(f"loss_type {loss_type!r}: expected grpo, bnpo, dr_grpo or dapo")
    return loss, {name: mx.stop_gradient(value) for name, value in stats.items()}


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
