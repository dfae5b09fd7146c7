r"""QMD's grammar over a tokenizer's vocabulary, and the sampler that keeps to it.

    root ::= line+
    line ::= ("lex" | "vec" | "hyde") ": " [^\n]+ "\n"

The grammar has no nesting, so a small automaton over bytes is all of it; run over every token's
bytes it gives a table of the state that each token leads to. Characters are UTF-8: as in llama.cpp a
character may be split between tokens, but nothing may follow half of one.
"""

import mlx.core as mx
import numpy as np

from expander.decode import KeyedSampler
from expander.prompt import TYPES
from expander.qmd import SAMPLING, Sampling

FORBIDDEN = -1
BLOCK = 64
START = 0


def _byte_automaton() -> tuple[np.ndarray, int]:
    """(step, between): step[state, byte] is the next state, `between` the one after a newline.

    State START is the beginning, where the end is not yet allowed.
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
    missing = [content, state(), state(), state()]  # by the bytes that the character still lacks
    for here in (empty, content):
        rows[here][0x01:0x80] = content
        rows[here][0xC2:0xE0] = missing[1]
        rows[here][0xE0:0xF0] = missing[2]
        rows[here][0xF0:0xF5] = missing[3]
    for lacking in (1, 2, 3):
        rows[missing[lacking]][0x80:0xC0] = missing[lacking - 1]
    rows[empty][ord("\n")] = FORBIDDEN
    rows[content][ord("\n")] = between
    return np.stack(rows), between


def _byte_letters() -> np.ndarray:
    """The letter that stands for each byte in a byte-level vocabulary, as GPT-2 assigned them: a
    printable Latin-1 character for itself, the rest in order from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters = np.arange(256)
    hidden = [byte for byte in range(256) if byte not in visible]
    letters[hidden] = 0x100 + np.arange(len(hidden))
    return letters


def token_table(tokenizer, width: int, end: int) -> np.ndarray:
    """The state that every token leads to from every state: (states, width) int8, or FORBIDDEN.

    Control tokens and ids beyond the tokenizer are forbidden; llama.cpp would let a control token
    stand for its name inside a line. `end` is allowed where a line may start, but for the first.

    Args:
        tokenizer: a Hugging Face tokenizer with a byte-level vocabulary.
        width: the rows of the model's vocabulary, padding included.

    Raises:
        ValueError: the vocabulary is not byte-level, or cannot write the grammar.
    """
    step, between = _byte_automaton()
    letters = _byte_letters()
    added = tokenizer.added_tokens_decoder  # id → token
    vocabulary = [(t, i) for t, i in tokenizer.get_vocab().items() if i not in added and t]
    for index, token in added.items():
        if not token.special:
            text = "".join(chr(letters[byte]) for byte in token.content.encode())
            vocabulary.append((text, index))
    vocabulary.sort(key=lambda entry: len(entry[0]), reverse=True)
    lengths = np.array([len(token) for token, _ in vocabulary])
    ids = np.array([index for _, index in vocabulary])

    byte_of = np.full(0x110000, -1, np.int16)
    byte_of[letters] = np.arange(256)
    joined = "".join(token for token, _ in vocabulary).encode("utf-32-le")
    data = byte_of[np.frombuffer(joined, np.uint32)]
    if data.min() < 0:
        raise ValueError("the grammar needs a byte-level vocabulary, and this tokenizer's is not")

    # One byte of every token at a time; the longest tokens stand first, so a prefix is left.
    offsets = np.cumsum(lengths) - lengths
    dead = len(step)  # FORBIDDEN as an index: the row appended last
    step = np.vstack([step, np.full((1, 256), FORBIDDEN, np.int8)])
    states = np.repeat(np.arange(dead)[:, None], len(ids), axis=1)  # (states, tokens)
    for position in range(lengths[0]):
        active = np.searchsorted(-lengths, -position)
        states[:, :active] = step[states[:, :active], data[offsets[:active] + position]]

    table = np.full((dead, width), FORBIDDEN, np.int8)
    table[:, ids] = states
    table[between, end] = between
    if (table < 0).all(axis=1).any():
        raise ValueError("this tokenizer's vocabulary cannot write every line of QMD's grammar")
    return table


def best_tokens(logits: mx.array, count: int) -> mx.array:
    """The indices of the `count` largest logits of each row, in no order: (B, V) → (B, count).

    The largest are in the `count` blocks with the largest maxima; to look only there takes a tenth
    of the time that partitioning a whole vocabulary takes.
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
    """Sampling under the grammar as node-llama-cpp 3.20.0 does it for QMD.

    A token is drawn from the bare model: the `top_k` best, of these the fewest that hold `top_p`,
    then the temperature. Only when the grammar forbids it, a second one is drawn in the same way
    from the tokens that it allows. QMD's presence penalty has no effect there (qmd.py), so none here.
    """

    def __init__(self, table: np.ndarray, keys: np.ndarray, sampling: Sampling = SAMPLING):
        """
        Args:
            table: from `token_table`.
            keys: as KeyedSampler's.
        """
        super().__init__(keys)
        self.table = mx.array(table)
        self.sampling = sampling

    def start(self, rows):
        return [mx.full((rows,), START, mx.int32), *super().start(rows)]

    def __call__(self, logits, state):
        at, keys = state  # (B,), (B, 2)
        split = mx.vmap(lambda key: mx.random.split(key, 3))(keys)  # (B, 3, 2)
        tokens = self.draw(logits, split[:, 1])
        following = self.table[at, tokens]
        forbidden = [row for row, to in enumerate(following.tolist()) if to == FORBIDDEN]
        if forbidden:
            rows = mx.array(forbidden)
            allowed = mx.where(self.table[at[rows]] >= 0, logits[rows], -mx.inf)
            tokens[rows] = self.draw(allowed, split[rows, 2])
            following = self.table[at, tokens]
        return tokens, [following.astype(mx.int32), split[:, 0]]

    def draw(self, logits: mx.array, keys: mx.array) -> mx.array:
        """logits (B, V) and keys (B, 2) → tokens (B,)."""
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
        chosen = mx.minimum(chosen, kept.sum(axis=-1) - 1)  # rounding may reach past the last one
        return mx.take_along_axis(best, chosen[:, None].astype(mx.int32), axis=-1)[:, 0]
