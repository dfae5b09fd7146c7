"""report.py: flags, sums, intervals and golden matching against figures worked by hand."""

import pytest

from expander.eval import report
from expander.eval.report import (
    bootstrap,
    compare_golden,
    in_wrong_language,
    match_lines,
    measure,
    result_of,
)

GOOD = (  # 130 of 140: 92.9 %
    "hyde: Set the auth provider and the signing key in config.yaml, then restart the server.\n"
    "lex: auth settings file\nlex: login config options\n"
    "vec: how to configure user authentication\nvec: where are the sign-in settings stored\n"
)
NO_LEAKS = {"checked": [], "unknown": [], "queries": []}


def result(query: str, *texts: str, category: str | None = None, trained_on: bool = False) -> dict:
    entry = result_of(query, category, [measure(query, text) for text in texts])
    return entry | {"trained_on": trained_on}


def test_a_good_output_has_no_flag():
    sample = measure("auth config", GOOD)
    assert [flag for flag in report.FLAGS if sample[flag]] == ["valid"]
    assert sample["score"]["percentage"] == 92.9
    assert sample["lines"] == {"hyde": 1, "lex": 2, "vec": 2, "invalid": 0}
    # "auth" is in the hyde line, "auth settings file" and "authentication"; "config" in the second
    # lex line; neither in the last vec line.
    assert sample["kept"] == 4


@pytest.mark.parametrize(
    ("query", "text", "truncated", "flags"),
    [
        ("auth config", "", False, {"empty"}),
        ("auth config", " \n", False, {"empty"}),
        ("auth config", "Sure! Here you go:\nlex: auth settings\n", False, set()),
        (
            "auth config",
            "lex: auth config file\nvec: sign",
            True,
            {"valid", "truncated", "echoing"},
        ),
        ("auth config /only:lex", "lex: auth config\n", False, {"valid", "echoing"}),
        ("auth config /only:lex", "vec: how to set up sign-in\n", False, set()),
        ("рецепт борща", "lex: borscht recipe\n", False, {"valid", "wrong_language"}),
    ],
)
def test_flags(query, text, truncated, flags):
    sample = measure(query, text, truncated)
    assert {flag for flag in report.FLAGS if sample[flag]} == flags


@pytest.mark.parametrize(
    ("query", "text", "wrong"),
    [
        ("auth config", "lex: настройки входа\n", True),
        ("auth config", "lex: настройка oauth\n", False),  # 5 of 14 letters are Latin
        ("λ calculus", "lex: lambda calculus\n", False),  # 1 of 9 letters is Greek
        ("настройка postgresql", "lex: PostgreSQL tuning guide\n", True),
        ("確定申告 医療費控除", "lex: かくていしんこく ひつようしょるい\n", False),
        ("파이썬 가상환경", "vec: 如何创建虚拟环境\n", True),
        ("C++ 20", "lex: 20 25\n", False),  # no letters in the lines
        ("2024 12", "lex: notes\n", False),  # no letters in the query
        ("борщ /only:lex", "lex: рецепт\n", False),  # the suffix is not part of the query
    ],
)
def test_wrong_language_is_judged_by_script(query, text, wrong):
    assert in_wrong_language(query, text) == wrong


def test_the_interval_is_the_same_for_the_same_seed():
    values = [value**0.5 for value in range(40)]
    assert bootstrap(values, 1) == bootstrap(values, 1)
    assert bootstrap(values, 1) != bootstrap(values, 2)


def test_the_interval_is_that_of_the_mean():
    assert bootstrap([40.0] * 9, 0) == (40.0, 40.0)
    assert bootstrap([7.0], 0) == (7.0, 7.0)
    # Resamples of (0, 100) have the means 0, 50 and 100 with 1/4, 1/2 and 1/4.
    assert bootstrap([0.0, 100.0], 0) == (0.0, 100.0)
    # A mean of 400 values of which half are 100: standard error 50 / sqrt(400) = 2.5.
    low, high = bootstrap([0.0, 100.0] * 200, 0)
    assert low == pytest.approx(50 - 1.96 * 2.5, abs=0.3)
    assert high == pytest.approx(50 + 1.96 * 2.5, abs=0.3)


