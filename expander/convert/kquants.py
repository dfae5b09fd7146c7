"""K-quants in numpy: write ggml's Q4_K, Q5_K and Q6_K, and choose the type of each tensor.

The gguf package reads these formats but does not write them. The bytes equal those of ggml's own
quantiser without an importance matrix (tests/bench/kquants_vs_ggml.py compares them). Left out:
importance matrices, Q2_K, Q3_K and the IQ types.

Block layouts and the search for scales follow ggml (https://github.com/ggml-org/ggml, MIT licence,
Copyright (c) 2023-2026 The ggml authors). The code is this project's own, vectorised over blocks.

Equal bytes need equal rounding. Arrays are (position, group), so that numpy's sum over axis 0 adds
row by row in float32, as a C loop does. Products are grouped as in ggml: (w·L)·L is not w·(L·L).
A ggml compiled with fused multiply-adds (not the default on x86-64) rounds differently.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize as gguf_quantize

F32, F16, BF16, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K = (
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
)

# The type of most tensors in a file.
BASE_TYPES = {
    LlamaFileType.ALL_F32: F32,
    LlamaFileType.MOSTLY_F16: F16,
    LlamaFileType.MOSTLY_BF16: BF16,
    LlamaFileType.MOSTLY_Q8_0: Q8_0,
    LlamaFileType.MOSTLY_Q4_K_M: Q4_K,
    LlamaFileType.MOSTLY_Q5_K_M: Q5_K,
    LlamaFileType.MOSTLY_Q6_K: Q6_K,
}
# Norms, and the kernels of convolutions.
NEVER_QUANTISED = ("_norm.weight", "conv.weight", "conv1d.weight")
VALUES = ("attn_v", "attn_qkv")
# For rows whose width is not a multiple of BLOCK.
NARROW_TYPES = {Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}

BLOCK = 256  # values that share the half-precision scales of a K-quant
CHUNK = 512  # blocks per call: they fit in the cache, and threads rarely wait for the GIL
THREADS = os.cpu_count() or 1
NO_SCALE = np.float32(1e-15)  # Q6_K: a group with only smaller magnitudes is all zero


def tensor_type(
    name: str,
    shape: tuple[int, ...],
    ftype: LlamaFileType,
    *,
    n_layers: int,
    tied: bool,
    values: Sequence[int] | None = None,
) -> GGMLQuantizationType:
    """The type that llama.cpp's quantiser chooses for a tensor of a dense model.

    Args:
        name: the tensor's name in the file, such as `blk.3.attn_v.weight`.
        shape: rows first; the last number is the row's width.
        ftype: a key of BASE_TYPES.
        n_layers: of the model.
        tied: the file has no `output.weight`, and the token embedding takes its place.
        values: the layers that have an `attn_v` or `attn_qkv`; None if all have.

    Raises:
        ValueError: the file type is not supported.
    """
    if ftype not in BASE_TYPES:
        known = ", ".join(known.name for known in BASE_TYPES)
        raise ValueError(f"file type {ftype!r} is not supported; supported: {known}")
    if len(shape) < 2 or name.endswith(NEVER_QUANTISED) or not name.endswith(".weight"):
        return F32
    chosen = BASE_TYPES[ftype]
    if chosen in (F32, F16, BF16):
        return chosen

    parts = name.split(".")  # blk, layer, tensor, weight
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        chosen = Q8_0 if chosen == Q8_0 else Q6_K
    elif ftype in (LlamaFileType.MOSTLY_Q4_K_M, LlamaFileType.MOSTLY_Q5_K_M):
        place, of = int(parts[1]) if parts[0] == "blk" else 0, n_layers
        if values is not None and parts[-2] in VALUES:
            place, of = values.index(place), len(values)
        if parts[-2] in (*VALUES, "ffn_down") and _more_bits(place, of):
            chosen = Q6_K
    width = shape[-1]
    if width % BLOCK:
        chosen = NARROW_TYPES.get(chosen, chosen)
    return F16 if width % GGML_QUANT_SIZES[chosen][0] else chosen


def _more_bits(layer: int, n_layers: int) -> bool:
    """Whether the layer is in the first or last eighth, or is every third one between them."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def quantize(array: np.ndarray, qtype: GGMLQuantizationType) -> np.ndarray:
    """Encode a tensor: float32 (..., width) to uint8 (..., bytes per row).

    Q4_K, Q5_K and Q6_K are encoded here; the gguf package encodes F32, F16, BF16 and Q4_0 to Q8_0.
    Besides the result this needs a few MB per thread.

    Raises:
        ValueError: another dtype, a width that is not a multiple of the block, or values that are
            NaN, infinite or too large for the half-precision scale.
    """
    if array.dtype != np.float32:
        raise ValueError(f"expected float32 to quantise, found {array.dtype}; convert it first")
    block, size = GGML_QUANT_SIZES[qtype]
    *rows, width = array.shape
    if width % block:
        raise ValueError(
            f"{qtype.name} needs a row width that is a multiple of {block}, found {width}; "
            "use the type that tensor_type returns"
        )
    limit = np.finfo(np.float32 if qtype in (F32, BF16) else np.float16).max
    peak = max(array.max(), -array.min())  # NaN if any value is NaN
    if not peak <= limit:
        raise ValueError(
            f"{qtype.name} holds magnitudes up to {limit:.6g}, found {peak}; check the weights"
        )

    array = np.ascontiguousarray(array)
    if qtype not in ENCODERS:
        return gguf_quantize(array, qtype).view(np.uint8)
    blocks = array.reshape(-1, block)
    result = np.empty((len(blocks), size), np.uint8)

    def encode(start: int) -> None:
        part = slice(start, start + CHUNK)
        # Each thread has its own settings. Divisions by zero are intended; their results are masked.
        with np.errstate(all="ignore"):
            result[part] = ENCODERS[qtype](blocks[part])

    with ThreadPoolExecutor(THREADS) as pool:  # numpy releases the GIL in its loops
        list(pool.map(encode, range(0, len(blocks), CHUNK)))
    return result.reshape(*rows, -1)


