"""Rows: every known format as a typed `Example`, and the loader that splits them.

A row is canonical ({"query": ..., "output": [["hyde", text], ...]}), input/output, searches, chat
("messages", rendered "text" or both) or prompt/completion.
"""

import glob
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from expander.files import expand_path, parse_json, pointer_error
from expander.prompt import IM_END, IM_START, TYPES, query_of
from expander.queries import (
    base_query,
    check_characters,
    checked_query,
    normal_query,
    visible_text,
)
from reward import CHAT_MARKERS

THINK = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
TURN = re.compile(
    rf"{re.escape(IM_START)}(\w+)\n(.*?)(?:{re.escape(IM_END)}|(?={re.escape(IM_START)})|\Z)",
    re.DOTALL,
)
INTENT = re.compile(r"\n\s*Query intent:\s*(.*)\Z", re.DOTALL | re.IGNORECASE)
LINE = re.compile(rf"({'|'.join(TYPES)})\s*:\s*(.*)", re.DOTALL)
# The project's own rows, from its root.
DATA = "data/*.jsonl"
# File names that have a meaning in a data set, mlx-lm's among them. The rest are rows to train on.
TRAIN, TEST = "train.jsonl", "test.jsonl"
VALIDATION = ("valid.jsonl", "val.jsonl", "validation.jsonl")


class DataError(ValueError):
    """An unusable row, file or data set; the message starts with its location."""


@dataclass(frozen=True)
class Example:
    """One query and its expansion: (type, text) pairs, hyde first, then lex, then vec."""

    query: str
    lines: tuple[tuple[str, str], ...]
    category: str | None = None
    intent: str | None = None
    language: str | None = None
    passage: str | None = None  # a text that answers the query, for grpo.reward retrieval
    source: str = ""

    @property
    def is_only(self) -> bool:
        """Whether the query asks for only one type of line."""
        return base_query(self.query) != normal_query(self.query)


@dataclass
class Rows:
    """The rows of a data set, and how many were read and dropped."""

    train: list[Example]
    validation: list[Example] = field(default_factory=list)
    read: int = 0
    duplicates: int = 0

    @property
    def languages(self) -> list[str]:
        """The languages of the training rows; rows without a label count as English."""
        return sorted({example.language or "en" for example in self.train})

    def summary(self) -> str:
        return (
            f"{self.read} rows read, {self.duplicates} duplicate queries dropped: "
            f"{len(self.train)} to train on, {len(self.validation)} to validate on"
        )


def _line(kind: object, text: object) -> tuple[str, str]:
    """A checked (type, text) pair, with line breaks as spaces."""
    if kind not in TYPES:
        raise ValueError(f"line type {kind!r:.60} is not one of {', '.join(TYPES)}")
    if not isinstance(text, str) or not visible_text(text):
        raise ValueError(f"a {kind} line has no text")
    return kind, one_line(text)


def one_line(text: str) -> str:
    r"""Text with its line breaks as spaces, also those that are not "\n", such as U+2028."""
    text = text.strip()
    return " ".join(text.split()) if len(text.splitlines()) > 1 else text


def _text_lines(text: str) -> list[tuple[str, str]]:
    """The lines of an expansion given as one text."""
    text = THINK.sub("", text).replace(IM_END, "").strip()
    lines = []
    for raw in filter(None, map(str.strip, text.split("\n"))):
        match = LINE.match(raw)
        if match is None:
            raise ValueError(f"line {raw[:60]!r} does not start with hyde:, lex: or vec:")
        lines.append(_line(*match.groups()))
    return lines


