"""Write the vault as a fixture for QMD's own benchmark: `bench.json`.

Reads `queries.jsonl` and `qrels.tsv` next to this file and writes the fixture that
`qmd bench` (2.8.3) loads: one entry per query with the notes of grade 1 and 2 as expected
files, the best first. Grade 0 (a judged trap) and unjudged notes are left out: the format has
no place for them, and none for grades.

    python evals/vault/export_bench.py
    qmd collection add evals/vault/notes --name vault && qmd embed
    qmd bench evals/vault/bench.json
"""

import argparse
import json
from pathlib import Path

VAULT = Path(__file__).resolve().parent

# QMD prints `type` and `description` and groups by neither; its types are a closed list.
TYPES = {
    "same": ("exact", "The note uses the query's words"),
    "other": ("semantic", "The note says it in other words"),
}


def read_queries(path: Path) -> list[dict]:
    """Queries in file order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Query id -> note path -> grade."""
    qrels: dict[str, dict[str, int]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        query, note, grade = line.split("\t")
        qrels.setdefault(query, {})[note] = int(grade)
    return qrels


def fixture(queries: list[dict], qrels: dict[str, dict[str, int]]) -> dict:
    """QMD's `BenchmarkFixture`. `expected_in_top_k` is the depth of its precision: 10 here."""
    entries = []
    for query in queries:
        grades = qrels[query["id"]]
        relevant = [note for note, grade in grades.items() if grade >= 1]
        kind, description = TYPES[query["words"]]
        if query.get("misspelt"):
            description += "; misspelt"
        if "lang" in query:
            description += f"; language: {query['lang']}"
        entries.append(
            {
                "id": query["id"],
                "query": query["text"],
                "type": kind,
                "description": description,
                "expected_files": sorted(relevant, key=lambda note: (-grades[note], note)),
                "expected_in_top_k": 10,
            }
        )
    return {
        "description": "Vault: one fictional person's notes, judged queries",
        "version": 1,
        "collection": "vault",
        "queries": entries,
    }


def render(data: dict) -> str:
    """The file's text; the same input gives the same bytes."""
    return json.dumps(data, ensure_ascii=False, indent=2) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Write the vault's queries and judgements as a `qmd bench` fixture."
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=VAULT / "bench.json",
        help="file to write (default: bench.json next to this script)",
    )
    args = parser.parse_args(argv)
    data = fixture(read_queries(VAULT / "queries.jsonl"), read_qrels(VAULT / "qrels.tsv"))
    args.output.write_text(render(data), encoding="utf-8")
    print(f"{args.output}: {len(data['queries'])} queries")


if __name__ == "__main__":
    main()
