"""reward.py: cases worked out by hand, random text, the TRL interface and the command."""

import json
import random
import re
import sys
from pathlib import Path

import pytest

import reward
from expander.prompt import render_prompt, user_message
from reward import (
    PARTS,
    QMDRewardFunction,
    extract_named_entities,
    only_mode,
    parse_expansion,
    score_expansion,
    score_expansion_detailed,
)

# Cases scored by the original rubric. The file is too large to include; it is checked if present.
GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "reward_cases.jsonl"

QUERY = "auth config"  # no entities, two key terms
HYDE = "hyde: Set the auth provider and the signing key in config.yaml, then restart the server."
LEX = "lex: auth settings file"
VEC = "vec: how to configure user authentication"
VEC_B = "vec: where are the sign-in settings stored"
NAMED = "AWS Lambda timeout"  # entities aws, lambda (a name inside) and timeout (follows a name)
NAMED_LEX = "lex: AWS Lambda maximum duration timeout"
NAMED_VEC = "vec: how to raise the time limit of a Lambda function"


def score(query: str, *lines: str) -> dict:
    return score_expansion_detailed(query, "\n".join(lines))


# Test id: (query, lines, figures to check, deductions)
NORMAL = {
    "no fault": (
        QUERY, [HYDE, LEX, "lex: login config options", VEC, VEC_B],
        {"format": 30, "diversity": 30, "hyde": 20, "quality": 20, "entity": 10, "think_bonus": 20,
         "total": 130, "max_possible": 140, "percentage": 92.9, "rating": "Excellent", "valid": True}, [],
    ),
    "no hyde lowers the maximum": (
        QUERY, [LEX, VEC], {"hyde": 0, "total": 110, "max_possible": 120, "percentage": 91.7}, [],
    ),
    "every part full": (
        NAMED, [HYDE, NAMED_LEX, NAMED_VEC],
        {"entity": 20, "total": 140, "max_possible": 140, "percentage": 100.0}, [],
    ),
    "no vec": (
        QUERY, [LEX],
        {"format": 20, "diversity": 15, "quality": 10, "total": 75, "percentage": 62.5},
        ["no vec line"],
    ),
    "no lex": (
        QUERY, [VEC], {"format": 20, "diversity": 15, "quality": 10, "total": 75}, ["no lex line"],
    ),
    "two lex without vec": (
        QUERY, [LEX, "lex: login config options"], {"diversity": 20}, ["no vec line"],
    ),
    "empty": (
        QUERY, [],
        {"format": 10, "diversity": 15, "hyde": 0, "quality": 5, "entity": 10, "think_bonus": 20,
         "total": 60, "max_possible": 120, "percentage": 50.0, "rating": "Acceptable",
         "valid": True},
        ["no lex line", "no vec line"],
    ),
    "contained lines": (
        QUERY, ["lex: auth settings", LEX, "lex: new auth settings file", VEC],
        {"diversity": 25},
        ['two lex lines say the same: "auth settings" and "auth settings file"',
         'two lex lines say the same: "auth settings" and "new auth settings file"',
         'two lex lines say the same: "auth settings file" and "new auth settings file"'],
    ),
    "lines equal but for case": (
        QUERY, [LEX, VEC, "vec: How To Configure USER Authentication"], {"diversity": 28},
        ['two vec lines say the same: "how to configure user authentication" and '
         '"How To Configure USER Authentication"'],
    ),
    "two words apart is enough for a short query": (
        "put my auth settings", ["lex: auth settings", "lex: auth options", VEC],
        {"diversity": 30}, [],
    ),
    "two words apart is not enough for five words": (
        "where to put auth settings", ["lex: auth settings", "lex: auth options", VEC],
        {"diversity": 28}, ['two lex lines say the same: "auth settings" and "auth options"'],
    ),
    "echo by nine characters": (
        QUERY, ["lex: Auth Config settings", VEC],
        {"diversity": 20, "total": 100, "percentage": 50.0, "rating": "Acceptable"},
        ['lex line repeats the query: "Auth Config settings"',
         "percentage held at 50: a lex line repeats the query"],
    ),
    "echo just above the cap": (
        QUERY, ["lex: auth config"], {"diversity": 5, "total": 65, "percentage": 50.0},
        ["no vec line", 'lex line repeats the query: "auth config"',
         "percentage held at 50: a lex line repeats the query"],
    ),
    "no echo by ten characters": (
        QUERY, ["lex: auth config settings1", VEC], {"diversity": 30, "percentage": 91.7}, [],
    ),
    "the words of the query in another order": (
        QUERY, ["lex: config auth", VEC], {"diversity": 30}, [],
    ),
    "echo ignores white space around the query": (
        f"  {QUERY} ", ["lex: auth config", VEC], {"diversity": 20, "percentage": 50.0},
        ['lex line repeats the query: "auth config"',
         "percentage held at 50: a lex line repeats the query"],
    ),
    "echo in vec costs three and caps nothing": (
        QUERY, [LEX, VEC, "vec: the auth config"],
        {"diversity": 27, "quality": 17, "percentage": 86.7},
        ['vec line repeats the query: "the auth config"',
         'vec line is too short for a sentence: "the auth config"'],
    ),
    "echoes cost fifteen at most": (
        QUERY, ["lex: auth config", "lex: my auth config", VEC],
        {"diversity": 10 + 5 + 3 + 5 - 10},
        ['two lex lines say the same: "auth config" and "my auth config"',
         'lex line repeats the query: "auth config"',
         'lex line repeats the query: "my auth config"',
         "percentage held at 50: a lex line repeats the query"],
    ),
    "hyde of 49": (
        QUERY, [f"hyde: {'x' * 49}", LEX, VEC], {"hyde": 17},
        ["hyde has 49 characters: 50-200 wanted"],
    ),
    "hyde of 50": (QUERY, [f"hyde: {'x' * 50}", LEX, VEC], {"hyde": 20}, []),
    "hyde of 200": (QUERY, [f"hyde: {'x' * 200}", LEX, VEC], {"hyde": 20}, []),
    "hyde of 201": (
        QUERY, [f"hyde: {'x' * 201}", LEX, VEC], {"hyde": 15},
        ["hyde has 201 characters: 50-200 wanted"],
    ),
    "only the first hyde counts": (QUERY, [HYDE, "hyde: no", LEX, VEC], {"hyde": 20}, []),
    "repeated words, not short ones nor stop words": (
        QUERY, ["hyde: Sign-in, sign-in, SIGN-IN and this, with this and this token or that token "
                "in ab, ab and ab.", LEX, VEC], {"hyde": 5 + 5 + 5 + 3},
        ['hyde says "sign" 3 times'],
    ),
    "repetition costs five at most": (
        QUERY, ["hyde: token token token token token, and fifty characters are full.", LEX, VEC],
        {"hyde": 15}, ['hyde says "token" 5 times'],
    ),
    "lex longer than vec": (
        QUERY, ["lex: all of the many auth settings in one file", VEC], {"quality": 15},
        ["lex lines are longer than vec lines on average"],
    ),
    "lex as long as vec": (
        QUERY, ["lex: auth file for a team", "vec: how to let a team in"], {"quality": 20}, [],
    ),
    "vec of fifteen characters": (
        QUERY, ["lex: auth file", "vec: sign-in options", VEC], {"quality": 17},
        ['vec line is too short for a sentence: "sign-in options"'],
    ),
    "vec of one long word": (
        QUERY, ["lex: auth file", "vec: authentication-settings"], {"quality": 17},
        ['vec line is too short for a sentence: "authentication-settings"'],
    ),
    "one lex line keeps a key word": (
        QUERY, [LEX, "lex: sign-in options", VEC], {"quality": 17},
        ['lex line keeps no key word of the query: "sign-in options"'],
    ),
    "no lex line keeps a key word": (
        QUERY, ["lex: authconfig", VEC], {"quality": 15},
        ['lex line keeps no key word of the query: "authconfig"'],
    ),
    "a query without key words": ("how to", ["lex: anything goes", VEC], {"quality": 20}, []),
    "filler": (
        QUERY, ["lex: auth overview basics", LEX, VEC], {"quality": 17},
        ['lex line has filler the query does not ask for: "auth overview basics"'],
    ),
    "filler that is asked for": (
        "auth basics", ["lex: auth basics for a team", VEC], {"quality": 20}, [],
    ),
    "filler is asked for as a whole word": (
        "auth, overview?", ["lex: auth, team overview", VEC], {"quality": 17},
        ['lex line has filler the query does not ask for: "auth, team overview"'],
    ),
    "filler is a whole word": (QUERY, ["lex: auth overviews", VEC], {"quality": 20}, []),
    "a quote earns three": (
        QUERY, ['lex: auth "settings file"', VEC], {"quality": 23, "percentage": 94.2}, [],
    ),
    "a quoted word is no key word": (
        QUERY, ['lex: "auth" settings', VEC], {"quality": 18},
        ['lex line keeps no key word of the query: ""auth" settings"'],
    ),
    "a quote earns nothing for one word": (
        "auth", ['lex: auth "settings"', VEC], {"quality": 20}, [],
    ),
    "points over the maximum": (
        NAMED, [HYDE, 'lex: AWS Lambda "maximum duration" timeout', NAMED_VEC],
        {"quality": 23, "total": 143, "max_possible": 140, "percentage": 100.0}, [],
    ),
    "entities: one lex line loses them": (
        NAMED, [NAMED_LEX, "lex: function limit settings", NAMED_VEC], {"entity": 5 + 5},
        ['lex line keeps no key word of the query: "function limit settings"',
         'lex line keeps none of aws, lambda, timeout: "function limit settings"'],
    ),
    "entities: a missing one": (
        NAMED, ["lex: AWS function limit", "vec: how to raise the AWS timeout of a function"],
        {"entity": 15 - 20 + 5, "total": 30 + 30 + 20 + 0 + 20},
        ['entity is in no lex or vec line: "lambda"'],
    ),
    "entities: all lost is counted below zero and shown as zero": (
        NAMED, ["lex: function limit", "vec: how to make a function run longer"],
        {"quality": 15, "entity": 0, "total": 95 - 30 - 60, "percentage": 4.2, "rating": "Failed"},
        ['lex line keeps no key word of the query: "function limit"',
         'lex line keeps none of aws, lambda, timeout: "function limit"',
         'entity is in no lex or vec line: "aws"', 'entity is in no lex or vec line: "lambda"',
         'entity is in no lex or vec line: "timeout"', "no vec line keeps an entity of the query"],
    ),
    "entities: kept inside a longer word": (
        "Redis", ["lex: credistribution keys", "vec: how predistributed keys work"],
        {"entity": 20}, ['lex line keeps no key word of the query: "credistribution keys"'],
    ),
    "entities: a stock phrase": (
        "Redis", ["lex: redis eviction policy", "lex: Search for", "vec: how does redis evict keys"],
        {"entity": 0, "total": 30 + 30 + 17 + (5 - 15 + 5) + 20},
        ['lex line keeps no key word of the query: "Search for"',
         'lex line keeps none of redis: "Search for"',
         'lex line is only a stock phrase: "Search for"'],
    ),
    "entities: each stock phrase costs": (
        "Redis", ["lex: redis eviction policy", "lex: what is", "lex: look up",
                  "vec: how does redis evict its oldest keys"],
        {"total": 30 + 30 + 17 + (5 - 30 + 5) + 20},
        ['lex line keeps no key word of the query: "what is"',
         'lex line keeps no key word of the query: "look up"',
         'lex line keeps none of redis: "what is"', 'lex line keeps none of redis: "look up"',
         'lex line is only a stock phrase: "what is"',
         'lex line is only a stock phrase: "look up"'],
    ),
    "entities without lex": (
        "Redis", ["vec: how does redis evict its keys"], {"entity": 0},
        ["no lex line", "no lex line to keep the query's entities"],
    ),
    "thinking": (
        QUERY, ["<think>", "lex: no", "</think>", LEX, VEC], {"think_bonus": 0, "total": 90},
        ["think block in the output"],
    ),
    "entities: none in vec": (
        NAMED, ["lex: AWS limit", "vec: how to make it run longer"],
        {"quality": 20, "entity": 0, "total": 100 + 15 - 40, "percentage": 62.5, "rating": "Good"},
        ['entity is in no lex or vec line: "lambda"', 'entity is in no lex or vec line: "timeout"',
         "no vec line keeps an entity of the query"],
    ),
}  # fmt: skip

