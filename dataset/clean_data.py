"""Find what is wrong with the form of rows, show each repair as a diff, and make it when told to.

    python dataset/clean_data.py rows.jsonl                    what would change; exit 1 if anything
    python dataset/clean_data.py rows.jsonl --fix -o clean.jsonl
    python dataset/clean_data.py rows.jsonl --fix --in-place

Looked for: a query that an earlier row has, lines out of order, a second hyde line, hyde over 200
characters (cut after a sentence), lex lines with filler, lines that repeat the query or another
line, lines that QMD would drop, and entities and technical terms of the query that no line keeps.
A row that no rule can mend, such as one whose only lex line is the query, stays as it is and is
named. A changed row is written in the canonical format, any other as it was.
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
from expander.rows import DATA, Example, file_rows, find_files, parse_row, read_files
from reward import (
    FILLERS,
    echoes,
    extract_named_entities,
    find_filler,
    keeps_entity,
    only_mode,
    words,
)

HYDE_LEAST, HYDE_MOST = 50, 200
SENTENCE_END = re.compile(r"[.!?](?=\s)|[。！？।]")
# Keys of the formats that the canonical one replaces.
REPLACED = ("input", "searches", "messages", "text", "prompt", "completion")

Line = tuple[str, str]
Lines = list[Line]


def cut_at_sentence(text: str) -> str | None:
    """As many whole sentences as the limit holds; None when they are too few to say anything.

    >>> cut_at_sentence("x" * 60 + ". " + "y" * 300) == "x" * 60 + "."
    True
    """
    ends = [match.end() for match in SENTENCE_END.finditer(text) if match.end() <= HYDE_MOST]
    return text[: ends[-1]] if ends and ends[-1] >= HYDE_LEAST else None


def without_lines(lines: Lines, bad: Callable[[Line], bool]) -> Lines:
    """The lines but the bad ones; the first of a type stays when all of that type are bad."""
    kept = [line for line in lines if not bad(line)]
    lost = {kind for kind, _ in lines} - {kind for kind, _ in kept}
    stay = [next(line for line in lines if line[0] == kind) for kind in lost]
    return [line for line in lines if line in kept or line in stay]


def fix_order(query: str, lines: Lines) -> Lines:
    return sorted(lines, key=lambda line: TYPES.index(line[0]))


def fix_second_hyde(query: str, lines: Lines) -> Lines:
    hyde = [line for line in lines if line[0] == "hyde"]
    return hyde[:1] + [line for line in lines if line[0] != "hyde"]


def fix_long_hyde(query: str, lines: Lines) -> Lines:
    return [
        (kind, cut_at_sentence(text) or text)
        if kind == "hyde" and len(text) > HYDE_MOST
        else (kind, text)
        for kind, text in lines
    ]


def fix_filler(query: str, lines: Lines) -> Lines:
    """Take filler out of lex lines; where only an echo or nothing would be left, the line goes."""
    base, _ = only_mode(query)
    unasked = FILLERS - words(base)

    def fixed(text: str) -> str:
        if unasked.isdisjoint(words(text)):
            return text
        short = " ".join(word for word in text.split() if word.lower() not in unasked)
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
    """Put an entity before each lex line that has none, and those no line has behind the first."""
    base, only = only_mode(query)
    entities = extract_named_entities(base)
    stripped = (word.strip(".,!?:;()[]\"'") for word in base.split())
    spelt = {word.lower(): word for word in stripped if word.lower() in entities}
    at = next((i for i, (kind, _) in enumerate(lines) if kind == "lex"), None)
    if not spelt or at is None:
        return lines
    first = next(iter(spelt.values()))
    fixed = [
        (kind, f"{first} {text}" if kind == "lex" and not keeps_entity(text, entities) else text)
        for kind, text in lines
    ]
    told = " ".join(text.lower() for kind, text in fixed if kind != "hyde")
    missing = [word for lower, word in spelt.items() if lower not in told and not only]
    fixed[at] = ("lex", " ".join([fixed[at][1], *missing]))
    return lines if any(echoes(text, base) for kind, text in fixed if kind == "lex") else fixed


# An echo goes before a line gains an entity: with it, the line would not count as one.
FIXES: dict[str, Callable[[str, Lines], Lines]] = {
    "lines out of order": fix_order,
    "second hyde line": fix_second_hyde,
    "long hyde": fix_long_hyde,
    "filler": fix_filler,
    "repeats the query": fix_echo,
    "entity dropped": fix_entities,
    "same line twice": fix_same_line,
    "dropped by QMD": fix_dropped_by_qmd,
}


def mend(example: Example) -> tuple[Lines, list[str]]:
    """(the lines repaired, names of the repairs that changed something)."""
    lines, done = list(example.lines), []
    for name, fix in FIXES.items():
        fixed = fix(example.query, lines)
        if fixed != lines:
            done.append(name)
            lines = fixed
    return lines, done


def remaining(query: str, lines: Sequence[Line]) -> list[str]:
    """What no rule could mend, one for each line."""
    base, _ = only_mode(query)
    left = ["filler"] * len(find_filler([text for kind, text in lines if kind == "lex"], base))
    for kind, text in lines:
        if kind == "hyde" and len(text) > HYDE_MOST:
            left.append("long hyde")
        if kind != "hyde" and echoes(text, base):
            left.append("repeats the query")
        if not kept_lines(base, render_lines([(kind, text)])):
            left.append("dropped by QMD")
    return left


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find faults of form in rows, and mend them.")
    add = parser.add_argument
    add("data", nargs="*", default=[DATA], help=f"files, folders, globs ({DATA})")
    add("--fix", action="store_true", help="write the repaired rows, to one of:")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "-o", "--output", type=cli.new_file, metavar="FILE", help="all rows, in a new file"
    )
    where.add_argument("--in-place", action="store_true", help="each row in its own file")
    args = parser.parse_args()
    if args.fix != bool(args.output or args.in_place):
        parser.error("--fix needs -o FILE or --in-place, and these need --fix")
    return args


def print_diff(before: Sequence[Line], after: Sequence[Line]) -> None:
    from expander.eval.report import printable

    for mark, lines, others in (("-", before, after), ("+", after, before)):
        for line in lines:
            if line not in others:
                print(f"{mark} {printable(render_lines([line]))}")


def main() -> int:
    args = parse_arguments()
    from expander.eval.report import printable

    read_files(args.data)  # a broken row ends it here, before anything is written
    mended, unmended, seen = Counter(), Counter(), set()
    files: dict[Path, list[dict]] = {}
    for path in find_files(args.data):
        kept = files.setdefault(path, [])
        for place, row in file_rows(path):
            example = parse_row(row, in_order=False)
            name = normal_query(example.query)
            if name in seen:
                mended["query of an earlier row"] += 1
                print(printable(f"{place}: query of an earlier row: {example.query}"))
                continue
            seen.add(name)
            lines, done = mend(example)
            left = remaining(example.query, lines)
            mended.update(done)
            unmended.update(left)
            if done or left:
                told = ", ".join([*done, *(f"{fault} (not mended)" for fault in left)])
                print(printable(f"{place}: {told}: {example.query}"))
            if done:
                print_diff(example.lines, lines)
                others = {key: value for key, value in row.items() if key not in REPLACED}
                row = others | {"query": example.query, "output": lines}
            kept.append(row)

    if args.output:
        write_rows(args.output, chain.from_iterable(files.values()))
    elif args.in_place:
        for path, rows in files.items():
            write_rows(path, rows)
    for what, found in ("mended" if args.fix else "to mend", mended), ("left as it is", unmended):
        for name, count in found.most_common():
            print(f"{what}: {count} x {name}")
    print(f"{len(seen)} rows with a query of their own")
    return int(bool(unmended) or (bool(mended) and not args.fix))


if __name__ == "__main__":
    cli.run(main)
