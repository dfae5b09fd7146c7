"""run.py: learning rates, the optimiser, and the folder of a run."""

import json
import math
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from settings import section

from expander import model as models
from expander.cli import Interrupted
from expander.config import Config, Training, load_config
from expander.train.optim import AdamW, schedule
from expander.train.run import Evaluation, Run, check_output, not_finite


class Two(nn.Module):
    """Two parameters, to be optimised."""

    def __init__(self):
        super().__init__()
        self.a = mx.array([1.0, -2.0, 3.0])
        self.b = mx.array([[0.5]])


# Learning rates


def training(**changes) -> Training:
    return replace(load_config("sft")[0].training, warmup_ratio=0.0, **changes)


def hugging_face(name: str, step: int, warmup: int, total: int) -> float:
    """The factor of transformers.get_{name}_schedule_with_warmup."""
    if step < warmup:
        return step / max(1, warmup)
    if name == "constant":
        return 1.0
    if name == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "ratio"), [(100, 0.03), (7, 0.5), (1, 0.03), (10, 0.0)])
def test_the_learning_rate_is_hugging_faces(name, total, ratio):
    rate = schedule(
        section("training", learning_rate=3e-4, lr_scheduler=name, warmup_ratio=ratio), total
    )
    warmup = math.ceil(ratio * total)
    for step in range(total):
        expected = 3e-4 * hugging_face(name, step, warmup, total)
        assert rate(mx.array(step)).item() == pytest.approx(expected, rel=1e-4, abs=1e-10)


def test_the_learning_rate_in_figures():
    rate = schedule(
        section("training", learning_rate=1.0, lr_scheduler="cosine", warmup_ratio=0.1), 20
    )
    values = [round(rate(mx.array(step)).item(), 4) for step in (0, 1, 2, 11, 20)]
    assert values == [0.0, 0.5, 1.0, 0.5, 0.0]


# The optimiser


def torch_adamw(steps: list[list[np.ndarray]], values, rate, decay, limit) -> tuple[list, float]:
    """torch.nn.utils.clip_grad_norm_, then torch.optim.AdamW, in float64; the last norm."""
    values = [v.astype(np.float64) for v in values]
    first, second = ([np.zeros_like(v) for v in values] for _ in range(2))
    for t, grads in enumerate(steps, 1):
        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads))
        factor = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        for i, g in enumerate(grads):
            g = g * factor
            values[i] *= 1 - rate(t - 1) * decay
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g**2
            mean, spread = first[i] / (1 - 0.9**t), second[i] / (1 - 0.999**t)
            values[i] -= rate(t - 1) * mean / (np.sqrt(spread) + 1e-8)
    return values, norm


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_pytorchs_after_clipping(limit, decay):
    training = section(
        "training",
        learning_rate=0.1,
        lr_scheduler="linear",
        warmup_ratio=0.0,
        max_grad_norm=limit,
        weight_decay=decay,
    )
    model, optimizer = Two(), AdamW(training, total=4)
    optimizer.init(model.trainable_parameters())
    steps = [
        [np.array([3.0, -0.1, 0.0]), np.array([[4.0]])],
        [np.array([-0.2, 0.3, 1e-4]), np.array([[0.0]])],
        [np.array([5.0, 5.0, -5.0]), np.array([[-1.0]])],
    ]
    for a, b in steps:
        optimizer.update(model, {"a": mx.array(a), "b": mx.array(b)})
        mx.eval(model.parameters(), optimizer.state)
    expected, norm = torch_adamw(
        steps,
        [np.array([1.0, -2.0, 3.0]), np.array([[0.5]])],
        lambda step: 0.1 * (1 - step / 4),
        decay,
        limit,
    )
    assert np.allclose(model.a, expected[0], atol=1e-5)
    assert np.allclose(model.b, expected[1], atol=1e-5)
    assert optimizer.state["grad_norm"].item() == pytest.approx(norm, rel=1e-5)


