"""An append-only JSON Lines file that survives a kill at any moment."""

import json
import os
import sys
from pathlib import Path

from expander.queries import normal_query
from expander.rows import file_rows


def append(path: Path, row: dict) -> None:
    """Append a row and flush it to disk."""
    # A model may write an unpaired surrogate, which UTF-8 cannot encode: escape it.
    line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
    with path.open("ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def repair(path: Path) -> None:
    """Remove a last line that a killed run wrote in part; add a newline that is missing."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        complete, newline, rest = file.read().rpartition(b"\n")
        if not rest.strip():
            return
        try:
            json.loads(rest)
            file.write(b"\n")
        except ValueError:
            file.truncate(len(complete) + len(newline))
            print(f"{path}: removed an incomplete last line", file=sys.stderr)


def recorded(path: Path, field: str) -> dict[str, dict]:
    """Read the rows by the normal form of a field; no rows if the file does not exist.

    Raises:
        ValueError: a row that is broken or has no text in the field.
    """
    found = {}
    for location, row in file_rows(path) if path.exists() else ():
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            reason = row if isinstance(row, ValueError) else f"no {field!r}"
            raise ValueError(f"{location}: {reason}")
        found[normal_query(row[field])] = row
    return found
