"""Rollouts: completions sampled in groups, scored, and batched for the update.

Every function here takes and returns the rollouts of the whole step; ranks divide the work among
themselves and exchange the results.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from expander.config import Config
from expander.decode import TemperatureSampler, generate, random_keys
from expander.model import adapters_ready
from expander.train import distributed
from expander.train.inputs import Prompt
from expander.train.judged import Finding, Judge
from expander.train.logps import completion_logps
from expander.train.loss import group_advantages, line_advantages, sample_std
from reward import LINE_TYPES, parse_expansion


@dataclass
class Rollout:
    """One sampled completion and what training knows about it."""

    query: str
    prompt: list[int]
    tokens: list[int]  # as sampled, the end token included
    finished: bool  # False: cut off at the token limit
    text: str
    rubric: float = 0.0  # the reported score, 0 to 1
    penalties: dict[str, float] = field(default_factory=dict)
    finding: Finding | None = None  # for grpo.reward retrieval: what its search finds
    reward: float = 0.0  # what is optimised: the base reward less the weighted penalties
    advantage: float = 0.0
    line_advantages: list[float] | None = None  # for grpo.credit line: one per token
    old_logps: mx.array | None = field(default=None, repr=False)  # (T,)
    ref_logps: mx.array | None = field(default=None, repr=False)  # (T,); None: the policy's own


def sample(
    model: nn.Module, tokenizer, prompts: Sequence[Prompt], config: Config, *, step: int, end: int
) -> list[Rollout]:
    """`grpo.num_generations` completions per prompt, in the order of the prompts.

    The random numbers of a completion depend on the seed, the step and its index only, so any
    number of ranks samples the same completions.

    Args:
        step: 0-based optimiser step.
        end: the id of the end token.
    """
    group = config.grpo.num_generations
    names = [f"{step} {i}" for i in range(len(prompts) * group)]
    keys = random_keys(names, config.training.seed).reshape(-1, group, 2)
    sampler = TemperatureSampler(
        config.generation.temperature, distributed.share_out(keys).reshape(-1, 2)
    )
    model.eval()
    return complete(model, tokenizer, prompts, config, end=end, samples=group, sampler=sampler)


def complete(
    model: nn.Module, tokenizer, prompts: Sequence[Prompt], config: Config, *, end: int, **options
) -> list[Rollout]:
    """Completions of (query, prompt ids) pairs; greedy and one per prompt unless `options`
    (`samples` and `sampler` of `generate`) say otherwise."""
    prompts = distributed.share_out(prompts)
    with adapters_ready(model):
        completions = generate(
            model,
            [ids for _, ids in prompts],
            max_tokens=config.grpo.max_completion_length,
            end=end,
            batch_size=config.grpo.rollout_batch_size,
            **options,
        )
    repeated = [prompt for prompt in prompts for _ in range(options.get("samples", 1))]
    rollouts = [
        Rollout(query, ids, c.tokens, c.finished, c.text(tokenizer))
        for (query, ids), c in zip(repeated, completions, strict=True)
    ]
    return [Rollout(**r) for r in distributed.collect(list(map(dataclasses.asdict, rollouts)))]


def set_advantages(rollouts: Sequence[Rollout], group: int, scale: str) -> None:
    """Set each rollout's advantage from its reward and those of its group of `group` rollouts."""
    rewards = mx.array([r.reward for r in rollouts]).reshape(-1, group)
    advantages = group_advantages(rewards, scale).flatten().tolist()
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        rollout.advantage = advantage


def line_numbers(tokens: Sequence[int], tokenizer) -> list[int]:
    """The line of each token, from 0; a token that ends a line belongs to it."""
    numbers, line = [], 0
    for token in tokens:
        numbers.append(line)
        line += tokenizer.decode([token]).count("\n")
    return numbers


def credit_lines(rollouts: Sequence[Rollout], tokenizer, judge: Judge, weight: float) -> None:
    """Set each token's advantage: its completion's, plus its line's own contribution.

    Args:
        weight: of the gain in the reward, which contributions are parts of.
    """
    deviation = sample_std(mx.array([[r.reward for r in rollouts]])).item()
    for r in rollouts:
        parts = [weight * part for part in judge.contributions(r.query, r.text)]
        lines = line_numbers(r.tokens, tokenizer)
        r.line_advantages = line_advantages(r.advantage, parts, lines, deviation)


def micro_batches(rollouts: Sequence[Rollout], tokens: int) -> list[list[Rollout]]:
    """Batches of rollouts, each of at most `tokens` with padding (or one row).

    Either of similar length, or prompt by prompt and of similar length, whichever makes the model
    compute fewer tokens: rows of one length need no padding, rows of one prompt share it.
    """
    longest: dict[tuple[int, ...], int] = {}
    for r in rollouts:
        prompt = tuple(r.prompt)
        longest[prompt] = max(longest.get(prompt, 0), len(r.tokens))

    def by_prompt(r: Rollout) -> tuple:
        prompt = tuple(r.prompt)
        return longest[prompt], prompt, len(r.tokens)

    by_length = _fill(sorted(rollouts, key=lambda r: len(r.tokens)), tokens)
    return min(by_length, _fill(sorted(rollouts, key=by_prompt), tokens), key=computed_tokens)


