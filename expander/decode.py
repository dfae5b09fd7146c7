"""Batched decoding for rollouts and evaluation.

Each prompt is prefilled once for all its samples; finished rows are replaced by waiting ones. A step
is submitted before the tokens of the last one are read, so the device does not wait for Python; a
row that ends is therefore decoded for one more step. Shapes: B rows in the batch, P prompts, V
vocabulary, D hidden size.
"""

import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ArraysCache, BatchKVCache, make_prompt_cache

from expander.model import hidden_states, lm_head


@dataclass
class Completion:
    """Sampled token ids with the end token; `finished` is False if cut off at the token limit."""

    tokens: list[int]
    finished: bool = False

    def text(self, tokenizer) -> str:
        """The decoded text, without the end token."""
        return tokenizer.decode(self.tokens[:-1] if self.finished else self.tokens)


class Sampler:
    """Greedy choice, and the interface of samplers.

    A sampler's state is a list of arrays with one row per sequence; `generate` keeps their rows in
    step with the batch.
    """

    def start(self, rows: int) -> list[mx.array]:
        """The state of `rows` new sequences."""
        return []

    def __call__(self, logits: mx.array, state: list[mx.array]) -> tuple[mx.array, list[mx.array]]:
        """Map logits (B, V) in float32 to tokens (B,) and the next state."""
        return mx.argmax(logits, axis=-1), state


class KeyedSampler(Sampler):
    """Base of random samplers: one key per sequence, so a text does not depend on its batch."""

    def __init__(self, keys: np.ndarray):
        """
        Args:
            keys: (sequences, 2) uint32, in the order in which sequences start.
        """
        self.keys = mx.array(keys)
        self.started = 0

    def start(self, rows):
        first, self.started = self.started, self.started + rows
        return [self.keys[first : self.started]]


class TemperatureSampler(KeyedSampler):
    """Sample from softmax(logits / temperature)."""

    def __init__(self, temperature: float, keys: np.ndarray):
        super().__init__(keys)
        self.temperature = temperature

    def __call__(self, logits, state):
        split = mx.vmap(mx.random.split)(state[0])  # (B, 2, 2)
        draw = mx.vmap(lambda row, key: mx.random.categorical(row, key=key))
        return draw(logits / self.temperature, split[:, 1]), [split[:, 0]]


def random_keys(names: Sequence[str], seed: int) -> np.ndarray:
    """One key per sequence, (N, 2) uint32, which depends only on the seed and the name."""
    digests = [hashlib.sha256(f"{seed}\n{name}".encode()).digest()[:8] for name in names]
    return np.frombuffer(b"".join(digests), np.uint32).reshape(-1, 2)


class RowCache(BatchKVCache):
    """mlx-lm's cache of left-padded rows, with the padding known to Python.

    BatchKVCache reads the padding from the device when rows are removed, and would wait for the
    step in progress, once per layer.
    """

    def __init__(self, padding: Sequence[int]):
        super().__init__(list(padding))
        self.padding = list(padding)

    def filter(self, batch_indices: Sequence[int]) -> None:
        self.padding = [self.padding[position] for position in batch_indices]
        common = min(self.padding)
        self.padding = [pad - common for pad in self.padding]
        kept = mx.array(batch_indices)
        self.keys = self.keys[:, :, common:][kept]
        self.values = self.values[:, :, common:][kept]
        self.offset = self.offset[kept]
        self.left_padding = mx.array(self.padding)
        self._idx -= common

    def extend(self, other: "RowCache") -> None:
        end = max(self._idx, other._idx)
        self.padding = [pad + end - cache._idx for cache in (self, other) for pad in cache.padding]
        super().extend(other)


def batch_caches(model: nn.Module, padding, attention: type = RowCache, state: type = ArraysCache):
    """One cache per layer for left-padded rows, by the kind that mlx-lm gives the layer.

    The padding never reaches the state of a convolution or recurrence: ArraysCache masks it. A layer
    with a sliding window keeps all keys, and its mask hides those before the window.

    Args:
        padding: pad tokens of each row.
        attention: made from the padding.
        state: made from the number of arrays and the padding.
    """
    return [
        state(len(cache.cache), padding) if isinstance(cache, ArraysCache) else attention(padding)
        for cache in make_prompt_cache(model)
    ]


def keep_rows(cache: list, positions: Sequence[int]) -> None:
    """Keep these rows of every layer's cache; a row may be repeated."""
    for layer in cache:
        layer.filter(positions if isinstance(layer, RowCache) else mx.array(positions))


