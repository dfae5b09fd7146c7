"""What each saving of `train.py grpo` is worth: one step with all of them, without each, without any.

By hand: python -m tests.bench.savings --model outputs/sft [--rounds 3 | --profile]

4 prompts x 8 completions of at most 64 tokens, from the SFT adapter with a fresh LoRA over it, as at a
run's first step. A saving is switched off by patching the function that makes it:

    fast exponential       off: MLX's own exp in SwiGLU and over the vocabulary
    prompts prefilled once off: every row of the rollout prefills its prompt
    decoding pipelined     off: a token is waited for before Python goes on
    LoRA made ready        off: rollouts scale and cast its matrices at every token
    no reference pass      off: computed although the new adapter is zero (step 1 only)
    prompts computed once  off: every row of the update computes its prompt
    rows sorted            off: packed into micro-batches in the order of sampling
    rows packed, sorted    off: training.batch_size rows per micro-batch, in the order of sampling
    update pipelined       off: a micro-batch is waited for before the next is built

The variants take turns. Rollouts must have the same tokens; updates all get the same rollouts, and
their gradients must agree to 1e-4 of the norm. A saving that cannot change the rollout (or the
update) is not measured there, nor are micro-batches that come out the same; `--rounds 0` only counts
their tokens. The ratios are medians over the rounds, without the saving to with all of them. CPU
seconds count all threads, so that other load on the machine hardly counts; set OPENBLAS_NUM_THREADS=1.
`--profile` prints instead where the CPU time goes, without and with all savings; there, every part
is waited for before the next begins.
"""

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.activations import swiglu

from expander import decode, fast_exp
from expander import model as models
from expander.config import Config, load_config
from expander.train import grpo, logps, rollout
from expander.train.inputs import Prompt, encode_prompts, read_rows
from expander.train.optim import AdamW
from expander.train.rollout import Rollout, computed_tokens

PROMPTS, GROUP = 4, 8
TOLERANCE = 1e-4
ROLLOUT, UPDATE = "rollout", "update"

add, completion_states, fill = decode.Batch.add, logps.completion_states, rollout._fill


def add_each(batch, rows, prompts, copies) -> None:
    """`Batch.add` that runs a prompt for every row."""
    repeated = [ids for ids, count in zip(prompts, copies, strict=True) for _ in range(count)]
    add(batch, rows, repeated, [1] * len(repeated))


def states_of_each(model, prompts, padding, rows, completions) -> mx.array:
    """`completion_states` that runs a prompt for every completion."""
    own = mx.arange(rows.size)
    return completion_states(model, prompts[rows], padding[rows], own, completions)


def in_order(rollouts: Sequence[Rollout], tokens: int, rows: int) -> list[list[Rollout]]:
    return [list(rollouts[first : first + rows]) for first in range(0, len(rollouts), rows)]


@dataclass(frozen=True)
class Saving:
    """What to patch, (owner, name, replacement), to do without; and the parts that it can change."""

    patches: Sequence[tuple]
    parts: Sequence[str]


def savings(rows: int) -> dict[str, Saving]:
    """By name. Of two that patch the same, the later one takes away more."""
    slow = [(fast_exp, "is_wanted", lambda: False), (fast_exp, "swiglu", swiglu)]
    unready = (rollout, "adapters_ready", lambda model: nullcontext())
    unsorted = (rollout, "micro_batches", fill)
    unpacked = (rollout, "micro_batches", partial(in_order, rows=rows))
    synchronous = (mx, "async_eval", mx.eval)
    return {
        "fast exponential": Saving(slow, (ROLLOUT, UPDATE)),
        "prompts prefilled once": Saving([(decode.Batch, "add", add_each)], (ROLLOUT,)),
        "decoding pipelined": Saving([synchronous], (ROLLOUT,)),
        "LoRA made ready": Saving([unready], (ROLLOUT,)),
        "no reference pass": Saving([(grpo, "adapters_are_zero", lambda model: False)], (UPDATE,)),
        "prompts computed once": Saving([(logps, "completion_states", states_of_each)], (UPDATE,)),
        "rows sorted": Saving([unsorted], (UPDATE,)),
        "rows packed, sorted": Saving([unpacked], (UPDATE,)),
        "update pipelined": Saving([synchronous], (UPDATE,)),
    }


@contextmanager
def without(chosen: Sequence[Saving], part: str) -> Iterator[None]:
    """Do without these savings in a part."""
    with ExitStack() as stack:
        for saving in chosen:
            if part in saving.parts:
                for owner, name, replacement in saving.patches:
                    stack.enter_context(patch.object(owner, name, replacement))
        yield


def add_fresh_lora(model, config: Config) -> None:
    lora = config.lora
    mx.random.seed(config.training.seed)
    models.add_lora(
        model, models.lora_config(model, lora.rank, lora.alpha, lora.dropout, lora.target_modules)
    )


