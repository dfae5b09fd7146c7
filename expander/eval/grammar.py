r"""QMD's grammar as a table over a tokenizer's vocabulary, and a sampler that follows it.

    root ::= line+
    line ::= ("lex" | "vec" | "hyde") ": " [^\n]+ "\n"

The grammar has no nesting, so a small automaton over bytes covers it. Running the automaton over
the bytes of each token gives a table of the state each token leads to. Text is UTF-8: as in
llama.cpp, a character may be split between tokens, but must be completed.
"""

import mlx.core as mx
import numpy as np

from expander.decode import KeyedSampler
from expander.prompt import TYPES
from expander.qmd import SAMPLING, Sampling

FORBIDDEN = -1
BLOCK = 64
START = 0
FIRST_BYTE = "<0x00>"  # a token of SentencePiece's vocabularies


def _byte_automaton() -> tuple[np.ndarray, int]:
    """(step, between): step[state, byte] is the next state, `between` the state after a newline.

    START is the initial state, in which the text may not end yet.
    """
    rows = [np.full(256, FORBIDDEN, np.int8)]

    def state() -> int:
        rows.append(np.full(256, FORBIDDEN, np.int8))
        return len(rows) - 1

    between, colon, space, empty, content = (state() for _ in range(5))
    for kind in TYPES:
        at = START
        for letter in kind.encode()[:-1]:
            if rows[at][letter] == FORBIDDEN:
                rows[at][letter] = state()
            at = rows[at][letter]
        rows[at][kind.encode()[-1]] = colon
    rows[between][:] = rows[START]
    rows[colon][ord(":")] = space
    rows[space][ord(" ")] = empty
    missing = [content, state(), state(), state()]  # by the number of bytes a character still lacks
    for row in (rows[empty], rows[content]):
        row[0x01:0x80] = content
        row[0xC2:0xE0] = missing[1]
        row[0xE0:0xF0] = missing[2]
        row[0xF0:0xF5] = missing[3]
    for count in (1, 2, 3):
        rows[missing[count]][0x80:0xC0] = missing[count - 1]
    rows[empty][ord("\n")] = FORBIDDEN
    rows[content][ord("\n")] = between
    return np.stack(rows), between


def _byte_letters() -> np.ndarray:
    """The code point that represents each byte in a byte-level vocabulary, as in GPT-2's: printable
    Latin-1 characters represent themselves, the rest follow in order from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters = np.arange(256)
    hidden = [byte for byte in range(256) if byte not in visible]
    letters[hidden] = 0x100 + np.arange(len(hidden))
    return letters


def _token_bytes(tokenizer, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, lengths, data): the tokens, longest first, their lengths and all their bytes joined.

    Control tokens are left out.

    Raises:
        ValueError: the vocabulary is neither byte-level nor SentencePiece's.
    """
    letters = _byte_letters()

    def as_letters(text: str) -> str:
        return "".join(chr(letters[byte]) for byte in text.encode())

    added = tokenizer.added_tokens_decoder  # id → token
    vocabulary = [(t, i) for t, i in tokenizer.get_vocab().items() if i not in added and t]
    if FIRST_BYTE in tokenizer.get_vocab():  # spaces are written ▁, some bytes <0x00> to <0xFF>
        bytes_ = {f"<0x{byte:02X}>": chr(letters[byte]) for byte in range(256)}
        vocabulary = [(bytes_.get(t) or as_letters(t.replace("▁", " ")), i) for t, i in vocabulary]
    for index, token in added.items():
        if not token.special and index < width:
            vocabulary.append((as_letters(token.content), index))
    vocabulary.sort(key=lambda entry: len(entry[0]), reverse=True)
    lengths = np.array([len(token) for token, _ in vocabulary])
    ids = np.array([index for _, index in vocabulary])

    byte_of = np.full(0x110000, -1, np.int16)
    byte_of[letters] = np.arange(256)
    joined = "".join(token for token, _ in vocabulary).encode("utf-32-le")
    data = byte_of[np.frombuffer(joined, np.uint32)]
    if data.min() < 0:
        raise ValueError("QMD's grammar needs a tokenizer with a byte-level vocabulary")
    return ids, lengths, data


