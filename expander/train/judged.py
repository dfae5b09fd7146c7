"""Judged queries to train on: what a completion's search finds, compared with the bare query's.

The judgements come from collections (`grpo.retrieval.collections`) or from the rows' own passages.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from expander.config import Config
from expander.qmd import kept_lines
from expander.retrieval.collection import Document, read_collection
from expander.retrieval.embed import embed_documents, read_embedder
from expander.retrieval.index import CANDIDATES, Searcher, searched_lines
from expander.retrieval.passages import passages
from expander.rows import Example, Rows, sample_examples, split_examples
from expander.train.inputs import read_rows

Lines = Sequence[tuple[str, str]]
TOP = 10  # ranks that a user looks at


def ndcg(ranking: Sequence[str], grades: Mapping[str, int], depth: int) -> float:
    """nDCG at `depth`, with trec_eval's linear gain; `grades` must hold one over 0.

    >>> round(ndcg(["x", "a"], {"a": 1}, 10), 3)
    0.631
    """
    found = sum(
        max(grades.get(document, 0), 0) / math.log2(rank + 1)
        for rank, document in enumerate(ranking[:depth], 1)
    )
    ideal = sorted((grade for grade in grades.values() if grade > 0), reverse=True)[:depth]
    return found / sum(grade / math.log2(rank + 1) for rank, grade in enumerate(ideal, 1))


def by_rank(ranking: Sequence[str], grades: Mapping[str, int]) -> float:
    """Half nDCG@10, half nDCG at the depth that QMD's reranker sees, so that every rank counts."""
    return (ndcg(ranking, grades, TOP) + ndcg(ranking, grades, CANDIDATES)) / 2


def by_hit(ranking: Sequence[str], grades: Mapping[str, int]) -> float:
    """1 if one of the first ten documents is relevant."""
    return float(any(grades.get(document, 0) > 0 for document in ranking[:TOP]))


VALUES: dict[str, Callable[[Sequence[str], Mapping[str, int]], float]] = {
    "rank": by_rank,
    "hit": by_hit,
}


@dataclass(frozen=True)
class Judged:
    """A query's judgements, and the index of the collection that they are about."""

    searcher: Searcher
    grades: dict[str, int]  # document id → grade; at least one is over 0
    judged_only: bool  # leave unjudged documents out of rankings


@dataclass(frozen=True)
class Finding:
    """What a completion's search finds."""

    gain: float  # over the bare query, -1 to 1
    lex_without_hit: float  # share of the lex lines that match no document


class Judge:
    """Values the searches of completions; every line is searched once and remembered.

    Args:
        value: a key of VALUES.
        full_text: weight, from 0 to 1, of the same search without vectors. Vectors find most passages
            by themselves, and then no lex line could gain anything.
    """

    def __init__(self, value: str, full_text: float):
        self._value, self._full_text = VALUES[value], full_text
        self._judged: dict[str, Judged] = {}
        self._bare: dict[str, float] = {}

    def __contains__(self, query: str) -> bool:
        return query in self._judged

    def add(
        self, query: str, searcher: Searcher, grades: dict[str, int], judged_only: bool = False
    ) -> None:
        """Judge a query; the first collection that has it counts."""
        if query not in self._judged:
            judged = Judged(searcher, grades, judged_only)
            self._judged[query] = judged
            self._bare[query] = self.value(query)

    def value(self, query: str, lines: Lines = ()) -> float:
        """The value of a query's ranking with these lines, from 0 to 1."""
        judged = self._judged[query]

        def rate(full_text_only: bool) -> float:
            ranking = judged.searcher.search(query, lines, full_text_only)
            if judged.judged_only:
                ranking = [document for document in ranking if document in judged.grades]
            return self._value(ranking, judged.grades)

        if not self._full_text:
            return rate(False)
        return (1 - self._full_text) * rate(False) + self._full_text * rate(True)

    def bare(self) -> float:
        """The mean value of the bare queries."""
        return sum(self._bare.values()) / max(len(self._bare), 1)

    def prepare(self, completions: Iterable[tuple[str, str]]) -> None:
        """Embed the lines of (query, completion) pairs in one go."""
        texts: dict[Searcher, list[str]] = {}
        for query, text in completions:
            semantic = [line for kind, line in searched_lines(query, text) if kind != "lex"]
            texts.setdefault(self._judged[query].searcher, []).extend(semantic)
        for searcher, lines in texts.items():
            searcher.prepare(lines)

    def find(self, query: str, text: str) -> Finding:
        """Search with a raw completion."""
        lines = searched_lines(query, text)
        lex = [line for kind, line in lines if kind == "lex"]
        missed = sum(not self._judged[query].searcher.hits(line) for line in lex)
        gain = self.value(query, lines) - self._bare[query]
        return Finding(gain, missed / max(len(lex), 1))

    def contributions(self, query: str, text: str) -> list[float]:
        """How much of a raw completion's value would be lost without each of its raw lines; 0 for
        lines that QMD does not search with."""
        lines = searched_lines(query, text)
        whole = self.value(query, lines)
        lost = []
        for raw in text.split("\n"):
            at = [lines.index(line) for line in kept_lines(query, raw) if line in lines]
            without = [line for index, line in enumerate(lines) if index not in at]
            lost.append(whole - self.value(query, without) if at else 0.0)
        return lost


def judged_rows(config: Config) -> tuple[Rows, Judge]:
    """The rows whose queries are judged, and their judge; prints what was left out.

    Raises:
        ValueError: a collection or the embedder cannot be used, or no query is left.
    """
    settings = config.grpo.retrieval
    embedder = read_embedder(settings.embedder)
    judge = Judge(settings.value, settings.full_text)
    skipped = unjudged = documents = 0

    def judge_queries(
        found: Sequence[Document], grades: Mapping[str, dict[str, int]], judged_only: bool = False
    ) -> None:
        nonlocal skipped, documents
        documents += len(found)
        vectors = embed_documents(found, embedder) if embedder else None
        searcher = Searcher(found, vectors)
        searcher.prepare(grades)
        for query, own in grades.items():
            if searcher.skips_expansion(query):
                skipped += 1
            else:
                judge.add(query, searcher, own, judged_only)

    if settings.collections:
        queries: list[str] = []
        for source in settings.collections:
            collection = read_collection(source, split="train")
            judged = {collection.queries[name]: own for name, own in collection.qrels.items()}
            unjudged += len(collection.queries) - len(judged)
            judge_queries(collection.documents, judged, collection.judged_only)
            queries += judged
        examples = [Example(query, ()) for query in dict.fromkeys(queries)]
        rows = Rows(*split_examples(examples, config.dataset.eval_split, config.training.seed))
        rows.train = sample_examples(rows.train, config.dataset.max_samples, config.training.seed)
    else:
        rows = read_rows(config)
        found, grades = passages(rows.train + rows.validation)
        unjudged = len(rows.train) + len(rows.validation) - len(grades)
        if found:
            judge_queries(found, grades)
    rows.train = [example for example in rows.train if example.query in judge]
    rows.validation = [example for example in rows.validation if example.query in judge]
    if not rows.train:
        raise ValueError(
            "grpo.reward retrieval: no query is left to train on; a row needs a passage or a hyde "
            "line, or name judged collections in grpo.retrieval.collections"
        )
    print(
        f"retrieval: {documents} documents, vectors by {settings.embedder}; {len(rows.train)} "
        f"queries to train on, {len(rows.validation)} held out, worth {judge.bare():.3f} without "
        f"expansion; left out: {unjudged} without a judged document, {skipped} that QMD would not "
        "expand"
    )
    return rows, judge