def test_summary_of_two_queries():
    """92.9 % and the mean of 92.9 % and 0 %: a query with two samples counts as one query."""
    broken = "I cannot help with that.\n"
    summary = report.summarize(
        [
            result("auth config", GOOD, category="docs"),
            result("auth config ", GOOD, broken, category="notes", trained_on=True),
        ],
        seed=0,
    )
    assert (summary["queries"], summary["samples"]) == (2, 3)
    assert summary["average"] == pytest.approx((92.9 + 46.45) / 2)
    assert summary["interval"] == [46.45, 92.9]
    assert summary["unseen"] == {"queries": 1, "average": 92.9, "interval": [92.9, 92.9]}
    assert summary["ratings"] == {
        "Excellent": 2,
        "Good": 0,
        "Acceptable": 0,
        "Poor": 0,
        "Failed": 1,
    }
    assert summary["parts"]["format"] == pytest.approx((30 + 30 + 0) / 3)
    assert summary["total"] == pytest.approx((130 + 130 + 0) / 3)
    assert summary["max_possible"] == pytest.approx((140 + 140 + 100) / 3)
    assert summary["shares"]["valid"] == pytest.approx(2 / 3)
    assert summary["lines"] == pytest.approx(
        {"hyde": 2 / 3, "lex": 4 / 3, "vec": 4 / 3, "invalid": 1 / 3}
    )
    # 4 + 4 + 0 lines of 5 + 5 + 1 are kept; the third text leaves QMD with nothing.
    assert summary["qmd"] == pytest.approx(
        {"kept": 8 / 3, "kept_share": 8 / 11, "falls_back": 1 / 3}
    )
    assert [(name, x["average"]) for name, x in summary["categories"].items()] == [
        ("docs", 92.9),
        ("notes", 46.45),
    ]


def test_lines_that_only_the_query_varies_are_seen_over_all_answers():
    """The third answer's lex lines are one; "lex: jazz history" is an echo and no template."""
    results = [
        result("auth config", "vec: guide to auth config basics\nlex: login\n"),
        result("jazz history /only:vec", "vec: Guide to Jazz history basics\n"),
        result("jazz history", "lex: jazz history\nlex: Miles\nlex: miles\nvec: who was Monk\n"),
        result("bees", "", ""),
    ]
    figures = report.summarize(results, seed=0)["texts"]
    assert figures == pytest.approx(
        {"distinct": 6 / 7, "templates": 2 / 7, "characters": (44 + 34 + 58) / 5}
    )
    # Two samples of one query say the same without being a template.
    again = [result("bees", "vec: how bees dance\n", "vec: how bees dance\n")]
    assert report.text_figures(again)["templates"] == 0
    assert report.text_figures([result("bees", "")]) == {
        "distinct": 0,
        "templates": 0,
        "characters": 0,
    }


def test_nothing_is_unseen_when_all_was_trained_on():
    summary = report.summarize([result("auth config", GOOD, trained_on=True)], seed=0)
    assert summary["unseen"] is None
    leaks = {"checked": ["sft"], "unknown": [], "queries": ["auth config"]}
    text = report.format_summary(summary, leaks)
    assert "1 of these queries were trained on" in text and "without them" not in text


def test_the_first_lines_tell_what_decides():
    results = [result("auth config", GOOD), result("tls", "no lines here", trained_on=True)]
    summary = report.summarize(results, seed=0)
    leaks = {"checked": ["outputs/sft"], "unknown": [], "queries": ["tls"]}
    head = report.format_summary(summary, leaks).split("\n")[:6]
    assert head[0] == "average  46.5 %  (95 % interval 0.0 to 92.9), 2 queries"
    assert head[1] == "ratings  Excellent 1  Good 0  Acceptable 0  Poor 0  Failed 1"
    assert head[2].startswith("QMD      would keep 2.00 lines a query (66.7% of them)")
    assert head[2].endswith("fall back to the raw query for 50.0%")
    assert "1 of these queries were trained on" in head[3] and head[4].strip() == "tls"
    assert head[5].strip() == "without them 92.9 %  (95 % interval 92.9 to 92.9)"


