"""`train.py sft` next to `mlx_lm.lora` or Unsloth: trained tokens per second, peak memory, loss.

By hand: python -m tests.bench.sft_vs_mlx_lm --model MODEL [--rival unsloth] [--rows 'FILES.jsonl']
[--steps N] [--passes N] [--seed N]; grpo_rivals.py says how to install Unsloth.

Same base, rows, token ids, rows a step, LoRA, optimiser (AdamW with bias correction, without weight
decay, at a constant rate) and number of steps; the rest is what each does by itself: mlx_lm.lora its
loss with mask_prompt, batches and cache clearing, Unsloth its loss on completions, which leaves out the
logits of prompts, without gradient checkpointing, ours its loss, batches and gradient clipping. With
--passes ours takes a step's rows in so many forward passes: its gradient is the same to rounding.
They take turns of BLOCK steps (turns.py). Time runs from the first step to the last, with batches,
logging and compilation, without loading. Trained tokens are those of completions, the end token
included; mlx-lm's own count has one pad target a row more. With steps x batch a multiple of the
rows, both train on the same tokens. Both adapters are then validated by sft.validate on the same
held-out rows; the initial LoRA and the order of the rows are each side's own, from the same seed.
"""

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from expander.architectures import PROJECTIONS
from expander.config import Config
from tests.bench.turns import Turn, alternate, peaks, print_table, working
from tests.settings import default_config, section

BLOCK = 5
RANK, ALPHA, LEARNING_RATE = 16, 32.0, 2e-4
GOALS = {
    "tokens/s": ">= 1.6",
    "peak memory": "<= 0.55",
    "resident set": "<= 1",
    "validation loss": "<= 1",
}
TRAIN, HELD = "rows.jsonl", "held.jsonl"
RIVALS = ("mlx_lm.lora", "unsloth")


def configuration(arguments: argparse.Namespace, folder: Path) -> Config:
    return default_config(
        model=section("model", base=arguments.model, output=str(folder / "ours")),
        dataset=section(
            "dataset", name=str(folder / TRAIN), eval_split=0.0, qmd_system_prompt_share=0.0
        ),
        training=section(
            "training",
            max_steps=arguments.steps,
            batch_size=arguments.batch_size // arguments.passes,
            gradient_accumulation_steps=arguments.passes,
            learning_rate=LEARNING_RATE,
            lr_scheduler="constant",
            warmup_ratio=0.0,
            seed=arguments.seed,
        ),
        lora=section("lora", rank=RANK, alpha=ALPHA),
    )


def rows_per_step(config: Config) -> int:
    return config.training.batch_size * config.training.gradient_accumulation_steps


def tokenized(path: Path, config: Config, tokenizer):
    from expander.rows import load_rows
    from expander.train.batches import tokenize
    from expander.train.inputs import encode_prompts

    examples = load_rows(str(path)).train
    prompts = [ids for _, ids in encode_prompts(examples, config, tokenizer)]
    limit = config.training.max_length
    return tokenize(examples, prompts, tokenizer, config.dataset.final_newline, limit)


class TokenDataset(list):
    """Rows as mlx-lm's data sets hand them over: a dict each, made token ids when it is used."""

    def process(self, row: dict) -> tuple[list[int], int]:
        return row["ids"], row["start"]


def run_mlx_lm(config: Config, folder: Path) -> None:
    """What `mlx_lm.lora --train --mask-prompt` does once it has its arguments and the data."""
    import mlx_lm.lora as rival
    from mlx_lm.utils import load_model

    from expander import model as models

    path = models.fetch(config.model.base)
    model, _ = load_model(path)
    model.set_dtype(models.compute_dtype())
    lora = models.lora_config(model, RANK, ALPHA, 0.0, PROJECTIONS)["lora_parameters"]
    rows = tokenized(folder / TRAIN, config, models.load_tokenizer(path))
    asked = {
        "model": config.model.base,
        "train": True,
        "mask_prompt": True,
        "num_layers": -1,
        "lora_parameters": lora,
        "learning_rate": LEARNING_RATE,
        # Its own default, Adam without bias correction, takes longer first steps at the same rate.
        "optimizer": "adamw",
        "optimizer_config": {"adamw": {"bias_correction": True, "weight_decay": 0.0}},
        "batch_size": rows_per_step(config),
        "iters": config.training.max_steps,
        "steps_per_report": 1,
        "save_every": config.training.max_steps,
        "adapter_path": str(folder / "mlx_lm.lora"),
        "seed": config.training.seed,
    }
    settings = SimpleNamespace(**{**rival.CONFIG_DEFAULTS, **asked})
    np.random.seed(settings.seed)  # as the command does before it: the order of the batches
    rival.train_model(
        settings,
        model,
        TokenDataset({"ids": row.ids, "start": row.start} for row in rows),
        TokenDataset(),
    )


