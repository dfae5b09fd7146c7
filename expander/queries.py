"""Queries: when two are the same, the evaluation list, and digests of the training queries."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from expander.files import pointer_error, read_json, write_json
from reward import LINE_TYPES

# QMD writes "/only:lex"; older rows have "only: lex".
ONLY_SUFFIX = re.compile(rf"\s+/?only:\s*(?:{'|'.join(LINE_TYPES)})\s*$", re.IGNORECASE)
# Training rows must not contain these queries or near copies of them.
EVALUATION_QUERIES = Path(__file__).parents[1] / "evals" / "queries.txt"
# In an adapter folder: digests of the queries it was trained on, which do not reveal them.
QUERY_DIGESTS = "queries.json"
# Zero-width space, word joiner, byte order mark, soft hyphen and direction marks; and joiners after
# an ASCII character. Elsewhere the joiners matter: Persian words and emoji are written with them.
INVISIBLE = re.compile(
    "[\u00ad\u200b\u200e\u200f\u2060\u202a-\u202e\u2066-\u2069\ufeff]"
    "|(?<![^\x00-\x7f])[\u200c\u200d]"
)
# Not the ASCII controls that count as spaces.
CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f]")
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, or a byte that is not UTF-8


def visible_text(text: str) -> str:
    r"""The text as it looks: without invisible characters, composed (NFC), with single spaces.

    >>> visible_text("cafe\u0301\u200b  menu") == "caf\u00e9 menu"
    True
    """
    return " ".join(unicodedata.normalize("NFC", INVISIBLE.sub("", text)).split())


def check_characters(text: str) -> None:
    """Raise ValueError for characters that no prompt may contain."""
    if SURROGATE.search(text):
        raise ValueError("text contains an unpaired surrogate, which is not valid Unicode")
    if found := CONTROL.search(text):
        raise ValueError(f"text contains the control character U+{ord(found[0]):04X}; remove it")


def checked_query(text: str) -> str:
    """A query with single spaces.

    Raises:
        ValueError: it is empty, or contains characters that no prompt may contain.
    """
    if not visible_text(text):
        raise ValueError(f"the query is {text!r:.60}, which is empty; expected text")
    check_characters(text)
    return " ".join(text.split())


def normal_query(query: str) -> str:
    """The visible text in lower case: two queries are the same if these are equal."""
    return visible_text(query).lower()


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
        raw = path.read_bytes()
        if error := pointer_error(raw):
            raise ValueError(f"--queries {path}: {error}")
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"--queries {path}:{line}: not UTF-8 ({error.reason})") from None
    except OSError as error:
        raise ValueError(f"--queries {path}: cannot be read: {error.strerror}") from None
    queries: dict[str, tuple[str, str | None]] = {}  # by their visible text
    category = None
    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
        if line.startswith("# "):
            category = line[2:].strip()
        elif visible_text(line) and not line.startswith("#"):
            try:
                check_characters(line)
            except ValueError as error:
                raise ValueError(f"--queries {path}:{number}: {error}") from None
            queries.setdefault(visible_text(line), (line, category))
    if not queries:
        raise ValueError(f"--queries {path}: contains no queries; write one per line")
    return list(queries.values())


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
        record = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}: not a record of training queries") from None
    digests = record.get("sha256")
    if record.get("schema") != 1 or not isinstance(digests, list):
        raise ValueError(f"{path}: not a record of training queries with schema 1")
    if not all(isinstance(x, str) for x in digests):
        raise ValueError(f"{path}: not a record of training queries: sha256 holds other values")
    return frozenset(digests)
