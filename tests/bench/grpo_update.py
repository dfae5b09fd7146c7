"""What each saving in GRPO's update is worth: one update's passes, as plain as can be, then saving by saving.

By hand: python -m tests.bench.grpo_update --sft outputs/sft [--rows 'FILES.jsonl']

4 prompts x 8 completions are sampled once; every variant then does the reference pass and the forward and
backward passes of the same loss on them, in micro-batches of 8 rows. The gradients of all must agree.

    plain               whole sequences, the head and a log-softmax at every position, differentiated by MLX
    completions only    the head only where a completion token is predicted
    prompts once        a prompt's states computed once for its completions
    slope beside value  the head's gradient with its value, from one pass of exponentials, chunk by chunk
    sorted by length    micro-batches of rows of like length, as many as make up the same tokens
"""

import argparse
import time

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from expander import model as models
from expander.train.logps import completion_logps, completion_states, pad
from expander.train.loss import grpo_loss
from expander.train.rollout import Rollout, micro_batches, sample, stack
from tests.bench.grpo_rivals import ALPHA, BETA, GROUP, PROMPTS, RANK, load_policy
from tests.settings import default_config, section

ROWS, TEMPERATURE = 8, 1.0


def log_softmax_at(head, states: mx.array, targets: mx.array) -> mx.array:
    logits = head(states).astype(mx.float32)
    picked = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return picked - mx.logsumexp(logits, axis=-1)


def whole_sequences(model, rollouts: list[Rollout], head_everywhere: bool):
    """(logps, mask) of completions, each row computed with its prompt."""
    ids, _ = pad([r.prompt + r.tokens for r in rollouts])
    tokens, mask = pad([r.tokens for r in rollouts])
    starts = mx.array([len(r.prompt) - 1 for r in rollouts])[:, None]
    columns = mx.minimum(starts + mx.arange(tokens.shape[1]), ids.shape[1] - 2)
    states = models.hidden_states(model, ids[:, :-1])
    head = models.lm_head(model)
    if head_everywhere:
        logps = mx.take_along_axis(log_softmax_at(head, states, ids[:, 1:]), columns, axis=1)
        return logps, mask
    return at_completions(
        head, mx.take_along_axis(states, columns[..., None], axis=1), tokens, mask
    )


def at_completions(head, states: mx.array, tokens: mx.array, mask: mx.array):
    where = mx.array([i for i, m in enumerate(mask.flatten().tolist()) if m])
    flat = states.reshape(-1, states.shape[-1])[where]
    logps = log_softmax_at(head, flat, tokens.flatten()[where])
    return mx.zeros(mask.size).at[where].add(logps).reshape(mask.shape), mask


def prompts_once(model, rollouts: list[Rollout]):
    unique = list({tuple(r.prompt): None for r in rollouts})
    prompts, prompt_mask = pad(unique, left=True)
    owner = mx.array([unique.index(tuple(r.prompt)) for r in rollouts])
    tokens, mask = pad([r.tokens for r in rollouts])
    padding = prompts.shape[1] - prompt_mask.sum(axis=1)
    states = completion_states(model, prompts, padding, owner, tokens)
    return at_completions(models.lm_head(model), states, tokens, mask)


def ours(model, rollouts: list[Rollout], with_gradient: bool):
    prompts, completions = [r.prompt for r in rollouts], [r.tokens for r in rollouts]
    return completion_logps(model, prompts, completions, TEMPERATURE, with_gradient=with_gradient)[
        :2
    ]


def in_order(rollouts: list[Rollout]) -> list[list[Rollout]]:
    return [rollouts[i : i + ROWS] for i in range(0, len(rollouts), ROWS)]


VARIANTS = {
    "plain": (lambda m, r, _: whole_sequences(m, r, True), in_order),
    "completions only": (lambda m, r, _: whole_sequences(m, r, False), in_order),
    "prompts once": (lambda m, r, _: prompts_once(m, r), in_order),
    "slope beside value": (ours, in_order),
    "sorted by length": (ours, lambda rows: micro_batches(rows, longest(rows) * ROWS)),
}


