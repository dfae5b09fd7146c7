"""decode.py: the same tokens as mlx-lm's generator in batches of any size, and how rows end."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from expander import model as models
from expander.decode import Completion, Sampler, TemperatureSampler, generate, random_keys
from expander.eval.grammar import QmdSampler
from expander.prompt import encode_prompt

QUERIES = ["tls", "rotate nginx logs", "sourdough starter smells like acetone", "Lisbon tram 28"]
LIMIT = 24


@pytest.fixture(scope="module")
def loaded(tiny_qwen3):
    model, tokenizer = models.load_chain(models.read_chain(str(tiny_qwen3)))
    prompts = [encode_prompt(tokenizer, query) for query in QUERIES]
    assert len({len(p) for p in prompts}) == len(prompts)  # the batch needs padding
    return model, prompts, models.end_token(tokenizer)


@pytest.fixture(scope="module")
def expected_tokens(loaded) -> list[list[int]]:
    """Greedy tokens of mlx-lm's own generator, one prompt at a time."""
    from mlx_lm.generate import generate_step

    model, prompts, _ = loaded
    return [
        [token for token, _ in generate_step(mx.array(p), model, max_tokens=LIMIT)] for p in prompts
    ]


def ending(tokens: list[list[int]]) -> int:
    """A token that ends some of these completions early, others late or never."""
    firsts = {
        t: [row.index(t) if t in row else LIMIT for row in tokens] for row in tokens for t in row
    }
    return max(firsts, key=lambda t: len(set(firsts[t])))


def cut(tokens: list[int], end: int) -> Completion:
    """The expected completion if decoding stops at `end`."""
    if end in tokens:
        return Completion(tokens[: tokens.index(end) + 1], finished=True)
    return Completion(tokens, finished=False)


