"""Make rows with a language model: it expands queries, and answers that score well are kept.

    python dataset/generate_data.py --queries queries.txt --model NAME -o data/new.jsonl
    python dataset/generate_data.py --topics topics.txt --per-topic 20 --model NAME -o data/new.jsonl

Works with any endpoint for OpenAI's chat completions: mlx_lm.server (the default --url), Ollama
(--url http://localhost:11434/v1) or OpenAI; and with the Anthropic API (--api anthropic). The API key
comes from OPENAI_API_KEY or ANTHROPIC_API_KEY.

Each answer is written to disk at once, so after Ctrl-C, a crash or a dead endpoint the same command
continues. OUTPUT has the rows; OUTPUT.rejects the rejected queries with the answer and the reason;
OUTPUT.topics the queries invented for each topic. Rejected queries are not tried again: delete
OUTPUT.rejects to do so.
"""

import argparse
import asyncio
import fcntl
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root

from dataset.endpoint import (
    Endpoint,
    NoReply,
    Send,
    Stopped,
    anthropic_sender,
    openai_sender,
)
from dataset.gate import MIN_SCORE, evaluation_copies, judge
from dataset.journal import append, recorded, repair
from expander import cli
from expander.queries import SURROGATE, checked_query, normal_query, read_queries
from expander.rows import canonical_row, file_rows, parse_row

MLX_SERVER = "http://localhost:8080/v1"
KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
MAX_QUERY_LENGTH = 300  # characters of an invented query

EXPAND = """\
You write training data for a model that expands queries for the search of somebody's own notes and
documents. Answer the query below with lines of these three types and nothing else, in this order:

hyde: one passage that could stand in a document which answers the query
lex: keywords for a full-text search
vec: a natural sentence or question that means the same

- Write in the language of the query.
- One hyde line of 50 to 200 characters: a specific fact, setting, command or number, never a
  description of a document, and no word three times.
- Two or three lex lines of two to five keywords each. No two say the same, none contains the whole
  query, none has filler such as "overview", "basics" or "guide". Put words that belong together in
  "double quotes".
- Two or three vec lines, longer than the lex lines, each with an aspect of its own.
- Every line holds a word of the query as it is spelled there. Every lex line keeps a name, acronym or
  technical term of the query, and together the lines keep all of them.
- A query that ends in /only:lex, /only:vec or /only:hyde gets lines of that type alone.

Query: {query}"""
INVENT = """\
Invent {count} queries that people would type into the search of their own notes and documents, on the
topic below. One query a line and nothing else: no numbers, no quotation marks. Mix two-word queries,
names and acronyms, error messages, personal notes, comparisons, how-to and long questions. No two ask
for the same thing. Write in the language of the topic.

Topic: {topic}"""
FENCE = re.compile(r"^```\w*$", re.MULTILINE)
BULLET = re.compile(r"^(?:[-*•]|\d+[.)])\s+")

Queries = list[tuple[str, str | None]]  # (query, category)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make rows with a language model; keep the answers that score well.",
        epilog="example: python dataset/generate_data.py --queries queries.txt --model "
        "mlx-community/Qwen3-4B-Instruct-2507-4bit -o data/new.jsonl",
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--queries",
        type=cli.path,
        metavar="FILE",
        help='queries, one per line, or .jsonl rows with a "query"',
    )
    source.add_argument(
        "--topics",
        type=cli.path,
        metavar="FILE",
        help="topics, one per line, to invent queries for",
    )
    add("--per-topic", type=int, metavar="N", default=20, help="queries per topic (default: 20)")
    add(
        "-o",
        "--output",
        type=cli.path,
        metavar="FILE",
        required=True,
        help="file to append rows to",
    )
    add("--api", choices=KEYS, default="openai", help="protocol of the endpoint (default: openai)")
    add("--url", help=f"base URL of the endpoint (default with openai: {MLX_SERVER})")
    add("--model", required=True, help="model name at the endpoint")
    add(
        "--options", type=json.loads, metavar="JSON", default={}, help="more fields for the request"
    )
    add(
        "--min-score",
        type=float,
        metavar="S",
        default=MIN_SCORE,
        help="minimum percentage (default: %(default)s)",
    )
    add("--parallel", type=int, metavar="N", default=4, help="parallel requests (default: 4)")
    add("--retries", type=int, metavar="N", default=5, help="retries per request (default: 5)")
    add(
        "--timeout", type=float, metavar="S", default=120, help="seconds per request (default: 120)"
    )
    add(
        "--price",
        type=float,
        nargs=2,
        metavar=("IN", "OUT"),
        help="price per million tokens, to print the cost",
    )
    args = parser.parse_args()
    if not isinstance(args.options, dict):
        parser.error("--options must be a JSON object such as '{\"temperature\": 0.7}'")
    if min(args.per_topic, args.parallel) < 1 or args.retries < 0 or args.timeout <= 0:
        parser.error("--per-topic, --parallel and --timeout must be above 0, --retries at least 0")
    return args


