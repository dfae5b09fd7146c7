"""sft.py and batches.py: the loss and its gradient, batches, accumulation, skipped steps."""

import itertools
import json
import signal

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import tiny
from dtypes import tolerance
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner import trainer

from expander import model as models
from expander.cli import Interrupted
from expander.config import load_config
from expander.prompt import render_prompt
from expander.rows import load_rows
from expander.train.batches import (
    WIDTH_STEP,
    Batches,
    Row,
    collate,
    tokenize,
)
from expander.train.run import Run
from expander.train.sft import completion_loss, train_steps, validate, validation_subset

END = 2
GRADIENT_BOUND = tolerance(float32=1e-5, bfloat16=5e-2)  # relative to the largest gradient
# Of a loss near 7, against our own loss and against float64.
SAME_LOSS = tolerance(float32=1e-5, bfloat16=5e-2)
LOSS_BOUND = tolerance(float32=1e-4, bfloat16=5e-2)


@pytest.fixture(scope="module")
def model(tiny_qwen3) -> nn.Module:
    """The tiny Qwen3 with LoRA layers that already do something."""
    model = models.load_base(tiny_qwen3)
    models.add_lora(model, models.lora_config(model, 4, 8.0, 0.0, ("q_proj", "v_proj", "up_proj")))
    mx.random.seed(0)
    fresh = [
        (n, mx.random.normal(v.shape, scale=0.1)) for n, v in models.adapter_weights(model).items()
    ]
    model.load_weights(fresh, strict=False)
    return model


@pytest.fixture(scope="module")
def some_rows() -> list[Row]:
    """Rows of unequal lengths, each ending in END."""
    rng = np.random.default_rng(0)
    shapes = [(3, 5), (9, 14), (1, 1), (6, 2), (20, 13), (4, 8), (12, 21)]  # prompt, completion
    return [
        Row([*rng.integers(10, 500, p + c - 1).tolist(), END], p, f"row {i}")
        for i, (p, c) in enumerate(shapes)
    ]


