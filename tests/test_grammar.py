"""grammar.py: the token table on hand-written lines, the sampler on probabilities worked by hand."""

import re
from collections import Counter
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from expander import model as models
from expander.decode import generate, random_keys
from expander.eval.grammar import START, QmdSampler, best_tokens, token_table
from expander.prompt import encode_prompt
from expander.qmd import Sampling

# QMD's grammar as a regular expression.
LINE = r"(?:lex|vec|hyde): [^\n]+\n"
LINES = re.compile(f"(?:{LINE})+")
BEGUN = re.compile(rf"(?:{LINE})*(?:h|hy|hyd|l|le|v|ve|(?:lex|vec|hyde)(?::(?: [^\n]*)?)?)?")
QUERIES = [f"query number {i} on nginx" for i in range(250)]


@pytest.fixture(scope="module")
def loaded(tiny_qwen3):
    model, tokenizer = models.load_chain(models.read_chain(str(tiny_qwen3)))
    width = models.model_config(tiny_qwen3)["vocab_size"]
    end = models.end_token(tokenizer)
    prompts = [encode_prompt(tokenizer, query) for query in QUERIES]
    return model, tokenizer, prompts, end, token_table(tokenizer, width, end)


def walk(table: np.ndarray, ids: list[int]) -> int:
    """The state after the tokens, or -1 if one is forbidden."""
    state = START
    for token in ids:
        state = table[state, token] if state >= 0 else -1
    return int(state)


def byte_ids(tokenizer, data: bytes) -> list[int]:
    """One token per byte, without merges."""
    vocabulary = tokenizer.get_vocab()
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [vocabulary[letters[byte]] for byte in data]


@pytest.mark.parametrize("one_per_byte", [True, False])
@pytest.mark.parametrize(
    ("text", "may_continue", "may_end"),
    [
        ("", True, False),
        ("le", True, False),
        ("lex", True, False),
        ("lex:", True, False),
        ("lex: ", True, False),
        ("lex: nginx", True, False),
        ("lex: nginx\n", True, True),
        ("hyde:  two spaces: and a colon\r\n", True, True),
        ("vec: größe 東京 🎉\nlex: a\nhyde: b\n", True, True),
        ("lex: a\nlex: b", True, False),
        ("\n", False, False),
        (" lex: a\n", False, False),
        ("lexx: a\n", False, False),
        ("LEX: a\n", False, False),
        ("lex:a\n", False, False),
        ("lex: \n", False, False),
        ("lex: a\n\n", False, False),
        ("lex: a\nnote: b\n", False, False),
        ("hex: a\n", False, False),
    ],
)
def test_the_table_accepts_exactly_the_grammar(text, may_continue, may_end, one_per_byte, loaded):
    _, tokenizer, _, end, table = loaded
    if one_per_byte:
        ids = byte_ids(tokenizer, text.encode())
    else:
        ids = tokenizer.encode(text, add_special_tokens=False)
    state = walk(table, ids)
    assert (state >= 0) == may_continue
    assert (state >= 0 and table[state, end] >= 0) == may_end
    if may_end:
        assert LINES.fullmatch(text)


def test_a_split_character_must_be_completed(loaded):
    _, tokenizer, _, end, table = loaded
    state = walk(table, byte_ids(tokenizer, "lex: 東".encode()[:-1]))
    assert table[state, byte_ids(tokenizer, b"\xb1")[0]] >= 0
    for byte in (b"\n", b"a", b"\xe6"):
        assert table[state, byte_ids(tokenizer, byte)[0]] < 0, byte
    assert table[state, end] < 0
    assert walk(table, byte_ids(tokenizer, b"lex: \xb1")) < 0


def test_control_and_padding_tokens_are_forbidden_everywhere(loaded, tiny_qwen3):
    _, tokenizer, _, end, table = loaded
    start, text = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|endoftext|>"])
    padding = table.shape[1] - 1
    assert padding > max(tokenizer.get_vocab().values())
    assert (table[:, [start, text, padding]] < 0).all()
    assert (table[:, end] >= 0).sum() == 1  # after a newline
    think = tokenizer.convert_tokens_to_ids("</think>")  # ordinary text in llama.cpp
    assert walk(table, [*byte_ids(tokenizer, b"lex: "), think]) >= 0
    assert table[START, think] < 0


def test_unsuitable_vocabularies_are_rejected():
    def vocabulary(*tokens: str) -> SimpleNamespace:
        return SimpleNamespace(
            added_tokens_decoder={0: SimpleNamespace(content="<|im_end|>", special=True)},
            get_vocab=lambda: {token: i + 1 for i, token in enumerate(tokens)},
        )

    with pytest.raises(ValueError, match="byte-level"):
        token_table(vocabulary("▁the", "a"), 8, 0)
    with pytest.raises(ValueError, match="cannot write"):
        token_table(vocabulary("l", "e", "x", ":", "a"), 8, 0)  # no newline, no space


