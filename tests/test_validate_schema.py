"""dataset/validate_schema.py: bad rows with their location, counts, the exit code."""

from test_rows import jsonl

GOOD = {"query": "auth config", "output": [["lex", "auth settings"], ["vec", "how to sign in"]]}


def test_every_bad_row_is_reported_and_counted(script, tmp_path):
    first = jsonl(tmp_path / "a.jsonl", GOOD, "[]", GOOD, {"query": "a"}, "")
    second = jsonl(tmp_path / "b.jsonl", GOOD)
    code, out = script("validate_schema", first, second)
    assert code == 1
    assert out.splitlines() == [
        f"{first}:2: a row is an object, found list",
        f"{first}:4: no known format: found ['query'], expected one of query + output, "
        "input + output, query + searches, messages, prompt + completion",
        f"{first}: 2 good rows, 2 bad",
        f"{second}: 1 good rows, 0 bad",
        "total: 3 good rows, 2 bad",
    ]


def test_an_expansion_of_the_wrong_type_is_bad(script, tmp_path):
    asked = {"query": "auth config /only:hyde", "output": [["lex", "auth settings"]]}
    path = jsonl(tmp_path / "rows.jsonl", asked)
    assert script("validate_schema", path) == (
        1,
        f"{path}:1: no hyde line, and only hyde is asked for\n"
        f"{path}: 0 good rows, 1 bad\ntotal: 0 good rows, 1 bad\n",
    )


def test_good_rows_exit_with_zero(script, rows):
    code, out = script("validate_schema", rows)
    assert code == 0 and out.endswith("total: 24 good rows, 0 bad\n")


def test_a_file_named_twice_is_read_once(script, rows):
    assert "total: 24 good rows" in script("validate_schema", rows, rows)[1]