def test_one_step_of_adamw_by_hand():
    """Norm 5 clipped to 0.5; the first step of Adam is the rate times the gradient's sign."""
    training = section(
        "training", learning_rate=0.01, lr_scheduler="constant", warmup_ratio=0.0, max_grad_norm=0.5
    )
    model, optimizer = Two(), AdamW(training, total=1)
    optimizer.update(model, {"a": mx.array([3.0, -4.0, 0.0]), "b": mx.array([[0.0]])})
    assert optimizer.state["grad_norm"].item() == pytest.approx(5.0)
    assert np.allclose(model.a, [0.99, -1.99, 3.0], atol=1e-6)
    assert model.b.item() == 0.5


def test_the_first_update_is_at_step_0_of_the_schedule():
    model, optimizer = (
        Two(),
        AdamW(section("training", learning_rate=1.0, warmup_ratio=0.5), total=4),
    )
    gradient = {"a": mx.ones((3,)), "b": mx.ones((1, 1))}
    optimizer.update(model, gradient)
    assert model.b.item() == 0.5 and optimizer.learning_rate.item() == 0.0
    optimizer.update(model, gradient)
    assert optimizer.learning_rate.item() == 0.5


# The folder


@pytest.fixture
def config(tmp_path) -> Config:
    config, _ = load_config(
        "sft", None, [f"model.output={tmp_path / 'run'}", "training.save_interval_minutes=null"]
    )
    return config


def trained(tiny_qwen3: Path) -> tuple[nn.Module, AdamW]:
    """A model with LoRA layers after one update, and its optimiser."""
    model = models.load_base(tiny_qwen3)
    mx.random.seed(3)
    models.add_lora(model, models.lora_config(model, 2, 4.0, 0.0, ("q_proj",)))
    optimizer = AdamW(section("training", warmup_ratio=0.0), total=10)
    optimizer.init(model.trainable_parameters())
    ones = {n: mx.ones_like(v) for n, v in models.adapter_weights(model).items()}
    optimizer.update(model, tree_unflatten(list(ones.items())))
    mx.eval(model.parameters(), optimizer.state)
    return model, optimizer


def weights_equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


def evaluation(value: float) -> Evaluation:
    return Evaluation(value, {"val_loss": value}, f"val {value}")


def finish(run: Run, model, optimizer, loss: float = 1.0, **options) -> None:
    """End a step of this loss."""
    record = {"loss": loss, "grad_norm": 1.0, "tokens_per_second": 10.0}
    run.finish_step(record, f"loss {loss}", model, optimizer, sources=["rows.jsonl:1"], **options)


def test_a_checkpoint_restores_adapter_optimizer_progress_and_random_numbers(
    config, tiny_qwen3, capsys
):
    model, optimizer = trained(tiny_qwen3)
    config.training.save_steps, config.training.eval_steps = 2, 1
    with Run(config, "sft", 10, resume=False, overwrite=False) as run:
        for loss in (2.5, 2.6):
            run.begin_step()
            finish(run, model, optimizer, loss, evaluate=partial(evaluation, loss))
        run.begin_step()
        drawn = mx.random.normal((5,)).tolist()
        run.log({"loss": 3.0})  # after the checkpoint: a resumed run repeats this step
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut by a kill

    fresh = models.load_base(tiny_qwen3)
    models.add_lora(fresh, models.lora_config(fresh, 2, 4.0, 0.0, ("q_proj",)))
    other = AdamW(section("training", warmup_ratio=0.0), total=10)
    other.init(fresh.trainable_parameters())
    again = Run(config, "sft", 10, resume=True, overwrite=False)
    again._restore(fresh, other)
    progress = again.progress
    assert (again.step, progress.best_value, progress.best_step) == (2, 2.5, 1)
    assert progress.evaluations_since_best == 1
    assert weights_equal(models.adapter_weights(fresh), models.adapter_weights(model))
    assert weights_equal(again.best, run.best)
    assert weights_equal(dict(tree_flatten(other.state)), dict(tree_flatten(optimizer.state)))
    again.begin_step()
    assert mx.random.normal((5,)).tolist() == drawn
    again.begin_step()
    assert mx.random.normal((5,)).tolist() != drawn
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [2.5, 2.6]
    assert "resuming at step 2 of 10" in capsys.readouterr().out


