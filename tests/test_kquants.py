"""kquants.py: bytes pinned to ggml's own quantiser, hand-worked blocks, and the type of each tensor."""

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, dequantize

from expander.convert.kquants import CHUNK, quantize, tensor_type

Q4_K, Q5_K, Q6_K = (GGMLQuantizationType[name] for name in ("Q4_K", "Q5_K", "Q6_K"))
K_TYPES = (Q4_K, Q5_K, Q6_K)


def bell(rows: int, width: int) -> np.ndarray:
    """Weight-like float32 values, equal on every machine: the sum of a hash's four 16-bit parts."""
    z = np.arange(1, rows * width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    parts = z.view(np.uint16).reshape(rows, width, 4).astype(np.int64)
    return np.ldexp((parts.sum(axis=2) - 2 * 65535).astype(np.float32), -21)


def cases(rows: int = 64, width: int = 1024) -> Iterator[tuple[str, np.ndarray]]:
    """Kinds of weights for which ggml's bytes are known. Every step is exact or rounds by IEEE rules."""
    x = bell(rows, width)
    group = np.arange(x.size).reshape(x.shape) // 16
    index = np.arange(x.size).reshape(x.shape)
    yield "bell", x
    yield "uniform", np.ldexp((x.view(np.uint32) >> 3 & 0xFFFF).astype(np.float32) - 32768, -20)
    yield "heavy tail", x * x * x * np.float32(300)
    yield "bfloat16", (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    yield "offset", x - np.float32(1.5)
    # Minimums so far apart that a level is beyond the range where ggml rounds to an integer.
    far = np.ldexp(np.rint(x * np.float32(64)), -17) - np.float32(95)
    yield "far offsets", np.where(group // 2 % 8 == 0, np.float32(-8000), far)
    yield "outliers", np.where(index % 397 == 0, x * np.float32(1000), x)
    yield "zero groups", np.where((group % 3 == 1) | (group // 16 % 5 == 2), np.float32(0), x)
    yield "constant groups", np.where(group // 2 % 3 == 1, x[:, :1], x)
    yield "constant blocks", np.where(group // 16 % 2 == 1, x[:, :1], x)
    yield "three values", np.sign(x) * (np.abs(x) > np.float32(0.015))
    # One power of two per group of 32, from 1 down to the subnormal numbers and zero.
    yield "any magnitude", np.ldexp(x, -(group // 2 * 7 % 151).astype(np.int32))
    yield "tiny", np.ldexp(x, -20)
    yield "subnormal", np.ldexp(x, -128)


# SHA-256 (12 digits) of the output of ggml_quantize_chunk for `cases()`. To print them again:
# python -m tests.bench.kquants_vs_ggml --digests
DIGESTS = {
    "bell": ("2b48de0872e2", "bf8a856fa2ff", "6ec024633ab3"),
    "uniform": ("ad65bf76f910", "314818edda29", "a03c80c917a3"),
    "heavy tail": ("35c21a972713", "6552a587b2d2", "29c06ec91ad1"),
    "bfloat16": ("6311137f86e4", "af400edd4998", "1c76d1d7cedf"),
    "offset": ("9abdd68d1dde", "1a0940f792fb", "3a99a32bb75f"),
    "far offsets": ("d4004dc1cc32", "60baf0987ee4", "fc0fae674883"),
    "outliers": ("6c12a08c0981", "000d79077786", "1dcce6a821f1"),
    "zero groups": ("7f2fc2e2376a", "bea936aba746", "b16327ed9f27"),
    "constant groups": ("c8e6274d56f1", "cbb233840b66", "616865c93201"),
    "constant blocks": ("6c6cbbf75f58", "2adc97c00421", "fa7e728fc0b4"),
    "three values": ("94de86737558", "b174c7d3790b", "8a0e5954e21f"),
    "any magnitude": ("8151ffe53a86", "73cbf729dc70", "ff103775eb4f"),
    "tiny": ("85d2cfe0e687", "07f0f93cf2c3", "2bb2f5f47da1"),
    "subnormal": ("1c0273095382", "61d9e6520ef1", "3dd1b47dd953"),
}


def digest(data: np.ndarray) -> str:
    return hashlib.sha256(data.tobytes()).hexdigest()[:12]


@pytest.mark.parametrize(
    ("name", "array"), [pytest.param(name, array, id=name) for name, array in cases()]
)
def test_bytes_equal_ggmls(name: str, array: np.ndarray) -> None:
    assert tuple(digest(quantize(array, qtype)) for qtype in K_TYPES) == DIGESTS[name]


@pytest.mark.parametrize(("qtype", "bound"), [(Q4_K, 0.070), (Q5_K, 0.035), (Q6_K, 0.0175)])
def test_round_trip_error(qtype: GGMLQuantizationType, bound: float) -> None:
    x = bell(64, 1024)
    error = dequantize(quantize(x, qtype), qtype) - x
    relative = np.sqrt((error**2).sum() / (x**2).sum())
    assert 0.9 * bound < relative < bound


@pytest.mark.parametrize("qtype", K_TYPES)
def test_the_result_does_not_depend_on_the_chunks(qtype: GGMLQuantizationType) -> None:
    x = bell(2 * CHUNK + 3, 256)
    row_by_row = [quantize(row, qtype) for row in x[:: CHUNK // 4]]
    assert np.array_equal(quantize(x, qtype)[:: CHUNK // 4], row_by_row)
    three_d = quantize(x.reshape(-1, 1, 256), qtype)
    assert three_d.shape == (len(x), 1, GGML_QUANT_SIZES[qtype][1])
    assert np.array_equal(quantize(np.asfortranarray(x), qtype), three_d[:, 0])


@pytest.mark.parametrize("qtype", K_TYPES)
def test_zeros_are_zero_bytes(qtype: GGMLQuantizationType) -> None:
    assert not quantize(np.zeros((2, 512), np.float32), qtype).any()


def test_q4_k_exact_levels() -> None:
    """x = 0, 1 … 15, twice in each group: scale 1, minimum 0.

    The unit d is 1/63 in half precision: 2⁻⁶·(1 + 16/1024) = 0x2410. All s are 63, all m 0.
    """
    block = quantize(np.tile(np.arange(16, dtype=np.float32), 16)[None], Q4_K)[0]
    assert block[:4].tolist() == [0x10, 0x24, 0, 0]
    assert block[4:16].tolist() == [0xFF] * 4 + [0x00] * 4 + [0x0F] * 4
    assert block[16:].tolist() == [level * 0x11 for level in range(16)] * 8


def test_q4_k_constant_block() -> None:
    """x = −2: scale 0, minimum 2. dmin is 2/63 in half precision, 0x2810; all m are 63."""
    block = quantize(np.full((1, 256), -2, np.float32), Q4_K)[0]
    assert block[:4].tolist() == [0, 0, 0x10, 0x28]
    assert block[4:16].tolist() == [0x00] * 4 + [0xFF] * 4 + [0xF0] * 4
    assert not block[16:].any()


def test_q5_k_exact_levels() -> None:
    """x = 0, 1 … 31 in each group, but group 5 is zero, and so are its s, levels and fifth bits."""
    x = np.tile(np.arange(32, dtype=np.float32), (8, 1))
    x[5] = 0
    block = quantize(x.reshape(1, 256), Q5_K)[0]
    assert block[:4].tolist() == [0x10, 0x24, 0, 0]
    assert block[4:16].tolist() == [0xFF, 0x3F, 0xFF, 0xFF] + [0x00] * 4 + [0x0F, 0, 0x0F, 0x0F]
    assert block[16:48].tolist() == [0x00] * 16 + [0xDF] * 16
    both, lower = [i % 16 * 0x11 for i in range(32)], [i % 16 for i in range(32)]
    assert block[48:].tolist() == both + both + lower + both


def test_q6_k_exact_levels() -> None:
    """x = −32, −28 … 28 in each group: scale 1, levels 0, 4 … 60 with the offset of 32.

    The unit d is −1/128 = 0xA000 and every s is −128. The last group is zero: s 0 and code 0.
    """
    x = np.tile(np.arange(-32, 32, 4, dtype=np.float32), (16, 1))
    x[15] = 0
    block = quantize(x.reshape(1, 256), Q6_K)[0]
    low = [level % 16 * 0x11 for level in range(0, 64, 4)]
    high = [level // 16 * 0x55 for level in range(0, 64, 4)]
    assert block[:112].tolist() == low * 7
    assert block[112:128].tolist() == [level & 0x0F for level in low]
    assert block[128:176].tolist() == high * 3
    assert block[176:192].tolist() == [level & 0x3F for level in high]
    assert block[192:].tolist() == [0x80] * 15 + [0x00] + [0x00, 0xA0]


def test_other_types_are_encoded_by_gguf() -> None:
    x = bell(3, 64)
    for name, width in [("F32", 256), ("F16", 128), ("BF16", 128), ("Q8_0", 68), ("Q5_1", 48)]:
        qtype = GGMLQuantizationType[name]
        data = quantize(x, qtype)
        assert (data.dtype, data.shape) == (np.uint8, (3, width))
        np.testing.assert_allclose(dequantize(data, qtype), x, atol=0.003)
        assert np.array_equal(quantize(np.asfortranarray(x), qtype), data)
    assert quantize(x[0], GGMLQuantizationType.F32).shape == (256,)


def test_invalid_input() -> None:
    x = bell(2, 256)
    with pytest.raises(ValueError, match=r"Q4_K .* multiple of 256, found 255"):
        quantize(x[:, 1:], Q4_K)
    with pytest.raises(ValueError, match=r"Q8_0 .* multiple of 32, found 48"):
        quantize(x[:, :48], GGMLQuantizationType.Q8_0)
    with pytest.raises(ValueError, match="expected float32 to quantise, found float16"):
        quantize(x.astype(np.float16), Q4_K)
    for wrong in (np.nan, np.inf, -np.inf, -65536.0):
        x[1, 7] = wrong
        with pytest.raises(ValueError, match=r"Q6_K holds magnitudes up to 65504, found"):
            quantize(x, Q6_K)
    assert np.array_equal(quantize(x, GGMLQuantizationType.F32), x.view(np.uint8))


def layers_with_more_bits(ftype: LlamaFileType, tensor: str, n_layers: int) -> set[int]:
    return {
        layer
        for layer in range(n_layers)
        if tensor_type(
            f"blk.{layer}.{tensor}.weight", (256, 256), ftype, n_layers=n_layers, tied=True
        )
        == Q6_K
    }


@pytest.mark.parametrize("ftype", [LlamaFileType.MOSTLY_Q4_K_M, LlamaFileType.MOSTLY_Q5_K_M])
def test_layers_with_more_bits(ftype: LlamaFileType) -> None:
    sixteen = {0, 1, 4, 7, 10, 13, 14, 15}
    twenty_eight = {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27}
    for tensor in ("attn_v", "ffn_down"):
        assert layers_with_more_bits(ftype, tensor, 16) == sixteen
        assert layers_with_more_bits(ftype, tensor, 28) == twenty_eight
    for tensor in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
        assert layers_with_more_bits(ftype, tensor, 16) == set()


@pytest.mark.parametrize(
    ("name", "width", "ftype", "tied", "expected"),
    [
        ("blk.2.attn_q.weight", 256, "Q4_K_M", True, "Q4_K"),
        ("blk.2.attn_q.weight", 256, "Q5_K_M", True, "Q5_K"),
        ("blk.2.attn_q.weight", 256, "Q6_K", True, "Q6_K"),
        ("blk.2.attn_q.weight", 256, "Q8_0", True, "Q8_0"),
        ("blk.2.attn_q.weight", 100, "F16", True, "F16"),
        ("blk.2.attn_q.weight", 100, "BF16", True, "BF16"),
        # The output, or the tied embedding.
        ("output.weight", 256, "Q4_K_M", False, "Q6_K"),
        ("token_embd.weight", 256, "Q4_K_M", True, "Q6_K"),
        ("token_embd.weight", 256, "Q4_K_M", False, "Q4_K"),
        ("token_embd.weight", 256, "Q8_0", True, "Q8_0"),
        ("token_embd.weight", 256, "F16", True, "F16"),
        # A width that is not a multiple of 256.
        ("blk.2.attn_q.weight", 576, "Q4_K_M", True, "Q5_0"),
        ("blk.2.attn_q.weight", 576, "Q5_K_M", True, "Q5_1"),
        ("blk.2.attn_q.weight", 576, "Q6_K", True, "Q8_0"),
        ("blk.0.attn_v.weight", 576, "Q4_K_M", True, "Q8_0"),
        ("token_embd.weight", 576, "Q4_K_M", True, "Q8_0"),
        ("token_embd.weight", 576, "Q5_K_M", False, "Q5_1"),
        # A width that is not a multiple of 32.
        ("blk.2.attn_q.weight", 48, "Q4_K_M", True, "F16"),
        ("blk.2.attn_q.weight", 48, "Q8_0", True, "F16"),
        # Norms and biases are never quantised.
        ("blk.2.attn_q_norm.weight", 256, "Q4_K_M", True, "F32"),
        ("blk.2.attn_q.bias", 256, "Q4_K_M", True, "F32"),
    ],
)
def test_tensor_type(name: str, width: int, ftype: str, tied: bool, expected: str) -> None:
    file_type = LlamaFileType[f"MOSTLY_{ftype}"]
    chosen = tensor_type(name, (64, width), file_type, n_layers=16, tied=tied)
    assert chosen == GGMLQuantizationType[expected]


def test_tensors_of_one_dimension_are_f32() -> None:
    for ftype in (LlamaFileType.ALL_F32, LlamaFileType.MOSTLY_F16, LlamaFileType.MOSTLY_Q4_K_M):
        for name in ("output_norm.weight", "rope_freqs.weight"):
            assert tensor_type(name, (256,), ftype, n_layers=16, tied=True).name == "F32"


def test_unknown_file_type() -> None:
    with pytest.raises(ValueError, match=r"MOSTLY_Q2_K.* is not supported; supported: ALL_F32, "):
        tensor_type("x.weight", (8, 256), LlamaFileType.MOSTLY_Q2_K, n_layers=16, tied=True)
