"""The prompt and its ChatML frame, written down once.

Training, GRPO rollouts, evaluation, the Modelfile and QMD must agree on these bytes:

    <|im_start|>user
    /no_think Expand this search query: {query}<|im_end|>
    <|im_start|>assistant
    hyde: ...
    lex: ...
    vec: ...
    <|im_end|>

The frame is rendered here and never by a model's own chat template, which may add a system turn
or an empty think block, or run somebody's Jinja.
"""

from collections.abc import Sequence

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
INSTRUCTION = "/no_think Expand this search query: "

# The order of the lines in a target.
TYPES = ("hyde", "lex", "vec")


def user_message(query: str, intent: str | None = None) -> str:
    """The user's turn, without its frame; `intent` stands on a line of its own."""
    return f"{INSTRUCTION}{query}" + (f"\nQuery intent: {intent}" if intent else "")


def query_of(message: str) -> str | None:
    """The query in a user's turn written by `user_message`; None when it is some other text."""
    message = message.strip()
    prefix = INSTRUCTION.rstrip()
    return message[len(prefix) :].strip() if message.startswith(prefix) else None


def render_prompt(query: str, system: str | None = None, intent: str | None = None) -> str:
    """Everything up to the first character of the expansion.

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
    """Token ids of `render_prompt`, without any token the tokenizer would add by itself."""
    return tokenizer.encode(render_prompt(query, system, intent), add_special_tokens=False)


def render_lines(lines: Sequence[tuple[str, str]]) -> str:
    """The expansion as text, one line a pair, no newline at the end.

    >>> render_lines([("lex", "auth settings"), ("vec", "how to configure authentication")])
    'lex: auth settings\\nvec: how to configure authentication'
    """
    return "\n".join(f"{kind}: {text}" for kind, text in lines)


def render_target(lines: Sequence[tuple[str, str]], final_newline: bool = True) -> str:
    """What the model must write after the prompt, the end token included.

    QMD's grammar allows the end only after a newline, so the last line carries one by default.

    >>> render_target([("lex", "auth settings")])
    'lex: auth settings\\n<|im_end|>'
    """
    return f"{render_lines(lines)}{chr(10) if final_newline else ''}{IM_END}"
