"""Collections of every layout, and the one line that each kind of bad input ends in."""

import json
import sqlite3
from pathlib import Path

import pytest

from expander.retrieval import collection as module
from expander.retrieval.collection import (
    Document,
    covers_pools_only,
    extract_title,
    read_collection,
)
from expander.rows import DataError

DOCS = [
    {"id": "d1", "title": "Boiler", "text": "Serviced in May"},
    {"id": "d2", "title": "", "text": "Radiators hum"},
]
QUERIES = [{"id": "q1", "text": "boiler  service"}, {"id": 2, "text": "noise"}]
QRELS = "q1\td1\t2\nq1\td2\t0\n2\td2\t1\n"


def write(folder: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        elif isinstance(content, dict):
            content = json.dumps(content)
        path.write_text(content, encoding="utf-8")
    return folder


def error(source: object) -> str:
    with pytest.raises(ValueError) as caught:
        read_collection(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def three_files(folder: Path, **changed: object) -> Path:
    files = {"docs.jsonl": DOCS, "queries.jsonl": QUERIES, "qrels.tsv": QRELS}
    return write(folder / "house", files | {n.replace("_", "."): c for n, c in changed.items()})


def beir(rows, **renamed) -> list[dict]:
    return [{f"_{k}" if k == "id" else k: v for k, v in row.items()} for row in rows]


def vault(folder: Path, qrels: str = "q1\thouse/boiler.md\t2\n") -> Path:
    return write(
        folder / "vault",
        {
            "notes/house/boiler.md": "# Boiler\n\nServiced in May.\n",
            "notes/house/._boiler.md": "AppleDouble",
            "notes/.obsidian/x.md": "hidden",
            "notes/node_modules/y.md": "not a note",
            "notes/blank.md": " \n",
            "notes/picture.txt": "no note",
            "notes/tea.md": "No heading",
            "queries.jsonl": [{"id": "q1", "text": "heating", "lang": "en"}],
            "qrels.tsv": qrels,
            "bench.json": {"queries": []},
        },
    )


def qmd_index(path: Path, wal: bool = False) -> Path:
    database = sqlite3.connect(path)
    if wal:
        database.execute("PRAGMA journal_mode=wal")
    database.executescript(
        """
        CREATE TABLE content (hash TEXT PRIMARY KEY, doc TEXT, created_at TEXT);
        CREATE TABLE documents (id INTEGER PRIMARY KEY, collection TEXT, path TEXT, title TEXT,
            hash TEXT, created_at TEXT, modified_at TEXT, active INTEGER);
        INSERT INTO content VALUES ('h1', 'Serviced in May', ''), ('h2', 'Radiators hum', '');
        INSERT INTO documents VALUES
            (1, 'house', 'heat/Boiler.md', 'Boiler', 'h1', '', '', 1),
            (2, 'work', 'hum.md', 'Noise', 'h2', '', '', 1),
            (3, 'house', 'old.md', 'Old', 'h2', '', '', 0);
        """
    )
    database.commit()
    database.close()
    return path


FIXTURE = {
    "description": "mine",
    "version": 1,
    "queries": [
        {"id": "q1", "query": "heating", "expected_files": ["qmd://house/heat/boiler.md"]},
        {"id": "q2", "query": "lex: boiler\nvec: heating", "expected_files": ["boiler.md"]},
    ],
}


# What is read


def test_the_three_file_layout(tmp_path):
    found = read_collection(three_files(tmp_path))
    assert found.name == "house"
    assert found.documents == (
        Document("d1", "Boiler", "Serviced in May"),
        Document("d2", "", "Radiators hum"),
    )
    assert found.queries == {"q1": "boiler service", "2": "noise"}
    assert found.qrels == {"q1": {"d1": 2, "d2": 0}, "2": {"d2": 1}}
    assert not found.judged_only and not found.warnings


def test_beirs_layout_in_a_folder(tmp_path):
    folder = write(
        tmp_path,
        {
            "corpus.jsonl": beir(DOCS),
            "queries.jsonl": beir(QUERIES),
            "qrels/test.tsv": f"query-id\tcorpus-id\tscore\n{QRELS}",
        },
    )
    found = read_collection(folder)
    assert [document.id for document in found.documents] == ["d1", "d2"]
    assert found.qrels == {"q1": {"d1": 2, "d2": 0}, "2": {"d2": 1}}


def test_beirs_layout_on_the_hub(monkeypatch):
    asked = {
        ("BeIR/house", "corpus", "corpus"): beir(DOCS),
        ("BeIR/house", "queries", "queries"): beir(QUERIES),
        ("BeIR/house-qrels", "test", None): [
            {"query-id": 2, "corpus-id": "d2", "score": 1},
        ],
    }

    def hub_rows(name, split, subset=None):
        for number, row in enumerate(asked[name, split, subset], 1):
            yield f"{name}[{split}]:{number}", row

    monkeypatch.setattr(module, "hub_rows", hub_rows)
    found = read_collection("BeIR/house")
    assert found.name == "BeIR/house"
    assert found.qrels == {"2": {"d2": 1}}


def test_a_hub_id_that_is_not_there(monkeypatch):
    def hub_rows(*asked):
        try:
            raise ConnectionError("the network is down\nmore")
        except ConnectionError:
            raise DataError("dataset.name …") from None
        yield

    monkeypatch.setattr(module, "hub_rows", hub_rows)
    message = error("BeIR/nothing")
    assert "BeIR/nothing" in message and "the network is down" in message
    assert "dataset.name" not in message


def test_a_vault_of_notes_without_what_qmd_does_not_index(tmp_path):
    found = read_collection(vault(tmp_path))
    assert found.documents == (
        Document("tea.md", "tea", "No heading", "vault/tea.md"),
        Document(
            "house/boiler.md", "Boiler", "# Boiler\n\nServiced in May.\n", "vault/house/boiler.md"
        ),
    )
    assert found.queries == {"q1": "heating"}
    assert found.qrels == {"q1": {"house/boiler.md": 2}}


def test_notes_with_a_bench_fixture_in_the_folder_or_named(tmp_path):
    notes = write(tmp_path / "notes", {"heat/Boiler.md": "# B\n", "tea.md": "Tea"})
    fixture = write(tmp_path, {"mine.json": FIXTURE}) / "mine.json"
    named = read_collection(f"{notes}#{fixture}")
    write(notes, {"bench.json": FIXTURE})
    for found in (named, read_collection(notes)):
        assert found.queries == {"q1": "heating"}
        assert found.qrels == {"q1": {"heat/Boiler.md": 1}}
        assert "1 of 2 queries are already expanded" in found.warnings[0]


def test_queries_of_a_fixture_as_json_lines(tmp_path):
    notes = write(tmp_path / "notes", {"tea.md": "Tea"})
    write(tmp_path, {"mine.jsonl": [{"query": "drinks", "expected_files": ["TEA.md"]}]})
    assert read_collection(f"{notes}#{tmp_path / 'mine.jsonl'}").qrels == {"1": {"tea.md": 1}}


def test_an_expected_file_may_be_the_end_of_a_path_but_only_of_one(tmp_path):
    notes = write(tmp_path / "notes", {"a/tea.md": "Tea", "b/tea.md": "Tea", "b/green-tea.md": ""})
    query = {"query": "drinks", "expected_files": ["a/tea.md"]}
    write(notes, {"bench.json": {"queries": [query]}})
    assert read_collection(notes).qrels == {"1": {"a/tea.md": 1}}
    write(notes, {"bench.json": {"queries": [query | {"expected_files": ["tea.md"]}]}})
    assert "any of a/tea.md, b/tea.md" in error(notes)


@pytest.mark.parametrize("wal", [False, True])
def test_a_qmd_index_is_read_and_left_alone(tmp_path, wal):
    path = qmd_index(tmp_path / "index.sqlite", wal)
    before = path.read_bytes()
    fixture = write(tmp_path, {"mine.json": FIXTURE}) / "mine.json"
    found = read_collection(f"{path}#{fixture}")
    assert found.name == "index"
    assert found.documents == (
        Document("house/heat/Boiler.md", "Boiler", "Serviced in May", "house/heat/Boiler.md"),
        Document("work/hum.md", "Noise", "Radiators hum", "work/hum.md"),
    )
    assert found.qrels == {"q1": {"house/heat/Boiler.md": 1}}
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index.sqlite", "mine.json"]


def test_a_qmd_index_in_use_is_read_with_what_is_not_yet_in_its_main_file(tmp_path):
    path = qmd_index(tmp_path / "index.sqlite", wal=True)
    fixture = write(tmp_path, {"mine.json": FIXTURE}) / "mine.json"
    database = sqlite3.connect(path)
    database.execute("UPDATE documents SET title = 'New' WHERE id = 1")
    database.commit()
    assert read_collection(f"{path}#{fixture}").documents[0].title == "New"
    database.close()


def test_a_fixture_may_name_one_collection_of_an_index(tmp_path):
    path = qmd_index(tmp_path / "index.sqlite")
    write(tmp_path, {"mine.json": FIXTURE | {"collection": "house"}})
    found = read_collection(f"{path}#{tmp_path / 'mine.json'}")
    assert found.name == "house"
    assert [document.id for document in found.documents] == ["house/heat/Boiler.md"]
    write(tmp_path, {"mine.json": FIXTURE | {"collection": "garden"}})
    assert "'garden' is not in" in error(f"{path}#{tmp_path / 'mine.json'}")


@pytest.mark.parametrize(
    ("text", "path", "title"),
    [
        ("# One\n# Two", "a.md", "One"),
        ("text\n\n## Two\r\nmore", "a.md", "Two"),
        ("### Three", "b/a.md", "a"),
        ("#NoSpace", "a.md", "a"),
        ("# Notes\n\n## May", "a.md", "May"),
        ("#\n\nNext line", "a.md", "Next line"),  # JavaScript's \s crosses lines
        ("# Heading", "2024.05.note.txt", "2024.05.note"),
        ("", "deep/er/.md", "deep/er/.md"),
    ],
)
def test_titles_are_qmds(text, path, title):
    assert extract_title(text, path) == title


# Judged documents only


def test_deep_judgements_with_zeros_make_the_rest_unknown(tmp_path):
    documents = [{"id": f"d{n}", "text": "x"} for n in range(12)]
    qrels = "".join(f"q1\td{n}\t{n % 2}\n" for n in range(12))
    folder = three_files(
        tmp_path, docs_jsonl=documents, queries_jsonl=[QUERIES[0]], qrels_tsv=qrels
    )
    assert read_collection(folder).judged_only
    assert not read_collection(folder, judged_only=False).judged_only


def test_few_judgements_or_none_of_zero_leave_the_rest_not_relevant(tmp_path):
    assert not covers_pools_only({"q": {f"d{n}": 1 for n in range(30)}})
    assert not covers_pools_only({"q": {"a": 1, "trap": 0}})
    assert read_collection(three_files(tmp_path), judged_only=True).judged_only


# Bad input


def test_what_is_no_collection(tmp_path):
    assert "no such file or folder" in error(tmp_path / "nothing")
    assert "no such file or folder" in error("nothing")
    assert "holds nothing; expected corpus.jsonl" in error(tmp_path)
    write(tmp_path, {"text.txt": "text", "tea.md": "Tea"})
    assert "not a QMD index" in error(tmp_path / "text.txt")
    assert f"{tmp_path}#FILE" in error(tmp_path)


def test_an_index_needs_queries_and_qmds_tables(tmp_path):
    path = qmd_index(tmp_path / "index.sqlite")
    assert "index.sqlite#FILE" in error(path)
    fixture = write(tmp_path, {"mine.json": FIXTURE}) / "mine.json"
    database = sqlite3.connect(path)
    database.execute("DROP TABLE content")
    database.commit()
    database.close()
    assert "not a readable QMD index (no such table: content)" in error(f"{path}#{fixture}")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"docs_jsonl": ""}, "house: there are no documents"),
        ({"docs_jsonl": "{"}, "docs.jsonl:1: not valid JSON"),
        ({"docs_jsonl": [DOCS[0], {"id": "d2"}]}, "docs.jsonl:2: expected an object with text"),
        ({"docs_jsonl": [*DOCS, DOCS[0]]}, "document 'd1' is there twice"),
        ({"queries_jsonl": [{"id": "q1", "text": " "}]}, "queries.jsonl:1: query q1 has no text"),
        ({"queries_jsonl": [QUERIES[0]] * 2}, "queries.jsonl:2: query q1 was there before"),
        ({"queries_jsonl": [["q1"]]}, "queries.jsonl:1: expected an object"),
        ({"qrels_tsv": "q1 d1 1\n"}, "qrels.tsv:1: expected query, document and grade with tabs"),
        ({"qrels_tsv": "q1\td1\tgood\n"}, "qrels.tsv:1: grade 'good' is not a whole number"),
        ({"qrels_tsv": f"{QRELS}q1\td1\t1\n"}, "qrels.tsv:4: 'q1' and 'd1' already have another"),
        ({"qrels_tsv": "q1\td1\t0\n"}, "house: no query has a relevant document"),
        ({"qrels_tsv": "q1\tx\t1\n"}, "no query has a relevant document"),
        ({"qrels_tsv": "q1\tx\t1\n"}, "qrels.tsv:1: document 'x' is not in the collection"),
    ],
)
def test_a_broken_row_is_named_by_its_line(tmp_path, changed, message):
    assert message in error(three_files(tmp_path, **changed))


