"""A judged collection: documents, queries, and which documents answer which query.

`read_collection` reads BEIR's layout (a folder or a Hub id), the three-file layout, a vault of notes,
a folder of Markdown notes with a QMD bench fixture, and a QMD index. Nothing is ever written.
"""

import json
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from expander.qmd import JS_WHITESPACE
from expander.queries import SURROGATE
from expander.rows import DataError, file_rows, hub_rows

LAYOUTS = (
    "corpus.jsonl, queries.jsonl and qrels/test.tsv (BEIR); docs.jsonl, queries.jsonl and "
    "qrels.tsv; notes/, queries.jsonl and qrels.tsv; or Markdown notes and bench.json"
)
SQLITE_MAGIC = b"SQLite format 3\0"
# Folders that QMD never indexes, beside hidden ones.
SKIPPED_FOLDERS = {"node_modules", "vendor", "dist", "build"}
# Judged this deep, with zeros among the grades, the judgements cover a pool of search results only.
POOL_DEPTH = 10

# JavaScript's \s and its ends of a line, which its `.` and `^` obey.
SPACE = f"[{JS_WHITESPACE}]"
LINE_END = "\n\r\u2028\u2029"
HEADING = re.compile(rf"(?:^|(?<=[{LINE_END}]))##?{SPACE}+([^{LINE_END}]+)")
HEADING_2 = re.compile(rf"(?:^|(?<=[{LINE_END}]))##{SPACE}+([^{LINE_END}]+)")
EXTENSION = re.compile(r"\.[^.]+\Z")
STRUCTURED = re.compile(rf"{SPACE}*(?:lex|vec|hyde|intent):", re.IGNORECASE)

# (place, query id, document id, grade)
Judgement = tuple[str, str, str, int]


@dataclass(frozen=True, slots=True)
class Document:
    """One document. `path` is what QMD indexes as `filepath`; empty if it has none."""

    id: str
    title: str
    text: str
    path: str = ""


@dataclass(frozen=True)
class Collection:
    """Documents, queries by id, and grades by query and document.

    `qrels` holds only queries with a relevant document (a grade over 0). With `judged_only`, unjudged documents are unknown rather than not
    relevant, and measures leave them out. `warnings` are for the user.
    """

    name: str
    documents: tuple[Document, ...]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    judged_only: bool = False
    warnings: tuple[str, ...] = ()


def read_collection(
    source: str | Path, judged_only: bool | None = None, split: str = "test"
) -> Collection:
    """Read a collection of any layout.

    Args:
        source: a folder, a QMD index (SQLite) or a Hub id such as BeIR/nfcorpus. Notes and an index
            take their queries from `SOURCE#FILE`, a QMD bench fixture or JSON Lines of the
            fixture's queries; a folder's bench.json needs no naming.
        judged_only: overrides the choice by layout (see `covers_pools_only`).
        split: which judgements of BEIR's layout; the other layouts have only one set.

    Raises:
        ValueError: nothing readable there, or the first broken row as "path:line: reason".
    """
    source = str(source)
    name, _, fixture = (source, "", "") if Path(source).exists() else source.partition("#")
    path = Path(name).expanduser()
    fixture_path = Path(fixture).expanduser() if fixture else None
    if path.is_dir():
        collection = _read_folder(path, fixture_path, split)
    elif path.is_file():
        collection = _read_index(path, fixture_path)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        collection = _read_hub(name, split)
    else:
        raise ValueError(
            f"collection {name}: no such file or folder, and not a Hub id (OWNER/NAME)"
        )
    if judged_only is not None:
        collection = Collection(**vars(collection) | {"judged_only": judged_only})
    return collection


def covers_pools_only(qrels: dict[str, dict[str, int]]) -> bool:
    """Whether the judgements look like pools of search results, so that unjudged means unknown.

    They do if at least half of the queries have documents that were judged not relevant, and
    queries have `POOL_DEPTH` judged documents or more on average.
    """
    with_zeros = sum(min(grades.values()) <= 0 for grades in qrels.values())
    judged = sum(map(len, qrels.values()))
    return 2 * with_zeros >= len(qrels) and judged >= POOL_DEPTH * len(qrels)


