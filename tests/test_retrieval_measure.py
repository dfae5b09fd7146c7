"""Measures, the baseline and the comparison with the bare query, by hand-worked numbers."""

import json
from math import log2

import pytest

from expander.retrieval.collection import Collection, Document
from expander.retrieval.index import Searcher
from expander.retrieval.measure import (
    Judge,
    baseline_lines,
    format_retrieval,
    gain,
    judge,
    verdict,
)


def collection(qrels, queries=None, documents=(), **fields):
    queries = queries or {query: query for query in qrels}
    return Collection("made", tuple(documents), queries, qrels, **fields)


# The measures


def test_the_measures_by_hand():
    scores = Judge(collection({"q": {"a": 1, "b": 2}})).scores({"q": ["x", "a", "b"]})
    ideal = 2 + 1 / log2(3)
    assert scores["q"] == pytest.approx(
        {"ndcg@10": (1 / log2(3) + 2 / log2(4)) / ideal, "recall@20": 1.0, "mrr": 1 / 2}
    )


def test_the_measures_are_cut_at_10_and_20_and_not():
    ranking = [f"x{n}" for n in range(40)]
    qrels = {"q": {"x10": 1, "x20": 1, "x39": 1, "absent": 1}}
    scores = Judge(collection(qrels)).scores({"q": ranking})["q"]
    assert scores["ndcg@10"] == 0
    assert scores["recall@20"] == pytest.approx(1 / 4)
    assert scores["mrr"] == pytest.approx(1 / 11)


def test_ranks_count_and_not_the_names_of_documents():
    # trec_eval puts equal scores in the order of their names, last one first.
    scores = Judge(collection({"q": {"a": 1}})).scores({"q": ["a", "z"]})
    assert scores["q"]["mrr"] == 1


def test_an_empty_ranking_counts_as_zero_and_an_unjudged_query_does_not_count():
    scores = Judge(collection({"q": {"a": 1}})).scores({"q": [], "other": ["a"]})
    assert scores == {"q": {"ndcg@10": 0, "recall@20": 0, "mrr": 0}}


def test_judged_only_skips_documents_that_nobody_judged():
    qrels = {"q": {"a": 1, "trap": 0}}
    ranking = {"q": ["unknown", "trap", "a"]}
    assert Judge(collection(qrels)).scores(ranking)["q"]["mrr"] == pytest.approx(1 / 3)
    only = Judge(collection(qrels, judged_only=True)).scores(ranking)
    assert only["q"]["mrr"] == pytest.approx(1 / 2)


# The baseline


COUNTS = {"the": 90, "boiler": 3, "was": 80, "serviced": 2, "when": 40, "typo": 0}


@pytest.mark.parametrize(
    ("query", "pairs"),
    [
        (
            "when was the boiler serviced",
            ["when boiler", "when serviced", "boiler serviced"],
        ),
        ("boiler serviced", []),  # the query itself
        ("boiler typo serviced", ["boiler serviced"]),  # a pair with no hit helps nobody
        ("boiler", []),
        ("boiler boiler was", ["boiler was"]),
        ('"boiler" serviced -when', ["boiler serviced"]),
        ("", []),
    ],
)
def test_the_baseline_pairs_the_three_rarest_words(query, pairs):
    assert baseline_lines(query, COUNTS.get) == [("lex", pair) for pair in pairs]


# The comparison


def test_a_gain_is_paired_and_counts_queries():
    bare = {q: dict.fromkeys(("ndcg@10", "recall@20", "mrr"), 0.5) for q in "abcd"}
    values = {"a": 1, "b": 0.5, "c": 0.4, "d": 1}
    scores = {q: dict.fromkeys(("ndcg@10", "recall@20", "mrr"), x) for q, x in values.items()}
    figures = gain(scores, bare, seed=1)
    assert figures["better"] == 0.5 and figures["worse"] == 0.25
    assert figures["mrr"]["mean"] == pytest.approx((0.5 + 0 - 0.1 + 0.5) / 4)
    low, high = figures["ndcg@10"]["interval"]
    assert -0.1 <= low < figures["ndcg@10"]["mean"] < high <= 0.5


def test_a_gain_of_the_same_for_each_query_has_no_width():
    bare = {q: dict.fromkeys(("ndcg@10", "recall@20", "mrr"), 0.25) for q in "ab"}
    scores = {q: dict.fromkeys(("ndcg@10", "recall@20", "mrr"), 0.5) for q in "ab"}
    assert gain(scores, bare, seed=1)["ndcg@10"]["interval"] == [0.25, 0.25]


NOTES = [
    Document("boiler", "Boiler", "serviced in may by mister flame"),
    Document("tax", "Tax return", "forms and receipts in may"),
    Document("hike", "Hike", "boots and rain in may"),
    Document("tea", "Tea", "kettle and cups"),
    Document("cake", "Cake", "eggs and flour"),
]
QUERIES = {
    "q1": "heating boiler",  # both words in no note
    "q2": "tax receipts",
    "q3": "rain",
    "q4": "nobody judged this",
    "q5": "cake",
}
QRELS = {"q1": {"boiler": 1}, "q2": {"tax": 1}, "q3": {"hike": 1}, "q5": {"cake": 1}}


@pytest.fixture
def judged():
    """Two samples each: q1 gets better in one of them, q3 worse in both, q2 stays; no vectors."""
    expansions = {
        "q1": ["lex: boiler\nlex: heating gas", "lex: heating costs"],
        "q2": ["lex: tax forms", "vec: tax forms"],
        "q3": ["lex: rain or kettle\nlex: kettle -rain\nlex: boots -rain", "lex: kettle -rain"],
    }
    found = collection(QRELS, QUERIES, NOTES)
    return judge(found, Searcher(NOTES), expansions, seed=7)


