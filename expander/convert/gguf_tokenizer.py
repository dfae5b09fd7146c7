"""The tokenizer of a GGUF file.

The tokenizer is read from the base model's own tokenizer.json, because copies saved by mlx-lm or
transformers lose keys and may have another pre-tokenizer. Two kinds are supported: byte-level BPE, and Gemma's
SentencePiece, which tokenizer.json writes as BPE over characters.
"""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from gguf import TokenType
from tokenizers import Tokenizer

from expander.prompt import CHATML, Frame

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
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
    "qwen35": _split(_QWEN35),
    "llama-bpe": _split(_LLAMA3),
    "smaug-bpe": _split(_LLAMA3),
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    ],
}
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # llama.cpp's names
BYTE = re.compile("<0x[0-9A-F]{2}>")
SPACE = "▁"  # how SentencePiece writes a space
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
# Score of a token that no merge gives.
UNMERGED = -1000.0
PADDING = ("<|pad|>", "<pad>", "<|endoftext|>", "<|end_of_text|>")
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
    "<|start_of_role|>user<|end_of_role|>hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
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
    pre: str  # a key of PRE_TOKENIZERS, or "default" for SentencePiece
    bos: int
    eos: int
    pad: int
    model: str = BYTE_LEVEL
    scores: list[float] = field(default_factory=list)  # the higher, the earlier a merge
    unknown: int = 0


def read_tokenizer(
    folder: Path, size: int, frame: Frame = CHATML, without_embedding: Collection[str] = ()
) -> GGUFTokenizer:
    """The tokenizer in a base model's folder, padded to `size` tokens.

    Args:
        without_embedding: tokens to leave out if their ids are beyond `size`.

    Raises:
        ValueError: tokenizer.json is missing or cannot be read, llama.cpp does not support it, or it
            has none of the frame's tokens.
    """
    path = folder / "tokenizer.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        model, added = found["model"], found["added_tokens"]
        added = [x for x in added if x["content"] not in without_embedding or x["id"] < size]
        ids = model["vocab"] | {token["content"]: token["id"] for token in added}
        ids = {x: i for x, i in ids.items() if x not in without_embedding or i < size}
        merges = [tuple(x.split(" ") if isinstance(x, str) else x) for x in model["merges"]]
    except FileNotFoundError:
        raise ValueError(
            f"{path}: not found, but needed for the file's tokenizer; copy it from the base model"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a BPE tokenizer.json: {error!r:.80}") from None
    sentencepiece = _is_sentencepiece(found)
    pre = "default" if sentencepiece else _pre_tokenizer(found)
    if pre is None or (model.get("byte_fallback") and not sentencepiece):
        raise ValueError(
            f"{path}: llama.cpp has no equivalent for its pre-tokenizer; "
            f"supported: {', '.join(PRE_TOKENIZERS)}"
        )
    needed = filter(None, (frame.start, frame.after_role.strip(), frame.end, frame.bos))
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
        if sentencepiece and BYTE.fullmatch(text):
            types[index] = TokenType.BYTE
    for token in added:
        text = token["content"]
        special = token["special"] or (text.startswith("<|") and text.endswith("|>"))
        types[token["id"]] = TokenType.CONTROL if special else TokenType.USER_DEFINED
        if sentencepiece and not special:  # matched before spaces are replaced
            tokens[token["id"]] = text.replace(SPACE, " ")
    # The model's own BOS may be <|im_start|>, as SmolLM2's is. A runtime that puts the BOS in front
    # of the prompt would then open the turn twice, so the file names the end of text instead.
    ends = [ids[text] for text in (*PADDING, frame.end) if text in ids]
    common = {
        "bos": ids[frame.bos] if frame.bos else ends[0],
        "eos": ids[frame.end],
        "pad": ends[0],
    }
    if not sentencepiece:
        return GGUFTokenizer(tokens, types, [" ".join(pair) for pair in merges], pre, **common)
    scores = [UNMERGED] * size
    merged = dict.fromkeys("".join(pair) for pair in merges)  # in their order, once each
    for rank, text in enumerate(merged):
        if types[ids[text]] == TokenType.NORMAL:
            scores[ids[text]] = -float(rank)
    unknown = ids.get(model.get("unk_token"), 0)
    return GGUFTokenizer(
        tokens, types, [], pre, **common, model=SENTENCEPIECE, scores=scores, unknown=unknown
    )


def _is_sentencepiece(found: dict) -> bool:
    """Whether a tokenizer.json is Gemma's kind: spaces replaced, BPE over characters, and bytes for
    characters that are not in the vocabulary. Splitting at spaces then changes nothing."""
    split = found.get("pre_tokenizer")
    at_spaces = split is None or (
        split.get("type") == "Split" and split.get("pattern") == {"String": " "}
    )
    spaces = (found.get("normalizer") or {}).items() >= SPACES.items()
    return spaces and at_spaces and bool(found["model"].get("byte_fallback"))


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
    model = {
        "type": "BPE",
        "vocab": {token: index for index, token in enumerate(tokenizer.tokens)},
    }
    if tokenizer.model == SENTENCEPIECE:
        steps = {"normalizer": SPACES}
        model |= {"merges": _merges(tokenizer), "byte_fallback": True}
    else:
        splits = [{"trim_offsets": True} | step for step in PRE_TOKENIZERS[tokenizer.pre]]
        steps = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": splits}}
        model |= {
            "merges": tokenizer.merges,
            "ignore_merges": tokenizer.pre == IGNORES_MERGES,
        }
    rebuilt = {
        "version": "1.0",
        **steps,
        "model": model,
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


def _merges(tokenizer: GGUFTokenizer) -> list[tuple[str, str]]:
    """The merges that llama.cpp makes of scores, of those tokens that occur in PROBES: any two tokens
    whose text together is a token, the one with the highest score first."""
    pieces = {
        text[start:end]
        for text in (probe.replace(" ", SPACE) for probe in PROBES)
        for start in range(len(text))
        for end in range(start + 1, len(text) + 1)
    }
    known = set(tokenizer.tokens)
    rows = zip(tokenizer.scores, tokenizer.tokens, tokenizer.types, strict=True)
    order = sorted(
        (-score, text) for score, text, kind in rows if kind == TokenType.NORMAL and text in pieces
    )
    return [
        (text[:cut], text[cut:])
        for _, text in order
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    ]
