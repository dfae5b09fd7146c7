"""When two texts say the same: near copies of a few queries, near-duplicates among many, and
sentences that only the words of their queries vary."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from zlib import crc32

from expander.queries import base_query

# In how many two-letter pieces two queries must agree, at least, to count as near copies.
NEAR = 0.75
# MinHash: 12 bands of 3 propose 95 % of the pairs at 0.75, and 99.8 % of those at 0.85.
BANDS, BAND_HASHES = 12, 3
WORD = re.compile(r"\w+(?:['’]\w+)*")
SLOT = "…"


def plain(query: str) -> str:
    """Without case, accents, punctuation, /only: suffix, and with the words in order.

    >>> plain("Résumé: the PDF? /only:lex")
    'pdf resume the'
    """
    text = unicodedata.normalize("NFKD", base_query(query))
    text = "".join(char for char in text if not unicodedata.combining(char))
    return " ".join(sorted(re.findall(r"\w+", text.casefold())))


def pieces(query: str) -> Counter[str]:
    """The pairs of neighbouring characters of the plain query."""
    text = plain(query)
    return Counter(text[i : i + 2] for i in range(len(text) - 1)) or Counter([text])


def nearness(a: Counter[str], b: Counter[str]) -> float:
    """Dice's coefficient of two bags of pieces: 1 for the same, 0 for nothing in common."""
    return 2 * (a & b).total() / (a.total() + b.total())


def near_copies(queries: Sequence[str], rows: Iterable[str]) -> list[tuple[str, str]]:
    """The (query, row) pairs that are the same but for case, order, suffix or small edits.

    Exact, and fast for a few queries against any number of rows.
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
    """(earlier, later) pairs of near copies among many queries, each later one once.

    MinHash (Broder 1997) proposes earlier queries, `nearness` decides: time and memory grow with
    the number of queries and not with that of the pairs, and a few pairs are missed.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    factors, offsets = rng.integers(1, 2**63, size=(2, BANDS * BAND_HASHES), dtype=np.uint64)
    factors |= np.uint64(1)
    firsts: list[dict[bytes, tuple[str, Counter]]] = [{} for _ in range(BANDS)]
    for query in queries:
        bag = pieces(query)
        hashes = np.array([crc32(piece.encode()) for piece in bag], dtype=np.uint64)
        least = (hashes[:, None] * factors + offsets).min(axis=0)  # (BANDS * BAND_HASHES,)
        keys = [band.tobytes() for band in least.reshape(BANDS, BAND_HASHES)]
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
    """The text in lower case, with each run of the query's words and of numbers as one slot.

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
