"""expander/nearness.py: the coefficient worked by hand, and MinHash against every pair."""

import json
import random
from itertools import combinations
from pathlib import Path

from expander.nearness import NEAR, near_copies, near_duplicates, nearness, pieces, plain

ROOT = Path(__file__).parents[1]


def test_nearness_worked_by_hand():
    assert plain("Zürich: TRAM, früh? /only:lex") == "fruh tram zurich"
    a, b = pieces("caches"), pieces("cache")
    assert sorted(a) == ["ac", "ca", "ch", "es", "he"]
    assert nearness(a, b) == 8 / 9 and nearness(a, pieces("zinc")) == 0
    assert nearness(pieces("x"), pieces("X!")) == 1


def test_near_copies_are_the_pairs_above_the_threshold():
    queries = ["auth config", "docker volume permissions"]
    rows = ["Config AUTH /only:vec", "docker volumes permission", "podman networks", "auth"]
    expected = [
        (query, row)
        for row in rows
        for query in queries
        if nearness(pieces(query), pieces(row)) >= NEAR
    ]
    assert near_copies(queries, rows) == expected and len(expected) == 2


def test_at_least_95_percent_of_near_duplicates_are_found():
    rng, queries = random.Random(0), []
    for path in sorted((ROOT / "data").glob("*.jsonl")):
        queries += [json.loads(line)["query"] for line in path.open(encoding="utf-8")]
    queries = [q for q in rng.sample(queries, 150) if len(q) > 12]
    # Each without its middle letter: close to its original, and to no other.
    copies = [q[: len(q) // 2] + q[len(q) // 2 + 1 :] for q in queries]
    found = list(near_duplicates([*queries, *copies]))
    bags = [pieces(q) for q in [*queries, *copies]]
    near = sum(nearness(a, b) >= NEAR for a, b in combinations(bags, 2))
    assert all(nearness(pieces(a), pieces(b)) >= NEAR for a, b in found)
    assert len(found) >= 0.95 * near and near >= len(queries) * 0.9
    assert found == list(near_duplicates([*queries, *copies]))
