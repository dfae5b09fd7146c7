"""How QMD uses the model: its system prompt, its sampling, and the lines it keeps.

Source: `expandQuery` in dist/llm.js of QMD 2.8.3, and node-llama-cpp 3.20.0, which it runs on.
"""

import re
from dataclasses import dataclass

from expander.prompt import TYPES

# node-llama-cpp adds this system turn if the GGUF has the stock Qwen3 template.
QMD_SYSTEM_PROMPT = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible.\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something incorrectly. If you don't know the answer to a question, don't share "
    "false information."
)

# String.prototype.trim strips these; Python's str.strip differs at U+001C-1F, U+0085 and U+FEFF.
JS_WHITESPACE = (
    "\t\n\v\f\r \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000\ufeff"
)
TERM = re.compile("[a-z0-9]+")


@dataclass(frozen=True)
class Sampling:
    """Decoding options that QMD passes to node-llama-cpp.

    `presence_penalty` covers the last `penalty_last_n` generated tokens, but has no effect:
    node-llama-cpp 3.20.0 applies it only if the repeat penalty is not 1, and QMD leaves that at 1.
    With the same seed the text is the same for 0, 0.5 and 50.
    """

    temperature: float = 0.7
    top_k: int = 20
    top_p: float = 0.8
    presence_penalty: float = 0.5
    penalty_last_n: int = 64
    max_tokens: int = 600


SAMPLING = Sampling()


def kept_lines(query: str, text: str) -> list[tuple[str, str]]:
    r"""The (type, text) pairs of a raw completion that QMD searches with.

    QMD drops a line if its type is unknown or its text contains none of the query's terms: the
    runs of ASCII letters and digits in the lower-cased query. For a query without terms, such as
    one in a non-Latin script, it keeps every line. (It later skips a text equal to the query,
    which it searches with anyway.)

    >>> kept_lines("auth config", "lex: auth settings\nvec: how to sign in\nNote: auth")
    [('lex', 'auth settings')]
    """
    terms = TERM.findall(query.lower())
    kept = []
    for line in text.split("\n"):
        kind, colon, content = line.partition(":")
        kind, content = kind.strip(JS_WHITESPACE), content.strip(JS_WHITESPACE)
        lower = content.lower()
        if colon and kind in TYPES and (not terms or any(term in lower for term in terms)):
            kept.append((kind, content))
    return kept


def falls_back(query: str, text: str) -> bool:
    """Whether QMD drops every line and searches with the raw query instead."""
    return not kept_lines(query, text)
