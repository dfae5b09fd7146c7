"""GRPO: sample groups of completions, score them, and follow the clipped policy gradient.

    python train.py grpo

The policy starts as the SFT model with a new LoRA adapter. Left out: a value model, a learned
reward model, several update algorithms. One file has the loop (this one); loss.py has the formulas,
rollout.py the completions, rewards.py what is optimised.
"""

import random
import time
from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from expander.config import Config, Grpo
from expander.model import (
    adapters_are_zero,
    adapters_off,
    copy_adapters,
    end_token,
    load_chain,
    load_tokenizer,
)
from expander.queries import write_query_digests
from expander.train import distributed
from expander.train.inputs import (
    Prompt,
    read_rows,
    report_memory,
    sft_adapter,
    sft_chain,
    split_prompts,
)
from expander.train.judged import Judge, judged_rows
from expander.train.logps import completion_logps
from expander.train.logs import log_samples
from expander.train.loss import grpo_loss
from expander.train.optim import AdamW
from expander.train.rewards import RETRIEVAL, set_rewards
from expander.train.rollout import (
    Rollout,
    active_tokens,
    advantages,
    batch_share,
    complete,
    credit_lines,
    group_metrics,
    rank_batches,
    sample,
    set_advantages,
    set_logps,
    stack,
)
from expander.train.run import Evaluation, Run, check_output, total_steps

# Nats per token; single steps of the default recipe reach 0.6 on the small model it was measured on.
RUNAWAY_KL = 1.0


def prompts_per_step(config: Config) -> int:
    """The number of prompts whose groups make up one step.

    Raises:
        ValueError: a step's completions are not a multiple of the group size.
    """
    training, group = config.training, config.grpo.num_generations
    prompts, remainder = divmod(training.batch_size * training.gradient_accumulation_steps, group)
    if remainder or not prompts:
        raise ValueError(
            f"training.batch_size x gradient_accumulation_steps ({training.batch_size} x "
            f"{training.gradient_accumulation_steps} completions per step) must be a multiple of "
            f"grpo.num_generations ({group})"
        )
    return prompts


