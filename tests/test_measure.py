"""measure.py: flags, summaries and golden matching against figures worked out by hand."""

import pytest

from expander.eval.golden import THRESHOLDS
from expander.eval.measure import (
    FLAGS,
    Expansion,
    compare_golden,
    match_lines,
    measure,
    measure_all,
    result_of,
    summarize,
    text_figures,
)

GOOD = (  # 130 of 140: 92.9 %
    "hyde: Set the auth provider and the signing key in config.yaml, then restart the server.\n"
    "lex: auth settings file\nlex: login config options\n"
    "vec: how to configure user authentication\nvec: where are the sign-in settings stored\n"
)


def result(query: str, *texts: str, category: str | None = None, trained_on: bool = False) -> dict:
    entry = result_of(query, category, [measure(query, text) for text in texts])
    return entry | {"trained_on": trained_on}


def test_a_good_expansion_has_no_flag_but_valid():
    sample = measure("auth config", GOOD)
    assert [flag for flag in FLAGS if sample[flag]] == ["valid"]
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
    assert {flag for flag in FLAGS if sample[flag]} == flags


def test_summary_of_two_queries():
    """92.9 % and the mean of 92.9 % and 0 %: a query with two samples counts as one query."""
    broken = "I cannot help with that.\n"
    summary = summarize(
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


def test_lines_that_differ_only_in_the_query_count_as_templates():
    """ "lex: Miles" and "lex: miles" count as one; "lex: jazz history" is an echo, not a template."""
    results = [
        result("auth config", "vec: guide to auth config basics\nlex: login\n"),
        result("jazz history /only:vec", "vec: Guide to Jazz history basics\n"),
        result("jazz history", "lex: jazz history\nlex: Miles\nlex: miles\nvec: who was Monk\n"),
        result("bees", "", ""),
    ]
    figures = summarize(results, seed=0)["texts"]
    assert figures == pytest.approx(
        {"distinct": 6 / 7, "templates": 2 / 7, "characters": (44 + 34 + 58) / 5}
    )
    # Two samples of one query may share a line: that is not a template.
    again = [result("bees", "vec: how bees dance\n", "vec: how bees dance\n")]
    assert text_figures(again)["templates"] == 0
    assert text_figures([result("bees", "")]) == {
        "distinct": 0,
        "templates": 0,
        "characters": 0,
    }


def test_lines_match_one_to_one_closest_first():
    # {a b c} with {a b c} is 1, with {a b} 2/3; the second line is left only {a b}: 1/3 of {a d}.
    assert match_lines(["a b c", "a d"], ["a b", "a b c"], 0.5) == [(0, 1)]
    assert match_lines(["a b c", "a d"], ["a b", "a b c"], 0.3) == [(0, 1), (1, 0)]
    assert match_lines(["a b", "a b"], ["a b"], 0.5) == [(0, 0)]
    assert match_lines(["Auth, config!"], ["auth config"], 1.0) == [(0, 0)]
    assert match_lines([], ["a"], 0.0) == match_lines(["a"], [], 0.0) == []


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
    figures = compare_golden(
        [result("auth config", ours), result("tls", "")], {"auth config": wanted}, THRESHOLDS
    )
    assert figures["queries"] == 1
    assert {tuple(x["lines"] + x["reference"]) for x in figures["mismatches"]} == {
        ("cookie jar",),
        ("where is it",),
        ("Edit the file.",),
    }
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
    lines = f"{kind}: {ours}\n"
    figures = compare_golden([result("q", lines)], {"q": [(kind, wanted)]}, THRESHOLDS)
    assert figures["types"][kind]["f1"] == float(matches)


def test_all_queries_are_measured_with_their_samples():
    queries = [("auth config", "docs"), ("tls", None)]
    expansions = [[Expansion(GOOD)], [Expansion("lex: tls keys\n"), Expansion("lex: t", True)]]
    first, second = measure_all(queries, expansions)
    assert first == result("auth config", GOOD, category="docs")
    assert second["samples"] == [measure("tls", "lex: tls keys\n"), measure("tls", "lex: t", True)]
