"""Word overlap with reference expansions: the options of the original's eval_retrieval.py.

Despite that name it retrieves nothing; `eval.py --retrieval` does.
"""

import argparse

from expander import cli

# Minimum Jaccard index at which a line matches a reference line.
THRESHOLDS = {"lex": 0.5, "vec": 0.35, "hyde": 0.25}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --golden and its options."""
    group = parser.add_argument_group(
        "word overlap with reference expansions",
        "precision, recall and F1 of the lines by type, as in the original's eval_retrieval.py; "
        "it searches nothing (--retrieval does)",
    )
    add, share = group.add_argument, cli.number_up_to(1.0, "a number from 0 to 1")
    golden_help = "reference expansions, in any row format; without --queries, of their queries"
    add("--golden", type=cli.path, metavar="FILE", help=golden_help)
    kinds = ", ".join(f"{kind} {x:g}" for kind, x in THRESHOLDS.items())
    add(
        "--threshold",
        type=share,
        metavar="X",
        help="minimum word overlap (Jaccard index) of lines that match, for every type",
    )
    add("--type-thresholds", action="store_true", help=f"the default: {kinds}")
    sample_help = "use N of the reference rows, drawn by --seed (default: 0, all)"
    add("--sample", type=cli.integer_from(0), default=0, metavar="N", help=sample_help)
    add("--show-mismatches", action="store_true", help="print lines without a match")
    add(
        "--fail-under-f1", type=share, metavar="X", help="exit with 1 if F1 of all lines is below X"
    )


def thresholds(args: argparse.Namespace) -> dict[str, float]:
    """The minimum overlap by type. --threshold overrides --type-thresholds, as in the original."""
    return THRESHOLDS if args.threshold is None else dict.fromkeys(THRESHOLDS, args.threshold)


def unused(args: argparse.Namespace) -> list[str]:
    """The given options that need --golden, which is missing."""
    given = {
        "--threshold": args.threshold is not None,
        "--type-thresholds": args.type_thresholds,
        "--sample": args.sample > 0,
        "--show-mismatches": args.show_mismatches,
        "--fail-under-f1": args.fail_under_f1 is not None,
    }
    return [] if args.golden else [name for name, is_given in given.items() if is_given]
