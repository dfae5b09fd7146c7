"""Supervised fine-tuning: mlx-lm's LoRA trainer with our loss, batches and callback.

    python train.py sft

mlx_lm.tuner.trainer.train runs the loop. Three things are ours: a loss over completion tokens only
(the end token included, padding excluded), averaged by tokens over the accumulated batch; batches
that hold every row once per epoch (batches.py); and a callback that validates, logs, saves and stops.
Left out: full fine-tuning.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner import trainer
from mlx_lm.tuner.callbacks import TrainingCallback

from expander.cli import duration
from expander.config import Config
from expander.fast_exp import logsumexp
from expander.model import (
    end_token,
    hidden_states,
    lm_head,
    load_base,
    load_tokenizer,
    read_chain,
)
from expander.queries import write_query_digests
from expander.rows import Example, Rows
from expander.train import distributed
from expander.train.batches import Batch, Batches, Row, collate, tokenize
from expander.train.inputs import encode_prompts, nothing_to_train_on, read_rows, report_memory
from expander.train.logps import chunk_rows, token_logps
from expander.train.memory import cache_limit
from expander.train.optim import AdamW
from expander.train.run import Evaluation, Run, check_output, total_steps


def completion_loss(model, inputs, positions, targets, weights, normalizer):
    """Cross-entropy of the targets, for mlx-lm's trainer; the arguments are those of `collate`.

    Returns:
        sum of the weighted losses / normalizer, and the number of targets.
    """
    if not inputs.size:
        return mx.array(0.0), mx.array(0.0)
    states = hidden_states(model, inputs)  # (B, T, D)
    chosen = states.reshape(-1, states.shape[-1])[positions]  # (N, D)
    logps, _ = token_logps(chosen, targets, lm_head(model))
    return -(logps * weights).sum() / normalizer, weights.sum()


def target_sums(model, rows: Sequence[Row]) -> tuple[float, float, int]:
    """Sums over the targets of some rows: loss, correct first choices, number."""
    head = lm_head(model)
    inputs, positions, targets, weights, _ = collate(rows)
    states = hidden_states(model, inputs)  # (B, T, D)
    chosen = states.reshape(-1, states.shape[-1])[positions]  # (N, D)
    chunk = chunk_rows(head, chosen)
    loss = correct = 0.0
    for start in range(0, chosen.shape[0], chunk):
        part = slice(start, start + chunk)
        logits = head(chosen[part]).astype(mx.float32)  # (n, V)
        picked = mx.take_along_axis(logits, targets[part, None], axis=-1)[:, 0]
        nll = (logsumexp(logits)[:, 0] - picked) * weights[part]
        hits = (mx.argmax(logits, axis=-1) == targets[part]) * weights[part]
        sums = mx.stack([nll.sum(), hits.sum()]).tolist()
        loss, correct = loss + sums[0], correct + sums[1]
    return loss, correct, int(weights.sum().item())


def validate(model: nn.Module, rows: Sequence[Row], batch_size: int) -> tuple[float, float]:
    """Mean loss per target, and the share of targets that are the model's first choice.

    The ranks divide the rows among themselves.
    """
    model.eval()
    ordered = sorted(distributed.share_out(rows), key=lambda row: len(row.ids))
    sums = (0.0, 0.0, 0)
    for first in range(0, len(ordered), batch_size):
        batch = target_sums(model, ordered[first : first + batch_size])
        sums = tuple(a + b for a, b in zip(sums, batch, strict=True))
    model.train()
    loss, correct, targets = map(sum, zip(*distributed.gather(sums), strict=True))
    return loss / targets, correct / targets


def validation_subset(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """The rows of every validation, drawn once by the seed, so that all of them compare."""
    if count is None or count >= len(rows):
        return list(rows)
    return random.Random(seed).sample(rows, count)


def evaluate(model: nn.Module, rows: Sequence[Row], batch_size: int) -> Evaluation:
    """The validation loss, which chooses the best adapter."""
    loss, accuracy = validate(model, rows, batch_size)
    metrics = {"val_loss": loss, "val_token_accuracy": accuracy}
    return Evaluation(loss, metrics, f"accuracy {accuracy:.3f}  val {loss:.4f}")


def step_batches(run: Run, batches: Batches) -> Iterator[Batch]:
    """The batches from the run's step on; each step begins with its first batch."""
    for number, batch in enumerate(batches(run.step)):
        if number % batches.accumulation == 0:
            run.begin_step()
        # Metal kills a command that waits 5 seconds, here for the gradient of a slower rank.
        distributed.barrier()
        yield batch


class NoUI:
    """Stands in for mlx-lm's table, which repeats our lines and on a terminal captures stdout."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self) -> "NoUI":
        return self

    def __exit__(self, *_) -> None:
        pass

    def advance(self) -> None:
        pass

    def report_train(self, *_) -> None:
        pass


class Finished(Exception):
    """Leaves the trainer's loop before its own final save, which is not atomic."""


