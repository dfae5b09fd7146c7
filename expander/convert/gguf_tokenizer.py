"""The tokenizer of a base model as a GGUF file holds it, and the chat template beside it.

It is read from the base model's own tokenizer.json: what mlx-lm and transformers write again has
lost keys and sometimes has another pre-tokenizer. Only byte-level BPE, the kind of every supported
model.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType

from expander.prompt import IM_END, IM_START

# The frame of prompt.py, with no tools and no thinking, for two readers:
# - QMD takes any ChatML template that node-llama-cpp 3.20.0 finds equal to its own ChatML wrapper
#   for that wrapper, which puts the BOS token in front of the prompt. Training ends at <|im_end|>,
#   so there is no newline after an assistant's turn here; this one difference makes the template
#   itself be rendered: no BOS, no think block, the trained bytes. The system turn that
#   node-llama-cpp adds has to be there: it turns down a template that leaves a message out.
# - Ollama 0.30 and later lets a Modelfile's TEMPLATE stand when the file's own template can do
#   nothing more. The stock Qwen3 template can (tools, thinking), and would replace it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{{{ '{IM_START}' + message.role + '\\n' + message.content + '{IM_END}' }}}}"
    "{% if message.role != 'assistant' %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{IM_START}assistant\\n' }}}}{{% endif %}}"
)

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


# llama.cpp's name for a way to split text before merging, and the steps of tokenizer.json it means.
PRE_TOKENIZERS = {
    "qwen2": _split(_QWEN2),
    "llama-bpe": _split(_LLAMA3),
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    ],
}
# With this one, llama.cpp takes a whole word of the vocabulary whatever the merges give.
IGNORES_MERGES = "llama-bpe"

# Text on which tokenizers disagree. Nothing decomposed: llama.cpp does no Unicode normalisation.
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
class Vocabulary:
    """What a GGUF file says about its tokenizer."""

    tokens: list[str]  # one for each row of the embedding
    types: list[TokenType]
    merges: list[str]
    pre: str
    bos: int
    eos: int
    pad: int


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The vocabulary of a base model's folder, padded to `size` tokens.

    Raises:
        ValueError: tokenizer.json is not there or cannot be read, llama.cpp cannot do what it
            says, or it is not a ChatML model's.
    """
    path = folder / "tokenizer.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        model, added = found["model"], found["added_tokens"]
        ids = model["vocab"] | {token["content"]: token["id"] for token in added}
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: the file's tokenizer is made from it; copy it from the base model"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a BPE tokenizer.json: {error!r:.80}") from None
    pre = _pre_tokenizer(found)
    if pre is None or model.get("byte_fallback"):
        raise ValueError(
            f"{path}: llama.cpp has no name for the way it splits text; "
            f"supported are those of {', '.join(PRE_TOKENIZERS)}"
        )
    missing = [token for token in (IM_START, IM_END) if token not in ids]
    if missing:
        raise ValueError(f"{path}: no {missing[0]} token; only ChatML models can be exported")
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
    # Not the model's own BOS: SmolLM2's is <|im_start|>, and a runtime that puts the BOS in front
    # of a prompt would then open the turn twice.
    ends = [ids[text] for text in ("<|endoftext|>", "<|end_of_text|>", IM_END) if text in ids]
    return Vocabulary(tokens, types, merges, pre, bos=ends[0], eos=ids[IM_END], pad=ends[0])


def _pre_tokenizer(found: dict) -> str | None:
    """llama.cpp's name for how a tokenizer.json splits text; None when it has none."""
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


def check_vocabulary(vocabulary: Vocabulary, encode: Callable[[str], list[int]]) -> None:
    """Tokenise the PROBES from the vocabulary alone, as llama.cpp will.

    Raises:
        ValueError: `encode`, the base model's own tokenizer, gives other ids.
    """
    from tokenizers import Tokenizer

    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    kinds = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    pairs = list(zip(vocabulary.tokens, vocabulary.types, strict=True))
    rebuilt = {
        "version": "1.0",
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"trim_offsets": True} | step for step in PRE_TOKENIZERS[vocabulary.pre]
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(vocabulary.tokens)},
            "merges": vocabulary.merges,
            "ignore_merges": vocabulary.pre == IGNORES_MERGES,
        },
        "added_tokens": [
            {"id": index, "content": token, "special": kinds[kind], **flags}
            for index, (token, kind) in enumerate(pairs)
            if kind in kinds
        ],
    }
    tokenizer = Tokenizer.from_str(json.dumps(rebuilt))
    for text in PROBES:
        got, wanted = tokenizer.encode(text, add_special_tokens=False).ids, encode(text)
        if got != wanted:
            raise ValueError(
                f"the file would tokenise {text!r} as {got}, the base model's tokenizer as {wanted}"
            )