def test_texts_of_an_untrained_model_follow_the_grammar(loaded):
    """The end token comes only after a newline; a text cut off is a prefix of a valid one."""
    model, tokenizer, prompts, end, table = loaded
    keys = random_keys([f"{query} {i}" for query in QUERIES for i in range(4)], seed=0)
    completions = generate(
        model,
        prompts,
        max_tokens=32,
        end=end,
        samples=4,
        sampler=QmdSampler(table, keys),
        batch_size=250,
    )
    assert len(completions) == 1000
    for completion in completions:
        text = tokenizer.decode([token for token in completion.tokens if token != end])
        assert (LINES if completion.finished else BEGUN).fullmatch(text), text
        assert end not in completion.tokens[:-1]
        assert walk(table, completion.tokens) >= 0
    assert sum(completion.finished for completion in completions) > 30
    assert len({tuple(completion.tokens) for completion in completions}) > 950


def test_a_text_depends_only_on_its_name_and_the_seed(loaded):
    model, _, prompts, end, table = loaded

    def texts(indices: list[int], seed: int, batch_size: int) -> list[list[int]]:
        sampler = QmdSampler(table, random_keys([QUERIES[i] for i in indices], seed))
        done = generate(
            model,
            [prompts[i] for i in indices],
            max_tokens=24,
            end=end,
            sampler=sampler,
            batch_size=batch_size,
        )
        return [completion.tokens for completion in done]

    everything = texts(list(range(12)), seed=3, batch_size=5)
    assert texts(list(range(12)), seed=3, batch_size=12) == everything
    assert texts([7], seed=3, batch_size=1) == [everything[7]]
    assert texts(list(reversed(range(12))), seed=3, batch_size=4) == everything[::-1]
    assert texts(list(range(12)), seed=4, batch_size=12) != everything


@pytest.mark.parametrize("width", [40, 64, 65, 5000])
def test_best_tokens_agree_with_a_full_sort(width):
    logits = np.random.default_rng(width).normal(size=(7, width)).astype(np.float32)
    logits[0, 30:] = -np.inf  # a grammar's mask may leave whole blocks without a token
    logits[1] = np.sort(logits[1])  # all in the last, incomplete block
    found = np.array(best_tokens(mx.array(logits), 20))
    expected = np.argsort(-logits, axis=-1, kind="stable")[:, :20]
    assert (np.sort(found) == np.sort(expected)).all()


def shares(sampler_table: np.ndarray, probabilities: dict[int, float], sampling: Sampling) -> dict:
    """The share of each token among 20,000 draws."""
    rows = 20_000
    logits = np.full(sampler_table.shape[1], -30.0, np.float32)
    for token, probability in probabilities.items():
        logits[token] = np.log(probability)
    sampler = QmdSampler(sampler_table, random_keys(list(map(str, range(rows))), 0), sampling)
    tokens, _ = sampler(mx.broadcast_to(mx.array(logits), (rows, len(logits))), sampler.start(rows))
    return {token: n / rows for token, n in Counter(tokens.tolist()).items()}


def test_top_p_comes_before_the_temperature():
    """Of 0.5, 0.28, 0.22 the first two hold 0.78 < 0.8, so all three stay; had the temperature come
    first, the third would be gone. Their powers 1/0.7, 0.3715, 0.1623, 0.1150, are the weights."""
    everything = np.zeros((1, 32), np.int8)  # one state, all tokens allowed
    found = shares(everything, {3: 0.5, 5: 0.28, 7: 0.22}, Sampling())
    assert found.keys() == {3, 5, 7}
    for token, expected in {3: 0.5727, 5: 0.2502, 7: 0.1772}.items():
        assert found[token] == pytest.approx(expected, abs=0.012)  # 3.5 standard deviations


def test_top_p_and_top_k_cut():
    everything = np.zeros((1, 32), np.int8)
    probabilities = {1: 0.5, 2: 0.31, 3: 0.19}
    assert shares(everything, probabilities, Sampling()).keys() == {1, 2}
    assert shares(everything, probabilities, Sampling(top_k=1)).keys() == {1}
    assert shares(everything, probabilities, Sampling(top_p=1.0)).keys() == {1, 2, 3}


def test_a_forbidden_token_is_redrawn_under_the_grammar():
    """The bare model draws token 1 with 2/3 and token 2 with 1/3 (token 3 is beyond top-p). Token 1
    is forbidden, then 2 has 0.75 and 3 has 0.25: in all 1/3 + 2/3 x 0.75 = 0.833 and 0.167. With
    the grammar applied first it would be 0.75 and 0.25."""
    table = np.zeros((1, 32), np.int8)
    table[0, 1] = -1
    found = shares(table, {1: 0.6, 2: 0.3, 3: 0.1}, Sampling(temperature=1.0))
    assert found.keys() == {2, 3}
    assert found[2] == pytest.approx(5 / 6, abs=0.0095)  # 3.5 standard deviations