class Step:
    """A GRPO step with a fresh adapter, from the same start again and again."""

    def __init__(self, config: Config, model, tokenizer, prompts: Sequence[Prompt], end: int):
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.prompts, self.end = prompts, end
        add_fresh_lora(model, config)
        self.initial = models.adapter_weights(model)
        mx.eval(self.initial)

    def sample(self) -> list[Rollout]:
        return grpo.sample(
            self.model, self.tokenizer, self.prompts, self.config, step=0, end=self.end
        )

    def score(self, rollouts: list[Rollout]) -> None:
        grpo.set_rewards(rollouts, self.config.grpo)
        settings = self.config.grpo
        grpo.set_advantages(rollouts, settings.num_generations, settings.scale_rewards)

    def refer(self, rollouts: list[Rollout]) -> list[list[Rollout]]:
        """The micro-batches, and the reference pass if it is needed."""
        for r in rollouts:
            r.ref_logps = None
        batches = grpo.rank_batches(rollouts, self.config)
        if not grpo.adapters_are_zero(self.model):
            with grpo.adapters_off(self.model):
                grpo.set_logps(self.model, batches, self.config.generation.temperature, "ref_logps")
        return batches

    def update(self, batches: list[list[Rollout]], rollouts: list[Rollout]) -> mx.array:
        """One optimiser step, undone; returns its gradient."""
        gradients = []

        def keep(*arguments):
            gradient, sums = policy_gradient(*arguments)
            gradients.extend(value.flatten() for _, value in tree_flatten(gradient))
            return gradient, sums

        policy_gradient = grpo.policy_gradient
        optimizer = AdamW(self.config.training, 1)
        optimizer.init(self.model.trainable_parameters())
        with patch.object(grpo, "policy_gradient", keep):
            grpo.update(self.model, optimizer, batches, rollouts, self.config)
        self.model.load_weights(list(self.initial.items()), strict=False)
        return mx.concatenate(gradients)


