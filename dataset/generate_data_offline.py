"""Make rows without a model, from an English data set of questions or titles with passages.

    python dataset/generate_data_offline.py rajpurkar/squad -o data/squad.jsonl --max-rows 500
    python dataset/generate_data_offline.py pages.jsonl --question title --passage text -o rows.jsonl

The query is the title, or the keywords of the question. The hyde line is a sentence of the passage that
states a fact, with the answer if there is one. Lex lines combine keywords of both. Vec lines are the
question and a paraphrase by rule, or other sentences. The result is deterministic.

Rows that score less than --min-score and passages that fit no rule are dropped and counted by reason.
Left out: any understanding of the passage, so read the rows before you train on them.

Name a nested column with a dot (answers.text). Check the licence of a data set yourself.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root

from dataset.gate import MIN_SCORE, Verdict, evaluation_copies
from dataset.rules import make_row
from expander import cli
from expander.files import write_rows
from expander.queries import normal_query
from expander.rows import canonical_row, named_rows

# Column names to try, in this order.
QUESTION = ("question", "query", "title")
PASSAGE = (
    *("context", "passage", "passages.passage_text", "text", "document", "content", "positive"),
    "answer",
)
ANSWER = ("answers.text", "answers", "answer")
SEED = 42  # for the order in which --max-rows takes rows


def value_at(row: dict, column: str) -> object:
    """The value of a column, which may be a path with dots; None if it does not exist."""
    value: object = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def texts(row: dict, column: str) -> list[str]:
    """The texts of a column that has one text or a list of texts."""
    value = value_at(row, column)
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text.strip()]


def source_rows(name: str, split: str, subset: str | None) -> Iterator[dict]:
    """The rows of local files or, if `name` is not a local path, of a Hub data set.

    Raises:
        ValueError: a row that is not an object.
    """
    for location, row in named_rows(name, split, subset):
        if not isinstance(row, dict):
            reason = row if isinstance(row, ValueError) else "not an object"
            raise ValueError(f"{location}: {reason}")
        yield row


def choose_columns(args: argparse.Namespace, row: dict) -> list[str]:
    """The columns of the question, the passage and, if there is one, the answer.

    Raises:
        ValueError: the first row has no text or list of texts in a column.
    """
    chosen: list[str] = []
    for role, guesses in (("question", QUESTION), ("passage", PASSAGE), ("answer", ANSWER)):
        named = getattr(args, role)
        names = [named] if named else [name for name in guesses if name not in chosen]
        usable = [name for name in names if isinstance(value_at(row, name), str | list)]
        if not usable and (named or role != "answer"):
            raise ValueError(
                f"{args.data}: no column for --{role}: tried {names}, found {list(row)}"
            )
        chosen += usable[:1]
    return chosen


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make rows without a model, from questions or titles with passages."
    )
    add = parser.add_argument
    add("data", help="Hub id, .jsonl file, folder or glob")
    add("--split", default="train", help="split of a Hub data set (default: train)")
    add("--subset", help="subset of a Hub data set")
    add(
        "--question",
        metavar="COLUMN",
        help=f"question column (default: the first of {', '.join(QUESTION)})",
    )
    add(
        "--passage",
        metavar="COLUMN",
        help=f"passage column (default: the first of {', '.join(PASSAGE)})",
    )
    add(
        "--answer",
        metavar="COLUMN",
        help=f"answer column (default: the first of {', '.join(ANSWER)}, if any)",
    )
    add(
        "--max-rows",
        type=cli.integer_from(1),
        metavar="N",
        help="make at most N rows, from a random sample",
    )
    add(
        "--min-score",
        type=float,
        metavar="S",
        default=MIN_SCORE,
        help="minimum percentage (default: %(default)s)",
    )
    add(
        "-o",
        "--output",
        type=cli.new_file,
        metavar="FILE",
        required=True,
        help="new file for the rows",
    )
    return parser.parse_args()


@dataclass
class Generation:
    """The rows made so far by normal query, and the reasons for dropping the others."""

    read: int = 0
    columns: list[str] = field(default_factory=list)
    made: dict[str, Verdict] = field(default_factory=dict)
    hyde_lines: set[str] = field(default_factory=set)
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, row: dict, args: argparse.Namespace) -> None:
        """Make one row, or count the reason for dropping it."""
        self.read += 1
        self.columns = self.columns or choose_columns(args, row)
        question, passage, *answers = (texts(row, name) for name in self.columns)
        if not (question and passage and all(answers)):
            self.dropped["no text in a column"] += 1
            return
        answers = answers[0] if answers else []
        verdict = make_row(question[0], "\n".join(passage), answers, args.min_score)
        if verdict.example is None:
            self.dropped[verdict.reason.partition(": ")[0]] += 1
            return
        name, hyde = normal_query(verdict.example.query), verdict.example.lines[0][1]
        if name in self.made or hyde in self.hyde_lines:
            self.dropped["another row has its query or its hyde line"] += 1
            return
        self.made[name] = verdict
        self.hyde_lines.add(hyde)

    def drop_evaluation_queries(self) -> None:
        for copy in evaluation_copies([verdict.example.query for verdict in self.made.values()]):
            del self.made[normal_query(copy)]
            self.dropped["near an evaluation query"] += 1

    def report(self) -> str:
        lines = [f"{self.read} rows read; question, passage, answer: {', '.join(self.columns)}"]
        lines += [f"  {n:>6} dropped: {reason}" for reason, n in self.dropped.most_common()]
        return "\n".join(lines)


def main() -> None:
    args = parse_arguments()
    rows = source_rows(args.data, args.split, args.subset)
    if args.max_rows:
        rows = list(rows)
        random.Random(SEED).shuffle(rows)
    generation = Generation()
    for row in rows:
        generation.add(row, args)
        if len(generation.made) == args.max_rows:
            break
    generation.drop_evaluation_queries()
    made = generation.made.values()
    if not made:
        raise ValueError(
            f"{args.data}: none of {generation.read} rows can be used: {dict(generation.dropped)}"
        )
    write_rows(args.output, (canonical_row(verdict.example) for verdict in made))
    print(generation.report())
    mean = sum(verdict.score for verdict in made) / len(made)
    print(f"{args.output}: {len(made)} rows, mean score {mean:.1f} %")


if __name__ == "__main__":
    cli.run(main)
