"""One line for each results file of eval.py: `python -m examples.demo_table base.json SFT.json`."""

import json
import sys
from pathlib import Path

from expander.text import table


def row(path: Path) -> tuple[str, ...]:
    summary = json.loads(path.read_text(encoding="utf-8"))["summary"]
    unseen = summary["unseen"]
    low, high = unseen["interval"]
    return (
        path.stem,
        f"{unseen['average']:.1f} %",
        f"{low:.1f} to {high:.1f}",
        f"{summary['ratings']['Excellent']}",
        f"{summary['ratings']['Failed']}",
        f"{summary['qmd']['kept']:.1f}",
        f"{summary['shares']['truncated']:.0%}",
    )


def main() -> None:
    paths = [Path(name) for name in sys.argv[1:]]
    if not paths:
        sys.exit("usage: python -m examples.demo_table RESULTS.json …")
    head = ("unseen queries", "average", "95 % interval", "excellent", "failed", "kept", "cut off")
    print(table([head, *map(row, paths)]))


if __name__ == "__main__":
    main()