ONLY = {
    "lex": (
        f"{QUERY} /only:lex", [LEX, "lex: login config options"],
        {"format": 30, "diversity": 30, "hyde": 0, "quality": 20, "entity": 10, "think_bonus": 20,
         "total": 110, "max_possible": 120, "percentage": 91.7, "only_mode": "lex"}, [],
    ),
    "one line": (
        f"{QUERY} /only:lex", [LEX], {"diversity": 15},
        ["only one lex line: a second one would add points"],
    ),
    "other types": (
        f"{QUERY} /only:lex", [LEX, "lex: login config options", VEC, HYDE],
        {"format": 10, "hyde": 0, "max_possible": 120},
        ['vec line where only lex is asked for: "how to configure user authentication"',
         f'hyde line where only lex is asked for: "{HYDE[6:]}"'],
    ),
    "more than three of another type": (
        f"{QUERY} /only:lex", [LEX, "lex: login config options", *["vec: a"] * 4],
        {"format": 0}, ['vec line where only lex is asked for: "a"'] * 4,
    ),
    "asked for type missing": (
        f"{QUERY} /only:vec", [LEX], dict(dict.fromkeys(PARTS, 0), total=0, max_possible=100,
        percentage=0.0, rating="Failed", valid=False), ["no vec line, and only vec is asked for"],
    ),
    "similar lines, echo, no cap": (
        f"{QUERY} /only:lex", ["lex: auth config", "lex: auth config", LEX],
        {"diversity": 30 - 5 - 2 * 5, "quality": 20, "total": 95, "percentage": 79.2},
        ['two lex lines say the same: "auth config" and "auth config"',
         'lex line repeats the query: "auth config"', 'lex line repeats the query: "auth config"'],
    ),
    "the suffix is no part of the query": (
        f"{QUERY} /only:lex", [f"lex: {QUERY} /only:lex", LEX],
        {"diversity": 30, "quality": 20, "percentage": 91.7}, [],
    ),
    "no key words beside the suffix": (
        "how to /only:lex", [LEX, "lex: login config options"], {"quality": 20}, [],
    ),
    "diversity stops at zero": (
        f"{QUERY} /only:lex", ["lex: auth config"] * 4, {"diversity": 0},
        ['two lex lines say the same: "auth config" and "auth config"'] * 3
        + ['lex line repeats the query: "auth config"'] * 4,
    ),
    "lex quality": (
        f"{QUERY} /only:lex", ["lex: look up", "lex: auth overview"], {"quality": 10 - 3},
        ['lex line keeps no key word of the query: "look up"',
         'lex line is only a stock phrase: "look up"',
         'lex line has filler the query does not ask for: "auth overview"'],
    ),
    "vec quality": (
        f"{QUERY} /only:vec", [VEC, "vec: sign in"], {"quality": 15},
        ['vec line is too short for a sentence: "sign in"'],
    ),
    "hyde of 300": (
        f"{QUERY} /only:hyde", [f"hyde: {'x' * 300}", f"hyde: {'y' * 60}"], {"quality": 15},
        ["hyde has 300 characters: 50-200 wanted"],
    ),
    "hyde of 29": (
        f"{QUERY} /only:hyde", [f"hyde: {'x' * 29}", f"hyde: {'y' * 60}"], {"quality": 10},
        ["hyde has 29 characters: 50-200 wanted"],
    ),
    "hyde of 200": (
        f"{QUERY} /only:hyde", [f"hyde: {'x' * 200}", f"hyde: {'y' * 60}"],
        {"quality": 20, "diversity": 30}, [],
    ),
    "entities all, some, none": (
        f"{NAMED} /only:vec", [NAMED_VEC, VEC], {"entity": 15},
        ['vec line keeps none of aws, lambda, timeout: "how to configure user authentication"'],
    ),
    "entities lost": (
        "Redis /only:vec", [VEC, VEC_B], {"entity": 0},
        ['vec line keeps none of redis: "how to configure user authentication"',
         'vec line keeps none of redis: "where are the sign-in settings stored"'],
    ),
    "entities kept": (f"{NAMED} /only:vec", [NAMED_VEC, "vec: how does the AWS timeout work"],
        {"entity": 20}, []),
    "thinking": (
        f"{QUERY} /only:vec", ["<think></think>", VEC, VEC_B], {"think_bonus": 0, "total": 90},
        ["think block in the output"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("query", "lines", "figures", "deductions"),
    [pytest.param(*case, id=name) for name, case in NORMAL.items()]
    + [pytest.param(*case, id=f"only: {name}") for name, case in ONLY.items()],
)
def test_hand_worked(query, lines, figures, deductions):
    result = score(query, *lines)
    assert {key: result[key] for key in figures} == figures
    assert result["deductions"] == deductions
    assert score_expansion(query, "\n".join(lines)) == pytest.approx(
        min(1, result["total"] / result["max_possible"])
    )


@pytest.mark.parametrize(
    ("total", "rating"),
    [(96, "Excellent"), (95, "Good"), (72, "Good"), (71, "Acceptable"), (48, "Acceptable"),
     (47, "Poor"), (24, "Poor"), (23, "Failed")],
)  # fmt: skip
def test_a_rating_includes_its_threshold(monkeypatch, total, rating):
    monkeypatch.setattr(reward, "score_quality", lambda *_: (total - 90, []))  # 30+30+10+20 else
    result = score(QUERY, LEX, VEC)
    assert (result["total"], result["max_possible"]) == (total, 120)
    assert result["rating"] == rating


def test_the_echo_cap_applies_to_the_percentage_but_not_to_the_score():
    # 30 format + 20 diversity + 20 quality + 20 entity + 20 think = 110 of 120
    text = "lex: aws lambda timeout\nvec: how to raise the time limit of a Lambda function"
    assert score_expansion_detailed(NAMED, text)["percentage"] == 50.0
    assert score_expansion(NAMED, text) == pytest.approx(0.917, abs=5e-4)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (f"{LEX}\nSure, here it is:", 'line without lex:, vec: or hyde: "Sure, here it is:"'),
        (f"LEX: auth\n{LEX}", 'line without lex:, vec: or hyde: "LEX: auth"'),
        ("lex : auth", 'line without lex:, vec: or hyde: "lex : auth"'),
        ("<think>never closed", 'line without lex:, vec: or hyde: "<think>never closed"'),
        ("lex: a <|im_start|>", "chat marker in the text: '<|im_start|>'"),
        ("lex: a <|endoftext|>", "chat marker in the text: '<|endoftext|>'"),
        ("lex: a <|im_<|im_end|>end|>", "chat marker in the text: '<|im_end|>'"),
        ("lex: a\nassistant\nlex: b", "chat marker in the text: '\\nassistant\\n'"),
        ("lex: a\nuser\nlex: b", "chat marker in the text: '\\nuser\\n'"),
    ],
)
@pytest.mark.parametrize("suffix", ["", " /only:lex"])
def test_hard_fail(text, fault, suffix):
    result = score_expansion_detailed(NAMED + suffix, text)
    assert result["deductions"][0] == fault
    assert {key: result[key] for key in PARTS} == dict.fromkeys(PARTS, 0)
    assert (result["total"], result["max_possible"], result["percentage"]) == (0, 100, 0.0)
    assert (result["rating"], result["valid"]) == ("Failed", False)
    assert result["entities_detected"] == []
    assert score_expansion(NAMED + suffix, text) == 0.0


