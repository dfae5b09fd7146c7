"""QMD's search: expressions and fusion by hand, the full-text index, the lists of a hybrid search."""

from math import log

import pytest

from expander.retrieval.collection import Document
from expander.retrieval.index import (
    CANDIDATES,
    FullTextIndex,
    Searcher,
    fts_query,
    fuse,
    searched_lines,
    space_cjk,
    strong_signal,
)


@pytest.mark.parametrize(
    ("line", "expression"),
    [
        ("boiler service", '"boiler"* AND "service"*'),
        ("  Boiler\tSERVICE ", '"boiler"* AND "service"*'),
        ("what's new?", '"what\'s"* AND "new"*'),
        ("snake_case()", '"snake_case"*'),
        ("c++ & c#", '"c"* AND "c"*'),
        ("Übergröße NAÏVE", '"übergröße"* AND "naïve"*'),
        ("ΟΔΟΣ", '"οδος"*'),  # the last sigma is the final one
        ("cafe\u0301", '"cafe"*'),  # a combining accent is no letter
        ("", None),
        ("?! …", None),
        # phrases
        ('"red bicycle" lights', '"red bicycle" AND "lights"*'),
        ('lights"red bicycle"', '"lights"* AND "red bicycle"'),
        ('"Never closed', '"never closed"'),
        ('"" "!?"', None),
        ('"release 3.14 e-mail"', '"release 3 14 email"'),
        # compounds
        ("multi-agent memory", '"multi agent" AND "memory"*'),
        ("DEC-0054", '"dec 0054"'),
        ("low-cost-", '"low cost"'),
        ("a--b", '"a b"'),
        ("half-_x", '"half_x"*'),  # an underscore does not make a compound
        ("3.14.0", '"3"* AND "14"* AND "0"*'),
        ("setup.py", '"setup"* AND "py"*'),
        ("v1.", '"v1"*'),
        ("...", None),
        # negation
        ("performance -sports", '"performance"* NOT "sports"*'),
        ('bank -"river bank" -2.0', '"bank"* NOT "river bank" NOT ("2"* AND "0"*)'),
        ("-draft", None),
        ("x - y", '"x"* AND "y"*'),
        ("--force git", '"git"* NOT "force"*'),
        # CJK
        ("東京タワー", '"東 京 タ ワ ー"'),
        ("Git設定 commit", '"git 設 定" AND "commit"*'),
        ("東京-大阪", '"東京 大阪"'),  # a compound is not spaced, so it finds nothing
        ("한국어 -日本", '"한 국 어" NOT "日 本"'),
        ("\ufeffbom\u3000space", '"bom"* AND "space"*'),  # JavaScript's white space
        ("unit\x1cseparator", '"unitseparator"*'),  # which JavaScript does not split at
    ],
)
def test_an_expression_is_qmds(line, expression):
    assert fts_query(line) == expression


def test_every_expression_is_valid_for_sqlite():
    index = FullTextIndex([Document("a", "", "NEAR the AND gate OR not")])
    for line in ("NEAR AND gate", "NOT or", "a*b^c:d", "{x} (y)", "' ''", "near'"):
        index.search(fts_query(line) or '"gate"')


def test_cjk_characters_are_spaced_apart_and_from_others():
    assert space_cjk("Git設定ー2 한글") == "Git 設 定 ー2  한 글 "
    assert space_cjk("nothing to do") == "nothing to do"


# Fusion


def test_fusion_by_hand():
    fused = fuse([["a", "b", "c", "d"], ["b"], []], [2, 1, 2])
    assert [document for document, _ in fused] == ["b", "a", "c", "d"]
    assert dict(fused) == pytest.approx(
        {
            "b": 2 / 62 + 1 / 61 + 0.05,
            "a": 2 / 61 + 0.05,
            "c": 2 / 63 + 0.02,
            "d": 2 / 64,
        },
        abs=1e-12,
    )


def test_the_bonus_is_for_the_best_rank_and_given_once():
    fused = dict(fuse([["x", "y"], ["x", "y"]], [1, 1]))
    assert fused["x"] == pytest.approx(2 / 61 + 0.05)
    assert fused["y"] == pytest.approx(2 / 62 + 0.02)


def test_equal_scores_keep_the_order_of_first_appearance():
    assert [d for d, _ in fuse([["z"], ["a"], ["m"]], [1, 1, 1])] == ["z", "a", "m"]


def test_a_wrong_first_line_outranks_the_fourth_of_both_original_lists():
    fused = dict(fuse([["a", "b", "c", "right"], ["d", "e", "f", "right"], ["wrong"]], [2, 2, 1]))
    assert fused["wrong"] == pytest.approx(0.0664, abs=1e-4)
    assert fused["right"] == pytest.approx(0.0625)


def test_fusion_wants_one_weight_for_each_list():
    with pytest.raises(ValueError):
        fuse([["a"]], [1, 2])


