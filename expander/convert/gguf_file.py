"""A GGUF file of a fused chain: plan its contents, write it, read it back to verify it.

Keys and tensors are named and laid out as llama.cpp's own converter does. Left out: sharded files,
importance matrices.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, LlamaFileType

from expander.architectures import ARCHITECTURES, head_dim
from expander.convert import kquants
from expander.convert.gguf_tokenizer import SENTENCEPIECE, GGUFTokenizer
from expander.convert.weights import FusedWeights

# The types of --quantize.
FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "q5_k_m": LlamaFileType.MOSTLY_Q5_K_M,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
}
MODEL_ARCHS = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
SAMPLES = 8  # rows of each tensor that are verified
# Maximum relative_error of the sampled rows. For the quantised types this is the worst case, when one
# or two values dominate a block; a model's weights lose about half of it.
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


def hyperparameters(config: dict) -> dict[str, tuple]:
    """The architecture's keys, key -> (value, type), from `model_config`."""
    architecture = ARCHITECTURES[config["model_type"]]
    values = {
        "block_count": (config["num_hidden_layers"], UINT32),
        "context_length": (config["max_position_embeddings"], UINT32),
        "embedding_length": (config["hidden_size"], UINT32),
        "feed_forward_length": (config["intermediate_size"], UINT32),
        "attention.head_count": (config["num_attention_heads"], UINT32),
        "attention.head_count_kv": (config["num_key_value_heads"], UINT32),
        "attention.key_length": (head_dim(config), UINT32),
        "attention.value_length": (head_dim(config), UINT32),
        "attention.layer_norm_rms_epsilon": (config["rms_norm_eps"], FLOAT32),
        "rope.freq_base": (config["rope_theta"], FLOAT32),
    }
    scaling = config["rope_scaling"] or {}
    if scaling.get("rope_type") in ("linear", "yarn"):  # llama3 is a tensor, see `rope_factors`
        values["rope.scaling.type"] = (scaling["rope_type"], STRING)
        values["rope.scaling.factor"] = (scaling["factor"], FLOAT32)
        if original := scaling.get("original_max_position_embeddings"):
            values["rope.scaling.original_context_length"] = (original, UINT32)
    types = {float: FLOAT32, list: ARRAY}
    for key, value in architecture.gguf_keys(config).items():
        values[key] = (value, types.get(type(value), UINT32))
    return {f"{architecture.gguf_name}.{key}": value for key, value in values.items()}


