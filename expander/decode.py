"""Batched decoding, one for rollouts and evaluation: every prompt prefilled once, rows refilled."""

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from expander.model import hidden_states, lm_head


@dataclass
class Completion:
    """Sampled ids as they came, the end token included; `finished` is False when cut at the limit."""

    tokens: list[int]
    finished: bool = False

    def text(self, tokenizer) -> str:
        """Without the end token."""
        return tokenizer.decode(self.tokens[:-1] if self.finished else self.tokens)


class Sampler:
    """Greedy choice. A sampler maps logits to tokens and may carry arrays of one row a sequence."""

    def start(self, rows: int) -> list[mx.array]:
        """The state of `rows` new sequences."""
        return []

    def __call__(self, logits: mx.array, state: list[mx.array]) -> tuple[mx.array, list[mx.array]]:
        """logits (B, V) float32 → tokens (B,), and the state after them."""
        return mx.argmax(logits, axis=-1), state


class KeyedSampler(Sampler):
    """Every sequence has a random key of its own: its text does not depend on the others in the batch."""

    def __init__(self, keys: np.ndarray):
        """
        Args:
            keys: (sequences, 2) uint32, in the order in which the sequences are started.
        """
        self.keys = mx.array(keys)
        self.started = 0

    def start(self, rows):
        first, self.started = self.started, self.started + rows
        return [self.keys[first : self.started]]


class TemperatureSampler(KeyedSampler):
    """softmax(logits / T), drawn by the Gumbel trick: no sorting."""

    def __init__(self, temperature: float, keys: np.ndarray):
        super().__init__(keys)
        self.temperature = temperature

    def __call__(self, logits, state):
        split = mx.vmap(mx.random.split)(state[0])  # (B, 2, 2)
        draw = mx.vmap(lambda row, key: mx.random.categorical(row, key=key))
        return draw(logits / self.temperature, split[:, 1]), [split[:, 0]]


def random_keys(names: Sequence[str], seed: int) -> np.ndarray:
    """A key for every sequence, from the seed and the sequence's own name alone: (N, 2) uint32."""
    digests = [hashlib.sha256(f"{seed}\n{name}".encode()).digest()[:8] for name in names]
    return np.frombuffer(b"".join(digests), np.uint32).reshape(-1, 2)


def _prefill(model: nn.Module, prompts: Sequence[Sequence[int]], copies: Sequence[int]):
    """(cache, logits) after the prompts, each computed once and repeated `copies` times."""
    from mlx_lm.models.cache import BatchKVCache

    longest = max(map(len, prompts))
    padding = [longest - len(p) for p in prompts]
    tokens = mx.array([[0] * pad + list(p) for pad, p in zip(padding, prompts, strict=True)])
    cache = [BatchKVCache(padding) for _ in model.layers]
    last = hidden_states(model, tokens, cache)[:, -1]  # (P, D)
    rows = mx.array([i for i, n in enumerate(copies) for _ in range(n)])
    for layer in cache:
        layer.filter(rows)
    return cache, lm_head(model)(last)[rows].astype(mx.float32)


def length_groups(lengths: Sequence[int]) -> list[list[int]]:
    """Indices by length, the shortest first, parted where a prompt is over twice as long as the
    first of its group and 64 tokens more: a batch and its cache are as wide as the longest row.

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
) -> list[Completion]:
    """Complete every prompt `samples` times, many rows at once.

    Rows that finish leave the batch and waiting prompts take their place.

    Args:
        prompts: token ids.
        end: the id that ends a completion; it is kept in the completion.
        batch_size: the most rows decoded together.
        progress: called with the number of completions done, whenever it changes.

    Returns:
        `samples` completions of the first prompt, then of the second, and so on.
    """
    sampler = sampler or Sampler()
    head = lm_head(model)
    done = [Completion([]) for _ in range(len(prompts) * samples)]
    waiting = deque(range(len(done)))
    active: list[int] = []  # indices into `done`, one a row of the batch
    cache, state, logits = [], [], None
    finished = 0

    def admit() -> None:
        """Fill the free rows: a prompt's waiting samples share one prefill."""
        nonlocal cache, state, logits
        rows = [waiting.popleft() for _ in range(min(batch_size - len(active), len(waiting)))]
        sources = sorted({row // samples for row in rows})
        copies = [sum(row // samples == source for row in rows) for source in sources]
        fresh, fresh_logits = _prefill(model, [prompts[source] for source in sources], copies)
        fresh_state = sampler.start(len(rows))
        if active:
            for old, new in zip(cache, fresh, strict=True):
                old.extend(new)
            logits = mx.concatenate([logits, fresh_logits])
            state = [mx.concatenate(pair) for pair in zip(state, fresh_state, strict=True)]
        else:
            cache, state, logits = fresh, fresh_state, fresh_logits
        active.extend(rows)

    while active or waiting:
        # A refill costs a prefill, a compaction a copy of the cache: both wait for a few free rows.
        if waiting and (not active or batch_size - len(active) >= max(1, batch_size // 8)):
            admit()
        tokens, state = sampler(logits, state)
        keep = []
        for row, (index, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            completion = done[index]
            if completion.finished or len(completion.tokens) >= max_tokens:
                continue  # a row that ended earlier and still awaits compaction
            completion.tokens.append(token)
            completion.finished = token == end
            if completion.finished or len(completion.tokens) == max_tokens:
                finished += 1
                if progress is not None:
                    progress(finished)
            else:
                keep.append(row)
        if not keep:
            active, logits = [], None
            continue
        free = len(active) - len(keep)
        if free and (waiting or free >= max(1, len(active) // 8)):
            rows = mx.array(keep)
            for layer in cache:
                layer.filter(rows)
            state = [array[rows] for array in state]
            tokens = tokens[rows]
            active = [active[row] for row in keep]
        logits = head(hidden_states(model, tokens[:, None], cache)[:, -1]).astype(mx.float32)
    return done
