"""Damage to files, for fuzz.py: in their bytes, or in a value inside their format."""

import contextlib
import json
import struct
from pathlib import Path
from random import Random

import yaml

# fmt: off
VALUES = [
    None, True, False, 0, -1, 0.5, 10**30, -(10**30), 1e300, "", " ", "\0", "\u200b", "a\u2028b\rc",
    "\ud83d", "~", "$HOME", "$NO_SUCH", "x" * 5000, [], {}, [[]], [None], {"": None}, "lex: a", "NaN",
    ".", "..", "/dev/null", "<|im_end|>", "<think>a</think>", [["lex", None]], "e\u0301", "-0", "no",
]
SNIPPETS = [
    b"\0", b"\xef\xbb\xbf", b"\xff", b"\r", b"\n", b"\t", b"NaN", b"1e999", b"[" * 3000, b"{", b"}", b'"',
    b"\xe2\x80\xa8", b"\\ud83d", b"version https://git-lfs.github.com/spec/v1\n", b"null", b"012", b"1:30",
    b"&a ", b"*a", b"<<: ", b"---\n", b"%", b"!!int ", b"9" * 5000, b" #", b", ,",
]
# fmt: on


def places(value: object, at: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    inner = [x for name, v in items if isinstance(v, dict | list) for x in places(v, (*at, name))]
    return [(*at, name) for name, _ in items] + inner


def damage_value(rng: Random, value: object) -> object:
    """Replace, delete, rename or wrap a value inside a JSON value."""
    *above, last = rng.choice(places(value))
    inside = value
    for name in above:
        inside = inside[name]
    action = rng.choice(("replace", "replace", "delete", "rename", "wrap"))
    old = inside.pop(last)
    if action == "rename" and isinstance(inside, dict):
        inside[rng.choice((f"{last}s", "", "query", "model"))] = old
    elif action != "delete":
        new = [old] if action == "wrap" else rng.choice(VALUES)
        inside.insert(last, new) if isinstance(inside, list) else inside.update({last: new})
    return value


def damage_bytes(rng: Random, data: bytes) -> bytes:
    """Cut, remove, insert, overwrite or repeat some bytes, or repeat a line."""
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((1, 2, 10, 200)))
    head, some, tail = data[:start], data[start:end], data[end:]
    line = rng.choice(data.splitlines(keepends=True) or [b""])
    made = [b"", tail, rng.choice(SNIPPETS) + some + tail, rng.randbytes(len(some)) + tail]
    made += [some + some + tail]
    return rng.choice([*(head + rest for rest in made), data.replace(line, line + line, 1)])


def damage_format(rng: Random, data: bytes, suffix: str) -> bytes:
    """Damage a value inside a file, which keeps its format."""
    if suffix == ".jsonl":
        lines = data.split(b"\n")
        at = rng.randrange(len(lines))
        lines[at] = damage_format(rng, lines[at], ".json")
        return b"\n".join(lines)
    if suffix == ".safetensors":
        size = 8 + struct.unpack("<Q", data[:8])[0]
        header = damage_format(rng, data[8:size], ".json")
        return struct.pack("<Q", len(header)) + header + data[size:]
    if suffix == ".yaml":
        return yaml.safe_dump(damage_value(rng, yaml.safe_load(data))).encode()
    return json.dumps(damage_value(rng, json.loads(data))).encode()


def damage(rng: Random, path: Path) -> Path:
    for _ in range(rng.choice((1, 1, 2))):
        data = path.read_bytes()
        if rng.random() < 0.5:
            path.write_bytes(damage_bytes(rng, data))
            continue
        with contextlib.suppress(Exception):  # an earlier damage has made it unreadable
            path.write_bytes(damage_format(rng, data, path.suffix))
    return path
