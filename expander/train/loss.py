"""The GRPO loss and its advantages: arrays in, arrays out.

The formulas are TRL's forms of GRPO (Shao et al. 2024, arXiv:2402.03300), Dr. GRPO (Liu et al. 2025,
arXiv:2503.20783), DAPO (Yu et al. 2025, arXiv:2503.14476) and, for level="sequence", GSPO (Zheng et
al. 2025, arXiv:2507.18071). Left out on purpose: a value model, a learned reward model, a second
copy of the weights as the reference (the LoRA layers are switched off instead), and importance
sampling correction (sampling and training use the same weights in the same dtype).
"""

from collections.abc import Sequence

import mlx.core as mx


def sample_std(rewards: mx.array) -> mx.array:
    """The standard deviation of each row, (P, G) → (P,), with ddof 1 as in PyTorch; 0 if G is 1."""
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    return mx.sqrt((centred**2).sum(axis=1) / max(rewards.shape[1] - 1, 1))


def group_advantages(rewards, scale: str = "group") -> mx.array:
    """A = (r - mean of its group) / (std + 1e-4), with TRL's sample standard deviation (ddof 1).

    Args:
        rewards: (P, G), one row per prompt.
        scale: "group" divides by the std of the group, "batch" by the std of all rewards, "none" does
            not divide.

    Returns:
        (P, G) float32. Equal rewards, or a group of one, give advantages of 0.

    Raises:
        ValueError: an unknown scale.
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


def line_advantages(
    advantage: float, contributions: Sequence[float], lines: Sequence[int], deviation: float
) -> list[float]:
    """The advantage of each token: its completion's, plus its line's contribution.

    A completion is several searches, and one bad line spoils the others. A contribution is what the
    reward would lose without the line; divided by the deviation of the rewards, it is in the units of
    the advantage.

    Args:
        contributions: one per line, in units of the reward.
        lines: the line of each token, from 0.
        deviation: standard deviation of the rewards of the step; 0 leaves contributions out.

    >>> line_advantages(1.0, [0.2, -0.4], [0, 0, 1], 0.4 - 1e-4)
    [1.5, 1.5, 0.0]
    """
    if not deviation:
        return [advantage] * len(lines)
    parts = [part / (deviation + 1e-4) for part in contributions]
    # A token after the last line, such as the end token, has no line of its own.
    return [advantage + (parts[line] if line < len(parts) else 0.0) for line in lines]


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
    """The clipped surrogate objective with a k3 estimate of the KL to the reference.

        ρ = exp(ℓ - ℓ_old), or the exponential of its masked mean over the sequence
        L = -min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A) + β (exp(ℓ_ref - ℓ) - (ℓ_ref - ℓ) - 1)

    Args:
        logps: (B, T) log-probabilities ℓ of the completion tokens.
        mask: (B, T), 1 up to and including the end token, 0 on padding.
        advantages: (B,), or (B, T) for one per token.
        old_logps: (B, T) ℓ at sampling time; None if the rollout is used once (ρ is then 1).
        ref_logps: (B, T) ℓ of the reference; required if beta is above 0.
        loss_type: how L is averaged: "grpo" within each sequence, then over sequences; "bnpo" over
            the active tokens of this batch; "dr_grpo" over B × max_completion_length; "dapo"
            over `normalizer`.
        level: "token" or "sequence", the level of ρ.
        normalizer: for dapo, the active tokens of the whole generation batch (default: this batch).
        max_completion_length: for dr_grpo (default: T).

    Returns:
        The loss, and sums over active tokens for metrics: "tokens", "kl", "clip_low", "clip_high".

    Raises:
        ValueError: an unknown loss_type or level, or beta without ref_logps.
    """
    mask = mask.astype(mx.float32)
    length = mx.maximum(mask.sum(axis=1), 1.0)  # (B,)
    # Padding may hold any value, even inf: keep it out of exp, and 0 × inf out of the sum.
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
    gain = advantages.astype(mx.float32)
    gain = gain if gain.ndim == 2 else gain[:, None]  # (B, 1) or (B, T)
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
            raise ValueError("beta is above 0, so ref_logps are required")
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
