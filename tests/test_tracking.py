"""tracking.py: what a tracker is told, and that a training never depends on it."""

import json
import sys
from datetime import datetime
from pathlib import Path

import mlx.core as mx
import pytest
from settings import section

from expander.config import load_config
from expander.train.run import Run
from expander.train.tracking import check_installed, expand

# Notes every call; what is in FAIL raises.
STAND_IN = """
import json, os

def note(name, *arguments):
    with open(os.environ["CALLS"], "a") as stream:
        stream.write(json.dumps([name, *arguments]) + "\\n")
    if name in os.environ.get("FAIL", "").split():
        raise RuntimeError(f"{name}: no answer\\nsecond line")

class Run:
    id = "1234"

def init(**arguments):
    note("init", arguments)
    return Run()

def log(metrics, step):
    note("log", step, metrics)

def finish():
    note("finish")
"""


class NoModel:
    """As much of a model and its optimiser as a checkpoint asks for."""

    state = {"step": mx.array(0)}  # noqa: RUF012

    def trainable_parameters(self):
        return {"layer": {"lora_a": mx.zeros((1,))}}

    def load_weights(self, weights, strict):
        assert not strict


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A stand-in for both trackers; `calls()` is what they were told since the last time."""
    for name in ("trackio", "wandb"):
        (tmp_path / f"{name}.py").write_text(STAND_IN, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "calls.jsonl"
    monkeypatch.setenv("CALLS", str(path))

    def read() -> list:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    yield read
    for name in ("trackio", "wandb"):
        sys.modules.pop(name, None)


def config(tmp_path: Path, *settings: str):
    return load_config("sft", None, [f"model.output={tmp_path / 'run'}", *settings])[0]


def names(calls: list) -> list[str]:
    return [name for name, *_ in calls]


def test_the_name_of_a_run():
    now = datetime(2026, 3, 1, 4, 5)
    assert expand("sft {day} {time}, {day} {x} {", now) == "sft 2026-03-01 04:05, 2026-03-01 {x} {"


def test_nothing_is_tracked_unless_asked_for(calls, tmp_path):
    asked_for = config(tmp_path, "tracking.project=expander", "tracking.run_name=mine")
    with Run(asked_for, "sft", 2, resume=False, overwrite=False) as run:
        run.log({"loss": 1.0})
    assert calls() == []


@pytest.mark.parametrize("to", ["trackio", "wandb"])
def test_a_tracker_gets_what_metrics_jsonl_gets(to, calls, tmp_path):
    asked_for = config(tmp_path, f"tracking.to={to}", "tracking.run_name=mine {day}")
    with Run(asked_for, "sft", 2, resume=False, overwrite=False) as run:
        run.begin_step()
        run.log({"loss": 1.5, "norm": float("nan"), "lr": 0.0})
        run.begin_step()
        run.log({"loss": 1.0})
    [init, *logged, finish] = calls()
    arguments = init[1]
    assert arguments.pop("config")["training"]["learning_rate"] == 2e-4
    assert arguments.pop("name") == f"mine {datetime.now():%Y-%m-%d}"
    again = {"trackio": {"resume": "never"}, "wandb": {"resume": "allow", "id": None}}[to]
    assert arguments == {"project": "qmd-query-expansion"} | again
    assert logged == [["log", 1, {"loss": 1.5, "lr": 0.0}], ["log", 2, {"loss": 1.0}]]
    assert finish == ["finish"]


@pytest.mark.parametrize("to", ["trackio", "wandb"])
def test_a_resumed_run_continues_the_same_tracked_run(to, calls, tmp_path):
    """Found by the name it got when it started, or by the tracker's id."""
    asked_for = config(tmp_path, f"tracking.to={to}", "tracking.project=expander")
    model = NoModel()
    with Run(asked_for, "sft", 2, resume=False, overwrite=False) as run:
        run.tracker.place["name"] = "sft 2026-03-01 04:05"
        run.begin_step()
        run._remember_step(model, model)
        run._save()
    calls()
    resumed = Run(asked_for, "sft", 2, resume=True, overwrite=False)
    resumed._restore(model, model)
    with resumed:
        pass
    [[_, arguments], *_] = calls()
    assert (arguments["project"], arguments["name"]) == ("expander", "sft 2026-03-01 04:05")
    assert arguments["resume"] == "allow"
    assert arguments.get("id") == {"trackio": None, "wandb": "1234"}[to]


