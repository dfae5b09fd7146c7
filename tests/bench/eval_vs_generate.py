"""Compare batched decoding with mlx_lm.generate, which takes one query at a time.

    python -m tests.bench.eval_vs_generate MODEL [QUERIES] [TOKENS]

Both decode the first QUERIES (default 32) of evals/queries.txt greedily to at most TOKENS (default
100) with the same loaded model. They take turns, a batch after as many single queries, so that
other load on the machine affects both. Texts must agree in float32.
"""

import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm

from expander import model as models
from expander.decode import generate
from expander.prompt import encode_prompt

TURNS = 2


def main() -> None:
    name, *numbers = sys.argv[1:]
    queries, limit = [int(number) for number in numbers] + [32, 100][len(numbers) :]
    lines = Path("evals/queries.txt").read_text(encoding="utf-8").splitlines()
    chosen = [line for line in lines if line and not line.startswith("#")][:queries]
    chain = models.read_chain(name)
    model, tokenizer = models.load_chain(chain, fuse_last=True)
    end = models.end_token(tokenizer)
    prompts = [encode_prompt(tokenizer, query) for query in chosen]
    generate(model, prompts[:1], max_tokens=4, end=end)  # warm up

    seconds = {"one at a time": 0.0, "batched": 0.0}
    texts: dict[str, list[str]] = {name: [] for name in seconds}
    tokens = 0
    size = -(-len(prompts) // TURNS)
    for first in range(0, len(prompts), size):
        part = prompts[first : first + size]
        start = time.perf_counter()
        for prompt in part:
            text = mlx_lm.generate(model, tokenizer, prompt=prompt, max_tokens=limit)
            texts["one at a time"].append(text)
        seconds["one at a time"] += time.perf_counter() - start
        start = time.perf_counter()
        completions = generate(model, part, max_tokens=limit, end=end, batch_size=len(part))
        seconds["batched"] += time.perf_counter() - start
        tokens += sum(len(completion.tokens) for completion in completions)
        texts["batched"] += [completion.text(tokenizer) for completion in completions]
    print(f"{name}: {len(prompts)} queries in {TURNS} batches of {size}, {tokens} tokens")
    print(f"{mx.default_device()}, {models.compute_dtype()}")
    for how, spent in seconds.items():
        print(f"  {how:13}  {spent:7.2f} s  {tokens / spent:7.0f} tokens/s")
    print(f"  ratio          {seconds['one at a time'] / seconds['batched']:7.1f}")
    same = sum(a == b for a, b in zip(*texts.values(), strict=True))
    print(f"  same text      {same} of {len(prompts)}")


if __name__ == "__main__":
    main()
