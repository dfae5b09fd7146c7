"""dataset/score_data.py: figures worked by hand, the histogram, the worst row."""

from test_rows import jsonl

from dataset.score_data import histogram

HYDE = [
    "hyde",
    "Set the auth provider and the signing key in config.yaml, then restart the server.",
]
LEX = ["lex", "auth settings file"]
VEC = ["vec", "how to configure user authentication"]


def row(query: str, *lines: list[str]) -> dict:
    return {"query": query, "output": lines}


def test_figures_per_file_and_in_total(script, tmp_path):
    # 130 of 140 and 110 of 120 points; without a vec line 75 of 120.
    good = jsonl(
        tmp_path / "good.jsonl", row("auth config", HYDE, LEX, VEC), row("auth config", LEX, VEC)
    )
    bad = jsonl(tmp_path / "bad.jsonl", row("auth config", LEX, ["lex", "login options"]))
    code, out = script("score_data", good, bad, "--worst", "1")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert [str(good), "2", "92.3", "%", "91.7", "%", "0", "0", "0%", "0%"] in lines
    assert lines[3][:2] == ["all", "3"] and lines[3][-4:] == ["1", "1", "0%", "0%"]
    # QMD drops the line without a word of the query.
    assert f"{bad}:1: auth config" in out and "drops  lex: login options" in out
    assert out.count("Excellent") == 0


def test_a_variant_is_filtered_by_its_base_query(script, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", row("auth config /only:lex", LEX, ["lex", "lexer flags"]))
    assert script("score_data", path, "--worst", "0")[1].splitlines()[1].split()[-3] == "1"


def test_hits_of_lex_lines_in_their_own_passage_and_in_any(script, tmp_path):
    path = jsonl(
        tmp_path / "rows.jsonl",
        row("boiler", ["hyde", "The boiler is serviced in May."], ["lex", "boiler service"]),
        row("oven", ["hyde", "The oven is new."], ["lex", "boiler may"], ["lex", "oven boiler"]),
        row("no passage", ["lex", "oven new"]),
    )
    out = script("score_data", path, "--worst", "0")[1]
    assert out.splitlines()[1].split()[-2:] == ["33%", "67%"]  # of three lines


def test_the_histogram_starts_at_the_lowest_score_and_ends_at_100():
    bars = histogram([80, 84.9, 85, 99, 100])
    assert [bar.split() for bar in bars] == [
        ["80-85", "2", "#" * 50],
        ["85-90", "1", "#" * 25],
        ["90-95", "0"],
        ["95-100", "2", "#" * 50],
    ]
