"""qmd.py: the system prompt, the sampling options and the lines that QMD keeps."""

import hashlib

import pytest

from expander.qmd import QMD_SYSTEM_PROMPT, SAMPLING, falls_back, kept_lines


def test_the_system_prompt_equals_node_llama_cpps():
    # SHA-256 of `defaultChatSystemPrompt` in dist/config.js of node-llama-cpp 3.20.0
    digest = hashlib.sha256(QMD_SYSTEM_PROMPT.encode()).hexdigest()
    assert digest == "775f14327702833b8c1118e87155f3e9c94d8e112e48d54bbdce4493578d6675"


def test_sampling_options_are_qmds():
    assert (SAMPLING.temperature, SAMPLING.top_k, SAMPLING.top_p) == (0.7, 20, 0.8)
    assert (SAMPLING.presence_penalty, SAMPLING.penalty_last_n) == (0.5, 64)
    assert SAMPLING.max_tokens == 600


@pytest.mark.parametrize(
    ("query", "text", "kept"),
    [
        ("auth config", "lex: auth\nvec: configure", [("lex", "auth"), ("vec", "configure")]),
        ("auth config", "lex: login\nhyde: Sign in first.", []),
        ("Auth", "lex: AUTHOR list", [("lex", "AUTHOR list")]),  # a substring, in any case
        ("C++ & Rust", "lex: c\nlex: go\nlex: rusty", [("lex", "c"), ("lex", "rusty")]),
        ("node.js", "lex: node\nlex: js\nlex: nod", [("lex", "node"), ("lex", "js")]),
        ("naïve", "lex: na\nlex: ive\nlex: ï", [("lex", "na"), ("lex", "ive")]),
        ("日本 旅行", "lex: anything\nvec:", [("lex", "anything"), ("vec", "")]),  # no term, no filter
        ("", "lex: anything", [("lex", "anything")]),
        ("a", "", []),
        ("a", "lex a\nLEX: a\nfoo: a\n: a", []),
        ("a", " lex : a: b ", [("lex", "a: b")]),  # the first colon splits, both sides are trimmed
        ("a", "\ufefflex:\u00a0a\u3000\r\n", [("lex", "a")]),  # JavaScript's white space
        ("a", "lex: a\x85\n\x1clex: a", [("lex", "a\x85")]),  # these are not
        ("a", "lex: a\u2028vec: a", [("lex", "a\u2028vec: a")]),  # lines end at \n only
    ],
)  # fmt: skip
def test_kept_lines(query, text, kept):
    assert kept_lines(query, text) == kept
    assert falls_back(query, text) is (kept == [])
