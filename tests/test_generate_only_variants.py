"""dataset/generate_only_variants.py: how many variants, of which rows, and no existing ones."""

import json

import pytest
from test_rows import jsonl

from dataset.generate_only_variants import make_variants
from expander.rows import parse_row
from reward import only_mode, score_expansion_detailed

LINES = [
    ["hyde", "Set the provider and the signing key in config.yaml, then restart the server."],
    ["lex", "{} settings file"],
    ["lex", "provider {} options"],
    ["vec", "How do I set up {} for a small team?"],
    ["vec", "Where does the server keep its settings for {}?"],
]


def full(query: str) -> dict:
    lines = [[kind, text.format(query)] for kind, text in LINES]
    return {"query": query, "output": lines, "language": "en"}


ROWS = [full(f"word{i} auth config") for i in range(40)]


def test_a_share_of_the_full_rows_gets_one_new_variant():
    existing = [{"query": f"{r['query']} /only:lex", "output": r["output"][1:3]} for r in ROWS[:5]]
    examples = [parse_row(r) for r in [*ROWS, *existing]]
    made = make_variants(examples, 0.2, seed=1)
    bases = [only_mode(e.query)[0] for e in made]
    assert len(made) == 7 == len(set(bases))  # a fifth of the 35 that have no variant yet
    assert not {e.query for e in examples[:5]} & set(bases)
    for e in made:
        kind = only_mode(e.query)[1]
        assert {k for k, _ in e.lines} == {kind} and (e.category, e.language) == ("only", "en")
    assert make_variants(examples, 0.2, seed=1) == made != make_variants(examples, 0.2, seed=2)
    assert {only_mode(e.query)[1] for e in make_variants(examples, 1, 1)} == {"lex", "vec"}


def test_variants_under_80_percent_are_skipped():
    poor = {"query": "AWS Lambda", "output": [["lex", "serverless"], ["vec", "functions"]]}
    assert make_variants([parse_row(poor)], 1, 0) == []


def test_rows_are_written_and_the_file_is_not_overwritten(script, tmp_path):
    rows, more = jsonl(tmp_path / "rows.jsonl", *ROWS), tmp_path / "more.jsonl"
    code, out = script("generate_only_variants", rows, "--share", "0.5", "-o", more)
    made = [json.loads(line) for line in more.read_text().splitlines()]
    assert code == 0 and out.startswith(f"{more}: 20 rows (") and len(made) == 20
    for r in made:
        text = "\n".join(f"{kind}: {line}" for kind, line in r["output"])
        assert score_expansion_detailed(r["query"], text)["percentage"] >= 80
    before = more.read_bytes()
    with pytest.raises(SystemExit):
        script("generate_only_variants", rows, "-o", more)
    assert more.read_bytes() == before
