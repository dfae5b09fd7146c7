"""dataset/analyze_data.py: rules, templates, repetition, languages, and the report."""

import pytest
from test_rows import jsonl

from dataset.analyze_data import (
    RULES,
    answers_in_english,
    bare_query,
    in_other_language,
    language_of,
    ngrams,
    templates,
)
from expander.nearness import template_of
from expander.rows import Example


def example(query: str, *lines: tuple[str, str], **labels) -> Example:
    return Example(query, lines, **labels)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("auth config", {"short"}),
        ("rust ownership rules", set()),
        ("compare Kafka vs RabbitMQ", {"entities", "comparison"}),
        ("how to prune roses", {"how-to"}),
        ("what did my landlord promise", {"personal"}),
        ("ECONNREFUSED on port", {"entities", "errors"}),
        ("economy of scale", set()),
        ("latest changes in parental leave", {"recency"}),
        ('"blue hour" photo settings', {"quoted"}),
        ("rust pan -language", {"entities", "negation"}),
        ("which parts of a long bread recipe can be done the evening before", {"long"}),
    ],
)
def test_each_rule_finds_its_queries(query, expected):
    assert {name for name, rule in RULES.items() if rule(query)} == expected


def test_rules_ignore_the_only_suffix():
    assert bare_query(example("Auth Config /only:lex")) == "Auth Config"
    assert bare_query(example("Auth Config only: lex")) == "Auth Config"
    assert bare_query(example("İstanbul otel /only:vec")) == "İstanbul otel"


def test_templates_are_sentences_that_differ_in_the_words_of_the_query():
    text = "This overview of {} covers {} in 12 steps."
    assert (
        template_of(text.format("Jazz", "jazz"), "jazz") == "this overview of … covers … in … steps"
    )
    rows = [example(q, ("hyde", text.format(q, q))) for q in ("jazz", "tax law", "bees")]
    other = example("ants", ("hyde", "Ants carry fifty times their weight."))
    assert templates([*rows, other]) == {
        "hyde": [("this overview of … covers … in … steps", 3)],
        "lex": [],
        "vec": [],
    }
    assert templates(rows[:2])["hyde"] == []


def test_sequences_of_words_are_counted_once_per_text():
    found = ngrams(["a b c d a b c d", "A b, c d!", "a b c"])
    assert found["a b c d"] == 2 and found["b c d a"] == 1 and len(found) == 4


def test_languages_and_answers_in_another_language():
    german = example("Reifen wechseln", ("vec", "Wie wechselt man Reifen?"), language="de")
    english = example("Reifen wechseln", ("vec", "how to change the tyres of a car"), language="de")
    russian = example("настройка сети", ("lex", "network settings"))
    assert [language_of(e) for e in (german, russian)] == ["de", "unlabelled, CYRILLIC"]
    assert [in_other_language(e) for e in (german, english, russian)] == [False, True, True]
    assert not answers_in_english(german)


def test_the_report(script, tmp_path):
    def row(query: str, **labels) -> dict:
        hyde = f"This comprehensive guide covers everything about {query} for all levels."
        return {"query": query, "output": [["hyde", hyde], ["lex", f"{query} x"]], **labels}

    queries = ["grow tomato plants", "grow tomatoes plants", "bees", "tax law /only:hyde"]
    path = jsonl(
        tmp_path / "rows.jsonl", *map(row, queries), row("BEES"), row("miel", language="es")
    )
    code, out = script("analyze_data", path)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0 and lines[0] == "6 rows"
    assert "short 4 66.7%" in lines and "only 1 16.7%" in lines
    assert "labelled as another language than English: 16.7% in 1 languages" in lines
    assert "template sentences, hyde: 1, in 6 rows" in lines
    assert "rows with the query of an earlier row: 1" in lines
    assert "queries that nearly repeat an earlier query: 1" in lines
    assert "grow tomato plants ~ grow tomatoes plants" in lines


def test_examples_of_each_category_as_in_the_original(script, tmp_path):
    rows = [{"query": q, "output": [["lex", "x"]]} for q in ("bees", "tax law", "zebra in a zoo")]
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    _, out = script("analyze_data", "--input", path, "--show-examples", "1")
    assert "queries, short:\n  bees\nqueries" not in out  # other comes before short
    assert "queries, other:\n  zebra in a zoo\nqueries, short:\n  bees\n" in out
    assert "queries, short" not in script("analyze_data", path, "--show-examples", "0")[1]
