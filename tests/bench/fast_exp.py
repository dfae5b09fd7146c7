"""What the faster exponential of the CPU saves: passes with it and without it, turn by turn.

    python -m tests.bench.fast_exp MODEL [--rounds 9]

For SmolLM2 or another base model's folder, in float32: a forward pass, a decoding step of 32 rows
and the forward and backward passes of an SFT micro-batch. The seconds are the CPU's (run it with
OPENBLAS_NUM_THREADS=1), so that other load on the machine hardly counts; medians are printed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from expander import fast_exp
from expander import model as models
from expander.architectures import PROJECTIONS
from expander.decode import Batch, Sampler
from expander.train.batches import Row, collate
from expander.train.sft import completion_loss

ROWS, LENGTH, PROMPT, DECODED = 4, 128, 32, 32


def passes(path: Path, wanted: bool) -> dict[str, Callable[[], list[mx.array]]]:
    """Each pass as a function that builds it."""
    fast_exp.is_wanted = lambda: wanted
    model = models.load_base(path)
    mx.random.seed(0)
    models.add_lora(model, models.lora_config(model, 16, 32.0, 0.0, PROJECTIONS))
    fresh = {n: mx.random.normal(v.shape) * 0.02 for n, v in models.adapter_weights(model).items()}
    model.load_weights(list(fresh.items()), strict=False)
    rng = np.random.default_rng(0)
    rows = [Row(rng.integers(0, 500, LENGTH).tolist(), PROMPT, "") for _ in range(ROWS)]
    batch, ids = collate(rows), mx.array([row.ids for row in rows])
    gradient_of = nn.value_and_grad(model, lambda m, *b: completion_loss(m, *b)[0])
    decoded = Batch(model, Sampler())
    decoded.add(range(DECODED), [rows[0].ids[:PROMPT]], [DECODED])

    def decode() -> list[mx.array]:
        decoded.step()
        return [decoded.tokens]

    def train() -> list[mx.array]:
        fast_exp.is_wanted = lambda: wanted
        loss, gradient = gradient_of(model, *batch)
        return [loss, *(value for _, value in tree_flatten(gradient))]

    forward = lambda: [models.hidden_states(model, ids)]  # noqa: E731
    return {"forward": forward, "decoding step": decode, "SFT micro-batch": train}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a base model's folder")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    sides = [passes(arguments.model, wanted) for wanted in (False, True)]
    for name in sides[0]:
        seconds: list[list[float]] = [[], []]
        results = [[], []]
        for turn in range(arguments.rounds + 1):
            for side in (0, 1):
                started = time.process_time()
                results[side] = sides[side][name]()
                mx.eval(results[side])
                if turn:  # the first warms up
                    seconds[side].append(time.process_time() - started)
        ratio = statistics.median(fast / slow for slow, fast in zip(*seconds, strict=True))
        a, b = (np.concatenate([np.array(x).ravel() for x in side]) for side in results)
        apart = np.linalg.norm(a - b) / np.linalg.norm(a)
        slow, fast = (statistics.median(part) for part in seconds)
        print(f"{name:16} {slow:7.3f} s {fast:7.3f} s of CPU  ratio {ratio:.2f}  apart {apart:.1e}")


if __name__ == "__main__":
    main()
