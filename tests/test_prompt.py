"""prompt.py: the bytes of the frame; and the doctests of every module."""

import doctest
import importlib
from pathlib import Path

import pytest

from expander.model import load_tokenizer
from expander.prompt import (
    TYPES,
    encode_prompt,
    query_of,
    render_lines,
    render_prompt,
    render_target,
    user_message,
)

ROOT = Path(__file__).parent.parent
WITH_DOCTESTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for pattern in ("*.py", "dataset/*.py", "examples/*.py", "expander/**/*.py")
    for path in ROOT.glob(pattern)
    if ">>> " in path.read_text(encoding="utf-8")
)


def test_prompt_and_target_have_the_exact_bytes():
    prompt = render_prompt("auth config")
    target = render_target([("hyde", "One."), ("lex", "auth settings"), ("vec", "how to")])
    assert (prompt + target).encode() == (
        b"<|im_start|>user\n"
        b"/no_think Expand this search query: auth config<|im_end|>\n"
        b"<|im_start|>assistant\n"
        b"hyde: One.\n"
        b"lex: auth settings\n"
        b"vec: how to\n"
        b"<|im_end|>"
    )


def test_the_final_newline_is_optional():
    lines = [("lex", "a b")]
    assert render_target(lines) == "lex: a b\n<|im_end|>"
    assert render_target(lines, final_newline=False) == "lex: a b<|im_end|>"
    assert render_lines([*lines, ("vec", "c d")]) == "lex: a b\nvec: c d"


def test_a_system_turn_comes_first():
    assert render_prompt("q", system="Be brief.") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" + render_prompt("q")
    )


def test_an_intent_is_the_second_line_of_the_user_turn():
    assert user_message("apple", "fruit") == (
        "/no_think Expand this search query: apple\nQuery intent: fruit"
    )
    assert "apple\nQuery intent: fruit<|im_end|>\n<|im_start|>assistant\n" in render_prompt(
        "apple", intent="fruit"
    )
    for nothing in (None, ""):
        assert user_message("apple", nothing) == user_message("apple")


def test_prompt_ids_hold_the_frame_and_nothing_else(tiny_qwen3):
    tokenizer = load_tokenizer(tiny_qwen3)
    ids = encode_prompt(tokenizer, "apple", system="Be brief.", intent="fruit")
    assert tokenizer.decode(ids) == render_prompt("apple", system="Be brief.", intent="fruit")


@pytest.mark.parametrize(
    "query", ["auth config", "東京 花見", "a /only:lex", "expand: this", "C++"]
)
def test_query_of_inverts_user_message(query):
    assert query_of(user_message(query)) == query
    assert query_of(f"  {user_message(query)}\n") == query


def test_the_query_of_a_row_written_for_lfm2():
    """The original trains LFM2 without /no_think."""
    assert query_of("Expand this search query: auth config") == "auth config"


def test_query_of_other_text_is_none():
    assert query_of("Widen this search query: auth") is None
    assert query_of(user_message("")) == ""


def test_hyde_is_the_first_line_of_a_target():
    assert TYPES == ("hyde", "lex", "vec")


@pytest.mark.parametrize("name", WITH_DOCTESTS)
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0


def test_modules_with_docstring_examples_are_found():
    assert {"expander.prompt", "expander.cli", "expander.train.logps"} <= set(WITH_DOCTESTS)