class StepCallback(TrainingCallback):
    """Ends each step of mlx-lm's trainer by the run's protocol.

    Raises:
        Finished: after the last step.
    """

    def __init__(self, run: Run, model, optimizer: AdamW, batches: Batches, held_out: list[Row]):
        self.run, self.model, self.optimizer, self.batches = run, model, optimizer, batches
        training, self.held_out = run.config.training, held_out
        subset = validation_subset(held_out, training.eval_rows, training.seed)
        self.all_differ = len(subset) < len(held_out)
        self.evaluate = partial(evaluate, model, subset, training.batch_size) if subset else None

    def on_train_loss_report(self, info: dict) -> None:
        """Called by the trainer once per optimiser step."""
        rows, epoch = self.batches.current, self.run.step / self.batches.steps_per_epoch
        record = {
            "epoch": round(epoch, 4),
            "loss": info["train_loss"],
            "grad_norm": self.optimizer.state["grad_norm"].item(),
            "learning_rate": info["learning_rate"],
            "tokens": sum(row.targets for row in rows),
            "tokens_per_second": info["tokens_per_second"],
        }
        ends_epoch = self.run.step % self.batches.steps_per_epoch == 0
        if ends_epoch or self.run.step == self.run.total:
            record |= self.validate_all()
        self.run.finish_step(
            record,
            f"epoch {epoch:.2f}  loss {record['loss']:.4f}  lr {record['learning_rate']:.1e}",
            self.model,
            self.optimizer,
            sources=[row.source for row in rows],
            evaluate=self.evaluate,
        )
        if self.run.finished:
            if self.run.step < self.run.total:  # out of patience
                self.run.log(self.validate_all())
            raise Finished

    def validate_all(self) -> dict[str, float]:
        """Metrics of all validation rows, if the subset leaves some out."""
        if not self.all_differ:
            return {}
        found = evaluate(self.model, self.held_out, self.run.config.training.batch_size)
        return {f"{name}_all": value for name, value in found.metrics.items()}


def train_steps(run: Run, model, optimizer: AdamW, batches: Batches, held_out: list[Row]) -> None:
    """Have mlx-lm's trainer run the remaining steps."""
    training = run.config.training
    with patch.object(trainer, "TrainUI", NoUI), suppress(Finished):
        trainer.train(
            model,
            optimizer,
            batches.rows,
            args=trainer.TrainingArgs(
                batch_size=training.batch_size,
                iters=(run.total - run.step) * batches.accumulation,
                steps_per_report=batches.accumulation,
                steps_per_save=(run.total + 1) * batches.accumulation,
                grad_checkpoint=training.gradient_checkpointing,
                grad_accumulation_steps=batches.accumulation,
                clear_cache_threshold=cache_limit(),
            ),
            loss=completion_loss,
            iterate_batches=lambda **_: step_batches(run, batches),
            training_callback=StepCallback(run, model, optimizer, batches, held_out),
        )


def tokenize_rows(data: Rows, config: Config, tokenizer) -> tuple[list[Row], list[Row]]:
    """Tokenised training and validation rows.

    Raises:
        ValueError: no row is left to train on.
    """
    limit = config.training.max_length

    def encode(examples: list[Example]) -> list[Row]:
        prompts = [ids for _, ids in encode_prompts(examples, config, tokenizer)]
        return tokenize(examples, prompts, tokenizer, config.dataset.final_newline, limit)

    rows, held_out = encode(data.train), encode(data.validation)
    if long := len(data.train) + len(data.validation) - len(rows) - len(held_out):
        print(f"{long} rows left out: longer than training.max_length {limit}")
    if not rows:
        raise nothing_to_train_on(config)
    return rows, held_out


def train_sft(config: Config, resume: bool, overwrite: bool) -> None:
    """Run `python train.py sft`: from the base model to outputs/sft."""
    training = config.training
    check_output(config)
    data = read_rows(config)
    chain = read_chain(config.model.base)
    if chain.adapters:
        raise ValueError(f"model.base {config.model.base}: an adapter folder; name a base model")
    tokenizer = load_tokenizer(chain.path)
    end_token(tokenizer)
    rows, held_out = tokenize_rows(data, config, tokenizer)
    batches = Batches(
        rows,
        training.batch_size,
        training.gradient_accumulation_steps,
        training.seed,
        distributed.rank(),
        distributed.size(),
    )
    run = Run(config, "sft", total_steps(config, batches.steps_per_epoch), resume, overwrite)
    report_memory("sft", config, chain, max(len(row.ids) for row in rows))
    ids = [[row.ids for row in part] for part in (rows, held_out)]
    run.pin_inputs(
        model=(f"model.base {config.model.base}", [chain.revision, chain.base_hashes()]),
        data=(f"the data of {config.dataset.name}", ids),
    )

    mx.random.seed(training.seed)
    model = load_base(chain.path, config.model.bits)
    adapter_config, optimizer = run.add_adapter(model)
    print(
        f"SFT of {config.model.base}: {len(rows)} rows, {run.total} steps of {batches.effective}, "
        f"{mx.default_device()}"
    )
    with run:
        if not run.finished:
            train_steps(run, model, optimizer, batches, held_out)

    if not distributed.is_main():
        return
    write_query_digests(run.folder, [example.query for example in data.train])
    source = {"stage": "sft"} | chain.base_entries(run.folder)
    run.finish(
        model,
        adapter_config | source | {"quantize_bits": config.model.bits},
        {
            "rows": len(rows),
            "languages": data.languages,
            "validation_rows": len(held_out),
            "best_is": "lowest validation loss" if held_out else "the last step",
        },
    )
    progress = run.progress
    why = "the last step"
    if held_out:
        why = f"validation loss {progress.best_value:.4f} at step {progress.best_step}"
    print(f"{run.folder}: adapter of {why}, {duration(run.elapsed())}")
    option = "" if run.folder == Path("outputs/sft") else f" --set model.sft={run.folder}"
    print(f"next: python train.py grpo{option}")
