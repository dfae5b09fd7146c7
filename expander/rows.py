"""One typed row, read from every format found in the wild, and the one loader of rows.

A row is canonical ({"query", "output": [["hyde", text], ...]}), input/output, searches, chat
("messages" and/or rendered "text") or prompt/completion. All of them become an `Example`.
"""

import glob
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from expander.prompt import IM_END, IM_START, TYPES, query_of
from expander.queries import base_query, normal_query
from reward import CHAT_MARKERS

THINK = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
TURN = re.compile(
    rf"{re.escape(IM_START)}(\w+)\n(.*?)(?:{re.escape(IM_END)}|(?={re.escape(IM_START)})|\Z)",
    re.DOTALL,
)
INTENT = re.compile(r"\n\s*Query intent:\s*(.*)\Z", re.DOTALL | re.IGNORECASE)
SURROGATE = re.compile(r"[\ud800-\udfff]")  # what JSON's "\ud83d" alone becomes
LINE = re.compile(rf"({'|'.join(TYPES)})\s*:\s*(.*)", re.DOTALL)
# The project's own rows, as its tools find them from the root.
DATA = "data/*.jsonl"


class DataError(ValueError):
    """A row, a file or a data set that cannot be used; the message starts with its place."""


@dataclass(frozen=True)
class Example:
    """One query and its expansion: (type, text) pairs, hyde first, then lex, then vec."""

    query: str
    lines: tuple[tuple[str, str], ...]
    category: str | None = None
    intent: str | None = None
    language: str | None = None
    source: str = ""

    @property
    def is_only(self) -> bool:
        """Whether the query asks for one type of line alone."""
        return base_query(self.query) != normal_query(self.query)


@dataclass
class Rows:
    """The rows of one source, and what was left out on the way."""

    train: list[Example]
    validation: list[Example] = field(default_factory=list)
    read: int = 0
    duplicates: int = 0

    def summary(self) -> str:
        return (
            f"{self.read} rows read, {self.duplicates} duplicate queries dropped: "
            f"{len(self.train)} to train on, {len(self.validation)} to validate on"
        )


def _line(kind: object, text: object) -> tuple[str, str]:
    if kind not in TYPES:
        raise ValueError(f"line type {kind!r} is not one of {', '.join(TYPES)}")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"a {kind} line has no text")
    return kind, " ".join(text.split()) if "\n" in text else text.strip()


def _text_lines(text: str) -> list[tuple[str, str]]:
    text = THINK.sub("", text).replace(IM_END, "").strip()
    lines = []
    for raw in filter(None, map(str.strip, text.split("\n"))):
        match = LINE.match(raw)
        if match is None:
            raise ValueError(f"line {raw[:60]!r} does not start with hyde:, lex: or vec:")
        lines.append(_line(*match.groups()))
    return lines


def _from_messages(messages: object) -> tuple[str, str]:
    """The last user turn and the assistant turn after it."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("messages is not a list of {role, content}")
    for asked, answer in reversed(list(pairwise(messages))):
        if (asked.get("role"), answer.get("role")) == ("user", "assistant"):
            user, assistant = asked.get("content"), answer.get("content")
            if isinstance(user, str) and isinstance(assistant, str):
                return user, assistant
    raise ValueError("messages has no user turn with text that an assistant turn answers")


def _from_rendered(text: str) -> tuple[str, str]:
    turns = [{"role": role, "content": content} for role, content in TURN.findall(text)]
    if not turns:
        raise ValueError("the rendered text has no ChatML turns")
    return _from_messages(turns)


def _prompt_message(prompt: object) -> str:
    """The user's turn of a prompt given as messages, as rendered ChatML or as plain text."""
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


