"""A run's logs: metrics.jsonl and samples.jsonl, one JSON object per line."""

import json
import math
from pathlib import Path

from expander.files import write_text
from expander.train import distributed
from expander.train.rollout import Rollout

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
SAMPLED_GROUPS = 2  # groups of completions logged per step, to read what the policy learns


def finite(record: dict) -> dict:
    """`record` with None for numbers that are not finite, which JSON cannot hold.

    >>> finite({"loss": float("nan"), "tokens": 3})
    {'loss': None, 'tokens': 3}
    """
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }


def _append(path: Path, records: list[dict]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def log_metrics(folder: Path, step: int, record: dict) -> None:
    _append(folder / METRICS, [{"step": step, **record}])


def log_samples(folder: Path, step: int, rollouts: list[Rollout], group: int) -> None:
    """Log the first few groups of completions in full, on rank 0."""
    if not distributed.is_main():
        return
    samples = [
        {
            "step": step,
            "query": r.query,
            "completion": r.text,
            "finished": r.finished,
            "rubric": r.rubric,
            "penalties": r.penalties,
            "reward": r.reward,
            "advantage": r.advantage,
        }
        for r in rollouts[: SAMPLED_GROUPS * group]
    ]
    _append(folder / SAMPLES, samples)


def trim_logs(folder: Path, step: int) -> None:
    """Drop what was logged after `step`: a resumed run repeats those steps."""
    for path in (folder / METRICS, folder / SAMPLES):
        if not path.is_file():
            continue
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:
                continue  # a killed run may leave its last line incomplete
        write_text(path, "".join(kept))


def remove_logs(folder: Path) -> None:
    for name in (METRICS, SAMPLES):
        (folder / name).unlink(missing_ok=True)
