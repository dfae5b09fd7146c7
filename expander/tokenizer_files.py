"""The faults in a folder's tokenizer files that can be told by the file and the key.

transformers loads a tokenizer.json without a vocabulary as an empty tokenizer, and reports other damage
with an error of its parser, which names neither.
"""

from collections.abc import Callable
from pathlib import Path

from expander.files import read_json


def _ids(vocabulary: object) -> bool:
    if not isinstance(vocabulary, dict) or not vocabulary:
        return False
    ids = vocabulary.values()
    return all(type(x) is int and x >= 0 for x in ids) and len(set(ids)) == len(ids)


def _added(tokens: object) -> bool:
    return isinstance(tokens, list) and all(
        isinstance(x, dict) and isinstance(x.get("content"), str) and type(x.get("id")) is int
        for x in tokens
    )


def _a(*types: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, types)


NULL = type(None)
# file -> (section, key) -> (its check, what is expected)
KEYS = {
    "tokenizer.json": {
        ("", "model"): (_a(dict), "an object"),
        ("model", "vocab"): (_ids, "an object of distinct ids from 0"),
        ("model", "merges"): (_a(list), "a list of pairs"),
        ("", "added_tokens"): (_added, "a list of objects with id and content"),
        ("", "pre_tokenizer"): (_a(dict, NULL), "an object or null"),
        ("", "normalizer"): (_a(dict, NULL), "an object or null"),
        ("", "post_processor"): (_a(dict, NULL), "an object or null"),
        ("", "decoder"): (_a(dict, NULL), "an object or null"),
    },
    "tokenizer_config.json": {
        ("", "added_tokens_decoder"): (_a(dict, NULL), "an object"),
        ("", "tokenizer_class"): (_a(str, NULL), "a name"),
        ("", "chat_template"): (_a(str, list, NULL), "text"),
        ("", "model_max_length"): (_a(int, float, NULL), "a number"),
        ("", "eos_token"): (_a(str, dict, NULL), "a token"),
        ("", "bos_token"): (_a(str, dict, NULL), "a token"),
        ("", "pad_token"): (_a(str, dict, NULL), "a token"),
    },
    "special_tokens_map.json": {},
}


def find_tokenizer_fault(folder: Path) -> str | None:
    """The first fault found in the tokenizer's files, as "PATH: reason"."""
    for name, keys in KEYS.items():
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = read_json(path)
        except ValueError as error:
            return str(error)
        for (section, key), (valid, expected) in keys.items():
            value = (content[section] if section else content).get(key)
            if not valid(value):
                place = f"{section}.{key}" if section else key
                return f"{path}: {place} is {value!r:.40}, expected {expected}"
    return None
