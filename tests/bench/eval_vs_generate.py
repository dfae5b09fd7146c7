"""Compare batched decoding with mlx-lm's: mlx_lm.generate, one query at a time, and batch_generate.

    python -m tests.bench.eval_vs_generate MODEL [QUERIES] [TOKENS] [--batches-only]

All decode the first QUERIES (default 32) of evals/queries.txt greedily to at most TOKENS (default
100) with the same loaded model. They take turns on parts of the queries, so that other load on the
machine affects all. Both clocks are shown, the wall's and the CPU's. Texts must agree in float32.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm

from expander import model as models
from expander.decode import generate
from expander.prompt import encode_prompt

TURNS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("queries", type=int, nargs="?", default=32)
    parser.add_argument("tokens", type=int, nargs="?", default=100)
    parser.add_argument("--batches-only", action="store_true", help="leave out mlx_lm.generate")
    arguments = parser.parse_args()
    limit = arguments.tokens
    lines = Path("evals/queries.txt").read_text(encoding="utf-8").splitlines()
    chosen = [line for line in lines if line and not line.startswith("#")][: arguments.queries]
    model, tokenizer = models.load_chain(models.read_chain(arguments.model), fuse_last=True)
    end = models.end_token(tokenizer)
    tokenizer.eos_token_ids = {end}
    prompts = [encode_prompt(tokenizer, query) for query in chosen]
    generate(model, prompts[:1], max_tokens=4, end=end)  # warm up
    tokens = 0

    def ours(part: list[list[int]]) -> list[str]:
        nonlocal tokens
        completions = generate(model, part, max_tokens=limit, end=end, batch_size=len(part))
        tokens += sum(len(completion.tokens) for completion in completions)
        return [completion.text(tokenizer) for completion in completions]

    def batch_generate(part: list[list[int]]) -> list[str]:
        sizes = {"completion_batch_size": len(part), "prefill_batch_size": len(part)}
        return mlx_lm.batch_generate(model, tokenizer, part, max_tokens=limit, **sizes).texts

    def one_at_a_time(part: list[list[int]]) -> list[str]:
        return [mlx_lm.generate(model, tokenizer, prompt=p, max_tokens=limit) for p in part]

    ways: dict[str, Callable] = {"batch_generate": batch_generate, "ours": ours}
    if not arguments.batches_only:
        ways["one at a time"] = one_at_a_time
    spent = {name: [0.0, 0.0] for name in ways}
    texts: dict[str, list[str]] = {name: [] for name in ways}
    size = -(-len(prompts) // TURNS)
    for first in range(0, len(prompts), size):
        for name, way in ways.items():
            started = time.perf_counter(), time.process_time()
            texts[name] += way(prompts[first : first + size])
            spent[name][0] += time.perf_counter() - started[0]
            spent[name][1] += time.process_time() - started[1]
    print(
        f"{arguments.model}: {len(prompts)} queries in {TURNS} batches of {size}, {tokens} tokens"
    )
    print(f"{mx.default_device()}, {models.compute_dtype()}")
    for name, (wall, cpu) in spent.items():
        ratio = f"{wall / spent['ours'][0]:5.2f} and {cpu / spent['ours'][1]:5.2f} times ours"
        same = sum(a == b for a, b in zip(texts[name], texts["ours"], strict=True))
        print(f"  {name:15} {wall:7.2f} s, CPU {cpu:7.2f} s, {ratio}; {same} texts equal")


if __name__ == "__main__":
    main()