def test_a_hard_fail_reports_the_uncleaned_lines():
    parsed = score(QUERY, "<think>x</think>lex: a", "junk<|im_end|>")["parsed"]
    assert parsed["invalid"] == ["<think>x</think>lex: a", "junk<|im_end|>"]


def test_end_markers_and_think_blocks_are_removed():
    plain = score(QUERY, LEX, VEC)
    assert score(QUERY, f"  {LEX}<|im_end|>", "", f"\t{VEC} ", "<|im_end|>\n") == plain
    thought = score(QUERY, f"<think>a\nb</think>{LEX}", f"<think>c</think>{VEC}")
    assert thought["parsed"] == plain["parsed"]
    assert score(f"{QUERY} /only:vec", f"{LEX}<|im_end|>")["parsed"]["lex"] == [LEX[5:]]
    # An opening tag without a closing one is ordinary text.
    assert score(QUERY, f"{LEX} <think>", VEC)["think_bonus"] == 20


def test_lines_end_at_newlines_only():
    assert parse_expansion("lex: a\rvec: b\x85c\u2028d\x0b\n\x0c\nvec:\n vec:x ")["lex"] == [
        "a\rvec: b\x85c\u2028d"
    ]
    assert parse_expansion("vec:\n vec:x \nhyde:a: b\nlexical: c\nlex\n") == {
        "lex": [],
        "vec": ["", "x"],
        "hyde": ["a: b"],
        "invalid": ["lexical: c", "lex"],
    }


