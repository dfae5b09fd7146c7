"""Training rewards and penalties: every term that GRPO can optimise.

    reward of a completion = base reward - sum of weight * penalty

To add a base reward: write a function of (query, completion, the rubric's result) that returns a
number from 0 to 1, and enter it in REWARDS. `grpo.reward` selects it by name. One reward needs more
than that: `retrieval` is worth what a search with the completion finds (judged.py).

To add a penalty: write a function of (query, completion, finished) that returns a number from 0
(nothing wrong) to 1, and enter it in PENALTIES. Its weight is the key of the same name under
`grpo.penalties` in configs/grpo.yaml.

The penalties close exploits of the rubric without changing the score that is reported: the rubric
pays for an empty expansion, ignores truncation, and does not count lines.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from expander.config import Grpo, Retrieval
from expander.qmd import kept_lines
from reward import parse_expansion, score_expansion, score_expansion_detailed

if TYPE_CHECKING:
    from expander.train.judged import Finding, Judge
    from expander.train.rollout import Rollout

RETRIEVAL = "retrieval"
MAX_LINES = 3  # lex or vec lines that a training target has at most


class RewardError(ValueError):
    """The reward of a completion could not be computed."""


# Base rewards


def percentage(query: str, completion: str, rubric: dict) -> float:
    """The rubric's reported percentage, as a share: an echo of the query caps it at 0.5."""
    return rubric["percentage"] / 100


def score(query: str, completion: str, rubric: dict) -> float:
    """The rubric's points as a share, without the cap."""
    return score_expansion(query, completion)


def retrieval(rubric: float, finding: "Finding", weights: Retrieval) -> float:
    """The gain of the search over the bare query's, on a floor of form.

    Args:
        rubric: the rubric's percentage as a share. Above `weights.rubric_cap` it pays nothing more:
            there, better form is worse search.

    >>> from types import SimpleNamespace as Example
    >>> finding = Example(gain=0.1, lex_without_hit=0.5)
    >>> weights = Example(gain=4.0, rubric=0.5, rubric_cap=0.75, lex_without_hit=0.2)
    >>> round(retrieval(0.9, finding, weights), 3)
    0.675
    """
    return (
        weights.rubric * min(rubric, weights.rubric_cap)
        + weights.gain * finding.gain
        - weights.lex_without_hit * finding.lex_without_hit
    )


REWARDS: dict[str, Callable[[str, str, dict], float]] = {
    term.__name__: term for term in (percentage, score)
}


# Penalties


def _lines(completion: str) -> list[str]:
    return [line.strip().lower() for line in completion.split("\n") if line.strip()]


def empty(query: str, completion: str, finished: bool) -> float:
    """1 for a completion without any line, which the rubric gives 60 of 120 points."""
    return float(not _lines(completion))


def truncated(query: str, completion: str, finished: bool) -> float:
    """1 for a completion that was cut off at the token limit."""
    return float(not finished)


def extra_lines(query: str, completion: str, finished: bool) -> float:
    """A third for each lex or vec line beyond 3 and each hyde line beyond 1."""
    parsed = parse_expansion(completion)
    extra = sum(max(0, len(parsed[kind]) - MAX_LINES) for kind in ("lex", "vec"))
    return min(1.0, (extra + max(0, len(parsed["hyde"]) - 1)) / 3)


def duplicate_lines(query: str, completion: str, finished: bool) -> float:
    """The share of lines that repeat an earlier one, ignoring case."""
    lines = _lines(completion)
    return 1.0 - len(set(lines)) / len(lines) if lines else 0.0


def dropped_lines(query: str, completion: str, finished: bool) -> float:
    """The share of lines that QMD would drop."""
    lines = _lines(completion)
    return 1.0 - min(1.0, len(kept_lines(query, completion)) / len(lines)) if lines else 0.0


def no_final_newline(query: str, completion: str, finished: bool) -> float:
    """1 for a completion that ended inside a line, where QMD's grammar does not let it stop."""
    return float(finished and bool(completion) and not completion.endswith("\n"))


PENALTIES: dict[str, Callable[[str, str, bool], float]] = {
    term.__name__: term
    for term in (empty, truncated, extra_lines, duplicate_lines, dropped_lines, no_final_newline)
}


def check_settings(settings: Grpo) -> None:
    """Fail on an unknown reward before anything is loaded.

    Raises:
        ValueError: `grpo.reward` names no reward.
    """
    allowed = [*REWARDS, RETRIEVAL]
    if settings.reward not in allowed:
        raise ValueError(
            f"grpo.reward: {settings.reward!r} is not allowed; it takes one of {', '.join(allowed)}"
        )
    if settings.credit == "line" and settings.reward != RETRIEVAL:
        raise ValueError(
            f"grpo.credit line needs grpo.reward {RETRIEVAL}, found {settings.reward}: only a search "
            "shows what a line is worth"
        )


def penalized(base: float, penalties: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The reward that is optimised.

    >>> penalized(0.9, {"truncated": 1.0, "extra_lines": 0.5}, {"truncated": 0.3, "extra_lines": 0.2})
    0.5
    """
    return base - sum(weights[name] * amount for name, amount in penalties.items())


def set_rewards(
    rollouts: Sequence["Rollout"], settings: Grpo, judge: "Judge | None" = None
) -> None:
    """Set the rubric, the penalties and the reward of every rollout.

    Penalties of weight 0 are not computed.

    Args:
        judge: required if `grpo.reward` is retrieval; sets each rollout's finding as well.

    Raises:
        RewardError: the rubric or a penalty raised an exception.
    """
    weights = {name: weight for name, weight in asdict(settings.penalties).items() if weight}
    if judge:
        judge.prepare((r.query, r.text) for r in rollouts)
    for r in rollouts:
        try:
            rubric = score_expansion_detailed(r.query, r.text)
            r.rubric = rubric["percentage"] / 100
            r.penalties = {name: PENALTIES[name](r.query, r.text, r.finished) for name in weights}
            if judge:
                r.finding = judge.find(r.query, r.text)
                base = retrieval(r.rubric, r.finding, settings.retrieval)
            else:
                base = REWARDS[settings.reward](r.query, r.text, rubric)
        except Exception as error:  # users edit the rubric, and it may raise anything
            raise RewardError(
                f"the reward of query {r.query!r}, completion {r.text!r}, failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        r.reward = penalized(base, r.penalties, weights)