def _scratch(count: int, like: np.ndarray) -> np.ndarray:
    """`count` float32 arrays, aligned to 64 bytes, which makes numpy's loops twice as fast on x86."""
    room = np.empty(count * like.size + 16, np.float32)
    start = -room.ctypes.data % 64 // 4
    return room[start : start + count * like.size].reshape(count, *like.shape)


def _total(terms: np.ndarray) -> np.ndarray:
    """Sum over the positions, row by row: (positions, B) -> (B,)."""
    return np.add.reduce(terms, axis=0)


def _nearest_int(values: np.ndarray) -> np.ndarray:
    """Round half to even as ggml does, also beyond ±2²² and for infinities.

    Adding 1.5·2²³ leaves the integer in the low 23 bits of the float.
    """
    return ((values + np.float32(12582912)).view(np.int32) & 0x7FFFFF) - 0x400000


def _search_affine(
    x: np.ndarray, top: int, first: float, steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scale and minimum of each group, so that scale·L − minimum ≈ x for levels L in 0..top.

    x: (32, B). Returns scale, minimum, origin and inverse, each (B,):
    round((x − origin)·inverse), clipped, are the best levels.

    ggml's make_qkx2_quants. It starts from the plain grid low = min(0, x), scale = (max(x) − low)
    / top. Candidate k has inverse = (top + first + k/10) / (max(x) − low), levels
    L = round((x − low)·inverse) and for them the least-squares line with weights w = rms(x) + |x|:

        D = Σw ΣwL² − (ΣwL)²    scale = (Σw ΣwLx − Σwx ΣwL) / D    low' = (ΣwL² Σwx − ΣwL ΣwLx) / D

    or scale = ΣwLx / ΣwL², low' = 0 where low' > 0. A line with a lower Σw(scale·L + low' − x)²
    replaces the best one, and its low' is the low of the next candidates.
    """
    levels, weights, product, term = _scratch(4, x)  # (32, B) each

    def set_levels(origin: np.ndarray, inverse: np.ndarray) -> None:
        inverse[np.isinf(inverse)] = 0  # ggml's rounding makes infinity level 0
        np.subtract(x, origin, out=levels)
        np.multiply(levels, inverse, out=levels)
        np.rint(levels, out=levels)
        np.clip(levels, 0, top, out=levels)

    def error(scale: np.ndarray, low: np.ndarray) -> np.ndarray:
        np.multiply(levels, scale, out=term)
        np.add(term, low, out=term)
        np.subtract(term, x, out=term)
        np.multiply(term, term, out=term)
        np.multiply(term, weights, out=term)
        return _total(term)

    np.multiply(x, x, out=term)
    np.abs(x, out=weights)
    weights += np.sqrt(_total(term) / 32)
    sum_w = _total(weights)
    np.multiply(weights, x, out=term)
    sum_x = _total(term)

    high = x.max(axis=0)
    low = np.minimum(x.min(axis=0), 0)
    origin = low.copy()
    inverse = top / (high - low)
    scale = 1 / inverse  # 0 where all of x is one number ≤ 0
    set_levels(origin, inverse)
    best_error = error(scale, low)
    for intervals in first + 0.1 * np.arange(steps + 1, dtype=np.float32) + top:
        new_inverse = intervals / (high - low)
        set_levels(low, new_inverse)
        np.multiply(weights, levels, out=product)
        sum_l = _total(product)
        np.multiply(product, levels, out=term)
        sum_l2 = _total(term)
        np.multiply(product, x, out=term)
        sum_lx = _total(term)

        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_lx - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_lx) / determinant
        np.divide(sum_lx, sum_l2, out=new_scale, where=new_low > 0)
        np.minimum(new_low, 0, out=new_low)
        new_error = error(new_scale, new_low)
        better = (determinant > 0) & (new_error < best_error)
        np.copyto(best_error, new_error, where=better)
        np.copyto(scale, new_scale, where=better)
        np.copyto(inverse, new_inverse, where=better)
        np.copyto(origin, low, where=better)
        np.copyto(low, new_low, where=better)
    return scale, -low, origin, inverse


def _search_symmetric(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale of each group, so that scale·L ≈ x for levels L in −32..31.

    x: (16, B). Returns scale and inverse, each (B,): round(x·inverse), clipped, are the best
    levels. Both are 0 for a group whose magnitudes are all below 1e-15.

    ggml's make_qx_quants with rmse_type 1. Candidate k in −9..9 has inverse = −(32 + k/10) / peak,
    where peak is the first value of the largest magnitude, and with the weights w = x²

        scale = ΣwLx / ΣwL²    with the smallest error where (ΣwLx)² / ΣwL² is largest.

    Candidate 0 is tried first; another one must be strictly better.
    """
    levels, weights, weighted, term = _scratch(4, x)  # (16, B) each
    np.multiply(x, x, out=weights)
    np.multiply(weights, x, out=weighted)
    np.abs(x, out=term)
    peak = np.take_along_axis(x, term.argmax(axis=0)[None], axis=0)[0]
    peak[np.abs(peak) < NO_SCALE] = np.inf  # all candidates are then zero, and none is better

    scale, inverse = np.zeros_like(peak), np.zeros_like(peak)
    best = np.full_like(peak, -1)
    for intervals in 32 + 0.1 * np.array([0, *range(-9, 0), *range(1, 10)], np.float32):
        candidate = -intervals / peak
        np.multiply(x, candidate, out=levels)
        np.rint(levels, out=levels)
        np.clip(levels, -32, 31, out=levels)
        np.multiply(weighted, levels, out=term)
        sum_lx = _total(term)
        np.multiply(weights, levels, out=term)
        np.multiply(term, levels, out=term)
        sum_l2 = _total(term)
        better = sum_lx * sum_lx > best * sum_l2
        this_scale = sum_lx / sum_l2
        np.copyto(scale, this_scale, where=better)
        np.copyto(best, this_scale * sum_lx, where=better)
        np.copyto(inverse, candidate, where=better)
    return scale, inverse


def _columns(blocks: np.ndarray, group: int) -> np.ndarray:
    """(n, 256) -> (group, n·256/group), with the position in the group first."""
    groups = blocks.reshape(-1, group).T
    (x,) = _scratch(1, groups)
    np.copyto(x, groups)
    return x


def _six_bit(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 8) values ≥ 0 as a half-precision unit (n, 1) and codes 0..63 (n, 8)."""
    largest = np.maximum(values.max(axis=1, keepdims=True), 0)
    codes = np.minimum(_nearest_int(63 / largest * values).astype(np.uint8), 63)
    return (largest / 63).astype(np.float16), codes


def _encode_affine(
    blocks: np.ndarray, top: int, first: float, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """The part that Q4_K and Q5_K share: scales, (n, 16) bytes, and levels, (n, 8, 32) uint8.

    Eight groups of 32, x ≈ d·s·L − dmin·m. After d and dmin in half precision come 12 bytes with s
    and m in six bits each: bytes 0-3 and 4-7 hold s and m of groups 0-3, and in their top two bits
    the high bits of groups 4-7; bytes 8-11 hold the low four bits of those.
    """
    x = _columns(blocks, 32)
    scale, minimum, origin, inverse = _search_affine(x, top, first, steps)
    d, s = _six_bit(scale.reshape(-1, 8))
    dmin, m = _six_bit(minimum.reshape(-1, 8))

    step = (d.astype(np.float32) * s).reshape(-1)  # (B,)
    offset = (dmin.astype(np.float32) * m).reshape(-1)
    levels = _nearest_int((x + offset) / step).clip(0, top)
    lost = step == 0  # where a scale rounds to zero, keep the levels of the search
    levels[:, lost] = np.rint((x[:, lost] - origin[lost]) * inverse[lost]).clip(0, top)

    packed_s = s[:, :4] | (s[:, 4:] >> 4 << 6)
    packed_m = m[:, :4] | (m[:, 4:] >> 4 << 6)
    packed_low = (s[:, 4:] & 15) | (m[:, 4:] << 4)
    header = np.hstack([d.view(np.uint8), dmin.view(np.uint8), packed_s, packed_m, packed_low])
    return header, levels.T.astype(np.uint8).reshape(-1, 8, 32)


def _nibbles(levels: np.ndarray) -> np.ndarray:
    """(n, 8, 32) levels, low four bits: groups 2i and 2i + 1 share 32 bytes."""
    low = levels & 15
    return (low[:, 0::2] | (low[:, 1::2] << 4)).reshape(-1, 128)


def _encode_q4_k(blocks: np.ndarray) -> np.ndarray:
    """(n, 256) -> (n, 144): scales (16), levels (128)."""
    header, levels = _encode_affine(blocks, top=15, first=-1.0, steps=20)
    return np.hstack([header, _nibbles(levels)])


def _encode_q5_k(blocks: np.ndarray) -> np.ndarray:
    """(n, 256) -> (n, 176): scales (16), fifth bits (32; bit g for group g), levels (128)."""
    header, levels = _encode_affine(blocks, top=31, first=-0.5, steps=15)
    fifth = np.packbits(levels >> 4, axis=1, bitorder="little").reshape(-1, 32)
    return np.hstack([header, fifth, _nibbles(levels)])


def _encode_q6_k(blocks: np.ndarray) -> np.ndarray:
    """(n, 256) -> (n, 210): low four bits (128), high two bits (64), scales (16), d (2).

    Sixteen groups of 16, x ≈ d·s·(L − 32), s in −128..127. A block with no scale is all zero.
    """
    x = _columns(blocks, 16)
    scale, inverse = _search_symmetric(x)
    scales = scale.reshape(-1, 16)
    largest = np.take_along_axis(scales, np.abs(scales).argmax(axis=1)[:, None], axis=1)  # (n, 1)
    unit = -128 / largest
    d = (1 / unit).astype(np.float16)
    s = np.minimum(_nearest_int(unit * scales), 127).astype(np.int8)

    step = (d.astype(np.float32) * s).reshape(-1)  # (B,)
    levels = _nearest_int(x / step).clip(-32, 31) + 32
    lost = step == 0  # as in _encode_affine; a group of zeros gets the code 0
    kept = np.rint(x[:, lost] * inverse[lost]).clip(-32, 31) + 32
    levels[:, lost] = np.where(inverse[lost] == 0, 0, kept)

    quarters = levels.T.astype(np.uint8).reshape(-1, 2, 4, 32)  # 128 values are 4 runs of 32
    low, high = quarters & 15, quarters >> 4
    low = low[:, :, :2] | (low[:, :, 2:] << 4)  # runs 0 and 2, 1 and 3
    high = np.bitwise_or.reduce(high << np.array([[0], [2], [4], [6]], np.uint8), axis=2)
    parts = [low.reshape(-1, 128), high.reshape(-1, 64), s.view(np.uint8), d.view(np.uint8)]
    result = np.hstack(parts)
    result[np.abs(largest[:, 0]) < NO_SCALE] = 0
    return result


ENCODERS = {Q4_K: _encode_q4_k, Q5_K: _encode_q5_k, Q6_K: _encode_q6_k}
