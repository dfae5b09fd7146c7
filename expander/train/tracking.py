"""A run's metrics sent to trackio (a database on this machine) or Weights & Biases, when asked.

metrics.jsonl is written all the same, and nothing that a tracker does can end the training.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime

from expander.config import Config, Tracking

PROJECT = "qmd-query-expansion"


def check_installed(tracking: Tracking) -> None:
    """Fail before anything is loaded.

    Raises:
        ValueError: the tracker that `tracking.to` names is not installed.
    """
    # Without an origin it is a mere folder: wandb leaves a wandb/ where it is run.
    if tracking.to and getattr(importlib.util.find_spec(tracking.to), "origin", None) is None:
        raise ValueError(
            f"tracking.to {tracking.to}: it is not installed; pip install {tracking.to}, or leave "
            "tracking.to at null"
        )


def expand(name: str, now: datetime) -> str:
    """A run's name with {day} and {time} filled in.

    >>> expand("sft {day} {time}", datetime(2026, 3, 1, 14, 5))
    'sft 2026-03-01 14:05'
    """
    return name.replace("{day}", f"{now:%Y-%m-%d}").replace("{time}", f"{now:%H:%M}")


class Tracker:
    """The run at the tracker that `tracking.to` names; where it names none, nothing happens.

    `place` is where it is found again when the run is resumed: a checkpoint keeps it.
    """

    def __init__(self, config: Config, stage: str, warn: Callable[[str], None]):
        tracking = config.tracking
        self.to, self.project = tracking.to, tracking.project or PROJECT
        self.config, self.warn, self.module = asdict(config), warn, None
        name = expand(tracking.run_name or f"{stage} {{day}} {{time}}", datetime.now())
        self.place = {"name": name, "id": None}

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: the training is worth more
            self.module = None
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            self.warn(f"{self.to} failed and is left alone from here on: {reason}")

    def start(self) -> None:
        if not self.to:
            return
        with self._harmless():
            # trackio finds a run by its name, wandb by its id alone.
            again = {"resume": "allow" if self.place["id"] else "never"}
            if self.to == "wandb":
                again = {"resume": "allow", "id": self.place["id"]}
            module, name = importlib.import_module(self.to), self.place["name"]
            run = module.init(project=self.project, name=name, config=self.config, **again)
            self.place["id"], self.module = run.id, module

    def log(self, step: int, record: dict) -> None:
        """`record` without what is null."""
        if self.module:
            with self._harmless():
                self.module.log({k: v for k, v in record.items() if v is not None}, step=step)

    def finish(self) -> None:
        if self.module:
            with self._harmless():
                self.module.finish()
            self.module = None