@pytest.mark.parametrize(
    ("query", "entities"),
    [
        ("what does TDS do", {"tds"}),
        ("I am A person", set()),  # one letter is no acronym, and both are stop words
        ("B tree", {"b", "tree"}),  # a capital that is no stop word, and the word after it
        ("meeting with Bob about C++", {"bob", "c++"}),
        ("Configure Redis", {"redis"}),  # an opening word is no entity
        ("SetUp redis", set()),  # ... even with a second capital
        ("Redis configure", {"redis", "configure"}),
        ("My Setup", {"setup"}),  # opening words are ignored only in first place
        ("How iS it", set()),  # "iS" starts in lower case
        ("the Is IsNot", {"isnot"}),
        ("tell WhO knows", {"who", "knows"}),  # rule 4: a stop word with a second capital
        ("node.js e-mail user@host c#", {"node.js", "e-mail", "user@host", "c#"}),
        ("a - b # +", set()),
        ("AWS Lambda cold start", {"aws", "lambda", "cold"}),  # only one word follows a name
        ("AWS for teams", {"aws"}),  # ... and no stop word
        ("AWS , lambda", {"aws"}),  # bare punctuation breaks the chain
        ('"AWS", (lambda)', {"aws", "lambda"}),
        ("日本 旅行", set()),
        ("ÜBER Éclair", {"über", "éclair"}),
        ("", set()),
    ],
)
def test_entities(query, entities):
    assert extract_named_entities(query) == entities


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("auth config", ("auth config", None)),
        ("auth config /only:lex", ("auth config", "lex")),
        ("  auth  \t/ONLY:Vec \n", ("auth", "vec")),
        (" /only:hyde", ("", "hyde")),
        ("auth/only:lex", ("auth/only:lex", None)),
        ("auth /only:lex now", ("auth /only:lex now", None)),
        ("auth /only:foo", ("auth /only:foo", None)),
        ("a /only:lex /only:vec", ("a /only:lex", "vec")),
    ],
)
def test_only_mode(query, expected):
    assert only_mode(query) == expected