def test_the_figures_of_a_collection(judged):
    assert judged["queries"] == {
        "judged": 4,
        "without_expansion": 1,
        "strong_signal": 0,
        "measured": 3,
    }
    assert judged["samples"] == 6 and judged["embedder"] == "none"
    # Bare: q1 finds nothing, q2 and q3 their note at the top.
    assert judged["bare"] == pytest.approx({"ndcg@10": 2 / 3, "recall@20": 2 / 3, "mrr": 2 / 3})
    # Expanded: q1 finds its note in one of two samples.
    expanded = {name: judged["expanded"][name] for name in ("ndcg@10", "recall@20", "mrr")}
    assert expanded == pytest.approx(dict.fromkeys(expanded, (0.5 + 1 + 1) / 3))
    assert judged["worst"]["ndcg@10"] == pytest.approx(2 / 3)
    assert judged["expanded"]["gain"]["better"] == pytest.approx(1 / 3)
    assert judged["expanded"]["gain"]["worse"] == 0
    assert judged["expanded"]["gain"]["mrr"]["mean"] == pytest.approx(0.5 / 3)


def test_the_baseline_is_measured_like_the_expansions(judged):
    # q1: of "heating" and "boiler" one word only is in a note, so there is no pair.
    assert judged["baseline"]["ndcg@10"] == pytest.approx(2 / 3)
    assert judged["baseline"]["gain"]["better"] == 0


def test_line_types_are_measured_apart(judged):
    types = judged["types"]
    assert list(types) == ["hyde", "lex", "vec", "all"]
    assert types["lex"]["ndcg@10"] == types["all"]["ndcg@10"] == judged["expanded"]["ndcg@10"]
    assert types["vec"]["ndcg@10"] == types["hyde"]["ndcg@10"] == judged["bare"]["ndcg@10"]


def test_lines_are_counted(judged):
    lines = judged["lines"]
    assert lines["lex"] == 8
    assert lines["lex_without_hit"] == 4  # heating …, rain or kettle, boots -rain
    assert lines["searched"] == pytest.approx({"hyde": 0, "lex": 8 / 6, "vec": 1 / 6})
    assert lines["falls_back"] == 0


def test_the_best_and_worst_queries_come_with_their_lines(judged):
    (best,) = judged["best_queries"]
    assert best["query"] == "heating boiler" and best["expanded"] == 0.5
    assert best["lines"] == [
        {"type": "lex", "text": "boiler", "hits": 1},
        {"type": "lex", "text": "heating gas", "hits": 0},
    ]
    assert judged["worst_queries"] == []
    assert [row["id"] for row in judged["per_query"]] == ["q1", "q2", "q3"]


def test_a_wrong_line_makes_a_query_worse():
    found = collection({"q": {"hike": 1}}, {"q": "rain"}, NOTES)
    result = judge(found, Searcher(NOTES), {"q": ["lex: may -rain"] * 2 + ["vec: rain in may"]})
    # The wrong line's first note scores .066 against .083 of the right one: still second.
    assert result["expanded"]["ndcg@10"] == 1
    lines = "lex: boiler -rain\nlex: mister -rain\nlex: flame -rain"
    result = judge(found, Searcher(NOTES), {"q": [lines]})
    assert result["expanded"]["mrr"] == 1 / 2
    assert result["worst_queries"][0]["expanded"] == pytest.approx(1 / log2(3))
    assert verdict(result["expanded"]["gain"]) == "the expansions make the search worse"


def test_a_query_that_qmd_would_not_expand_is_left_out_and_counted():
    rare = [Document("mail", "zeppelin", "zeppelin " * 3)]
    notes = rare + [Document(str(n), "", "other words here") for n in range(5000)]
    qrels = {"q1": {"mail": 1}, "q2": {"1": 1}}
    found = collection(qrels, {"q1": "zeppelin", "q2": "words"}, notes)
    searcher = Searcher(notes)
    expansions = {"q1": ["lex: zeppelin"], "q2": ["lex: words here"]}
    result = judge(found, searcher, expansions)
    assert result["queries"]["strong_signal"] == 1 and result["queries"]["measured"] == 1
    assert [row["id"] for row in result["per_query"]] == ["q2"]
    with pytest.raises(ValueError, match="QMD would expand 1, and none"):
        judge(found, searcher, {"q1": ["lex: zeppelin"]})


def test_expansions_of_other_queries_are_an_error():
    with pytest.raises(ValueError, match=r"its 4 judged queries .*none of those has an expansion"):
        judge(collection(QRELS, QUERIES, NOTES), Searcher(NOTES), {"q4": ["lex: x"], "q1": []})


def test_the_result_is_json_and_the_same_for_the_same_seed(judged):
    assert json.loads(json.dumps(judged)) == judged


def test_the_table_fits_a_terminal(judged):
    text = format_retrieval(judged)
    assert max(map(len, text.split("\n"))) <= 100
    assert "bare query" in text and "worst sample" in text and "no difference shown" in text
    assert "50% of 8 lex lines found nothing" in text
    assert "1 without an expansion" in text


def test_the_table_shows_no_control_characters():
    found = collection({"q": {"boiler": 1}}, {"q": "boiler\x1b[2J may"}, NOTES)
    result = judge(found, Searcher(NOTES), {"q": ["lex: boiler \x1b]0;x\x07\nlex: may boiler"]})
    assert result["best_queries"]
    assert "\x1b" not in format_retrieval(result)
