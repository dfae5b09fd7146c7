"""dataset/prepare_data.py: the same training rows as from the source, no duplicates or leaks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_rows import FORMATS, jsonl, row

from expander.config import load_config
from expander.prompt import render_prompt, render_target
from expander.train.inputs import read_rows

ROOT = Path(__file__).parents[1]
SPLITS = ("train.jsonl", "val.jsonl")


def trained_on(name: str) -> tuple[list, list]:
    """The training and validation rows of `train.py sft`, without their locations."""
    rows = read_rows(load_config("sft", None, [f"dataset.name={name}"])[0])
    return tuple([replace(e, source="") for e in side] for side in (rows.train, rows.validation))


def test_training_on_the_folder_equals_training_on_its_source(script, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # One row nearly repeats an evaluation query; training does not leave it out, prepare_data does.
    lines = [x for x in rows.read_bytes().splitlines() if b"sourdough starter" not in x]
    labelled = {**row("one"), "category": "short", "intent": "numbers", "language": "en"}
    jsonl(tmp_path / "data" / "a.jsonl", *lines[:10], labelled, row("ONE"), FORMATS["chat"])
    jsonl(tmp_path / "data" / "b.jsonl", *lines[10:], row("two /only:lex"), row("Two"))
    source = trained_on("data/*.jsonl")
    code, out = script("prepare_data")
    assert code == 0 and "24 in train.jsonl, 3 in val.jsonl" in out
    assert trained_on("data/train") == source and len(source[1]) == 3
    assert trained_on("data/*.jsonl") == source  # the glob does not pick up what was written
    before = [(tmp_path / "data/train" / name).read_bytes() for name in (*SPLITS, "card.json")]
    script("prepare_data", "data/*.jsonl")
    assert before == [(tmp_path / "data/train" / n).read_bytes() for n in (*SPLITS, "card.json")]


def test_text_and_messages_are_rendered_as_for_training(script, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", FORMATS["input/output"])
    script("prepare_data", path, "-o", tmp_path / "out", "--eval-split", "0")
    [made] = map(json.loads, (tmp_path / "out" / "train.jsonl").read_text().splitlines())
    lines = (
        ("hyde", "Auth."),
        ("lex", "auth settings"),
        ("vec", "how to configure authentication"),
    )
    assert made["text"] == render_prompt("auth config") + render_target(lines)
    assert made["messages"][0]["content"] == "/no_think Expand this search query: auth config"
    assert made["messages"][1]["content"].endswith("vec: how to configure authentication\n")
    assert (tmp_path / "out" / "val.jsonl").read_text() == ""


def test_near_copies_of_evaluation_queries_are_left_out_and_listed(script, tmp_path):
    leaks = ["NGINX upstream keepalive connection", "wifi password for the cabin? /only:vec"]
    kept = [f"harmless query number {i}" for i in range(20)]
    path = jsonl(tmp_path / "rows.jsonl", *map(row, [*leaks, *kept]))
    _, out = script("prepare_data", path, "-o", tmp_path / "out")
    made = "".join((tmp_path / "out" / name).read_text() for name in SPLITS)
    assert out.count("left out") == 2 and len(made.splitlines()) == 20
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert {leak["row"] for leak in card["leaks"]} == set(leaks)
    assert all(leak not in made for leak in leaks)
    assert card["splits"]["train"]["rows"] + card["splits"]["val"]["rows"] == 20


def test_nothing_is_written_after_an_error(script, rows, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script("prepare_data", rows, rows, "-o", tmp_path / "out")
    assert "quote a glob" in capsys.readouterr().err
    leak = jsonl(tmp_path / "leak.jsonl", row("cold brew ratio"))
    with pytest.raises(ValueError, match="no row is left to train on"):
        script("prepare_data", leak, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_prepared_folder_is_ignored_by_git():
    assert "/data/train/" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_originals_options_and_files(script, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", *(row(f"a harmless query {i}") for i in range(9)))
    path.write_text(path.read_text() + json.dumps(row("tls")) + "\n")
    script("prepare_data", "--input", path, "--output", tmp_path / "out", "--split", "0.2")
    made, chat = (
        [json.loads(x) for x in (tmp_path / "out" / name).read_text().splitlines()]
        for name in ("train.jsonl", "train_chat.jsonl")
    )
    assert len(made) == 8 and chat == [{"messages": x["messages"]} for x in made]
    assert json.loads((tmp_path / "out" / "dataset_info.json").read_text()) == {
        "dataset_name": "qmd-query-expansion",
        "train_samples": 8,
        "val_samples": 2,
        "short_query_pct": 10.0,
    }
