"""The tokenizer of a GGUF file.

The tokenizer is read from the base model's own tokenizer.json, because copies saved by mlx-lm or
transformers lose keys and may have another pre-tokenizer. Only byte-level BPE is supported, which is
what every supported model uses.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType
from tokenizers import Tokenizer

from expander.prompt import CHATML, Frame

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _split(regex: str) -> list[dict]:
    return [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]


# llama.cpp's name for each way to split text before merging -> the same steps in tokenizer.json.
PRE_TOKENIZERS = {
    "qwen2": _split(_QWEN2),
    "llama-bpe": _split(_LLAMA3),
    "smaug-bpe": _split(_LLAMA3),
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    ],
}
PADDING = ("<|pad|>", "<|endoftext|>", "<|end_of_text|>")
# With this one, llama.cpp uses a word that is in the vocabulary as one token, without merging.
IGNORES_MERGES = "llama-bpe"

# Texts on which tokenizers often differ. All are in NFC: llama.cpp does not normalise Unicode.
# fmt: off
PROBES = [
    "auth config", " leading", "trailing ", "two  spaces", "three   spaces   ", "\ttab\tand\t\ttabs",
    "line\nbreak", "two\n\nbreaks", "crlf\r\nline", " \n \n ", "\n\n\n", "a\n b", "end\n",
    "", " ", "      ", "don't we'll I'M they'RE", "it's 'quoted'", "7", "42", "2024", "1234567",
    "3.14159", "1,000,000", "v2.8.3-rc1", "x86_64", "١٢٣", "²½", "C++ and C#", "a->b::c",
    "foo_bar.baz()", "https://example.com/a?b=c&d=%20", "user@example.org", "/only:lex",
    "/no_think Expand this search query: auth config", "hyde: a\nlex: b\nvec: c\n",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", "<|im_end", "<|endoftext|>",
    "x<think>y</think>z", "[PAD3]", "naïve café", "Ünïcödé", "straße", "Привет, мир", "你好，世界",
    "日本語の検索", "안녕하세요", "مرحبا بالعالم", "नमस्ते", "ไทย", "👍🏽 👩‍👩‍👧 🇩🇪", "a\u00a0b\u2003c\u200bd", "—“”…",
    "\u0000\u0007\u007f", "\ufeffbom", "ǅ ﬁ ﷽",
]
# fmt: on


@dataclass(frozen=True)
class GGUFTokenizer:
    """The tokenizer keys of a GGUF file."""

    tokens: list[str]  # one per row of the embedding
    types: list[TokenType]
    merges: list[str]
    pre: str  # a key of PRE_TOKENIZERS
    bos: int
    eos: int
    pad: int


def read_tokenizer(folder: Path, size: int, frame: Frame = CHATML) -> GGUFTokenizer:
    """The tokenizer in a base model's folder, padded to `size` tokens.

    Raises:
        ValueError: tokenizer.json is missing or cannot be read, llama.cpp does not support it, or it
            has none of the frame's tokens.
    """
    path = folder / "tokenizer.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        model, added = found["model"], found["added_tokens"]
        ids = model["vocab"] | {token["content"]: token["id"] for token in added}
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    except FileNotFoundError:
        raise ValueError(
            f"{path}: not found, but needed for the file's tokenizer; copy it from the base model"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a BPE tokenizer.json: {error!r:.80}") from None
    pre = _pre_tokenizer(found)
    if pre is None or model.get("byte_fallback"):
        raise ValueError(
            f"{path}: llama.cpp has no equivalent for its pre-tokenizer; "
            f"supported: {', '.join(PRE_TOKENIZERS)}"
        )
    needed = filter(None, (frame.start, frame.end, frame.bos))
    if missing := [token for token in needed if token not in ids]:
        raise ValueError(f"{path}: no {missing[0]} token, which the model's chat needs")
    if max(ids.values()) >= size:
        raise ValueError(
            f"{path}: {max(ids.values()) + 1} tokens, but config.json's vocab_size is {size}"
        )

    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [TokenType.UNUSED] * size
    for text, index in ids.items():
        tokens[index], types[index] = text, TokenType.NORMAL
    for token in added:
        text = token["content"]
        special = token["special"] or (text.startswith("<|") and text.endswith("|>"))
        types[token["id"]] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    # The model's own BOS may be <|im_start|>, as SmolLM2's is. A runtime that puts the BOS in front
    # of the prompt would then open the turn twice, so the file names the end of text instead.
    ends = [ids[text] for text in (*PADDING, frame.end) if text in ids]
    bos = ids[frame.bos] if frame.bos else ends[0]
    return GGUFTokenizer(tokens, types, merges, pre, bos=bos, eos=ids[frame.end], pad=ends[0])


def _pre_tokenizer(found: dict) -> str | None:
    """llama.cpp's name for the way a tokenizer.json splits text; None if it has none."""
    step = found.get("pre_tokenizer") or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    for name, expected in PRE_TOKENIZERS.items():
        same = len(steps) == len(expected) and all(
            ({"use_regex": True} | step).items() >= wanted.items()  # True is its default
            for step, wanted in zip(steps, expected, strict=True)
        )
        if same and bool(found["model"].get("ignore_merges")) == (name == IGNORES_MERGES):
            return name
    return None


def check_tokenizer(tokenizer: GGUFTokenizer, encode: Callable[[str], list[int]]) -> None:
    """Tokenise PROBES with what the file contains, as llama.cpp will.

    Args:
        encode: the base model's own tokenizer.

    Raises:
        ValueError: `encode` gives other ids.
    """
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    kinds = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    pairs = list(zip(tokenizer.tokens, tokenizer.types, strict=True))
    rebuilt = {
        "version": "1.0",
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"trim_offsets": True} | step for step in PRE_TOKENIZERS[tokenizer.pre]
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(tokenizer.tokens)},
            "merges": tokenizer.merges,
            "ignore_merges": tokenizer.pre == IGNORES_MERGES,
        },
        "added_tokens": [
            {"id": index, "content": token, "special": kinds[kind], **flags}
            for index, (token, kind) in enumerate(pairs)
            if kind in kinds
        ],
    }
    from_file = Tokenizer.from_str(json.dumps(rebuilt))
    for text in PROBES:
        found, expected = from_file.encode(text, add_special_tokens=False).ids, encode(text)
        if found != expected:
            raise ValueError(
                f"llama.cpp would tokenise {text!r} as {found}, the base model's tokenizer gives "
                f"{expected}"
            )
