"""The checks of generated rows: they can be parsed, QMD would use their lines, and they score well."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from expander.nearness import near_copies
from expander.prompt import render_lines
from expander.qmd import kept_lines
from expander.queries import EVALUATION_QUERIES, base_query, read_queries
from expander.rows import Example, parse_row
from reward import score_expansion_detailed

MIN_SCORE = 80  # minimum percentage of the rubric for a training row


@dataclass(frozen=True)
class Verdict:
    """The result of checking an answer: a row, or the reason for rejecting it."""

    example: Example | None
    reason: str = ""
    score: float = 0.0  # percentage of the rubric
    unmatched: int = 0  # lines removed from the row, because QMD would drop them


def judge(query: str, answer: str, min_score: float) -> Verdict:
    """Parse an answer as the expansion of a query, remove lines that QMD would drop, and score it.

    Args:
        min_score: minimum percentage of the rubric.

    >>> judge("auth config", "Sure!", 80).reason
    "line 'Sure!' does not start with hyde:, lex: or vec:"
    """
    try:
        read = parse_row({"query": query, "output": answer})
    except ValueError as error:
        return Verdict(None, str(error))
    lines = tuple(kept_lines(base_query(read.query), render_lines(read.lines)))
    if not lines:
        return Verdict(None, "QMD would drop every line: none contains a word of the query")
    if sum(kind == "hyde" for kind, _ in lines) > 1:
        return Verdict(None, "more than one hyde line")
    result = score_expansion_detailed(read.query, render_lines(lines))
    score = result["percentage"]
    if score < min_score:
        faults = "; ".join(result["deductions"])
        return Verdict(None, f"score under {min_score:g}: {score:.1f}; {faults}", score)
    return Verdict(replace(read, lines=lines), "", score, len(read.lines) - len(lines))


def evaluation_copies(queries: Iterable[str]) -> dict[str, str]:
    """The queries that nearly repeat an evaluation query, each with that evaluation query."""
    evaluation = [query for query, _ in read_queries(EVALUATION_QUERIES)]
    return {copy: query for query, copy in near_copies(evaluation, queries)}
