"""The tokenizer of a base model as a GGUF file holds it, and the chat template beside it.

It is read from the model's own tokenizer.json: what mlx-lm and transformers save again has lost keys
and sometimes has another pre-tokenizer. Only byte-level BPE, the kind of every supported model.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType

from prompt import IM_END, IM_START

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '"
    + IM_START
    + "' + message.role + '\\n' + message.content + '"
    + IM_END
    + "\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '"
    + IM_START
    + "assistant\\n' }}{% endif %}"
)

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# llama.cpp's name of a way to split text before the merges, and the steps in tokenizer.json that
# are this way.
PRE_TOKENIZERS = {
    "qwen2": [
        {"type": "Split", "pattern": {"Regex": _QWEN2}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ],
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    ],
}
# Takes a token that is a word of the vocabulary whole, whatever the merges give.
IGNORE_MERGES = "llama-bpe"


@dataclass(frozen=True)
class Vocabulary:
    tokens: list[str]  # one for every row of the embedding
    types: list[TokenType]
    merges: list[str]
    pre: str
    bos: int
    eos: int
    pad: int


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The vocabulary of a base model's folder, padded to `size` tokens.

    Raises:
        ValueError: no tokenizer.json, one that llama.cpp has no name for, or without ChatML's
            tokens, or with more tokens than the embedding has rows.
    """
    path = folder / "tokenizer.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: the base model's tokenizer cannot be read ({error}); copy the file there"
        ) from None
    model = found["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ValueError(f"{path}: a {model.get('type')} tokenizer; supported: byte-level BPE")
    pre = pre_tokenizer(found)
    if pre is None:
        raise ValueError(
            f"{path}: llama.cpp is not known to split text this way; "
            f"supported: {', '.join(PRE_TOKENIZERS)}"
        )

    ids = dict(model["vocab"])
    kinds = {}
    for token in found["added_tokens"]:
        text = ids_text = token["content"]
        ids[ids_text] = token["id"]
        control = token["special"] or (text.startswith("<|") and text.endswith("|>"))
        kinds[token["id"]] = TokenType.CONTROL if control else TokenType.USER_DEFINED
    if max(ids.values()) >= size:
        raise ValueError(f"{path}: {max(ids.values()) + 1} tokens for {size} rows of embedding")
    for needed in (IM_START, IM_END):
        if needed not in ids:
            raise ValueError(f"{path}: no {needed} token: only ChatML models can be exported")
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [TokenType.UNUSED] * size
    for text, index in ids.items():
        tokens[index], types[index] = text, kinds.get(index, TokenType.NORMAL)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    # Not the model's own BOS: SmolLM2's is <|im_start|>, and a runtime that puts BOS in front
    # would open the turn twice.
    end_of_text = next((ids[text] for text in END_OF_TEXT if text in ids), ids[IM_END])
    return Vocabulary(tokens, types, merges, pre, end_of_text, ids[IM_END], end_of_text)


def pre_tokenizer(found: dict) -> str | None:
    """llama.cpp's name of how a tokenizer.json splits text; None when it has none."""
    step = found.get("pre_tokenizer") or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    for name, wanted in PRE_TOKENIZERS.items():
        same = len(steps) == len(wanted) and all(
            step.items() >= expected.items() for step, expected in zip(steps, wanted, strict=True)
        )
        if same and bool(found["model"].get("ignore_merges")) == (name == IGNORE_MERGES):
            return name
    return None
