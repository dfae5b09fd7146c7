"""The rows of a data set as a collection: each row's passage answers its query, and distracts from
every other. Nobody has to label anything."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from expander.retrieval.collection import Document
from expander.retrieval.index import FullTextIndex, fts_query
from expander.rows import Example


def passage_of(example: Example) -> str | None:
    """The text that answers a row's query: its passage, or else its hyde line."""
    hyde = (text for kind, text in example.lines if kind == "hyde")
    return example.passage or next(hyde, None)


def passages(examples: Iterable[Example]) -> tuple[list[Document], dict[str, dict[str, int]]]:
    """The passages of rows as documents, and each row's query with the grade of its own.

    Rows with the same passage share a document. Left out: rows without a passage, and /only:
    queries, which nobody types into a search.
    """
    ids: dict[str, str] = {}
    grades: dict[str, dict[str, int]] = {}
    for example in examples:
        text = passage_of(example)
        if text is None or example.is_only:
            continue
        document = ids.setdefault(text, str(len(ids)))
        grades.setdefault(example.query, {})[document] = 1
    return [Document(name, "", text) for text, name in ids.items()], grades


def matches(line: str, index: FullTextIndex) -> set[str]:
    """The ids of all documents that a lex line matches."""
    expression = fts_query(line)
    everything = -1  # SQLite's LIMIT
    return {name for name, _ in index.search(expression, everything)} if expression else set()


@dataclass(frozen=True)
class LexHits:
    """Of the lex lines in rows with a passage: how many match that passage, and how many any row's."""

    lines: int = 0
    own: int = 0
    any: int = 0

    def __add__(self, other: "LexHits") -> "LexHits":
        return LexHits(self.lines + other.lines, self.own + other.own, self.any + other.any)


def lex_hits(examples: Sequence[Example]) -> list[LexHits]:
    """The hits of each row's lex lines.

    >>> row = Example("boiler service", (("hyde", "The boiler is due."), ("lex", "boiler due")))
    >>> lex_hits([row, Example("x", (("hyde", "Y."), ("lex", "due boiler"), ("lex", "z")))])
    [LexHits(lines=1, own=1, any=1), LexHits(lines=2, own=0, any=1)]
    """
    texts = [passage_of(example) for example in examples]
    index = FullTextIndex(Document(str(n), "", text) for n, text in enumerate(texts) if text)
    found = []
    for number, example in enumerate(examples):
        lex = [text for kind, text in example.lines if kind == "lex"] if texts[number] else []
        hits = [matches(line, index) for line in lex]
        found.append(LexHits(len(lex), sum(str(number) in x for x in hits), sum(map(bool, hits))))
    return found