@pytest.mark.parametrize(
    ("scores", "strong"),
    [
        ([], False),
        ([0.85], True),
        ([0.8499], False),
        ([0.86, 0.71], True),
        ([0.86, 0.72], False),
        ([0.95, 0.5, 0.4], True),
    ],
)
def test_a_strong_signal_is_high_and_clear(scores, strong):
    assert strong_signal(scores) is strong


# Full text


def test_the_score_is_bm25_with_qmds_weights():
    # Three documents of three words: length does not matter, and idf = ln((3 - 1 + .5) / (1 + .5)).
    index = FullTextIndex(
        [
            Document("in text", "one", "boiler two"),
            Document("in title", "radiator", "three four"),
            Document("in path", "five", "six", "sauna"),
        ]
    )
    idf = log(2.5 / 1.5)
    for word, weight in (("boiler", 1.0), ("radiator", 4.0), ("sauna", 1.5)):
        bm25 = idf * weight * 2.2 / (weight + 1.2)
        ((document, score),) = index.search(f'"{word}"*')
        assert document == {"boiler": "in text", "radiator": "in title", "sauna": "in path"}[word]
        assert score == pytest.approx(bm25 / (1 + bm25), rel=1e-6)


def test_search_stems_matches_prefixes_and_excludes():
    searcher = Searcher(
        [
            Document("run", "Running shoes", "for the mountains"),
            Document("cat", "Cats", "catalogue of shoes"),
            Document("jp", "旅行", "東京タワーへ行った"),
        ]
    )

    def found(line):
        return {document for document, _ in searcher.hits(line)}

    assert found("runs") == {"run"}
    assert found("catal") == {"cat"}
    assert found('"catal"') == set()
    assert found("shoes -mountain") == {"cat"}
    assert found("shoes holiday") == set()  # terms are ANDed
    assert found("京タワ") == {"jp"}
    assert found("京行") == set()
    assert searcher.frequency("shoe") == 2
    assert searcher.frequency("-shoe") == 0


def test_a_list_has_at_most_20_documents():
    searcher = Searcher([Document(str(n), "", "same words") for n in range(30)])
    assert [document for document, _ in searcher.hits("words")] == [str(n) for n in range(20)]


# The lines of an expansion


def test_lines_equal_to_the_query_are_not_searched_again():
    text = "hyde: sync happens\nlex: sync\nvec: Sync\nlex: calendar sync\nnote: sync"
    assert searched_lines("sync", text) == [
        ("hyde", "sync happens"),
        ("vec", "Sync"),
        ("lex", "calendar sync"),
    ]


def test_an_expansion_without_a_kept_line_becomes_qmds_own_hyde_line():
    assert searched_lines("sync", "lex: calendar") == [("hyde", "Information about sync")]
    assert searched_lines("sync", "") == [("hyde", "Information about sync")]
    assert searched_lines("sync", "lex: sync") == []  # one was kept


class Vectors:
    """Answers by a table, and counts what it is asked."""

    def __init__(self, lists):
        self.lists, self.asked = lists, []

    def nearest(self, texts):
        self.asked += texts
        return [self.lists.get(text, []) for text in texts]


def test_a_hybrid_search_weighs_the_query_twice_and_searches_each_line_once():
    documents = [Document(name, "", text) for name, text in (("a", "red"), ("b", "blue"))]
    vectors = Vectors({"red": ["c", "a"], "what is red": ["d"], "red is": ["c"]})
    searcher = Searcher(documents, vectors)
    lines = [("hyde", "red is"), ("lex", "blue"), ("lex", "nothing"), ("vec", "what is red")]
    expected = fuse([["a"], ["b"], [], ["c", "a"], ["c"], ["d"]], [2, 1, 1, 2, 1, 1])
    for _ in range(2):
        assert searcher.search("red", lines) == [document for document, _ in expected]
    assert vectors.asked == ["red", "red is", "what is red"]


def test_without_vectors_only_full_text_counts():
    searcher = Searcher([Document("a", "", "red"), Document("b", "", "blue")])
    assert searcher.search("red", [("vec", "blue"), ("lex", "blue")]) == ["a", "b"]
    assert searcher.nearest("red") == []


def test_a_search_ends_with_the_candidates_for_the_reranker():
    vectors = Vectors({str(n): [f"{n}-{rank}" for rank in range(20)] for n in range(4)})
    searcher = Searcher([Document("a", "", "x")], vectors)
    assert len(searcher.search("0", [("vec", str(n)) for n in (1, 2, 3)])) == CANDIDATES


def test_a_query_that_full_text_is_sure_of_is_not_expanded():
    others = [Document(str(n), "", "some other words here") for n in range(5000)]
    searcher = Searcher([Document("mail", "zeppelin", "zeppelin " * 3), *others])
    assert searcher.skips_expansion("zeppelin")
    assert not searcher.skips_expansion("words")
    assert not searcher.skips_expansion("absent")
