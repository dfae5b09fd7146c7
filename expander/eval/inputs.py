"""Evaluation inputs: queries, reference expansions, other tools' expansions, training records."""

from collections.abc import Sequence
from pathlib import Path

from expander.eval.measure import Expansion, Queries, References
from expander.prompt import render_lines
from expander.queries import (
    EVALUATION_QUERIES,
    normal_query,
    query_digest,
    read_queries,
    read_query_digests,
)
from expander.rows import Example, file_rows, load_rows


def read_golden(path: Path) -> dict[str, Example]:
    """Reference expansions by `normal_query`, from a file in any row format.

    Raises:
        ValueError: the file is missing or cannot be read as rows.
    """
    if not path.is_file():
        raise ValueError(f"--golden {path}: no such file")
    return {normal_query(row.query): row for row in load_rows(str(path)).train}


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


def read_expansions(path: Path, limit: int | None) -> tuple[Queries, list[list[Expansion]]]:
    """The first `limit` queries of a JSON Lines file and the expansions of each.

    Rows with the same query are its samples.

    Raises:
        ValueError: the file has no rows, or an invalid one, named as "path:line: reason".
    """
    expansions: dict[str, list[Expansion]] = {}
    categories: dict[str, str | None] = {}
    for place, row in file_rows(path):
        if isinstance(row, ValueError):
            raise ValueError(f"{place}: {row}")
        fields = row if isinstance(row, dict) else {}
        query, text = fields.get("query"), fields.get("expansion", fields.get("output"))
        if isinstance(text, list) and all(isinstance(x, list) and len(x) == 2 for x in text):
            text = render_lines(text)
        if not isinstance(query, str) or not query.strip() or not isinstance(text, str):
            raise ValueError(f'{place}: expected {{"query": text, "expansion": text}}')
        category = fields.get("category")
        categories.setdefault(query.strip(), category if isinstance(category, str) else None)
        expansions.setdefault(query.strip(), []).append(Expansion(text))
    if not expansions:
        raise ValueError(f"--score-only {path}: the file has no rows")
    return list(categories.items())[:limit], list(expansions.values())[:limit]


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