@pytest.mark.parametrize(
    ("line", "generic"),
    [
        ("what is", True),
        ("Search for it", True),  # two characters are left
        ("search for him", False),
        ("search", True),  # begins with the phrase's first word
        ("howto", True),  # both words of "how to" are removed
        ("however", False),
        ("guide to to to", False),  # only the first "to" is removed
        ("my guide to", True),  # anywhere in the line
        ("find information about", True),
        ("how auto", True),  # "to" is removed from "auto"
        ("how photo", False),
        ("", False),
    ],
)
def test_generic(line, generic):
    assert reward.is_generic(line) is generic


def test_scores_of_random_text_are_in_range_and_every_loss_has_a_deduction():
    rng = random.Random(7)
    words = [*QUERY.split(), *NAMED.split(), "how", "to", "overview", '"', "x" * 60, "日本"]
    starts = ["lex: ", "vec: ", "hyde: "]
    junk = ["", "junk", "<think>", "</think>", "<|im_end|>", "<|im_start|>", "\r", "\x85lex:"]
    queries = [QUERY, NAMED, "", "  ", "how to", "日本 旅行", "one two three four five"]
    only = ["", " /only:lex", " /only:vec", " /only:hyde"]
    seen = set()
    for _ in range(3000):
        query = rng.choice(queries) + rng.choice(only)
        lines = [
            rng.choice(starts) + " ".join(rng.choices(words, k=rng.randint(0, 8)))
            if rng.random() < 0.97
            else rng.choice(junk)
            for _ in range(rng.randint(0, 7))
        ]
        result = score(query, *lines)
        assert 0 <= score_expansion(query, "\n".join(lines)) <= 1
        assert 0 <= result["percentage"] <= 100
        assert result["total"] >= 0
        assert 0 <= result["format"] <= 30
        assert 0 <= result["diversity"] <= 30
        assert 0 <= result["hyde"] <= 20
        assert result["quality"] <= 23
        assert 0 <= result["entity"] <= 20
        assert result["think_bonus"] in (0, 20)
        full = (
            result["format"] == 30
            and result["diversity"] == 30
            and result["hyde"] == (20 if result["max_possible"] == 140 else 0)
            and result["quality"] >= 20
            and result["entity"] == (20 if result["entities_detected"] else 10)
            and result["think_bonus"] == 20
        )
        assert full or result["deductions"], (query, lines)
        seen.add((result["only_mode"], result["rating"]))
    assert len(seen) > 12  # the mix reaches most modes and ratings


