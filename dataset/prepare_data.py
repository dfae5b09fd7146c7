"""Rows of any format → data/train/{train,val}.jsonl, without duplicates and evaluation queries.

    python dataset/prepare_data.py                          data/*.jsonl
    python dataset/prepare_data.py rows.jsonl -o data/mine
    python train.py sft --set dataset.name=data/train

The split is the one train.py makes of the same rows, so training on the folder and on what it was
made from is the same. Each row has `messages`, and `text`: the conversation as training sees it.
Left out and named in card.json: rows whose query is in evals/queries.txt, or nearly.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root

from expander import cli
from expander.files import digest, write_json, write_rows
from expander.nearness import near_copies
from expander.prompt import render_lines, render_prompt, render_target, user_message
from expander.queries import EVALUATION_QUERIES, read_queries
from expander.rows import DATA, Example, Rows, labels, load_rows

SPLITS = ("train", "val")


def prepared_row(example: Example) -> dict:
    """What `parse_row` reads back as the same example; the final newline is in both renderings."""
    return {
        "messages": [
            {"role": "user", "content": user_message(example.query)},
            {"role": "assistant", "content": render_lines(example.lines) + "\n"},
        ],
        "text": render_prompt(example.query) + render_target(example.lines),
    } | labels(example)


def without_leaks(rows: Rows, queries: Sequence[str]) -> tuple[dict[str, list[Example]], list]:
    """(examples by split, (query, row's query) pairs of what was left out)."""
    sides = dict(zip(SPLITS, (rows.train, rows.validation), strict=True))
    leaks = near_copies(queries, (e.query for side in sides.values() for e in side))
    leaked = {query for _, query in leaks}
    return {k: [e for e in side if e.query not in leaked] for k, side in sides.items()}, leaks


def tally(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def counts(examples: Sequence[Example]) -> dict:
    return {
        "rows": len(examples),
        "only": sum(e.is_only for e in examples),
        "lines": tally(kind for e in examples for kind, _ in e.lines),
        "categories": tally(e.category or "none" for e in examples),
        "languages": tally(e.language or "none" for e in examples),
        "files": tally(e.source.rpartition(":")[0] for e in examples),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make data/train/{train,val}.jsonl, without duplicates and evaluation queries."
    )
    add = parser.add_argument
    add("data", nargs="*", default=[DATA], help=f"a file, a folder, a quoted glob ({DATA}), a set")
    add("-o", "--output", type=Path, default=Path("data/train"), metavar="DIR")
    add("--eval-split", type=float, default=0.1, metavar="X", help="share held out (default: 0.1)")
    add("--seed", type=int, default=42, metavar="N", help="chooses what is held out (default: 42)")
    add("--queries", type=Path, metavar="FILE", help="kept out (default: evals/queries.txt)")
    args = parser.parse_args()
    if len(args.data) > 1:
        parser.error(f"quote the glob, as train.py takes one name too: '{DATA}'")
    if not 0 <= args.eval_split < 1:
        parser.error("--eval-split is a share from 0 up to, not including, 1")

    queries = [query for query, _ in read_queries(args.queries or EVALUATION_QUERIES)]
    rows = load_rows(args.data[0], eval_split=args.eval_split, seed=args.seed)
    print(f"{args.data[0]}: {rows.summary()}")
    sides, leaks = without_leaks(rows, queries)
    for query, row in leaks:
        print(f"left out: {row!r} is too near the evaluation query {query!r}")
    if not sides["train"]:
        raise ValueError(f"{args.data[0]}: no row is left to train on")

    for name, examples in sides.items():
        write_rows(args.output / f"{name}.jsonl", map(prepared_row, examples))
    card = {
        "data": args.data[0],
        "eval_split": args.eval_split,
        "seed": args.seed,
        "read": rows.read,
        "duplicates": rows.duplicates,
        "leaks": [{"query": query, "row": row} for query, row in leaks],
        "splits": {name: counts(examples) for name, examples in sides.items()},
        "sha256": {name: digest(args.output / f"{name}.jsonl") for name in sides},
    }
    write_json(args.output / "card.json", card)
    told = ", ".join(f"{len(examples)} in {name}.jsonl" for name, examples in sides.items())
    print(f"{args.output}: {told}; counts in card.json")


if __name__ == "__main__":
    cli.run(main)
