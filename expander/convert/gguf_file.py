"""A GGUF file of a fused chain: what is in it, writing it, and reading it back to check it.

Architectures qwen3, qwen2 and llama, as llama.cpp names and lays out their tensors. Left out: sharded
files, importance matrices, RoPE scaling.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, LlamaFileType

from expander.convert import kquants
from expander.convert.gguf_tokenizer import CHAT_TEMPLATE, Vocabulary
from expander.convert.weights import FusedWeights

# What --quantize takes.
FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "q5_k_m": LlamaFileType.MOSTLY_Q5_K_M,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
}
ARCHITECTURES = {
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "llama": gguf.MODEL_ARCH.LLAMA,
}
SAMPLES = 8  # rows of a tensor
# Largest relative_error of a sample. For the quantised types: what rounding costs at worst, when one
# or two values carry a block; weights of a model lose about half of that.
ERROR_BOUNDS = {
    GGMLQuantizationType.F32: 0.0,
    GGMLQuantizationType.F16: 2.0**-11,
    GGMLQuantizationType.BF16: 2.0**-8,
    GGMLQuantizationType.Q8_0: 0.015,
    GGMLQuantizationType.Q6_K: 0.05,
    GGMLQuantizationType.Q5_K: 0.09,
    GGMLQuantizationType.Q4_K: 0.18,
    GGMLQuantizationType.Q5_1: 0.09,
    GGMLQuantizationType.Q5_0: 0.12,
}

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = (
    GGUFValueType[name] for name in ("UINT32", "INT32", "FLOAT32", "BOOL", "STRING", "ARRAY")
)


def head_dim(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def hyperparameters(config: dict) -> dict[str, tuple]:
    """The keys of an architecture, key -> (value, type), from a model's config.json.

    Raises:
        ValueError: RoPE scaling, or a setting that is not there.
    """
    arch = config["model_type"]
    rope = config.get("rope_parameters") or {}  # where transformers 5 writes RoPE's settings
    scaling = config.get("rope_scaling") or rope
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise ValueError(f"config.json asks for RoPE scaling, which is not supported: {scaling}")
    try:
        heads = config["num_attention_heads"]
        values = {
            "block_count": (config["num_hidden_layers"], UINT32),
            "context_length": (config["max_position_embeddings"], UINT32),
            "embedding_length": (config["hidden_size"], UINT32),
            "feed_forward_length": (config["intermediate_size"], UINT32),
            "attention.head_count": (heads, UINT32),
            "attention.head_count_kv": (config.get("num_key_value_heads") or heads, UINT32),
            "attention.key_length": (head_dim(config), UINT32),
            "attention.value_length": (head_dim(config), UINT32),
            "attention.layer_norm_rms_epsilon": (config["rms_norm_eps"], FLOAT32),
            "rope.freq_base": (config.get("rope_theta") or rope["rope_theta"], FLOAT32),
            "vocab_size": (config["vocab_size"], UINT32),
            "rope.dimension_count": (head_dim(config), UINT32),
        }
    except KeyError as error:
        raise ValueError(f"config.json has no {error.args[0]}") from None
    if arch != "llama":
        del values["vocab_size"], values["rope.dimension_count"]
    return {f"{arch}.{key}": value for key, value in values.items()}


def metadata(
    config: dict, vocabulary: Vocabulary, name: str, file_type: LlamaFileType
) -> dict[str, tuple]:
    """Every key of the file but its architecture, key -> (value, type)."""
    return {
        "general.type": ("model", STRING),
        "general.name": (name, STRING),
        "general.finetune": ("query-expansion", STRING),
        "general.file_type": (int(file_type), UINT32),
        "general.quantization_version": (gguf.GGML_QUANT_VERSION, UINT32),
        **hyperparameters(config),
        "tokenizer.ggml.model": ("gpt2", STRING),
        "tokenizer.ggml.pre": (vocabulary.pre, STRING),
        "tokenizer.ggml.tokens": (vocabulary.tokens, ARRAY),
        "tokenizer.ggml.token_type": ([int(kind) for kind in vocabulary.types], ARRAY),
        "tokenizer.ggml.merges": (vocabulary.merges, ARRAY),
        "tokenizer.ggml.bos_token_id": (vocabulary.bos, UINT32),
        "tokenizer.ggml.eos_token_id": (vocabulary.eos, UINT32),
        "tokenizer.ggml.padding_token_id": (vocabulary.pad, UINT32),
        # A missing key once meant true for this kind of tokenizer.
        "tokenizer.ggml.add_bos_token": (False, BOOL),
        "tokenizer.chat_template": (CHAT_TEMPLATE, STRING),
    }


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file: `source` is its name in the model, `shape` has rows first."""

    source: str
    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    head_dim: int = 0  # of a llama's q or k, whose rows llama.cpp orders in another way

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size


