"""Compare kquants with ggml's own quantiser, byte for byte.

    python -m tests.bench.kquants_vs_ggml --llama DIR [--blocks N] [--digests]

DIR holds llama.cpp's shared libraries (libggml-base and libllama), for example the folder `bins/…`
of the npm package `@node-llama-cpp/linux-x64`. Blocks of many kinds of weights go through
ggml_quantize_chunk, and small models through llama_model_quantize, which also chooses the type of
each tensor. The exit code is 1 if a byte of a K-quant or of a model differs. Q5_0, Q5_1 and Q8_0 are
the gguf package's own and differ from ggml's for subnormal numbers. Without --llama, the PyPI package
libgguf is used for the blocks, and models are skipped. `--digests` prints the table in
tests/test_kquants.py.
"""

import argparse
import ctypes
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from expander.convert.kquants import BASE_TYPES, quantize, tensor_type
from tests.test_kquants import K_TYPES, cases, digest

TYPES = (*K_TYPES, *(GGMLQuantizationType[name] for name in ("Q5_0", "Q5_1", "Q8_0")))
Quantiser = Callable[[np.ndarray, GGMLQuantizationType], np.ndarray]


def library(folder: Path, name: str) -> ctypes.CDLL:
    found = sorted(folder.glob(f"{name}.*"))
    if not found:
        sys.exit(
            f"error: no {name}.* in {folder}; choose the folder of llama.cpp's shared libraries"
        )
    return ctypes.CDLL(str(found[0]))


def ggml_quantiser(folder: Path) -> Quantiser:
    chunk = library(folder, "libggml-base").ggml_quantize_chunk
    int64, pointer = ctypes.c_int64, ctypes.c_void_p
    chunk.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]
    chunk.restype = ctypes.c_size_t

    def run(array: np.ndarray, qtype: GGMLQuantizationType) -> np.ndarray:
        rows, width = array.shape
        block, size = GGML_QUANT_SIZES[qtype]
        result = np.zeros((rows, width // block * size), np.uint8)
        written = chunk(qtype, array.ctypes.data, result.ctypes.data, 0, rows, width, None)
        assert written == result.nbytes
        return result

    return run


def random_cases(blocks: int) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    shape = (blocks // 8, 2048)
    groups = (shape[0], shape[1] // 32)
    normal = rng.standard_normal(shape).astype(np.float32)
    yield "gaussian", normal * np.float32(0.02)
    yield "uniform", rng.uniform(-0.05, 0.05, shape)
    yield "student t, 3 degrees", rng.standard_t(3, shape) * 0.02
    yield "laplace", rng.laplace(size=shape) * 0.02
    yield "positive", np.abs(normal)
    yield "one outlier in 200", np.where(rng.random(shape) < 0.005, normal * 1000, normal)
    yield "mostly zero", np.where(rng.random(shape) < 0.03, normal, 0)
    yield "small integers", rng.integers(-7, 8, shape)
    yield "noise on -1000", -1000 + normal * 10.0 ** rng.uniform(-5, -1, groups).repeat(32, 1)
    yield "1e-45 to 1e4 by group", normal * 10.0 ** rng.uniform(-45, 4, groups).repeat(32, 1)


def compare_blocks(reference: Quantiser, blocks: int) -> bool:
    agree = True
    print(f"{'equal blocks':22}", *(f"{qtype.name:>13}" for qtype in TYPES))
    for name, array in (*cases(), *random_cases(blocks)):
        array = np.ascontiguousarray(array, np.float32)
        counts = []
        for qtype in TYPES:
            size = GGML_QUANT_SIZES[qtype][1]
            with np.errstate(all="ignore"):  # the gguf package warns about subnormal numbers
                ours = quantize(array, qtype).reshape(-1, size)
            equal = (ours == reference(array, qtype).reshape(-1, size)).all(axis=1)
            counts.append(f"{equal.sum()}/{equal.size}")
            agree &= bool(equal.all()) or qtype not in K_TYPES
        print(f"{name:22}", *(f"{count:>13}" for count in counts))
    return agree


class QuantizeParams(ctypes.Structure):
    """llama_model_quantize_params: the fields used here, and room for the others."""

    _fields_ = [("nthread", ctypes.c_int32), ("ftype", ctypes.c_int), ("rest", ctypes.c_char * 248)]


def write_model(path: Path, hidden: int, ffn: int, layers: int, tied: bool) -> None:
    """A llama without a vocabulary, which is enough for llama.cpp's quantiser."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    shapes = {"token_embd": (64, hidden), "output_norm": (hidden,)}
    if not tied:
        shapes["output"] = (64, hidden)
    for layer in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{layer}.{name}"] = (hidden, hidden)
        for name in ("ffn_gate", "ffn_up"):
            shapes[f"blk.{layer}.{name}"] = (ffn, hidden)
        shapes[f"blk.{layer}.ffn_down"] = (hidden, ffn)
        for name in ("attn_norm", "ffn_norm"):
            shapes[f"blk.{layer}.{name}"] = (hidden,)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compare_models(folder: Path) -> bool:
    llama = library(folder, "libllama")
    llama.llama_model_quantize_default_params.restype = QuantizeParams
    llama.llama_model_quantize.restype = ctypes.c_uint32
    log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama.llama_log_set(log, None)
    agree = True
    sizes = [(256, 512, 16, True), (256, 512, 28, False), (96, 256, 8, True), (48, 80, 4, False)]
    for hidden, ffn, layers, tied in sizes:
        with tempfile.TemporaryDirectory() as temporary:
            source, target = Path(temporary, "f32.gguf"), Path(temporary, "quantised.gguf")
            write_model(source, hidden, ffn, layers, tied)
            weights = {tensor.name: tensor.data for tensor in gguf.GGUFReader(source).tensors}
            for ftype in BASE_TYPES:
                params = llama.llama_model_quantize_default_params()
                params.nthread, params.ftype = 1, ftype
                label = (
                    f"hidden {hidden:3} ffn {ffn:3} layers {layers:2} tied {tied:d} {ftype.name}"
                )
                status = llama.llama_model_quantize(
                    str(source).encode(), str(target).encode(), ctypes.byref(params)
                )
                if status:
                    sys.exit(f"error: llama_model_quantize returned {status} for {label}")
                tensors = gguf.GGUFReader(target).tensors
                equal = 0
                for tensor in tensors:
                    array = weights[tensor.name]
                    qtype = tensor_type(
                        tensor.name, array.shape, LlamaFileType(ftype), n_layers=layers, tied=tied
                    )
                    equal += qtype == tensor.tensor_type and np.array_equal(
                        quantize(array, qtype), tensor.data.view(np.uint8)
                    )
                print(f"{label}: {equal}/{len(tensors)} tensors equal in type and bytes")
                agree &= equal == len(tensors)
    return agree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--llama", type=Path, metavar="DIR", help="llama.cpp's shared libraries")
    parser.add_argument(
        "--blocks", type=int, default=4096, help="blocks per random case (default: %(default)s)"
    )
    parser.add_argument("--digests", action="store_true", help="print the digests of ggml's bytes")
    args = parser.parse_args()
    if args.llama:
        reference = ggml_quantiser(args.llama)
    else:
        from libgguf import quantize_rows as reference
    if args.digests:
        for name, array in cases():
            print(f"    {name!r}: {tuple(digest(reference(array, t)) for t in K_TYPES)},")
        return
    agree = compare_blocks(reference, args.blocks)
    if args.llama:
        agree &= compare_models(args.llama)
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
