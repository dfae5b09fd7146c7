"""comparison.py: the paired difference against figures worked out by hand."""

import json

import pytest

from expander.eval.comparison import (
    SCHEMA,
    compare,
    compare_retrieval,
    format_comparison,
    format_retrieval_difference,
    read_results,
)
from expander.eval.measure import measure

GREEDY = {"mode": "greedy", "max_new_tokens": 200}


def record(percentages: dict[str, float], trained_on: tuple[str, ...] = (), **decode) -> dict:
    """A results file in which each query has the given score."""
    return {
        "schema": SCHEMA,
        "model": {"name": "outputs/sft"},
        "decode": GREEDY | decode,
        "results": [
            {
                "query": query,
                "category": None,
                "trained_on": query in trained_on,
                "percentage": percentage,
                "samples": [measure(query, f"lex: {query} at {percentage}\n")],
            }
            for query, percentage in percentages.items()
        ],
    }


def test_figures_of_two_small_files():
    """The differences are +10, -20, +40, 0: mean +7.5, two wins, one loss, one tie."""
    a = record({"one": 50.0, "two": 60.0, "three": 10.0, "four": 70.0, "only a": 99.0})
    b = record({"four": 70.0, "three": 50.0, "two": 40.0, "one": 60.0})
    result = compare(a, b, seed=0)
    assert result["difference"] == 7.5
    assert (result["wins"], result["losses"], result["ties"]) == (2, 1, 1)
    assert (result["queries"], result["only_a"], result["only_b"]) == (4, 1, 0)
    assert [(c["query"], c["difference"]) for c in result["changes"]] == [
        ("three", 40.0),
        ("two", -20.0),
        ("one", 10.0),
    ]
    low, high = result["interval"]
    assert -20 <= low < 7.5 < high <= 40
    assert [s["average"] for s in result["summaries"]] == [47.5, 55.0]  # of the four in both
    assert compare(a, b, seed=0) == result
    back = compare(b, a, seed=0)
    assert back["difference"] == -7.5
    assert back["interval"] == pytest.approx([-high, -low], abs=1e-9)


def test_equal_files_differ_by_zero():
    a = record({"one": 50.0, "two": 60.0})
    result = compare(a, a, seed=0)
    assert result["difference"] == 0 and result["interval"] == [0, 0]
    assert (result["wins"], result["losses"], result["ties"]) == (0, 0, 2)
    assert result["changes"] == [] and result["settings"] == {}
    text = format_comparison(("x.json", "x.json"), (a, a), result)
    assert "no difference shown" in text and "largest changes" not in text
    assert "warning" not in text


def test_the_interval_of_a_constant_gain_is_a_point():
    a = record({str(i): float(i) for i in range(30)})
    b = record({str(i): i + 5.0 for i in range(30)})
    result = compare(a, b, seed=0)
    assert result["interval"] == [5.0, 5.0] and len(result["changes"]) == 10
    assert "B scores higher" in format_comparison(("a", "b"), (a, b), result)
    assert "A scores higher" in format_comparison(("b", "a"), (b, a), compare(b, a, seed=0))


def test_the_text_shows_both_expansions_and_warnings():
    a = record({"one": 50.0, "two": 10.0}, trained_on=("two",))
    b = record({"one": 60.0, "two": 90.0}, mode="qmd", top_k=20)
    result = compare(a, b, seed=0)
    assert result["settings"] == {"mode": ["greedy", "qmd"], "top_k": [None, 20]}
    text = format_comparison(("a.json", "b.json"), (a, b), result)
    assert (
        "warning: A and B were decoded differently: mode greedy and qmd, top_k None and 20" in text
    )
    assert "LEAK: A or B was trained on 1 of them; without them +10.00 points" in text
    assert "+80.0  two" in text and "lex: two at 10.0" in text and "lex: two at 90.0" in text
    assert text.index("two at 90.0") < text.index("one at 60.0")


