"""report.py: the text of an evaluation."""

import pytest

from expander.eval.measure import measure, result_of, summarize
from expander.eval.report import format_leaks, format_record, format_sample, format_summary

GOOD = (  # 130 of 140: 92.9 %
    "hyde: Set the auth provider and the signing key in config.yaml, then restart the server.\n"
    "lex: auth settings file\nlex: login config options\n"
    "vec: how to configure user authentication\nvec: where are the sign-in settings stored\n"
)
NO_LEAKS = {"checked": [], "unknown": [], "queries": []}


def result(query: str, text: str, trained_on: bool = False) -> dict:
    return result_of(query, None, [measure(query, text)]) | {"trained_on": trained_on}


def test_there_is_no_unseen_average_if_every_query_was_trained_on():
    summary = summarize([result("auth config", GOOD, trained_on=True)], seed=0)
    assert summary["unseen"] is None
    leaks = {"checked": ["sft"], "unknown": [], "queries": ["auth config"]}
    text = format_summary(summary, leaks)
    assert "trained on 1 of these queries" in text and "without them" not in text


def test_the_first_lines_are_average_ratings_qmd_and_leaks():
    results = [result("auth config", GOOD), result("tls", "no lines here", trained_on=True)]
    summary = summarize(results, seed=0)
    leaks = {"checked": ["outputs/sft"], "unknown": [], "queries": ["tls"]}
    head = format_summary(summary, leaks).split("\n")[:6]
    assert head[0] == "average  46.5 %  (95 % interval 0.0 to 92.9), 2 queries"
    assert head[1] == "ratings  Excellent 1  Good 0  Acceptable 0  Poor 0  Failed 1"
    assert head[2].startswith("QMD      would keep 2.00 lines per query (66.7% of them)")
    assert head[2].endswith("fall back to the raw query for 50.0%")
    assert "trained on 1 of these queries" in head[3] and head[4].strip() == "tls"
    assert head[5].strip() == "without them 92.9 %  (95 % interval 92.9 to 92.9)"


@pytest.mark.parametrize(
    ("leaks", "expected"),
    [
        (NO_LEAKS, "unknown: a model without adapters"),
        (
            NO_LEAKS | {"checked": ["a/sft"]},
            "none of these queries is in the training record of a/sft",
        ),
        (NO_LEAKS | {"unknown": ["a/sft"]}, "unknown for a/sft: it has no queries.json"),
    ],
)
def test_leaks_are_reported_as_far_as_the_adapters_record_them(leaks, expected):
    assert expected in format_leaks({"unseen": None}, leaks)


def test_only_the_first_of_many_leaks_are_listed():
    queries = [f"query {i}." for i in range(50)]
    leaks = {"checked": ["a"], "unknown": [], "queries": queries}
    text = format_leaks({"unseen": None}, leaks)
    assert (
        "trained on 50 of these queries" in text and "query 19." in text and "query 20." not in text
    )


def test_a_sample_shows_which_lines_qmd_keeps_and_no_control_characters():
    text = format_sample("auth config", measure("auth config", "lex: auth\x1b[31m\nvec: no\n"))
    assert "  keeps  lex: auth\ufffd[31m\n  drops  vec: no\n" in text
    assert "vec line is too short" in text


def test_samples_summary_speed_and_references_are_shown_if_present():
    results = [result("auth config", GOOD)]
    record = {
        "model": {"name": "outputs/sft", "base": "Qwen/Qwen3-1.7B", "adapters_sha256": {"a": "0"}},
        "decode": {"mode": "greedy", "samples": 1},
        "summary": summarize(results, seed=0),
        "leaks": NO_LEAKS,
        "golden": None,
        "speed": None,
        "results": results,
    }
    lines = format_record(record, samples=False, summary=True).split("\n")
    assert lines[0] == "outputs/sft: Qwen/Qwen3-1.7B + a"
    assert lines[1] == "decoding mode greedy  samples 1"
    assert lines[2].startswith("average  92.9 %")

    text = format_record(record | {"model": None}, samples=True, summary=False)
    assert text.startswith("auth config\n  92.9 % Excellent\n") and "average" not in text

    alone = {"tokens": 30, "seconds": 1.5}
    record["speed"] = {"tokens": 90, "seconds": 2.0, "tokens_per_second": 45.0, "batch_size": 8}
    record["speed"]["alone"] = alone
    record["golden"] = {
        "queries": 1,
        "types": {"lex": {"precision": 0.5, "recall": 1, "f1": 2 / 3}},
    }
    text = format_record(record, samples=False, summary=False)
    assert "speed    45 tokens/s: 90 in 2.0 s" in text and "30 in 1.5 s" in text
    assert "50.0%  100.0%  66.7%" in text
