"""Rewards and penalties by hand, and the reward of a rollout."""

from dataclasses import fields

import pytest
from settings import section

from expander.config import Penalties
from expander.train.rewards import PENALTIES, check_settings, set_rewards
from expander.train.rollout import Rollout, group_metrics
from reward import score_expansion_detailed

QUERY = "auth config"
GOOD = "hyde: Set the auth key in config.yaml.\nlex: auth settings\nvec: how to configure auth\n"


@pytest.mark.parametrize(
    ("name", "text", "finished", "amount"),
    [
        ("empty", "", True, 1.0),
        ("empty", " \n\n", True, 1.0),
        ("empty", "lex: auth", True, 0.0),
        ("truncated", GOOD, False, 1.0),
        ("truncated", GOOD, True, 0.0),
        ("extra_lines", GOOD, True, 0.0),
        ("extra_lines", "lex: a\nlex: b\nlex: c\nlex: d\n", True, 1 / 3),
        ("extra_lines", "hyde: a\nhyde: b\n" + "vec: x\n" * 4, True, 2 / 3),
        ("extra_lines", "vec: x\n" * 50, True, 1.0),
        ("duplicate_lines", GOOD, True, 0.0),
        ("duplicate_lines", "lex: auth\nlex: Auth\nvec: auth\nlex: auth", True, 0.5),
        ("duplicate_lines", "", True, 0.0),
        ("dropped_lines", GOOD, True, 0.0),
        (
            "dropped_lines",
            "lex: auth settings\nlex: sign-in\nvec: login page\nlex: auth\n",
            True,
            0.5,
        ),
        ("no_final_newline", GOOD, True, 0.0),
        ("no_final_newline", GOOD.rstrip(), True, 1.0),
        ("no_final_newline", GOOD.rstrip(), False, 0.0),  # cut off: another term's business
    ],
)
def test_amounts(name, text, finished, amount):
    assert PENALTIES[name](QUERY, text, finished) == pytest.approx(amount)


def test_reward_is_the_rubric_less_the_weighted_penalties():
    weights = dict.fromkeys(PENALTIES, 0.0) | {"truncated": 0.25, "duplicate_lines": 0.5}
    settings = section("grpo", reward="percentage", penalties=Penalties(**weights))
    rollout = Rollout(QUERY, [1], [2], False, "lex: auth settings\nlex: auth settings\n")
    set_rewards([rollout], settings)
    rubric = score_expansion_detailed(QUERY, rollout.text)["percentage"] / 100
    assert rollout.rubric == rubric
    assert rollout.penalties == {"truncated": 1.0, "duplicate_lines": 0.5}
    assert rollout.reward == pytest.approx(rubric - 0.25 - 0.25)
    metrics = group_metrics([rollout, rollout], 2)
    assert metrics["rewards/rubric"] == rubric
    assert metrics["reward"] == pytest.approx(rollout.reward)
    assert metrics["penalties/duplicate_lines"] == 0.5
    assert metrics["frac_reward_zero_std"] == 1.0
    assert metrics["completions/clipped_ratio"] == 1.0
    assert metrics["distinct_lines"] == 0.5


def test_the_score_ignores_the_echo_cap_that_the_percentage_has():
    echo = "lex: auth config\nvec: how to configure auth\n"
    rollouts = [Rollout(QUERY, [1], [2], True, echo) for _ in range(2)]
    set_rewards(rollouts[:1], section("grpo", reward="percentage"))
    set_rewards(rollouts[1:], section("grpo", reward="score"))
    assert rollouts[0].reward == 0.5
    assert rollouts[1].reward > 0.7


def test_every_penalty_has_a_weight_and_every_weight_a_penalty():
    assert {field.name for field in fields(Penalties)} == set(PENALTIES)


def test_an_unknown_reward_is_refused_with_the_names():
    check_settings(section("grpo", reward="score"))
    with pytest.raises(ValueError, match=r"grpo\.reward: 'bleu' .* percentage, score"):
        check_settings(section("grpo", reward="bleu"))