def test_an_unfinished_run_is_neither_overwritten_nor_resumed_with_other_settings(
    config, tiny_qwen3
):
    config.training.save_steps = 1
    with Run(config, "sft", 10, resume=False, overwrite=False) as run:
        run.begin_step()
        finish(run, *trained(tiny_qwen3))
    with pytest.raises(ValueError, match=r"unfinished run at step 1; .*--resume.*--overwrite"):
        Run(config, "sft", 10, resume=False, overwrite=False)
    config.training.epochs = 9
    with pytest.raises(ValueError, match="the configuration differs"):
        Run(config, "sft", 10, resume=True, overwrite=False)
    with Run(config, "sft", 10, resume=False, overwrite=True):
        pass
    with pytest.raises(ValueError, match="holds no unfinished run"):
        Run(config, "sft", 10, resume=True, overwrite=False)


def test_a_run_that_never_begins_leaves_the_folder_alone(config, tiny_qwen3):
    """The model may fail to load between the two."""
    config.training.save_steps = 1
    with Run(config, "sft", 10, resume=False, overwrite=False) as run:
        run.begin_step()
        finish(run, *trained(tiny_qwen3))
    before = sorted(run.folder.rglob("*"))
    Run(config, "sft", 10, resume=False, overwrite=True)
    assert sorted(run.folder.rglob("*")) == before


def test_an_error_within_a_step_loses_no_finished_step(config, tiny_qwen3):
    model, optimizer = trained(tiny_qwen3)
    before = models.adapter_weights(model)
    run = Run(config, "grpo", 10, resume=False, overwrite=False)
    with pytest.raises(RuntimeError, match=r"^out of memory; no new step was finished$"), run:
        raise RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match=r"; step 1 is saved in .*step-000001: .*--resume"), run:
        run.begin_step()
        finish(run, model, optimizer)
        later = {name: value + 1 for name, value in before.items()}
        model.load_weights(list(later.items()), strict=False)
        run.begin_step()  # updated and counted, but its evaluation fails
        raise RuntimeError("out of memory")
    found = run.checkpoints.latest(pytest.fail)
    assert found.step == 1 and weights_equal(found.arrays["adapters"], before)


def test_the_best_adapter_is_kept_and_patience_runs_out(config, tiny_qwen3):
    config.training.patience = 2
    run = Run(config, "sft", 10, resume=False, overwrite=False)
    model, _ = trained(tiny_qwen3)
    decisions = []
    for value in [3.0, 2.0, 2.0, 1.0, 1.5, 1.2]:
        run.begin_step()
        _, better = run.evaluate(partial(evaluation, value), model)
        decisions.append((better, run.finished))
    assert [better for better, _ in decisions] == [True, True, False, True, False, False]
    assert [finished for _, finished in decisions] == [False] * 5 + [True]
    assert (run.progress.best_value, run.progress.best_step) == (1.0, 4)
    run.stage = "grpo"  # where a higher value is better
    assert run.evaluate(lambda: evaluation(1.1), model)[1]


def test_the_result_of_a_run(config, tiny_qwen3):
    config.training.save_steps = config.training.eval_steps = 1
    run = Run(config, "sft", 10, resume=False, overwrite=False)
    model, optimizer = trained(tiny_qwen3)
    adapter_config = {"fine_tune_type": "lora", "parent": "sft"}
    best = models.adapter_weights(model)
    later = {name: value + 1 for name, value in best.items()}
    with run:
        for value, weights in ((1.0, best), (2.0, later)):
            run.begin_step()
            model.load_weights(list(weights.items()), strict=False)
            finish(run, model, optimizer, evaluate=partial(evaluation, value))
    run.finish(model, adapter_config, {"rows": 3})

    folder = run.folder
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
        "config.yaml",
        "last",
        "metrics.jsonl",
        "run.json",
    ]
    assert weights_equal(mx.load(str(folder / "adapters.safetensors")), best)
    assert weights_equal(mx.load(str(folder / "last" / "adapters.safetensors")), later)
    assert json.loads((folder / "adapter_config.json").read_text())["parent"] == "sft"
    assert json.loads((folder / "last" / "adapter_config.json").read_text())["parent"] == "../sft"
    assert load_config("sft", folder / "config.yaml")[0] == config
    result = json.loads((folder / "run.json").read_text())
    assert (result["steps"], result["best_step"], result["best_value"]) == (2, 1, 1.0)
    assert result["rows"] == 3 and result["versions"].keys() >= {"python", "mlx", "mlx-lm"}