def measured(run: Callable[[], object]) -> tuple[object, dict[str, float]]:
    """The result of `run`, with its CPU and wall seconds and peak memory in GB."""
    mx.clear_cache()
    mx.reset_peak_memory()
    cpu, wall = time.process_time(), time.perf_counter()
    result = run()
    mx.synchronize()
    seconds = {"CPU": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    return result, seconds | {"peak": mx.get_peak_memory() / 1e9}


def compare(step: Step, rounds: int) -> None:
    every = savings(step.config.training.batch_size)
    variants = {"all on": [], **{name: [saving] for name, saving in every.items()}}
    variants["all off"] = list(every.values())
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    gradient, apart = None, {}
    rollouts = step.sample()  # a warm-up as well
    step.score(rollouts)
    lengths = sorted(len(r.tokens) for r in rollouts)
    print(f"{sum(lengths)} tokens, completions of {lengths[0]} to {lengths[-1]}")
    print("tokens that the update computes, with padding and prompts:")
    batched = {}
    for name in ("all on", "rows sorted", "rows packed, sorted"):
        with without(variants[name], UPDATE):
            batches = grpo.rank_batches(rollouts, step.config)
        batched[name] = computed_tokens(batches), len(batches)
        title = name if name == "all on" else f"without {name}"
        print(f"  {title}: {batched[name][0]} in {batched[name][1]} micro-batches", flush=True)
        if name != "all on" and batched[name] == batched["all on"]:
            del variants[name]

    def refer_and_update() -> mx.array:
        return step.update(step.refer(rollouts), rollouts)

    for _ in range(rounds):
        for part in (ROLLOUT, UPDATE):
            for name, chosen in variants.items():
                if chosen and not any(part in saving.parts for saving in chosen):
                    continue
                with without(chosen, part):
                    run = step.sample if part == ROLLOUT else refer_and_update
                    result, figures = measured(run)
                found.setdefault((name, part), []).append(figures)
                seconds = "  ".join(f"{kind} {figure:.2f}" for kind, figure in figures.items())
                print(f"{part:8}{name:24}{seconds}", flush=True)
                if part == ROLLOUT:
                    same = [r.tokens for r in result] == [r.tokens for r in rollouts]
                    assert same, f"{name}: other completions"
                    continue
                if gradient is None:
                    gradient = result
                distance = mx.linalg.norm(result - gradient) / mx.linalg.norm(gradient)
                apart[name] = max(distance.item(), apart.get(name, 0.0))
                assert apart[name] < TOLERANCE, f"{name}: gradients {apart[name]:.1e} apart"
        print_ratios(list(variants), found, apart)


def print_ratios(names: Sequence[str], found: dict, apart: dict[str, float]) -> None:
    def values(name: str, kind: str) -> list[list[float]]:
        """By part, each round's figure; that of "all on" where the variant was not measured."""
        parts = (ROLLOUT, UPDATE)
        rows = [found.get((name, part), found["all on", part]) for part in parts]
        return [[figures[kind] for figures in row] for row in rows]

    def totals(name: str, kind: str) -> list[list[float]]:
        parts = values(name, kind)
        return [*parts, [sum(pair) for pair in zip(*parts, strict=True)]]

    print(
        "\nwithout : with all       CPU: rollout update  step   wall: rollout update  step", end=""
    )
    print("   peak GB: rollout update  gradient apart")
    for name in names:
        cells = []
        for kind in ("CPU", "wall"):
            for off, on in zip(totals(name, kind), totals("all on", kind), strict=True):
                cells.append(statistics.median(a / b for a, b in zip(off, on, strict=True)))
        peaks = [max(peak) for peak in values(name, "peak")]
        row = "".join(f"{cell:8.3f}" for cell in cells) + "".join(f"{peak:8.2f}" for peak in peaks)
        print(f"{name:24}{row}  {apart[name]:.1e}" if name in apart else f"{name:24}{row}")
    for name in ("all on", "all off"):
        seconds = [[statistics.median(x) for x in totals(name, kind)] for kind in ("CPU", "wall")]
        print(name, *(f"{x:.1f}" for x in seconds[0]), "s of CPU;", end=" ")
        print(*(f"{x:.1f}" for x in seconds[1]), "s")


class Profile:
    """CPU seconds by part; a part inside another does not count for the outer one."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()
        self.current, self.since = None, 0.0

    def _switch(self, name: str | None) -> None:
        now = time.process_time()
        if self.current:
            self.seconds[self.current] += now - self.since
        self.current, self.since = name, now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        outer = self.current
        self._switch(name)
        try:
            yield
        finally:
            mx.synchronize()
            self._switch(outer)

    def watched(self, owner, name: str, part: str):
        """Patch a function, so that it is this part."""
        call = getattr(owner, name)

        def wrapped(*arguments):
            mx.eval([value for value in arguments if isinstance(value, mx.array)])
            with self.part(part):
                result = call(*arguments)
                mx.eval([value for value in result or () if not isinstance(value, dict)])
            return result

        return patch.object(owner, name, wrapped)


def profile(step: Step) -> None:
    """Print the share of each part in the CPU time of a step, with all savings and without any."""
    shares = {}
    for title, chosen in (
        ("all off", list(savings(step.config.training.batch_size).values())),
        ("all on", []),
    ):
        clock = Profile()
        with (
            without(chosen, ROLLOUT),
            clock.part("decoding"),
            clock.watched(decode.Batch, "add", "prefill"),
            clock.watched(decode.TemperatureSampler, "__call__", "sampling"),
        ):
            rollouts = step.sample()
        with clock.part("reward"):
            step.score(rollouts)
        with without(chosen, UPDATE):
            with clock.part("reference pass"):
                batches = step.refer(rollouts)
            with (
                clock.watched(grpo, "policy_gradient", "forward and backward"),
                clock.part("optimizer"),
            ):
                step.update(batches, rollouts)
        shares[title] = clock.seconds
        print(title, dict(clock.seconds), flush=True)
    print(f"\n{'':22}{'all off':>18}{'all on':>18}  s of CPU and share")
    totals = {title: sum(seconds.values()) for title, seconds in shares.items()}
    parts = ["prefill", "decoding", "sampling", "reward", "reference pass"]
    for part in [*parts, "forward and backward", "optimizer"]:
        cells = [(seconds[part], seconds[part] / totals[t]) for t, seconds in shares.items()]
        print(f"{part:22}" + "".join(f"{s:10.2f} {100 * share:5.1f} %" for s, share in cells))
    print(f"{'step':22}" + "".join(f"{total:10.2f}{'':8}" for total in totals.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="an SFT adapter's folder")
    parser.add_argument("--rows", default="data/*.jsonl", help="a file, a folder or a glob")
    parser.add_argument("--tokens", type=int, default=64, help="limit of a completion, 64")
    parser.add_argument("--micro-batch", type=int, default=4, help="training.batch_size, 4")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every variant, 3")
    parser.add_argument("--profile", action="store_true", help="the parts of a step instead")
    arguments = parser.parse_args()
    if not fast_exp.is_wanted():
        sys.exit("error: the savings of the CPU on Linux are measured, but this is another device")
    os.environ["QMD_DTYPE"] = "float32"
    config, _ = load_config("grpo")
    config.model.sft = arguments.model
    config.dataset.name, config.dataset.max_samples = arguments.rows, PROMPTS
    config.dataset.eval_split = 0.0
    config.training.batch_size = arguments.micro_batch
    config.grpo.reward, config.grpo.num_generations = "percentage", GROUP
    config.grpo.max_completion_length = arguments.tokens
    config.grpo.rollout_batch_size = PROMPTS * GROUP
    model, tokenizer = models.load_chain(models.read_chain(arguments.model), fuse_last=True)
    prompts = encode_prompts(read_rows(config).train, config, tokenizer)
    step = Step(config, model, tokenizer, prompts, models.end_token(tokenizer))
    if arguments.profile:
        profile(step)
    else:
        compare(step, arguments.rounds)


if __name__ == "__main__":
    main()
