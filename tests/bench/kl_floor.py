"""What bfloat16's rounding adds to the KL that GRPO reports, and to its ratios.

    python -m tests.bench.kl_floor                 a random Qwen3 of 8 layers
    python -m tests.bench.kl_floor --model DIR     a real model; bfloat16 is slow on a CPU

The same completions under the same random adapter, in float32 and in bfloat16. "kl" is the k3 estimate
against the model with the adapter off. "crossed" is the share of ratios between two computations of
the same policy that lie outside 1 ± 0.2: with the sampler's path for old_logps, and with the update's.
"""

import argparse
import os
import tempfile
from pathlib import Path

import mlx.core as mx

from expander import model as models
from expander.prompt import encode_prompt
from expander.train.logps import completion_logps
from tests.tiny import make_qwen3

QUERIES = ("auth config", "sourdough starter", "flights to Lisbon", "rotate logs")
LINES = (
    "lex: {0} guide\nlex: {0} steps\nvec: how to do {0} at home\nhyde: A note about {0} in short.\n"
)


def measure(folder: str, dtype: str, scale: float) -> tuple[float, float, float]:
    """(kl per token, share crossed by the sampler's path, by the update's)."""
    os.environ["QMD_DTYPE"] = dtype
    chain = models.read_chain(folder)
    model, tokenizer = models.load_chain(chain)
    models.add_lora(model, models.lora_config(model, 16, 32.0, 0.0, ("q_proj", "v_proj")))
    mx.random.seed(0)
    fresh = {n: mx.random.normal(v.shape) * scale for n, v in models.adapter_weights(model).items()}
    model.load_weights(list(fresh.items()), strict=False)
    prompts = [encode_prompt(tokenizer, query) for query in QUERIES]
    texts = [LINES.format(query) for query in QUERIES]
    completions = [tokenizer.encode(text, add_special_tokens=False) for text in texts]

    def logps(**options) -> tuple[mx.array, mx.array]:
        values, mask, _ = completion_logps(model, prompts, completions, 1.0, **options)
        mx.eval(values)
        return values, mask

    update, mask = logps(with_entropy=True)
    again, _ = logps(with_entropy=True)
    sampler, _ = logps(with_gradient=False)
    with models.adapters_off(model):
        reference, _ = logps(with_gradient=False)
    gap = reference - update
    kl = ((mx.exp(gap) - gap - 1) * mask).sum() / mask.sum()

    def crossed(old: mx.array) -> float:
        ratio = mx.exp(update - old)
        return (((ratio < 0.8) | (ratio > 1.2)) * mask).sum().item() / mask.sum().item()

    return kl.item(), crossed(sampler), crossed(again)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a base model (default: a random one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        show(arguments.model or str(make_qwen3(Path(folder), layers=8, hidden=128, ffn=384)))


def show(model: str) -> None:
    print("adapter    kl float32  kl bfloat16   crossed, sampler's path  crossed, update's path")
    for scale in (0.0, 0.002, 0.005, 0.01, 0.02):
        exact, _, _ = measure(model, "float32", scale)
        rough, other, same = measure(model, "bfloat16", scale)
        print(f"{scale:<9}  {exact:10.2e}  {rough:11.2e}  {other:23.1%}  {same:22.1%}", flush=True)


if __name__ == "__main__":
    main()
