"""dataset/generate_data_offline.py and dataset/rules.py: rows from questions, titles and passages."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dataset import generate_data_offline
from dataset.rules import facts, lex_lines, make_row, new_terms, paraphrase, sentences
from expander import cli
from expander.prompt import render_lines
from expander.qmd import kept_lines
from expander.rows import load_rows
from reward import score_expansion_detailed

RADIUM = (
    "Radium is a chemical element with the symbol Ra. Marie Curie and her husband Pierre discovered "
    "radium in 1898 in a sample of pitchblende. It was once used in paint. The most stable isotope, "
    "radium-226, has a half-life of 1600 years. Dr. Sabin von Sochocky invented the radium paint in "
    "1908 in New Jersey."
)
TOWER = (
    "The Eiffel Tower was 312 metres tall when it opened and remained the tallest structure in the "
    "world for 41 years. About 5.9 million people go up the Eiffel Tower every year. It was built "
    "between 1887 and 1889."
)
ROWS = [
    ("Who discovered radium in pitchblende?", RADIUM, ["Marie Curie"]),
    ("What is the half-life of radium-226?", RADIUM, ["1600 years"]),
    ("How tall was the Eiffel Tower when it opened?", TOWER, ["312 metres"]),
    ("How many people go up the Eiffel Tower every year?", TOWER, ["5.9 million"]),
]


def squad(question: str, passage: str, answers: list[str]) -> dict:
    return {"question": question, "context": passage, "answers": {"text": answers}}


@pytest.fixture
def generate(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """`generate(rows, *flags)`: the command on rows → out.jsonl; (exit code, its output)."""

    def generate(rows: list, *flags: str, output: str = "out.jsonl") -> tuple[int, str]:
        source = tmp_path / "source.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        command = ["generate_data_offline.py", str(source), "-o", str(tmp_path / output), *flags]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            cli.run(generate_data_offline.main)
        captured = capsys.readouterr()
        return ended.value.code, captured.out + captured.err

    return generate


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_question_becomes_a_row():
    row = make_row(*ROWS[0], min_score=80).example
    assert row.query == "discovered radium pitchblende"
    assert row.lines == (
        (
            "hyde",
            "Marie Curie and her husband Pierre discovered radium in 1898 in a sample of pitchblende.",
        ),
        ("lex", "discovered radium Marie Curie"),
        ("lex", "radium pitchblende Pierre"),
        ("vec", "Who discovered radium in pitchblende?"),
        ("vec", "Tell me who discovered radium in pitchblende"),
    )


def test_a_title_becomes_a_row():
    row = make_row("Radium", RADIUM, [], min_score=80).example
    assert (row.query, row.lines[1]) == ("Radium", ("lex", "Radium Marie Curie"))
    assert row.lines[-1] == ("vec", "Radium is a chemical element with the symbol Ra.") or (
        ("vec", "Radium is a chemical element with the symbol Ra.") in row.lines
    )


def test_every_row_passes_the_rubric_and_qmds_filter(generate, tmp_path):
    code, out = generate([squad(*row) for row in ROWS])
    assert code == 0 and "out.jsonl: 4 rows, mean score" in out
    assert "4 rows read; question, passage, answer: question, context, answers.text" in out
    loaded = load_rows(str(tmp_path / "out.jsonl")).train
    for example in loaded:
        text = render_lines(example.lines)
        score = score_expansion_detailed(example.query, text)
        assert score["percentage"] >= 80
        kinds = [kind for kind, _ in example.lines]
        assert kinds[0] == "hyde" and {"lex", "vec"} <= set(kinds) and kinds.count("hyde") == 1
        assert len(kept_lines(example.query, text)) == len(example.lines)
        hyde = example.lines[0][1]
        assert 50 <= len(hyde) <= 200 and (hyde in RADIUM or hyde in TOWER)
        kept = " ".join(value for kind, value in example.lines if kind != "hyde").lower()
        assert all(entity in kept for entity in score["entities_detected"])


def test_the_result_is_deterministic(generate, tmp_path):
    rows = [squad(*row) for row in ROWS]
    assert generate(rows, output="one.jsonl")[0] == generate(rows, output="two.jsonl")[0] == 0
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_dropped_rows_are_counted_by_reason(generate, tmp_path):
    code, out = generate(
        [
            *(squad(*row) for row in ROWS[:2]),
            squad("who discovered Radium in  pitchblende", RADIUM, ["Marie Curie"]),
            squad("How is it?", RADIUM, ["1898"]),
            squad("When was the Eiffel Tower built?", TOWER, ["between 1887"]),
            squad("What is unanswerable radium?", RADIUM, []),
            squad("", RADIUM, ["1898"]),
        ]
    )
    assert code == 0 and "7 rows read" in out and "out.jsonl: 2 rows" in out
    assert "2 dropped: no text in a column" in out
    assert "1 dropped: the question has no keywords or more than 8" in out
    assert "1 dropped: another row has its query or its hyde line" in out
    # Its answer is in "It was built …", which does not make sense alone.
    assert "1 dropped: no sentence of 50-200 characters that states a fact" in out


def test_min_score_decides_which_rows_are_kept(generate):
    row = ("Where was radium paint invented by Sabin von Sochocky?", RADIUM, ["New Jersey"])
    reached = make_row(*row, min_score=0).score
    assert make_row(*row, min_score=reached).example
    missed = make_row(*row, min_score=reached + 0.5)
    assert missed.example is None and missed.reason.startswith("score under ")
    code, out = generate([squad(*ROWS[0])], "--min-score", "100.5")
    assert code == 2 and "none of 1 rows can be used: {'score under 100.5': 1}" in out


def test_evaluation_queries_are_dropped(generate):
    passage = "Kafka 2.3 brought static membership, which spares a consumer group the rebalance."
    question = "What is Kafka consumer group rebalance static membership?"
    code, out = generate([squad(question, passage, ["2.3"]), squad(*ROWS[0])])
    assert code == 0 and "1 dropped: near an evaluation query" in out


def test_columns_can_be_named(generate):
    rows = [{"id": 1, "ask": {"q": ROWS[0][0]}, "hits": [{"no": 1}, RADIUM], "query": None}]
    flags = ("--question", "ask.q", "--passage", "hits")
    assert generate(rows, *flags)[0] == 0
    code, out = generate(rows, output="b.jsonl")
    assert code == 2 and "no column for --question: tried ['question', 'query', 'title']" in out
    code, out = generate(rows, *flags, "--answer", "nowhere", output="b.jsonl")
    assert code == 2 and "no column for --answer: tried ['nowhere']" in out


def test_max_rows_takes_a_sample_of_the_whole_set(generate, tmp_path):
    rows = [
        squad(f"Who discovered radium in mine {n}?", f"Mine {n}: {name} discovered radium in a "
              f"sample from mine {n} in the year {1900 + n}.", [name])
        for n, name in enumerate(["Ada", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal"] * 5)
    ]  # fmt: skip
    code, out = generate(rows, "--max-rows", "5")
    assert code == 0, out
    found = [int(row["query"].split()[-1]) for row in lines(tmp_path / "out.jsonl")]
    assert code == 0 and "out.jsonl: 5 rows" in out and len(found) == 5
    assert max(found) >= 20 and found != sorted(found)


@pytest.mark.parametrize(
    ("question", "clause"),
    [
        ("How do I feed a sourdough starter?", "how to feed a sourdough starter"),
        ("how to feed a starter", "how to feed a starter"),
        ("How many moons are there around Mars?", "how many moons there are around Mars"),
        ("How tall was the tower when it opened?", "how tall the tower was when it opened"),
        ("Where are the crown jewels kept?", None),
        ("When was the bridge opened?", "when the bridge was opened"),
        ("What is the capital of Peru?", "the capital of Peru"),
        ("Which river flows through Vienna?", "which river flows through Vienna"),
        ("What year did the war end?", None),
        ("Is it raining?", None),
    ],
)
def test_paraphrase(question, clause):
    found = paraphrase(question)
    assert (found is None) == (clause is None)
    assert clause is None or found.endswith(f" {clause}")


def test_sentences_are_split_at_their_ends():
    text = (
        "Mr. A. B. Smith left at 5 p.m. It rained.\nA heading\n“No.” He said (twice.) Then 7 came."
    )
    assert sentences(text)[1:] == [
        "It rained.",
        "A heading",
        "“No.” He said (twice.)",
        "Then 7 came.",
    ]


def test_facts_make_sense_alone():
    assert [x[:20] for x in facts(RADIUM, ["radium"], [])] == [
        "Marie Curie and her ",
        "The most stable isot",
        "Dr. Sabin von Sochoc",
    ]
    assert [x[:8] for x in facts(RADIUM, ["radium"], ["1600 years"])] == ["The most"]
    assert facts(RADIUM, ["radium"], ["once used in paint"]) == []
    assert facts(RADIUM, ["uranium", "radon"], []) == []


def test_lex_lines_keep_names_and_add_new_terms():
    assert lex_lines("tall Eiffel Tower opened", sentences(TOWER)[0]) == [
        '"Eiffel Tower" tall 312 metres',
        "Eiffel Tower 41 years",
    ]
    assert new_terms("Radium was sold by the Radium Corporation.", "radium") == [
        "Corporation",
        "sold",
    ]


def test_a_hub_data_set_is_downloaded(run, hub, hub_root, tmp_path):
    folder = hub_root / "datasets" / "nobody" / "answers"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(squad(*r)) + "\n" for r in ROWS))
    script = "dataset/generate_data_offline.py"
    done = run([script, "nobody/answers", "-o", "rows.jsonl"], cwd=tmp_path, env=hub)
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path / "rows.jsonl")) == 4


def test_an_existing_file_is_not_overwritten(generate, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    code, out = generate([squad(*ROWS[0])])
    assert code == 2 and "out.jsonl already exists" in out
    assert (tmp_path / "out.jsonl").read_text() == "mine"


def test_a_broken_source_is_reported_in_one_line(generate, tmp_path):
    code, out = generate([squad(*ROWS[0]), ["no object"]])
    assert code == 2 and out == f"error: {tmp_path / 'source.jsonl'}:2: not an object\n"
    assert not (tmp_path / "out.jsonl").exists()
