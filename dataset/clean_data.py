"""Find faults in the form of rows, show each repair as a diff, and apply it with --fix.

    python dataset/clean_data.py rows.jsonl                    show the repairs; exit 1 if any
    python dataset/clean_data.py rows.jsonl --fix -o clean.jsonl
    python dataset/clean_data.py rows.jsonl --fix --in-place

The faults: the query of an earlier row, lines out of order, a second hyde line, a hyde line over 200
characters (cut after a sentence), lex lines with filler, lines that repeat the query or another line,
lines that QMD would drop, queries whose entities and technical terms are in no lex or vec line, and lex
lines of four words or more that do not match the row's own passage or hyde line: QMD searches for all
words at once, so they are cut to words that the passage has.
A row that no rule can repair, such as one whose only lex line is the query, is reported and left
unchanged. Repaired rows are written in the canonical format, all others unchanged.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root

from expander import cli
from expander.files import write_rows
from expander.prompt import TYPES, render_lines
from expander.qmd import kept_lines
from expander.queries import normal_query
from expander.retrieval.collection import Document
from expander.retrieval.index import FullTextIndex
from expander.retrieval.passages import matches
from expander.rows import DATA, Example, file_rows, find_files, parse_row, read_files
from expander.text import printable
from reward import (
    FILLERS,
    echoes,
    extract_named_entities,
    find_filler,
    only_mode,
    words,
)

HYDE_MIN, HYDE_MAX = 50, 200  # characters
LEX_WORDS = 3  # more rarely stand in one note
SENTENCE_END = re.compile(r"[.!?](?=\s)|[。！？।]")
# Columns of other formats, which the canonical format replaces.
REPLACED = ("input", "searches", "messages", "text", "prompt", "completion")

Line = tuple[str, str]
Lines = list[Line]


def cut_at_sentence(text: str) -> str | None:
    """The sentences that fit into HYDE_MAX; None if they are shorter than HYDE_MIN.

    >>> cut_at_sentence("x" * 60 + ". " + "y" * 300) == "x" * 60 + "."
    True
    """
    ends = [match.end() for match in SENTENCE_END.finditer(text) if match.end() <= HYDE_MAX]
    return text[: ends[-1]] if ends and ends[-1] >= HYDE_MIN else None


def without_lines(lines: Lines, bad: Callable[[Line], bool]) -> Lines:
    """Remove bad lines, but keep the first line of a type if all of that type are bad."""
    kept = [line for line in lines if not bad(line)]
    lost = {kind for kind, _ in lines} - {kind for kind, _ in kept}
    firsts = [next(line for line in lines if line[0] == kind) for kind in lost]
    return [line for line in lines if line in kept or line in firsts]


def fix_order(query: str, lines: Lines) -> Lines:
    return sorted(lines, key=lambda line: TYPES.index(line[0]))


def fix_second_hyde(query: str, lines: Lines) -> Lines:
    hyde = [line for line in lines if line[0] == "hyde"]
    return hyde[:1] + [line for line in lines if line[0] != "hyde"]


def fix_long_hyde(query: str, lines: Lines) -> Lines:
    return [
        (kind, cut_at_sentence(text) or text)
        if kind == "hyde" and len(text) > HYDE_MAX
        else (kind, text)
        for kind, text in lines
    ]


def fix_long_lex(query: str, lines: Lines) -> Lines:
    """Cut long lex lines that miss the row's hyde line to the first words that are in it.

    Unchanged are lines with quotes or exclusions, and those of which fewer than two words, or none of
    the query's, would be left.
    """
    base, _ = only_mode(query)
    hyde = next((text for kind, text in lines if kind == "hyde"), None)
    if hyde is None:
        return lines
    index = FullTextIndex([Document("hyde", "", hyde)])

    def fixed(text: str) -> str:
        parts = text.split()
        if len(parts) <= LEX_WORDS or '"' in text or " -" in text or matches(text, index):
            return text
        short = " ".join([word for word in parts if matches(word, index)][:LEX_WORDS])
        kept = kept_lines(base, f"lex: {short}")
        return short if kept and " " in short and not echoes(short, base) else text

    return [(kind, fixed(text) if kind == "lex" else text) for kind, text in lines]


def fix_filler(query: str, lines: Lines) -> Lines:
    """Remove filler from lex lines, and the line if only an echo or nothing would be left."""
    base, _ = only_mode(query)
    fillers = FILLERS - words(base)  # a filler that the query asks about stays

    def fixed(text: str) -> str:
        if fillers.isdisjoint(words(text)):
            return text
        short = " ".join(word for word in text.split() if word.lower() not in fillers)
        return text if not short or echoes(short, base) else short

    lines = [(kind, fixed(text) if kind == "lex" else text) for kind, text in lines]
    return without_lines(lines, lambda x: x[0] == "lex" and bool(find_filler([x[1]], base)))


def fix_echo(query: str, lines: Lines) -> Lines:
    base, _ = only_mode(query)
    return without_lines(lines, lambda line: line[0] != "hyde" and echoes(line[1], base))


def fix_same_line(query: str, lines: Lines) -> Lines:
    unique = {(kind, " ".join(text.lower().split())): (kind, text) for kind, text in lines[::-1]}
    return list(unique.values())[::-1]


def fix_dropped_by_qmd(query: str, lines: Lines) -> Lines:
    base, _ = only_mode(query)
    return without_lines(lines, lambda line: not kept_lines(base, render_lines([line])))


def fix_entities(query: str, lines: Lines) -> Lines:
    """Put the query's first entity into the first lex line if no lex or vec line has any of them.

    A lex line may do without: its words are ANDed, so a name in every line would only narrow them.
    """
    base, _ = only_mode(query)
    entities = extract_named_entities(base)
    stripped = (word.strip(".,!?:;()[]\"'") for word in base.split())
    spellings = {word.lower(): word for word in stripped if word.lower() in entities}
    at = next((i for i, (kind, _) in enumerate(lines) if kind == "lex"), None)
    if not spellings or at is None:
        return lines
    kept = " ".join(text.lower() for kind, text in lines if kind != "hyde")
    if any(lower in kept for lower in spellings):
        return lines
    fixed = list(lines)
    fixed[at] = ("lex", f"{next(iter(spellings.values()))} {lines[at][1]}")
    return lines if echoes(fixed[at][1], base) else fixed


# Echoes are removed before entities are added: with an entity they would no longer count as echoes.
FIXES: dict[str, Callable[[str, Lines], Lines]] = {
    "lines out of order": fix_order,
    "second hyde line": fix_second_hyde,
    "long hyde": fix_long_hyde,
    "filler": fix_filler,
    "long lex": fix_long_lex,
    "repeats the query": fix_echo,
    "entity dropped": fix_entities,
    "same line twice": fix_same_line,
    "dropped by QMD": fix_dropped_by_qmd,
}


def repair(example: Example) -> tuple[Lines, list[str]]:
    """(repaired lines, names of the repairs that changed them)."""
    lines, done = list(example.lines), []
    for name, fix in FIXES.items():
        fixed = fix(example.query, lines)
        if fixed != lines:
            done.append(name)
            lines = fixed
    return lines, done


def remaining(query: str, lines: Sequence[Line]) -> list[str]:
    """The faults that no rule can repair, one entry per line."""
    base, _ = only_mode(query)
    left = ["filler"] * len(find_filler([text for kind, text in lines if kind == "lex"], base))
    for kind, text in lines:
        if kind == "hyde" and len(text) > HYDE_MAX:
            left.append("long hyde")
        if kind != "hyde" and echoes(text, base):
            left.append("repeats the query")
        if not kept_lines(base, render_lines([(kind, text)])):
            left.append("dropped by QMD")
    return left


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find and repair faults in the form of rows.")
    add = parser.add_argument
    add("data", nargs="*", default=[DATA], help=f"files, folders or globs (default: {DATA})")
    add("--fix", action="store_true", help="write the repaired rows; needs -o or --in-place")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "-o", "--output", type=cli.new_file, metavar="FILE", help="write all rows to a new file"
    )
    where.add_argument("--in-place", action="store_true", help="write each row to its own file")
    args = parser.parse_args()
    if args.fix != bool(args.output or args.in_place):
        parser.error("use --fix together with -o FILE or --in-place")
    return args


def diff(before: Sequence[Line], after: Sequence[Line]) -> list[str]:
    return [
        f"{mark} {printable(render_lines([line]))}"
        for mark, lines, others in (("-", before, after), ("+", after, before))
        for line in lines
        if line not in others
    ]


class Cleaning:
    """The rows read so far: their queries, the faults by name, and the lines of the report."""

    def __init__(self):
        self.report: list[str] = []
        self.queries: set[str] = set()
        self.repaired: Counter[str] = Counter()
        self.remaining: Counter[str] = Counter()

    def clean(self, location: str, row: dict) -> dict | None:
        """Report and repair the faults of a row; None if its query is that of an earlier row."""
        example = parse_row(row, in_order=False)
        name = normal_query(example.query)
        if name in self.queries:
            self.repaired["query of an earlier row"] += 1
            self.report.append(printable(f"{location}: query of an earlier row: {example.query}"))
            return None
        self.queries.add(name)
        lines, repairs = repair(example)
        faults = remaining(example.query, lines)
        self.repaired.update(repairs)
        self.remaining.update(faults)
        if repairs or faults:
            found = ", ".join([*repairs, *(f"{fault} (not repaired)" for fault in faults)])
            self.report.append(printable(f"{location}: {found}: {example.query}"))
        if not repairs:
            return row
        self.report += diff(example.lines, lines)
        others = {key: value for key, value in row.items() if key not in REPLACED}
        return others | {"query": example.query, "output": lines}

    def format(self, fixed: bool) -> str:
        headings = {"repaired" if fixed else "to repair": self.repaired}
        headings["not repaired"] = self.remaining
        lines = [
            f"{heading}: {count} x {name}"
            for heading, counts in headings.items()
            for name, count in counts.most_common()
        ]
        lines.append(f"{len(self.queries)} rows with different queries")
        return "\n".join([*self.report, *lines])


def main() -> int:
    args = parse_arguments()
    read_files(args.data)  # a broken row is reported before anything is written
    cleaning = Cleaning()
    files: dict[Path, list[dict]] = {}
    for path in find_files(args.data):
        cleaned = (cleaning.clean(location, row) for location, row in file_rows(path))
        files[path] = [row for row in cleaned if row is not None]
    if args.output:  # before anything is printed, which may fail
        write_rows(args.output, chain.from_iterable(files.values()))
    elif args.in_place:
        for path, rows in files.items():
            write_rows(path, rows)
    print(cleaning.format(fixed=args.fix))
    return int(bool(cleaning.remaining) or (bool(cleaning.repaired) and not args.fix))


if __name__ == "__main__":
    cli.run(main)
