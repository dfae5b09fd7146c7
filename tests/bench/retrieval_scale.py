"""Time and memory of the retrieval measurement as a collection grows.

By hand: python -m tests.bench.retrieval_scale [--documents N [N ...]] [--plot FILE.png]

For each size (default: 2,000, 20,000 and 200,000 documents) a fresh process makes up documents of
60 to 140 words, drawn as words occur in natural text (Zipf), embeds them with wordllama into an empty
cache, indexes them, and judges 200 queries with six lines each. The time to beat is 60 s for index
and queries with 20,000 documents, and a peak under 1 GB. Times are CPU seconds of all threads, which
other work on the machine changes little.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from expander.retrieval.collection import Collection, Document
from expander.retrieval.embed import WordLlama, embed_documents
from expander.retrieval.index import Searcher
from expander.retrieval.measure import judge

SIZES = (2_000, 20_000, 200_000)
VOCABULARY, QUERIES, SEED = 30_000, 200, 42
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "ar", "en", "is")]
LINES = "hyde: {0}\nlex: {1} {2}\nlex: {2} {3}\nvec: how does {1} work with {2}\nvec: {3} and {4}\nvec: {0}"


def made_up(documents: int) -> tuple[Collection, dict[str, list[str]]]:
    """A collection whose queries are words of the one relevant document, and an expansion of each."""
    rng = np.random.default_rng(SEED)
    words = ["".join(rng.choice(SYLLABLES, size=rng.integers(2, 5))) for _ in range(VOCABULARY)]
    frequency = 1 / np.arange(10, VOCABULARY + 10)
    frequency /= frequency.sum()
    texts = [
        [words[i] for i in rng.choice(VOCABULARY, size=rng.integers(60, 140), p=frequency)]
        for _ in range(documents)
    ]
    queries, qrels, expansions = {}, {}, {}
    for number, at in enumerate(rng.choice(documents, size=QUERIES, replace=False)):
        chosen = [str(word) for word in rng.choice(texts[at], size=4)]
        name = f"q{number}"
        queries[name], qrels[name] = " ".join(chosen[:3]), {str(at): 1}
        expansions[name] = [LINES.format(" ".join(texts[at][:15]), *chosen)]
    made = tuple(
        Document(str(number), " ".join(text[:4]), " ".join(text))
        for number, text in enumerate(texts)
    )
    return Collection("made up", made, queries, qrels), expansions


def measure(documents: int) -> dict[str, float]:
    """CPU seconds of each part, and the peak memory of this process in GB."""
    collection, expansions = made_up(documents)
    embedder = WordLlama()
    seconds, start = {}, time.process_time()

    def lap(name: str) -> None:
        nonlocal start
        seconds[name] = time.process_time() - start
        start = time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        vectors = embed_documents(collection.documents, embedder, Path(folder))
        lap("embed")
        embed_documents(collection.documents, embedder, Path(folder))
        lap("embed again")
    searcher = Searcher(collection.documents, vectors)
    lap("index")
    judge(collection, searcher, expansions)
    lap("judge")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return {"documents": documents, **seconds, "peak": peak}


def plot(rows: Sequence[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = [row["documents"] for row in rows]
    for name in ("embed", "embed again", "index", "judge"):
        left.plot(sizes, [row[name] for row in rows], marker="o", label=name)
    left.set(xscale="log", yscale="log", xlabel="documents", ylabel="CPU seconds")
    left.legend(frameon=False)
    right.plot(sizes, [row["peak"] for row in rows], marker="o")
    right.set(xscale="log", yscale="log", xlabel="documents", ylabel="peak memory, GB")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, nargs="+", default=SIZES, metavar="N")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    arguments = parser.parse_args()
    rows = []
    print(f"{QUERIES} queries with 6 lines each; times in CPU seconds")
    print("documents   embed  again  index  judge  index + judge  peak")
    for documents in arguments.documents:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(measure, (documents,))
        rows.append(row)
        print(
            f"{documents:9}  {row['embed']:6.1f}  {row['embed again']:5.1f}  {row['index']:5.1f}  "
            f"{row['judge']:5.1f}  {row['index'] + row['judge']:13.1f}  {row['peak']:.2f} GB",
            flush=True,
        )
    print(json.dumps(rows))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