def parse_row(
    row: object,
    source: str = "",
    text_field: str = "text",
    prompt_field: str = "prompt",
    in_order: bool = True,
) -> Example:
    """One row of any known format as an `Example`.

    Args:
        in_order: false to leave the lines as they stand in the row.

    Raises:
        ValueError: says what is wrong with the row, without its place.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row is an object, found {type(row).__name__}")
    intent, category, language = row.get("intent"), row.get("category"), row.get("language")
    query = row["query"] if row.get("query") is not None else row.get("input")

    if row.get("searches") is not None:
        searches = row["searches"]
        if not isinstance(searches, list) or not all(isinstance(s, dict) for s in searches):
            raise ValueError("searches is not a list of {type, query}")
        lines = [_line(s.get("type"), s.get("query")) for s in searches]
    elif isinstance(row.get("output"), list):
        pairs = row["output"]
        if not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
            raise ValueError("output is not a list of [type, text] pairs")
        lines = [_line(*pair) for pair in pairs]
    elif isinstance(row.get("output"), str):
        lines = _text_lines(row["output"])
    else:
        if row.get("messages") is not None:
            query, reply = _from_messages(row["messages"])
        elif row.get(prompt_field) is not None and row.get("completion") is not None:
            query, reply = _prompt_message(row[prompt_field]), _completion_text(row["completion"])
        elif isinstance(row.get(text_field), str):
            query, reply = _from_rendered(row[text_field])
        else:
            known = (
                "query + output, input + output, query + searches, messages, prompt + completion"
            )
            filled = [name for name, value in row.items() if value is not None]
            raise ValueError(f"no known format: found {filled}, expected one of {known}")
        lines = _text_lines(reply)
        asked = INTENT.search(query)
        if asked:
            query, intent = query[: asked.start()], asked[1].strip()
        asked_query = query_of(query)
        query = query if asked_query is None else asked_query

    if not isinstance(query, str) or not query.strip():
        raise ValueError(f"the query is {query!r}, not a text")
    if not lines:
        raise ValueError("the expansion has no lines")
    query = " ".join(query.split())
    everything = " ".join([query, str(intent), *(text for _, text in lines)])
    if SURROGATE.search(everything):
        raise ValueError("a text holds half of a surrogate pair, which is not Unicode")
    markers = [marker for marker in CHAT_MARKERS if marker in everything]
    if markers or THINK.search(everything):
        raise ValueError(f"a text holds {repr(markers[0]) if markers else 'a think block'}")
    if in_order:
        lines = sorted(lines, key=lambda line: TYPES.index(line[0]))
    return Example(
        query=query,
        lines=tuple(lines),
        category=category if isinstance(category, str) else None,
        intent=intent if isinstance(intent, str) and intent else None,
        language=language if isinstance(language, str) and language else None,
        source=source,
    )


def labels(example: Example) -> dict[str, str]:
    """What a row says of itself beside its query and lines."""
    named = {name: getattr(example, name) for name in ("category", "intent", "language")}
    return {name: value for name, value in named.items() if value}


def canonical_row(example: Example) -> dict:
    """The row as JSON can hold it; `parse_row` reads back the same example."""
    return {"query": example.query, "output": [list(x) for x in example.lines]} | labels(example)


def file_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(place, row) of each line of a JSON Lines file; a broken line gives its error as the row."""
    try:
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                if not raw.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    yield place, json.loads(raw.decode("utf-8-sig"))
                except UnicodeDecodeError as error:
                    yield place, ValueError(f"not UTF-8 ({error.reason} at byte {error.start})")
                except json.JSONDecodeError as error:
                    yield place, ValueError(f"not valid JSON ({error.msg} at column {error.colno})")
                except (ValueError, RecursionError) as error:  # a number or a nesting too long
                    yield place, ValueError(f"not valid JSON ({error})")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def hub_rows(name: str, split: str, subset: str | None = None) -> Iterator[tuple[str, object]]:
    """(place, row) of each row of a Hub data set.

    Raises:
        DataError: the Hub did not give it.
    """
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    # It warns of each of its retries; what they came to is said once, below.
    huggingface_hub.logging.set_verbosity_error()
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library raises a dozen unrelated types
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"dataset.name {name}: neither a local path nor a data set the Hub gave ({reason}); "
            "to go on without the Hub, point dataset.name at a file or glob such as 'data/*.jsonl'"
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{name}[{split}]:{number}", row


