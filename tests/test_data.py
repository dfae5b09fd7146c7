"""The rows in data/: scores, form and balance, and that the figures of the data card are theirs."""

from collections import Counter
from pathlib import Path

import pytest

from dataset.analyze_data import in_other_language
from dataset.clean_data import remaining, repair
from dataset.score_data import score
from expander.nearness import near_duplicates
from expander.queries import base_query, normal_query
from expander.retrieval.passages import LexHits, lex_hits
from expander.rows import read_files

ROOT = Path(__file__).parents[1]
DATA = str(ROOT / "data" / "*.jsonl")


@pytest.fixture(scope="module")
def examples():
    return read_files([DATA])


def test_every_row_scores_well_and_qmd_keeps_its_lines(examples):
    scores = [score(example) for example in examples]
    assert len(examples) >= 2000 and len({normal_query(e.query) for e in examples}) == len(examples)
    assert sum(x for x, _ in scores) / len(scores) >= 93
    assert min(x for x, _ in scores) >= 80 and not any(dropped for _, dropped in scores)


def test_every_row_has_the_right_form(examples):
    for example in examples:
        assert repair(example)[1] == [] == remaining(example.query, example.lines), example.source
        kinds = Counter(kind for kind, _ in example.lines)
        assert kinds["hyde"] <= 1 and kinds["lex"] <= 3 and kinds["vec"] <= 3, example.source
        assert example.is_only or len(kinds) == 3, example.source
        assert all(50 <= len(x) <= 200 for kind, x in example.lines if kind == "hyde")


def test_the_set_is_balanced(examples):
    short = sum(len(base_query(e.query).split()) <= 2 for e in examples) / len(examples)
    foreign = [e for e in examples if e.language not in (None, "en")]
    assert 0.15 <= short <= 0.25 and sum(e.is_only for e in examples) / len(examples) <= 0.10
    assert len(foreign) / len(examples) >= 0.15 and len({e.language for e in foreign}) >= 10
    assert not any(map(in_other_language, examples))
    assert len(list(near_duplicates(e.query for e in examples))) <= 5
    assert (
        len(foreign) >= 350 and sum(len(base_query(e.query).split()) <= 3 for e in examples) >= 400
    )


def test_lex_lines_match_the_passage_of_their_row(examples):
    hits = sum(lex_hits(examples), LexHits())
    assert hits.own / hits.lines >= 0.85
    words = [len(text.split()) for e in examples for kind, text in e.lines if kind == "lex"]
    assert max(words) <= 3


def test_the_card_has_the_figures_of_the_scripts(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    card = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    assert script("score_data", "--worst", "0")[1].strip("\n") in card
    printed = [line for line in script("analyze_data", "--top", "0")[1].splitlines() if line]
    figures = [x for x in printed if not x.startswith("  ") or x.startswith("  labelled as")]
    assert len(figures) >= 10 and all(line in card for line in figures[1:])