@pytest.mark.parametrize(
    ("leaks", "expected"),
    [
        (NO_LEAKS, "unknown: without an adapter"),
        (NO_LEAKS | {"checked": ["a/sft"]}, "none of these queries was trained on, says a/sft"),
        (NO_LEAKS | {"unknown": ["a/sft"]}, "unknown for a/sft: it has no queries.json"),
    ],
)
def test_what_is_known_of_leaks(leaks, expected):
    assert expected in report.format_leaks({"unseen": None}, leaks)


def test_of_many_leaks_the_first_are_named():
    queries = [f"query {i}." for i in range(50)]
    leaks = {"checked": ["a"], "unknown": [], "queries": queries}
    text = report.format_leaks({"unseen": None}, leaks)
    assert "50 of these queries" in text and "query 19." in text and "query 20." not in text


def test_a_sample_shows_what_qmd_does_and_no_control_characters():
    text = report.format_sample(
        "auth config", measure("auth config", "lex: auth\x1b[31m\nvec: no\n")
    )
    assert "  keeps  lex: auth\ufffd[31m\n  drops  vec: no\n" in text
    assert "vec line is too short" in text


def test_lines_match_one_to_one_the_closest_first():
    # {a b c} with {a b c} is 1, with {a b} 2/3; the second line is left only {a b}: 1/3 of {a d}.
    assert match_lines(["a b c", "a d"], ["a b", "a b c"], 0.5) == 1
    assert match_lines(["a b c", "a d"], ["a b", "a b c"], 0.3) == 2
    assert match_lines(["a b", "a b"], ["a b"], 0.5) == 1
    assert match_lines(["Auth, config!"], ["auth config"], 1.0) == 1
    assert match_lines([], ["a"], 0.0) == match_lines(["a"], [], 0.0) == 0


def test_golden_figures():
    """lex: 1 of our 2 matches 1 of 1. vec: 1 of 1 (Jaccard 3/8 = 0.375) matches 1 of 2. hyde: none
    of 0, 1 wanted. All: 2 matched, 3 ours, 4 wanted: precision 2/3, recall 1/2, F1 4/7."""
    ours = "lex: auth settings\nlex: cookie jar\nvec: how to set up auth here\n"
    wanted = [
        ("hyde", "Edit the file."),
        ("lex", "auth settings file"),
        ("vec", "how to configure auth"),  # {how to set up auth here}: 3 of 7 words
        ("vec", "where is it"),
    ]
    figures = compare_golden([result("auth config", ours)], [wanted])
    assert figures["queries"] == 1
    assert figures["types"]["lex"] == pytest.approx({"precision": 0.5, "recall": 1.0, "f1": 2 / 3})
    assert figures["types"]["vec"] == pytest.approx({"precision": 1.0, "recall": 0.5, "f1": 2 / 3})
    assert figures["types"]["hyde"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert figures["types"]["all"] == pytest.approx(
        {"precision": 2 / 3, "recall": 0.5, "f1": 4 / 7}
    )


@pytest.mark.parametrize(
    ("kind", "ours", "wanted", "matches"),
    [
        ("lex", "a b", "a b c d", True),  # 2/4 = 0.5
        ("lex", "a b x", "a b c d", False),  # 2/5
        ("vec", "a b c d", "a b e f", False),  # 2/6 < 0.35
        ("vec", "a b c d", "a b c e f g h", True),  # 3/8 = 0.375
        ("hyde", "a b c", "a d", True),  # 1/4 = 0.25
        ("hyde", "a b c", "a d e", False),  # 1/5
    ],
)
def test_each_type_has_its_own_threshold(kind, ours, wanted, matches):
    figures = compare_golden([result("q", f"{kind}: {ours}\n")], [[(kind, wanted)]])
    assert figures["types"][kind]["f1"] == float(matches)