# Not parametrised, so that nothing is collected (or skipped) without the file.
if GOLDEN.exists():

    def test_golden_file():
        cases = [
            json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").split("\n") if line
        ]
        assert len(cases) == 2000
        for case in cases:
            query, expansion, entities = (
                case.pop(key) for key in ("query", "expansion", "entities")
            )
            assert score_expansion(query, expansion) == case.pop("score")
            result = score_expansion_detailed(query, expansion)
            assert result["entities_detected"] == sorted(entities)
            assert {key: result[key] for key in case} == case, (query, expansion)


TEXT = "\n".join([HYDE, LEX, VEC])
RIGHT = score_expansion(QUERY, TEXT)


def chat(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


@pytest.mark.parametrize(
    "prompt",
    [
        QUERY,
        user_message(QUERY),
        render_prompt(QUERY),
        render_prompt(QUERY, system="You are a helpful assistant."),
        f"{render_prompt(QUERY)}<think>\n\n</think>\n\n",
        chat("system", "x") + chat("user", user_message(QUERY)),
        chat("user", f"{user_message(QUERY)}\nQuery intent: find the file"),
    ],
)
def test_trl_reward_reads_the_query_from_the_prompt(prompt):
    # This is an echo only if the query is read exactly.
    echo = f"lex: {QUERY} settings\n{VEC}"
    rewards = QMDRewardFunction()([echo, chat("assistant", TEXT)], prompts=[prompt, prompt])
    assert rewards == [score_expansion(QUERY, echo), RIGHT]
    assert rewards[0] == pytest.approx(100 / 120)


def test_trl_reward_prefers_the_query_column():
    reward_fn = QMDRewardFunction()
    completions = [TEXT, "lex: auth config"]
    expected = [score_expansion("Redis", TEXT), score_expansion(QUERY, "lex: auth config")]
    prompts = ["something else"] * 2
    for key in ("query", "queries"):
        columns = {key: ["Redis", QUERY], "completion_ids": [[1], [2]]}
        assert reward_fn(prompts=prompts, completions=completions, **columns) == expected
    assert reward_fn(["lex: a"]) == [score_expansion("", "lex: a")]
    assert reward_fn.__name__ == "qmd_reward"


@pytest.mark.parametrize(
    ("completions", "columns", "message"),
    [
        (["lex: a", "lex: b"], {"prompts": ["a"]}, "2 completions but 1 queries"),
        (["lex: a"], {"query": ["a", "b"]}, "1 completions but 2 queries"),
        ([None], {"query": ["a"]}, "found None"),
        ([[]], {"query": ["a"]}, r"found \[\]"),
        ([[{"role": "assistant", "content": None}]], {"query": ["a"]}, "expected text"),
        (["lex: a"], {"prompts": [7]}, "found 7"),
    ],
)
def test_trl_reward_rejects_wrong_input(completions, columns, message):
    with pytest.raises(ValueError, match=message):
        QMDRewardFunction()(completions, **columns)


def test_self_test_passes_and_can_fail(monkeypatch, capsys, run):
    done = run(["reward.py"])
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"self-test: \d+ cases, 0 figures differ\n", done.stdout)

    monkeypatch.setattr(reward, "GENERIC_PHRASES", ())
    monkeypatch.setattr(sys, "argv", ["reward.py"])
    with pytest.raises(SystemExit) as stop:
        reward.main()
    # "entities lost" has one stock phrase, 15 points
    assert stop.value.code == "entities lost: total is 82, expected 67\n" + (
        "entities lost: percentage is 68.3, expected 55.8\n"
        "entities lost: rating is Good, expected Acceptable"
    )


