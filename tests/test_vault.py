"""The embedded collection of judged notes, `evals/vault`: layout, sizes, judgements, export."""

import importlib.util
import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VAULT = ROOT / "evals" / "vault"
NOTES = VAULT / "notes"

# A CJK character counts as a word: these scripts put no spaces between words.
WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)


def queries() -> list[dict]:
    lines = (VAULT / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def qrels() -> list[tuple[str, str, int]]:
    rows = (VAULT / "qrels.tsv").read_text(encoding="utf-8").splitlines()
    return [(query, note, int(grade)) for query, note, grade in (row.split("\t") for row in rows)]


def notes() -> dict[str, str]:
    return {
        path.relative_to(NOTES).as_posix(): path.read_text(encoding="utf-8")
        for path in NOTES.rglob("*")
        if path.is_file()
    }


def test_there_are_200_notes_of_30_to_600_words():
    texts = notes()
    assert len(texts) >= 200
    sizes = {path: len(WORD.findall(text)) for path, text in texts.items()}
    assert {path: size for path, size in sizes.items() if not 30 <= size <= 600} == {}


def test_every_note_is_markdown_in_an_area_and_no_two_are_equal():
    texts = notes()
    assert [path for path in texts if not re.fullmatch(r"[a-z]+/[a-z0-9-]+\.md", path)] == []
    assert len(set(texts.values())) == len(texts)


def test_wikilinks_lead_to_notes():
    texts = notes()
    names = {Path(path).stem for path in texts}
    links = {link for text in texts.values() for link in re.findall(r"\[\[([^\]|#]+)\]\]", text)}
    assert links - names == set()


def test_there_are_150_short_queries_without_duplicates():
    found = queries()
    texts = [query["text"] for query in found]
    assert len(texts) >= 150
    assert len({text.casefold() for text in texts}) == len(texts)
    assert len({query["id"] for query in found}) == len(found)
    assert statistics.median(len(text.split()) for text in texts) == 3


def test_at_least_30_queries_are_in_other_languages():
    assert sum("lang" in query for query in queries()) >= 30


def test_half_of_the_queries_use_other_words_than_their_note():
    words = [query["words"] for query in queries()]
    assert set(words) == {"same", "other"}
    assert words.count("other") >= len(words) / 2


def test_every_judgement_names_a_query_a_note_and_a_grade():
    ids, paths = {query["id"] for query in queries()}, set(notes())
    judged = qrels()
    assert [row for row in judged if row[0] not in ids] == []
    assert [row for row in judged if row[1] not in paths] == []
    assert {grade for _, _, grade in judged} == {0, 1, 2}
    assert len({row[:2] for row in judged}) == len(judged)


def test_every_query_has_a_note_that_answers_it():
    answered = {query for query, _, grade in qrels() if grade == 2}
    assert {query["id"] for query in queries()} - answered == set()


def test_bench_fixture_is_what_the_export_writes(tmp_path):
    spec = importlib.util.spec_from_file_location("export_bench", VAULT / "export_bench.py")
    export = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(export)
    export.main(["-o", str(tmp_path / "bench.json")])
    assert (VAULT / "bench.json").read_bytes() == (tmp_path / "bench.json").read_bytes()


def test_bench_fixture_expects_every_relevant_note_best_first():
    grades = {(query, note): grade for query, note, grade in qrels()}
    fixture = json.loads((VAULT / "bench.json").read_text(encoding="utf-8"))
    assert [entry["id"] for entry in fixture["queries"]] == [query["id"] for query in queries()]
    for entry in fixture["queries"]:
        expected = [grades[entry["id"], note] for note in entry["expected_files"]]
        relevant = [g for (query, _), g in grades.items() if query == entry["id"] and g >= 1]
        assert expected == sorted(relevant, reverse=True)


def test_no_query_is_a_training_query():
    rows = [
        json.loads(line)["query"].casefold()
        for path in sorted((ROOT / "data").glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    training = {re.sub(r"\s*/only:\w+$", "", row).strip() for row in rows}
    assert training
    assert [q["text"] for q in queries() if q["text"].casefold() in training] == []
