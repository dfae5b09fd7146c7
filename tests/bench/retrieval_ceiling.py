"""The best that a model's own lines could do: for each query, the best subset of its lines.

    python eval.py --model outputs/grpo --retrieval -o results.json
    python -m tests.bench.retrieval_ceiling results.json [--collection FOLDER] [--embedder NAME]

The judgements choose the subset, so no model can reach this figure; it tells what to blame. A high
ceiling: the lines are good, and wrong ones spoil them. A low one: the lines find nothing.
"""

import argparse
import json
from itertools import chain, combinations
from pathlib import Path

from expander.retrieval.evaluate import VAULT, prepare
from expander.retrieval.index import searched_lines
from expander.retrieval.measure import DECIDING, Judge
from expander.statistics import mean

MOST = 8  # lines of an expansion: 256 subsets


def subsets(lines: list) -> list[tuple]:
    return list(chain.from_iterable(combinations(lines, n) for n in range(len(lines) + 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--collection", default=str(VAULT))
    parser.add_argument("--embedder", default="wordllama")
    arguments = parser.parse_args()
    [task] = prepare([arguments.collection], arguments.embedder)
    record = json.loads(arguments.results.read_text(encoding="utf-8"))
    scorer, rows = Judge(task.collection), []
    for row in record["retrieval"][task.collection.name]["per_query"]:
        lines = searched_lines(row["query"], row["expansions"][0])[:MOST]
        found = [
            scorer.scores({row["id"]: task.searcher.search(row["query"], chosen)})[row["id"]]
            for chosen in subsets(lines)
        ]
        figures = [scores[DECIDING] for scores in found]
        rows.append((figures[0], figures[-1], max(figures)))
    for name, figures in zip(
        ("bare", "all lines", "best subset"), zip(*rows, strict=True), strict=True
    ):
        print(f"{name:12} {mean(figures):.3f}")


if __name__ == "__main__":
    main()