def metadata(
    config: dict, tokenizer: GGUFTokenizer, name: str, file_type: LlamaFileType
) -> dict[str, tuple]:
    """All keys of the file except general.architecture, key -> (value, type)."""
    frame = ARCHITECTURES[config["model_type"]].frame
    order = {"tokenizer.ggml.merges": (tokenizer.merges, ARRAY)}
    if tokenizer.model == SENTENCEPIECE:
        order = {
            "tokenizer.ggml.scores": (tokenizer.scores, ARRAY),
            "tokenizer.ggml.unknown_token_id": (tokenizer.unknown, UINT32),
            "tokenizer.ggml.add_space_prefix": (False, BOOL),
        }
    return {
        "general.type": ("model", STRING),
        "general.name": (name, STRING),
        "general.finetune": ("query-expansion", STRING),
        "general.file_type": (int(file_type), UINT32),
        "general.quantization_version": (gguf.GGML_QUANT_VERSION, UINT32),
        **hyperparameters(config),
        "tokenizer.ggml.model": (tokenizer.model, STRING),
        "tokenizer.ggml.pre": (tokenizer.pre, STRING),
        "tokenizer.ggml.tokens": (tokenizer.tokens, ARRAY),
        "tokenizer.ggml.token_type": ([int(kind) for kind in tokenizer.types], ARRAY),
        **order,
        "tokenizer.ggml.bos_token_id": (tokenizer.bos, UINT32),
        "tokenizer.ggml.eos_token_id": (tokenizer.eos, UINT32),
        "tokenizer.ggml.padding_token_id": (tokenizer.pad, UINT32),
        # For byte-level tokenizers, older llama.cpp versions take a missing key as true.
        "tokenizer.ggml.add_bos_token": (bool(frame.bos), BOOL),
        "tokenizer.chat_template": (frame.jinja(), STRING),
    }


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file."""

    source: str  # its name in the model
    name: str  # its name in the file
    shape: tuple[int, ...]  # rows first
    type: GGMLQuantizationType
    change: Callable[[np.ndarray], np.ndarray] | None = field(default=None, compare=False)
    multiple: int = 1  # rows that `change` needs together
    values: np.ndarray | None = field(
        default=None, compare=False
    )  # float32, if they are not the model's

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size


@dataclass(frozen=True)
class GGUFFile:
    """The contents of a file: keys, and the layout of its tensors."""

    arch: str
    keys: dict[str, tuple]  # key -> (value, type), without general.architecture
    tensors: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Size of the tensors; the rest of the file is a few MB."""
        return sum(_padded(tensor.nbytes) for tensor in self.tensors)

    def write(
        self, path: Path, weights: FusedWeights, progress: Callable[[int], None]
    ) -> dict[str, np.ndarray]:
        """Write the file, and call `progress` with the bytes of tensors written so far.

        Returns the float32 values of each tensor's `sample_rows`, for `check`.
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
        """Read the file back and compare keys, tensor shapes, types and offsets, and sampled rows.

        Raises:
            ValueError: the first difference found.
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
        layout, offset = [], 0
        for tensor in self.tensors:
            layout.append((tensor.name, tensor.shape, tensor.type, offset))
            offset += _padded(tensor.nbytes)
        if found_tensors != layout or path.stat().st_size != start + offset:
            raise ValueError(
                "tensor names, shapes, types or offsets differ, or the file's size does"
            )
        for tensor, (*_, offset) in zip(self.tensors, layout, strict=True):
            rows = tensor.shape[0]
            data = np.memmap(path, np.uint8, "r", start + offset, (rows, tensor.nbytes // rows))
            values = gguf.dequantize(data[sample_rows(tensor)], tensor.type)
            error = relative_error(values, samples[tensor.name].reshape(values.shape))
            if not error <= ERROR_BOUNDS[tensor.type]:
                raise ValueError(
                    f"{tensor.name} in {tensor.type.name} differs from the fused weights by "
                    f"{error:.1e}, more than {ERROR_BOUNDS[tensor.type]:.1e}"
                )


def plan(
    config: dict,
    tokenizer: GGUFTokenizer,
    name: str,
    kind: str,
    shapes: dict[str, tuple[int, ...]],
) -> GGUFFile:
    """Lay out the file of a model.

    Args:
        config: from `model_config`.
        name: the model's name, stored in the file.
        kind: a key of FILE_TYPES.
        shapes: of the fused tensors, by name.

    Raises:
        ValueError: llama.cpp has no name for a tensor.
    """
    architecture, layers = ARCHITECTURES[config["model_type"]], config["num_hidden_layers"]
    file_type = FILE_TYPES[kind]
    names = gguf.get_tensor_name_map(MODEL_ARCHS[architecture.gguf_name], layers)
    tied = not any(name.endswith("lm_head.weight") for name in shapes)
    permuted = ("attn_q", "attn_k") if architecture.interleaved_rope else ()
    layouts, tensors = {}, []
    for source, shape in shapes.items():
        layout = architecture.gguf_layout(config, source, shape)
        target = names.get_name(layout.name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(
                f"tensor {source} is not part of a {architecture.gguf_name} model in llama.cpp"
            )
        layouts[target] = source, layout
    parts = [target.split(".") for target in layouts]
    values = sorted({int(part[1]) for part in parts if part[-2] in kquants.VALUES})
    for target, (source, layout) in layouts.items():
        _, shape, change, rows = layout
        stored = kquants.tensor_type(
            target, shape, file_type, n_layers=layers, tied=tied, values=values
        )
        if target.split(".")[-2] in permuted:
            rows = head_dim(config)
            change = partial(permute, size=rows)
        tensors.append(Tensor(source, target, shape, stored, change, rows))
    if (factors := rope_factors(config)) is not None:
        f32 = GGMLQuantizationType.F32
        tensors.append(Tensor("", "rope_freqs.weight", factors.shape, f32, values=factors))
    keys = metadata(config, tokenizer, name, file_type)
    return GGUFFile(architecture.gguf_name, keys, tensors)


def rope_factors(config: dict) -> np.ndarray | None:
    """What llama.cpp divides each of RoPE's frequencies by, (head_dim / 2,); None without llama3.

    Llama 3's scaling divides the low frequencies by `factor`, keeps the high ones, and interpolates
    between them (transformers' modeling_rope_utils.py).
    """
    scaling = config["rope_scaling"] or {}
    if scaling.get("rope_type") != "llama3":
        return None
    size, factor = head_dim(config), scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(0, size, 2) / size)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def permute(rows: np.ndarray, size: int) -> np.ndarray:
    """Reorder the rows of q or k, (heads * size, ...), for interleaved RoPE.

    Hugging Face rotates row i of a head with row i + size / 2; llama.cpp rotates rows 2i and 2i + 1.
    """
    halves = rows.reshape(-1, 2, size // 2, *rows.shape[1:])  # (heads, half, i, ...)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _write_tensor(
    file: BinaryIO, tensor: Tensor, weights: FusedWeights, tick: Callable[[], None]
) -> np.ndarray:
    """Append a tensor to the file, and return its `sample_rows` in float32."""
    kept, first = [], 0
    rows = sample_rows(tensor)
    pieces = weights.read(tensor.source, multiple=tensor.multiple)
    for piece in pieces if tensor.values is None else [tensor.values]:
        if tensor.change is not None:
            piece = np.ascontiguousarray(tensor.change(piece), np.float32)
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
    """Indices of the rows to verify: the first, the last and some between."""
    return np.unique(np.linspace(0, tensor.shape[0] - 1, SAMPLES).astype(int))


def relative_error(values: np.ndarray, exact: np.ndarray) -> float:
    """RMS of the difference, relative to the RMS of the exact values."""
    exact = exact.astype(np.float64)
    return float(np.sqrt(((values - exact) ** 2).sum() / max((exact**2).sum(), 1e-30)))


def read_header(path: Path) -> tuple[dict, list[tuple], int]:
    """Read a file's keys, its tensors as (name, shape with rows first, type, offset), and the
    position where their data starts.

    gguf.GGUFReader takes thirteen times as long: many seconds for 150,000 tokens.
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
    """Read a value of one of the types that `metadata` uses."""
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
