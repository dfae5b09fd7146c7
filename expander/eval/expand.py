"""Expand queries with a model: greedily, or sampled under QMD's grammar."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from expander import cli
from expander.decode import Completion, Sampler, generate, length_groups, random_keys
from expander.eval.grammar import QmdSampler, token_table
from expander.eval.measure import Expansion, Queries
from expander.model import Chain, end_token, load_chain, model_config, wire_memory
from expander.prompt import encode_prompt
from expander.qmd import QMD_SYSTEM_PROMPT, SAMPLING

GREEDY_MAX_TOKENS = 200


def decode_settings(
    mode: str,
    max_new_tokens: int | None,
    qmd_system_prompt: bool,
    samples: int,
    max_seconds: float = 0.0,
) -> dict:
    """The settings that affect the text, for the record; `--compare` warns if they differ.

    Args:
        mode: "greedy" or "qmd".
        max_new_tokens: None is the mode's default.
        max_seconds: an expansion is cut off after them; 0 is never.
    """
    settings = {
        "mode": mode,
        "max_new_tokens": max_new_tokens or GREEDY_MAX_TOKENS,
        "qmd_system_prompt": qmd_system_prompt,
        "samples": samples,
    }
    if mode == "qmd":
        settings["max_new_tokens"] = max_new_tokens or SAMPLING.max_tokens
        sampling = asdict(SAMPLING)
        settings |= {name: sampling[name] for name in ("temperature", "top_k", "top_p")}
    if max_seconds:
        settings["max_seconds"] = max_seconds
    return settings


class Decoder:
    """A loaded model that decodes queries with the given settings.

    Args:
        loaded: the chain's model and tokenizer, from `load_chain`.
        settings: from `decode_settings`.
        batch_size: maximum number of sequences decoded together.
        seed: seed for sampling.
    """

    def __init__(self, chain: Chain, loaded: tuple, settings: dict, batch_size: int, seed: int):
        self.settings, self.batch_size, self.seed = settings, batch_size, seed
        self.model, self.tokenizer = loaded
        self.end = end_token(self.tokenizer)
        config = model_config(chain.path)
        self.context = config.get("max_position_embeddings")
        self.grammar = None
        if settings["mode"] == "qmd":
            self.grammar = token_table(self.tokenizer, config["vocab_size"], self.end)

    def encode(self, query: str) -> list[int]:
        """The prompt's token ids.

        Raises:
            ValueError: prompt and completion do not fit into the model's context.
        """
        system = QMD_SYSTEM_PROMPT if self.settings["qmd_system_prompt"] else None
        ids, limit = encode_prompt(self.tokenizer, query, system), self.settings["max_new_tokens"]
        if self.context and len(ids) + limit > self.context:
            raise ValueError(
                f"query {query[:40]!r} of {len(query)} characters: its prompt of {len(ids)} tokens "
                f"and {limit} new ones exceed the model's context of {self.context}"
            )
        return ids

    def decode(
        self,
        queries: Sequence[tuple[str, list[int]]],
        samples: int,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[list[Completion], float]:
        """Complete (query, prompt ids) pairs.

        A text depends on the model, the seed and its own query, not on the rest of the batch.

        Returns:
            `samples` completions of the first query, then of the second, and so on; and the
            seconds it took.
        """
        sampler = Sampler()
        if self.grammar is not None:
            names = [f"{query}\n{sample}" for query, _ in queries for sample in range(samples)]
            sampler = QmdSampler(self.grammar, random_keys(names, self.seed))
        start = time.monotonic()
        completions = generate(
            self.model,
            [ids for _, ids in queries],
            max_tokens=self.settings["max_new_tokens"],
            end=self.end,
            samples=samples,
            sampler=sampler,
            batch_size=self.batch_size,
            progress=progress,
            max_seconds=self.settings.get("max_seconds", 0.0),
        )
        return completions, time.monotonic() - start


class Expander:
    """A model, loaded once, that expands queries greedily or as QMD does."""

    def __init__(
        self,
        chain: Chain,
        max_new_tokens: int | None,
        qmd_system_prompt: bool,
        batch_size: int,
        seed: int,
        max_seconds: float = 0.0,
    ):
        wire_memory()
        self.chain, self.loaded = chain, load_chain(chain, fuse_last=True)
        self.options, self.max_seconds = (max_new_tokens, qmd_system_prompt), max_seconds
        self.batch_size, self.seed = batch_size, seed

    def decoder(self, mode: str, samples: int) -> Decoder:
        """What completes the prompts of one mode, greedy or qmd."""
        settings = decode_settings(mode, *self.options, samples, self.max_seconds)
        return Decoder(self.chain, self.loaded, settings, self.batch_size, self.seed)

    def expand(
        self, queries: Queries, mode: str, samples: int
    ) -> tuple[list[list[Expansion]], dict]:
        """Expand every query; return the expansions of each, and the record's "decode", "speed"."""
        decoder = self.decoder(mode, samples)
        expansions, speed = expand(decoder, queries)
        # A batch's time does not show how long a user waits for one query, so time one separately.
        tokens, seconds = speed["tokens"], speed["seconds"]
        if len(queries) * samples > 1:
            query = queries[0][0]
            [first], seconds = decoder.decode([(query, decoder.encode(query))], samples=1)
            tokens = len(first.tokens)
        speed["alone"] = {"tokens": tokens, "seconds": seconds}
        return expansions, {"decode": decoder.settings, "speed": speed}

    def as_qmd(self, samples: int) -> Callable[[Sequence[str]], list[list[str]]]:
        """Queries → the completions of each, decoded as QMD does."""

        def completions(queries: Sequence[str]) -> list[list[str]]:
            decoder = self.decoder("qmd", samples)
            expansions, _ = expand(decoder, [(query, None) for query in queries])
            return [[expansion.text for expansion in found] for found in expansions]

        return completions


def expand(decoder: Decoder, queries: Queries) -> tuple[list[list[Expansion]], dict]:
    """Expand every query; return the expansions of each and the record's "speed".

    Raises:
        ValueError: a query is too long for the model, or its tokenizer cannot write QMD's grammar.
    """
    samples = decoder.settings["samples"]
    prompts = [decoder.encode(query) for query, _ in queries]
    show = cli.Progress("expanded", len(prompts) * samples)
    order, decoded, seconds = [], [], 0.0
    for group in length_groups(list(map(len, prompts))):
        chosen = [(queries[index][0], prompts[index]) for index in group]
        completions, spent = decoder.decode(chosen, samples, lambda n: show(len(decoded) + n))
        order.extend(group)
        decoded.extend(completions)
        seconds += spent

    expansions = {}
    for place, index in enumerate(order):
        completions = decoded[place * samples : (place + 1) * samples]
        expansions[index] = [
            Expansion(completion.text(decoder.tokenizer), not completion.finished)
            for completion in completions
        ]
    tokens = sum(len(completion.tokens) for completion in decoded)
    speed = {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "batch_size": decoder.batch_size,
    }
    return [expansions[index] for index in range(len(queries))], speed
