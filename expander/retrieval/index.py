"""QMD's search, to the digit: full text, vectors, and their fusion, without the reranker.

Read from QMD 2.8.3 (`buildFTS5Query`, `searchFTS`, `hybridQuery` and `reciprocalRankFusion` in its
dist/store.js). The index lives in memory; nothing is written.
"""

import re
import sqlite3
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from expander.qmd import JS_WHITESPACE, kept_lines
from expander.retrieval.collection import Document

if TYPE_CHECKING:
    from expander.retrieval.embed import VectorIndex

HITS = 20  # documents per list
CANDIDATES = 40  # fused documents that QMD hands to its reranker
RANK_CONSTANT = 60
ORIGINAL_WEIGHT, EXPANSION_WEIGHT = 2.0, 1.0
FIRST_BONUS, SECOND_BONUS = 0.05, 0.02  # best rank 1; best rank 2 or 3
STRONG_SCORE, STRONG_GAP = 0.85, 0.15

# Unicode's Script property (17.0, as in Node 20): Han, Hiragana, Katakana and Hangul.
CJK = (
    "\u1100-\u11ff\u2e80-\u2e99\u2e9b-\u2ef3\u2f00-\u2fd5\u3005\u3007\u3021-\u3029\u302e\u302f"
    "\u3038-\u303b\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fd-\u30ff\u3131-\u318e\u31f0-\u321e"
    "\u3260-\u327e\u32d0-\u32fe\u3300-\u3357\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97c\uac00-\ud7a3"
    "\ud7b0-\ud7c6\ud7cb-\ud7fb\uf900-\ufa6d\ufa70-\ufad9\uff66-\uff6f\uff71-\uff9d\uffa0-\uffbe"
    "\uffc2-\uffc7\uffca-\uffcf\uffd2-\uffd7\uffda-\uffdc\U00016fe2\U00016fe3"
    "\U00016ff0-\U00016ff6\U0001aff0-\U0001aff3\U0001aff5-\U0001affb\U0001affd\U0001affe"
    "\U0001b000-\U0001b122\U0001b132\U0001b150-\U0001b152\U0001b155\U0001b164-\U0001b167"
    "\U0001f200\U00020000-\U0002a6df\U0002a700-\U0002b81d\U0002b820-\U0002cead"
    "\U0002ceb0-\U0002ebe0\U0002ebf0-\U0002ee5d\U0002f800-\U0002fa1d\U00030000-\U0003134a"
    "\U00031350-\U00033479"
)
CJK_RUN = re.compile(f"[{CJK}]+")
WORD = (
    rf"(?:[^\W_]|[{CJK}])"  # JavaScript's [\p{{L}}\p{{N}}]; Python's \w may be of an older Unicode
)
DROPPED = re.compile(rf"(?:(?![{CJK}'])\W)+")
HYPHENATED = re.compile(rf"(?={WORD})(?:{WORD}|['-])*-{WORD}(?:{WORD}|['-])*")
DOTTED = re.compile(rf"(?:{WORD}|_)+(?:\.(?:{WORD}|_)+)+")
SPACES = re.compile(f"[{JS_WHITESPACE}]+")
# A phrase in quotes (the closing one may be missing) or a term, either negated by a hyphen.
TOKEN = re.compile(rf'(-?)(?:"([^"]*)"?|([^{JS_WHITESPACE}"]+))')


# Full text: a lex line as an FTS5 expression


def space_cjk(text: str) -> str:
    """Put spaces around and between the CJK characters of a text, as QMD does before indexing.

    >>> space_cjk("Git設定")
    'Git 設 定 '
    """
    return CJK_RUN.sub(lambda run: f" {' '.join(run[0])} ", text)


def _sanitize(term: str) -> str:
    return DROPPED.sub("", term).lower()


def _phrase(text: str) -> str:
    words = []
    for word in SPACES.split(space_cjk(text)):
        words += map(_sanitize, word.split(".") if DOTTED.fullmatch(word) else [word])
    return " ".join(filter(None, words))


