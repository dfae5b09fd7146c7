"""Our full-text hits next to those of QMD's own code, on a QMD bench fixture and its notes.

    npm install --prefix DIR @tobilu/qmd@2.8.3 better-sqlite3@12
    python -m tests.bench.qmd_hits --qmd DIR

QMD indexes the notes in a temporary folder. Compared are the 20 hits of each query, in their order.
"""

import argparse
import json
import subprocess
from pathlib import Path

from expander.retrieval.collection import read_collection
from expander.retrieval.evaluate import VAULT
from expander.retrieval.index import Searcher

SCRIPT = Path(__file__).with_suffix(".mjs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qmd", type=Path, required=True, help="where npm installed QMD")
    parser.add_argument("--vault", type=Path, default=VAULT, help="notes/ and bench.json")
    arguments = parser.parse_args()
    notes, fixture = arguments.vault / "notes", arguments.vault / "bench.json"
    done = subprocess.run(
        ["node", SCRIPT, arguments.qmd, notes, fixture], capture_output=True, text=True, check=True
    )
    theirs: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    collection = read_collection(f"{notes}#{fixture}")
    searcher = Searcher(collection.documents)
    queries = {q["id"]: q["query"] for q in json.loads(fixture.read_text())["queries"]}
    same = 0
    for name, hits in theirs.items():
        ours = [document for document, _ in searcher.hits(queries[name])]
        hits = [hit.removeprefix("vault/") for hit in hits]
        same += ours == hits
        if ours != hits:
            print(f"{name} {queries[name]!r}\n  QMD  {hits}\n  ours {ours}")
    found = sum(map(bool, theirs.values()))
    print(f"{same} of {len(theirs)} hit lists are equal; {found} of them are not empty")


if __name__ == "__main__":
    main()
