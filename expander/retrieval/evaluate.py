"""Evaluate a model's expansions on a judged collection: read it, index it, expand, judge."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from expander.cli import tell
from expander.queries import normal_query
from expander.retrieval.collection import Collection, read_collection
from expander.retrieval.embed import embed_documents, read_embedder
from expander.retrieval.index import Searcher
from expander.retrieval.measure import format_retrieval, judge

__all__ = ["VAULT", "Task", "evaluate", "format_retrieval", "look_up", "prepare"]

VAULT = Path(__file__).parents[2] / "evals" / "vault"

# queries → the raw completions of each
Expand = Callable[[Sequence[str]], Sequence[Sequence[str]]]


@dataclass(frozen=True)
class Task:
    """A collection that is ready to be searched, and the ids of the queries to expand."""

    collection: Collection
    searcher: Searcher
    queries: tuple[str, ...]


def prepare(sources: Sequence[str], embedder_name: str, limit: int | None = None) -> list[Task]:
    """Read and index collections, before a model is loaded.

    Args:
        sources: see `read_collection`.
        embedder_name: see `read_embedder`.
        limit: maximum number of queries per collection, evenly spaced.

    Raises:
        ValueError: a collection or the embedder cannot be used, or two collections have one name.
    """
    collections = [read_collection(source) for source in sources]
    names = [collection.name for collection in collections]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"--retrieval: two collections are named {min(twice)}; rename a folder")
    embedder = read_embedder(embedder_name)
    tasks = []
    for collection in collections:
        for warning in collection.warnings:
            tell(f"warning: {collection.name}: {warning}")
        vectors = embed_documents(collection.documents, embedder) if embedder else None
        searcher = Searcher(collection.documents, vectors)
        # QMD does not expand a query whose full-text hits are clear.
        chosen = [
            query
            for query, text in collection.queries.items()
            if query in collection.qrels and not searcher.skips_expansion(text)
        ]
        if limit and limit < len(chosen):
            chosen = [chosen[i * len(chosen) // limit] for i in range(limit)]
        tasks.append(Task(collection, searcher, tuple(chosen)))
    return tasks


def evaluate(task: Task, expand: Expand, seed: int) -> dict:
    """Expand the task's queries and judge the result (see `judge`)."""
    texts = [task.collection.queries[query] for query in task.queries]
    expansions = dict(zip(task.queries, expand(texts), strict=True))
    return judge(task.collection, task.searcher, expansions, seed)


def look_up(expansions: Mapping[str, Sequence[str]]) -> Expand:
    """An `Expand` that answers from expansions by query; a missing one has no completions."""
    known = {normal_query(query): texts for query, texts in expansions.items()}
    return lambda queries: [known.get(normal_query(query), ()) for query in queries]
