"""What both generators demand of a row: that it reads back, QMD would use it, and it scores well."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from expander.nearness import near_copies
from expander.prompt import render_lines
from expander.qmd import kept_lines
from expander.queries import EVALUATION_QUERIES, base_query, read_queries
from expander.rows import Example, parse_row
from reward import score_expansion_detailed

LEAST = 80  # percent of the rubric from which a row is worth training on


@dataclass(frozen=True)
class Verdict:
    """What became of one answer: a row, or the reason why there is none."""

    example: Example | None
    reason: str = ""
    score: float = 0.0  # reward.py's percentage
    unmatched: int = 0  # lines left out of the row, because QMD would drop them


def judge(query: str, answer: str, least: float) -> Verdict:
    """Read an answer as the expansion of a query, leave out what QMD would drop, score the rest.

    Args:
        least: the percentage from which a row is kept.

    >>> judge("auth config", "Sure!", 80).reason
    "line 'Sure!' does not start with hyde:, lex: or vec:"
    """
    try:
        read = parse_row({"query": query, "output": answer})
    except ValueError as error:
        return Verdict(None, str(error))
    lines = tuple(kept_lines(base_query(read.query), render_lines(read.lines)))
    if not lines:
        return Verdict(None, "QMD would drop every line: none holds a word of the query")
    if sum(kind == "hyde" for kind, _ in lines) > 1:
        return Verdict(None, "more than one hyde line")
    result = score_expansion_detailed(read.query, render_lines(lines))
    score = result["percentage"]
    if score < least:
        faults = "; ".join(result["deductions"])
        return Verdict(None, f"score under {least:g}: {score:.1f}; {faults}", score)
    return Verdict(replace(read, lines=lines), "", score, len(read.lines) - len(lines))


def evaluation_copies(queries: Iterable[str]) -> dict[str, str]:
    """Each query that is an evaluation query or nearly one, and which it is."""
    evaluation = [query for query, _ in read_queries(EVALUATION_QUERIES)]
    return {copy: query for query, copy in near_copies(evaluation, queries)}
