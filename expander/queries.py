"""Queries: when two are the same, the evaluation list, and digests of those trained on."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from expander.files import write_json

# "/only:lex" is QMD's form; "only: lex" stands in older rows.
ONLY_SUFFIX = re.compile(r"\s+/?only:\s*(?:lex|vec|hyde)\s*$", re.IGNORECASE)


# What no row may ask, or nearly.
EVALUATION_QUERIES = Path(__file__).parents[1] / "evals" / "queries.txt"


# In an adapter folder: which queries it was trained on, without telling them.
QUERY_DIGESTS = "queries.json"


def normal_query(query: str) -> str:
    """The form under which two queries count as the same one."""
    return " ".join(query.lower().split())


def base_query(query: str) -> str:
    """The normal form without an /only: suffix: variants of one query share it."""
    return ONLY_SUFFIX.sub("", normal_query(query))


def read_queries(path: Path) -> list[tuple[str, str | None]]:
    """(query, category) of each query of a text file, once: "# name" opens a category, any other
    "#" line is a comment.
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
        raise ValueError(f"--queries {path}: there is no query in it; write one a line")
    return list(queries.items())


def query_digest(query: str) -> str:
    """The first 16 hex digits of the SHA-256 of the query as `base_query` has it: /only: variants share it."""
    return hashlib.sha256(base_query(query).encode()).hexdigest()[:16]


def write_query_digests(folder: Path, queries: Iterable[str]) -> None:
    """Record in an adapter's folder what it was trained on, so that an evaluation can tell."""
    digests = sorted(set(map(query_digest, queries)))
    write_json(folder / QUERY_DIGESTS, {"schema": 1, "sha256": digests})


def read_query_digests(folder: Path) -> frozenset[str] | None:
    """The digests recorded in an adapter's folder; None when it has no record.

    Raises:
        DataError: there is one, and it cannot be understood.
    """
    path = folder / QUERY_DIGESTS
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] != 1:
            raise ValueError(f"schema {record['schema']!r} is unknown")
        return frozenset(record["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a record of training queries: {error}") from None
