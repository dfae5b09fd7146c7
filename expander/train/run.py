"""One training run on disk: its folder, metrics, checkpoints, best adapter and ways to stop."""

import importlib.metadata
import json
import math
import platform
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from expander.cli import Interrupted, duration
from expander.config import Config, to_yaml
from expander.files import write_json, write_text
from expander.model import adapter_weights, add_lora, lora_config, save_adapter
from expander.train import distributed
from expander.train.checkpoint import Checkpoint, Checkpoints
from expander.train.memory import cache_limit, preflight
from expander.train.optim import AdamW
from expander.train.rollout import RewardError
from expander.train.tracking import Tracker

METRICS, SAMPLES, RESULT = "metrics.jsonl", "samples.jsonl", "run.json"
# Nats a token; single steps of the default recipe reach 0.6 on the small model it was measured on.
RUNAWAY_KL = 1.0


def check_output(config: Config) -> None:
    """Fail on a folder that cannot be written before anything is loaded; rank 0 alone writes.

    Raises:
        OSError: it cannot be made, or nothing can be written in it.
    """
    folder = Path(config.model.output).expanduser()
    if distributed.rank():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        write_text(probe, "")
        probe.unlink()
    except OSError as error:
        raise OSError(f"model.output {folder}: cannot be written: {error.strerror}") from None