def test_a_missing_file_is_named(tmp_path):
    folder = three_files(tmp_path)
    (folder / "qrels.tsv").unlink()
    assert "qrels.tsv: cannot be read: No such file" in error(folder)
    (folder / "queries.jsonl").unlink()
    assert "queries.jsonl: cannot be read: No such file" in error(folder)


def test_judgements_of_unknown_documents_count_with_a_warning(tmp_path):
    found = read_collection(three_files(tmp_path, qrels_tsv=f"{QRELS}q1\tx\t1\nq9\td1\t1\n"))
    assert found.qrels["q1"] == {"d1": 2, "d2": 0, "x": 1}
    assert "qrels.tsv:4: document 'x'" in found.warnings[0] and "1 more" in found.warnings[0]


def test_a_vault_has_no_judgement_of_an_unknown_note(tmp_path):
    folder = vault(tmp_path, "q1\thouse/boiler.md\t2\nq1\tboiler.md\t1\n")
    assert "qrels.tsv:2: document 'boiler.md' is not in the collection" in error(folder)


def test_half_a_surrogate_pair_does_not_stop_the_index(tmp_path):
    documents = '{"id": "d1", "text": "smile \\ud83d"}\n{"id": "d2", "text": ""}\n'
    found = read_collection(three_files(tmp_path, docs_jsonl=documents))
    assert found.documents[0].text == "smile \ufffd"


@pytest.mark.parametrize(
    ("fixture", "message"),
    [
        ("{", "bench.json: not a JSON file"),
        ("[]", "bench.json: not a QMD bench fixture"),
        ({"queries": [{"id": "a"}]}, "query 1: expected an object with text in 'query'"),
        ({"queries": [{"query": "tea", "expected_files": []}]}, "query 1: expected {"),
        ({"queries": [{"query": "tea", "expected_files": [3]}]}, "something that is not a path"),
        (
            {"queries": [{"query": "tea", "expected_files": ["coffee.md"]}]},
            "query 1: expected file 'coffee.md' is not among the notes",
        ),
        (
            {"queries": [{"id": "a", "query": "tea", "expected_files": ["tea.md"]}] * 2},
            "query 2: id 'a' was there before",
        ),
    ],
)
def test_a_broken_fixture_is_named(tmp_path, fixture, message):
    folder = write(tmp_path / "notes", {"tea.md": "Tea", "bench.json": fixture})
    assert message in error(folder)