def read_source(path: Path) -> Queries:
    """Read the queries of a text file, or of .jsonl rows with or without an expansion."""
    if path.suffix != ".jsonl":
        return read_queries(path)
    queries = []
    for location, row in file_rows(path):
        try:
            if isinstance(row, ValueError):
                raise row
            if not (isinstance(row, dict) and isinstance(row.get("query"), str)):
                row = vars(parse_row(row))
            query = checked_query(row["query"])
        except ValueError as error:
            raise ValueError(f"{location}: {error}") from None
        category = row.get("category")
        queries.append((query, category if isinstance(category, str) else None))
    return queries


def invented(text: str) -> list[str]:
    r"""The queries in an answer to INVENT.

    >>> invented('Here are two queries:\n1. auth config\n- "DNS" cache')
    ['auth config', '"DNS" cache']
    """
    lines = [BULLET.sub("", line.strip()) for line in FENCE.sub("", text).split("\n")]
    return [
        line
        for line in lines
        if 0 < len(line) <= MAX_QUERY_LENGTH
        and not line.endswith(":")
        and not SURROGATE.search(line)
    ]


class Generation:
    """One run: its endpoint, its files and its counts."""

    def __init__(self, args: argparse.Namespace, source: Queries, endpoint: Endpoint):
        self.args, self.source, self.endpoint = args, source, endpoint
        self.rejects = args.output.with_name(f"{args.output.name}.rejects")
        self.topics = args.output.with_name(f"{args.output.name}.topics")
        self.count: Counter[str] = Counter()
        self.failure = ""
        self.signum = 0

    async def each(self, label: str, items: Sequence, handle: Callable[..., Awaitable]) -> None:
        """Handle every item with --parallel workers, until the end or a stop."""
        progress, done = cli.Progress(label, len(items)), 0
        queue = iter(items)  # shared by the workers

        async def work() -> None:
            nonlocal done
            for item in queue:
                if self.endpoint.stop.is_set():
                    return
                try:
                    await handle(item)
                except NoReply as error:
                    self.count["failed"] += 1
                    self.failure = str(error)
                except Stopped:
                    return
                done += 1
                progress(done)

        await asyncio.gather(*(work() for _ in range(self.args.parallel)))

    def reject(self, query: str, reason: str, answer: str) -> None:
        """Record a query without a row."""
        append(self.rejects, {"query": query, "reason": reason, "answer": answer})
        self.count["rejected"] += 1

    async def expand(self, item: tuple[str, str | None]) -> None:
        """Ask for the expansion of a query, and record it as a row or a reject."""
        query, category = item
        reply = await self.endpoint.ask(EXPAND.format(query=query))
        if reply.cut_off:
            return self.reject(query, "truncated at the endpoint's token limit", reply.text)
        verdict = judge(query, FENCE.sub("", reply.text), self.args.min_score)
        if verdict.example is None:
            return self.reject(query, verdict.reason, reply.text)
        append(self.args.output, canonical_row(replace(verdict.example, category=category)))
        self.count["kept"] += 1
        self.count["unmatched"] += verdict.unmatched

    async def invent(self, topic: str) -> None:
        """Ask for queries on a topic and record them."""
        text = INVENT.format(count=self.args.per_topic, topic=topic)
        queries = invented((await self.endpoint.ask(text)).text)[: self.args.per_topic]
        append(self.topics, {"topic": topic, "queries": queries})

    async def all_queries(self) -> Queries:
        """The queries of --queries, or those that the model invents for --topics."""
        if self.args.queries:
            return self.source
        topics: dict[str, str] = {}
        for topic, _ in self.source:
            topics.setdefault(normal_query(topic), topic)
        known = recorded(self.topics, "topic")
        await self.each("topics", [topics[x] for x in topics if x not in known], self.invent)
        known = recorded(self.topics, "topic")
        return [(query, topics[x]) for x in topics if x in known for query in known[x]["queries"]]

    def new_queries(self, queries: Queries) -> Queries:
        """Those without a row or a reject, without duplicates and evaluation queries."""
        done = recorded(self.args.output, "query").keys() | recorded(self.rejects, "query").keys()
        new: dict[str, tuple[str, str | None]] = {}
        for query, category in queries:
            name = normal_query(query)
            if name in done or name in new:
                self.count["done" if name in done else "duplicate"] += 1
            else:
                new[name] = (" ".join(query.split()), category)
        copies = evaluation_copies([query for query, _ in new.values()])
        for copy, query in copies.items():
            self.reject(copy, f"nearly repeats the evaluation query {query!r}", "")
        return [item for item in new.values() if item[0] not in copies]

    async def run(self) -> None:
        """Generate until every query has a row or a reject; the first signal stops new requests."""
        for path in (self.args.output, self.rejects, self.topics):
            repair(path)
        loop = asyncio.get_running_loop()

        def stop(signum: int) -> None:
            self.signum = signum
            self.endpoint.stop.set()
            for each in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(each)  # a second signal stops at once
            print("stopping: waiting for pending answers", file=sys.stderr)

        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, stop, signum)
        await self.each("queries", self.new_queries(await self.all_queries()), self.expand)

    def report(self) -> str:
        count, used = self.count, self.endpoint.count
        lines = [
            f"kept {count['kept']}, rejected {count['rejected']}, no answer for {count['failed']}, "
            f"{used['repeated']} requests repeated",
            f"left out: {count['done']} done earlier, {count['duplicate']} duplicate queries, "
            f"{count['unmatched']} lines that QMD would drop",
            f"tokens: {used['tokens in']:,} in, {used['tokens out']:,} out",
        ]
        if self.args.price:
            cost = (
                used["tokens in"] * self.args.price[0] + used["tokens out"] * self.args.price[1]
            ) / 1e6
            lines[-1] += f", cost {cost:.4f}"
        lines.append(f"{self.args.output}: {len(recorded(self.args.output, 'query'))} rows")
        if self.rejects.exists():
            lines.append(f"{self.rejects}: rejected queries with the reasons")
        return "\n".join(lines)


def make_sender(args: argparse.Namespace) -> Send:
    """The sender for --api, with the key from the environment."""
    key = os.environ.get(KEYS[args.api], "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{KEYS[args.api]} contains a character that is not allowed in a key")
    if args.api == "anthropic":
        return anthropic_sender(args.url, args.model, key, args.options)
    return openai_sender(args.url or MLX_SERVER, args.model, key, args.options)


def main() -> int:
    args = parse_arguments()
    send = make_sender(args)
    source = read_source(args.queries) if args.queries else read_queries(args.topics)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{args.output}: another run is writing to it") from None
        generation = Generation(args, source, Endpoint(send, args.retries, args.timeout))
        asyncio.run(generation.run())
        print(generation.report())
    if generation.signum:
        raise cli.Interrupted(generation.signum, "stopped; run the same command to continue")
    if generation.failure:
        raise ValueError(
            f"{generation.count['failed']} queries without an answer (last error: "
            f"{generation.failure}); run the same command to ask again"
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