def _from_messages(messages: object) -> tuple[str, str]:
    """(message, reply): the last user turn that an assistant turn answers, and that turn."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("messages is not a list of {role, content}")
    for turn, next_turn in reversed(list(pairwise(messages))):
        if (turn.get("role"), next_turn.get("role")) == ("user", "assistant"):
            user, assistant = turn.get("content"), next_turn.get("content")
            if isinstance(user, str) and isinstance(assistant, str):
                return user, assistant
    raise ValueError("messages has no user turn with text and an assistant turn after it")


def _from_rendered(text: str) -> tuple[str, str]:
    turns = [{"role": role, "content": content} for role, content in TURN.findall(text)]
    if not turns:
        raise ValueError("the rendered text has no ChatML turns")
    return _from_messages(turns)


def _prompt_message(prompt: object) -> str:
    """The last user turn of a prompt: a list of messages, rendered ChatML or plain text."""
    if isinstance(prompt, list):
        users = [
            m.get("content") for m in prompt if isinstance(m, dict) and m.get("role") == "user"
        ]
        if not users or not isinstance(users[-1], str):
            raise ValueError("the prompt has no user turn with text")
        return users[-1]
    if not isinstance(prompt, str):
        raise ValueError(f"the prompt is {type(prompt).__name__}, not text")
    users = [content for role, content in TURN.findall(prompt) if role == "user"]
    return users[-1] if users else prompt


def _completion_text(completion: object) -> str:
    if isinstance(completion, list) and completion and isinstance(completion[-1], dict):
        completion = completion[-1].get("content")
    if not isinstance(completion, str):
        raise ValueError("the completion is not text")
    return completion


def _conversation(row: dict, text_field: str, prompt_field: str) -> tuple[str, str]:
    """(message, reply) of a chat or prompt/completion row."""
    if row.get("messages") is not None:
        return _from_messages(row["messages"])
    if row.get(prompt_field) is not None and row.get("completion") is not None:
        return _prompt_message(row[prompt_field]), _completion_text(row["completion"])
    if isinstance(row.get(text_field), str):
        return _from_rendered(row[text_field])
    known = "query + output, input + output, query + searches, messages, prompt + completion"
    filled = [name for name, value in row.items() if value is not None]
    raise ValueError(f"no known format: found {filled!s:.200}, expected one of {known}")


def _own_lines(row: dict) -> list[tuple[str, str]] | None:
    """The lines of a row that has them in a column of their own; None for a conversation."""
    if row.get("searches") is not None:
        searches = row["searches"]
        if not isinstance(searches, list) or not all(isinstance(s, dict) for s in searches):
            raise ValueError("searches is not a list of {type, query}")
        return [_line(s.get("type"), s.get("query")) for s in searches]
    output = row.get("output")
    if isinstance(output, list):
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in output):
            raise ValueError("output is not a list of [type, text] pairs")
        return [_line(*pair) for pair in output]
    return _text_lines(output) if isinstance(output, str) else None


def _check_text(texts: Iterable[str]) -> None:
    """Raise ValueError for text that would break the prompt's frame or cannot be encoded."""
    text = " ".join(texts)
    check_characters(text)
    markers = [repr(marker) for marker in CHAT_MARKERS if marker in text]
    if markers or THINK.search(text):
        raise ValueError(f"text contains {markers[0] if markers else 'a think block'}")


