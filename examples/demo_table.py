"""Print a table of result files of eval.py: `python -m examples.demo_table base.json SFT.json`."""

import json
import sys
from pathlib import Path

from expander.text import table


def row(path: Path) -> tuple[str, ...]:
    record = json.loads(path.read_text(encoding="utf-8"))
    summary, search = record["summary"], record["retrieval"]["vault"]
    change = search["expanded"]["gain"]["ndcg@10"]
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
        f"{search['bare']['ndcg@10']:.3f} → {search['expanded']['ndcg@10']:.3f}",
        f"{change['interval'][0]:+.3f} to {change['interval'][1]:+.3f}",
    )


def main() -> None:
    paths = [Path(name) for name in sys.argv[1:]]
    if not paths:
        sys.exit("usage: python -m examples.demo_table RESULTS.json …")
    head = (
        "unseen queries",
        "average",
        "95 % interval",
        "excellent",
        "failed",
        "kept",
        "cut off",
        "nDCG@10, vault",
        "95 % interval",
    )
    print(table([head, *map(row, paths)]))


if __name__ == "__main__":
    main()