def extract_title(text: str, path: str) -> str:
    """The title QMD gives to a Markdown note: its first heading of level 1 or 2, else its name.

    Source: `extractTitle` of QMD 2.8.3.

    >>> extract_title("intro\\n## Boiler service\\n", "house/boiler.md")
    'Boiler service'
    >>> extract_title("no heading", "house/boiler.md")
    'boiler'
    """
    if path.lower().endswith(".md") and (match := HEADING.search(text)):
        title = match[1].strip(JS_WHITESPACE)
        if title in ("Notes", "\N{MEMO} Notes") and (match := HEADING_2.search(text)):
            title = match[1].strip(JS_WHITESPACE)
        if title:
            return title
    return EXTENSION.sub("", path).rpartition("/")[2] or path


# Layouts


def _read_folder(path: Path, fixture: Path | None, split: str) -> Collection:
    name = path.resolve().name
    if (path / "corpus.jsonl").is_file():
        return _collection(
            name,
            _documents(file_rows(path / "corpus.jsonl"), "_id"),
            _queries(file_rows(path / "queries.jsonl"), "_id"),
            _qrels(path / "qrels" / f"{split}.tsv"),
        )
    if (path / "docs.jsonl").is_file():
        collection = _collection(
            name,
            _documents(file_rows(path / "docs.jsonl"), "id"),
            _queries(file_rows(path / "queries.jsonl"), "id"),
            _qrels(path / "qrels.tsv"),
        )
        pools = covers_pools_only(collection.qrels)
        return Collection(**vars(collection) | {"judged_only": pools})
    if (path / "notes").is_dir() and (path / "qrels.tsv").is_file():
        return _collection(
            name,
            read_notes(path / "notes", name),
            _queries(file_rows(path / "queries.jsonl"), "id"),
            _qrels(path / "qrels.tsv"),
            strict=True,
        )
    fixture = fixture or path / "bench.json"
    if fixture.is_file():
        return _with_fixture(name, read_notes(path, name), *read_fixture(fixture)[:2])
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
    if any(path.glob("*.md")) or any(path.glob("*/*.md")):
        raise ValueError(
            f"collection {path}: notes without queries ({fixture} does not exist); "
            f"name a QMD bench fixture as {path}#FILE"
        )
    raise ValueError(f"collection {path}: holds {found}; expected {LAYOUTS}")


def _read_hub(name: str, split: str) -> Collection:
    try:
        return _collection(
            name,
            _documents(hub_rows(name, "corpus", "corpus"), "_id"),
            _queries(hub_rows(name, "queries", "queries"), "_id"),
            [
                (place, *_judgement(place, row["query-id"], row["corpus-id"], row["score"]))
                for place, row in hub_rows(f"{name}-qrels", split)
            ],
        )
    except DataError as error:
        reason = str(error.__context__).strip().split("\n")[0]
        raise ValueError(
            f"collection {name}: neither a local path nor on the Hub in BEIR's layout ({reason})"
        ) from None
    except KeyError as error:
        raise ValueError(f"collection {name}-qrels: its rows have no {error}") from None


def _read_index(path: Path, fixture: Path | None) -> Collection:
    """A user's own QMD index with the queries of a fixture."""
    with path.open("rb") as stream:
        if stream.read(len(SQLITE_MAGIC)) != SQLITE_MAGIC:
            raise ValueError(f"collection {path}: a file, but not a QMD index (SQLite)")
    if fixture is None:
        raise ValueError(
            f"collection {path}: an index without queries; name a QMD bench fixture as {path}#FILE"
        )
    entries, warnings, only = read_fixture(fixture)
    documents, names = [], set()
    for at, title, text in _index_rows(path):
        names.add(at.partition("/")[0])
        if only is None or at.startswith(f"{only}/"):
            documents.append(Document(at, title, text, at))
    if only is not None and only not in names:
        raise ValueError(
            f"{fixture}: collection {only!r} is not in {path}, which has "
            f"{', '.join(sorted(names)) or 'none'}"
        )
    return _with_fixture(only or path.stem, documents, entries, warnings, collections=True)