def test_no_common_query():
    with pytest.raises(ValueError, match="no query in common"):
        compare(record({"one": 1.0}), record({"two": 1.0}), seed=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not UTF-8"),
        (b"[1]", "expected a JSON object"),
        (b'{"schema": true}', "its schema is True"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b'{"average": 92.0}', "not a results file"),
        (b'{"schema": 99, "results": []}', "its schema is 99, this version reads 1"),
        (b'{"schema": 1, "results": [{"query": "a"}]}', "incomplete"),
        (b'{"schema": 1, "decode": {}, "model": null, "results": [{"query": "a"}]}', "incomplete"),
    ],
)
def test_a_file_that_is_no_results_file(content, message, tmp_path):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_results(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('"percentage": 50.0', '"percentage": NaN', "NaN is not a finite number"),
        ('"percentage": 50.0', '"percentage": 1e999', "1e999 is not a finite number"),
        ('"percentage": 50.0', '"percentage": 5000', "results[0].percentage is 5000"),
        ('"percentage": 50.0', '"percentage": "50"', "results[0].percentage is '50'"),
        ('"percentage": 50.0', '"percentage": true', "results[0].percentage is True"),
        ('"trained_on": false', '"trained_on": 0', "results[0].trained_on is 0"),
        ('"kept": 1', '"kept": 1' + 400 * "0", "results[0].samples[0].kept is out of range"),
        ('"vec": 0', '"vec": null', "results[0].samples[0].lines.vec is None"),
        ('"format": 20', '"formal": 20', "results[0].samples[0].score.format is missing"),
        ('"samples": [', '"samples": [], "others": [', "results[0].samples is not a list of at"),
        ('"query": "one"', '"query": null', "results[0].query is None"),
        ('"query": "two"', '"query": "one\\u200b"', "a query is in it twice"),
        ('"model": {"name": "outputs/sft"}', '"model": []', "model is []"),
        ('"name": "outputs/sft"', '"adapters_sha256": []', "model.adapters_sha256 is []"),
        ('"decode"', '"seed": "1", "decode"', "seed is '1'"),
        ('"decode"', '"retrieval": [1], "decode"', "retrieval is not an object"),
        ('"decode"', '"retrieval": {"vault": {}}, "decode"', "retrieval.vault.embedder is missing"),
    ],
)
def test_a_damaged_results_file_is_an_error_that_names_the_value(old, new, fault, tmp_path):
    path = tmp_path / "results.json"
    text = json.dumps(record({"one": 50.0, "two": 60.0}))
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_results(path)
    assert f"{path}: " in str(caught.value) and fault in str(caught.value)


def test_points_below_zero_are_read(tmp_path):
    """Each filler line costs 3 points of the quality."""
    filler = "".join(f"lex: basics {n}\n" for n in range(9))
    one = record({"one": 50.0})
    one["results"][0]["samples"] = [measure("one", filler)]
    assert one["results"][0]["samples"][0]["score"]["quality"] < 0
    path = tmp_path / "results.json"
    path.write_text(json.dumps(one), encoding="utf-8")
    assert read_results(path) == one


def test_queries_are_paired_by_their_visible_text():
    a, b = record({"caf\u00e9": 50.0}), record({"cafe\u0301\u200b": 60.0})
    assert compare(a, b, seed=0)["difference"] == 10.0


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_results(tmp_path / "none.json")


def test_a_results_file_reads_back(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(record({"one": 50.0})), encoding="utf-8")
    assert read_results(path)["results"][0]["percentage"] == 50.0


def test_retrieval_is_compared_by_collection_and_query():
    def record(expanded: list[float], embedder: str = "wordllama") -> dict:
        rows = [{"id": f"q{n}", "expanded": value} for n, value in enumerate(expanded)]
        return {"retrieval": {"vault": {"embedder": embedder, "per_query": rows}}}

    a, b = record([0.1, 0.2, 0.3]), record([0.2, 0.3, 0.4, 1.0])
    found = compare_retrieval(a, b, seed=1)["vault"]
    assert found["difference"] == pytest.approx(0.1) and found["queries"] == 3
    assert (found["better"], found["worse"]) == (3, 0)
    assert found["interval"] == pytest.approx([0.1, 0.1])
    [line] = format_retrieval_difference({"vault": found})
    assert "vault: nDCG@10 +0.100" in line and line.endswith("B finds more")
    assert compare_retrieval(a, {"retrieval": {}}, seed=1) == {}
    [line] = format_retrieval_difference(compare_retrieval(a, record([0.1], "none"), seed=1))
    assert "not comparable" in line and "wordllama and none" in line
