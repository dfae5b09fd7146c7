"""The supported model architectures, and everything in which they differ.

To add one:

1. Check that mlx-lm has it (mlx_lm/models/MODEL_TYPE.py) with the layout that model.py uses:
   `model.model` returns the normed hidden states, `model.layers` holds the layers, and the logits
   come from `model.lm_head` or from the tied embeddings.
2. Check that the gguf package has it (gguf.MODEL_ARCH) with a name for each of its tensors.
3. Add an entry to ARCHITECTURES. llama.cpp's converter shows the keys and the row order; mlx-lm's
   ModelArgs shows the keys of config.json that it needs, and those that it ignores.
4. If its tokenizer.json splits text in a new way, add llama.cpp's name for that to PRE_TOKENIZERS in
   convert/gguf_tokenizer.py. It is chosen by the tokenizer, not by the architecture.
5. If a layer is more than attention and a gated MLP, extend PROJECTIONS in config.py (LoRA's targets)
   and Shape in train/memory.py (the memory estimate).
6. Add a tiny random model to tests/tiny.py and to BASES in tests/test_llama_cpp.py, which compares
   its greedy tokens with those of a real llama.cpp.
"""

from collections.abc import Callable
from dataclasses import dataclass


def head_dim(config: dict) -> int:
    """The size of an attention head, from a model's config.json."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _no_keys(config: dict) -> dict[str, int | float]:
    return {}


@dataclass(frozen=True)
class Architecture:
    """One architecture. Biases and head norms need no field: gguf names the tensors a model has.

    Attributes:
        model_type: its name in config.json and in mlx-lm.
        gguf_name: its name in GGUF files, also the prefix of its keys.
        gguf_keys: from config.json to the keys that it has in addition to those of
            gguf_file.hyperparameters, without the prefix.
        interleaved_rope: llama.cpp rotates neighbouring rows of q and k, not the two halves of a
            head as Hugging Face does, so the rows are reordered on export.
        sizes: integers that config.json must have in addition to base_config.SIZES.
        free_head_dim: a head may have another size than hidden_size / num_attention_heads.
        biases: switches of config.json that mlx-lm obeys; in other architectures they must be off.
        rope_types: the kinds of RoPE that transformers, mlx-lm and llama.cpp compute alike.
    """

    model_type: str
    gguf_name: str
    gguf_keys: Callable[[dict], dict[str, int | float]] = _no_keys
    interleaved_rope: bool = False
    sizes: tuple[str, ...] = ("num_key_value_heads",)
    free_head_dim: bool = True
    biases: tuple[str, ...] = ()
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")


def _llama_keys(config: dict) -> dict[str, int | float]:
    return {"vocab_size": config["vocab_size"], "rope.dimension_count": head_dim(config)}


ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("qwen3", gguf_name="qwen3", sizes=("num_key_value_heads", "head_dim")),
        Architecture("qwen2", gguf_name="qwen2", free_head_dim=False),
        Architecture(
            "llama",
            gguf_name="llama",
            gguf_keys=_llama_keys,
            interleaved_rope=True,
            sizes=(),
            biases=("attention_bias", "mlp_bias"),
            rope_types=("default", "linear", "yarn", "llama3"),
        ),
    )
}
