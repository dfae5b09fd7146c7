"""Text: printed safely, in aligned columns, and the script it is written in."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from reward import LINE_TYPES, only_mode

LINE_PREFIX = re.compile(rf"^\s*(?:{'|'.join(LINE_TYPES)})\s*:", re.MULTILINE)
# Scripts that are written together count as one.
JOINED_SCRIPTS = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK"}


def printable(text: str) -> str:
    """Replace control characters, which a terminal would interpret, in a model's text."""
    return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"  {first:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        for first, *rest in rows
    )


def script_counts(text: str) -> Counter[str]:
    """Count letters by script: the first word of a letter's Unicode name.

    >>> script_counts("Git コミット").most_common()
    [('CJK', 4), ('LATIN', 3)]
    """
    names = (unicodedata.name(char, "").partition(" ")[0] for char in text if char.isalpha())
    return Counter(JOINED_SCRIPTS.get(name, name) for name in names)


def in_wrong_language(query: str, text: str) -> bool:
    """Whether fewer than a quarter of an expansion's letters are in the query's script.

    Technical names are Latin in every language, so the query's script is its most frequent one
    other than Latin if that has at least a quarter of the letters, else Latin. This detects an
    English answer to a Russian query and allows Latin names in a line; it cannot tell German from
    English.

    >>> in_wrong_language("настройка postgresql", "lex: postgresql settings")
    True
    >>> in_wrong_language("настройка postgresql", "lex: postgresql параметры")
    False
    """
    asked = script_counts(only_mode(query)[0])
    found = script_counts(LINE_PREFIX.sub("", text))
    if not asked or not found:
        return False
    script, letters = max(
        ((name, n) for name, n in asked.items() if name != "LATIN"),
        key=lambda entry: entry[1],
        default=("LATIN", asked.total()),
    )
    if letters < asked.total() / 4:
        script = "LATIN"
    return found[script] < found.total() / 4