class Batch:
    """The rows that are decoded together: cache, sampler state and newest token of each.

    The newest tokens are sampled, but neither read nor run through the model.
    """

    def __init__(self, model: nn.Module, sampler: Sampler):
        self.model, self.head, self.sampler = model, lm_head(model), sampler
        self.clear()

    def clear(self) -> None:
        self.rows: list[int] = []  # the index of each row's completion
        self.cache, self.state = [], []
        self.tokens = None  # (B,)

    def add(self, rows: Sequence[int], prompts: Sequence[Sequence[int]], copies: Sequence[int]):
        """Add rows: run each prompt once and give it `copies` rows, one per sample."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        ids = [[0] * pad + list(ids) for pad, ids in zip(padding, prompts, strict=True)]
        cache = batch_caches(self.model, padding)
        last = hidden_states(self.model, mx.array(ids), cache)[:, -1]  # (P, D)
        repeated = [i for i, count in enumerate(copies) for _ in range(count)]
        keep_rows(cache, repeated)
        logits = self.head(last)[mx.array(repeated)].astype(mx.float32)
        tokens, state = self.sampler(logits, self.sampler.start(len(rows)))
        if self.rows:
            for old, new in zip(self.cache, cache, strict=True):
                old.extend(new)
            self.tokens = mx.concatenate([self.tokens, tokens])
            self.state = [mx.concatenate(pair) for pair in zip(self.state, state, strict=True)]
        else:
            self.cache, self.state, self.tokens = cache, state, tokens
        self.rows.extend(rows)

    def keep(self, positions: Sequence[int]) -> None:
        """Remove all rows but those at these positions."""
        keep_rows(self.cache, positions)
        kept = mx.array(positions)
        self.state = [array[kept] for array in self.state]
        self.tokens = self.tokens[kept]
        self.rows = [self.rows[position] for position in positions]

    def step(self) -> None:
        """Submit the next token of every row: run the model on the newest ones and sample."""
        hidden = hidden_states(self.model, self.tokens[:, None], self.cache)[:, -1]  # (B, D)
        logits = self.head(hidden).astype(mx.float32)
        self.tokens, self.state = self.sampler(logits, self.state)
        mx.async_eval(self.tokens, self.state)


def length_groups(lengths: Sequence[int]) -> list[list[int]]:
    """Group indices by length, shortest first, because a batch is padded to its longest row.

    A new group starts at a prompt longer than 64 tokens plus twice the first of the group.

    >>> length_groups([2000, 20, 30, 104, 105])
    [[1, 2, 3], [4], [0]]
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not groups or lengths[index] > 2 * lengths[groups[-1][0]] + 64:
            groups.append([])
        groups[-1].append(index)
    return groups


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    end: int,
    samples: int = 1,
    sampler: Sampler | None = None,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
    max_seconds: float = 0.0,
) -> list[Completion]:
    """Complete every prompt `samples` times, in batches.

    Args:
        prompts: token ids.
        max_tokens: maximum length of a completion, including the end token.
        end: the token id that ends a completion.
        sampler: greedy by default.
        batch_size: maximum number of rows decoded together.
        progress: called with the number of finished completions whenever it changes.
        max_seconds: cut a completion off so long after its batch row started; 0 is never.

    Returns:
        `samples` completions of the first prompt, then of the second, and so on.
    """
    completions = [Completion([]) for _ in range(len(prompts) * samples)]
    waiting = deque(range(len(completions)))
    batch, done = Batch(model, sampler or Sampler()), 0
    limits = [max_tokens] * len(completions)  # lowered when a completion's time is up
    deadlines: dict[int, float] = {}
    while batch.rows or waiting:
        # Adding rows takes a prefill and removing rows copies the cache, so do several at a time.
        free = batch_size - len(batch.rows)
        if waiting and (not batch.rows or free >= max(1, batch_size // 8)):
            rows = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            counts = Counter(row // samples for row in rows)  # samples by prompt
            deadlines |= dict.fromkeys(rows, time.monotonic() + max_seconds)
            batch.add(rows, [prompts[index] for index in counts], list(counts.values()))
        rows, tokens, unfinished = batch.rows, batch.tokens, []
        active = [(completions[row], limits[row]) for row in rows]
        if any(not c.finished and len(c.tokens) + 1 < limit for c, limit in active):
            batch.step()
        for position, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            completion = completions[row]
            if completion.finished or len(completion.tokens) >= limits[row]:
                continue  # ended at an earlier step, but not removed yet
            completion.tokens.append(token)
            completion.finished = token == end
            if max_seconds and time.monotonic() >= deadlines[row]:
                limits[row] = len(completion.tokens)
            if completion.finished or len(completion.tokens) == limits[row]:
                done += 1
                if progress is not None:
                    progress(done)
            else:
                unfinished.append(position)
        if not unfinished:
            batch.clear()
            continue
        ended = len(batch.rows) - len(unfinished)
        if ended and (waiting or ended >= max(1, len(batch.rows) // 8)):
            batch.keep(unfinished)
    return completions
