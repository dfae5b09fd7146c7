"""One training run on disk: its folder, its steps, its checkpoints and its best adapter."""

import importlib.metadata
import math
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from expander.cli import Interrupted, duration
from expander.config import Config, load_config, same_settings, to_yaml
from expander.files import json_digest, read_json, write_json, write_text
from expander.model import adapter_weights, add_lora, lora_config, save_adapter, wire_memory
from expander.train import distributed
from expander.train.checkpoint import Checkpoints
from expander.train.lock import Lock
from expander.train.logs import finite, log_metrics, remove_logs, trim_logs
from expander.train.memory import cache_limit, peak_resident
from expander.train.optim import AdamW
from expander.train.rewards import RewardError
from expander.train.signals import StopRequest
from expander.train.tracking import Tracker

RESULT = "run.json"
# In checkpoints/: what an unfinished run was started with.
STARTED, INPUTS = "config.yaml", "inputs.json"


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """`training.max_steps` if set (null and -1: not set), else the steps of all epochs."""
    training = config.training
    if training.max_steps is not None and training.max_steps > 0:
        return training.max_steps
    return math.ceil(training.epochs * steps_per_epoch)


def check_output(config: Config) -> None:
    """Check on rank 0 that the output folder is writable, before anything is loaded.

    Raises:
        OSError: the folder cannot be created or written.
    """
    folder = Path(config.model.output).expanduser()
    if not distributed.is_main():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        write_text(probe, "")
        probe.unlink()
    except OSError as error:
        raise OSError(f"model.output {folder}: cannot be written: {error.strerror}") from None


def not_finite(record: dict) -> list[str]:
    """The names of the step's losses and norms that are NaN or infinite.

    >>> not_finite({"loss": 1.5, "grad_norm": float("inf"), "seconds": 2.0})
    ['grad_norm']
    """
    checked = ("loss", "kl", "grad_norm")
    return [name for name in checked if not math.isfinite(record.get(name, 0.0))]


@dataclass
class Progress:
    """How far a run is; saved in every checkpoint."""

    step: int = 0
    best_value: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    skipped: int = 0  # steps without a finite gradient, which changed nothing
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    tracked: dict | None = None  # where the tracker finds the run again
    notes: dict = field(default_factory=dict)  # numbers that a stage remembers between steps


@dataclass(frozen=True)
class Evaluation:
    """The result on held-out rows: the value that chooses the best adapter, metrics, and a line."""

    value: float
    metrics: dict[str, float]
    line: str


