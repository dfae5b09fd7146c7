"""The prompt and its ChatML frame.

Training, GRPO rollouts, evaluation, the Modelfile and QMD use exactly these bytes:

    <|im_start|>user
    /no_think Expand this search query: {query}<|im_end|>
    <|im_start|>assistant
    hyde: ...
    lex: ...
    vec: ...
    <|im_end|>

The frame is written here rather than by a model's chat template, which may add a system turn or an
empty think block, and is third-party Jinja code.
"""

from collections.abc import Sequence

from reward import LINE_TYPES

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
INSTRUCTION = "/no_think Expand this search query: "

# In the order of a target's lines, which is alphabetical: hyde, lex, vec.
TYPES = tuple(sorted(LINE_TYPES))


def user_message(query: str, intent: str | None = None) -> str:
    """Content of the user turn; `intent` goes on a second line."""
    return f"{INSTRUCTION}{query}" + (f"\nQuery intent: {intent}" if intent else "")


def query_of(message: str) -> str | None:
    """The query in a user turn written by `user_message`, or None for any other text."""
    message = message.strip()
    prefix = INSTRUCTION.rstrip()
    return message[len(prefix) :].strip() if message.startswith(prefix) else None


def render_prompt(query: str, system: str | None = None, intent: str | None = None) -> str:
    """The prompt as text, up to the first character of the expansion.

    >>> render_prompt("auth config")
    '<|im_start|>user\\n/no_think Expand this search query: auth config<|im_end|>\\n<|im_start|>assistant\\n'
    """
    turns = [] if system is None else [("system", system)]
    turns.append(("user", user_message(query, intent)))
    framed = "".join(f"{IM_START}{role}\n{text}{IM_END}\n" for role, text in turns)
    return f"{framed}{IM_START}assistant\n"


def encode_prompt(
    tokenizer, query: str, system: str | None = None, intent: str | None = None
) -> list[int]:
    """The token ids of `render_prompt`'s text, without special tokens added by the tokenizer."""
    return tokenizer.encode(render_prompt(query, system, intent), add_special_tokens=False)


def render_lines(lines: Sequence[tuple[str, str]]) -> str:
    """The expansion as text, one line per (type, text) pair, without a final newline.

    >>> render_lines([("lex", "auth settings"), ("vec", "how to configure authentication")])
    'lex: auth settings\\nvec: how to configure authentication'
    """
    return "\n".join(f"{kind}: {text}" for kind, text in lines)


def render_target(lines: Sequence[tuple[str, str]], final_newline: bool = True) -> str:
    """The completion to learn: the expansion and the end token.

    QMD's grammar lets a model stop only after a newline, so the last line ends with one by default.

    >>> render_target([("lex", "auth settings")])
    'lex: auth settings\\n<|im_end|>'
    """
    return f"{render_lines(lines)}{chr(10) if final_newline else ''}{IM_END}"
