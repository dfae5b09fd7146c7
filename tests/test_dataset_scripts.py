"""Common to the scripts of dataset/: how they start, and how they handle broken files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_rows import FORMATS, jsonl, row

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path.stem
    for path in (ROOT / "dataset").glob("*.py")
    if "cli.run(main)" in path.read_text(encoding="utf-8")
)
READERS = [
    "validate_schema",
    "score_data",
    "analyze_data",
    "clean_data",
    "prepare_data",
    "generate_only_variants",
]
WRITERS = {"prepare_data": "prepared", "generate_only_variants": "only.jsonl"}
GOOD = json.dumps(row("auth config"), ensure_ascii=False).encode()
# name: bytes, and the line and reason of the error
BROKEN = {
    "empty": (b"", "contains no rows"),
    "blank": (b"\n \n", "contains no rows"),
    "null row": (GOOD + b"\nnull\n", ":2: a row is an object, found NoneType"),
    "null query": (GOOD + b'\n{"query": null, "output": [["lex", "a"]]}', ":2: the query is None"),
    "wrong type": (GOOD + b'\n{"query": "a", "output": 7}', ":2: no known format"),
    "bad UTF-8": (GOOD + b'\n{"query": "\xff"}\n', ":2: not UTF-8"),
    "cut off": (GOOD + b'\n{"query": "a", "outp', ":2: not valid JSON"),
}
MEGABYTE = json.dumps({"query": "long", "output": [["lex", "long " * 200_000]]}).encode()
READABLE = {
    "Windows line ends": GOOD + b"\r\n" + json.dumps(row("other")).encode() + b"\r\n",
    "byte order mark": b"\xef\xbb\xbf" + GOOD + b"\n",
    "a line of a megabyte": GOOD + b"\n" + MEGABYTE,
    "no newline at the end": GOOD,
}


def output(name: str, folder: Path) -> list[str | Path]:
    return ["-o", folder / WRITERS[name]] if name in WRITERS else []


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_starts_as_a_file_and_as_a_module(name, run, tmp_path):
    # A package of the same name in the user's folder must not be imported instead of ours.
    decoy = tmp_path / "dataset" / f"{name}.py"
    decoy.parent.mkdir()
    decoy.write_text("raise SystemExit('the wrong one')")
    as_file = run([f"dataset/{name}.py", "--help"], cwd=tmp_path)
    assert as_file.returncode == 0, as_file.stderr
    command = [sys.executable, "-m", f"dataset.{name}", "--help"]
    as_module = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert as_file.stdout == as_module.stdout and f"usage: {name}.py" in as_file.stdout


def test_every_reader_is_a_script():
    assert set(READERS) <= set(SCRIPTS)


def test_paths_are_relative_to_the_users_folder_and_errors_set_the_exit_code(run, tmp_path):
    jsonl(tmp_path / "my rows.jsonl", b"{")
    done = run(["dataset/validate_schema.py", "my rows.jsonl"], cwd=tmp_path)
    assert done.returncode == 1 and done.stdout.startswith("my rows.jsonl:1: not valid JSON")
    done = run(["dataset/score_data.py", "none.jsonl"], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: none.jsonl: no such file or folder, and no file matches\n"


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_reported_with_its_location(case, name, script, tmp_path):
    path = tmp_path / "rows.jsonl"
    data, reason = BROKEN[case]
    path.write_bytes(data)
    if name == "validate_schema" and reason.startswith(":"):
        code, out = script(name, path)
        assert code == 1 and f"{path}{reason}" in out
    else:
        with pytest.raises(ValueError, match=r"rows\.jsonl") as caught:
            script(name, path, *output(name, tmp_path))
        assert f"{path}{reason}" in str(caught.value) or reason in str(caught.value)
        assert [found.name for found in tmp_path.iterdir()] == ["rows.jsonl"]  # nothing written


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("case", READABLE)
def test_files_of_other_systems_are_read(case, name, script, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(READABLE[case])
    code, _ = script(name, path, *output(name, tmp_path))
    # clean_data.py finds faults in the rows of this file.
    assert code == (name == "clean_data")


@pytest.mark.parametrize("name", READERS)
def test_every_format_is_read(name, script, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", *FORMATS.values())
    code, out = script(name, path, *output(name, tmp_path))
    expected = {
        "validate_schema": f"total: {len(FORMATS)} good rows, 0 bad",
        "score_data": "QMD drops",
        "analyze_data": f"{len(FORMATS)} rows",
        "clean_data": f"{len(FORMATS) - 1} x query of an earlier row",
        "prepare_data": f"{len(FORMATS)} rows read, {len(FORMATS) - 1} duplicate queries",
        "generate_only_variants": "only.jsonl: ",
    }
    assert expected[name] in out and code == (name == "clean_data")
