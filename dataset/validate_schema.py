"""Report every row that training cannot use, as path:line: reason; exit 1 if there are any.

    python dataset/validate_schema.py                       the rows of data/
    python dataset/validate_schema.py rows.jsonl 'more/*.jsonl'

Every format that train.py reads is valid. A row is bad if it cannot be parsed, or if its expansion
does not have the format that its query asks for. For the quality of valid rows, use score_data.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root

from expander import cli
from expander.prompt import render_lines
from expander.rows import DATA, DataError, file_rows, find_files, parse_row
from reward import score_expansion_detailed


def check(row: object) -> None:
    """Raise ValueError with the reason if training cannot use the row."""
    if isinstance(row, ValueError):
        raise row
    example = parse_row(row)
    score = score_expansion_detailed(example.query, render_lines(example.lines))
    if not score["valid"]:
        raise ValueError(score["deductions"][0])


def main() -> int:
    parser = argparse.ArgumentParser(description="Report every row that training cannot use.")
    parser.add_argument(
        "data", nargs="*", default=[DATA], help=f"files, folders or globs (default: {DATA})"
    )
    args = parser.parse_args()

    good = bad = 0
    for path in find_files(args.data):
        before = good, bad
        for location, row in file_rows(path):
            try:
                check(row)
                good += 1
            except ValueError as error:
                bad += 1
                print(f"{location}: {error}")
        print(f"{path}: {good - before[0]} good rows, {bad - before[1]} bad")
    if not good + bad:
        raise DataError(f"{', '.join(args.data)}: contains no rows")
    print(f"total: {good} good rows, {bad} bad")
    return int(bad > 0)


if __name__ == "__main__":
    cli.run(main)
