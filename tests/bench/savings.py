"""What each saving of `train.py grpo` is worth: a step with all of them, without each, without any.

By hand: python -m tests.bench.savings --model outputs/sft

4 prompts x 8 completions of at most 64 tokens, from the SFT adapter with a fresh LoRA over it, as at a
run's first step. A saving is switched off by patching the function that makes it:

    fast exponential       off: MLX's own exp in SwiGLU and over the vocabulary
    prompts prefilled once off: every row of the rollout prefills its prompt
    LoRA made ready        off: rollouts scale (and cast) its matrices at every token
    prompts computed once  off: every row of the update computes its prompt
    no reference pass      off: computed although the new adapter is zero (step 1 only)
    rows sorted            off: packed into micro-batches in the order of sampling
    rows packed, sorted    off: training.batch_size rows per micro-batch, in the order of sampling
    next one built first   off: Python builds a token's or a micro-batch's graph while the device waits

The variants take turns, because other load on the machine changes the speed from minute to minute: at
every decoding step of one rollout, and at every micro-batch measured. The rollout that they share must
have the tokens of one with all savings; every variant's gradient must agree with that of all savings to
1e-4 of its norm. The tables use the mean of the lower half of the times: a rollout is its prefill and
as many steps as the longest completion has tokens, an update is its number of micro-batches, of which
every --every-th is measured. Seconds are those of the CPU, of all threads; set
OPENBLAS_NUM_THREADS=1. Sorted and packed rows count in tokens that the update computes, with padding
and prompts. What is built first counts in the CPU seconds of the main thread: with a free core, that is
the time for which the device would wait.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.activations import swiglu

from expander import decode, fast_exp
from expander import model as models
from expander.config import Config, load_config
from expander.decode import Batch, Sampler, TemperatureSampler
from expander.lora import lora_layers
from expander.train import logps, rollout
from expander.train.grpo import batch_loss
from expander.train.optim import AdamW
from expander.train.rewards import set_rewards
from expander.train.rollout import (
    Rollout,
    active_tokens,
    batch_share,
    computed_tokens,
    rank_batches,
    sample,
    set_advantages,
    set_logps,
)
from tests.bench.grpo_rivals import GROUP, PROMPTS, load_policy

TOLERANCE = 1e-4

ON, OFF = "all on", "all off"
EXP, PREFILL, READY = "fast exponential", "prompts prefilled once", "LoRA made ready"
SHARED, REFERENCE = "prompts computed once", "no reference pass"
SORTED, PACKED = "rows sorted", "rows packed, sorted"
# Which variants can differ in a part.
PREFILLS, STEPS = (ON, EXP, READY, PREFILL, OFF), (ON, EXP, READY, OFF)
PASSES, REFERENCES = (ON, EXP, SHARED, OFF), (ON, OFF)

add, step, completion_states = Batch.add, Batch.step, logps.completion_states
draw, fill = TemperatureSampler.__call__, rollout._fill


def add_each(batch: Batch, rows, prompts, copies) -> None:
    """`Batch.add` that runs a prompt for every row."""
    repeated = [ids for ids, count in zip(prompts, copies, strict=True) for _ in range(count)]
    add(batch, rows, repeated, [1] * len(repeated))


def states_of_each(model, prompts, padding, rows, completions) -> mx.array:
    """`completion_states` that runs a prompt for every completion."""
    own = mx.arange(rows.size)
    return completion_states(model, prompts[rows], padding[rows], own, completions)


def in_order(rollouts: Sequence[Rollout], tokens: int, rows: int) -> list[list[Rollout]]:
    return [list(rollouts[first : first + rows]) for first in range(0, len(rollouts), rows)]


class Turns:
    """The CPU seconds of each part by variant, of which several take turns."""

    def __init__(self, model: nn.Module):
        self.model, self.layers = model, lora_layers(model)
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.python: dict[str, list[float]] = defaultdict(list)  # of the main thread, with all on
        self.peaks: dict[tuple[str, str], float] = defaultdict(float)  # GB

    @contextmanager
    def without(self, name: str) -> Iterator[None]:
        """Do without a saving, or without any."""
        with ExitStack() as stack:
            if name in (EXP, OFF):
                stack.enter_context(patch.object(fast_exp, "is_wanted", lambda: False))
                stack.enter_context(patch.object(fast_exp, "swiglu", swiglu))
            if name in (SHARED, OFF):
                stack.enter_context(patch.object(logps, "completion_states", states_of_each))
            yield

    @contextmanager
    def unready(self, name: str) -> Iterator[None]:
        """In a rollout, put LoRA's own layers back for the variants without ready ones."""
        if name not in (READY, OFF):
            yield
            return
        modules = dict(self.model.named_modules())
        now = [(layer, modules[layer]) for layer, _ in self.layers]
        with models._replaced(self.model, now, [layer for _, layer in self.layers]):
            yield

    def measure(self, part: str, name: str, run: Callable[[], object]):
        """The evaluated result of `run` without a saving."""
        with self.without(name):
            mx.synchronize()
            mx.reset_peak_memory()
            cpu, python = time.process_time(), time.thread_time()
            result = run()
            mx.eval(result)
            self.seconds[part, name].append(time.process_time() - cpu)
            if name == ON:
                self.python[part].append(time.thread_time() - python)
            self.peaks[part, name] = max(self.peaks[part, name], mx.get_peak_memory() / 1e9)
        return result

    def typical(self, part: str, name: str) -> float:
        """The mean of the lower half, with all on if the variant cannot differ."""
        return lower_half(self.seconds.get((part, name)) or self.seconds[part, ON])


