"""Similarity of texts: near copies of a few queries, near duplicates among many, and template
sentences, which differ only in the words of their query."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from zlib import crc32

import numpy as np

from expander.queries import base_query

# Minimum share of common character pairs for two queries to count as near copies.
NEAR = 0.75
# MinHash: 12 bands of 3 hashes find 95 % of the pairs with similarity 0.75 and 99.8 % at 0.85.
BANDS, BAND_HASHES = 12, 3
WORD = re.compile(r"\w+(?:['’]\w+)*")
SLOT = "…"


def plain(query: str) -> str:
    """The query without case, accents, punctuation and /only: suffix, its words sorted.

    >>> plain("Résumé: the PDF? /only:lex")
    'pdf resume the'
    """
    text = unicodedata.normalize("NFKD", base_query(query))
    text = "".join(char for char in text if not unicodedata.combining(char))
    return " ".join(sorted(re.findall(r"\w+", text.casefold())))


def pieces(query: str) -> Counter[str]:
    """The pairs of adjacent characters in the plain query, with their counts."""
    text = plain(query)
    return Counter(text[i : i + 2] for i in range(len(text) - 1)) or Counter([text])


def nearness(a: Counter[str], b: Counter[str]) -> float:
    """Dice's coefficient of two multisets: 1 if they are equal, 0 if they have nothing in common."""
    return 2 * (a & b).total() / (a.total() + b.total())


def near_copies(queries: Sequence[str], rows: Iterable[str]) -> list[tuple[str, str]]:
    """Find rows that equal a query apart from case, word order, suffix or small edits.

    Exact, and fast for a few queries against any number of rows.

    Returns:
        (query, row) pairs.
    """
    bags = [pieces(query) for query in queries]
    sizes = [bag.total() for bag in bags]
    holders: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for index, bag in enumerate(bags):
        for piece, count in bag.items():
            holders[piece].append((index, count))
    found = []
    for row in dict.fromkeys(rows):
        bag = pieces(row)
        size, shared = bag.total(), [0] * len(bags)
        for piece, count in bag.items():
            for index, other in holders.get(piece, ()):
                shared[index] += count if count < other else other
        for index, agreeing in enumerate(shared):
            if 2 * agreeing >= NEAR * (size + sizes[index]):
                found.append((queries[index], row))
    return found


def near_duplicates(queries: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Find near copies among many queries, each with one earlier query.

    MinHash (Broder 1997) proposes earlier queries and `nearness` decides. Time and memory grow
    with the number of queries, not of pairs; a few pairs are missed.

    Yields:
        (earlier query, later query) pairs.
    """
    rng = np.random.default_rng(0)
    factors, offsets = rng.integers(1, 2**63, size=(2, BANDS * BAND_HASHES), dtype=np.uint64)
    factors |= np.uint64(1)
    firsts: list[dict[bytes, tuple[str, Counter]]] = [{} for _ in range(BANDS)]
    for query in queries:
        bag = pieces(query)
        hashes = np.array([crc32(piece.encode()) for piece in bag], dtype=np.uint64)
        minima = (hashes[:, None] * factors + offsets).min(axis=0)  # (BANDS * BAND_HASHES,)
        keys = [band.tobytes() for band in minima.reshape(BANDS, BAND_HASHES)]
        proposed = {
            id(first): first for at, key in zip(firsts, keys, strict=True) if (first := at.get(key))
        }
        near = [other for other, theirs in proposed.values() if nearness(bag, theirs) >= NEAR]
        if near:
            yield near[0], query
        else:
            this = (query, bag)
            for at, key in zip(firsts, keys, strict=True):
                at.setdefault(key, this)


def template_of(text: str, query: str) -> str:
    """The text in lower case, with a slot for each run of numbers and words of the query.

    >>> template_of("This overview of Jazz history covers 3 key styles.", "jazz history")
    'this overview of … covers … key styles'
    """
    asked = set(map(str.lower, WORD.findall(query)))
    words = []
    for word in map(str.lower, WORD.findall(text)):
        if word in asked or word.isdigit():
            if words[-1:] != [SLOT]:
                words.append(SLOT)
        else:
            words.append(word)
    return " ".join(words)
