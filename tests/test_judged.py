"""Retrieval as a reward: values of rankings, lines that contribute, and credit per line."""

import json
import math
from types import SimpleNamespace

import ir_measures
import pytest
from ir_measures import nDCG
from settings import section

from expander.config import load_config
from expander.retrieval.collection import Document
from expander.retrieval.index import Searcher
from expander.retrieval.passages import passages
from expander.rows import Example
from expander.train.judged import Judge, by_hit, by_rank, judged_rows, ndcg
from expander.train.loss import grpo_loss, line_advantages
from expander.train.rewards import check_settings, set_rewards
from expander.train.rollout import Rollout, advantages, credit_lines, group_metrics, line_numbers

NOTES = [
    Document("boiler", "", "The heating engineer services the boiler every October."),
    Document("radiator", "", "Bleed the radiator if the heating gurgles."),
    Document("sourdough", "", "Feed the sourdough starter at noon."),
]
QUERY = "heating check"


@pytest.fixture
def judge() -> Judge:
    """Full text only. The bare query finds nothing, since no note has both of its words."""
    judge = Judge("rank", full_text=1.0)
    judge.add(QUERY, Searcher(NOTES), {"boiler": 1})
    return judge


def test_ndcg_is_that_of_ir_measures():
    grades = {"a": 2, "b": 1, "c": 0, "d": 1}
    for ranking in (["b", "x", "a"], ["x", "c"], ["a", "b", "d"], []):
        run = {"q": {document: float(-rank) for rank, document in enumerate(ranking)}}
        [expected] = [x.value for x in ir_measures.iter_calc([nDCG @ 10], {"q": grades}, run)] or [
            0.0
        ]
        assert ndcg(ranking, grades, 10) == pytest.approx(expected)


def test_values_by_rank_and_by_hit():
    far = [str(n) for n in range(14)] + ["a"]  # rank 15: within the reranker's 40, not the first 10
    assert by_rank(["a"], {"a": 1}) == 1.0
    assert by_rank(far, {"a": 1}) == pytest.approx(0.5 / math.log2(16))
    assert by_hit(["x", "a"], {"a": 1, "x": 0}) == 1.0
    assert by_hit(far, {"a": 1}) == 0.0


def test_a_line_contributes_what_the_search_would_lose_without_it(judge):
    text = "lex: heating boiler\nlex: heating gurgles\nlex: heating unicorn\nlex: cosy\n"
    found = judge.find(QUERY, text)
    # Both hits are first in their lists: equal scores, in the order of the lines.
    assert found.gain == 1.0
    assert judge.contributions(QUERY, text) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert found.lex_without_hit == pytest.approx(1 / 3)  # "cosy" is dropped, not searched with
    swapped = "lex: heating gurgles\nlex: heating boiler\n"
    second = 1 / math.log2(3)
    assert judge.find(QUERY, swapped).gain == pytest.approx(second)
    assert judge.contributions(QUERY, swapped) == pytest.approx([second - 1.0, second, 0.0])


def test_a_completion_without_kept_lines_gains_nothing(judge):
    for text in ("", "\n", "lex: cosy\n", f"lex: {QUERY}\n", "Sure!"):
        found = judge.find(QUERY, text)
        assert (found.gain, found.lex_without_hit) == (0.0, 0.0)
        assert set(judge.contributions(QUERY, text)) == {0.0}


def test_half_of_the_value_may_be_of_the_search_without_vectors():
    nearest = SimpleNamespace(
        embedder=SimpleNamespace(name="planted"), nearest=lambda texts: [["boiler"] for _ in texts]
    )
    judge = Judge("rank", full_text=0.5)
    judge.add(QUERY, Searcher(NOTES, nearest), {"boiler": 1})
    assert judge.bare() == 0.5  # found by vectors, not by words
    assert judge.find(QUERY, "lex: heating boiler\n").gain == 0.5


def test_unjudged_documents_are_left_out_of_pools():
    judge = Judge("rank", full_text=1.0)
    judge.add(QUERY, Searcher(NOTES), {"boiler": 1}, judged_only=True)
    assert judge.find(QUERY, "lex: heating gurgles\nlex: heating boiler\n").gain == 1.0


def test_the_reward_is_the_gain_on_a_floor_of_form(judge):
    settings = section("grpo", reward="retrieval")
    weights = settings.retrieval
    text = (
        "hyde: The heating engineer comes once a year, in October as a rule.\nlex: heating boiler\n"
    )
    rollouts = [
        Rollout(QUERY, [1], [2], True, text),
        Rollout(QUERY, [1], [2], True, "lex: heating\n"),
    ]
    set_rewards(rollouts, settings, judge)
    good = rollouts[0]
    penalties = sum(
        getattr(settings.penalties, name) * amount for name, amount in good.penalties.items()
    )
    assert good.finding.gain == 1.0
    assert good.reward == pytest.approx(
        weights.rubric * min(good.rubric, weights.rubric_cap) + weights.gain - penalties
    )
    metrics = group_metrics(rollouts, 2)
    assert metrics["rewards/gain"] == pytest.approx(sum(r.finding.gain for r in rollouts) / 2)
    assert metrics["rewards/gain_better"] == 1.0
    assert metrics["rewards/lex_without_hit"] == 0.0