def token_table(tokenizer, width: int, end: int) -> np.ndarray:
    """The state that each token leads to from each state, or FORBIDDEN: (states, width) int8.

    `end` is allowed after a newline. Control tokens and ids outside the tokenizer are forbidden,
    whereas llama.cpp would accept a control token as the text of its name.

    Args:
        tokenizer: a Hugging Face tokenizer with a byte-level or SentencePiece vocabulary.
        width: size of the model's vocabulary, including padding.
        end: the id of the end token.

    Raises:
        ValueError: the vocabulary is of another kind, or cannot write the grammar.
    """
    step, between = _byte_automaton()
    ids, lengths, data = _token_bytes(tokenizer, width)
    # Process the first byte of all tokens, then the second, ... The longest tokens come first, so
    # the tokens with a byte left are always a prefix.
    offsets = np.cumsum(lengths) - lengths
    count = len(step)
    step = np.vstack([step, np.full((1, 256), FORBIDDEN, np.int8)])  # step[FORBIDDEN] stays there
    states = np.repeat(np.arange(count)[:, None], len(ids), axis=1)  # (states, tokens)
    for position in range(lengths[0]):
        active = np.searchsorted(-lengths, -position)
        states[:, :active] = step[states[:, :active], data[offsets[:active] + position]]

    table = np.full((count, width), FORBIDDEN, np.int8)
    table[:, ids] = states
    table[between, end] = between
    if (table < 0).all(axis=1).any():
        raise ValueError("the tokenizer's vocabulary cannot write every line of QMD's grammar")
    return table


def best_tokens(logits: mx.array, count: int) -> mx.array:
    """Indices of the `count` largest logits of each row, unordered: (B, V) → (B, count).

    They lie in the `count` blocks with the largest maxima. Searching only those takes a tenth of
    the time of partitioning the full vocabulary.
    """
    rows, width = logits.shape
    blocks = -(-width // BLOCK)
    if missing := blocks * BLOCK - width:
        logits = mx.pad(logits, ((0, 0), (0, missing)), constant_values=-mx.inf)
    logits = logits.reshape(rows, blocks, BLOCK)
    taken = min(count, blocks)
    where = mx.argpartition(-logits.max(axis=-1), taken - 1, axis=-1)[:, :taken]
    found = mx.take_along_axis(logits, where[:, :, None], axis=1).reshape(rows, taken * BLOCK)
    best = mx.argpartition(-found, count - 1, axis=-1)[:, :count]
    return mx.take_along_axis(where, best // BLOCK, axis=-1) * BLOCK + best % BLOCK


class QmdSampler(KeyedSampler):
    """Sample under the grammar as node-llama-cpp 3.20.0 does for QMD.

    A token is drawn without the grammar: top-k, then top-p, then the temperature. Only if the
    grammar forbids it, a second one is drawn in the same way from the allowed tokens. QMD's
    presence penalty has no effect (see expander/qmd.py) and is left out.
    """

    def __init__(self, table: np.ndarray, keys: np.ndarray, sampling: Sampling = SAMPLING):
        """
        Args:
            table: from `token_table`.
            keys: see KeyedSampler.
            sampling: top-k, top-p and temperature.
        """
        super().__init__(keys)
        self.table = mx.array(table)
        self.sampling = sampling

    def start(self, rows):
        return [mx.full((rows,), START, mx.int32), *super().start(rows)]

    def __call__(self, logits, state):
        states, keys = state  # (B,), (B, 2)
        split = mx.vmap(lambda key: mx.random.split(key, 3))(keys)  # (B, 3, 2)
        following = self.table[states]  # (B, V)
        free = self.draw(logits, split[:, 1])
        allowed = self.draw(mx.where(following >= 0, logits, -mx.inf), split[:, 2])
        # Which of the two is wanted is decided on the device: reading it would wait for the step.
        tokens = mx.where(self.table[states, free] >= 0, free, allowed)
        return tokens, [self.table[states, tokens].astype(mx.int32), split[:, 0]]

    def draw(self, logits: mx.array, keys: mx.array) -> mx.array:
        """Draw tokens (B,) from logits (B, V) with keys (B, 2)."""
        best = best_tokens(logits, self.sampling.top_k)
        values = mx.take_along_axis(logits, best, axis=-1)  # (B, K)
        order = mx.argsort(-values, axis=-1)
        best = mx.take_along_axis(best, order, axis=-1)
        values = mx.take_along_axis(values, order, axis=-1)
        shares = mx.softmax(values, axis=-1)
        kept = mx.cumsum(shares, axis=-1) - shares < self.sampling.top_p
        weights = mx.where(kept, mx.softmax(values / self.sampling.temperature, axis=-1), 0)
        reached = mx.cumsum(weights, axis=-1)
        uniform = mx.vmap(lambda key: mx.random.uniform(key=key))(keys)[:, None]  # (B, 1)
        chosen = (reached <= uniform * reached[:, -1:]).sum(axis=-1)
        chosen = mx.minimum(chosen, kept.sum(axis=-1) - 1)  # rounding may go past the last one
        return mx.take_along_axis(best, chosen[:, None].astype(mx.int32), axis=-1)[:, 0]
