"""Make training queries from your own notes, so that GRPO learns to search exactly these notes.

    python examples/notes_queries.py ~/notes -o outputs/notes.jsonl
    python train.py grpo --set grpo.reward=retrieval --set dataset.name=outputs/notes.jsonl \
        --set model.output=outputs/notes

Queries come from what the notes say already: headings, the start of the first sentence, and the texts
of links to a note. What several notes share ("Summary", "Links") is left out. With `--model`, a
language model behind an OpenAI-compatible endpoint also writes queries in other words.

GRPO samples the expansions itself. A row's "passage" is the whole note, which the search should find;
its hyde line is the paragraph under the heading, for `eval.py --golden`. Rows have no lex or vec lines,
so do not train SFT on them. Without an endpoint nothing leaves this machine. The file contains your
notes: keep it as private as they are.
"""

import argparse
import asyncio
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root

from dataset.endpoint import Endpoint, NoReply, Stopped, openai_sender
from dataset.generate_data import MLX_SERVER, invented
from expander import cli
from expander.files import write_rows
from expander.queries import normal_query
from expander.retrieval.collection import read_notes

PASSAGE = 200  # characters, about the limit of reward.py for a hyde line
SENTENCE_WORDS, SENTENCE_CHARACTERS = 8, 60  # of the first sentence, as a query
NOTE = 3000  # characters of a note that the endpoint gets
ASK = """Below is a note. Write {count} short search queries, one per line and nothing else, that \
its owner would type to find it months later: two to five words, lower case, in the note's \
language, and as far as possible in other words than the note's own.

{note}"""
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
CODE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#{1,6}[ \t]+(.+?)(?:[ \t]+#+)?[ \t]*$", re.MULTILINE)
# [text](url), ![text](file), [[page]], [[page|text]]
LINK = re.compile(r"!?\[+([^\[\]]*?)(?:\|([^\[\]]*))?\]+(?:\([^()]*\))?")
WIKI_LINK = re.compile(r"(?<!!)\[\[([^\[\]|#]+)(?:#[^\[\]|]*)?(?:\|([^\[\]]+))?\]\]")
FILE_LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\(<?([^()<>#]+\.md)(?:#[^()]*)?>?\)")
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


def first_words(text: str) -> str:
    """The start of a note's first sentence outside headings; empty if it has none.

    >>> first_words("# TLS\\n\\nKeys are rotated each month by the ops team, never by hand. Then...")
    'Keys are rotated each month by the ops'
    """
    body = HEADING.sub("", CODE.sub("", FRONT_MATTER.sub("", text))).strip()
    sentence = re.split(r"(?<=[.!?])\s", plain(body.split("\n\n")[0]))[0]
    return " ".join(sentence.split()[:SENTENCE_WORDS])[:SENTENCE_CHARACTERS].rstrip(".,;:!? ")


def links(text: str) -> Iterator[tuple[str, str]]:
    """Yield (text of a link, name of the note it points to, without folder and ending).

    >>> list(links("see [[ops/keys|key rotation]] and [the plan](../plan%20b.md)"))
    [('key rotation', 'keys'), ('the plan', 'plan b')]
    """
    for page, shown in WIKI_LINK.findall(text):
        yield plain(shown or page.rpartition("/")[2]), page.rpartition("/")[2]
    for shown, target in FILE_LINK.findall(text):
        yield plain(shown), Path(unquote(target)).stem


def texts(folder: Path) -> dict[Path, str]:
    """The Markdown files that QMD would index, by their paths in the folder, and their texts.

    Raises:
        ValueError: there is none.
    """
    notes = {Path(note.id): note.text for note in read_notes(folder.expanduser(), folder.name)}
    if not notes:
        raise ValueError(f"{folder}: no .md file with text in it")
    return notes


def pairs(notes: dict[Path, str]) -> Iterator[tuple[str, Path, str]]:
    """Yield (query, the note that answers it, hyde line)."""
    by_name: dict[str, list[Path]] = {}
    for path in notes:
        by_name.setdefault(path.stem, []).append(path)
    for path, text in notes.items():
        for query, passage in headings(text):
            yield query, path, passage
        if query := first_words(text):
            yield query, path, query
        for query, name in links(text):
            for target in by_name.get(name, ()):
                if query and target != path:
                    yield query, target, query


async def ask_queries(
    notes: dict[Path, str], endpoint: Endpoint, count: int
) -> list[tuple[str, Path, str]]:
    """Queries in other words, by a language model; a note without an answer has none.

    Raises:
        ValueError: the endpoint answered to none of the notes.
    """
    progress, found, failure = cli.Progress("notes", len(notes)), [], ""
    for done, (path, text) in enumerate(notes.items(), 1):
        try:
            reply = await endpoint.ask(ASK.format(count=count, note=text[:NOTE]))
            found += [(query, path, query) for query in invented(reply.text)[:count]]
        except NoReply as error:
            failure = str(error)
        except Stopped:
            break
        progress(done)
    if not found:
        raise ValueError(f"the endpoint wrote no query: {failure or 'empty answers'}")
    return found


def rows(notes: dict[Path, str], found: list[tuple[str, Path, str]]) -> list[dict]:
    """One row per query that only one note answers.

    Raises:
        ValueError: no query is left.
    """
    answers: dict[str, dict[Path, dict]] = {}  # query → note → row
    for query, path, passage in found:
        row = {"query": query, "output": [["hyde", passage]], "passage": notes[path]}
        answers.setdefault(normal_query(query), {}).setdefault(path, row)
    chosen = [row for paths in answers.values() if len(paths) == 1 for row in paths.values()]
    if not chosen:
        raise ValueError("no note has a heading, sentence or link that no other note has as well")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description="Make GRPO queries from Markdown notes.")
    add = parser.add_argument
    add("notes", type=Path, metavar="FOLDER")
    add("-o", "--output", type=Path, default=Path("outputs/notes.jsonl"))
    add("--model", help="model at an endpoint that writes queries in other words")
    add("--url", default=MLX_SERVER, help="base URL of the endpoint (default: %(default)s)")
    add("--per-note", type=int, metavar="N", default=3, help="its queries per note (default: 3)")
    arguments = parser.parse_args()
    notes = texts(arguments.notes)
    found = list(pairs(notes))
    if arguments.model:
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        endpoint = Endpoint(openai_sender(arguments.url, arguments.model, key, {}), 3, 120)
        found += asyncio.run(ask_queries(notes, endpoint, arguments.per_note))
    chosen = rows(notes, found)
    write_rows(arguments.output, chosen)
    answered = len({row["passage"] for row in chosen})
    print(f"{arguments.output}: {len(chosen)} queries for {answered} of {len(notes)} notes")


if __name__ == "__main__":
    cli.run(main)