def test_metrics_are_json_whatever_the_numbers(config):
    with Run(config, "sft", 10, resume=False, overwrite=False) as run:
        run.log({"loss": float("nan"), "norm": float("inf"), "count": 3})
    [line] = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 0,
        "loss": None,
        "norm": None,
        "count": 3,
    }


def test_a_checkpoint_is_due_by_steps_or_by_minutes(config, tiny_qwen3):
    config.training.save_steps = 4
    model, optimizer = trained(tiny_qwen3)
    with Run(config, "sft", 20, resume=False, overwrite=False) as run:
        for _ in range(9):
            run.begin_step()
            finish(run, model, optimizer)
        assert run.checkpoints.steps() == [8, 4]
        config.training.save_interval_minutes = 10.0
        for passed, saved in ((590, False), (20, True)):
            run.last_save -= passed
            run.begin_step()
            finish(run, model, optimizer)
            assert (run.checkpoints.steps()[0] == run.step) == saved


def test_steps_that_are_not_finite_are_skipped_and_too_many_in_a_row_stop(
    config, tiny_qwen3, capsys
):
    config.training.max_skipped_steps, config.training.save_steps = 2, 4
    model, optimizer = trained(tiny_qwen3)
    with Run(config, "sft", 10, resume=False, overwrite=False) as run:
        for loss in (1.0, math.nan, 1.0, math.inf):
            run.begin_step()
            finish(run, model, optimizer, loss=loss)
        run.begin_step()
        with pytest.raises(ValueError, match=r"step 5, for 2 steps.*step 4;.*rows\.jsonl:1"):
            finish(run, model, optimizer, loss=math.nan)
    assert run.progress.skipped == 3
    warnings = capsys.readouterr().err.splitlines()
    assert ["step 2" in warnings[0], "step 4" in warnings[1], len(warnings)] == [True, True, 2]
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    skipped = [record for record in map(json.loads, lines) if record.get("skipped")]
    assert [record["step"] for record in skipped] == [2, 4, 5]
    assert all(record["rows"] == ["rows.jsonl:1"] for record in skipped)
    assert not_finite({"loss": 1.0, "kl": math.inf, "grad_norm": math.nan}) == ["kl", "grad_norm"]


def test_a_run_whose_steps_were_all_skipped_has_no_result(config, tiny_qwen3):
    model, optimizer = trained(tiny_qwen3)
    with Run(config, "sft", 1, resume=False, overwrite=False) as run:
        run.begin_step()
        finish(run, model, optimizer, loss=math.nan)
    with pytest.raises(ValueError, match="none of the 1 steps"):
        run.finish(model, {}, {})
    assert not (run.folder / "adapters.safetensors").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments_nor_schedule(bad):
    model, optimizer = Two(), AdamW(training(), total=4)
    good = {"a": mx.array([3.0, -4.0, 0.0]), "b": mx.array([[1.0]])}
    optimizer.update(model, good)
    before = dict(tree_flatten([model.parameters(), optimizer.state]))
    optimizer.update(model, {"a": mx.array([3.0, bad, 0.0]), "b": mx.array([[1.0]])})
    assert not mx.isfinite(optimizer.state.pop("grad_norm")).item()
    before.pop("1.grad_norm")
    after = dict(tree_flatten([model.parameters(), optimizer.state]))
    assert weights_equal(after, before)


def test_a_signal_waits_for_the_end_of_the_step(config, tiny_qwen3, capsys):
    before = signal.getsignal(signal.SIGTERM)
    run = Run(config, "sft", 10, resume=False, overwrite=False)
    with pytest.raises(Interrupted, match=r"saved in .*python train\.py sft --resume") as stop, run:
        run.begin_step()
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stop.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is before  # a second one acts at once
        finish(run, *trained(tiny_qwen3))
    assert stop.value.signum == signal.SIGTERM and run.checkpoints.steps() == [1]
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopping after this step" in capsys.readouterr().err


def test_an_output_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    config.model.output = str(tmp_path / "file" / "run")
    with pytest.raises(OSError, match=r"model\.output .*file/run: cannot be written"):
        check_output(config)
    config.model.output = str(tmp_path / "fine" / "run")
    check_output(config)
    assert not any((tmp_path / "fine" / "run").iterdir())