def lower_half(seconds: Sequence[float]) -> float:
    return statistics.mean(sorted(seconds)[: max(1, len(seconds) // 2)])


def sample_in_turns(turns: Turns, run: Callable[[], list[Rollout]]) -> list[Rollout]:
    """A rollout in which the variants take turns, a decoding step each."""
    rng = random.Random(0)
    names = (name for _ in itertools.count() for name in rng.sample(STEPS, len(STEPS)))

    def add_in_turns(batch: Batch, rows, prompts, copies) -> None:
        for name in PREFILLS * 2:

            def prefill(add=add_each if name in (PREFILL, OFF) else add) -> mx.array:
                scratch = Batch(batch.model, Sampler())
                add(scratch, rows, prompts, copies)
                return scratch.tokens

            with turns.unready(name):
                turns.measure("prefill", name, prefill)
        add(batch, rows, prompts, copies)
        mx.eval(batch.tokens, batch.state)

    def step_in_turns(batch: Batch) -> None:
        name = next(names)

        def timed_draw(sampler, logits, state):
            mx.eval(logits)
            started = time.process_time()
            tokens, state = draw(sampler, logits, state)
            mx.eval(tokens, state)
            turns.seconds["sampling", name].append(time.process_time() - started)
            return tokens, state

        def run_step() -> list:
            step(batch)
            return [batch.tokens, batch.state]

        with turns.unready(name), patch.object(TemperatureSampler, "__call__", timed_draw):
            turns.measure("step", name, run_step)

    with (
        patch.object(decode.Batch, "add", add_in_turns),
        patch.object(decode.Batch, "step", step_in_turns),
    ):
        return run()


def update_in_turns(
    turns: Turns, batches: list[list[Rollout]], rollouts: list[Rollout], config: Config, every: int
) -> float:
    """Measure the passes of some micro-batches and the optimiser; the largest distance of gradients."""
    model, settings, temperature = turns.model, config.grpo, config.generation.temperature
    value_and_grad = nn.value_and_grad(model, partial(batch_loss, model))
    active = active_tokens(rollouts, settings.mask_truncated)
    largest = 0.0
    model.train()
    mx.eval(value_and_grad(batches[0], settings, temperature, active, 1.0)[1])  # a warm-up
    for batch in batches[::every]:
        share = batch_share(batch, rollouts, settings.loss_type, settings.mask_truncated)

        def gradient(name: str, batch=batch, share=share) -> mx.array:
            def run() -> list:
                (_, stats), part = value_and_grad(batch, settings, temperature, active, share)
                return [stats, part]

            return turns.measure("passes", name, run)[1]

        def reference(batch=batch) -> list:
            with models.adapters_off(model):
                set_logps(model, [batch], temperature, "ref_logps")
            return []

        found = {name: gradient(name) for name in PASSES if name != OFF}
        for name in REFERENCES:
            turns.measure("reference", name, reference)
        found[OFF] = gradient(OFF)  # with the reference
        for r in batch:
            r.ref_logps = None
        flat = {
            name: mx.concatenate([value.flatten() for _, value in tree_flatten(part)])
            for name, part in found.items()
        }
        for name, value in flat.items():
            apart = (mx.linalg.norm(value - flat[ON]) / mx.linalg.norm(flat[ON])).item()
            assert apart < TOLERANCE, f"{name}: gradients {apart:.1e} apart"
            largest = max(largest, apart)
        print(f"  a micro-batch of {len(batch)}: gradients up to {largest:.1e} apart", flush=True)
    optimizer = AdamW(config.training, 10)
    optimizer.init(model.trainable_parameters())

    def apply() -> list:
        optimizer.update(model, found[ON])
        return [model.trainable_parameters(), optimizer.state]

    for _ in range(3):
        turns.measure("optimizer", ON, apply)
    return largest


def count_batches(rollouts: list[Rollout], config: Config) -> tuple[list[list[Rollout]], dict]:
    """The micro-batches, and what each way to make them computes: (tokens, micro-batches)."""
    counts, batches = {}, rank_batches(rollouts, config)
    rows = config.training.batch_size
    ways = {ON: rollout.micro_batches, SORTED: fill, PACKED: partial(in_order, rows=rows)}
    for name, way in ways.items():
        with patch.object(rollout, "micro_batches", way):
            made = rank_batches(rollouts, config)
        counts[name] = computed_tokens(made), len(made)
        title = name if name == ON else f"without {name}"
        print(f"  {title}: {counts[name][0]} tokens in {len(made)} micro-batches", flush=True)
    return batches, counts


def print_tables(turns: Turns, limit: int, batches: int, counts: dict) -> None:
    def parts(name: str) -> dict[str, float]:
        """CPU seconds of a whole step."""
        sampling = turns.typical("sampling", name)
        found = {
            "prefill": turns.typical("prefill", name),
            "decoding": limit * (turns.typical("step", name) - sampling),
            "sampling": limit * sampling,
            "reward": turns.typical("reward", ON),
            "reference pass": 0.0,
            "forward and backward": batches
            * turns.typical("passes", name if name in PASSES else ON),
            "optimizer": turns.typical("optimizer", ON),
        }
        if name in (REFERENCE, OFF):
            found["reference pass"] = batches * turns.typical(
                "reference", OFF if name == OFF else ON
            )
        return found

    def sums(name: str) -> tuple[float, float, float]:
        """Of the rollout, the update and the step."""
        found = parts(name)
        update = found["reference pass"] + found["forward and backward"] + found["optimizer"]
        total = sum(found.values())
        return total - update, update, total

    on = sums(ON)
    print(f"\n{'CPU time, without : with':26}{'rollout':>9}{'update':>9}{'step':>9}")
    for name in (EXP, PREFILL, READY, SHARED, REFERENCE, OFF):
        ratios = [off / with_all for off, with_all in zip(sums(name), on, strict=True)]
        print(f"{name:26}" + "".join(f"{ratio:9.3f}" for ratio in ratios))
    for name in (SORTED, PACKED):
        print(f"{name:26}{'':9}{counts[name][0] / counts[ON][0]:9.3f}  of tokens computed")
    for title, part in (("decoding step", "step"), ("micro-batch", "passes")):
        python, total = lower_half(turns.python[part]), turns.typical(part, ON)
        print(
            f"next {title} built first: {1000 * python:.1f} of {1000 * total:.0f} ms are Python's, "
            f"without : with up to {total / (total - python):.3f}"
        )

    print(f"\n{'CPU seconds, share':22}{OFF:>17}{ON:>17}")
    shares = {name: parts(name) for name in (OFF, ON)}
    for part in shares[ON]:
        cells = [(found[part], 100 * found[part] / sums(name)[2]) for name, found in shares.items()]
        print(f"{part:22}" + "".join(f"{s:9.2f} {share:5.1f} %" for s, share in cells))
    print(f"{'step':22}" + "".join(f"{sums(name)[2]:9.2f}{'':8}" for name in shares))
    print("\npeak memory, GB")
    for (part, name), peak in turns.peaks.items():
        print(f"  {part:12}{name:26}{peak:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="an SFT adapter's folder")
    parser.add_argument("--rows", default="data/*.jsonl", help="a file, a folder or a glob")
    parser.add_argument("--tokens", type=int, default=64, help="limit of a completion, 64")
    parser.add_argument("--micro-batch", type=int, default=4, help="training.batch_size, 4")
    parser.add_argument("--every", type=int, default=2, help="measure every n-th micro-batch, 2")
    parser.add_argument("-o", "--output", type=Path, help="write all times as JSON")
    parser.add_argument("--count", action="store_true", help="only count the micro-batches' tokens")
    arguments = parser.parse_args()
    if not fast_exp.is_wanted():
        sys.exit("error: this measures the savings on a Linux CPU, and the device is another one")
    os.environ["QMD_DTYPE"] = "float32"
    config, _ = load_config("grpo")
    config.model.sft = arguments.model
    config.dataset.name, config.dataset.max_samples = arguments.rows, PROMPTS
    config.dataset.eval_split = 0.0
    config.training.batch_size = arguments.micro_batch
    config.grpo.reward, config.grpo.num_generations = "percentage", GROUP
    config.grpo.max_completion_length = arguments.tokens
    config.grpo.rollout_batch_size = PROMPTS * GROUP
    model, tokenizer, end, prompts = load_policy(config)

    run = partial(sample, model, tokenizer, prompts, config, step=0, end=end)
    rollouts, turns = run(), Turns(model)
    lengths = sorted(len(r.tokens) for r in rollouts)
    print(f"{sum(lengths)} tokens, completions of {lengths[0]} to {lengths[-1]}")
    batches, counts = count_batches(rollouts, config)
    if arguments.count:
        return
    mixed = sample_in_turns(turns, run)
    assert [r.tokens for r in mixed] == [r.tokens for r in rollouts], "other completions"
    print("  in turns: the same completions", flush=True)

    def score() -> list:
        set_rewards(rollouts, config.grpo)
        set_advantages(rollouts, GROUP, config.grpo.scale_rewards)
        return []

    turns.measure("reward", ON, score)
    update_in_turns(turns, batches, rollouts, config, arguments.every)
    if arguments.output:
        raw = {f"{part}, {name}": seconds for (part, name), seconds in turns.seconds.items()}
        arguments.output.write_text(json.dumps(raw), encoding="utf-8")
    print_tables(turns, lengths[-1], len(batches), counts)


if __name__ == "__main__":
    main()
