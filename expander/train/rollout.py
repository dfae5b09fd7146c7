"""Sampled completions: drawn in groups, measured, batched for the update."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from expander.config import Grpo
from expander.decode import Completion, TemperatureSampler, generate
from expander.train import distributed
from expander.train.loss import sample_std
from expander.train.rewards import PENALTIES
from reward import parse_expansion, score_expansion, score_expansion_detailed


class RewardError(ValueError):
    """The reward of a completion could not be computed."""


@dataclass
class Rollout:
    """One sampled completion with everything that training needs to know of it."""

    query: str
    prompt: list[int]
    tokens: list[int]  # as sampled, the end token included
    finished: bool  # False: cut off at the limit
    text: str
    rubric: float = 0.0  # what is reported
    penalties: dict[str, float] = field(default_factory=dict)
    reward: float = 0.0  # what is optimised: the rubric less the weighted penalties
    advantage: float = 0.0
    old_logps: mx.array | None = field(default=None, repr=False)  # (T,)
    ref_logps: mx.array | None = field(default=None, repr=False)  # (T,)


def roll_out(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[tuple[str, list[int]]],
    *,
    keys: np.ndarray,
    max_tokens: int,
    temperature: float,
    end: int,
    batch_size: int,
) -> list[Rollout]:
    """Completions of each (query, prompt ids) pair, in the order of the pairs.

    Args:
        keys: (P, G, 2), a random key for each of the G completions of each pair.
    """
    completions = generate(
        model,
        [ids for _, ids in prompts],
        samples=keys.shape[1],
        max_tokens=max_tokens,
        end=end,
        sampler=TemperatureSampler(temperature, keys.reshape(-1, 2)),
        batch_size=batch_size,
    )
    repeated = [pair for pair in prompts for _ in range(keys.shape[1])]
    return _rollouts(repeated, completions, tokenizer)


def _rollouts(
    prompts: Sequence[tuple[str, list[int]]], completions: Sequence[Completion], tokenizer
) -> list[Rollout]:
    """Each (query, prompt ids) pair with its completion."""
    return [
        Rollout(query, ids, c.tokens, c.finished, c.text(tokenizer))
        for (query, ids), c in zip(prompts, completions, strict=True)
    ]


def exchange(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts of all ranks, on each of them, in the order of the prompts."""
    return [Rollout(**r) for r in distributed.collect(list(map(dataclasses.asdict, rollouts)))]


def set_rewards(rollouts: Sequence[Rollout], settings: Grpo) -> None:
    """Set rubric, penalties and reward of every rollout; penalties of weight 0 are not computed.

    Raises:
        RewardError: the rubric or a penalty failed.
    """
    weights = {name: w for name, w in dataclasses.asdict(settings.penalties).items() if w}
    for r in rollouts:
        try:
            r.rubric = score_expansion_detailed(r.query, r.text)["percentage"] / 100
            base = r.rubric if settings.reward == "percentage" else score_expansion(r.query, r.text)
            r.penalties = {name: PENALTIES[name](r.query, r.text, r.finished) for name in weights}
        except Exception as error:  # a rubric changed for a project of its own may raise any
            raise RewardError(
                f"the reward of query {r.query!r}, completion {r.text!r}, failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        r.reward = base - sum(weights[name] * amount for name, amount in r.penalties.items())


def micro_batches(rollouts: Sequence[Rollout], tokens: int) -> list[list[Rollout]]:
    """Batches of rollouts of like length, each of at most `tokens` with its padding (or one row)."""
    batches: list[list[Rollout]] = []
    for rollout in sorted(rollouts, key=lambda r: len(r.tokens)):
        # Sorted: this row is the longest so far and sets the width.
        if batches and (len(batches[-1]) + 1) * len(rollout.tokens) <= tokens:
            batches[-1].append(rollout)
        else:
            batches.append([rollout])
    return batches


def batch_share(
    batch: Sequence[Rollout], rollouts: Sequence[Rollout], loss_type: str, mask_truncated: bool
) -> float:
    """The weight that makes the micro-batches' losses sum to the loss of all rollouts at once."""
    if loss_type == "dapo":
        return 1.0  # its normalizer counts the whole batch already
    if loss_type == "bnpo":
        active = active_tokens(rollouts, mask_truncated)
        return active_tokens(batch, mask_truncated) / max(active, 1)
    return len(batch) / len(rollouts)


def active_tokens(rollouts: Sequence[Rollout], mask_truncated: bool) -> int:
    """The tokens in the loss: those of cut-off completions count unless they are masked."""
    return sum(len(r.tokens) for r in rollouts if r.finished or not mask_truncated)


def group_metrics(rollouts: Sequence[Rollout], group: int) -> dict[str, float]:
    """What one rollout says of the policy, by TRL's names where it has one."""
    rewards = mx.array([r.reward for r in rollouts]).reshape(-1, group)
    spread = sample_std(rewards)
    lengths = [len(r.tokens) for r in rollouts]
    lines = [parse_expansion(r.text) for r in rollouts]
    lines = [[text.lower() for kind in ("lex", "vec", "hyde") for text in p[kind]] for p in lines]
    metrics = {
        "reward": rewards.mean().item(),
        "reward_std": spread.mean().item(),
        "frac_reward_zero_std": sum(s < 1e-8 for s in spread.tolist()) / len(spread),
        "rewards/rubric": sum(r.rubric for r in rollouts) / len(rollouts),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": sum(not r.finished for r in rollouts) / len(rollouts),
        "distinct_lines": sum(len(set(x)) for x in lines) / max(sum(map(len, lines)), 1),
        "quote_rate": sum('"' in r.text for r in rollouts) / len(rollouts),
    }
    for name in rollouts[0].penalties:
        metrics[f"penalties/{name}"] = sum(r.penalties[name] for r in rollouts) / len(rollouts)
    return metrics


def score_greedily(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[tuple[str, list[int]]],
    settings: Grpo,
    end: int,
) -> dict[str, float]:
    """Means over greedy completions of (query, ids) pairs: "reward" (what is optimised, 0 to 1),
    "score" (the rubric's percentage) and "truncated" (the share cut off at the limit).

    The ranks share the pairs out.
    """
    model.eval()
    prompts = distributed.share_out(prompts)
    limit = settings.max_completion_length
    completions = generate(model, [ids for _, ids in prompts], max_tokens=limit, end=end)
    rows = _rollouts(prompts, completions, tokenizer)
    set_rewards(rows, settings)
    rows = exchange(rows)
    return {
        "reward": sum(r.reward for r in rows) / len(rows),
        "score": 100 * sum(r.rubric for r in rows) / len(rows),
        "truncated": sum(not r.finished for r in rows) / len(rows),
    }
