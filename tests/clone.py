"""A copy of the project, as a user has it after `git clone`, with few evaluation queries."""

import json
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("configs", "data", "dataset", "evals", "examples", "expander", "jobs")
QUERIES, VAULT_QUERIES = 12, 6


def make_clone(folder: Path) -> Path:
    """Copy the commands to a new folder; the evaluation keeps its first queries only."""
    folder.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", "train.jsonl", "val.jsonl", "card.json")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, folder)
    queries = folder / "evals" / "queries.txt"
    lines = queries.read_text(encoding="utf-8").splitlines(keepends=True)
    ends = [number for number, line in enumerate(lines, 1) if line.strip() and line[0] != "#"]
    queries.write_text("".join(lines[: ends[QUERIES - 1]]), encoding="utf-8")
    vault = folder / "evals" / "vault" / "queries.jsonl"
    rows = vault.read_text(encoding="utf-8").splitlines(keepends=True)[:VAULT_QUERIES]
    vault.write_text("".join(rows), encoding="utf-8")
    judged = {json.loads(row)["id"] for row in rows}
    qrels = vault.with_name("qrels.tsv")
    kept = [
        x for x in qrels.read_text(encoding="utf-8").splitlines(True) if x.split("\t")[0] in judged
    ]
    qrels.write_text("".join(kept), encoding="utf-8")
    return folder