def longest(rollouts: list[Rollout]) -> int:
    return max(len(r.tokens) for r in rollouts)


def update(model, batches: list[list[Rollout]], logps_of, active: int):
    """(seconds of the reference pass, of the forward and backward passes, gradient)."""
    started = time.perf_counter()
    with models.adapters_off(model):
        for batch in batches:
            logps, _ = logps_of(model, batch, False)
            mx.eval(logps)
            for r, row in zip(batch, logps, strict=True):
                r.ref_logps = row[: len(r.tokens)]
    middle = time.perf_counter()

    def loss_of(batch):
        logps, mask = logps_of(model, batch, True)
        return grpo_loss(
            logps,
            mask,
            mx.array([r.advantage for r in batch]),
            ref_logps=stack([r.ref_logps for r in batch], mask.shape[1]),
            beta=BETA,
            normalizer=active,
        )[0]

    gradient = tree_map(mx.zeros_like, model.trainable_parameters())
    for batch in batches:
        _, part = nn.value_and_grad(model, loss_of)(batch)
        gradient = tree_map(mx.add, gradient, part)
        mx.eval(gradient)
    flat = mx.concatenate([value.flatten() for _, value in tree_flatten(gradient)])
    return middle - started, time.perf_counter() - middle, flat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sft", required=True, help="an SFT adapter's folder")
    parser.add_argument("--rows", default="data/*.jsonl", help="a file, a folder or a glob")
    parser.add_argument("--tokens", type=int, default=120, help="limit of a completion, 120")
    parser.add_argument("--rounds", type=int, default=2, help="the best of so many counts, 2")
    arguments = parser.parse_args()
    config = default_config(
        model=section("model", sft=arguments.sft),
        dataset=section(
            "dataset",
            name=arguments.rows,
            eval_split=0.0,
            qmd_system_prompt_share=0.0,
            max_samples=PROMPTS,
        ),
        grpo=section(
            "grpo",
            num_generations=GROUP,
            max_completion_length=arguments.tokens,
            rollout_batch_size=PROMPTS * GROUP,
        ),
        lora=section("lora", rank=RANK, alpha=ALPHA),
        generation=section("generation", temperature=TEMPERATURE),
    )
    model, tokenizer, end, prompts = load_policy(config)
    model.eval()
    started = time.perf_counter()
    rollouts = sample(model, tokenizer, prompts, config, step=0, end=end)
    seconds = time.perf_counter() - started
    mx.random.seed(0)
    for r, advantage in zip(rollouts, mx.random.normal((len(rollouts),)).tolist(), strict=True):
        r.advantage = advantage
    active = sum(len(r.tokens) for r in rollouts)
    print(f"rollout: {active} tokens in {seconds:.1f} s, the longest {longest(rollouts)}")

    best: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    gradients: dict[str, mx.array] = {}
    for _ in range(arguments.rounds):
        for name, (logps_of, batched) in VARIANTS.items():
            mx.reset_peak_memory()
            *spent, gradients[name] = update(model, batched(rollouts), logps_of, active)
            best[name] = min(best.get(name, spent), spent, key=sum)
            peaks[name] = mx.get_peak_memory() / 1e9
    plain = gradients["plain"]
    print(f"{'':20}{'reference':>10}{'update':>10}{'of plain':>10}{'peak GB':>9}  gradient apart")
    for name, (reference, passes) in best.items():
        apart = (mx.linalg.norm(gradients[name] - plain) / mx.linalg.norm(plain)).item()
        share = (reference + passes) / sum(best["plain"])
        print(
            f"{name:20}{reference:9.1f}s{passes:9.1f}s{share:10.2f}{peaks[name]:9.2f}  {apart:.1e}"
        )


if __name__ == "__main__":
    main()