def token_losses(model: nn.Module, row: Row) -> np.ndarray:
    """-log softmax at each completion token, in float64, from the model's own forward pass."""
    logits = model(mx.array([row.ids[:-1]]))[0].astype(mx.float32)  # (T, V)
    logits = np.array(logits, dtype=np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logps = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    targets = row.ids[row.start :]
    return -logps[range(row.start - 1, len(row.ids) - 1), targets]


def gradient(model: nn.Module, loss, *args) -> dict[str, mx.array]:
    _, grads = nn.value_and_grad(model, loss)(model, *args)
    return dict(tree_flatten(grads))


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    size = max(mx.abs(g).max().item() for g in b.values())
    assert a.keys() == b.keys() and size > 1e-3
    return all(mx.abs(a[name] - b[name]).max().item() < GRADIENT_BOUND * max(size, 1) for name in b)


# The loss


def test_the_loss_is_the_mean_over_completion_tokens(model, some_rows):
    loss, tokens = completion_loss(model, *collate(some_rows))
    expected = np.concatenate([token_losses(model, row) for row in some_rows])
    assert tokens.item() == len(expected) == 64
    assert abs(loss.item() - expected.mean()) < LOSS_BOUND


def test_the_end_token_is_learnt_and_the_prompt_is_not(model):
    row = Row([40, 41, 42, 43, END], 3, "")
    _, tokens = completion_loss(model, *collate([row]))
    assert tokens.item() == 2  # 43 and the end
    without_end, _ = completion_loss(model, *collate([Row([40, 41, 42, 43], 3, "")]))
    with_end, _ = completion_loss(model, *collate([row]))
    end_loss = 2 * with_end.item() - without_end.item()
    assert abs(end_loss - token_losses(model, row)[-1]) < LOSS_BOUND


def test_padding_is_neither_target_nor_seen(model, some_rows):
    """A row costs the same alone and beside a longer one."""
    short, long = some_rows[2], some_rows[4]
    alone = [completion_loss(model, *collate([row], 1.0))[0].item() for row in (short, long)]
    both, tokens = completion_loss(model, *collate([short, long], 1.0))
    assert abs(both.item() - sum(alone)) < LOSS_BOUND
    assert tokens.item() == 14


def test_the_normalizer_divides_the_sum(model, some_rows):
    by_one, _ = completion_loss(model, *collate(some_rows, 1.0))
    by_seven, _ = completion_loss(model, *collate(some_rows, 7.0))
    assert abs(by_one.item() / 7 - by_seven.item()) < LOSS_BOUND


def test_the_gradient_is_that_of_a_plain_cross_entropy(model, some_rows):
    def plain(model):
        total = mx.array(0.0)
        for row in some_rows:
            logits = model(mx.array([row.ids[:-1]]))[0, row.start - 1 :]
            targets = mx.array(row.ids[row.start :])
            total = total + nn.losses.cross_entropy(logits, targets, reduction="sum")
        return total / 64

    value, grads = nn.value_and_grad(model, plain)(model)
    loss, _ = completion_loss(model, *collate(some_rows))
    assert abs(loss.item() - value.item()) < SAME_LOSS
    ours = gradient(model, lambda m, *batch: completion_loss(m, *batch)[0], *collate(some_rows))
    assert same(ours, dict(tree_flatten(grads)))


# Validation


def test_validation_is_the_mean_over_every_token_of_every_row(model, some_rows):
    expected = np.concatenate([token_losses(model, row) for row in some_rows])
    hits = []
    for row in some_rows:
        logits = model(mx.array([row.ids[:-1]]))[0, row.start - 1 :]
        hits += (mx.argmax(logits, axis=-1) == mx.array(row.ids[row.start :])).tolist()
    for batch_size in (1, 3, 100):
        loss, accuracy = validate(model, some_rows, batch_size)
        assert abs(loss - expected.mean()) < LOSS_BOUND
        assert accuracy == sum(hits) / len(hits)


def test_validation_sees_no_dropout_and_leaves_the_model_training(tiny_qwen3, some_rows):
    model = models.load_base(tiny_qwen3)
    plain, _ = validate(model, some_rows, 4)
    models.add_lora(model, models.lora_config(model, 4, 8.0, 0.9, ("v_proj",)))
    ones = [(n, mx.ones_like(v)) for n, v in models.adapter_weights(model).items()]
    model.load_weights(ones, strict=False)
    assert validate(model, some_rows, 4) == validate(model, some_rows, 4) != (plain, 0)
    assert model.training


# Batches


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (2, 3), (1, 8), (7, 1), (3, 4)])
def test_accumulated_micro_batches_are_the_whole_batch(batch_size, accumulation, model, some_rows):
    """The trainer sums the gradients of a step and divides by the accumulation.

    The last two cases have more places than rows.
    """

    def loss(model, *batch):
        return completion_loss(model, *batch)[0]

    batches = Batches(some_rows, batch_size, accumulation, seed=0)
    [rows, *_] = batches.step_rows(0)
    total, losses, count, tokens = None, 0.0, 0, 0.0
    for batch in batches.micro_batches(rows):
        value, grads = nn.value_and_grad(model, loss)(model, *batch)
        total = grads if total is None else tree_map(mx.add, total, grads)
        losses, count = losses + value.item(), count + 1
        tokens += completion_loss(model, *batch)[1].item()
    assert count == batches.accumulation == accumulation + 2
    mean = {name: g / count for name, g in tree_flatten(total)}
    assert same(mean, gradient(model, loss, *collate(rows)))
    whole, expected_tokens = completion_loss(model, *collate(rows))
    assert abs(losses / count - whole.item()) < SAME_LOSS
    assert tokens == expected_tokens.item()


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "ranks"), [(2, 2, 2), (7, 1, 2), (2, 4, 3), (1, 4, 9)]
)
def test_the_ranks_batches_are_the_whole_batch(batch_size, accumulation, ranks, model, some_rows):
    """The trainer divides what the ranks sum up by their number as well."""

    def loss(model, *batch):
        return completion_loss(model, *batch)[0]

    parts = [Batches(some_rows, batch_size, accumulation, 0, rank, ranks) for rank in range(ranks)]
    rows = parts[0].step_rows(0)[-1]
    streams = [list(part.micro_batches(rows)) for part in parts]
    assert {len(stream) for stream in streams} == {-(-accumulation // ranks) + 2}
    every = [batch for stream in streams for batch in stream]
    assert max(inputs.shape[0] for inputs, *_ in every) <= batch_size
    total, losses = None, 0.0
    for batch in every:
        value, grads = nn.value_and_grad(model, loss)(model, *batch)
        total = grads if total is None else tree_map(mx.add, total, grads)
        losses += value.item()
    whole = gradient(model, loss, *collate(rows))
    assert same({name: g / len(every) for name, g in tree_flatten(total)}, whole)
    assert abs(losses / len(every) - completion_loss(model, *collate(rows))[0].item()) < SAME_LOSS


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100])
def test_every_row_is_seen_once_an_epoch(count):
    rows = [Row([1] * (3 + i * 7 % 50), 2, f"row {i}") for i in range(count)]
    batches = Batches(rows, batch_size=4, accumulation=4, seed=1)
    assert batches.steps_per_epoch == -(-count // 16)
    for epoch in (0, 1):
        steps = batches.step_rows(epoch)
        assert len(steps) == batches.steps_per_epoch
        assert all(0 < len(step) <= 16 for step in steps)
        assert sum(len(step) < 16 for step in steps) == (count % 16 > 0)
        seen = [row.source for step in steps for row in step]
        assert sorted(seen) == sorted(row.source for row in rows)


def sources(batches: Batches, epoch: int) -> list[list[str]]:
    return [[row.source for row in step] for step in batches.step_rows(epoch)]


def test_the_order_is_the_seeds_and_the_epochs():
    rows = [Row([1] * (3 + i % 20), 2, f"row {i}") for i in range(100)]
    one, again, other = (Batches(rows, 4, 2, seed) for seed in (1, 1, 2))
    assert sources(one, 0) == sources(again, 0)
    assert sources(one, 0) != sources(one, 1) != sources(other, 1)


def test_the_trainer_traces_each_shape_once_and_its_update_once(tiny_qwen3, tmp_path):
    """Its compiled step differs for the first batch of a step and for the last: both are empty."""
    rows = [Row([9] * (4 + i // 4 * WIDTH_STEP), 2, "") for i in range(16)]  # four shapes
    batches = Batches(rows, batch_size=2, accumulation=2, seed=0)
    model = models.load_base(tiny_qwen3)
    models.add_lora(model, models.lora_config(model, 4, 8.0, 0.0, ("v_proj",)))
    traced = []

    def loss(model, inputs, *rest):
        traced.append(inputs.shape)
        return completion_loss(model, inputs, *rest)

    updates = []

    class Adam(optim.Adam):
        def update(self, model, gradients):
            updates.append(1)
            super().update(model, gradients)

    optimizer = Adam(1e-3)
    optimizer.init(model.trainable_parameters())
    steps = 2 * batches.steps_per_epoch
    trainer.train(
        model,
        optimizer,
        rows,
        args=trainer.TrainingArgs(
            iters=steps * batches.accumulation,
            grad_accumulation_steps=batches.accumulation,
            adapter_file=tmp_path / "adapters.safetensors",
        ),
        loss=loss,
        iterate_batches=lambda **_: batches(0),
    )
    assert len(updates) == 1
    assert sorted(traced) == [(0, 0), (0, 0)] + [(2, n * WIDTH_STEP) for n in (1, 2, 3, 4)]


def test_rows_of_a_micro_batch_are_of_like_length():
    rng = np.random.default_rng(0)
    rows = [Row([1] * n, 2, "") for n in rng.integers(20, 200, 256).tolist()]
    batches = Batches(rows, batch_size=4, accumulation=4, seed=0)
    used = padded = 0
    for step in batches.step_rows(0):
        for inputs, *_ in batches.micro_batches(step):
            padded += inputs.size
        used += sum(len(row.ids) - 1 for row in step)
    assert used / padded > 0.8  # 0.65 in random order


def test_few_shapes_in_many_steps():
    """MLX's compiler keeps memory for each shape it has seen."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.0, 0.35, 4755), 20, 512).astype(int).tolist()
    batches = Batches([Row([1] * n, n // 5, "") for n in lengths], 4, 4, seed=0)
    shapes = set()
    for epoch in range(2):
        for rows in batches.step_rows(epoch):
            for inputs, positions, *_ in batches.micro_batches(rows):
                shapes.add((*inputs.shape, positions.size))
    assert len(shapes) <= 60  # 155 with widths rounded to multiples of 8


def test_a_step_has_rows_of_all_lengths():
    """Else short rows' tokens would weigh more, a step's loss being a mean of its own."""
    rng = np.random.default_rng(0)
    rows = [Row([1] * n, 2, "") for n in rng.integers(20, 200, 256).tolist()]
    totals = [
        sum(len(row.ids) for row in step) for step in Batches(rows, 4, 4, seed=0).step_rows(0)
    ]
    assert max(totals) < 1.4 * min(totals)  # 1.5 in random order, 6 with rows of like length


def test_a_run_that_starts_at_a_later_step_sees_the_same_batches():
    rows = [Row([1, 2, 3 + i, END], 2, f"row {i}") for i in range(10)]
    batches = Batches(rows, batch_size=2, accumulation=2, seed=5)  # 3 steps an epoch

    def first(step: int, count: int) -> list[list]:
        stream = batches(step)
        taken = itertools.islice(stream, batches.accumulation * count)
        return [[a.tolist() for a in batch] for batch in taken]

    all_of_it = first(0, 8)
    assert first(4, 4) == all_of_it[4 * batches.accumulation :]
    assert first(3, 5) == all_of_it[3 * batches.accumulation :]
    next(batches(4))
    assert batches.current == batches.step_rows(1)[1]


# Tokens


def test_rows_are_prompt_and_target_and_longer_ones_are_counted(tiny_qwen3, rows):
    tokenizer = models.load_tokenizer(tiny_qwen3)
    examples = load_rows(str(rows)).train
    prompts = [tokenizer.encode(render_prompt(e.query), add_special_tokens=False) for e in examples]
    every = tokenize(examples, prompts, tokenizer, True, 10_000)
    assert len(every) == 24
    for example, row in zip(examples, every, strict=True):
        text = tokenizer.decode(row.ids)
        assert text.startswith(render_prompt(example.query)) and text.endswith("\n<|im_end|>")
        assert tokenizer.decode(row.ids[: row.start]) == render_prompt(example.query)
        assert row.ids[-1] == models.end_token(tokenizer) and row.source == example.source
    bare = tokenize(examples, prompts, tokenizer, False, 10_000)
    assert not tokenizer.decode(bare[0].ids).endswith("\n<|im_end|>")

    lengths = sorted(len(row.ids) for row in every)
    some = tokenize(examples, prompts, tokenizer, True, lengths[9])
    assert max(len(row.ids) for row in some) == lengths[9]
    assert len(some) == sum(n <= lengths[9] for n in lengths)


def test_validations_draw_the_same_rows(some_rows):
    every = validation_subset(some_rows, None, seed=1)
    assert every == validation_subset(some_rows, len(some_rows), seed=1) == some_rows
    few = validation_subset(some_rows, 2, seed=1)
    assert len(few) == 2 and few == validation_subset(some_rows, 2, seed=1)
    assert all(row in some_rows for row in few)


class Steps(Batches):
    """The given rows in one epoch, one step per row, in this order."""

    def __init__(self, rows):
        super().__init__(rows, 1, 1, seed=0)

    def step_rows(self, epoch):
        return [[row] for row in self.rows]


POISON = 50  # a token that only one row has


def poisoned_run(base, folder, rows, *settings: str, resume: bool = False):
    """Adapter weights after a step per row, on a model where one token's embedding is infinite."""
    settings = [f"model.output={folder}", "training.lr_scheduler=constant", *settings]
    steps = ["training.warmup_ratio=0", "training.save_interval_minutes=null"]
    config, _ = load_config("sft", None, [*settings, *steps, "training.learning_rate=1e-2"])
    run = Run(config, "sft", len(rows), resume=resume, overwrite=False)
    mx.random.seed(0)
    model = models.load_base(base)
    model.model.embed_tokens.weight[POISON] = mx.inf
    _, optimizer = run.add_adapter(model)
    with run:
        train_steps(run, model, optimizer, Steps(rows), held_out=[])
    return run, {k: np.array(v) for k, v in models.adapter_weights(model).items()}


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A model whose head does not contain the poisoned embedding."""
    return tiny.make_qwen3(tmp_path_factory.mktemp("models") / "untied", tied=False, layers=1)


@pytest.fixture
def good_rows() -> list[Row]:
    rng = np.random.default_rng(5)
    return [Row([*rng.integers(60, 200, 9).tolist(), END], 4, f"rows.jsonl:{i}") for i in range(6)]


def test_a_batch_that_overflows_is_skipped_as_if_it_were_not_there(untied, good_rows, tmp_path):
    poison = Row([60, POISON, 61, 62, END], 2, "rows.jsonl:99")
    _, without = poisoned_run(untied, tmp_path / "a", good_rows)
    run, weights = poisoned_run(untied, tmp_path / "b", [*good_rows[:3], poison, *good_rows[3:]])
    assert any(weights[name].any() for name in weights if name.endswith("lora_b"))
    assert all(np.array_equal(weights[name], without[name]) for name in without)
    assert (run.progress.skipped, run.progress.skipped_in_a_row) == (1, 0)
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["rows"]) for r in records if r.get("skipped")] == [(4, ["rows.jsonl:99"])]


def test_a_run_stopped_around_a_skipped_step_resumes_to_the_same_weights(
    untied, good_rows, tmp_path, monkeypatch
):
    poison = Row([60, POISON, 61, 62, END], 2, "rows.jsonl:99")
    rows = [*good_rows[:3], poison, poison, *good_rows[3:]]
    saves = "training.save_steps=1"
    _, whole = poisoned_run(untied, tmp_path / "whole", rows, saves)
    for stop_at in (3, 4, 5):
        folder = tmp_path / f"stopped-{stop_at}"
        finish = Run.finish_step

        def stop(run, *args, stop_at=stop_at, finish=finish, **options):
            run.stop.received = signal.SIGTERM if run.step == stop_at else 0
            finish(run, *args, **options)

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(Run, "finish_step", stop)
            poisoned_run(untied, folder, rows, saves)
        run, resumed = poisoned_run(untied, folder, rows, saves, resume=True)
        assert all(np.array_equal(resumed[name], whole[name]) for name in whole)
        assert run.progress.skipped == 2


def test_too_many_skipped_steps_in_a_row_stop_the_run(untied, good_rows, tmp_path):
    poison = Row([60, POISON, 61, 62, END], 2, "rows.jsonl:99")
    with pytest.raises(ValueError, match=r"at step 6, for 5 steps in a row .*rows\.jsonl:99"):
        poisoned_run(untied, tmp_path / "run", [good_rows[0], *[poison] * 6])
