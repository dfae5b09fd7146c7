"""Measure the speed and memory of the quantisers: python -m tests.bench.kquants_speed

One run prints the rates of kquants for the three K-quants and for the mix of a Qwen3-1.7B in Q4_K_M,
of the gguf package's Q8_0 and, if it is installed, of the PyPI package libgguf, which wraps ggml's
own single-threaded C.
"""

import importlib.util
import os
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType

from expander.convert.kquants import THREADS, quantize, tensor_type
from tests.test_kquants import K_TYPES

ROUNDS = 5
LAYERS, HIDDEN, FFN, KV, VOCABULARY = 28, 2048, 6144, 1024, 151_936
Quantiser = Callable[[np.ndarray, GGMLQuantizationType], np.ndarray]


def mix() -> Counter[GGMLQuantizationType]:
    """Parameters of each type in a Qwen3-1.7B quantised to Q4_K_M."""
    shapes = {"token_embd.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        for name, shape in {
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (KV, HIDDEN),
            "attn_v": (KV, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (FFN, HIDDEN),
            "ffn_up": (FFN, HIDDEN),
            "ffn_down": (HIDDEN, FFN),
        }.items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
    counts = Counter()
    for name, shape in shapes.items():
        ftype = LlamaFileType.MOSTLY_Q4_K_M
        counts[tensor_type(name, shape, ftype, n_layers=LAYERS, tied=True)] += shape[0] * shape[1]
    return counts


def rate(run: Quantiser, array: np.ndarray, qtype: GGMLQuantizationType) -> float:
    """Million parameters per second, the best of ROUNDS."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run(array, qtype)
        seconds.append(time.perf_counter() - start)
    return array.size / min(seconds) / 1e6


def rates(name: str, run: Quantiser, array: np.ndarray) -> float:
    """Print the rate of each K-quant and of the mix; returns the latter."""
    by_type = {qtype: rate(run, array, qtype) for qtype in K_TYPES}
    counts = mix()
    mixed = counts.total() / sum(count / by_type[qtype] for qtype, count in counts.items())
    figures = "  ".join(f"{qtype.name} {value:5.1f}" for qtype, value in by_type.items())
    print(f"{name:22} {figures}  Q4_K_M mix {mixed:5.1f}")
    return mixed


def main() -> None:
    array = np.random.default_rng(0).standard_normal((2048, 2048)).astype(np.float32)
    print(f"M parameters/s, best of {ROUNDS} rounds; {os.cpu_count()} cores")
    ours = rates(f"kquants, {THREADS} threads", quantize, array)
    print(f"{'gguf':22} Q8_0 {rate(quantize, array, GGMLQuantizationType.Q8_0):5.1f}")
    if importlib.util.find_spec("libgguf"):
        from libgguf import quantize_rows

        theirs = rates("libgguf, 1 thread", quantize_rows, array)
        print(f"kquants / libgguf, mix: {ours / theirs:.2f}")
    for qtype in K_TYPES:
        tracemalloc.start()
        result = quantize(array, qtype)
        peak = tracemalloc.get_traced_memory()[1] - result.nbytes
        tracemalloc.stop()
        print(f"{qtype.name}: peak {peak / 1e6:.0f} MB besides the input and the result")


if __name__ == "__main__":
    main()