class Run:
    """The folder and the life of one training run; of several ranks, the first alone writes.

    `finish` leaves in the folder: the best adapter, last/ (the last one), config.yaml, metrics.jsonl
    and run.json. Until then checkpoints/ holds what `--resume` needs.
    """

    def __init__(self, config: Config, stage: str, total: int, resume: bool, overwrite: bool):
        self.folder = Path(config.model.output).expanduser()
        self.resume, self.overwrite = resume, overwrite
        self.leads = distributed.rank() == 0
        self.stage, self.total, self.training = stage, total, config.training
        self.config, self.config_text = config, to_yaml(config)
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", config.training.save_total_limit
        )
        self.step = self.first_step = 0
        self.best: dict[str, mx.array] | None = None
        self.best_value: float | None = None
        self.best_step = self.stale = 0
        self.elapsed_before = 0.0
        self.signum: int | None = None
        self.first_length: float | None = None
        self.warned: set[str] = set()
        self.whole: tuple[int, dict, dict] | None = None
        self.tracker = Tracker(config, stage, self.warn)
        self.start = self.last_save = time.monotonic()
        if self.leads:
            self._check()
        mx.set_cache_limit(cache_limit())
        mx.reset_peak_memory()

    @property
    def _started(self) -> Path:
        """The configuration that an unfinished run was started with."""
        return self.folder / "checkpoints" / "config.yaml"

    def _check(self) -> None:
        """Refuse what would lose or mix up an unfinished run; nothing is changed yet."""
        unfinished = self.checkpoints.steps()
        if unfinished and not self.resume and not self.overwrite:
            raise ValueError(
                f"{self.folder} holds an unfinished run at step {unfinished[0]}: go on with "
                "--resume, or start over with --overwrite"
            )
        if not self.resume:
            return
        if not unfinished:
            raise ValueError(f"--resume: {self.folder} holds no unfinished run")
        started = self._started
        if started.is_file() and started.read_text(encoding="utf-8") != self.config_text:
            raise ValueError(
                f"--resume: the configuration differs from the one {self.folder} was started with "
                f"({started}); run with that one, or start over with --overwrite"
            )

    def _claim(self) -> None:
        """From here on the folder is this run's: everything it needs has been loaded."""
        if self.overwrite:
            self.checkpoints.clear()
        write_text(self._started, self.config_text)
        if not self.resume:
            for name in (METRICS, SAMPLES):
                (self.folder / name).unlink(missing_ok=True)

    def add_adapter(self, model) -> tuple[dict, AdamW]:
        """Put LoRA layers on the model, fresh ones or, resumed, the checkpoint's.

        Returns:
            Their configuration for `finish`, and an optimiser over them in the same state.
        """
        lora = self.config.lora
        adapter_config = lora_config(
            model, lora.rank, lora.alpha, lora.dropout, lora.target_modules
        )
        add_lora(model, adapter_config)
        optimizer = AdamW(self.training, self.total)
        optimizer.init(model.trainable_parameters())
        self.restore(model, optimizer)
        return adapter_config, optimizer

    def restore(self, model, optimizer: optim.Optimizer) -> None:
        """Put the newest whole checkpoint back if the run is resumed; every rank has then what
        rank 0 has."""
        if self.resume and self.leads:
            self._read_checkpoint(model, optimizer)
        if distributed.size() > 1:
            adapters = distributed.broadcast(adapter_weights(model))
            model.load_weights(list(adapters.items()), strict=False)
            optimizer.state = distributed.broadcast(optimizer.state)
            [(step, state), *_] = distributed.gather((self.step, self._progress()))
            self._set_progress(step, state)

    def _progress(self) -> dict:
        return {
            "best_value": self.best_value,
            "best_step": self.best_step,
            "stale": self.stale,
            "elapsed": self.elapsed(),
            "first_length": self.first_length,
            "tracked": self.tracker.place,
        }

    def _set_progress(self, step: int, state: dict) -> None:
        self.step = self.first_step = step
        self.best_value, self.best_step = state["best_value"], state["best_step"]
        self.stale, self.elapsed_before = state["stale"], state["elapsed"]
        self.first_length, self.tracker.place = state["first_length"], state["tracked"]

    def _read_checkpoint(self, model, optimizer: optim.Optimizer) -> None:
        """Without a whole one the run starts at step 0."""
        found: Checkpoint | None = self.checkpoints.latest(warn=self.warn)
        if found is None:
            self._trim_logs(-1)
            return
        model.load_weights(list(found.arrays["adapters"].items()), strict=False)
        optimizer.state = tree_unflatten(list(found.arrays["optimizer"].items()))
        self.best = found.arrays.get("best")
        self._set_progress(found.step, found.state)
        self._trim_logs(found.step)
        print(f"resuming at step {found.step} of {self.total}")

    def _trim_logs(self, step: int) -> None:
        """Drop what was logged after the checkpoint: those steps are run again."""
        for path in (self.folder / METRICS, self.folder / SAMPLES):
            if not path.is_file():
                continue
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except ValueError:
                    continue  # the last line of a killed run may be cut
            write_text(path, "".join(kept))

    def seed(self) -> None:
        """What the next step draws at random depends on the seed, the step and the rank alone: a
        resumed run draws the same, and no two ranks do."""
        name = f"{self.training.seed}:{self.step}:{distributed.rank()}"
        mx.random.seed(random.Random(name).getrandbits(64))

    def keep(self, model, optimizer: optim.Optimizer) -> None:
        """Remember this step as the last whole one: what `save` writes, even in the midst of the next.

        It holds references only: MLX replaces arrays, it does not change them.
        """
        arrays = {
            "adapters": adapter_weights(model),
            "optimizer": dict(tree_flatten(optimizer.state)),
        }
        if self.best is not None:
            arrays["best"] = self.best
        mx.eval(arrays)
        self.whole = self.step, self._progress(), arrays

    def save(self) -> Path:
        """Write the last whole step as a checkpoint."""
        path = self.checkpoints.save(*self.whole)
        self.last_save = time.monotonic()
        return path

    def end_step(self, model, optimizer: optim.Optimizer) -> None:
        """Save when it is time, and stop when a signal came to any rank.

        Raises:
            Interrupted: after saving.
        """
        signum = max(distributed.gather(self.signum or 0))
        saved = None
        if self.leads:
            self.keep(model, optimizer)
            if signum or self.save_due():
                saved = self.save()
        if signum:
            distributed.barrier()  # a rank that ends may have the others ended, by mlx.launch
            raise self.interrupted(signum, saved)

    def _give_up(self, trouble: str) -> str:
        """Save the last whole step, for a run that cannot go on; what to tell the user."""
        if not self.leads:
            return trouble
        if self.whole is None:
            return f"{trouble}; no new step was done"
        return f"{trouble}; step {self.whole[0]} is saved in {self.save()}: go on with --resume"

    def preflight(self, chain, longest: int) -> None:
        """Say what the run will need of the memory, and warn when it is too much."""
        line, warning = preflight(self.stage, self.config, chain, longest)
        print(line)
        if warning:
            self.warn(warning)

    def save_due(self) -> bool:
        """Whether it is time: by minutes where set, else by steps."""
        minutes = self.training.save_interval_minutes
        if minutes is not None:
            return time.monotonic() - self.last_save >= minutes * 60
        return self.step % self.training.save_steps == 0

    def consider(self, value: float, model, higher_is_better: bool) -> bool:
        """Keep the adapter if `value` is the best so far."""
        previous = self.best_value
        better = previous is None or (value > previous if higher_is_better else value < previous)
        if better:
            self.best = {k: mx.array(v) for k, v in adapter_weights(model).items()}
            self.best_value, self.best_step, self.stale = value, self.step, 0
        else:
            self.stale += 1
        return better

    def out_of_patience(self) -> bool:
        return self.training.patience is not None and self.stale >= self.training.patience

    def elapsed(self) -> float:
        return self.elapsed_before + time.monotonic() - self.start

    def left(self) -> str:
        done = self.step - self.first_step
        rate = (time.monotonic() - self.start) / done if done else 0.0
        return duration(rate * (self.total - self.step))

    def log(self, record: dict) -> None:
        """One JSON object a line; numbers that are not finite become null."""
        if not self.leads:
            return
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        with (self.folder / METRICS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": self.step, **clean}) + "\n")
        self.tracker.log(self.step, clean)

    def log_samples(self, rollouts, group: int, prompts: int = 2) -> None:
        """The first few groups in full, to read what the policy learns."""
        if not self.leads:
            return
        with (self.folder / SAMPLES).open("a", encoding="utf-8") as stream:
            for r in rollouts[: prompts * group]:
                sample = {
                    "step": self.step,
                    "query": r.query,
                    "completion": r.text,
                    "finished": r.finished,
                    "rubric": r.rubric,
                    "penalties": r.penalties,
                    "reward": r.reward,
                    "advantage": r.advantage,
                }
                stream.write(json.dumps(sample, ensure_ascii=False) + "\n")

    def watch(self, record: dict) -> None:
        """Warn, once each, of what ruins a GRPO run."""
        length = record["completions/mean_length"]
        self.first_length = self.first_length or length
        troubles = {
            "the KL to the SFT model is running away: lower learning_rate or raise grpo.beta": (
                record["kl"] > RUNAWAY_KL
            ),
            "every group has equal rewards, so nothing is learnt: raise num_generations or "
            "generation.temperature": record["frac_reward_zero_std"] == 1.0,
            "every completion was cut off at the limit: raise grpo.max_completion_length, or train "
            "SFT for longer": record["completions/clipped_ratio"] == 1.0,
            "completions are under a third of their first length: look at samples.jsonl and "
            "grpo.penalties": length < self.first_length / 3,
        }
        for trouble, present in troubles.items():
            if present and trouble not in self.warned:
                self.warned.add(trouble)
                self.warn(f"step {self.step}: {trouble}")

    def say(self, text: str) -> None:
        print(f"step {self.step}/{self.total}  {text}", flush=True)

    def warn(self, text: str) -> None:
        if self.leads:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def __enter__(self):
        if self.leads:
            self._claim()
            self.tracker.start()
        self.over = distributed.watch(self._give_up)

        def remember(signum, frame):
            self.signum = signum
            signal.signal(signum, self.handlers[signum])  # a second one acts at once
            if self.leads:
                print("\nstopping after this step", file=sys.stderr, flush=True)

        self.handlers = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
        if shutil.which("caffeinate"):
            print("keep the Mac awake meanwhile, in another terminal: caffeinate -is")
        return self

    def __exit__(self, kind, error, trace):
        self.over.set()
        try:
            if distributed.is_loss(error):
                raise ConnectionError(self._give_up(distributed.LOSS)) from None
            if isinstance(error, RewardError | RuntimeError):  # the latter from MLX: out of memory
                raise type(error)(self._give_up(str(error))) from error
        finally:
            for signum, handler in self.handlers.items():
                signal.signal(signum, handler)
            self.tracker.finish()

    def interrupted(self, signum: int, saved: Path | None) -> Interrupted:
        return Interrupted(
            signum,
            f"stopped at step {self.step} of {self.total}, saved in {saved}; "
            f"go on with: python train.py {self.stage} --resume (and the same options)",
        )

    def not_finite(self, what: str, rows: list[str]) -> ValueError:
        steps = self.checkpoints.steps()
        back = f"the last good checkpoint is step {steps[0]}" if steps else "nothing was saved yet"
        return ValueError(
            f"{what} is not finite at step {self.step} (rows {', '.join(rows)}); {back}; "
            "lower training.learning_rate or look at these rows"
        )

    def finish(self, model, adapter_config: dict, result: dict) -> None:
        """Write the best adapter as the run's result and drop the checkpoints.

        Args:
            adapter_config: for mlx-lm, with the base model or the adapter beneath in it.
            result: what run.json should say besides.
        """
        last, beside = adapter_weights(model), dict(adapter_config)
        if "parent" in beside:
            beside["parent"] = f"../{beside['parent']}"
        save_adapter(self.folder / "last", last, beside)
        save_adapter(self.folder, self.best or last, adapter_config)
        write_text(self.folder / "config.yaml", self.config_text)
        versions = {n: importlib.metadata.version(n) for n in ("mlx", "mlx-lm", "numpy")}
        write_json(
            self.folder / RESULT,
            {
                "stage": self.stage,
                "steps": self.step,
                "best_step": self.best_step,
                "best_value": self.best_value,
                "seconds": round(self.elapsed(), 1),
                "peak_memory_gb": round(mx.get_peak_memory() / 1e9, 2),
                "device": str(mx.default_device()),
                "ranks": distributed.size(),
                "versions": {"python": platform.python_version(), **versions},
                **result,
            },
        )
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