def test_line_credit_needs_the_retrieval_reward():
    check_settings(section("grpo", reward="retrieval", credit="line"))
    with pytest.raises(ValueError, match=r"grpo\.credit line needs grpo\.reward retrieval"):
        check_settings(section("grpo", reward="percentage", credit="line"))


# Credit by line


class Words:
    """A tokenizer whose ids index a list of words."""

    words = ("lex:", " boiler", "\n", " check.\n", "vec:", "<end>")

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


def test_each_token_belongs_to_the_line_that_it_is_in():
    assert line_numbers([0, 1, 2, 0, 3, 4, 1], Words()) == [0, 0, 0, 1, 1, 2, 2]
    assert line_numbers([], Words()) == []


def test_line_advantages_by_hand():
    # The deviation turns contributions into units of the advantage; the end token has no line.
    found = line_advantages(0.5, [0.2, -0.1], [0, 0, 1, 2], 0.2 - 1e-4)
    assert found == pytest.approx([1.5, 1.5, 0.0, 0.5])
    assert line_advantages(0.5, [0.2], [0, 0], 0.0) == [0.5, 0.5]


def test_credit_moves_only_the_tokens_of_the_line(judge):
    tokens = [0, 1, 2, 0, 3, 5]  # two lines and the end token
    text = "lex: heating boiler\nlex: heating gurgles\n"
    rollouts = [Rollout(QUERY, [1], tokens, True, text), Rollout(QUERY, [1], [5], True, "")]
    set_rewards(rollouts, section("grpo", reward="retrieval"), judge)
    credit_lines(rollouts, Words(), judge, weight=2.0)
    first = rollouts[0].line_advantages
    assert first[0] == first[1] == first[2] > 0
    assert first[3:] == [rollouts[0].advantage] * 3
    assert rollouts[1].line_advantages == [rollouts[1].advantage]
    assert advantages(rollouts, 6).shape == (2, 6)


def test_one_advantage_per_token_gives_the_loss_of_one_per_completion():
    import mlx.core as mx

    logps, mask = mx.random.normal((2, 3)), mx.array([[1, 1, 1], [1, 1, 0]])
    by_row, _ = grpo_loss(logps, mask, mx.array([1.0, -0.5]))
    by_token, _ = grpo_loss(logps, mask, mx.array([[1.0] * 3, [-0.5] * 3]))
    assert by_row.item() == pytest.approx(by_token.item())
    moved, _ = grpo_loss(logps, mask, mx.array([[1.0, 1.0, 2.0], [-0.5, -0.5, 9.0]]))
    assert moved.item() == pytest.approx(by_row.item() - 1 / 5)  # padding does not count


# What is judged


def test_passages_of_rows():
    rows = [
        Example("a", (("hyde", "One."), ("lex", "a b"))),
        Example("b", (("hyde", "Two."),), passage="A whole note."),
        Example("c", (("lex", "c"),), passage="A whole note."),
        Example("d", (("lex", "d"),)),
        Example("e /only:hyde", (("hyde", "Three."),)),
    ]
    documents, grades = passages(rows)
    assert [document.text for document in documents] == ["One.", "A whole note."]
    assert grades == {"a": {"0": 1}, "b": {"1": 1}, "c": {"1": 1}}


def settings(tmp_path, *more):
    return load_config("grpo", None, ["grpo.reward=retrieval", *more])[0]


def test_rows_without_a_passage_and_clear_queries_are_left_out_and_counted(tmp_path, capsys):
    rows = [
        {"query": f"note {n}", "output": [["hyde", f"Word{n} is in this passage."]]}
        for n in range(80)
    ]
    rows.append({"query": "no passage", "output": [["lex", "passage"]]})
    rows.append({"query": "xylophone", "output": [["hyde", "xylophone " * 9]]})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found, judge = judged_rows(
        settings(tmp_path, f"dataset.name={path}", "grpo.retrieval.embedder=none")
    )
    said = capsys.readouterr().out
    assert "1 without a judged document, 1 that QMD would not expand" in said
    queries = [example.query for example in found.train + found.validation]
    assert len(queries) == 80 and all(query in judge for query in queries)


def test_queries_of_collections(tmp_path, capsys):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": d.id, "title": "", "text": d.text} for d in NOTES]
    queries = [{"_id": f"q{n}", "text": f"heating {n}"} for n in range(10)]
    for name, lines in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    judged = [f"q{n}\tboiler\t1" for n in range(9)]
    (folder / "qrels" / "train.tsv").write_text("\n".join(["query\tdocument\tscore", *judged]))
    config = settings(
        tmp_path, f"grpo.retrieval.collections=[{folder}]", "grpo.retrieval.embedder=none"
    )
    rows, judge = judged_rows(config)
    assert len(rows.train) + len(rows.validation) == 9
    assert "left out: 1 without a judged document" in capsys.readouterr().out
    assert judge.find("heating 3", "lex: heating boiler\n").gain == 1.0


def test_nothing_to_judge_is_one_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"query": "a", "output": [["lex", "b"]]}))
    with pytest.raises(ValueError, match="no query is left to train on"):
        judged_rows(settings(tmp_path, f"dataset.name={path}", "grpo.retrieval.embedder=none"))
