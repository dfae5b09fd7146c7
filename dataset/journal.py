"""A JSON Lines file that grows a row at a time and survives a kill at any moment."""

import json
import os
import sys
from pathlib import Path

from expander.queries import normal_query
from expander.rows import file_rows


def append(path: Path, row: dict) -> None:
    """Add one line; it is on disk when this returns."""
    # Half of a surrogate pair, which a model may write, becomes its JSON escape.
    line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
    with path.open("ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def heal(path: Path) -> None:
    """Take off a last line that a killed run wrote in part; end one that only lacks its newline."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        whole, newline, rest = file.read().rpartition(b"\n")
        if not rest.strip():
            return
        try:
            json.loads(rest)
            file.write(b"\n")
        except ValueError:
            file.truncate(len(whole) + len(newline))
            print(f"{path}: its last line was cut off and is taken away", file=sys.stderr)


def recorded(path: Path, field: str) -> dict[str, dict]:
    """The rows of a file of this script by the normal form of one field; none without a file."""
    found = {}
    for place, row in file_rows(path) if path.exists() else ():
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise ValueError(f"{place}: {row if isinstance(row, ValueError) else f'no {field!r}'}")
        found[normal_query(row[field])] = row
    return found
