"""eval.py --retrieval: the search with and without expansions, from a model or from a file."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny

import eval as command
from expander.retrieval.evaluate import VAULT, look_up, prepare

NOTES = {
    "car/service": "# Car service\nThe garage changed the brake pads and the oil in March.",
    "car/insurance": "# Insurance\nThe policy for the vehicle costs 480 a year.",
    "home/boiler": "# Boiler\nThe heating engineer replaced the pump.",
}
QUERIES = {"q1": "brakes worn", "q2": "vehicle policy price", "q3": "heating broken"}
QRELS = [("q1", "car/service", 2), ("q2", "car/insurance", 2), ("q3", "home/boiler", 2)]


@pytest.fixture
def notes(tmp_path) -> Path:
    """A judged collection of three notes, in the vault's layout."""
    folder = tmp_path / "mine"
    for name, text in NOTES.items():
        path = folder / "notes" / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    rows = [json.dumps({"id": key, "text": text}) for key, text in QUERIES.items()]
    (folder / "queries.jsonl").write_text("\n".join(rows))
    (folder / "qrels.tsv").write_text("".join(f"{q}\t{d}.md\t{g}\n" for q, d, g in QRELS))
    return folder


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of eval.py in this process."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        command.cli.run(command.main)
    return caught.value.code, *capsys.readouterr()


def expansions(tmp_path: Path, lines: dict[str, str]) -> Path:
    path = tmp_path / "expansions.jsonl"
    rows = [json.dumps({"query": query, "expansion": text}) for query, text in lines.items()]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_expansions_of_another_tool_are_judged(notes, tmp_path, monkeypatch, capsys):
    path = expansions(
        tmp_path, {"brakes worn": "lex: brakes oil\n", "heating broken": "vec: boiler heating\n"}
    )
    output = tmp_path / "results.json"
    options = ["--retrieval", notes, "--embedder", "none", "-o", output]
    code, shown, error = run(monkeypatch, capsys, "--score-only", path, *options)
    assert code == 0, error
    found = json.loads(output.read_text())["retrieval"]["mine"]
    assert found["embedder"] == "none"
    # No note has both words of the query; its lex line finds the one about brakes.
    rows = {row["id"]: (row["bare"], row["expanded"]) for row in found["per_query"]}
    assert rows["q1"] == (0.0, 1.0)
    assert found["queries"]["measured"] == 2 and found["queries"]["without_expansion"] == 1
    for system in ("bare", "baseline", "expanded"):
        assert found[system].keys() >= {"ndcg@10", "recall@20", "mrr"}
    assert "mine: 3 documents" in shown and "nDCG@10" in shown and "verdict" in shown


def test_a_model_is_judged_by_what_it_writes_under_qmds_grammar(
    notes, tmp_path, tiny_qwen3, monkeypatch, capsys
):
    base = tiny.end_early(shutil.copytree(tiny_qwen3, tmp_path / "base"))
    output = tmp_path / "results.json"
    short = ["--max-new-tokens", "24", "--max-queries", "2", "--samples", "2"]
    options = ["--retrieval", notes, notes.parent / "mine", *short, "-o", output]
    code, _, error = run(monkeypatch, capsys, "--model", base, *options)
    assert code == 2 and "two collections are named mine" in error
    options.remove(notes.parent / "mine")
    code, shown, error = run(monkeypatch, capsys, "--model", base, *options)
    assert code == 0, error
    record = json.loads(output.read_text())
    found = record["retrieval"]["mine"]
    assert (found["embedder"], found["samples"]) == ("wordllama", 4)
    assert found["worst"]["ndcg@10"] <= found["expanded"]["ndcg@10"]
    assert record["decode"]["mode"] == "greedy" and len(record["results"]) == 2
    assert "worst sample" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--retrieval", "nowhere"], "nowhere: no such file or folder"),
        (["--retrieval", "--embedder", "gpt"], "gpt"),
        (["--retrieval", "--query", "a"], "cannot be used with"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(
    arguments, message, tiny_qwen3, monkeypatch, capsys
):
    code, _, error = run(monkeypatch, capsys, "--model", tiny_qwen3, *arguments)
    assert code == 2 and message in error.splitlines()[-1] and "Traceback" not in error


def test_the_default_collection_is_the_vault():
    [task] = prepare([str(VAULT)], "none")
    assert task.collection.name == "vault" and len(task.queries) >= 150


def test_expansions_are_found_by_query_whatever_its_case_and_spaces():
    assert look_up({"Auth  Config": ["lex: a"]})(["auth config", "other"]) == [["lex: a"], ()]
