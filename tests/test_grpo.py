"""Formulas against hand-worked numbers, gradients against finite differences, a policy that learns."""

import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from dtypes import tolerance
from mlx.utils import tree_flatten

from expander import model as models
from expander.config import load_config
from expander.decode import TemperatureSampler, generate, random_keys
from expander.lora import lora_layers
from expander.train import logps as log_probabilities
from expander.train import loss as grpo
from expander.train.grpo import (
    PromptOrder,
    policy_gradient,
    prompts_per_step,
    warn_of_collapse,
)
from expander.train.logps import completion_logps
from expander.train.rollout import (
    Rollout,
    active_tokens,
    batch_share,
    micro_batches,
    rank_batches,
    sample,
    set_advantages,
    set_logps,
    stack,
)
from expander.train.run import Run

# Of log-probabilities and gradients; rounding differs with the rows and the padding of a batch.
LOGP_BOUND = tolerance(float32=2e-5, bfloat16=5e-2)
GRADIENT_BOUND = tolerance(float32=2e-5, bfloat16=2e-2)


def values(array) -> list:
    return np.array(array).round(5).tolist()


def test_group_advantages_by_hand():
    # Means 2 and 5; sample deviations sqrt(2) and 0.
    advantages = grpo.group_advantages([[1.0, 3.0], [5.0, 5.0]])
    expected = 1 / (math.sqrt(2) + 1e-4)
    np.testing.assert_allclose(np.array(advantages), [[-expected, expected], [0.0, 0.0]], atol=1e-5)


def test_scale_none_only_centres():
    assert values(grpo.group_advantages([[1.0, 3.0], [4.0, 8.0]], scale="none")) == [
        [-1.0, 1.0],
        [-2.0, 2.0],
    ]


