"""run.py: learning rates, the optimiser, and the folder of a run."""

import json
import math
import os
import signal
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from expander import model as models
from expander.cli import Interrupted
from expander.config import Config, Training, load_config
from expander.train.optim import AdamW, schedule
from expander.train.run import Run, check_output


class Two(nn.Module):
    """Two parameters, to be optimised."""

    def __init__(self):
        super().__init__()
        self.a = mx.array([1.0, -2.0, 3.0])
        self.b = mx.array([[0.5]])


# Learning rates


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
    rate = schedule(Training(learning_rate=3e-4, lr_scheduler=name, warmup_ratio=ratio), total)
    warmup = math.ceil(ratio * total)
    for step in range(total):
        expected = 3e-4 * hugging_face(name, step, warmup, total)
        assert rate(mx.array(step)).item() == pytest.approx(expected, rel=1e-4, abs=1e-10)


def test_the_learning_rate_in_figures():
    rate = schedule(Training(learning_rate=1.0, lr_scheduler="cosine", warmup_ratio=0.1), 20)
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
    training = Training(
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
    training = Training(
        learning_rate=0.01, lr_scheduler="constant", warmup_ratio=0.0, max_grad_norm=0.5
    )
    model, optimizer = Two(), AdamW(training, total=1)
    optimizer.update(model, {"a": mx.array([3.0, -4.0, 0.0]), "b": mx.array([[0.0]])})
    assert optimizer.state["grad_norm"].item() == pytest.approx(5.0)
    assert np.allclose(model.a, [0.99, -1.99, 3.0], atol=1e-6)
    assert model.b.item() == 0.5


def test_the_first_update_is_at_step_0_of_the_schedule():
    model, optimizer = Two(), AdamW(Training(learning_rate=1.0, warmup_ratio=0.5), total=4)
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
    optimizer = AdamW(Training(warmup_ratio=0.0), total=10)
    optimizer.init(model.trainable_parameters())
    ones = {n: mx.ones_like(v) for n, v in models.adapter_weights(model).items()}
    optimizer.update(model, tree_unflatten(list(ones.items())))
    mx.eval(model.parameters(), optimizer.state)
    return model, optimizer


def weights_equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


def test_what_is_saved_is_put_back(config, tiny_qwen3, capsys):
    model, optimizer = trained(tiny_qwen3)
    with Run(config, "sft", 10, resume=False, overwrite=False) as run:
        run.step = 1
        run.consider(2.5, model, higher_is_better=False)
        run.log({"loss": 1.0})
        run.step = 2
        run.log({"loss": 2.0})
        run.consider(2.6, model, higher_is_better=False)
        run.keep(model, optimizer)
        run.save()
        run.seed()
        drawn = mx.random.normal((5,)).tolist()
        run.step = 3
        run.log({"loss": 3.0})  # after the checkpoint: this step is run again
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut by a kill

    fresh = models.load_base(tiny_qwen3)
    models.add_lora(fresh, models.lora_config(fresh, 2, 4.0, 0.0, ("q_proj",)))
    other = AdamW(Training(warmup_ratio=0.0), total=10)
    other.init(fresh.trainable_parameters())
    again = Run(config, "sft", 10, resume=True, overwrite=False)
    again.restore(fresh, other)
    assert (again.step, again.best_value, again.best_step, again.stale) == (2, 2.5, 1, 1)
    assert weights_equal(models.adapter_weights(fresh), models.adapter_weights(model))
    assert weights_equal(again.best, run.best)
    assert weights_equal(dict(tree_flatten(other.state)), dict(tree_flatten(optimizer.state)))
    again.seed()
    assert mx.random.normal((5,)).tolist() == drawn
    again.step += 1
    again.seed()
    assert mx.random.normal((5,)).tolist() != drawn
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1.0, 2.0]
    assert "resuming at step 2 of 10" in capsys.readouterr().out


def test_an_unfinished_run_is_neither_overwritten_nor_resumed_with_other_settings(
    config, tiny_qwen3
):
    with Run(config, "sft", 10, resume=False, overwrite=False) as run:
        run.step = 4
        run.keep(*trained(tiny_qwen3))
        run.save()
    with pytest.raises(ValueError, match=r"unfinished run at step 4: go on with --resume, or"):
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
    with Run(config, "sft", 10, resume=False, overwrite=False) as run:
        run.step = 4
        run.log({"loss": 1.0})
        run.keep(*trained(tiny_qwen3))
        run.save()
    before = sorted(run.folder.rglob("*"))
    Run(config, "sft", 10, resume=False, overwrite=True)
    assert sorted(run.folder.rglob("*")) == before


