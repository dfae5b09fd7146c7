"""A GGUF file of a fused chain: what is in it, writing it, and reading it back to check it.

Architectures qwen3, qwen2 and llama, as llama.cpp names and lays out their tensors. Left out: sharded
files, importance matrices, RoPE scaling.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, LlamaFileType

import kquants
from vocabulary import CHAT_TEMPLATE, Vocabulary
from weights import FusedWeights

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
# Largest relative_error of a sample. The K-quants' are about twice what weights of a model show.
ERROR_BOUNDS = {
    GGMLQuantizationType.F32: 0.0,
    GGMLQuantizationType.F16: 2.0**-11,
    GGMLQuantizationType.BF16: 2.0**-8,
    GGMLQuantizationType.Q8_0: 0.015,
    GGMLQuantizationType.Q6_K: 0.04,
    GGMLQuantizationType.Q5_K: 0.08,
    GGMLQuantizationType.Q4_K: 0.15,
    GGMLQuantizationType.Q5_1: 0.08,
    GGMLQuantizationType.Q5_0: 0.1,
}

UINT32, FLOAT32, BOOL, STRING, ARRAY = (
    GGUFValueType[name] for name in ("UINT32", "FLOAT32", "BOOL", "STRING", "ARRAY")
)


def head_dim(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def hyperparameters(config: dict) -> dict[str, tuple]:
    """The keys of an architecture, key -> (value, type), from a model's config.json.

    Raises ValueError for RoPE scaling and for a key that is not there.
    """
    arch = config["model_type"]
    rope = config.get("rope_parameters") or {}  # where transformers 5 writes what follows
    scaling = config.get("rope_scaling") or rope
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise ValueError(
            f"config.json has RoPE scaling ({scaling}), which is not supported; use a base without"
        )
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
    }
    if arch == "llama":
        values["vocab_size"] = (config["vocab_size"], UINT32)
        values["rope.dimension_count"] = (head_dim(config), UINT32)
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
        return int(np.prod(self.shape)) // block * size


def plan(
    config: dict, shapes: dict[str, tuple[int, ...]], file_type: LlamaFileType
) -> list[Tensor]:
    """The tensors of the file in their order.

    Raises ValueError for a tensor that has no place in the architecture.
    """
    arch, layers = config["model_type"], config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(ARCHITECTURES[arch], layers)
    tied = "lm_head.weight" not in shapes
    permuted = ("attn_q", "attn_k") if arch == "llama" else ()
    tensors = []
    for source, shape in shapes.items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"tensor {source} has no place in a GGUF file of a {arch} model")
        kind = kquants.tensor_type(name, shape, file_type, n_layers=layers, tied=tied)
        rotated = name.split(".")[-2] in permuted
        tensors.append(Tensor(source, name, shape, kind, head_dim(config) if rotated else 0))
    return tensors


def permute(rows: np.ndarray, size: int) -> np.ndarray:
    """The row order llama.cpp expects of a llama's q and k, (heads * size, ...).

    Hugging Face rotates row i of a head with row i + size / 2, llama.cpp neighbours 2i, 2i + 1.
    """
    halves = rows.reshape(-1, 2, size // 2, *rows.shape[1:])  # (heads, half, i, ...)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write(
    path: Path,
    arch: str,
    keys: dict[str, tuple],
    tensors: list[Tensor],
    weights: FusedWeights,
    progress: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Write the file and return the `sample_rows` of each tensor in float32, in the file's order."""
    samples = {}
    writer = gguf.GGUFWriter(path, arch)
    try:
        for key, (value, kind) in keys.items():
            writer.add_key_value(key, value, kind)
        for tensor in tensors:
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        for done, tensor in enumerate(tensors):
            progress(done)
            writer.write_padding(file, file.tell())
            samples[tensor.name] = _write_tensor(file, tensor, weights)
        writer.write_padding(file, file.tell())
    finally:
        writer.close()
    return samples


def _write_tensor(file: BinaryIO, tensor: Tensor, weights: FusedWeights) -> np.ndarray:
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
    return np.concatenate(kept)


def sample_rows(tensor: Tensor) -> np.ndarray:
    """The rows that are checked: the first, the last and some between."""
    return np.unique(np.linspace(0, tensor.shape[0] - 1, SAMPLES).astype(int))


def check(
    path: Path, arch: str, keys: dict[str, tuple], tensors: list[Tensor], samples: dict
) -> None:
    """Read the file back and compare every key, every tensor's shape and type, and the samples.

    Raises:
        ValueError: the first difference.
    """
    reader = gguf.GGUFReader(path)
    found = {key: field.contents() for key, field in reader.fields.items()}
    found = {key: value for key, value in found.items() if not key.startswith("GGUF.")}
    wanted = {key: np.float32(v) if kind == FLOAT32 else v for key, (v, kind) in keys.items()}
    wanted[gguf.Keys.General.ARCHITECTURE] = arch
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise ValueError(
                f"{path.name}: key {key} reads back {found.get(key)!r:.60}, "
                f"expected {wanted.get(key)!r:.60}"
            )
    if [tensor.name for tensor in reader.tensors] != [tensor.name for tensor in tensors]:
        raise ValueError(f"{path.name}: the tensors read back are not those written")
    for got, tensor in zip(reader.tensors, tensors, strict=True):
        shape = tuple(int(n) for n in reversed(got.shape))
        if (shape, got.tensor_type) != (tensor.shape, tensor.type):
            raise ValueError(f"{path.name}: {tensor.name} reads back as {shape} {got.tensor_type}")
        values = gguf.dequantize(got.data[sample_rows(tensor)], tensor.type)
        error = relative_error(values, samples[tensor.name])
        if not error <= ERROR_BOUNDS[tensor.type]:
            raise ValueError(
                f"{path.name}: {tensor.name} in {tensor.type.name} is {error:.1e} off the fused "
                f"weights, at most {ERROR_BOUNDS[tensor.type]:.1e} is allowed"
            )


def relative_error(values: np.ndarray, exact: np.ndarray) -> float:
    """Root mean square of the difference, as a share of the exact values'."""
    difference = values.astype(np.float64) - exact
    return float(np.sqrt((difference**2).sum() / max((exact.astype(np.float64) ** 2).sum(), 1e-30)))
