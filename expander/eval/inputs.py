"""Evaluation inputs: queries, reference expansions, other tools' expansions, training records."""

import random
from collections.abc import Sequence
from pathlib import Path

from expander.eval.measure import Expansion, Queries, References
from expander.prompt import render_lines
from expander.queries import (
    EVALUATION_QUERIES,
    checked_query,
    normal_query,
    query_digest,
    read_queries,
    read_query_digests,
    visible_text,
)
from expander.rows import Example, file_rows, load_rows, one_line


def read_golden(path: Path, sample: int, seed: int) -> dict[str, Example]:
    """Reference expansions by `normal_query`, from a file in any row format.

    Args:
        sample: number of rows, drawn by the seed; 0 is all of them.

    Raises:
        ValueError: the file is missing or cannot be read as rows.
    """
    if not path.is_file():
        raise ValueError(f"--golden {path}: no such file")
    rows = load_rows(str(path)).train
    if 0 < sample < len(rows):
        rows = random.Random(seed).sample(rows, sample)
    return {normal_query(row.query): row for row in rows}


def choose_queries(query: str | None, path: Path | None, golden: dict[str, Example]) -> Queries:
    """The queries to expand: a single one, a file's, the references', or the default list."""
    if query is not None:
        return [(query, None)]
    if golden and path is None:
        return [(row.query, row.category) for row in golden.values()]
    return read_queries(path or EVALUATION_QUERIES)


def find_references(golden: dict[str, Example], queries: Queries) -> References:
    """The reference lines, by query, of the queries that have a reference."""
    found = {query: golden.get(normal_query(query)) for query, _ in queries}
    return {query: example.lines for query, example in found.items() if example}


def _expansion_text(value: object) -> str | None:
    """An expansion given as text or as [type, text] pairs; None if it is neither."""
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    pairs = [pair for pair in value if isinstance(pair, list) and len(pair) == 2]
    if len(pairs) < len(value) or not all(isinstance(x, str) for pair in pairs for x in pair):
        return None
    return render_lines([(kind, one_line(text)) for kind, text in pairs])


def read_expansions(path: Path, limit: int | None) -> tuple[Queries, list[list[Expansion]]]:
    """The first `limit` queries of a JSON Lines file and the expansions of each.

    Rows with the same query are its samples; the same visible text is the same query.

    Raises:
        ValueError: the file has no rows, or an invalid one, named as "path:line: reason".
    """
    queries: dict[str, tuple[str, str | None]] = {}
    expansions: dict[str, list[Expansion]] = {}
    for place, row in file_rows(path):
        if isinstance(row, ValueError):
            raise ValueError(f"{place}: {row}")
        fields = row if isinstance(row, dict) else {}
        query = fields.get("query")
        text = _expansion_text(fields.get("expansion", fields.get("output")))
        if not isinstance(query, str) or text is None:
            raise ValueError(
                f'{place}: expected {{"query": text, "expansion": text or [[type, text], ...]}}'
            )
        try:
            query = checked_query(query)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        category = fields.get("category")
        name = visible_text(query)
        queries.setdefault(name, (query, category if isinstance(category, str) else None))
        expansions.setdefault(name, []).append(Expansion(text))
    if not expansions:
        raise ValueError(f"--score-only {path}: the file has no rows")
    return list(queries.values())[:limit], list(expansions.values())[:limit]


def mark_leaks(results: Sequence[dict], adapters: Sequence[Path]) -> dict[str, list[str]]:
    """Set `trained_on` in the results whose query is in an adapter's training record.

    Returns:
        "checked": adapter folders with a record; "unknown": those without; "queries": the queries
        that were trained on.
    """
    leaks = {"checked": [], "unknown": [], "queries": []}
    trained_on: set[str] = set()
    for folder in adapters:
        digests = read_query_digests(folder)
        leaks["unknown" if digests is None else "checked"].append(str(folder))
        trained_on |= digests or set()
    for result in results:
        result["trained_on"] = query_digest(result["query"]) in trained_on
        if result["trained_on"]:
            leaks["queries"].append(result["query"])
    return leaks
