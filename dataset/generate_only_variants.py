"""Make `/only:` rows from full rows: the query with the suffix, and only the lines of that type.

    python dataset/generate_only_variants.py data/short.jsonl -o data/only_more.jsonl
    python dataset/generate_only_variants.py --share 0.05 --seed 7 -o more.jsonl

The seed chooses the rows and their type. Queries that already have a variant are skipped, and so are
variants that score under 80: a hyde variant therefore needs a query with a named entity.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root

from dataset.gate import MIN_SCORE
from expander import cli
from expander.files import write_rows
from expander.prompt import TYPES, render_lines
from expander.queries import base_query
from expander.rows import DATA, Example, canonical_row, read_files
from reward import score_expansion_detailed


def variant(example: Example, kind: str) -> Example | None:
    """The row for `/only:kind`; None if it scores under MIN_SCORE."""
    query = f"{example.query} /only:{kind}"
    lines = tuple(line for line in example.lines if line[0] == kind)
    score = score_expansion_detailed(query, render_lines(lines))
    if score["percentage"] < MIN_SCORE:
        return None
    return Example(query, lines, category="only", language=example.language)


def make_variants(examples: Sequence[Example], share: float, seed: int) -> list[Example]:
    """Variants of a `share` of the full rows, at most one per base query."""
    taken = {base_query(e.query) for e in examples if e.is_only}
    full = {base_query(e.query): e for e in examples if base_query(e.query) not in taken}
    rng = random.Random(seed)
    made = []
    for example in rng.sample(list(full.values()), len(full)):
        if len(made) >= round(share * len(full)):
            break
        kinds = rng.sample(TYPES, len(TYPES))
        made += list(filter(None, (variant(example, kind) for kind in kinds)))[:1]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Make /only: rows from full rows.")
    add = parser.add_argument
    add("data", nargs="*", default=[DATA], help=f"files, folders or globs (default: {DATA})")
    add(
        "--share",
        type=float,
        default=0.1,
        metavar="X",
        help="share of the full rows (default: 0.1)",
    )
    add("--seed", type=int, default=42, metavar="N", help="seed for rows and types (default: 42)")
    add(
        "-o",
        "--output",
        type=cli.new_file,
        default="data/qmd_only_variants.jsonl",
        metavar="FILE",
        help="new file for the rows (default: %(default)s)",
    )
    add("--combine", action="store_true", help="one file for all inputs: always the case")
    add("--stats", action="store_true", help="print the number of rows by type: always the case")
    args = parser.parse_args()
    if not 0 < args.share <= 1:
        parser.error("--share must be above 0 and at most 1")

    made = make_variants(read_files(args.data), args.share, args.seed)
    write_rows(args.output, map(canonical_row, made))
    kinds = Counter(example.lines[0][0] for example in made)
    counts = ", ".join(f"{kinds[kind]} {kind}" for kind in TYPES)
    print(f"{args.output}: {len(made)} rows ({counts})")


if __name__ == "__main__":
    cli.run(main)
