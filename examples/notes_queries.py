"""Make training queries from your own notes, so that GRPO learns their vocabulary.

    python examples/notes_queries.py ~/notes -o outputs/notes.jsonl
    python train.py grpo --set dataset.name=outputs/notes.jsonl --set model.output=outputs/notes

Each heading of the Markdown files becomes a query, except headings that occur in several files
("Summary", "Links"). GRPO needs only queries: it samples the expansions itself. The row's expansion is
the paragraph under the heading, which a search should find, for `eval.py --golden`. It has no lex or
vec lines, so do not train SFT on these rows. Nothing leaves this machine, but the file contains your
headings and paragraphs: keep it as private as your notes.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root

from expander import cli
from expander.files import write_rows
from expander.queries import normal_query

PASSAGE = 200  # characters, about the limit of reward.py for a hyde line
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
CODE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#{1,6}[ \t]+(.+?)(?:[ \t]+#+)?[ \t]*$", re.MULTILINE)
# [text](url), ![text](file), [[page]], [[page|text]]
LINK = re.compile(r"!?\[+([^\[\]]*?)(?:\|([^\[\]]*))?\]+(?:\([^()]*\))?")
# Emphasis, but not underscores within a name; quotes and list items.
MARKUP = re.compile(r"`+|(?<!\w)[*_~]+|[*_~]+(?!\w)|^[>\-+ \t]+", re.MULTILINE)


def plain(text: str) -> str:
    """Markdown as one line of plain text.

    >>> plain("**Rotate** the [TLS keys](https://x.y), see [[ops/keys|the page]]")
    'Rotate the TLS keys, see the page'
    """
    return " ".join(MARKUP.sub("", LINK.sub(lambda m: m[2] or m[1], text)).split())


def headings(text: str) -> Iterator[tuple[str, str]]:
    """Yield (heading, first paragraph under it); headings without text are skipped.

    >>> list(headings("# TLS keys\\n\\nRotate *monthly*.\\n\\nMore.\\n## Empty\\n"))
    [('TLS keys', 'Rotate monthly.')]
    """
    _, *parts = HEADING.split(CODE.sub("", FRONT_MATTER.sub("", text)))
    for heading, below in zip(parts[::2], parts[1::2], strict=True):
        query, passage = plain(heading), plain(below.strip().split("\n\n")[0])
        if query and passage:
            yield query, textwrap.shorten(passage, PASSAGE, placeholder=" …")


def rows(folder: Path) -> list[dict]:
    """One row per heading that occurs in one note only.

    Raises:
        ValueError: no heading qualifies.
    """
    found: dict[str, dict[Path, dict]] = {}  # query → note → row
    for path in sorted(folder.expanduser().rglob("*.md")):
        for query, passage in headings(path.read_text(encoding="utf-8", errors="replace")):
            row = {"query": query, "output": [["hyde", passage]]}
            found.setdefault(normal_query(query), {}).setdefault(path, row)
    chosen = [row for notes in found.values() if len(notes) == 1 for row in notes.values()]
    if not chosen:
        raise ValueError(
            f"{folder}: no .md file has a heading with text under it that is not in other files"
        )
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description="Make GRPO queries from Markdown notes.")
    parser.add_argument("notes", type=Path, metavar="FOLDER")
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs/notes.jsonl"))
    arguments = parser.parse_args()
    found = rows(arguments.notes)
    write_rows(arguments.output, found)
    print(f"{arguments.output}: {len(found)} queries")


if __name__ == "__main__":
    cli.run(main)