def _fill(rollouts: Sequence[Rollout], tokens: int) -> list[list[Rollout]]:
    """Micro-batches of consecutive rollouts."""
    batches: list[list[Rollout]] = []
    width = 0
    for rollout in rollouts:
        width = max(width, len(rollout.tokens))
        if batches and (len(batches[-1]) + 1) * width <= tokens:
            batches[-1].append(rollout)
        else:
            batches.append([rollout])
            width = len(rollout.tokens)
    return batches


def computed_tokens(batches: Sequence[Sequence[Rollout]]) -> int:
    """The tokens of all prompts and completions that the model computes, with padding."""
    total = 0
    for batch in batches:
        prompts = {tuple(r.prompt) for r in batch}
        total += len(prompts) * max(map(len, prompts))
        total += len(batch) * max(len(r.tokens) for r in batch)
    return total


def rank_batches(rollouts: Sequence[Rollout], config: Config) -> list[list[Rollout]]:
    """This rank's micro-batches of the rollouts that have a gradient.

    `training.batch_size` completions of full length fit into memory; of shorter ones, more do.
    """
    # Without a KL term, a completion that scores as its group has no gradient.
    useful = [
        r for r in rollouts if config.grpo.beta or r.advantage or any(r.line_advantages or ())
    ]
    tokens = config.training.batch_size * config.grpo.max_completion_length
    return micro_batches(distributed.share_out(useful), tokens)


def set_logps(
    model: nn.Module, batches: Sequence[Sequence[Rollout]], temperature: float, name: str
) -> None:
    """Set `name` ("ref_logps" or "old_logps") of every rollout from the model as it is now.

    old_logps are computed exactly as the update computes its log-probabilities: in bfloat16 another
    order of operations would by itself move one ratio in twenty across the clipping range.
    """
    as_in_update = name == "old_logps"
    last = []
    for batch in batches:
        prompts, completions = [r.prompt for r in batch], [r.tokens for r in batch]
        logps, _, _ = completion_logps(
            model,
            prompts,
            completions,
            temperature,
            with_entropy=as_in_update,
            with_gradient=as_in_update,
        )
        mx.eval(last)  # as in policy_gradient: the next batch is ready when the last is waited for
        mx.async_eval(logps)
        last = [logps]
        for rollout, row in zip(batch, logps, strict=True):
            setattr(rollout, name, row[: len(rollout.tokens)])
    mx.eval(last)


def stack(rows: Sequence[mx.array | None], width: int) -> mx.array | None:
    """(T_i,) arrays as one (B, width), padded with 0; None if the first is None."""
    if rows[0] is None:
        return None
    return mx.stack([mx.pad(row, (0, width - row.size)) for row in rows])


def advantages(batch: Sequence[Rollout], width: int) -> mx.array:
    """The advantages of a batch: (B,), or (B, width) with `grpo.credit` line."""
    if batch[0].line_advantages is None:
        return mx.array([r.advantage for r in batch])
    return stack([mx.array(r.line_advantages) for r in batch], width)


def active_tokens(rollouts: Sequence[Rollout], mask_truncated: bool) -> int:
    """The number of tokens in the loss; those of truncated completions count unless masked."""
    return sum(len(r.tokens) for r in rollouts if r.finished or not mask_truncated)


def batch_share(
    batch: Sequence[Rollout], rollouts: Sequence[Rollout], loss_type: str, mask_truncated: bool
) -> float:
    """The weight with which micro-batch losses sum to the loss of all rollouts at once."""
    if loss_type == "dapo":
        return 1.0  # its normalizer counts the whole batch already
    if loss_type == "bnpo":
        active = active_tokens(rollouts, mask_truncated)
        return active_tokens(batch, mask_truncated) / max(active, 1)
    return len(batch) / len(rollouts)


def group_metrics(rollouts: Sequence[Rollout], group: int) -> dict[str, float]:
    """Rewards, lengths and diversity of one step's rollouts, by TRL's names where it has them."""
    rewards = mx.array([r.reward for r in rollouts]).reshape(-1, group)
    spread = sample_std(rewards)
    lengths = [len(r.tokens) for r in rollouts]
    lines = [parse_expansion(r.text) for r in rollouts]
    lines = [[text.lower() for kind in LINE_TYPES for text in p[kind]] for p in lines]
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
    if rollouts[0].finding:
        gains = [r.finding.gain for r in rollouts]
        metrics["rewards/gain"] = sum(gains) / len(gains)
        metrics["rewards/gain_better"] = sum(gain > 0 for gain in gains) / len(gains)
        metrics["rewards/gain_worse"] = sum(gain < 0 for gain in gains) / len(gains)
        missed = sum(r.finding.lex_without_hit for r in rollouts)
        metrics["rewards/lex_without_hit"] = missed / len(rollouts)
    for name in rollouts[0].penalties:
        metrics[f"penalties/{name}"] = sum(r.penalties[name] for r in rollouts) / len(rollouts)
    return metrics
