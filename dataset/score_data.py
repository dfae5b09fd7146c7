"""Score every row with the rubric of reward.py, and count the lines that QMD would not use.

    python dataset/score_data.py                            the rows of data/
    python dataset/score_data.py rows.jsonl --worst 20

Prints, for each file, the mean and minimum percentage, the rows under 80, the lines that QMD would
drop, and the share of lex lines whose words are all in the row's own passage (or hyde line), and in that
of any row: what matches no passage will hardly find a note. Then a histogram of all rows, and the worst
rows with the reasons for their deductions.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from heapq import nsmallest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root

from dataset.gate import MIN_SCORE
from expander import cli
from expander.eval.measure import measure
from expander.eval.report import format_sample
from expander.prompt import render_lines
from expander.qmd import kept_lines
from expander.queries import base_query
from expander.retrieval.passages import LexHits, lex_hits
from expander.rows import DATA, Example, read_files
from expander.text import printable, table
from reward import score_expansion_detailed

BIN = 5  # percent
BAR = 50  # characters of the longest bar


def score(example: Example) -> tuple[float, int]:
    """(percentage of the rubric, number of lines that QMD would drop)."""
    text = render_lines(example.lines)
    kept = kept_lines(base_query(example.query), text)
    percentage = score_expansion_detailed(example.query, text)["percentage"]
    return percentage, len(example.lines) - len(kept)


def histogram(percentages: Iterable[float]) -> list[str]:
    """A bar per BIN percent, from the lowest value up; 100 is in the last bin.

    >>> histogram([92, 97, 100, 98])[0]
    '   90-95     1  #################'
    """
    counts = Counter(min(int(x // BIN), 100 // BIN - 1) for x in percentages)
    highest = max(counts.values())
    return [
        f"  {i * BIN:>3}-{(i + 1) * BIN:<3} {counts[i]:>4}  {'#' * -(-BAR * counts[i] // highest)}"
        for i in range(min(counts), 100 // BIN)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Score rows with the rubric and QMD's filter.")
    add = parser.add_argument
    add("data", nargs="*", default=[DATA], help=f"files, folders or globs (default: {DATA})")
    add(
        "--worst",
        type=int,
        default=5,
        metavar="N",
        help="number of rows shown in full (default: 5)",
    )
    args = parser.parse_args()

    examples = read_files(args.data)
    scores = [score(example) for example in examples]
    measured = [(*x, hits) for x, hits in zip(scores, lex_hits(examples), strict=True)]
    files: dict[str, list[tuple[float, int, LexHits]]] = {}
    for example, each in zip(examples, measured, strict=True):
        files.setdefault(example.source.rpartition(":")[0], []).append(each)
    rows = [
        ("file", "rows", "mean", "min", f"under {MIN_SCORE}", "QMD drops", "hit own", "hit any")
    ]
    for name, scored in [*files.items(), ("all", measured)]:
        points = [x for x, _, _ in scored]
        hits = sum((x for _, _, x in scored), LexHits())
        rows.append(
            (
                printable(name),
                str(len(points)),
                f"{sum(points) / len(points):.1f} %",
                f"{min(points):.1f} %",
                str(sum(x < MIN_SCORE for x in points)),
                str(sum(dropped for _, dropped, _ in scored)),
                f"{hits.own / max(hits.lines, 1):.0%}",
                f"{hits.any / max(hits.lines, 1):.0%}",
            )
        )
    print(table(rows), "", *histogram(x for x, _ in scores), "", sep="\n")
    for i in nsmallest(args.worst, range(len(scores)), key=lambda i: scores[i][0]):
        example = examples[i]
        print(f"{printable(example.source)}: ", end="")
        print(format_sample(example.query, measure(example.query, render_lines(example.lines))))


if __name__ == "__main__":
    cli.run(main)