def parse_row(
    row: object,
    source: str = "",
    text_field: str = "text",
    prompt_field: str = "prompt",
    in_order: bool = True,
) -> Example:
    """Parse a row of any known format.

    Args:
        source: the row's location, "path:line", kept in the example.
        text_field: the column of a rendered conversation.
        prompt_field: the column of the prompt in prompt/completion rows.
        in_order: sort the lines by type; False keeps the row's order.

    Raises:
        ValueError: the row is invalid; the message does not contain its location.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row is an object, found {type(row).__name__}")
    intent, category, language = row.get("intent"), row.get("category"), row.get("language")
    passage = row.get("passage")
    query = row["query"] if row.get("query") is not None else row.get("input")
    lines = _own_lines(row)
    if lines is None:
        message, reply = _conversation(row, text_field, prompt_field)
        lines = _text_lines(reply)
        if found := INTENT.search(message):
            message, intent = message[: found.start()], found[1].strip()
        query = query_of(message)
        query = message if query is None else query

    if not isinstance(query, str):
        raise ValueError(f"the query is {query!r:.60}, expected text")
    query = checked_query(query)
    if not lines:
        raise ValueError("the expansion has no lines")
    _check_text([query, str(intent), *(text for _, text in lines)])
    if in_order:
        lines = sorted(lines, key=lambda line: TYPES.index(line[0]))
    return Example(
        query=query,
        lines=tuple(lines),
        category=category if isinstance(category, str) else None,
        intent=intent if isinstance(intent, str) and intent else None,
        language=language if isinstance(language, str) and language else None,
        passage=passage if isinstance(passage, str) and visible_text(passage) else None,
        source=source,
    )


def labels(example: Example) -> dict[str, str]:
    """The labels of a row: category, intent and language, if it has them."""
    named = {name: getattr(example, name) for name in ("category", "intent", "language")}
    return {name: value for name, value in named.items() if value}


def canonical_row(example: Example) -> dict:
    """The example as a row in the canonical format, which `parse_row` reads back to an equal one."""
    row = {"query": example.query, "output": [list(x) for x in example.lines]} | labels(example)
    return row | ({"passage": example.passage} if example.passage else {})


def _parse_line(raw: bytes) -> object:
    """The JSON value of a line, or a ValueError if it is not valid."""
    try:
        return parse_json(raw)
    except ValueError as error:
        return error


def file_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Read a JSON Lines file.

    Yields:
        (location, row) of each line; a line that is not valid JSON gives a ValueError as its row.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                if raw.strip():
                    yield f"{path}:{number}", _parse_line(raw)
                if number == 1 and pointer_error(raw):
                    return  # one error for the whole file
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def hub_rows(name: str, split: str, subset: str | None = None) -> Iterator[tuple[str, object]]:
    """Download a data set from the Hub.

    Yields:
        (location, row) of each row.

    Raises:
        DataError: the data set could not be downloaded.
    """
    # Imported here: datasets takes over a second, and local rows do not need it.
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    # The library warns at each retry; the error below reports the result once.
    huggingface_hub.logging.set_verbosity_error()
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library raises a dozen unrelated types
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"dataset.name {name}: not a local path, and could not be downloaded from the Hub "
            f"({reason}); without the Hub, use a file or glob such as 'data/*.jsonl'"
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{name}[{split}]:{number}", row


def _parse_all(rows: Iterable[tuple[str, object]], **fields) -> list[Example]:
    """Parse (location, row) pairs; DataError for the first broken row, with the count of others."""
    examples, broken = [], []
    for location, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            examples.append(parse_row(row, location, **fields))
        except ValueError as error:
            broken.append(f"{location}: {error}")
    if broken:
        more = f" (and {len(broken) - 1} more broken lines)" if len(broken) > 1 else ""
        raise DataError(f"{broken[0]}{more}")
    return examples


def _glob(pattern: str) -> list[Path]:
    """The visible files that match; `**` is any depth, without following links to folders."""
    parts = Path(pattern).parts
    if "**" not in parts:
        found = map(Path, glob.glob(pattern))
    else:
        depth = parts.index("**")
        rest = Path(*parts[depth:]) if parts[depth + 1 :] else Path("**", "*")
        bases = map(Path, glob.glob(str(Path(*parts[:depth]))) if depth else ["."])
        found = (
            path
            for base in bases
            for path in base.glob(str(rest))
            if not any(part.startswith(".") for part in path.relative_to(base).parts)
        )
    # "._a.jsonl" is not a file of the user's: macOS keeps the attributes of a.jsonl in it.
    return sorted(path for path in found if path.is_file() and not path.name.startswith("._"))


def _folder_files(folder: Path) -> list[Path]:
    """The train.jsonl of a folder, or else all of its visible .jsonl files.

    Raises:
        DataError: no such file, or rows to validate or test on without rows to train on.
    """
    every = [path for path in sorted(folder.glob("*.jsonl")) if path.is_file()]
    files = [path for path in every if not path.name.startswith(".")]
    if not files:
        hidden = f"; hidden files such as {every[0].name} are not read" if every else ""
        raise DataError(f"{folder}: the folder has no .jsonl file{hidden}")
    if prepared := [path for path in files if path.name == TRAIN]:
        return prepared
    if reserved := [path.name for path in files if path.name in (*VALIDATION, TEST)]:
        raise DataError(
            f"{folder}: the folder has {reserved[0]} but no {TRAIN}; rename the rows to train on, "
            "or name the file that you want to read"
        )
    return files


def _without_copies(files: Iterable[Path]) -> list[Path]:
    """Each file once, also if a link or another spelling leads to it; the first name stays."""
    found: dict[tuple[int, int], Path] = {}
    for path in files:
        status = path.stat()
        found.setdefault((status.st_dev, status.st_ino), path)
    return list(found.values())


def local_files(name: str) -> list[Path]:
    """The .jsonl files of a path or glob; empty if nothing matches.

    A folder with a train.jsonl gives that file, any other folder its *.jsonl files. Folders and
    globs leave hidden files out.

    Raises:
        DataError: the name is empty or has an unknown variable, or it is a folder without rows.
    """
    try:
        path = Path(expand_path(name))
    except ValueError as error:
        raise DataError(f"data {name!r:.60}: {error}") from None
    if path.is_file():
        return [path]
    return _folder_files(path) if path.is_dir() else _without_copies(_glob(str(path)))


def split_files(name: str) -> tuple[list[Path], list[Path]]:
    """The files of a path or glob to train on and, if the data set has its own split, to validate on.

    The names are mlx-lm's: next to a train.jsonl, valid.jsonl (or val.jsonl, validation.jsonl) is
    validation, and test.jsonl is neither. A file that is named itself is always read.

    Raises:
        DataError: as `local_files`; or a glob finds rows to validate or test on without rows to
            train on; or a folder has two files to validate on.
    """
    files = local_files(name)
    if Path(expand_path(name)).is_file():
        reserved = []
    else:
        reserved = [path for path in files if path.name in (*VALIDATION, TEST)]
    train = [path for path in files if path not in reserved]
    prepared = {path.parent for path in train if path.name == TRAIN}
    if unpaired := [path for path in reserved if path.parent not in prepared]:
        raise DataError(
            f"{name}: {unpaired[0]} is not next to a {TRAIN}; rename the rows to train on, or name "
            "only their files"
        )
    validation = []
    for folder in sorted(prepared):
        found = [folder / held for held in VALIDATION if (folder / held).is_file()]
        if len(found) > 1:
            raise DataError(f"{folder}: has {found[0].name} and {found[1].name}; keep one of them")
        validation += found
    return train, validation


def _not_found(name: str) -> DataError:
    hidden = "; hidden files are not read" if glob.has_magic(name) else ""
    return DataError(f"{name}: no such file or folder, and no file matches{hidden}")


def find_files(names: Iterable[str]) -> list[Path]:
    """The .jsonl files of several paths and globs, without duplicates.

    Raises:
        DataError: nothing matches one of the names.
    """
    found: list[Path] = []
    for name in names:
        files = local_files(name)
        if not files:
            raise _not_found(name)
        found += files
    return _without_copies(found)


def read_files(names: Iterable[str]) -> list[Example]:
    """Read all rows of local files, folders and globs, duplicates included.

    Raises:
        DataError: see `load_rows`.
    """
    names = list(names)
    examples = _parse_all(row for path in find_files(names) for row in file_rows(path))
    if not examples:
        raise DataError(f"{', '.join(names)}: contains no rows")
    return examples


def looks_local(name: str) -> bool:
    """Whether a name that matches no file is a path rather than a Hub id (owner/name)."""
    return (
        any(char in name for char in "*?[")
        or name.endswith((".jsonl", ".json"))
        or name.startswith((".", "/", "~"))
        or name.count("/") != 1
        or Path(name).parts[0] in ("data", "outputs")
    )


def _unique(examples: Iterable[Example], seen: set[str]) -> list[Example]:
    """The first example of each query that is not in `seen`; adds the queries to `seen`."""
    unique = []
    for example in examples:
        name = normal_query(example.query)
        if name not in seen:
            seen.add(name)
            unique.append(example)
    return unique


def split_examples(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Split rows into (train, validation), with all /only: variants of a query on one side.

    Args:
        share: share of the rows to hold out; at least one row if above 0.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(base_query(example.query), []).append(example)
    wanted = round(share * len(examples)) or int(share > 0 and len(groups) > 1)
    order = list(groups)
    random.Random(seed).shuffle(order)
    held: set[str] = set()
    count = 0
    for name in order:
        if count >= wanted or len(held) == len(groups) - 1:
            break  # keep at least one group for training
        held.add(name)
        count += len(groups[name])
    train = [e for e in examples if base_query(e.query) not in held]
    return train, [e for e in examples if base_query(e.query) in held]


def sample_examples(examples: list[Example], count: int | None, seed: int) -> list[Example]:
    """`count` examples at random; all of them if there are no more, or if `count` is None."""
    if count is None or count >= len(examples):
        return examples
    return random.Random(seed).sample(examples, count)


def named_rows(
    name: str, split: str = "train", subset: str | None = None
) -> Iterator[tuple[str, object]]:
    """(location, row) pairs of local files or, if `name` is not a local path, of a Hub data set.

    Raises:
        DataError: a local path that does not exist, or a data set that could not be downloaded.
    """
    files, _ = split_files(name)
    if files:
        return (row for path in files for row in file_rows(path))
    if looks_local(name):
        raise _not_found(name)
    return hub_rows(name, split, subset)


def load_rows(
    name: str,
    *,
    split: str = "train",
    text_field: str = "text",
    prompt_field: str = "prompt",
    eval_split: float = 0.0,
    max_samples: int | None = None,
    seed: int = 42,
) -> Rows:
    """Load a file, a folder, a glob or a Hub data set, drop duplicate queries, and split.

    Duplicates are dropped before the split, so that no query is on both sides. A folder with
    train.jsonl and valid.jsonl keeps its own split: see `split_files`.

    Args:
        name: path, glob or Hub id.
        split: split of a Hub data set.
        text_field: the column of a rendered conversation.
        prompt_field: the column of the prompt in prompt/completion rows.
        eval_split: share of the rows to hold out.
        max_samples: maximum number of training rows, sampled with `seed`; None for all.
        seed: seed for the split and the sample.

    Raises:
        DataError: no data set, no rows, or a broken row as "path:line: reason".
    """
    fields = {"text_field": text_field, "prompt_field": prompt_field}
    read = _parse_all(named_rows(name, split), **fields)
    if not read:
        raise DataError(f"dataset.name {name}: contains no rows")

    seen: set[str] = set()
    _, prepared = split_files(name)
    if prepared:
        held = _parse_all((row for path in prepared for row in file_rows(path)), **fields)
        validation = _unique(held, seen)
        bases = {base_query(e.query) for e in validation}
        train = [e for e in _unique(read, seen) if base_query(e.query) not in bases]
        read = read + held
    else:
        train, validation = split_examples(_unique(read, seen), eval_split, seed)
    duplicates = len(read) - len(train) - len(validation)
    train = sample_examples(train, max_samples, seed)
    return Rows(train, validation, read=len(read), duplicates=duplicates)
