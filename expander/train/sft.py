"""Supervised fine-tuning: the loss, batches and callback that mlx-lm's LoRA trainer is given.

mlx_lm.tuner.trainer.train runs the loop. Ours are: a loss over completion tokens only (the end token
included, no padding), weighted by tokens over the whole accumulated batch; batches that hold every
row once an epoch; and a callback that validates, logs, saves and stops.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import mlx.core as mx
import numpy as np

from expander.model import hidden_states, lm_head
from expander.prompt import render_target
from expander.rows import Example
from expander.train.distributed import gather, share_out
from expander.train.logps import LOGIT_BUDGET, token_logps

# Shapes are rounded up to these, so that a compiled step is traced only a few times.
LENGTH_STEP, TOKEN_STEP = 8, 32


@dataclass(frozen=True)
class Row:
    """One tokenised example; the loss is on ids[start:]."""

    ids: list[int]
    start: int
    source: str


def tokenize(
    examples: Sequence[Example],
    prompts: Sequence[list[int]],
    tokenizer,
    final_newline: bool,
    max_length: int,
) -> tuple[list[Row], int]:
    """(rows, number of examples left out because they are over `max_length` tokens)."""
    rows = []
    for example, prompt in zip(examples, prompts, strict=True):
        text = render_target(example.lines, final_newline)
        target = tokenizer.encode(text, add_special_tokens=False)
        if len(prompt) + len(target) <= max_length:
            rows.append(Row(prompt + target, len(prompt), example.source))
    return rows, len(examples) - len(rows)


def collate(rows: Sequence[Row], normalizer: float | None = None) -> tuple[mx.array, ...]:
    """Arrays for `completion_loss`.

    Returns:
        inputs (B, T) right-padded, where (N,) flat positions whose next token is learnt,
        targets (N,), weights (N,) 1 or 0 (filler), normalizer ().
    """
    longest = max(len(row.ids) for row in rows) - 1
    width = -(-longest // LENGTH_STEP) * LENGTH_STEP
    inputs = np.zeros((len(rows), width), np.int32)
    where, targets = [], []
    for i, row in enumerate(rows):
        inputs[i, : len(row.ids) - 1] = row.ids[:-1]
        where += range(i * width + row.start - 1, i * width + len(row.ids) - 1)
        targets += row.ids[row.start :]
    filler = -len(targets) % TOKEN_STEP
    weights = [1.0] * len(targets) + [0.0] * filler
    normalizer = len(targets) if normalizer is None else normalizer
    return (
        mx.array(inputs),
        mx.array(where + [0] * filler),
        mx.array(targets + [0] * filler),
        mx.array(weights),
        mx.array(float(normalizer)),
    )


def empty() -> tuple[mx.array, ...]:
    """A batch of no rows, whose loss and gradient are 0."""
    ids = mx.array([], dtype=mx.int32)
    return ids.reshape(0, 0), ids, ids, mx.array([]), mx.array(1.0)


def completion_loss(model, inputs, where, targets, weights, normalizer):
    """(sum of the negative log-likelihoods / normalizer, number of completion tokens)."""
    if not inputs.size:
        return mx.array(0.0), mx.array(0.0)
    states = hidden_states(model, inputs)  # (B, T, D)
    chosen = states.reshape(-1, states.shape[-1])[where]  # (N, D)
    logps, _ = token_logps(chosen, targets, lm_head(model))
    return -(logps * weights).sum() / normalizer, weights.sum()


def validate(model, rows: Sequence[Row], batch_size: int) -> tuple[float, float]:
    """Mean loss a token and share of tokens that are the model's first choice, over all rows.

    The ranks share the rows out.
    """
    head, loss, right, tokens = lm_head(model), 0.0, 0.0, 0
    model.eval()
    ordered = sorted(share_out(rows), key=lambda row: len(row.ids))
    for first in range(0, len(ordered), batch_size):
        inputs, where, targets, weights, _ = collate(ordered[first : first + batch_size])
        states = hidden_states(model, inputs)
        chosen = states.reshape(-1, states.shape[-1])[where]
        chunk = max(1, LOGIT_BUDGET // head(chosen[:1]).shape[-1])
        for start in range(0, chosen.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = head(chosen[part]).astype(mx.float32)
            picked = mx.take_along_axis(logits, targets[part, None], axis=-1)[:, 0]
            nll = (mx.logsumexp(logits, axis=-1) - picked) * weights[part]
            hits = (mx.argmax(logits, axis=-1) == targets[part]) * weights[part]
            sums = mx.stack([nll.sum(), hits.sum()]).tolist()
            loss, right = loss + sums[0], right + sums[1]
        tokens += int(weights.sum().item())
    model.train()
    loss, right, tokens = map(sum, zip(*gather((loss, right, tokens)), strict=True))
    return loss / tokens, right / tokens


class Batches:
    """Every row once an epoch, in an order that depends on the seed and the epoch alone.

    Rows of like length share a micro-batch, for little padding; a step has micro-batches of all
    lengths, or tokens of short rows would weigh more than those of long ones. One step of an epoch
    takes what is left. All ranks have the same steps, and each has every `ranks`-th micro-batch.

    An empty batch opens each step and another closes it. The trainer compiles its step apart for the
    first batch (there is no gradient to add to) and for the last (the optimiser's update is in it):
    this way it traces each of these once, and not again for every shape.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        accumulation: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.rows, self.seed, self.rank, self.ranks = rows, seed, rank, ranks
        self.batch_size = batch_size
        self.effective = batch_size * accumulation
        self.passes = -(-accumulation // ranks)  # this rank's micro-batches a step
        self.accumulation = self.passes + 2  # with the empty batches: what the trainer takes
        self.steps_per_epoch = -(-len(rows) // self.effective)
        self.current: list[Row] = []

    def step_rows(self, epoch: int) -> list[list[Row]]:
        """The rows of each optimiser step of one epoch."""
        rng = random.Random(f"{self.seed}:{epoch}")
        order = list(self.rows)
        rng.shuffle(order)
        left = len(order) % self.effective
        steps = [order[:left]] if left else []
        window = max(self.effective, 64 // self.effective * self.effective)
        for first in range(left, len(order), window):
            near = sorted(order[first : first + window], key=lambda row: len(row.ids))
            alike = [near[i : i + self.batch_size] for i in range(0, len(near), self.batch_size)]
            count = len(near) // self.effective  # steps in this window
            strata = [rng.sample(alike[i : i + count], count) for i in range(0, len(alike), count)]
            steps += [list(chain(*parts)) for parts in zip(*strata, strict=True)]
        rng.shuffle(steps)
        return steps

    def micro_batches(self, rows: list[Row]) -> Iterator[tuple[mx.array, ...]]:
        """This rank's part of one optimiser step, as `accumulation` batches.

        The losses of all ranks' batches sum to the mean a token. The trainer divides the summed
        gradients by their number: the normalizer makes up for it.
        """
        tokens = sum(len(row.ids) - row.start for row in rows)
        normalizer = tokens / (self.accumulation * self.ranks)
        ordered = sorted(rows, key=lambda row: len(row.ids))
        parts = np.array_split(np.arange(len(ordered)), self.passes * self.ranks)
        yield empty()
        for part in parts[self.rank :: self.ranks]:
            yield collate([ordered[i] for i in part], normalizer) if len(part) else empty()
        yield empty()

    def __call__(self, first_step: int) -> Iterator[tuple[mx.array, ...]]:
        """Micro-batches from an optimiser step on, epoch after epoch."""
        epoch, skip = divmod(first_step, self.steps_per_epoch)
        while True:
            for rows in self.step_rows(epoch)[skip:]:
                self.current = rows
                yield from self.micro_batches(rows)
            epoch, skip = epoch + 1, 0
