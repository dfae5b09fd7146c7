"""The dtype of a Mac's GPU, on the CPU: bfloat16 models give what float32 ones give, within loose bounds."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear as MlxLoRALinear

from expander import model as models
from expander.architectures import PROJECTIONS
from expander.config import load_config
from expander.decode import TemperatureSampler, generate, random_keys
from expander.lora import LoRALinear
from expander.train.batches import Row, collate
from expander.train.grpo import policy_gradient
from expander.train.logps import token_logps
from expander.train.rollout import Rollout, set_logps
from expander.train.sft import completion_loss

TOKENS = mx.array([[5, 300, 17, 44, 260, 9, 301, 2]])


@pytest.fixture(scope="module")
def adapter(tiny_qwen3, tmp_path_factory):
    """A random adapter of every layer over the tiny Qwen3."""
    folder = tmp_path_factory.mktemp("adapter")
    model = models.load_base(tiny_qwen3)
    config = models.lora_config(model, 4, 8.0, 0.0, PROJECTIONS)
    models.add_lora(model, config)
    mx.random.seed(1)
    weights = {
        name: mx.random.normal(value.shape, scale=0.05)
        for name, value in models.adapter_weights(model).items()
    }
    models.save_adapter(folder, weights, config | {"model": str(tiny_qwen3)})
    return folder


@pytest.fixture
def load(adapter, monkeypatch):
    """`load("bfloat16")`: the adapted model in a dtype."""

    def load(dtype: str, fuse: bool = False) -> nn.Module:
        monkeypatch.setenv("QMD_DTYPE", dtype)
        return models.load_chain(models.read_chain(str(adapter)), fuse_last=fuse)[0]

    return load


@pytest.fixture
def both(load) -> list[nn.Module]:
    """The adapted model in float32 and in bfloat16."""
    return [load("float32"), load("bfloat16")]


def cosine(a: dict, b: dict) -> float:
    """Between two gradients as a whole."""
    x, y = (np.concatenate([np.array(v).ravel() for _, v in tree_flatten(t)]) for t in (a, b))
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def test_the_lora_layer_computes_in_the_dtype_of_its_input():
    mx.random.seed(0)
    linear = nn.Linear(64, 48, bias=False)
    ours = LoRALinear.from_base(linear, r=4, scale=2.0)
    ours.lora_b = mx.random.normal((4, 48))
    ours.freeze(keys=["weight"])
    x = mx.random.normal((2, 5, 64))
    exact = ours(x)
    ours.linear.weight = linear.weight.astype(mx.bfloat16)
    value, gradient = nn.value_and_grad(ours, lambda m, x: m(x).astype(mx.float32).sum())(
        ours, x.astype(mx.bfloat16)
    )
    rounded = ours(x.astype(mx.bfloat16))
    assert rounded.dtype == mx.bfloat16
    assert gradient["lora_a"].dtype == gradient["lora_b"].dtype == mx.float32
    np.testing.assert_allclose(np.array(rounded.astype(mx.float32)), np.array(exact), atol=0.1)
    assert value.item() == pytest.approx(exact.sum().item(), abs=2)


def test_the_lora_layer_is_mlx_lms_in_float32():
    """Its output and both gradients."""
    mx.random.seed(0)
    linear = nn.Linear(64, 48)
    layers = [kind.from_base(linear, r=4, scale=2.0) for kind in (LoRALinear, MlxLoRALinear)]
    weights = [("lora_a", mx.random.normal((64, 4))), ("lora_b", mx.random.normal((4, 48)))]
    x = mx.random.normal((2, 5, 64)) / 8
    results = []
    for layer in layers:
        layer.load_weights(weights, strict=False)
        layer.linear.freeze()
        _, gradient = nn.value_and_grad(layer, lambda m: (m(x) ** 2).mean())(layer)
        results.append([layer(x), gradient["lora_a"], gradient["lora_b"]])
    for ours, theirs in zip(*results, strict=True):
        largest = mx.abs(theirs).max().item()
        assert mx.abs(ours - theirs).max().item() < 1e-6 * max(largest, 1)


def test_token_log_probabilities():
    mx.random.seed(3)
    weight, hidden = mx.random.normal((50, 8)), mx.random.normal((23, 8))
    targets = mx.random.randint(0, 50, (23,))
    found = []
    for dtype in (mx.float32, mx.bfloat16):
        w = weight.astype(dtype)

        def total(h, w=w):
            return token_logps(h, targets, lambda x: x @ w.T)[0].sum()

        h = hidden.astype(dtype)
        logps, entropy = token_logps(h, targets, lambda x, w=w: x @ w.T, with_entropy=True)
        assert logps.dtype == entropy.dtype == mx.float32
        slope = mx.grad(total)(h)
        assert slope.dtype == dtype
        found.append([np.array(a.astype(mx.float32)) for a in (logps, entropy, slope)])
    for exact, rounded in zip(*found, strict=True):
        np.testing.assert_allclose(rounded, exact, atol=0.15)


def test_the_loss_and_gradient_of_sft(both):
    rows = [Row([5, 6, 7, 20, 21, 2], 3, ""), Row([9, 8, 30, 31, 32, 33, 34, 2], 2, "")]
    results = [nn.value_and_grad(m, completion_loss)(m, *collate(rows)) for m in both]
    (((exact, _), gradient), ((rounded, _), other)) = results
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
    assert {g.dtype for _, g in tree_flatten(other)} == {mx.float32}
    assert cosine(gradient, other) > 0.98


def test_the_gradient_of_grpo(both):
    config, _ = load_config("grpo")
    gradients = []
    for model in both:
        rollouts = [
            Rollout("q", [5, 6, 7], [20 + i, 21, 22 + i, 2], True, "", advantage=(-1.0) ** i)
            for i in range(4)
        ]
        with models.adapters_off(model):
            set_logps(model, [rollouts], 1.0, "ref_logps")
        gradient, sums = policy_gradient(model, [rollouts], rollouts, config)
        assert sums["tokens"] == 16 and sums["kl"] >= 0
        gradients.append(gradient)
    assert cosine(*gradients) > 0.98


def test_log_probabilities_of_the_update_give_ratios_of_exactly_one(load):
    """With several updates per rollout: old_logps are those of the first update."""
    model, (config, _) = load("bfloat16"), load_config("grpo")
    rollouts = [
        Rollout("q", [5, 6, 7], [20 + i, 21, 22 + i, 2], True, "", advantage=1.0) for i in range(2)
    ]
    set_logps(model, [rollouts], 1.0, "old_logps")
    config.grpo.beta, config.grpo.epsilon_low, config.grpo.epsilon_high = 0.0, 1e-6, 1e-6
    _, sums = policy_gradient(model, [rollouts], rollouts, config)
    assert sums["clip_low"] == sums["clip_high"] == 0


def test_decoding_is_of_the_dtype_and_repeatable(both):
    prompts = [[5, 6, 7, 8], [9, 10]]
    keys = random_keys(["a", "b"], 0)
    for model in both:
        first, again = (
            generate(model, prompts, max_tokens=8, end=2, sampler=TemperatureSampler(1.0, keys))
            for _ in range(2)
        )
        assert first == again and all(c.tokens for c in first)
    # Greedy choices differ only where two logits are as good as equal.
    exact, rounded = (generate(m, prompts, max_tokens=1, end=2) for m in both)
    for prompt, a, b in zip(prompts, exact, rounded, strict=True):
        logits = both[0](mx.array([prompt]))[0, -1]
        assert logits[b.tokens[0]].item() > logits[a.tokens[0]].item() - 0.1


def test_an_adapter_is_fused_and_loaded_in_the_dtype(load):
    unfused, fused = load("bfloat16"), load("bfloat16", fuse=True)
    assert {w.dtype for _, w in tree_flatten(fused.parameters())} == {mx.bfloat16}
    assert {w.dtype for w in models.adapter_weights(unfused).values()} == {mx.float32}
    exact = np.array(load("float32", fuse=True)(TOKENS))
    for model in (unfused, fused):
        logits = np.array(model(TOKENS).astype(mx.float32))
        np.testing.assert_allclose(logits, exact, atol=0.2)