def run_unsloth(config: Config, folder: Path, turn: Turn, figures: dict) -> None:
    # Without this its package wants torch and a GPU where it does not run on a Mac.
    os.environ["UNSLOTH_ZOO_DISABLE_GPU_INIT"] = "1"
    from unsloth_zoo.mlx.loader import FastMLXModel
    from unsloth_zoo.mlx.trainer import MLXTrainer, MLXTrainingConfig

    from expander import model as models

    path, seed = models.fetch(config.model.base), config.training.seed
    dtype = str(models.compute_dtype()).removeprefix("mlx.core.")
    model, tokenizer = FastMLXModel.from_pretrained(
        str(path), load_in_4bit=False, dtype=dtype, random_state=seed
    )
    lora = models.lora_config(model, RANK, ALPHA, 0.0, PROJECTIONS)
    model = FastMLXModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, use_gradient_checkpointing=False, random_state=seed
    )
    rows = tokenized(folder / TRAIN, config, models.load_tokenizer(path))
    trainer = MLXTrainer(
        model,
        tokenizer,
        [
            {"input_ids": r.ids, "completion_mask": [int(i >= r.start) for i in range(len(r.ids))]}
            for r in rows
        ],
        args=MLXTrainingConfig(
            per_device_train_batch_size=rows_per_step(config),
            gradient_accumulation_steps=1,
            max_steps=config.training.max_steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            completion_only_loss=True,
            gradient_checkpointing=False,
            output_dir=str(folder / "unsloth-run"),
            seed=seed,
        ),
    )

    def stepped(step, _steps, loss, _rate, _speed, _peak, _elapsed, tokens, _norm) -> None:
        figures.update(tokens=tokens, **peaks())
        if step % BLOCK == 0:
            turn.pause(f"step {step}  loss {loss:.4f}")

    trainer.add_step_callback(stepped)
    turn.pause()
    trainer.train()
    turn.stop()
    (folder / "unsloth").mkdir()
    models.save_adapter(folder / "unsloth", models.adapter_weights(model), lora)


def in_turns(train, turn: Turn, pad_targets: int, figures: dict):
    """mlx-lm's trainer, which both sides use, pausing every BLOCK steps.

    Args:
        pad_targets: targets a step that its count of tokens has beyond those of completions.
        figures: filled in after every step.
    """

    def train_in_turns(*args, training_callback=None, **kwargs):
        from mlx_lm.tuner.callbacks import TrainingCallback

        callback = training_callback or TrainingCallback()
        report, step = callback.on_train_loss_report, 0

        def reported(info: dict) -> None:
            nonlocal step
            step += 1
            try:
                report(info)  # ours leaves the trainer from here after the last step
            finally:
                figures.update(tokens=info["trained_tokens"] - pad_targets * step, **peaks())
                if step % BLOCK == 0:
                    turn.pause(f"step {step}  loss {info['train_loss']:.4f}")

        callback.on_train_loss_report = reported
        turn.pause()
        train(*args, training_callback=callback, **kwargs)

    return train_in_turns


def work(side: str, config: Config, folder: Path) -> None:
    with working(folder / f"{side}.log") as turn:
        figures: dict = {}
        if side == "unsloth":
            run_unsloth(config, folder, turn, figures)
            turn.finish(figures)
            return
        from mlx_lm.tuner import trainer

        pad_targets = 0 if side == "ours" else rows_per_step(config)
        # Before mlx_lm.lora takes it from there.
        trainer.train = in_turns(trainer.train, turn, pad_targets, figures)
        if side == "ours":
            from expander.train.sft import train_sft

            train_sft(config, resume=False, overwrite=False)
        else:
            run_mlx_lm(config, folder)
        turn.finish(figures)


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    import mlx.core as mx

    from expander import model as models
    from expander.files import write_rows
    from expander.rows import canonical_row, load_rows, split_examples
    from expander.train.sft import validate

    examples = load_rows(arguments.rows).train
    train, held = split_examples(examples, arguments.held / len(examples), seed=42)
    limit = min(arguments.limit, len(train))
    write_rows(folder / TRAIN, map(canonical_row, random.Random(42).sample(train, limit)))
    write_rows(folder / HELD, map(canonical_row, held))
    print(
        f"{limit} rows to train on, {len(held)} held out, {arguments.steps} steps of "
        f"{arguments.batch_size}, LoRA {RANK} on all projections, {mx.default_device()}"
    )

    def command(side: str) -> list:
        options = ["--model", arguments.model, "--steps", str(arguments.steps), "--side", side]
        options += ["--batch-size", str(arguments.batch_size), "--passes", str(arguments.passes)]
        options += ["--seed", str(arguments.seed), "--folder", folder]
        return [sys.executable, "-m", "tests.bench.sft_vs_mlx_lm", *options]

    figures = alternate(("ours", arguments.rival), command)
    config = configuration(arguments, folder)
    path = models.fetch(arguments.model)
    rows = tokenized(folder / HELD, config, models.load_tokenizer(path))
    for side, found in figures.items():
        model = models.load_base(path)
        models.load_adapter(model, folder / side)
        found["tokens/s"] = found["tokens"] / found["seconds"]
        found["validation loss"] = validate(model, rows, arguments.batch_size)[0]
    print_table(figures, GOALS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="a Hub id or a folder")
    parser.add_argument("--rival", choices=RIVALS, default=RIVALS[0], help="default mlx_lm.lora")
    parser.add_argument("--rows", default="data/*.jsonl", help="a file, a folder or a glob")
    parser.add_argument("--limit", type=int, default=800, help="rows to train on (default 800)")
    parser.add_argument("--held", type=int, default=120, help="rows to validate on (default 120)")
    parser.add_argument("--steps", type=int, default=200, help="default 200")
    parser.add_argument("--batch-size", type=int, default=4, help="default 4")
    parser.add_argument("--passes", type=int, default=1, help="ours: forward passes a step, 1")
    parser.add_argument("--seed", type=int, default=42, help="of both: order, initial LoRA (42)")
    parser.add_argument("--side", choices=("ours", *RIVALS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps % BLOCK:
        parser.error(f"--steps must be a multiple of {BLOCK}")
    if arguments.batch_size % arguments.passes:
        parser.error("--passes must divide --batch-size")
    if arguments.side:
        work(arguments.side, configuration(arguments, arguments.folder), arguments.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        compare(arguments, Path(temporary))


if __name__ == "__main__":
    main()
