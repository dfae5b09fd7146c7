"""Queries: when two are the same, the evaluation list, and digests of the training queries."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from expander.files import write_json
from reward import LINE_TYPES

# QMD writes "/only:lex"; older rows have "only: lex".
ONLY_SUFFIX = re.compile(rf"\s+/?only:\s*(?:{'|'.join(LINE_TYPES)})\s*$", re.IGNORECASE)
# Training rows must not contain these queries or near copies of them.
EVALUATION_QUERIES = Path(__file__).parents[1] / "evals" / "queries.txt"
# In an adapter folder: digests of the queries it was trained on, which do not reveal them.
QUERY_DIGESTS = "queries.json"


def normal_query(query: str) -> str:
    """Lower case, single spaces: two queries are the same if these are equal."""
    return " ".join(query.lower().split())


def base_query(query: str) -> str:
    """The normal form without an /only: suffix, shared by the variants of a query."""
    return ONLY_SUFFIX.sub("", normal_query(query))


def read_queries(path: Path) -> list[tuple[str, str | None]]:
    """Read the queries of a text file, one per line, without duplicates.

    "# name" starts a category; other lines that start with "#" are comments.

    Returns:
        (query, category) pairs.

    Raises:
        ValueError: the file cannot be read or contains no queries.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"--queries {path}:{line}: not UTF-8 ({error.reason})") from None
    except OSError as error:
        raise ValueError(f"--queries {path}: cannot be read: {error.strerror}") from None
    queries: dict[str, str | None] = {}
    category = None
    for line in map(str.strip, text.split("\n")):
        if line.startswith("# "):
            category = line[2:].strip()
        elif line and not line.startswith("#"):
            queries.setdefault(line, category)
    if not queries:
        raise ValueError(f"--queries {path}: contains no queries; write one per line")
    return list(queries.items())


def query_digest(query: str) -> str:
    """The first 16 hex digits of the SHA-256 of `base_query`: /only: variants share it."""
    return hashlib.sha256(base_query(query).encode()).hexdigest()[:16]


def write_query_digests(folder: Path, queries: Iterable[str]) -> None:
    """Record the training queries in an adapter folder, so that an evaluation can detect them."""
    digests = sorted(set(map(query_digest, queries)))
    write_json(folder / QUERY_DIGESTS, {"schema": 1, "sha256": digests})


def read_query_digests(folder: Path) -> frozenset[str] | None:
    """Read the digests in an adapter folder; None if it has none.

    Raises:
        ValueError: the file is not a record of this format.
    """
    path = folder / QUERY_DIGESTS
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] != 1:
            raise ValueError(f"unknown schema {record['schema']!r}")
        return frozenset(record["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a record of training queries: {error}") from None
