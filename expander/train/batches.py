"""SFT's batches: tokenised rows, in an order of steps and micro-batches that resumes exactly."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import mlx.core as mx
import numpy as np

from expander.prompt import frame_of, render_target
from expander.rows import Example

# MLX's compiler keeps about 10 MB of host memory per batch shape, for good: allow only a few shapes.
WIDTH_STEP, WIDTH_RATIO = 8, 1.1
TARGET_STEP, TARGET_PARTS = 32, 8

Batch = tuple[mx.array, ...]


@dataclass(frozen=True)
class Row:
    """One tokenised example; the loss is on ids[start:]."""

    ids: list[int]
    start: int
    source: str

    @property
    def targets(self) -> int:
        return len(self.ids) - self.start


def tokenize(
    examples: Sequence[Example],
    prompts: Sequence[list[int]],
    tokenizer,
    final_newline: bool,
    max_length: int,
) -> list[Row]:
    """The rows of those examples that have at most `max_length` tokens."""
    rows = []
    for example, prompt in zip(examples, prompts, strict=True):
        text = render_target(example.lines, final_newline, frame_of(tokenizer))
        target = tokenizer.encode(text, add_special_tokens=False)
        if len(prompt) + len(target) <= max_length:
            rows.append(Row(prompt + target, len(prompt), example.source))
    return rows


def round_width(length: int) -> int:
    """The smallest allowed width of at least `length`: multiples of 8 that grow by a factor of 1.1.

    >>> [round_width(n) for n in (5, 64, 81, 97, 200)]
    [8, 64, 88, 112, 200]
    """
    width = WIDTH_STEP
    while width < length:
        width = max(width + WIDTH_STEP, -(-int(width * WIDTH_RATIO) // WIDTH_STEP) * WIDTH_STEP)
    return width


def round_targets(targets: int, rows: int, width: int) -> int:
    """`targets` rounded up to a multiple of an eighth of the batch, and of at least 32.

    >>> round_targets(70, rows=1, width=64), round_targets(300, rows=4, width=128)
    (96, 320)
    """
    step = max(TARGET_STEP, rows * width // TARGET_PARTS)
    return -(-targets // step) * step


def collate(rows: Sequence[Row], normalizer: float | None = None) -> Batch:
    """The arrays of `completion_loss`.

    Args:
        normalizer: what the summed loss is divided by (default: the number of targets).

    Returns:
        inputs (B, T), right-padded; positions (N,), flat indices into B × T whose next token is a
        target; targets (N,); weights (N,), 1 or (for filler) 0; normalizer ().
    """
    width = round_width(max(len(row.ids) for row in rows) - 1)
    inputs = np.zeros((len(rows), width), np.int32)
    positions, targets = [], []
    for i, row in enumerate(rows):
        inputs[i, : len(row.ids) - 1] = row.ids[:-1]
        positions += range(i * width + row.start - 1, i * width + len(row.ids) - 1)
        targets += row.ids[row.start :]
    filler = round_targets(len(targets), len(rows), width) - len(targets)
    weights = [1.0] * len(targets) + [0.0] * filler
    normalizer = len(targets) if normalizer is None else normalizer
    return (
        mx.array(inputs),
        mx.array(positions + [0] * filler),
        mx.array(targets + [0] * filler),
        mx.array(weights),
        mx.array(float(normalizer)),
    )


def empty() -> Batch:
    """A batch without rows, whose loss and gradient are 0."""
    ids = mx.array([], dtype=mx.int32)
    return ids.reshape(0, 0), ids, ids, mx.array([]), mx.array(1.0)


class Batches:
    """Every row once per epoch, in an order that depends on the seed and the epoch only.

    Rows of similar length share a micro-batch, so that little is padding; a step has micro-batches
    of all lengths, or tokens of short rows would weigh more than those of long ones. One step per
    epoch takes the remainder. All ranks have the same steps, and each takes every `ranks`-th
    micro-batch.

    Each step begins and ends with an empty batch. mlx-lm's trainer compiles separate functions for
    the first batch of a step (no gradient to add to) and for the last (with the optimiser's update);
    the empty ones keep it from tracing both for every shape.
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
        self.passes = -(-accumulation // ranks)  # this rank's micro-batches per step
        self.accumulation = self.passes + 2  # batches per step, the empty ones included
        self.steps_per_epoch = -(-len(rows) // self.effective)
        self.current: list[Row] = []  # the rows of the step in progress

    def step_rows(self, epoch: int) -> list[list[Row]]:
        """The rows of each optimiser step of one epoch."""
        rng = random.Random(f"{self.seed}:{epoch}")
        order = list(self.rows)
        rng.shuffle(order)
        remainder = len(order) % self.effective
        steps = [order[:remainder]] if remainder else []
        window = max(self.effective, 64 // self.effective * self.effective)
        for first in range(remainder, len(order), window):
            near = sorted(order[first : first + window], key=lambda row: len(row.ids))
            alike = [near[i : i + self.batch_size] for i in range(0, len(near), self.batch_size)]
            count = len(near) // self.effective  # steps in this window
            strata = [rng.sample(alike[i : i + count], count) for i in range(0, len(alike), count)]
            steps += [list(chain(*parts)) for parts in zip(*strata, strict=True)]
        rng.shuffle(steps)
        return steps

    def micro_batches(self, rows: list[Row]) -> Iterator[Batch]:
        """This rank's part of one optimiser step, as `accumulation` batches.

        The losses of all ranks' batches sum to the mean over the step's targets: the normalizer
        makes up for the trainer, which divides the summed gradients by their number.
        """
        tokens = sum(row.targets for row in rows)
        normalizer = tokens / (self.accumulation * self.ranks)
        ordered = sorted(rows, key=lambda row: len(row.ids))
        parts = np.array_split(np.arange(len(ordered)), self.passes * self.ranks)
        yield empty()
        for part in parts[self.rank :: self.ranks]:
            yield collate([ordered[i] for i in part], normalizer) if len(part) else empty()
        yield empty()

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Batches from a 0-based optimiser step on, epoch after epoch."""
        epoch, skip = divmod(first_step, self.steps_per_epoch)
        while True:
            for rows in self.step_rows(epoch)[skip:]:
                self.current = rows
                yield from self.micro_batches(rows)
            epoch, skip = epoch + 1, 0