def test_command_scores_a_file(run, tmp_path):
    file = tmp_path / "expansion.txt"
    file.write_text(f"{LEX}\nlex: auth config\n{VEC}\n", encoding="utf-8")
    done = run(["reward.py", "--query", QUERY, file])
    assert done.returncode == 0, done.stderr
    assert re.search(r"^diversity +20$", done.stdout, re.MULTILINE)
    assert re.search(r"^percentage +50.0$", done.stdout, re.MULTILINE)
    assert '- lex line repeats the query: "auth config"\n' in done.stdout


def test_command_reads_any_utf8_and_prints_on_any_terminal(run, tmp_path):
    file = tmp_path / "expansion.txt"
    file.write_bytes(b"\xef\xbb\xbf" + f"lex: café menu\r\n{VEC}\r\n".encode())
    done = run(["reward.py", "--query", "tea", file], env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stderr == ""
    assert re.search(r"^format +30$", done.stdout, re.MULTILINE) and "caf\\xe9" in done.stdout


def test_command_rejects_wrong_arguments(run, tmp_path):
    for args, message in (
        (["--query", QUERY], "--query needs a file"),
        (["--query", " ", tmp_path / "none"], "--query or the file name is empty"),
        (["--query", QUERY, ""], "--query or the file name is empty"),
        (["--query", QUERY, tmp_path / "none"], "cannot read the expansion"),
    ):
        done = run(["reward.py", *args])
        assert done.returncode == 2
        assert message in done.stderr and "Traceback" not in done.stderr