def test_without_a_name_it_is_the_stage_and_the_time(calls, tmp_path):
    asked_for = config(tmp_path, "tracking.to=trackio")
    with Run(asked_for, "grpo", 2, resume=False, overwrite=False):
        pass
    name = calls()[0][1]["name"]
    assert datetime.strptime(name, "grpo %Y-%m-%d %H:%M") <= datetime.now()


@pytest.mark.parametrize(
    ("fail", "told"),
    [("init", ["init"]), ("log", ["init", "log"]), ("finish", ["init", "log", "log", "finish"])],
)
def test_a_tracker_that_fails_is_named_once_and_left_alone(
    fail, told, calls, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("FAIL", fail)
    asked_for = config(tmp_path, "tracking.to=trackio")
    with Run(asked_for, "sft", 2, resume=False, overwrite=False) as run:
        for _ in range(2):
            run.begin_step()
            run.log({"loss": 1.0})
    assert names(calls()) == told
    assert capsys.readouterr().err == (
        f"warning: trackio failed and gets no more metrics: {fail}: no answer\n"
    )
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_run_that_breaks_off_is_finished_at_the_tracker(calls, tmp_path):
    asked_for = config(tmp_path, "tracking.to=trackio")
    with (
        pytest.raises(ValueError, match="broken"),
        Run(asked_for, "sft", 2, resume=False, overwrite=False),
    ):
        raise ValueError("broken")
    assert names(calls()) == ["init", "finish"]


def test_what_is_not_installed_is_an_error(tmp_path, monkeypatch):
    check_installed(section("tracking", to=None))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    wanted = r"^tracking\.to wandb: not installed; pip install wandb, or .*null$"
    with pytest.raises(ValueError, match=wanted):
        check_installed(section("tracking", to="wandb"))
    (tmp_path / "wandb").mkdir()  # what wandb leaves where it is run
    with pytest.raises(ValueError, match=wanted):
        check_installed(section("tracking", to="wandb"))
    (tmp_path / "wandb" / "__init__.py").write_text("")
    sys.path_importer_cache.clear()
    check_installed(section("tracking", to="wandb"))


def test_a_missing_tracker_is_reported_before_anything_is_loaded(run, tmp_path):
    (tmp_path / "sft.yaml").write_text("tracking: {to: mlflow}\n")
    done = run(["train.py", "sft", "--config", tmp_path / "sft.yaml"])
    assert done.returncode == 2
    assert "tracking.to: 'mlflow' is not allowed; it takes one of trackio, wandb" in done.stderr
    settings = ["tracking.to=wandb", "dataset.name=nowhere.jsonl", f"model.output={tmp_path}"]
    done = run(["train.py", "sft", *(part for x in settings for part in ("--set", x))])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: tracking.to wandb: not installed")
    assert done.stderr.count("\n") == 1


def test_a_file_of_the_original_is_told_that_nothing_is_tracked(tmp_path):
    path = tmp_path / "original.yaml"
    path.write_text('tracking:\n  project: "expander"\n  run_name: "sft {day} {time}"\n')
    [ignored] = load_config("sft", path)[1]
    assert ignored.startswith("tracking (") and "tracking.to" in ignored
    assert load_config("sft", path, ["tracking.to=trackio"])[1] == []
    assert load_config("sft", path, ["tracking.to=null"])[1] == []
