"""Send a run's metrics to trackio (a local database) or Weights & Biases, if configured.

metrics.jsonl is written in any case, and no failure of a tracker ends the training.
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
    """Check that the configured tracker is installed, before anything is loaded.

    Raises:
        ValueError: the tracker that `tracking.to` names is not installed.
    """
    # Without an origin it is only a folder: wandb leaves a wandb/ folder where it runs.
    if tracking.to and getattr(importlib.util.find_spec(tracking.to), "origin", None) is None:
        raise ValueError(
            f"tracking.to {tracking.to}: not installed; pip install {tracking.to}, or set "
            "tracking.to to null"
        )


def expand(name: str, now: datetime) -> str:
    """Fill {day} and {time} into a run's name.

    >>> expand("sft {day} {time}", datetime(2026, 3, 1, 14, 5))
    'sft 2026-03-01 14:05'
    """
    return name.replace("{day}", f"{now:%Y-%m-%d}").replace("{time}", f"{now:%H:%M}")


class Tracker:
    """The run at the tracker named by `tracking.to`; does nothing if that is null.

    `place` identifies the tracked run; checkpoints save it, so that a resumed run continues it.
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
        except Exception as error:  # of any kind: the training matters more
            self.module = None
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            self.warn(f"{self.to} failed and gets no more metrics: {reason}")

    def start(self) -> None:
        if not self.to:
            return
        with self._harmless():
            # trackio finds a run by its name, wandb by its id.
            again = {"resume": "allow" if self.place["id"] else "never"}
            if self.to == "wandb":
                again = {"resume": "allow", "id": self.place["id"]}
            module, name = importlib.import_module(self.to), self.place["name"]
            run = module.init(project=self.project, name=name, config=self.config, **again)
            self.place["id"], self.module = run.id, module

    def log(self, step: int, record: dict) -> None:
        """Log the entries of `record` that are not None."""
        if self.module:
            with self._harmless():
                self.module.log({k: v for k, v in record.items() if v is not None}, step=step)

    def finish(self) -> None:
        if self.module:
            with self._harmless():
                self.module.finish()
            self.module = None
