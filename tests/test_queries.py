"""evals/queries.txt: its categories, and that no training row contains one of its queries."""

import json
from collections import Counter
from pathlib import Path

import pytest

from expander.nearness import near_copies, plain
from expander.text import script_counts

ROOT = Path(__file__).parent.parent
CATEGORIES = [
    "technical docs",
    "short and ambiguous",
    "entities",
    "personal notes",
    "research",
    "errors",
    "recency",
    "complex",
    "quoted phrases",
    "negation",
    "only modes",
    "languages",
    "typos",
    "very long",
]


def read(path: Path) -> dict[str, list[str]]:
    """The queries by category, read without the project's code."""
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            queries = found.setdefault(line[2:], [])
        elif line and not line.startswith("##"):
            queries.append(line)
    return found


@pytest.fixture(scope="module")
def categories() -> dict[str, list[str]]:
    return read(ROOT / "evals" / "queries.txt")


@pytest.fixture(scope="module")
def trained() -> list[str]:
    rows = []
    for path in sorted((ROOT / "data").glob("*.jsonl")):
        rows += map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert len(rows) >= 150
    return [row["query"] for row in rows]


def test_every_category_is_there_and_no_query_twice(categories):
    assert list(categories) == CATEGORIES
    assert all(len(queries) >= 5 for queries in categories.values())
    everything = [query for queries in categories.values() for query in queries]
    assert len(everything) >= 150
    assert len(set(map(plain, everything))) == len(everything)


def test_queries_fit_their_category(categories):
    assert all(len(query.split()) <= 2 for query in categories["short and ambiguous"])
    assert all('"' in query for query in categories["quoted phrases"])
    assert all(len(query) > 150 for query in categories["very long"])
    suffixes = Counter(query.rpartition(" ")[2] for query in categories["only modes"])
    assert suffixes.keys() == {"/only:lex", "/only:vec", "/only:hyde"}


def test_languages_are_in_seven_scripts(categories):
    scripts = Counter(
        next((name for name in script_counts(query) if name != "LATIN"), "LATIN")
        for query in categories["languages"]
    )
    # German, French, Spanish, Portuguese, Polish, Italian and Dutch, and six other scripts.
    assert scripts.keys() >= {"LATIN", "CJK", "HANGUL", "CYRILLIC", "ARABIC", "DEVANAGARI", "GREEK"}
    assert len(categories["languages"]) >= 20


def test_no_training_row_contains_an_evaluation_query(categories, trained):
    everything = [query for queries in categories.values() for query in queries]
    vault = (ROOT / "evals" / "vault" / "queries.jsonl").read_text(encoding="utf-8")
    everything += [json.loads(line)["text"] for line in vault.splitlines()]
    assert near_copies(everything, trained) == []


@pytest.mark.parametrize(
    "copy",
    [
        "nginx upstream keepalive connections",
        "NGINX  upstream keepalive connections",
        "keepalive connections nginx upstream",
        "nginx upstream keepalive connections /only:lex",
        "nginx upstream keepalive connection",
        "nginx upstream keep-alive connections?",
        "the nginx upstream keepalive connections",
        "nginx upstrem keepalive conections",
    ],
)
def test_a_near_copy_is_found(copy, categories, trained):
    query = "nginx upstream keepalive connections"
    assert query in categories["technical docs"]
    assert near_copies([query], [*trained, copy]) == [(query, copy)]