class Run:
    """The folder and the life of one training run. Only rank 0 prints and writes.

    `finish` leaves in the folder the best adapter, last/ (the last adapter), config.yaml,
    metrics.jsonl and run.json. Until then checkpoints/ holds what `--resume` needs.

    A step is begin_step(), the work, finish_step(…). Anything that interrupts the work in between
    leaves the last finished step to be saved.

    Args:
        stage: "sft" (a lower validation loss is better) or "grpo" (a higher held-out reward is).

    Raises:
        ValueError: the folder holds an unfinished run and neither `resume` nor `overwrite` is set;
            or there is nothing to resume, or the configuration has changed since.
    """

    def __init__(self, config: Config, stage: str, total: int, resume: bool, overwrite: bool):
        self.config, self.stage, self.total = config, stage, total
        self.resume, self.overwrite = resume, overwrite
        self.folder = Path(config.model.output).expanduser()
        self.config_text = to_yaml(config)
        folder = self.folder / "checkpoints"
        self.checkpoints = Checkpoints(folder, config.training.save_total_limit)
        self.started_config, self.started_inputs = folder / STARTED, folder / INPUTS
        self.inputs: dict[str, str] = {}
        self.lock = Lock(self.folder)
        self.progress, self.first_step = Progress(), 0
        self.best: dict[str, mx.array] | None = None
        self.finished_step: tuple[int, dict, dict] | None = None  # what a checkpoint holds
        self.tracker = Tracker(config, stage, distributed.warn)
        self.stop = StopRequest(announce=distributed.is_main())
        self.start_time = self.last_save = time.monotonic()
        if distributed.is_main():
            self._check_folder()
        mx.set_cache_limit(cache_limit())
        wire_memory()
        mx.reset_peak_memory()

    # Starting

    def _check_folder(self) -> None:
        """Refuse what would lose or mix up an unfinished run; change nothing yet."""
        self.lock.check()
        self._check_ours()
        unfinished = self.checkpoints.steps()
        if unfinished and not self.resume and not self.overwrite:
            raise ValueError(
                f"{self.folder} holds an unfinished run at step {unfinished[0]}; continue it with "
                "--resume or start over with --overwrite"
            )
        if not self.resume:
            return
        if not unfinished:
            raise ValueError(f"--resume: {self.folder} holds no unfinished run")
        started = self.started_config
        if started.is_file() and not same_settings(self.stage, started, self.config):
            raise ValueError(
                f"--resume: the configuration differs from the one {self.folder} was started with "
                f"({started}); use that one, or start over with --overwrite"
            )

    def _check_ours(self) -> None:
        """Refuse a checkpoints/config.yaml that this program did not write: it would be replaced."""
        if self.started_config.is_file():
            try:
                load_config(self.stage, self.started_config)
            except ValueError:
                raise ValueError(
                    f"{self.started_config} is not a file of this program; choose another "
                    "model.output"
                ) from None

    def pin_inputs(self, **inputs: tuple[str, object]) -> None:
        """Record what the run starts from; every rank and every resume must have the same.

        Args:
            inputs: name → (what to call it in a message, its value, which JSON can hold).

        Raises:
            ValueError: the ranks differ, or a resumed run was started from something else.
        """
        self.inputs = {name: json_digest(value) for name, (_, value) in inputs.items()}
        distributed.check_same(configuration=self.config_text, **self.inputs)
        if not (self.resume and distributed.is_main() and self.started_inputs.is_file()):
            return
        started = read_json(self.started_inputs)
        for name, (label, _) in inputs.items():
            if started.get(name) != self.inputs[name]:
                raise ValueError(
                    f"--resume: {label} is not what {self.folder} was started with (SHA-256 "
                    f"{str(started.get(name))[:12]}, now {self.inputs[name][:12]}); restore it, or "
                    "start over with --overwrite"
                )

    def add_adapter(self, model) -> tuple[dict, AdamW]:
        """Add LoRA layers to the model: new ones or, if resumed, those of the last checkpoint.

        Returns:
            The adapter's configuration for `finish`, and an optimiser over it in the same state.
        """
        lora = self.config.lora
        adapter_config = lora_config(
            model,
            lora.rank,
            lora.alpha,
            lora.dropout,
            lora.target_modules,
            lora.modules_to_save,
        )
        add_lora(model, adapter_config)
        optimizer = AdamW(self.config.training, self.total)
        optimizer.init(model.trainable_parameters())
        self._restore(model, optimizer)
        return adapter_config, optimizer

    def _restore(self, model, optimizer: AdamW) -> None:
        """If resumed, load the newest intact checkpoint; give every rank what rank 0 has."""
        if self.resume and distributed.is_main():
            found = self.checkpoints.latest(warn=distributed.warn)
            trim_logs(self.folder, found.step if found else -1)
            if found:
                model.load_weights(list(found.arrays["adapters"].items()), strict=False)
                optimizer.state = tree_unflatten(list(found.arrays["optimizer"].items()))
                self.best = found.arrays.get("best")
                self.progress = Progress(**found.state)
                print(f"resuming at step {found.step} of {self.total}")
        if distributed.size() > 1:
            adapters = distributed.broadcast(adapter_weights(model))
            model.load_weights(list(adapters.items()), strict=False)
            optimizer.state = distributed.broadcast(optimizer.state)
            self.progress = Progress(**distributed.gather(asdict(self.progress))[0])
        self.first_step = self.step
        self.tracker.place = self.progress.tracked or self.tracker.place

    def __enter__(self) -> "Run":
        """Claim the folder: everything the run needs has been loaded."""
        if distributed.is_main():
            self.lock.__enter__()
            if self.overwrite:
                self.checkpoints.clear(STARTED, INPUTS)
            write_text(self.started_config, self.config_text)
            write_json(self.started_inputs, self.inputs)
            if not self.resume:
                remove_logs(self.folder)
            self.tracker.start()
        self.watchdog = distributed.watch(self._save_and_explain)
        self.stop.__enter__()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.watchdog.set()
        try:
            if distributed.is_loss(error):
                raise ConnectionError(self._save_and_explain(distributed.LOSS)) from None
            # RuntimeError: MLX is out of memory. OSError: a disk is full, or output went away.
            if isinstance(error, RewardError | RuntimeError | OSError):
                raise type(error)(self._save_and_explain(str(error))) from error
        finally:
            self.stop.__exit__()
            self.tracker.finish()
            self.lock.__exit__()

    # One step

    @property
    def step(self) -> int:
        """The number of the step in progress, or of the last one."""
        return self.progress.step

    @property
    def finished(self) -> bool:
        patience = self.config.training.patience
        out_of_patience = patience is not None and self.progress.evaluations_since_best >= patience
        return self.step >= self.total or out_of_patience

    @property
    def evaluation_due(self) -> bool:
        return self.step % self.config.training.eval_steps == 0 or self.step == self.total

    def begin_step(self) -> None:
        """Seed MLX's random numbers by the run's seed, the step and the rank only, so that a
        resumed run draws the same numbers and no two ranks do."""
        name = f"{self.config.training.seed}:{self.step}:{distributed.rank()}"
        mx.random.seed(random.Random(name).getrandbits(64))
        self.progress.step += 1

    def finish_step(
        self,
        record: dict,
        line: str,
        model,
        optimizer: AdamW,
        *,
        sources: Sequence[str],
        evaluate: Callable[[], Evaluation] | None = None,
    ) -> None:
        """End a step: check it, evaluate and save when due, log and print it, stop on a signal.

        Args:
            record: metrics of the step.
            line: what to print about it.
            sources: the rows or queries of the step, to name them in an error.
            evaluate: called when an evaluation is due.

        Raises:
            ValueError: too many steps in a row had no finite gradient.
            Interrupted: a signal was received; the step is saved.
        """
        self._count_skipped(record, sources)
        if evaluate and self.evaluation_due:
            found, better = self.evaluate(evaluate, model)
            record |= found.metrics
            line += f"  {found.line}{' (best)' if better else ''}"
        record |= {
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
            "resident_memory_gb": peak_resident() / 1e9,
            "seconds": self.elapsed(),
        }
        self.log(record)
        self.say(
            f"{line}  {record['tokens_per_second']:.0f} tok/s  "
            f"peak {record['peak_memory_gb']:.1f} GB  "
            f"resident {record['resident_memory_gb']:.1f} GB  {self.time_left()} left"
        )
        self._save_if_due(model, optimizer)

    def evaluate(self, evaluate: Callable[[], Evaluation], model) -> tuple[Evaluation, bool]:
        """Evaluate, and keep the adapter if it is the best so far.

        Returns:
            The evaluation, and whether it is the best.
        """
        found, progress = evaluate(), self.progress
        sign = -1.0 if self.stage == "sft" else 1.0
        better = progress.best_value is None or sign * found.value > sign * progress.best_value
        if better:
            self.best = {name: mx.array(value) for name, value in adapter_weights(model).items()}
            progress.best_value, progress.best_step = found.value, progress.step
        progress.evaluations_since_best = 0 if better else progress.evaluations_since_best + 1
        return found, better

    def _count_skipped(self, record: dict, sources: Sequence[str]) -> None:
        """Count and report a step that the optimiser skipped; stop after too many in a row."""
        progress, limit = self.progress, self.config.training.max_skipped_steps
        wrong = not_finite(record)
        if not wrong:
            progress.skipped_in_a_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        record |= {"skipped": True, "rows": list(sources)}
        trouble = f"{' and '.join(wrong)} not finite at step {self.step}"
        if progress.skipped_in_a_row < limit:
            distributed.warn(f"{trouble}; the step changed nothing (rows: {', '.join(sources)})")
            return
        self.log(record)
        steps = self.checkpoints.steps()
        last = f"the last good checkpoint is step {steps[0]}" if steps else "nothing was saved yet"
        raise ValueError(
            f"{trouble}, for {limit} steps in a row (training.max_skipped_steps); {last}; lower "
            f"training.learning_rate, or look at these rows: {', '.join(sources)}"
        )

    # Saving and stopping

    def _save_if_due(self, model, optimizer: AdamW) -> None:
        signum = max(distributed.gather(self.stop.received))
        saved = None
        if distributed.is_main():
            self._remember_step(model, optimizer)
            if not self.finished and (signum or self._save_due()):
                saved = self._save()
        if signum and not self.finished:
            distributed.barrier()  # mlx.launch may kill the other ranks when one ends
            raise Interrupted(
                signum,
                f"stopped at step {self.step} of {self.total}, saved in {saved}; continue with: "
                f"python train.py {self.stage} --resume (and the same options)",
            )

    def _save_due(self) -> bool:
        training = self.config.training
        if training.save_interval_minutes is not None:
            return time.monotonic() - self.last_save >= training.save_interval_minutes * 60
        return self.step % training.save_steps == 0

    def _remember_step(self, model, optimizer: AdamW) -> None:
        """Keep references to what a checkpoint of this step holds; MLX never changes arrays."""
        arrays = {
            "adapters": adapter_weights(model),
            "optimizer": dict(tree_flatten(optimizer.state)),
        }
        if self.best is not None:
            arrays["best"] = self.best
        mx.eval(arrays)
        state = asdict(self.progress) | {"seconds": self.elapsed(), "tracked": self.tracker.place}
        self.finished_step = self.step, state, arrays

    def _save(self) -> Path:
        """Write the last finished step as a checkpoint."""
        path = self.checkpoints.save(*self.finished_step)
        self.last_save = time.monotonic()
        return path

    def _save_and_explain(self, trouble: str) -> str:
        """Save the last finished step of a run that cannot continue; the message for the user."""
        if not distributed.is_main():
            return trouble
        if self.finished_step is None:
            return f"{trouble}; no new step was finished"
        return (
            f"{trouble}; step {self.finished_step[0]} is saved in {self._save()}: continue with "
            "--resume"
        )

    # Reporting

    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.progress.seconds + time.monotonic() - self.start_time

    def time_left(self) -> str:
        done = self.step - self.first_step
        rate = (time.monotonic() - self.start_time) / done if done else 0.0
        return duration(rate * (self.total - self.step))

    def log(self, record: dict) -> None:
        if distributed.is_main():
            record = finite(record)
            log_metrics(self.folder, self.step, record)
            self.tracker.log(self.step, record)

    def say(self, text: str) -> None:
        try:
            print(f"step {self.step}/{self.total}  {text}", flush=True)
        except OSError as error:
            self.stop.output_lost(error)

    # Finishing

    def finish(self, model, adapter_config: dict, result: dict) -> None:
        """Write the best adapter as the run's result and remove the checkpoints.

        Args:
            adapter_config: for mlx-lm, plus the base model or the parent adapter.
            result: further entries of run.json.
        """
        if self.step and self.progress.skipped == self.step:
            raise ValueError(
                f"none of the {self.step} steps had a finite gradient, so nothing was trained; lower "
                "training.learning_rate, or try another base model"
            )
        last, last_config = adapter_weights(model), dict(adapter_config)
        if "parent" in last_config:
            last_config["parent"] = f"../{last_config['parent']}"
        if "base" in last_config:
            base = last_config["base"]
            last_config["base"] = base | {"relative": f"../{base['relative']}"}
        save_adapter(self.folder / "last", last, last_config)
        save_adapter(self.folder, self.best or last, adapter_config)
        write_text(self.folder / "config.yaml", self.config_text)
        versions = {n: importlib.metadata.version(n) for n in ("mlx", "mlx-lm", "numpy")}
        write_json(
            self.folder / RESULT,
            {
                "stage": self.stage,
                "steps": self.step,
                "best_step": self.progress.best_step,
                "best_value": self.progress.best_value,
                "skipped_steps": self.progress.skipped,
                "seconds": round(self.elapsed(), 1),
                "peak_memory_gb": round(mx.get_peak_memory() / 1e9, 2),
                "device": str(mx.default_device()),
                "ranks": distributed.size(),
                "versions": {"python": platform.python_version(), **versions},
                **result,
            },
        )
        self.checkpoints.clear(STARTED, INPUTS)