def _parse_all(rows: Iterable[tuple[str, object]], **fields) -> list[Example]:
    examples, broken = [], []
    for place, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            examples.append(parse_row(row, place, **fields))
        except ValueError as error:
            broken.append(f"{place}: {error}")
    if broken:
        more = f" (and {len(broken) - 1} more broken lines)" if len(broken) > 1 else ""
        raise DataError(f"{broken[0]}{more}")
    return examples


def local_files(name: str) -> list[Path]:
    """The training files that a file, a folder or a glob stands for; empty when it is none of them.

    A folder that holds train.jsonl stands for that file, any other for its *.jsonl files.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        prepared = path / "train.jsonl"
        files = [prepared] if prepared.is_file() else sorted(path.glob("*.jsonl"))
        if not files:
            raise DataError(f"{name}: the folder holds no .jsonl file")
        return files
    return sorted(Path(match) for match in glob.glob(str(path)))


def find_files(names: Iterable[str]) -> list[Path]:
    """The files that names (files, folders, globs) stand for, each once.

    Raises:
        DataError: a name stands for none.
    """
    found: dict[Path, None] = {}
    for name in names:
        files = local_files(name)
        if not files:
            raise DataError(f"{name}: no such file or folder, and no file matches")
        found |= dict.fromkeys(files)
    return list(found)


def read_files(names: Iterable[str]) -> list[Example]:
    """Every row that the named files hold, duplicates included.

    Raises:
        DataError: as `load_rows`.
    """
    names = list(names)
    examples = _parse_all(row for path in find_files(names) for row in file_rows(path))
    if not examples:
        raise DataError(f"{', '.join(names)}: there are no rows in it")
    return examples


def looks_local(name: str) -> bool:
    """Whether a name that is no file here was meant as a path and not as a Hub id (owner/name)."""
    return (
        any(char in name for char in "*?[")
        or name.endswith((".jsonl", ".json"))
        or name.startswith((".", "/", "~"))
        or name.count("/") != 1
        or Path(name).parts[0] in ("data", "outputs")
    )


def _unique(examples: Iterable[Example], seen: set[str]) -> list[Example]:
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
    """(train, validation): all /only: variants of one query fall on the same side.

    Args:
        share: the part of the rows to hold out, 0 to 1; at least one row when it is above 0.
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
            break  # at least one group is left to train on
        held.add(name)
        count += len(groups[name])
    train = [e for e in examples if base_query(e.query) not in held]
    return train, [e for e in examples if base_query(e.query) in held]


def named_rows(
    name: str, split: str = "train", subset: str | None = None
) -> Iterator[tuple[str, object]]:
    """(place, row) of the local files that `name` stands for, or else of the Hub's data set.

    Raises:
        DataError: nothing there.
    """
    files = local_files(name)
    if files:
        return (row for path in files for row in file_rows(path))
    if looks_local(name):
        raise DataError(f"{name}: no such file or folder, and no file matches")
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
    """The rows of a file, a folder, a glob or a Hub data set, without duplicates, split.

    Duplicates (by lower-cased query) go before the split, so that no query is on both sides. A
    folder with train.jsonl and val.jsonl keeps its own split. `max_samples` rows of the training
    side are taken in the order of `seed`.

    Raises:
        DataError: nothing there, nothing in it, or the first broken row as "path:line: reason".
    """
    fields = {"text_field": text_field, "prompt_field": prompt_field}
    read = _parse_all(named_rows(name, split), **fields)
    if not read:
        raise DataError(f"dataset.name {name}: there are no rows in it")

    seen: set[str] = set()
    files = local_files(name)
    prepared = files[0].with_name("val.jsonl") if files else None
    if len(files) == 1 and files[0].name == "train.jsonl" and prepared.is_file():
        held = _parse_all(file_rows(prepared), **fields)
        validation = _unique(held, seen)
        bases = {base_query(e.query) for e in validation}
        train = [e for e in _unique(read, seen) if base_query(e.query) not in bases]
        read = read + held
    else:
        train, validation = split_examples(_unique(read, seen), eval_split, seed)
    duplicates = len(read) - len(train) - len(validation)
    if max_samples is not None and max_samples < len(train):
        train = random.Random(seed).sample(train, max_samples)
    return Rows(train, validation, read=len(read), duplicates=duplicates)
