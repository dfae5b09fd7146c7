"""Make rows without a model, from a data set of questions or titles with passages, in English.

    python dataset/generate_data_offline.py rajpurkar/squad -o data/squad.jsonl --max-rows 500
    python dataset/generate_data_offline.py pages.jsonl --question title --passage text -o rows.jsonl

The query is the question's keywords, or the title. hyde is a sentence of the passage that names a fact,
the one with the answer where there is one; lex lines join keywords of both; vec lines are the question
and the same put in another way by rule, or else other sentences. Rows that score less than --min-score
are left out, as are those the rules can make nothing of: each reason is counted. The same rows come
out every time. Left out: any understanding of the passage; read what you train on.

A column inside another is named with a dot (answers.text). The licence of a data set is yours to check.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root

from dataset.gate import LEAST, Verdict, evaluation_copies
from dataset.rules import make_row
from expander import cli
from expander.files import write_rows
from expander.queries import normal_query
from expander.rows import canonical_row, named_rows

# Tried in this order when no column is named.
QUESTION = ("question", "query", "title")
PASSAGE = (
    *("context", "passage", "passages.passage_text", "text", "document", "content", "positive"),
    "answer",
)
ANSWER = ("answers.text", "answers", "answer")
SEED = 42  # of the order in which rows are taken for --max-rows


def value_at(row: dict, column: str) -> object:
    """What stands under a column, which may be a path with dots; None when there is none."""
    value: object = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def texts(row: dict, column: str) -> list[str]:
    """The texts under a column that holds one or a list of them."""
    value = value_at(row, column)
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text.strip()]


def source_rows(name: str, split: str, subset: str | None) -> Iterator[dict]:
    """The rows of local files, or else of a Hub data set; the first that is no object ends it."""
    for place, row in named_rows(name, split, subset):
        if not isinstance(row, dict):
            raise ValueError(f"{place}: {row if isinstance(row, ValueError) else 'not an object'}")
        yield row


def choose_columns(args: argparse.Namespace, row: dict) -> list[str]:
    """The columns of question, passage and answer, the answer's only if there is one.

    Raises:
        ValueError: the first row has no text or list of texts there.
    """
    found: list[str] = []
    for what, guesses in (("question", QUESTION), ("passage", PASSAGE), ("answer", ANSWER)):
        named = getattr(args, what)
        names = [named] if named else [name for name in guesses if name not in found]
        there = [name for name in names if isinstance(value_at(row, name), str | list)]
        if not there and (named or what != "answer"):
            raise ValueError(
                f"{args.data}: no column for --{what}: tried {names}, found {list(row)}"
            )
        found += there[:1]
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make rows without a model, from questions or titles with passages."
    )
    add = parser.add_argument
    add("data", help="Hub id, or a .jsonl file, a folder or a glob")
    add("--split", default="train", help="of a Hub data set (default: train)")
    add("--subset", help="of a Hub data set")
    add("--question", metavar="COLUMN", help=f"default: the first of {', '.join(QUESTION)}")
    add("--passage", metavar="COLUMN", help=f"default: the first of {', '.join(PASSAGE)}")
    add("--answer", metavar="COLUMN", help=f"default: the first of {', '.join(ANSWER)}, if any")
    add(
        "--max-rows",
        type=cli.integer_from(1),
        metavar="N",
        help="stop at N rows, from all over the set",
    )
    add(
        "--min-score", type=float, metavar="S", default=LEAST, help="percent (default: %(default)s)"
    )
    add("-o", "--output", type=cli.new_file, metavar="FILE", required=True, help="for the rows")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    rows = source_rows(args.data, args.split, args.subset)
    if args.max_rows:
        rows = list(rows)
        random.Random(SEED).shuffle(rows)
    columns: list[str] = []
    made: dict[str, Verdict] = {}
    used: set[str] = set()
    dropped: Counter[str] = Counter()
    read = 0
    for row in rows:
        read += 1
        columns = columns or choose_columns(args, row)
        question, passage, *answers = (texts(row, name) for name in columns)
        if not (question and passage and all(answers)):
            dropped["no text in a column"] += 1
            continue
        answers = answers[0] if answers else []
        verdict = make_row(question[0], "\n".join(passage), answers, args.min_score)
        if verdict.example is None:
            dropped[verdict.reason.partition(": ")[0]] += 1
            continue
        name, hyde = normal_query(verdict.example.query), verdict.example.lines[0][1]
        if name in made or hyde in used:
            dropped["its query or its hyde sentence is another row's"] += 1
            continue
        made[name] = verdict
        used.add(hyde)
        if len(made) == args.max_rows:
            break
    for copy in evaluation_copies([verdict.example.query for verdict in made.values()]):
        del made[normal_query(copy)]
        dropped["near an evaluation query"] += 1

    if not made:
        raise ValueError(f"{args.data}: none of {read} rows can be used: {dict(dropped)}")
    write_rows(args.output, (canonical_row(verdict.example) for verdict in made.values()))
    print(f"{read} rows read; question, passage, answer: {', '.join(columns)}")
    for reason, count in dropped.most_common():
        print(f"  {count:>6} dropped: {reason}")
    mean = sum(verdict.score for verdict in made.values()) / len(made)
    print(f"{args.output}: {len(made)} rows, mean score {mean:.1f} %")


if __name__ == "__main__":
    cli.run(main)
