"""SCORING.md: every worked example against reward.py."""

import re
from pathlib import Path

import pytest

from reward import SELF_TEST_KEYS, score_expansion, score_expansion_detailed

DOC = Path(__file__).parents[1] / "SCORING.md"
EXAMPLE = re.compile(
    r"^```example\nquery: (?P<query>.+)\n(?P<expansion>(?:(?!=> ).*\n)*)"
    r"=> (?P<figures>.+)\n(?P<deductions>(?:- .+\n)*)```$",
    re.MULTILINE,
)
EXAMPLES = list(EXAMPLE.finditer(DOC.read_text(encoding="utf-8")))


def test_every_example_is_found():
    opened = DOC.read_text(encoding="utf-8").count("```example")
    assert opened == len(EXAMPLES) >= 10


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda match: match["query"])
def test_example(example):
    query, expansion = example["query"], example["expansion"]
    result = score_expansion_detailed(query, expansion)
    figures = [f"{key} {result[key]}" for key in SELF_TEST_KEYS]
    figures.append(f"score {score_expansion(query, expansion):.3f}")
    assert example["figures"] == ", ".join(figures)
    assert re.findall("^- (.+)$", example["deductions"], re.MULTILINE) == result["deductions"]