@dataclass(frozen=True)
class GGUFFile:
    """What one file holds, before and after it is written."""

    arch: str
    keys: dict[str, tuple]  # key -> (value, type), without general.architecture
    tensors: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Of its tensors: all but a few MB."""
        return sum(_padded(tensor.nbytes) for tensor in self.tensors)

    def write(
        self, path: Path, weights: FusedWeights, progress: Callable[[int], None]
    ) -> dict[str, np.ndarray]:
        """Write the file, `progress` being told the bytes of tensors in it so far.

        Returns the `sample_rows` of each tensor as they were in float32.
        """
        samples = {}
        writer = gguf.GGUFWriter(path, self.arch)
        try:
            for key, (value, kind) in self.keys.items():
                writer.add_key_value(key, value, kind)
            for tensor in self.tensors:
                writer.add_tensor_info(
                    tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            (file,) = writer.fout
            writer.write_padding(file, file.tell())
            start = file.tell()
            for tensor in self.tensors:
                kept = _write_tensor(file, tensor, weights, lambda: progress(file.tell() - start))
                samples[tensor.name] = kept
                writer.write_padding(file, file.tell())
        finally:
            writer.close()
        return samples

    def check(self, path: Path, samples: dict[str, np.ndarray]) -> None:
        """Read the file back: every key, every tensor's shape, type and place, the sampled rows.

        Raises:
            ValueError: the first difference.
        """
        found_keys, found_tensors, start = read_header(path)
        expected = {
            key: np.float32(v) if kind == FLOAT32 else v for key, (v, kind) in self.keys.items()
        }
        expected[gguf.Keys.General.ARCHITECTURE] = self.arch
        for key in sorted(found_keys.keys() | expected.keys()):
            if found_keys.get(key) != expected.get(key):
                raise ValueError(
                    f"key {key} reads back as {found_keys.get(key)!r:.60}, "
                    f"expected {expected.get(key)!r:.60}"
                )
        places, offset = [], 0
        for tensor in self.tensors:
            places.append((tensor.name, tensor.shape, tensor.type, offset))
            offset += _padded(tensor.nbytes)
        if found_tensors != places or path.stat().st_size != start + offset:
            raise ValueError("the tensors' names, shapes, types or places do not read back")
        for tensor, (*_, offset) in zip(self.tensors, places, strict=True):
            rows = tensor.shape[0]
            data = np.memmap(path, np.uint8, "r", start + offset, (rows, tensor.nbytes // rows))
            values = gguf.dequantize(data[sample_rows(tensor)], tensor.type)
            error = relative_error(values, samples[tensor.name].reshape(values.shape))
            if not error <= ERROR_BOUNDS[tensor.type]:
                raise ValueError(
                    f"{tensor.name} in {tensor.type.name} is {error:.1e} off the fused weights, "
                    f"at most {ERROR_BOUNDS[tensor.type]:.1e} is allowed"
                )


def plan(
    config: dict,
    vocabulary: Vocabulary,
    name: str,
    kind: str,
    shapes: dict[str, tuple[int, ...]],
) -> GGUFFile:
    """The file of a model in one of FILE_TYPES; `shapes` are those of its fused tensors.

    Raises:
        ValueError: a tensor that has no place in the architecture, or what `hyperparameters` does.
    """
    arch, layers = config["model_type"], config["num_hidden_layers"]
    file_type = FILE_TYPES[kind]
    names = gguf.get_tensor_name_map(ARCHITECTURES[arch], layers)
    tied = "lm_head.weight" not in shapes
    permuted = ("attn_q", "attn_k") if arch == "llama" else ()
    tensors = []
    for source, shape in shapes.items():
        target = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(f"tensor {source} has no place in a GGUF file of a {arch} model")
        stored = kquants.tensor_type(target, shape, file_type, n_layers=layers, tied=tied)
        size = head_dim(config) if target.split(".")[-2] in permuted else 0
        tensors.append(Tensor(source, target, shape, stored, size))
    return GGUFFile(arch, metadata(config, vocabulary, name, file_type), tensors)


def permute(rows: np.ndarray, size: int) -> np.ndarray:
    """The row order llama.cpp expects of a llama's q and k, (heads * size, ...).

    Hugging Face rotates row i of a head with row i + size / 2, llama.cpp neighbours 2i, 2i + 1.
    """
    halves = rows.reshape(-1, 2, size // 2, *rows.shape[1:])  # (heads, half, i, ...)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _write_tensor(
    file: BinaryIO, tensor: Tensor, weights: FusedWeights, tick: Callable[[], None]
) -> np.ndarray:
    """Append a tensor to the file; returns its `sample_rows` in float32."""
    kept, first = [], 0
    rows = sample_rows(tensor)
    for piece in weights.read(tensor.source, multiple=tensor.head_dim or 1):
        if tensor.head_dim:
            piece = permute(piece, tensor.head_dim)
        try:
            file.write(kquants.quantize(piece, tensor.type).data)
        except ValueError as error:
            raise ValueError(f"{tensor.source}: {error}") from None
        here = rows[(rows >= first) & (rows < first + len(piece))]
        kept.append(piece[here - first])
        first += len(piece)
        tick()
    return np.concatenate(kept)


def sample_rows(tensor: Tensor) -> np.ndarray:
    """The rows that are checked: the first, the last and some between."""
    return np.unique(np.linspace(0, tensor.shape[0] - 1, SAMPLES).astype(int))


def relative_error(values: np.ndarray, exact: np.ndarray) -> float:
    """Root mean square of the difference as a share of that of the exact values."""
    exact = exact.astype(np.float64)
    return float(np.sqrt(((values - exact) ** 2).sum() / max((exact**2).sum(), 1e-30)))


def read_header(path: Path) -> tuple[dict, list[tuple], int]:
    """A GGUF file's keys, its tensors as (name, shape with rows first, type, offset), and where
    their data starts.

    gguf.GGUFReader does this too, but takes thirteen times as long: many seconds for a vocabulary
    of 150,000 tokens.
    """
    with path.open("rb") as file:
        magic, _, tensor_count, key_count = _unpack(file, "IIQQ")
        if magic != gguf.GGUF_MAGIC:
            raise ValueError(f"{path.name}: not a GGUF file")
        keys = {}
        for _ in range(key_count):
            key = _read_value(file, STRING)
            keys[key] = _read_value(file, GGUFValueType(*_unpack(file, "I")))
        tensors = []
        for _ in range(tensor_count):
            name = _read_value(file, STRING)
            shape = _unpack(file, "{}Q".format(*_unpack(file, "I")))[::-1]
            kind, offset = _unpack(file, "IQ")
            tensors.append((name, shape, GGMLQuantizationType(kind), offset))
        return keys, tensors, _padded(file.tell())


def _unpack(file: BinaryIO, layout: str) -> tuple:
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))


def _read_value(file: BinaryIO, kind: GGUFValueType):
    """A value of one of the types that `metadata` uses."""
    if kind == STRING:
        (length,) = _unpack(file, "Q")
        return file.read(length).decode()
    if kind == ARRAY:
        item, count = _unpack(file, "IQ")
        return [_read_value(file, GGUFValueType(item)) for _ in range(count)]
    (value,) = _unpack(file, {UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?"}[kind])
    return value


def _padded(size: int) -> int:
    return -(-size // gguf.GGUF_DEFAULT_ALIGNMENT) * gguf.GGUF_DEFAULT_ALIGNMENT
