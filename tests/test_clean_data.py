"""dataset/clean_data.py: each fault repaired or reported, the diff, and where it writes."""

import json

import pytest
from test_rows import FORMATS, jsonl

from dataset.clean_data import cut_at_sentence, remaining, repair
from expander.rows import Example, parse_row

HYDE = "Set the provider and the signing key in config.yaml, then restart the server."
LONG = f"{HYDE} {'More words follow here and there. ' * 6}".strip()
OK = [["hyde", HYDE], ["lex", "auth settings file"], ["vec", "how to configure authentication"]]


def repaired(query: str, *lines: tuple[str, str]) -> tuple[list, list]:
    return repair(Example(query, lines))


@pytest.mark.parametrize(
    ("name", "query", "lines", "expected"),
    [
        (
            "lines out of order",
            "auth config",
            [("vec", "sign in with auth"), ("hyde", "auth by key"), ("lex", "auth key")],
            [("hyde", "auth by key"), ("lex", "auth key"), ("vec", "sign in with auth")],
        ),
        (
            "second hyde line",
            "auth config",
            [("hyde", "auth by key"), ("hyde", "auth by card")],
            [("hyde", "auth by key")],
        ),
        (
            "long lex",
            "auth config",
            [("hyde", HYDE), ("lex", "config provider database file"), ("lex", "auth new file path")],
            [("hyde", HYDE), ("lex", "config provider"), ("lex", "auth new file path")],
        ),
        ("filler", "jazz piano", [("lex", "jazz chords overview")], [("lex", "jazz chords")]),
        (
            "repeats the query",
            "jazz piano",
            [("lex", "jazz piano"), ("lex", "jazz chords")],
            [("lex", "jazz chords")],
        ),
        (
            "same line twice",
            "jazz piano",
            [("lex", "jazz chords"), ("lex", "Jazz  Chords"), ("vec", "jazz chords")],
            [("lex", "jazz chords"), ("vec", "jazz chords")],
        ),
        (
            "dropped by QMD",
            "jazz piano",
            [("lex", "jazz chords"), ("lex", "bebop")],
            [("lex", "jazz chords")],
        ),
        (
            "entity dropped",
            "memory of AWS Lambda",
            [("lex", "raise memory limit"), ("vec", "how much memory it gives")],
            [("lex", "AWS raise memory limit"), ("vec", "how much memory it gives")],
        ),
        (
            "entity dropped",
            "install node.js /only:lex",
            [("lex", "install javascript runtime")],
            [("lex", "node.js install javascript runtime")],
        ),
    ],
)  # fmt: skip
def test_each_fault_is_repaired(name, query, lines, expected):
    assert repaired(query, *lines) == (expected, [name])
    assert repaired(query, *expected) == (expected, [])
    assert remaining(query, expected) == []


def test_a_long_hyde_is_cut_after_a_sentence():
    [(_, text)], done = repaired("auth config", ("hyde", LONG.replace("More", "Auth")))
    assert done == ["long hyde"] and 50 <= len(text) <= 200 and text.endswith("there.")
    assert cut_at_sentence("Version 1.5 of it. " + "x" * 300) is None  # under 50 characters
    assert cut_at_sentence("あ" * 60 + "。" + "い" * 200) == "あ" * 60 + "。"


def test_a_line_that_a_repair_would_spoil_is_kept_and_reported():
    # Without its filler, the first line would repeat the query.
    for query, kind, text, fault in (
        ("jazz piano", "lex", "jazz piano overview", "filler"),
        ("jazz piano", "lex", "jazz piano", "repeats the query"),
        ("jazz piano", "hyde", "jazz piano " + "x" * 250, "long hyde"),
        ("jazz piano", "vec", "which chords are common in bebop", "dropped by QMD"),
    ):
        assert repaired(query, (kind, text)) == ([(kind, text)], [])
        assert remaining(query, [(kind, text)])[0] == fault


def faulty(path):
    return jsonl(
        path,
        {"query": "auth config", "output": OK, "note": "kept"},
        {"query": "jazz piano", "output": "lex: jazz piano\nlex: jazz chords", "intent": "music"},
        {"query": "AUTH config", "output": OK},
    )


def test_without_fix_nothing_is_written(script, tmp_path):
    path = faulty(tmp_path / "rows.jsonl")
    before = path.read_bytes()
    code, out = script("clean_data", path)
    assert code == 1 and path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    assert out.splitlines() == [
        f"{path}:2: repeats the query: jazz piano",
        "- lex: jazz piano",
        f"{path}:3: query of an earlier row: AUTH config",
        "to repair: 1 x repeats the query",
        "to repair: 1 x query of an earlier row",
        "2 rows with different queries",
    ]


@pytest.mark.parametrize("in_place", [False, True])
def test_fix_writes_a_new_file_or_in_place(in_place, script, tmp_path):
    path, other = faulty(tmp_path / "rows.jsonl"), tmp_path / "clean.jsonl"
    before = path.read_bytes()
    code, _ = script("clean_data", path, "--fix", *(["--in-place"] if in_place else ["-o", other]))
    made = path if in_place else other
    rows = [json.loads(line) for line in made.read_text().splitlines()]
    assert rows == [
        {"query": "auth config", "output": OK, "note": "kept"},
        {"query": "jazz piano", "output": [["lex", "jazz chords"]], "intent": "music"},
    ]
    assert code == 0 and (in_place or path.read_bytes() == before)
    assert script("clean_data", made)[0] == 0


def test_links_and_modes_stay_in_place(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, link = faulty(tmp_path / "rows.jsonl"), tmp_path / "a link.jsonl"
    link.symlink_to("rows.jsonl")
    path.chmod(0o600)
    # The link and its file are one file: its rows are not those of an earlier row.
    assert script("clean_data", "*.jsonl", link, path, "--fix", "--in-place")[0] == 0
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_text().splitlines()) == 2
    assert script("clean_data", path)[0] == 0


def test_repairs_are_written_even_if_they_cannot_be_printed(script, tmp_path, monkeypatch):
    path = faulty(tmp_path / "rows.jsonl")

    def broken(*args, **options):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", broken)
    with pytest.raises(BrokenPipeError):
        script("clean_data", path, "--fix", "--in-place")
    monkeypatch.undo()
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("name", [".hidden.jsonl", "._rows.jsonl"])
def test_hidden_files_of_a_folder_are_not_touched(name, script, tmp_path):
    faulty(tmp_path / "rows.jsonl")
    hidden = faulty(tmp_path / name)
    before = hidden.read_bytes()
    assert script("clean_data", tmp_path, "--fix", "--in-place")[0] == 0
    assert hidden.read_bytes() == before


@pytest.mark.parametrize("options", [["--fix"], ["-o", "x"], ["--in-place"]])
def test_fix_needs_a_place_to_write(options, script, rows):
    with pytest.raises(SystemExit):
        script("clean_data", rows, *options)


@pytest.mark.parametrize("name", FORMATS)
def test_a_repaired_row_of_any_format_is_canonical(name, script, tmp_path):
    text = json.dumps(FORMATS[name]).replace("auth settings", "auth config")
    path = jsonl(tmp_path / "rows.jsonl", text)
    script("clean_data", path, "--fix", "--in-place")
    [row] = map(json.loads, path.read_text().splitlines())
    found = parse_row(row)
    assert found.query == "auth config" and found.lines[0] == ("hyde", "Auth.")
