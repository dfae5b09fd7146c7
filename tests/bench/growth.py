"""How the cost of a GRPO step and of an SFT step grows: CPU seconds, tokens per second, peak memory.

By hand: python -m tests.bench.growth --model DIR [--layers 6] [--plot FILE.png]

From a base model's folder, cut to its first layers, which keeps every point short. GRPO's completions
are of no use then, and never end: each has exactly as many tokens as the limit. From 4 prompts x 8
completions of 64 tokens, one setting changes at a time; `rollout_batch_size` with 8 prompts, and for
the rollout only. The adapter is random, so that the reference pass is needed. An SFT step has the same
8 rows in 8, 4, 2 and 1 passes, by mlx-lm's trainer; the first step compiles and does not count.
Tokens are those of the completions (GRPO), or of the rows (SFT), without padding. CPU seconds count all
threads; set OPENBLAS_NUM_THREADS=1. Other load on the machine changes them, so every point is measured
in --rounds, and the lowest time counts.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
from mlx_lm.cli_ui import make_console
from mlx_lm.tuner import trainer
from mlx_lm.tuner.callbacks import TrainingCallback

from expander import model as models
from expander.config import Config, load_config
from expander.train.batches import Batches
from expander.train.grpo import update
from expander.train.inputs import encode_prompts, read_rows
from expander.train.optim import AdamW
from expander.train.rewards import set_rewards
from expander.train.rollout import Rollout, rank_batches, sample, set_advantages, set_logps
from expander.train.sft import completion_loss, tokenize_rows
from tests.bench.grpo_rivals import add_fresh_lora

NO_END = -1  # not the id of any token
ROLLOUT, UPDATE, SFT = "rollout", "update", "SFT"


@dataclass(frozen=True)
class Point:
    """Settings of a GRPO step."""

    prompts: int = 4
    group: int = 8
    limit: int = 64
    rollout_batch: int = 32

    @property
    def tokens(self) -> int:
        return self.prompts * self.group * self.limit


GROWTH = {
    "prompts": ("prompts per step", (1, 2, 4, 8), Point()),
    "group": ("completions per prompt", (4, 8, 16), Point()),
    "limit": ("tokens per completion", (32, 64, 128), Point()),
    "rollout_batch": ("rollout_batch_size", (8, 16, 32, 64), Point(prompts=8)),
}
SFT_ROWS, SFT_BATCHES = 8, (1, 2, 4, 8)


def cut(model: Path, layers: int, folder: Path) -> Path:
    """A copy of a base model in `folder` that has only its first layers."""
    folder.mkdir()
    for path in model.glob("*.json"):
        if path.name != "model.safetensors.index.json":
            shutil.copy(path, folder)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights: dict[str, mx.array] = {}
    for path in model.glob("model*.safetensors"):
        weights |= mx.load(str(path))
    dropped = tuple(f"model.layers.{n}." for n in range(layers, 1000))
    kept = {name: value for name, value in weights.items() if not name.startswith(dropped)}
    mx.save_safetensors(str(folder / "model.safetensors"), kept, {"format": "pt"})
    return folder


def grpo_config(rows: str) -> Config:
    config, _ = load_config("grpo")
    config.grpo.reward = "percentage"
    config.dataset.name, config.dataset.eval_split = rows, 0.0
    config.dataset.max_samples = max(GROWTH["prompts"][1])
    return config


def measured(run: Callable[[], object]) -> tuple[object, dict[str, float]]:
    """The result of `run`, with its CPU seconds and peak memory in GB."""
    mx.clear_cache()
    mx.reset_peak_memory()
    started = time.process_time()
    result = run()
    mx.synchronize()
    seconds = time.process_time() - started
    return result, {"CPU": seconds, "peak": mx.get_peak_memory() / 1e9}


def update_once(model, rollouts: list[Rollout], config: Config) -> None:
    """A GRPO step from its rewards to the optimiser."""
    set_rewards(rollouts, config.grpo)
    set_advantages(rollouts, config.grpo.num_generations, config.grpo.scale_rewards)
    batches = rank_batches(rollouts, config)
    with models.adapters_off(model):
        set_logps(model, batches, config.generation.temperature, "ref_logps")
    optimizer = AdamW(config.training, 1)
    optimizer.init(model.trainable_parameters())
    update(model, optimizer, batches, rollouts, config)


def measure_grpo(base: Path, rows: str) -> dict[Point, dict[str, dict[str, float]]]:
    """Figures of the rollout and the update at every point."""
    config, tokenizer, model = (
        grpo_config(rows),
        models.load_tokenizer(base),
        models.load_base(base),
    )
    prompts = encode_prompts(read_rows(config).train, config, tokenizer)
    add_fresh_lora(model, config)
    adapter = models.adapter_weights(model)
    adapter = {name: mx.random.normal(value.shape) * 0.02 for name, value in adapter.items()}
    mx.eval(adapter)
    found: dict[Point, dict[str, dict[str, float]]] = {}
    for name, (_, values, start) in GROWTH.items():
        for point in (replace(start, **{name: value}) for value in values):
            if point in found:
                continue
            model.load_weights(list(adapter.items()), strict=False)
            config.grpo.num_generations = point.group
            config.grpo.max_completion_length = point.limit
            config.grpo.rollout_batch_size = point.rollout_batch
            chosen = prompts[: point.prompts]
            run = partial(sample, model, tokenizer, chosen, config, step=0, end=NO_END)
            rollouts, figures = measured(run)
            assert sum(len(r.tokens) for r in rollouts) == point.tokens
            found[point] = {ROLLOUT: figures}
            if name != "rollout_batch":
                run = partial(update_once, model, rollouts, config)
                found[point][UPDATE] = measured(run)[1]
            report(str(astuple(point)), point.tokens, found[point])
    return found


class Clock(TrainingCallback):
    """The CPU seconds and the peak memory of every step after the first."""

    def __init__(self):
        self.seconds, self.since = [], None

    def on_train_loss_report(self, info: dict) -> None:
        now = time.process_time()
        if self.since is None:
            mx.clear_cache()
            mx.reset_peak_memory()
        else:
            self.seconds.append(now - self.since)
        self.since = time.process_time()


def measure_sft(base: Path, rows: str, steps: int = 3) -> dict[int, dict[str, dict[str, float]]]:
    """Figures of a step by the rows per pass."""
    config, _ = load_config("sft")
    config.dataset.name, config.dataset.eval_split = rows, 0.0
    config.dataset.max_samples = SFT_ROWS
    data, _ = tokenize_rows(read_rows(config), config, models.load_tokenizer(base))
    tokens = sum(len(row.ids) for row in data)
    found = {}
    for size in SFT_BATCHES:
        model = models.load_base(base)
        add_fresh_lora(model, config)
        batches = Batches(data, size, SFT_ROWS // size, config.training.seed)
        optimizer, clock = AdamW(config.training, steps), Clock()
        optimizer.init(model.trainable_parameters())
        trainer.train(
            model,
            optimizer,
            data,
            args=trainer.TrainingArgs(
                batch_size=size,
                iters=steps * batches.accumulation,
                steps_per_report=batches.accumulation,
                grad_accumulation_steps=batches.accumulation,
                adapter_file=base.parent / "adapters.safetensors",
            ),
            loss=completion_loss,
            iterate_batches=lambda batches=batches, **_: batches(0),
            training_callback=clock,
        )
        figures = {"CPU": min(clock.seconds), "peak": mx.get_peak_memory() / 1e9, "tokens": tokens}
        found[size] = {SFT: figures}
        report(f"{SFT} {size}", tokens, found[size])
    return found


def report(title: str, tokens: int, parts: dict[str, dict[str, float]]) -> None:
    for part, figures in parts.items():
        print(
            f"{title:20}{part:8}{figures['CPU']:8.2f} s of CPU {tokens / figures['CPU']:8.1f} tokens/s"
            f"{1000 * figures['peak']:8.0f} MB",
            flush=True,
        )


def lowest(rounds: list[dict]) -> dict:
    """Of each point and part, the figures of the round with the fewest CPU seconds."""
    return {
        point: {
            part: min((found[point][part] for found in rounds), key=lambda x: x["CPU"])
            for part in parts
        }
        for point, parts in rounds[0].items()
    }


def plot(grpo: dict, sft: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), dpi=110, layout="constrained")
    grid = figure.subplots(3, 5, sharex="col")
    columns = []
    for name, (label, values, start) in GROWTH.items():
        points = [replace(start, **{name: value}) for value in values]
        curves = {}
        for part in (ROLLOUT, UPDATE) if name != "rollout_batch" else (ROLLOUT,):
            rows = [grpo[point][part] | {"tokens": point.tokens} for point in points]
            curves[f"GRPO, {part}"] = rows
        columns.append((label, values, curves))
    columns.append(
        ("SFT: rows per pass", SFT_BATCHES, {"SFT step": [found[SFT] for found in sft.values()]})
    )
    measures = {
        "CPU seconds per step": lambda row: row["CPU"],
        "tokens per CPU second": lambda row: row["tokens"] / row["CPU"],
        "peak memory, MB": lambda row: 1000 * row["peak"],
    }
    colors = {f"GRPO, {ROLLOUT}": "C0", f"GRPO, {UPDATE}": "C1", "SFT step": "C2"}
    for column, (label, values, curves) in enumerate(columns):
        for row, (measure, value_of) in enumerate(measures.items()):
            axes = grid[row][column]
            for title, rows in curves.items():
                heights = [value_of(figures) for figures in rows]
                axes.plot(values, heights, marker="o", color=colors[title], label=title)
            axes.set_ylim(0, None)
            axes.set_xscale("log", base=2)
            axes.set_xticks(values, [str(value) for value in values])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            if column == 0:
                axes.set_ylabel(measure)
            if row == len(measures) - 1:
                axes.set_xlabel(label)
        if column in (0, len(columns) - 1):
            grid[0][column].legend(frameon=False, fontsize="small")
    for row in range(len(measures)):
        top = max(axes.get_ylim()[1] for axes in grid[row])
        for axes in grid[row]:
            axes.set_ylim(0, top)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a base model's folder")
    parser.add_argument("--layers", type=int, default=6, help="the first layers that are kept, 6")
    parser.add_argument("--rows", default="data/*.jsonl", help="a file, a folder or a glob")
    parser.add_argument("--rounds", type=int, default=2, help="the lowest of so many times, 2")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="needs matplotlib")
    arguments = parser.parse_args()
    os.environ["QMD_DTYPE"] = "float32"
    make_console().quiet = True
    with tempfile.TemporaryDirectory() as folder:
        base = cut(arguments.model, arguments.layers, Path(folder) / "base")
        rounds = range(arguments.rounds)
        grpo = lowest([measure_grpo(base, arguments.rows) for _ in rounds])
        sft = lowest([measure_sft(base, arguments.rows) for _ in rounds])
    if arguments.plot:
        plot(grpo, sft, arguments.plot)


if __name__ == "__main__":
    main()