def test_an_error_in_the_midst_of_a_step_loses_no_whole_one(config, tiny_qwen3):
    model, optimizer = trained(tiny_qwen3)
    before = models.adapter_weights(model)
    run = Run(config, "grpo", 10, resume=False, overwrite=False)
    with pytest.raises(RuntimeError, match=r"^out of memory; no new step was done$"), run:
        raise RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match=r"; step 1 is saved in .*step-000001: go on"), run:
        run.step = 1
        run.end_step(model, optimizer)
        later = {name: value + 1 for name, value in before.items()}
        model.load_weights(list(later.items()), strict=False)
        run.step = 2  # updated and counted, but its held-out score fails
        raise RuntimeError("out of memory")
    found = run.checkpoints.latest(pytest.fail)
    assert found.step == 1 and weights_equal(found.arrays["adapters"], before)


def test_the_best_is_kept_and_patience_ends(config, tiny_qwen3):
    config.training.patience = 2
    run = Run(config, "sft", 10, resume=False, overwrite=False)
    model, _ = trained(tiny_qwen3)
    decisions = []
    for run.step, value in enumerate([3.0, 2.0, 2.0, 1.0, 1.5, 1.2], 1):
        decisions.append(
            (run.consider(value, model, higher_is_better=False), run.out_of_patience())
        )
    assert [better for better, _ in decisions] == [True, True, False, True, False, False]
    assert [out for _, out in decisions] == [False] * 5 + [True]
    assert (run.best_value, run.best_step) == (1.0, 4)
    assert run.consider(1.1, model, higher_is_better=True)


def test_the_result_of_a_run(config, tiny_qwen3):
    run = Run(config, "sft", 10, resume=False, overwrite=False)
    model, optimizer = trained(tiny_qwen3)
    adapter_config = {"fine_tune_type": "lora", "parent": "sft"}
    run.step = 5
    run.consider(1.0, model, higher_is_better=False)
    best = models.adapter_weights(model)
    run.keep(model, optimizer)
    run.save()
    later = {name: value + 1 for name, value in best.items()}
    model.load_weights(list(later.items()), strict=False)
    run.step = 6
    run.finish(model, adapter_config, {"rows": 3})

    folder = run.folder
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
        "config.yaml",
        "last",
        "run.json",
    ]
    assert weights_equal(mx.load(str(folder / "adapters.safetensors")), best)
    assert weights_equal(mx.load(str(folder / "last" / "adapters.safetensors")), later)
    assert json.loads((folder / "adapter_config.json").read_text())["parent"] == "sft"
    assert json.loads((folder / "last" / "adapter_config.json").read_text())["parent"] == "../sft"
    assert load_config("sft", folder / "config.yaml")[0] == config
    result = json.loads((folder / "run.json").read_text())
    assert (result["steps"], result["best_step"], result["best_value"]) == (6, 5, 1.0)
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


def test_when_a_checkpoint_is_due(config):
    config.training.save_steps = 4
    run = Run(config, "sft", 10, resume=False, overwrite=False)
    due = []
    for run.step in range(1, 10):
        due.append(run.save_due())
    assert due == [step % 4 == 0 for step in range(1, 10)]
    config.training.save_interval_minutes = 10.0
    run.last_save -= 599
    assert not run.save_due()
    run.last_save -= 2
    assert run.save_due()


HEALTHY = {
    "kl": 0.2,
    "frac_reward_zero_std": 0.25,
    "completions/clipped_ratio": 0.1,
    "completions/mean_length": 60.0,
}


@pytest.mark.parametrize(
    ("trouble", "named"),
    [
        ({"kl": 1.1}, "the KL to the SFT model is running away: lower learning_rate"),
        ({"frac_reward_zero_std": 1.0}, "every group has equal rewards"),
        ({"completions/clipped_ratio": 1.0}, "every completion was cut off"),
        ({"completions/mean_length": 19.0}, "under a third of their first length"),
    ],
)
def test_what_ruins_a_run_is_named_once(config, capsys, trouble, named):
    run = Run(config, "grpo", 10, resume=False, overwrite=False)
    for run.step, record in enumerate([HEALTHY, HEALTHY | trouble, HEALTHY | trouble], 1):
        run.watch(record)
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: step 2: ") and named in warning


def test_a_signal_waits_for_the_end_of_the_step(config, capsys):
    before = signal.getsignal(signal.SIGTERM)
    run = Run(config, "sft", 10, resume=False, overwrite=False)
    with run:
        assert run.signum is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.signum == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is before  # a second one acts at once
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopping after this step" in capsys.readouterr().err
    stop = run.interrupted(run.signum, Path("there"))
    assert isinstance(stop, Interrupted) and stop.signum == signal.SIGTERM
    assert "saved in there" in str(stop) and "python train.py sft --resume" in str(stop)


def test_an_output_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    config.model.output = str(tmp_path / "file" / "run")
    with pytest.raises(OSError, match=r"model\.output .*file/run: cannot be written"):
        check_output(config)
    config.model.output = str(tmp_path / "fine" / "run")
    check_output(config)
    assert not any((tmp_path / "fine" / "run").iterdir())
