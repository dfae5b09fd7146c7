"""Convert rows of any format to data/train/{train,val}.jsonl, without evaluation queries.

    python dataset/prepare_data.py                          data/*.jsonl
    python dataset/prepare_data.py rows.jsonl -o data/mine
    python train.py sft --set dataset.name=data/train

The split is the one that train.py makes, so training on the folder equals training on its source.
Duplicate queries are dropped. Each row has `messages`, and `text`: the conversation as training sees it.
Rows whose query nearly repeats one of evals/queries.txt are left out and listed in card.json.
train_chat.jsonl has only the messages, and dataset_info.json the original's counts.
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
CHAT = "train_chat.jsonl"  # only the messages, as other trainers want them


def prepared_row(example: Example) -> dict:
    """A row that `parse_row` reads back to an equal example; both renderings end with a newline."""
    return {
        "messages": [
            {"role": "user", "content": user_message(example.query)},
            {"role": "assistant", "content": render_lines(example.lines) + "\n"},
        ],
        "text": render_prompt(example.query) + render_target(example.lines),
    } | labels(example)


def without_leaks(rows: Rows, queries: Sequence[str]) -> tuple[dict[str, list[Example]], list]:
    """(examples by split, (evaluation query, row's query) pairs that were left out)."""
    sides = dict(zip(SPLITS, (rows.train, rows.validation), strict=True))
    leaks = near_copies(queries, (e.query for side in sides.values() for e in side))
    leaked = {query for _, query in leaks}
    return {k: [e for e in side if e.query not in leaked] for k, side in sides.items()}, leaks


def tally(values: Iterable[str]) -> dict[str, int]:
    """Counts, most frequent first."""
    return dict(Counter(values).most_common())


def counts(examples: Sequence[Example]) -> dict:
    """What card.json records about a split."""
    return {
        "rows": len(examples),
        "only": sum(e.is_only for e in examples),
        "lines": tally(kind for e in examples for kind, _ in e.lines),
        "categories": tally(e.category or "none" for e in examples),
        "languages": tally(e.language or "none" for e in examples),
        "files": tally(e.source.rpartition(":")[0] for e in examples),
    }


def dataset_info(sides: dict[str, list[Example]]) -> dict:
    """The original's figures about the prepared rows; card.json has more."""
    queries = [example.query for side in sides.values() for example in side]
    short = sum(len(query.split()) <= 2 for query in queries)
    return {
        "dataset_name": "qmd-query-expansion",
        "train_samples": len(sides["train"]),
        "val_samples": len(sides["val"]),
        "short_query_pct": round(100 * short / len(queries), 1),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make data/train/{train,val}.jsonl, without duplicates and evaluation queries."
    )
    add = parser.add_argument
    add(
        "data",
        nargs="*",
        default=[DATA],
        help=f"file, folder, quoted glob or Hub id (default: {DATA})",
    )
    add(
        "-o",
        "--output",
        type=cli.path,
        default=Path("data/train"),
        metavar="DIR",
        help="folder for the result (default: data/train)",
    )
    add(
        "--eval-split",
        "--split",
        type=float,
        default=0.1,
        metavar="X",
        help="share of the rows held out (default: 0.1)",
    )
    add("--seed", type=int, default=42, metavar="N", help="seed for the split (default: 42)")
    add(
        "--queries",
        type=cli.path,
        metavar="FILE",
        help="queries to leave out (default: evals/queries.txt)",
    )
    add("--input", metavar="DATA", help="the same as the first argument")
    args = parser.parse_args()
    if args.input:
        if args.data != [DATA]:
            parser.error("DATA and --input are both given: use one of them")
        args.data = [args.input]
    if len(args.data) > 1:
        parser.error(f"expected one name; quote a glob: '{DATA}'")
    if not 0 <= args.eval_split < 1:
        parser.error("--eval-split must be at least 0 and below 1")
    return args


def main() -> None:
    args = parse_arguments()
    queries = [query for query, _ in read_queries(args.queries or EVALUATION_QUERIES)]
    rows = load_rows(args.data[0], eval_split=args.eval_split, seed=args.seed)
    print(f"{args.data[0]}: {rows.summary()}")
    sides, leaks = without_leaks(rows, queries)
    for query, row in leaks:
        print(f"left out: {row!r} nearly repeats the evaluation query {query!r}")
    if not sides["train"]:
        raise ValueError(f"{args.data[0]}: no row is left to train on")

    for name, examples in sides.items():
        write_rows(args.output / f"{name}.jsonl", map(prepared_row, examples))
    write_rows(
        args.output / CHAT,
        ({"messages": row["messages"]} for row in map(prepared_row, sides["train"])),
    )
    write_json(args.output / "dataset_info.json", dataset_info(sides))
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
    counted = ", ".join(f"{len(examples)} in {name}.jsonl" for name, examples in sides.items())
    print(f"{args.output}: {counted}; counts in card.json")


if __name__ == "__main__":
    cli.run(main)