def test_scale_batch_divides_by_the_deviation_of_all():
    # All four: mean 4, squares 9 + 1 + 0 + 16 = 26, deviation sqrt(26 / 3).
    got = grpo.group_advantages([[1.0, 3.0], [4.0, 8.0]], scale="batch")
    deviation = math.sqrt(26 / 3) + 1e-4
    expected = [[-1 / deviation, 1 / deviation], [-2 / deviation, 2 / deviation]]
    np.testing.assert_allclose(np.array(got), expected, rtol=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_one_completion_has_no_advantage(scale):
    assert values(grpo.group_advantages([[0.3], [0.9]], scale)) == [[0.0], [0.0]]


def test_equal_rewards_have_no_advantage():
    assert values(grpo.group_advantages([[0.7] * 4])) == [[0.0] * 4]


def test_unknown_scale():
    with pytest.raises(ValueError, match="scale 'std'"):
        grpo.group_advantages([[1.0, 2.0]], "std")


LOGPS = np.array([[-1.0, -2.0, -3.0], [-0.5, -1.5, -9.0]], np.float32)
MASK = np.array([[1, 1, 1], [1, 1, 0]], np.float32)
OLD = np.array([[-1.2, -2.0, -2.5], [-0.5, -1.1, 7.0]], np.float32)
REF = np.array([[-1.1, -1.8, -3.0], [-0.9, -1.5, 3.0]], np.float32)
ADVANTAGES = np.array([1.0, -2.0], np.float32)


def token_terms(beta: float, level: str) -> np.ndarray:
    """The loss of each token in plain loops."""
    terms = np.zeros_like(LOGPS)
    for i in range(2):
        active = [t for t in range(3) if MASK[i, t]]
        mean = sum(LOGPS[i, t] - OLD[i, t] for t in active) / len(active)
        for t in active:
            ratio = math.exp(mean if level == "sequence" else LOGPS[i, t] - OLD[i, t])
            clipped = min(max(ratio, 0.8), 1.2)
            gap = REF[i, t] - LOGPS[i, t]
            terms[i, t] = -min(ratio * ADVANTAGES[i], clipped * ADVANTAGES[i])
            terms[i, t] += beta * (math.exp(gap) - gap - 1)
    return terms


def averaged(terms: np.ndarray, loss_type: str) -> float:
    if loss_type == "grpo":
        return (terms[0].sum() / 3 + terms[1].sum() / 2) / 2
    return terms.sum() / {"bnpo": 5, "dr_grpo": 2 * 10, "dapo": 8}[loss_type]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_loss_equals_the_formula(loss_type, level, beta):
    loss, stats = grpo.grpo_loss(
        mx.array(LOGPS),
        mx.array(MASK),
        mx.array(ADVANTAGES),
        old_logps=mx.array(OLD),
        ref_logps=mx.array(REF),
        beta=beta,
        loss_type=loss_type,
        level=level,
        normalizer=8,
        max_completion_length=10,
    )
    assert loss.item() == pytest.approx(averaged(token_terms(beta, level), loss_type), abs=1e-5)
    assert stats["tokens"].item() == 5


def test_loss_by_hand_when_used_once():
    # The ratio is 1: token losses are -A. Sums: -1 × 3 and 2 × 2.
    loss, stats = grpo.grpo_loss(
        mx.array(LOGPS), mx.array(MASK), mx.array(ADVANTAGES), loss_type="bnpo"
    )
    assert loss.item() == pytest.approx((-3 + 4) / 5)
    assert stats["clip_low"].item() == stats["clip_high"].item() == 0


def test_clip_counts():
    # Ratios e^0.5 and e^-0.5; the first is too high for A > 0, the second too low for A < 0.
    old = mx.array([[-1.5], [-0.5]])
    _, stats = grpo.grpo_loss(
        mx.array([[-1.0], [-1.0]]), mx.ones((2, 1)), mx.array([1.0, -1.0]), old_logps=old
    )
    assert (stats["clip_high"].item(), stats["clip_low"].item()) == (1, 1)


def test_defaults_without_a_normalizer_or_length():
    loss = {
        kind: grpo.grpo_loss(mx.array(LOGPS), mx.array(MASK), mx.array(ADVANTAGES), loss_type=kind)[
            0
        ].item()
        for kind in ("bnpo", "dapo", "dr_grpo")
    }
    assert loss["dapo"] == loss["bnpo"]  # this batch's active tokens
    assert loss["dr_grpo"] == pytest.approx(1 / 6)  # B × T


def test_gradient_by_finite_differences():
    def loss(logps):
        return grpo.grpo_loss(
            logps,
            mx.array(MASK),
            mx.array(ADVANTAGES),
            old_logps=mx.array(OLD),
            ref_logps=mx.array(REF),
            beta=0.2,
            loss_type="grpo",
        )[0]

    gradient = np.array(mx.grad(loss)(mx.array(LOGPS)))
    for i in range(2):
        for t in range(3):
            step = np.zeros_like(LOGPS)
            step[i, t] = 1e-2
            above, below = loss(mx.array(LOGPS + step)), loss(mx.array(LOGPS - step))
            slope = (above.item() - below.item()) / 2e-2
            assert gradient[i, t] == pytest.approx(slope, abs=2e-3)


@pytest.mark.parametrize("garbage", [50.0, 1e30, math.inf, -math.inf, math.nan])
def test_padding_never_reaches_loss_or_gradient(garbage):
    def loss(logps, fill):
        spoilt = [mx.where(mx.array(MASK) > 0, mx.array(a), fill) for a in (OLD, REF)]
        return grpo.grpo_loss(
            mx.where(mx.array(MASK) > 0, logps, fill),
            mx.array(MASK),
            mx.array(ADVANTAGES),
            old_logps=spoilt[0],
            ref_logps=spoilt[1],
            beta=0.1,
        )[0]

    both = mx.value_and_grad(loss)
    clean, spoilt = both(mx.array(LOGPS), 0.0), both(mx.array(LOGPS), garbage)
    assert clean[0].item() == spoilt[0].item()
    assert values(clean[1]) == values(spoilt[1])


def test_nothing_active_is_a_zero_loss():
    for kind in ("grpo", "bnpo", "dapo", "dr_grpo"):
        loss, _ = grpo.grpo_loss(
            mx.array(LOGPS), mx.zeros((2, 3)), mx.array(ADVANTAGES), loss_type=kind
        )
        assert loss.item() == 0


def test_wrong_arguments_are_named():
    arrays = mx.array(LOGPS), mx.array(MASK), mx.array(ADVANTAGES)
    with pytest.raises(ValueError, match="loss_type 'ppo'"):
        grpo.grpo_loss(*arrays, loss_type="ppo")
    with pytest.raises(ValueError, match="level 'word'"):
        grpo.grpo_loss(*arrays, level="word")
    with pytest.raises(ValueError, match="ref_logps"):
        grpo.grpo_loss(*arrays, beta=0.1)


@pytest.fixture
def head_and_states():
    mx.random.seed(3)
    weight, hidden = mx.random.normal((50, 8)), 2 * mx.random.normal((23, 8))
    return (lambda h: h @ weight.T), hidden, mx.random.randint(0, 50, (23,))


def plain_logps(hidden, targets, head, temperature):
    logits = head(hidden) / temperature
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return mx.take_along_axis(logps, targets[:, None], axis=-1)[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("budget", [1, 50 * 10, 1 << 25])
def test_token_logps_and_their_gradient(head_and_states, temperature, budget, monkeypatch):
    monkeypatch.setattr(log_probabilities, "LOGIT_BUDGET", budget)
    head, hidden, targets = head_and_states
    cotangent = mx.random.normal((23,))

    def ours(h):
        return (log_probabilities.token_logps(h, targets, head, temperature)[0] * cotangent).sum()

    def plain(h):
        return (plain_logps(h, targets, head, temperature) * cotangent).sum()

    (value, gradient), (expected, slope) = (
        mx.value_and_grad(ours)(hidden),
        mx.value_and_grad(plain)(hidden),
    )
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(np.array(gradient), np.array(slope), atol=1e-5)
    bare = log_probabilities.token_logps(hidden, targets, head, temperature, with_gradient=False)[0]
    np.testing.assert_allclose(
        np.array(bare), np.array(plain_logps(hidden, targets, head, temperature)), atol=1e-5
    )


def test_token_entropy(head_and_states):
    head, hidden, targets = head_and_states
    _, entropy = log_probabilities.token_logps(hidden, targets, head, 1.0, with_entropy=True)
    logps = head(hidden) - mx.logsumexp(head(hidden), axis=-1, keepdims=True)
    np.testing.assert_allclose(
        np.array(entropy), -np.array((mx.exp(logps) * logps).sum(axis=-1)), atol=1e-5
    )


def test_token_logps_of_an_improbable_token_stay_finite():
    logits = mx.array([[0.0, 200.0]])
    logp, _ = log_probabilities.token_logps(logits, mx.array([0]), lambda h: h)
    assert logp.item() == pytest.approx(-200.0)


@pytest.fixture(scope="module")
def lora_model(tiny_qwen3):
    model, tokenizer = models.load_chain(models.read_chain(str(tiny_qwen3)))
    mx.random.seed(5)
    models.add_lora(
        model, models.lora_config(model, 4, 8.0, 0.0, ["q_proj", "v_proj", "down_proj"])
    )
    for name, weight in models.adapter_weights(model).items():
        if name.endswith("lora_b"):  # zero at first: then no gradient reaches lora_a
            model.load_weights([(name, 0.05 * mx.random.normal(weight.shape))], strict=False)
    model.eval()
    return model, tokenizer


def some_rollouts() -> list[Rollout]:
    rng = np.random.default_rng(1)
    rollouts = []
    for prompt in ([5, 6, 7, 8, 9], [10, 11]):
        for length in (1, 4, 7):
            tokens = rng.integers(3, 200, length).tolist()
            rollouts.append(Rollout("q", prompt, tokens, True, ""))
    for i, rollout in enumerate(rollouts):
        rollout.advantage = (-1.0) ** i * (1 + i / 3)
    return rollouts


def logps_of(model, rollouts, temperature=1.0, **options):
    """`completion_logps` of rollouts."""
    prompts, completions = [r.prompt for r in rollouts], [r.tokens for r in rollouts]
    return completion_logps(model, prompts, completions, temperature, **options)


def one_by_one(model, rollout, temperature) -> np.ndarray:
    """The log-probabilities from one unpadded forward pass over prompt and completion."""
    ids = mx.array([rollout.prompt + rollout.tokens])
    logits = model(ids)[0, len(rollout.prompt) - 1 : -1].astype(mx.float32) / temperature
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return np.array(mx.take_along_axis(logps, mx.array(rollout.tokens)[:, None], axis=-1)[:, 0])


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_batched_logps_equal_one_forward_a_row(lora_model, temperature):
    model, _ = lora_model
    rollouts = some_rollouts()
    logps, mask, entropy = logps_of(model, rollouts, temperature, with_entropy=True)
    for i, rollout in enumerate(rollouts):
        length = len(rollout.tokens)
        np.testing.assert_allclose(
            np.array(logps[i, :length]), one_by_one(model, rollout, temperature), atol=LOGP_BOUND
        )
        assert mask[i].sum().item() == length
        assert (
            values(logps[i, length:])
            == values(entropy[i, length:])
            == [0.0] * (mask.shape[1] - length)
        )


def test_log_probabilities_depend_on_the_prompt(lora_model):
    model, _ = lora_model
    first = Rollout("q", [5, 6, 7], [20, 21], True, "")
    second = Rollout("q", [9, 9, 9], [20, 21], True, "")
    logps, _, _ = logps_of(model, [first, second])
    assert abs(logps[0, 0].item() - logps[1, 0].item()) > 1e-3


@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_micro_batches_sum_to_the_full_batch(lora_model, loss_type, mask_truncated):
    model, _ = lora_model
    rollouts = some_rollouts()
    rollouts[1].finished = rollouts[2].finished = False
    active = active_tokens(rollouts, mask_truncated)
    assert active == (24 - 4 - 7 if mask_truncated else 24)

    def loss_of(batch):
        logps, mask, _ = logps_of(model, batch)
        if mask_truncated:
            mask = mask * mx.array([[int(r.finished)] for r in batch])
        loss, _ = grpo.grpo_loss(
            logps,
            mask,
            mx.array([r.advantage for r in batch]),
            loss_type=loss_type,
            normalizer=active,
            max_completion_length=30,
        )
        return loss * batch_share(batch, rollouts, loss_type, mask_truncated)

    both = nn.value_and_grad(model, loss_of)
    full_loss, full = both(rollouts)
    batches = micro_batches(rollouts, 8)  # two prompts with lengths 1, 4, 7
    assert [[len(r.tokens) for r in batch] for batch in batches] == [[1, 4], [7], [1, 4], [7]]
    parts = [both(batch) for batch in batches]
    assert sum(p[0].item() for p in parts) == pytest.approx(
        full_loss.item(), abs=tolerance(float32=1e-5, bfloat16=5e-2)
    )
    whole = dict(tree_flatten(full))
    assert max(abs(np.array(g)).max() for g in whole.values()) > 1e-3
    for name, gradient in whole.items():
        summed = sum(np.array(dict(tree_flatten(p[1]))[name]) for p in parts)
        np.testing.assert_allclose(summed, np.array(gradient), atol=GRADIENT_BOUND)


def test_reference_is_the_model_with_the_adapter_out(lora_model):
    model, _ = lora_model
    rollouts = some_rollouts()
    with_adapter, _, _ = logps_of(model, rollouts)
    with models.adapters_off(model):
        set_logps(model, micro_batches(rollouts, 14), 1.0, "ref_logps")
        expected = one_by_one(model, rollouts[2], 1.0)
    np.testing.assert_allclose(np.array(rollouts[2].ref_logps), expected, atol=LOGP_BOUND)
    again, _, _ = logps_of(model, rollouts)
    assert values(again) == values(with_adapter)
    stacked = stack([r.ref_logps for r in rollouts], with_adapter.shape[1])
    assert abs(np.array(stacked - with_adapter)).max() > 1e-3


def test_a_new_adapter_is_its_own_reference(tiny_qwen3):
    """Leaving the reference pass out changes neither gradient nor KL."""
    model = models.load_base(tiny_qwen3)
    models.add_lora(model, models.lora_config(model, 4, 8.0, 0.0, ["q_proj", "v_proj"]))
    assert models.adapters_are_zero(model)
    config, rollouts = grpo_config("grpo.beta=0.5"), some_rollouts()
    without, sums = policy_gradient(model, [rollouts], rollouts, config)
    with models.adapters_off(model):
        set_logps(model, [rollouts], config.generation.temperature, "ref_logps")
    gradient, _ = policy_gradient(model, [rollouts], rollouts, config)
    assert sums["kl"] == 0
    for (name, a), (_, b) in zip(tree_flatten(without), tree_flatten(gradient), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=GRADIENT_BOUND, err_msg=name)
    name, value = next(i for i in models.adapter_weights(model).items() if i[0].endswith("lora_b"))
    model.load_weights([(name, mx.zeros_like(value).at[0, 1].add(1e-9))], strict=False)
    assert not models.adapters_are_zero(model)


def test_ready_adapters_compute_the_same(lora_model):
    model, _ = lora_model
    ids = mx.array([[5, 6, 7, 8]])
    expected, layers = np.array(models.hidden_states(model, ids)), lora_layers(model)
    with models.adapters_ready(model):
        assert not lora_layers(model)
        ready = np.array(models.hidden_states(model, ids))
    np.testing.assert_allclose(ready, expected, atol=tolerance(float32=1e-6, bfloat16=1e-2))
    assert [id(layer) for _, layer in lora_layers(model)] == [id(layer) for _, layer in layers]


def test_micro_batches_save_padding_or_prompts():
    def rows(prompt_length: int, lengths: list[int]) -> list[Rollout]:
        prompts = [[p] * prompt_length for p in (5, 6)]
        return [Rollout("q", p, [1] * n, True, "") for n in lengths for p in prompts]

    batches = micro_batches(rows(30, [8, 10, 9, 10]), 40)
    assert [{r.prompt[0] for r in batch} for batch in batches] == [{5}, {6}]
    batches = micro_batches(rows(1, [2, 8]), 16)
    assert [[len(r.tokens) for r in batch] for batch in batches] == [[2, 2], [8, 8]]


def test_rollouts_keep_the_sampled_ids_and_the_end_token(lora_model):
    model, tokenizer = lora_model
    end = models.end_token(tokenizer)
    sizes = [
        "grpo.num_generations=16",
        "grpo.max_completion_length=60",
        "grpo.rollout_batch_size=8",
    ]
    config, _ = load_config("grpo", None, [*sizes, "generation.temperature=3.0"])
    prompts = [("a", [5, 6]), ("b", [7, 8, 9])]
    rollouts = sample(model, tokenizer, prompts, config, step=0, end=end)
    assert [r.query for r in rollouts] == ["a"] * 16 + ["b"] * 16
    for rollout in rollouts:
        assert rollout.finished == (rollout.tokens[-1] == end)
        assert end not in rollout.tokens[:-1]
        assert rollout.finished or len(rollout.tokens) == 60


def test_a_bandit_learns(lora_model):
    """Reward for a first token under 100 (of 795): their share rises from chance to near 1."""
    model, tokenizer = lora_model
    end, prompt = models.end_token(tokenizer), [5, 6, 7]
    optimizer = optim.Adam(learning_rate=3e-2, bias_correction=True)

    def loss_of(rollouts):
        logps, mask, _ = logps_of(model, rollouts, 0.5)
        return grpo.grpo_loss(logps, mask, mx.array([r.advantage for r in rollouts]))[0]

    both = nn.value_and_grad(model, loss_of)
    share = []
    for step in range(40):
        sampler = TemperatureSampler(0.5, random_keys([f"{step} {i}" for i in range(32)], 2))
        completions = generate(model, [prompt], samples=32, max_tokens=1, end=end, sampler=sampler)
        rollouts = [Rollout("q", prompt, c.tokens, True, "") for c in completions]
        rewards = [float(r.tokens[0] < 100) for r in rollouts]
        share.append(sum(rewards) / 32)
        advantages = grpo.group_advantages([rewards])[0].tolist()
        for rollout, advantage in zip(rollouts, advantages, strict=True):
            rollout.advantage = advantage
        _, gradient = both(rollouts)
        optimizer.update(model, gradient)
        mx.eval(model.trainable_parameters(), optimizer.state)
    assert share[0] < 0.4
    assert sum(share[-5:]) / 5 > 0.9


# The parts of a step


def grpo_config(*settings: str):
    return load_config("grpo", None, settings)[0]


def test_every_prompt_is_used_once_per_epoch():
    prompts = [(f"query {i}", [i]) for i in range(5)]
    sizes = ["training.batch_size=2", "training.gradient_accumulation_steps=4"]
    order = PromptOrder(prompts, grpo_config(*sizes, "grpo.num_generations=4"))
    assert (order.per_step, order.steps_per_epoch) == (2, 3)
    epochs = [
        [prompt for step in steps for prompt in order[step]] for steps in ([0, 1, 2], [3, 4, 5])
    ]
    assert [sorted(epoch) for epoch in epochs] == [prompts, prompts]
    assert epochs[0] != epochs[1]


def test_groups_that_do_not_fill_a_step_are_refused():
    with pytest.raises(ValueError, match=r"4 x 4 .*multiple of grpo.num_generations \(3\)"):
        prompts_per_step(
            grpo_config(
                "training.batch_size=4",
                "training.gradient_accumulation_steps=4",
                "grpo.num_generations=3",
            )
        )


def test_rollouts_without_a_gradient_are_left_out():
    config = grpo_config("grpo.beta=0", "training.batch_size=2", "grpo.max_completion_length=7")
    rollouts = some_rollouts()
    for rollout in rollouts[:3]:
        rollout.advantage = 0.0
    kept = [r for batch in rank_batches(rollouts, config) for r in batch]
    assert sorted(map(id, kept)) == sorted(map(id, rollouts[3:]))
    config.grpo.beta = 0.02
    assert sum(map(len, rank_batches(rollouts, config))) == 6


def test_advantages_are_set_group_by_group():
    rollouts = some_rollouts()[:4]
    for rollout, reward in zip(rollouts, (1.0, 3.0, 5.0, 5.0), strict=True):
        rollout.reward = reward
    set_advantages(rollouts, 2, "none")
    assert [r.advantage for r in rollouts] == [-1.0, 1.0, 0.0, 0.0]


def test_the_policy_gradient_is_that_of_all_rollouts_at_once(lora_model):
    model, _ = lora_model
    rollouts = some_rollouts()
    config = grpo_config("grpo.beta=0")
    whole, sums = policy_gradient(model, [rollouts], rollouts, config)
    parts, _ = policy_gradient(model, [rollouts[:2], rollouts[2:]], rollouts, config)
    assert sums["tokens"] == 24 and sums["kl"] == 0 and sums["entropy"] > 0
    for (name, a), (_, b) in zip(tree_flatten(whole), tree_flatten(parts), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=GRADIENT_BOUND, err_msg=name)


HEALTHY = {
    "kl": 0.2,
    "frac_reward_zero_std": 0.25,
    "completions/clipped_ratio": 0.1,
    "completions/mean_length": 60.0,
}


@pytest.mark.parametrize(
    ("trouble", "advice"),
    [
        ({"kl": 1.1}, "learning_rate"),
        ({"frac_reward_zero_std": 1.0}, "num_generations"),
        ({"completions/clipped_ratio": 1.0}, "max_completion_length"),
        ({"completions/mean_length": 19.0}, "samples.jsonl"),
    ],
)
def test_each_kind_of_collapse_is_reported_once(tmp_path, capsys, trouble, advice):
    config = grpo_config(f"model.output={tmp_path / 'run'}")
    run, warned = Run(config, "grpo", 10, resume=False, overwrite=False), set()
    for record in (HEALTHY, HEALTHY | trouble, HEALTHY | trouble):
        run.begin_step()
        warn_of_collapse(run, record, warned)
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: step 2: ") and advice in warning