def test_greedy_tokens_equal_mlx_lms(loaded, expected_tokens):
    model, prompts, end = loaded
    for prompt, expected in zip(prompts, expected_tokens, strict=True):
        assert generate(model, [prompt], max_tokens=LIMIT, end=end) == [cut(expected, end)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_completions_do_not_depend_on_the_batch_size(batch_size, loaded, expected_tokens):
    """Rows end at different times, and with a small batch waiting prompts take their place."""
    model, prompts, _ = loaded
    end = ending(expected_tokens)
    expected = [cut(tokens, end) for tokens in expected_tokens]
    assert {c.finished for c in expected} == {True, False}
    assert len({len(c.tokens) for c in expected}) > 1
    assert generate(model, prompts, max_tokens=LIMIT, end=end, batch_size=batch_size) == expected
    many = generate(model, prompts * 3, max_tokens=LIMIT, end=end, batch_size=batch_size)
    assert many == expected * 3


@pytest.mark.parametrize("batch_size", [4, 5])
def test_samples_are_grouped_by_prompt(batch_size, loaded, expected_tokens):
    model, prompts, _ = loaded
    end = ending(expected_tokens)
    completions = generate(
        model, prompts, max_tokens=LIMIT, end=end, samples=3, batch_size=batch_size
    )
    assert completions == [cut(tokens, end) for tokens in expected_tokens for _ in range(3)]


def test_the_end_token_is_kept_and_the_limit_is_respected(loaded, expected_tokens):
    model, prompts, _ = loaded
    end = expected_tokens[0][5]
    first = expected_tokens[0].index(end)
    [stopped] = generate(model, prompts[:1], max_tokens=LIMIT, end=end)
    assert stopped.finished and stopped.tokens == expected_tokens[0][: first + 1]
    [at_the_limit] = generate(model, prompts[:1], max_tokens=first + 1, end=end)
    assert at_the_limit == stopped  # the last allowed token may be the end
    [truncated] = generate(model, prompts[:1], max_tokens=first, end=end)
    assert not truncated.finished and truncated.tokens == expected_tokens[0][:first]


def test_a_sample_depends_only_on_its_key(loaded):
    model, prompts, end = loaded
    names = [f"{prompt} {sample}" for prompt in range(len(prompts)) for sample in range(4)]

    def sample(first: int, last: int, seed: int = 7, batch_size: int = 32) -> list[Completion]:
        keys = random_keys(names, seed)[4 * first : 4 * last]
        return generate(
            model,
            prompts[first:last],
            max_tokens=8,
            end=end,
            samples=4,
            sampler=TemperatureSampler(1.0, keys),
            batch_size=batch_size,
        )

    completions = sample(0, 4)
    assert len({tuple(c.tokens) for c in completions}) > 12
    assert sample(0, 4, batch_size=3) == completions
    assert sample(0, 1) + sample(1, 4) == completions
    assert sample(0, 4, seed=8) != completions


def test_the_temperature_sampler_draws_from_the_softmax():
    """20,000 draws at T = 2 against exp(logit / 2), normalised; 4 standard errors are 0.014."""
    sampler = TemperatureSampler(2.0, random_keys(list(map(str, range(20_000))), 0))
    logits = mx.broadcast_to(mx.array([0.0, 2.0, 4.0]), (20_000, 3))
    state = sampler.start(20_000)
    first, state = sampler(logits, state)
    second, _ = sampler(logits, state)
    for drawn in (first, second):
        shares = [(drawn == i).astype(mx.float32).mean().item() for i in range(3)]
        for share, expected in zip(shares, (0.0900, 0.2447, 0.6652), strict=True):
            assert abs(share - expected) < 0.014
    # Successive draws are independent: they agree with 0.09^2 + 0.2447^2 + 0.6652^2.
    assert abs((first == second).astype(mx.float32).mean().item() - 0.5105) < 0.015


class Counting(Sampler):
    """Greedy; its state counts each row's tokens. Records its inputs."""

    def __init__(self):
        self.seen = []

    def start(self, rows):
        return [mx.zeros((rows,), dtype=mx.int32)]

    def __call__(self, logits, state):
        tokens, _ = super().__call__(logits, [])
        self.seen.append((logits.shape[0], logits.dtype, state[0].tolist()))
        return tokens, [state[0] + 1]


def test_a_samplers_state_moves_with_its_row(loaded, expected_tokens):
    model, prompts, _ = loaded
    end = ending(expected_tokens)
    sampler = Counting()
    completions = generate(model, prompts, max_tokens=LIMIT, end=end, sampler=sampler, batch_size=2)
    assert completions == [cut(tokens, end) for tokens in expected_tokens]
    assert all(rows == len(state) for rows, _, state in sampler.seen)
    assert all(dtype == mx.float32 for _, dtype, _ in sampler.seen)
    counts = [count for _, _, state in sampler.seen for count in state]
    lengths = [len(c.tokens) for c in completions]
    # Each row is sampled once per token, counting from 0; ended rows may be sampled again.
    for count in range(LIMIT):
        assert counts.count(count) >= sum(length > count for length in lengths)
    assert any(len(set(state)) > 1 for _, _, state in sampler.seen)  # a new row starts at 0


def plain(model, prompt: list[int], end: int, sampler: Sampler) -> Completion:
    """One completion by itself: every token is read before the model runs on it."""
    cache, state, done = make_prompt_cache(model), sampler.start(1), []
    ids = prompt
    while len(done) < LIMIT and end not in done:
        logits = model(mx.array([ids]), cache=cache)[:, -1].astype(mx.float32)
        tokens, state = sampler(logits, state)
        done += tokens.tolist()
        ids = done[-1:]
    return cut(done, end)


@pytest.mark.parametrize(("kind", "seed"), [("greedy", 0), ("temperature", 1), ("qmd", 2)])
def test_completions_equal_those_of_a_plain_loop(kind, seed, loaded, expected_tokens):
    """Rows end and are replaced at different steps; none sees the steps submitted ahead."""
    model, prompts, _ = loaded
    end, samples = ending(expected_tokens), 3
    keys = random_keys([str(i) for i in range(len(prompts) * samples)], seed)
    # A made-up grammar of two states, each of which forbids some tokens.
    table = np.random.default_rng(seed).integers(-1, 2, (2, model.args.vocab_size)).astype(np.int8)
    table[:, end] = 0

    def sampler(first: int, last: int) -> Sampler:
        if kind == "qmd":
            return QmdSampler(table, keys[first:last])
        return TemperatureSampler(0.3, keys[first:last]) if kind == "temperature" else Sampler()

    expected = [
        plain(model, prompts[i // samples], end, sampler(i, i + 1)) for i in range(len(keys))
    ]
    assert len({len(c.tokens) for c in expected}) > 1
    for batch_size in (1, 3, 5, 12):
        completions = generate(
            model,
            prompts,
            max_tokens=LIMIT,
            end=end,
            samples=samples,
            sampler=sampler(0, len(keys)),
            batch_size=batch_size,
        )
        assert completions == expected, batch_size


def test_progress_counts_finished_completions(loaded, expected_tokens):
    model, prompts, _ = loaded
    counts = []
    generate(
        model,
        prompts,
        max_tokens=LIMIT,
        end=ending(expected_tokens),
        samples=2,
        batch_size=3,
        progress=counts.append,
    )
    assert counts == list(range(1, 9))


def test_no_prompts(loaded):
    model, _, end = loaded
    assert generate(model, [], max_tokens=4, end=end) == []


def test_untied_and_llama_models(tiny_llama, tmp_path):
    import tiny
    from mlx_lm.generate import generate_step

    for folder in (tiny_llama, tiny.make_qwen3(tmp_path, tied=False)):
        model, tokenizer = models.load_chain(models.read_chain(str(folder)))
        prompts = [encode_prompt(tokenizer, query) for query in QUERIES]
        completions = generate(model, prompts, max_tokens=8, end=-1)
        for prompt, completion in zip(prompts, completions, strict=True):
            steps = generate_step(mx.array(prompt), model, max_tokens=8)
            assert completion.tokens == [token for token, _ in steps]