class PromptOrder:
    """The prompts of each step: each prompt once per epoch, in an order that depends on the seed and
    the epoch only."""

    def __init__(self, prompts: Sequence[Prompt], config: Config):
        self.prompts, self.seed = prompts, config.training.seed
        self.per_step = prompts_per_step(config)
        self.steps_per_epoch = -(-len(prompts) // self.per_step)

    def __getitem__(self, step: int) -> list[Prompt]:
        """The prompts of a 0-based step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = list(range(len(self.prompts)))
        random.Random(f"{self.seed}:{epoch}").shuffle(order)
        first = position * self.per_step
        return [self.prompts[i] for i in order[first : first + self.per_step]]


def batch_loss(
    model: nn.Module,
    batch: Sequence[Rollout],
    settings: Grpo,
    temperature: float,
    active: int,
    share: float,
) -> tuple[mx.array, dict[str, mx.array]]:
    """The part of the step's loss that one micro-batch adds, and sums over its tokens.

    Args:
        active: tokens in the loss of the whole step.
        share: weight of this micro-batch (`batch_share`).
    """
    logps, mask, entropy = completion_logps(
        model,
        [r.prompt for r in batch],
        [r.tokens for r in batch],
        temperature,
        with_entropy=True,
    )
    if settings.mask_truncated:
        mask = mask * mx.array([[int(r.finished)] for r in batch])
    width = mask.shape[1]
    old = stack([r.old_logps for r in batch], width)
    ref = stack([r.ref_logps for r in batch], width)
    if ref is None:  # the policy that sampled the completions is the reference
        ref = mx.stop_gradient(logps) if old is None else old
    loss, stats = grpo_loss(
        logps,
        mask,
        advantages(batch, width),
        old_logps=old,
        ref_logps=ref,
        beta=settings.beta,
        epsilon_low=settings.epsilon_low,
        epsilon_high=settings.epsilon_high,
        loss_type=settings.loss_type,
        level=settings.level,
        normalizer=active,
        max_completion_length=settings.max_completion_length,
    )
    stats["entropy"] = (entropy * mask).sum()
    return loss * share, stats


def policy_gradient(
    model: nn.Module,
    batches: Sequence[Sequence[Rollout]],
    rollouts: Sequence[Rollout],
    config: Config,
) -> tuple[dict, dict[str, float]]:
    """The gradient of the loss of all rollouts at once, summed over micro-batches and ranks.

    Returns:
        The gradient, and the sums over active tokens of `grpo_loss` and of the entropy.
    """
    settings = config.grpo
    value_and_grad = nn.value_and_grad(model, partial(batch_loss, model))
    active = active_tokens(rollouts, settings.mask_truncated)
    gradient = tree_map(mx.zeros_like, model.trainable_parameters())
    sums = dict.fromkeys(("tokens", "kl", "entropy", "clip_low", "clip_high"), 0.0)
    found: list[dict[str, mx.array]] = []
    model.train()
    for batch in batches:
        share = batch_share(batch, rollouts, settings.loss_type, settings.mask_truncated)
        (_, stats), part = value_and_grad(
            batch, settings, config.generation.temperature, active, share
        )
        # Wait for the last micro-batch only now, when the next is ready to be submitted: the device
        # does not wait for Python, and memory holds the activations of one.
        mx.eval(gradient)
        gradient = tree_map(mx.add, gradient, part)
        found.append(stats)
        mx.async_eval(gradient, stats)
    for stats in found:
        sums = {name: value + stats[name].item() for name, value in sums.items()}
    mx.eval(gradient)
    parts = distributed.gather(sums)
    return distributed.all_sum(gradient), {name: sum(part[name] for part in parts) for name in sums}


def update(
    model: nn.Module,
    optimizer: AdamW,
    batches: Sequence[Sequence[Rollout]],
    rollouts: Sequence[Rollout],
    config: Config,
) -> dict[str, float]:
    """`grpo.num_iterations` optimiser updates from one rollout; the sums of `policy_gradient`."""
    total: dict[str, float] = {}
    for _ in range(config.grpo.num_iterations):
        gradient, sums = policy_gradient(model, batches, rollouts, config)
        optimizer.update(model, gradient)
        mx.eval(model.trainable_parameters(), optimizer.state)
        total = {name: total.get(name, 0.0) + value for name, value in sums.items()}
    return total


def step_metrics(
    rollouts: Sequence[Rollout], sums: dict[str, float], optimizer: AdamW, group: int
) -> dict[str, float]:
    """The metrics of one step, by TRL's names where it has them."""
    tokens = max(sums["tokens"], 1.0)
    return {
        **group_metrics(rollouts, group),
        "kl": sums["kl"] / tokens,
        "entropy": sums["entropy"] / tokens,
        "clip_ratio/low_mean": sums["clip_low"] / tokens,
        "clip_ratio/high_mean": sums["clip_high"] / tokens,
        "grad_norm": optimizer.state["grad_norm"].item(),
        "learning_rate": optimizer.learning_rate.item(),
    }


def warn_of_collapse(run: Run, record: dict[str, float], warned: set[str]) -> None:
    """Warn, once each, about what ruins a GRPO run.

    Args:
        warned: the warnings given so far; the new ones are added.
    """
    length = record["completions/mean_length"]
    first_length = run.progress.notes.setdefault("first_length", length)
    troubles = {
        "the KL to the SFT model is running away: lower training.learning_rate or raise grpo.beta": (
            record["kl"] > RUNAWAY_KL
        ),
        "every group has equal rewards, so nothing is learnt: raise grpo.num_generations or "
        "generation.temperature": record["frac_reward_zero_std"] == 1.0,
        "every completion was cut off: raise grpo.max_completion_length, or train SFT for longer": (
            record["completions/clipped_ratio"] == 1.0
        ),
        "completions are under a third of their first length: look at samples.jsonl and "
        "grpo.penalties": length < first_length / 3,
    }
    for trouble, present in troubles.items():
        if present and trouble not in warned:
            warned.add(trouble)
            distributed.warn(f"step {run.step}: {trouble}")


def evaluate(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[Prompt],
    config: Config,
    end: int,
    judge: Judge | None = None,
) -> Evaluation:
    """Score greedy completions of the held-out prompts.

    The mean reward chooses the best adapter: the rubric by itself would prefer what the penalties
    are there to prevent.
    """
    model.eval()
    rollouts = complete(model, tokenizer, prompts, config, end=end)
    set_rewards(rollouts, config.grpo, judge)
    reward = sum(r.reward for r in rollouts) / len(rollouts)
    score = 100 * sum(r.rubric for r in rollouts) / len(rollouts)
    truncated = sum(not r.finished for r in rollouts) / len(rollouts)
    metrics = {"eval_reward": reward, "eval_score": score, "eval_truncated": truncated}
    line = f"held-out {score:.1f}%, reward {reward:.3f}"
    if judge:
        metrics["eval_gain"] = sum(r.finding.gain for r in rollouts) / len(rollouts)
        line += f", gain {metrics['eval_gain']:+.4f}"
    return Evaluation(reward, metrics, line)


def train_grpo(config: Config, resume: bool, overwrite: bool) -> None:
    """Run `python train.py grpo`: from the SFT adapter to outputs/grpo."""
    settings, training, group = config.grpo, config.training, config.grpo.num_generations
    prompts_per_step(config)
    sft = sft_adapter(config)
    check_output(config)
    judge = None
    if settings.reward == RETRIEVAL:
        rows, judge = judged_rows(config)
    else:
        rows = read_rows(config)
    chain = sft_chain(config)
    tokenizer = load_tokenizer(chain.path)
    end = end_token(tokenizer)
    prompts, held_out = split_prompts(rows, config, tokenizer)
    order = PromptOrder(prompts, config)
    run = Run(config, "grpo", total_steps(config, order.steps_per_epoch), resume, overwrite)
    report_memory("grpo", config, chain, max(len(ids) for _, ids in prompts))
    pinned = [prompts, held_out]
    if judge:
        pinned.append(judge.bare())  # another document, or another vector, would change it
    run.pin_inputs(
        model=(f"model.sft {sft} or its base", chain.describe() | chain.base_hashes()),
        data=(f"the data of {config.dataset.name}", pinned),
    )

    mx.random.seed(training.seed)
    model, _ = load_chain(chain, fuse_last=True)
    adapter_config, optimizer = run.add_adapter(model)
    evaluation = None
    if held_out:
        evaluation = partial(evaluate, model, tokenizer, held_out, config, end, judge)
    warned: set[str] = set()
    print(
        f"GRPO from {sft}: {len(prompts)} prompts, {run.total} steps of {order.per_step} x {group} "
        f"completions, {mx.default_device()}"
    )
    with run:
        if evaluation and run.step == 0:
            found, best = run.evaluate(evaluation, model)
            run.log(found.metrics)
            run.say(f"{found.line}{' (best)' if best else ''}  (the SFT model)")
        while not run.finished:
            started = time.monotonic()
            step = run.step
            run.begin_step()
            # 1. Sample a group of completions for each prompt.
            rollouts = sample(model, tokenizer, order[step], config, step=step, end=end)
            sampled = time.monotonic()
            # 2. Score them. 3. Compare each with its group.
            set_rewards(rollouts, settings, judge)
            set_advantages(rollouts, group, settings.scale_rewards)
            if settings.credit == "line":
                credit_lines(rollouts, tokenizer, judge, settings.retrieval.gain)
            batches = rank_batches(rollouts, config)
            scored = time.monotonic()
            # 4. Reference log-probabilities: the same model with the adapter off. A new adapter is
            # zero, and its policy the reference itself.
            if settings.beta and not adapters_are_zero(model):
                with adapters_off(model):
                    set_logps(model, batches, config.generation.temperature, "ref_logps")
            if settings.num_iterations > 1:
                set_logps(model, batches, config.generation.temperature, "old_logps")
            referenced = time.monotonic()
            # 5. Follow the policy gradient.
            sums = update(model, optimizer, batches, rollouts, config)
            ended = time.monotonic()

            record = step_metrics(rollouts, sums, optimizer, group) | {
                "epoch": round(run.step / order.steps_per_epoch, 4),
                "rollout_seconds": referenced - started,
                "reward_seconds": scored - sampled,
                "update_seconds": ended - referenced,
                "tokens_per_second": sum(len(r.tokens) for r in rollouts) / (ended - started),
            }
            warn_of_collapse(run, record, warned)
            if run.step == 1 or run.evaluation_due:
                log_samples(run.folder, run.step, rollouts, group)
            run.finish_step(
                record,
                f"reward {record['reward']:.3f} ± {record['reward_std']:.3f}  "
                f"kl {record['kl']:.4f}  length {record['completions/mean_length']:.0f}",
                model,
                optimizer,
                sources=sorted({repr(r.query) for r in rollouts}),
                evaluate=evaluation,
            )

    if not distributed.is_main():
        return
    copy_adapters(chain, run.folder / "sft")
    write_query_digests(run.folder, [query for query, _ in prompts])
    run.finish(
        model,
        adapter_config | {"stage": "grpo", "parent": "sft"},
        {
            "prompts": len(prompts),
            "languages": rows.languages,
            "held_out_prompts": len(held_out),
            "best_is": "highest held-out reward" if held_out else "the last step",
        },
    )
    best_step = run.progress.best_step
    if held_out and best_step == 0:
        print("no step beat the SFT model on the held-out queries: the result is the SFT model")
    else:
        print(f"{run.folder}: adapter of step {best_step or run.step}")
    print(f"next: python eval.py --model {run.folder}")
