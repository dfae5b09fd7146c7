"""Named reward terms that close the rubric's exploits for training, without changing the score.

The rubric pays for an empty expansion, never looks at what was cut off and does not count lines;
these terms do. Each gives an amount from 0 (nothing wrong) to 1; `grpo.penalties` weighs them.
"""

from collections.abc import Callable

from expander.qmd import kept_lines
from reward import parse_expansion

# The most lines of one type that training targets have.
MOST_LINES = 3


def _lines(text: str) -> list[str]:
    return [line.strip().lower() for line in text.split("\n") if line.strip()]


def empty(query: str, text: str, finished: bool) -> float:
    """No line at all: the rubric gives 60 of 120 points."""
    return float(not _lines(text))


def truncated(query: str, text: str, finished: bool) -> float:
    """Cut off at the token limit."""
    return float(not finished)


def extra_lines(query: str, text: str, finished: bool) -> float:
    """A third for each lex or vec line beyond 3, and for each hyde line beyond 1."""
    parsed = parse_expansion(text)
    extra = sum(max(0, len(parsed[kind]) - MOST_LINES) for kind in ("lex", "vec"))
    return min(1.0, (extra + max(0, len(parsed["hyde"]) - 1)) / 3)


def duplicate_lines(query: str, text: str, finished: bool) -> float:
    """The share of lines that say what an earlier one said, in any case."""
    lines = _lines(text)
    return 1.0 - len(set(lines)) / len(lines) if lines else 0.0


def dropped_lines(query: str, text: str, finished: bool) -> float:
    """The share of lines that QMD would throw away."""
    lines = _lines(text)
    return 1.0 - min(1.0, len(kept_lines(query, text)) / len(lines)) if lines else 0.0


def no_final_newline(query: str, text: str, finished: bool) -> float:
    """Ended inside a line: under QMD's grammar the model could not have stopped there."""
    return float(finished and bool(text) and not text.endswith("\n"))


PENALTIES: dict[str, Callable[[str, str, bool], float]] = {
    term.__name__: term
    for term in (empty, truncated, extra_lines, duplicate_lines, dropped_lines, no_final_newline)
}