def _index_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """(collection/path, title, text) of the active documents in a QMD index, in its order."""
    # Opening a WAL database leaves files next to it, unless SQLite may take it for unchanging,
    # which holds while no process has it open.
    wal = path.with_name(f"{path.name}-wal")
    in_use = wal.exists() and wal.stat().st_size > 0
    mode = "mode=ro" if in_use else "mode=ro&immutable=1"
    database = sqlite3.connect(f"file:{quote(str(path.resolve()))}?{mode}", uri=True)
    database.text_factory = lambda raw: raw.decode("utf-8", errors="replace")
    try:
        yield from database.execute(
            "SELECT d.collection || '/' || d.path, d.title, c.doc FROM documents d "
            "JOIN content c ON c.hash = d.hash WHERE d.active = 1 ORDER BY d.id"
        )
    except sqlite3.Error as error:
        raise ValueError(f"collection {path}: not a readable QMD index ({error})") from None
    finally:
        database.close()


def read_notes(root: Path, name: str) -> list[Document]:
    """The Markdown files that QMD would index, in the order of their paths.

    Left out: hidden and AppleDouble files, `SKIPPED_FOLDERS`, blank files, links out of `root`.
    """
    documents = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f[0] != "." and f not in SKIPPED_FOLDERS)
        for file in sorted(files):
            path = Path(folder, file)
            if file[0] == "." or path.suffix != ".md":
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
                continue
            text = path.read_bytes().decode("utf-8", errors="replace")
            if text.strip(JS_WHITESPACE):
                at = path.relative_to(root).as_posix()
                documents.append(Document(at, extract_title(text, at), text, f"{name}/{at}"))
    return documents


# Rows


def _text(place: str, row: object, key: str) -> str:
    if isinstance(row, ValueError):
        raise ValueError(f"{place}: {row}")
    value = row.get(key) if isinstance(row, dict) else None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # ids may be numbers
    if not isinstance(value, str):
        raise ValueError(f"{place}: expected an object with text in {key!r}")
    return SURROGATE.sub("\ufffd", value)  # which SQLite cannot store


def _documents(rows: Iterable[tuple[str, object]], key: str) -> list[Document]:
    return [
        Document(
            _text(place, row, key),
            row.get("title") if isinstance(row.get("title"), str) else "",
            _text(place, row, "text"),
        )
        for place, row in rows
    ]


def _queries(rows: Iterable[tuple[str, object]], key: str) -> dict[str, str]:
    queries: dict[str, str] = {}
    for place, row in rows:
        name, text = _text(place, row, key), " ".join(_text(place, row, "text").split())
        if not text:
            raise ValueError(f"{place}: query {name} has no text")
        if name in queries:
            raise ValueError(f"{place}: query {name} was there before; ids must be unique")
        queries[name] = text
    return queries


def _judgement(place: str, query: object, document: object, grade: object) -> tuple[str, str, int]:
    try:
        return str(query), str(document), int(str(grade))
    except ValueError:
        raise ValueError(f"{place}: grade {grade!r} is not a whole number") from None