def fts_query(line: str) -> str | None:
    """The FTS5 expression that QMD searches with for a lex line or a query; None: no search.

    Terms are ANDed and match as prefixes; phrases in quotes, hyphenated and CJK terms match exactly;
    a leading hyphen negates. Source: `buildFTS5Query` of QMD 2.8.3.

    >>> fts_query('multi-agent "Exact phrase" 3.14 -draft')
    '"multi agent" AND "exact phrase" AND "3"* AND "14"* NOT "draft"*'
    """
    positive, negative = [], []
    for match in TOKEN.finditer(line.strip(JS_WHITESPACE)):
        hyphen, quoted, term = match.groups()
        if quoted is not None:
            parts = [f'"{_phrase(quoted)}"']
        elif HYPHENATED.fullmatch(term):
            parts = [f'"{" ".join(filter(None, map(_sanitize, term.split("-"))))}"']
        elif DOTTED.fullmatch(term):
            parts = [f'"{_sanitize(part)}"*' for part in term.split(".")]
        elif CJK_RUN.search(term):
            parts = [f'"{_phrase(term)}"']
        else:
            parts = [f'"{_sanitize(term)}"*']
        parts = [part for part in parts if part.rstrip("*") != '""']
        if hyphen and parts:
            negative.append(parts[0] if len(parts) == 1 else f"({' AND '.join(parts)})")
        elif not hyphen:
            positive += parts
    if not positive:
        return None
    return " NOT ".join([" AND ".join(positive), *negative])


class FullTextIndex:
    """QMD's FTS5 table of a collection's documents, in memory."""

    def __init__(self, documents: Iterable[Document]):
        self.ids: list[str] = []
        self._database = sqlite3.connect(":memory:")
        # Without a copy of the texts (content=''), which would double the memory; ranks are the same.
        self._database.execute(
            "CREATE VIRTUAL TABLE docs USING fts5"
            "(filepath, title, body, content='', tokenize='porter unicode61')"
        )
        self._database.executemany(
            "INSERT INTO docs (rowid, filepath, title, body) VALUES (?, ?, ?, ?)",
            self._rows(documents),
        )
        self._database.commit()

    def _rows(self, documents: Iterable[Document]):
        for row, document in enumerate(documents):
            self.ids.append(document.id)
            yield row, *map(space_cjk, (document.path, document.title, document.text))

    def search(self, expression: str, limit: int = HITS) -> list[tuple[str, float]]:
        """(document id, score) of an FTS5 expression, best first.

        The score is |bm25| / (1 + |bm25|), from 0 to 1; title counts 4, file path 1.5, text 1.
        """
        found = self._database.execute(
            "SELECT rowid, bm25(docs, 1.5, 4.0, 1.0) AS score FROM docs WHERE docs MATCH ? "
            "ORDER BY score LIMIT ?",
            (expression, limit),
        )
        return [(self.ids[row], abs(score) / (1 + abs(score))) for row, score in found]

    def count(self, expression: str) -> int:
        """The number of documents that match an FTS5 expression."""
        found = self._database.execute(
            "SELECT count(*) FROM docs WHERE docs MATCH ?", (expression,)
        )
        return found.fetchone()[0]


# Fusion


def fuse(lists: Sequence[Sequence[str]], weights: Sequence[float]) -> list[tuple[str, float]]:
    """Reciprocal rank fusion with QMD's bonuses: (document, score), best first.

    A document's score is Σ weight / (60 + rank) over the lists that hold it, with ranks from 1, plus
    0.05 if it is first in any list, or else 0.02 if it is second or third. Equal scores keep the
    order of first appearance. Source: `reciprocalRankFusion` of QMD 2.8.3.

    Raises:
        ValueError: not one weight per list.

    >>> [(document, round(score, 4)) for document, score in fuse([["a", "b"], ["b"]], [2, 1])]
    [('b', 0.0987), ('a', 0.0828)]
    """
    scores: dict[str, float] = {}
    best_rank: dict[str, int] = {}
    for ranking, weight in zip(lists, weights, strict=True):
        for rank, document in enumerate(ranking, 1):
            scores[document] = scores.get(document, 0.0) + weight / (RANK_CONSTANT + rank)
            best_rank[document] = min(rank, best_rank.get(document, rank))
    for document, rank in best_rank.items():
        if rank <= 3:
            scores[document] += FIRST_BONUS if rank == 1 else SECOND_BONUS
    return sorted(scores.items(), key=lambda entry: -entry[1])


