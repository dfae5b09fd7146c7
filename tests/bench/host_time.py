"""The time in which the device would wait for Python: per decoded token and per micro-batch of GRPO.

    python -m tests.bench.host_time [--layers 28]

On a random Qwen3 of 1.7B's depth but little width: Python's work depends on the number of layers,
not on their size. Times are of the main thread's CPU, so other load on the machine does not count;
medians. "build" is Python's work between reading a result and having the next graph. If the
result is read first, the device waits for all of it. If the next graph is submitted first, the
device waits only for what Python needs beyond the time of a step.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from expander import model as models
from expander.config import load_config
from expander.decode import Batch, TemperatureSampler, random_keys
from expander.train.grpo import batch_loss
from expander.train.rollout import Rollout
from tests.tiny import make_qwen3

ROWS, PROMPT, LENGTH, STEPS = 32, 32, 64, 40
MICRO_BATCH = 5


def rollouts(count: int) -> list[Rollout]:
    rng = np.random.default_rng(0)
    prompt = rng.integers(5, 400, PROMPT).tolist()
    rows = [rng.integers(5, 400, LENGTH - i).tolist() for i in range(count)]
    found = [Rollout("q", prompt, row, True, "", advantage=1.0) for row in rows]
    for r in found:
        r.ref_logps = mx.zeros((len(r.tokens),)) - 6.0
    return found


def milliseconds(started: float) -> float:
    return 1000 * (time.thread_time() - started)


def decoding(model: nn.Module) -> tuple[float, float]:
    """Milliseconds to build a step's graph, and to submit it."""
    sampler = TemperatureSampler(1.0, random_keys([str(i) for i in range(ROWS)], 0))
    batch = Batch(model, sampler)
    batch.add(range(ROWS), [rollouts(1)[0].prompt], [ROWS])
    mx.eval(batch.tokens, batch.state)
    submit, spent, builds = mx.async_eval, [], []

    def timed(*arrays) -> None:
        builds.append(milliseconds(started))
        began = time.thread_time()
        submit(*arrays)
        spent.append(milliseconds(began))

    mx.async_eval = timed
    try:
        for _ in range(STEPS):
            tokens = batch.tokens
            started = time.thread_time()
            batch.step()
            tokens.tolist()
            mx.eval(batch.tokens)
    finally:
        mx.async_eval = submit
    return statistics.median(builds), statistics.median(spent)


def updating(model: nn.Module) -> tuple[float, float]:
    """Milliseconds to build a micro-batch's graph, and to submit it."""
    (config, _), batch = load_config("grpo"), rollouts(MICRO_BATCH)
    value_and_grad = nn.value_and_grad(model, partial(batch_loss, model))
    builds, spent = [], []
    model.train()
    for _ in range(7):
        started = time.thread_time()
        (_, stats), part = value_and_grad(batch, config.grpo, 1.0, 1000, 1.0)
        builds.append(milliseconds(started))
        started = time.thread_time()
        mx.async_eval(part, stats)
        spent.append(milliseconds(started))
        mx.eval(part, stats)
    model.eval()
    return statistics.median(builds), statistics.median(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = models.load_base(make_qwen3(Path(folder) / "qwen3", layers=arguments.layers))
    models.add_lora(model, models.lora_config(model, 4, 8.0, 0.05, ["q_proj", "v_proj"]))
    model.eval()
    print(f"{'':34}{'build':>8}{'submit':>8}  ms")
    rows = {"decoding, LoRA as in training": decoding(model)}
    with models.adapters_ready(model):
        rows["decoding, LoRA cast once"] = decoding(model)
    with models.adapters_off(model):
        rows["decoding, no LoRA"] = decoding(model)
    rows[f"micro-batch of {MICRO_BATCH} rows"] = updating(model)
    for name, (build, submit) in rows.items():
        print(f"{name:34}{build:8.2f}{submit:8.2f}")


if __name__ == "__main__":
    main()