def _qrels(path: Path) -> list[Judgement]:
    """The judgements of a file of query, document and grade with tabs between; a header may lead."""
    judgements = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ValueError(f"{path}: cannot be read: {reason}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place, fields = f"{path}:{number}", line.split("\t")
        if len(fields) != 3:
            raise ValueError(
                f"{place}: expected query, document and grade with tabs between, "
                f"found {len(fields)} columns"
            )
        if number == 1 and fields[2].strip() in ("score", "grade", "relevance"):
            continue
        judgements.append((place, *_judgement(place, *map(str.strip, fields))))
    return judgements


def _collection(
    name: str,
    documents: Sequence[Document],
    queries: dict[str, str],
    judgements: Iterable[Judgement],
    warnings: Iterable[str] = (),
    strict: bool = False,
) -> Collection:
    """Check that the parts fit together.

    Args:
        strict: raise if a judgement names an unknown document. Otherwise it stays, with a warning:
            a document that nothing can find lowers the recall of every search alike, and published
            figures are computed that way.
    """
    ids = {document.id for document in documents}
    if not documents:
        raise ValueError(f"collection {name}: there are no documents in it")
    if len(ids) < len(documents):
        seen: set[str] = set()
        twice = next(d.id for d in documents if d.id in seen or seen.add(d.id))
        raise ValueError(
            f"collection {name}: document {twice!r} is there twice; ids must be unique"
        )
    qrels: dict[str, dict[str, int]] = {}
    unknown: list[str] = []
    for place, query, document, grade in judgements:
        missing = f"query {query!r}" if query not in queries else f"document {document!r}"
        if query not in queries or document not in ids:
            unknown.append(f"{place}: {missing} is not in the collection")
            if strict:
                raise ValueError(f"{unknown[-1]}; correct the judgement or delete it")
        if query not in queries:
            continue
        if qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            raise ValueError(f"{place}: {query!r} and {document!r} already have another grade")
    qrels = {query: grades for query, grades in qrels.items() if max(grades.values()) > 0}
    if not any(document in ids for grades in qrels.values() for document in grades):
        reason = f": {unknown[0]}" if unknown else ""
        raise ValueError(f"collection {name}: no query has a relevant document{reason}")
    if unknown:
        more = f", and {len(unknown) - 1} more like it" if unknown[1:] else ""
        warnings = [*warnings, f"{unknown[0]}{more}"]
    return Collection(name, tuple(documents), queries, qrels, warnings=tuple(warnings))


# QMD's bench fixture: {"queries": [{"id", "query", "expected_files": [path]}], "collection"?}


def read_fixture(path: Path) -> tuple[list[tuple[str, str, str, list[str]]], list[str], str | None]:
    """The queries of a QMD bench fixture, or of JSON Lines with one of its queries in each line.

    Returns:
        (place, id, query, expected files) of each query, warnings, and the collection it names.
        Queries that are already expanded (`lex: …`) are left out with a warning.

    Raises:
        ValueError: not a fixture, or the first broken query.
    """
    collection = None
    if path.suffix == ".jsonl":
        rows = list(file_rows(path))
    else:
        try:
            fixture = json.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON file ({error})") from None
        if not isinstance(fixture, dict) or not isinstance(fixture.get("queries"), list):
            raise ValueError(f'{path}: not a QMD bench fixture; expected {{"queries": [...]}}')
        rows = [(f"{path}: query {n}", row) for n, row in enumerate(fixture["queries"], 1)]
        collection = fixture.get("collection")
    entries, expanded, seen = [], 0, set()
    for number, (place, row) in enumerate(rows, 1):
        query = _text(place, row, "query")
        name = _text(place, row, "id") if "id" in row else str(number)
        files = row.get("expected_files")
        if not query.strip() or not isinstance(files, list) or not files:
            raise ValueError(f'{place}: expected {{"query": text, "expected_files": [path, ...]}}')
        if not all(isinstance(file, str) and file.strip("/ ") for file in files):
            raise ValueError(f"{place}: expected_files holds something that is not a path")
        if name in seen:
            raise ValueError(f"{place}: id {name!r} was there before; ids must be unique")
        seen.add(name)
        if STRUCTURED.match(query):
            expanded += 1
        else:
            entries.append((place, name, " ".join(query.split()), files))
    warnings = [
        f"{path}: {expanded} of {len(rows)} queries are already expanded, and were left out"
    ]
    return entries, warnings if expanded else [], collection


def _with_fixture(
    name: str,
    documents: Sequence[Document],
    entries: Iterable[tuple[str, str, str, list[str]]],
    warnings: Sequence[str],
    collections: bool = False,
) -> Collection:
    """Documents with a fixture's queries; `collections`: ids start with a QMD collection's name."""
    paths: dict[str, list[str]] = {}
    for document in documents:
        at = document.id.partition("/")[2] if collections else document.id
        paths.setdefault(_normal_path(at), []).append(document.id)
    queries, judgements = {}, []
    for place, query_id, query, files in entries:
        queries[query_id] = query
        for file in files:
            found = _find_path(_normal_path(file), paths)
            if len(found) != 1:
                names = ", ".join(found[:3])
                raise ValueError(
                    f"{place}: expected file {file!r} is "
                    + (
                        f"any of {names}; write more of its path"
                        if found
                        else "not among the notes"
                    )
                )
            judgements.append((place, query_id, found[0], 1))
    return _collection(name, documents, queries, judgements, warnings)


def _normal_path(path: str) -> str:
    """As QMD's bench compares paths: no qmd://collection/, no outer slashes, lower case."""
    return re.sub(r"\Aqmd://[^/]*/?", "", path).strip("/").lower()


def _find_path(path: str, paths: dict[str, list[str]]) -> list[str]:
    if path in paths:
        return paths[path]
    ends = (at for at in paths if at.endswith(f"/{path}") or path.endswith(f"/{at}"))
    return [document for at in ends for document in paths[at]]