def strong_signal(scores: Sequence[float]) -> bool:
    """Whether a query's full-text scores, best first, are so clear that QMD does not expand it."""
    first, second = [*scores, 0.0, 0.0][:2]
    return first >= STRONG_SCORE and first - second >= STRONG_GAP


def searched_lines(query: str, text: str) -> list[tuple[str, str]]:
    """The (type, text) lines of a raw completion that QMD searches with, beside the query itself.

    These are the kept lines that differ from the query. If QMD keeps none, it makes up three lines,
    of which only a hyde line differs from the query.

    >>> searched_lines("auth", "lex: auth\\nvec: how does auth work\\nlex: login")
    [('vec', 'how does auth work')]
    >>> searched_lines("auth", "lex: login")
    [('hyde', 'Information about auth')]
    """
    kept = kept_lines(query, text) or [("hyde", f"Information about {query}")]
    return [(kind, line) for kind, line in kept if line != query]


class Searcher:
    """QMD's hybrid search of one collection; every line is searched once and remembered.

    Args:
        documents: the collection's.
        vectors: None for full text only.
    """

    def __init__(self, documents: Sequence[Document], vectors: "VectorIndex | None" = None):
        self.full_text = FullTextIndex(documents)
        self.vectors = vectors
        self._hits: dict[str | None, list[tuple[str, float]]] = {None: []}
        self._nearest: dict[str, list[str]] = {}

    @property
    def embedder(self) -> str:
        return self.vectors.embedder.name if self.vectors else "none"

    def hits(self, line: str) -> list[tuple[str, float]]:
        """(document id, score) of a query or lex line by full text, best first."""
        expression = fts_query(line)
        if expression not in self._hits:
            self._hits[expression] = self.full_text.search(expression)
        return self._hits[expression]

    def frequency(self, word: str) -> int:
        """The number of documents that a one-word lex line would match."""
        expression = fts_query(word)
        return self.full_text.count(expression) if expression else 0

    def skips_expansion(self, query: str) -> bool:
        return strong_signal([score for _, score in self.hits(query)])

    def prepare(self, texts: Iterable[str]) -> None:
        """Embed queries, vec and hyde lines in one go, which is faster than one at a time."""
        new = [text for text in dict.fromkeys(texts) if text not in self._nearest]
        if self.vectors and new:
            self._nearest.update(zip(new, self.vectors.nearest(new), strict=True))

    def nearest(self, text: str) -> list[str]:
        """Document ids of a query, vec or hyde line by vectors, best first; none without vectors."""
        self.prepare([text])
        return self._nearest.get(text, [])

    def search(
        self, query: str, lines: Sequence[tuple[str, str]] = (), full_text_only: bool = False
    ) -> list[str]:
        """Document ids for a query and its expansion, best first: QMD's candidates for reranking.

        Args:
            lines: (type, text), from `searched_lines`.
            full_text_only: leave the vectors out.
        """
        semantic = [query, *(text for kind, text in lines if kind != "lex")]
        if full_text_only:
            semantic = []
        self.prepare(semantic)
        # In QMD's order, which decides between equal scores.
        lists = [[document for document, _ in self.hits(query)]]
        weights = [ORIGINAL_WEIGHT]
        for kind, text in lines:
            if kind == "lex":
                lists.append([document for document, _ in self.hits(text)])
                weights.append(EXPANSION_WEIGHT)
        lists += [self.nearest(text) for text in semantic]
        weights += [ORIGINAL_WEIGHT, *[EXPANSION_WEIGHT] * (len(semantic) - 1)][: len(semantic)]
        return [document for document, _ in fuse(lists, weights)][:CANDIDATES]
