"""fast_exp.py: the CPU's faster exponential gives what MLX's own functions give, gradients too."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from dtypes import float32_only

from expander import fast_exp
from expander import model as models

IDS = mx.array([[5, 300, 17, 44, 260, 9, 301, 2]])


@pytest.fixture(params=[True, False])
def wanted(request, monkeypatch) -> bool:
    monkeypatch.setattr(fast_exp, "is_wanted", lambda: request.param)
    return request.param


def test_softmax_and_logsumexp(wanted):
    logits = np.random.default_rng(0).normal(size=(5, 1000)).astype(np.float32) * 6
    logits[0, 7], logits[1, 7], logits[2, :990] = 90.0, -np.inf, -3e38
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=-1, keepdims=True)
    total = np.exp(exact).sum(axis=-1, keepdims=True)
    lse = np.log(total) + logits.max(axis=-1, keepdims=True)
    probs, found = fast_exp.softmax_and_lse(mx.array(logits))
    np.testing.assert_allclose(np.array(probs), np.exp(exact) / total, atol=1e-6)
    np.testing.assert_allclose(np.array(found), lse, rtol=1e-6)
    np.testing.assert_allclose(np.array(fast_exp.logsumexp(mx.array(logits))), lse, rtol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_swiglu_and_its_gradient(compiled):
    """Also where e^-gate is infinite, and inside a compiled step."""
    gate = mx.array([-200.0, -90.0, -20.0, -1.0, 0.0, 0.5, 20.0, 90.0, 200.0])
    up, cotangent = mx.linspace(-2, 3, gate.size), mx.linspace(1, 2, gate.size)

    def outputs(function):
        def both(gate, up):
            return mx.vjp(function, [gate, up], [cotangent])

        values, slopes = (mx.compile(both) if compiled else both)(gate, up)
        return np.array(mx.stack([*values, *slopes]))

    exact = outputs(lambda gate, up: nn.silu(gate) * up)
    np.testing.assert_allclose(outputs(fast_exp.swiglu), exact, rtol=2e-6, atol=1e-7)


@float32_only
@pytest.mark.parametrize("folder", ["tiny_qwen3", "tiny_llama"])
def test_a_loaded_model_uses_it_and_gives_the_same(folder, request, monkeypatch):
    states = []
    for wanted in (False, True):
        monkeypatch.setattr(fast_exp, "is_wanted", lambda wanted=wanted: wanted)
        model = models.load_base(request.getfixturevalue(folder))
        ours = {type(layer.mlp).__module__ == fast_exp.__name__ for layer in model.layers}
        assert ours == {wanted}
        states.append(np.array(models.hidden_states(model, IDS)))
    np.testing.assert_allclose(*states, atol=1e-5)
    assert (states[0] != states[1]).any()
