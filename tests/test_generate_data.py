"""dataset/generate_data.py with a loopback endpoint: nothing lost or repeated, no key revealed."""

import asyncio
import contextlib
import fcntl
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from fake_endpoint import Act, Behave, ChatEndpoint

from dataset import endpoint, generate_data
from dataset.endpoint import NoReply, Reply
from dataset.journal import append, repair
from expander import cli
from expander.rows import load_rows

ROOT = Path(__file__).parent.parent
KEY = "sk-loopback-0123456789"
ANIMALS = "walrus badger heron otter".split()
THINGS = "ladder kettle fiddle hammer blanket".split()
QUERIES = [f"{animal} {thing}" for animal in ANIMALS for thing in THINGS]  # 20
PATIENCE = 120  # seconds; an idle machine needs a moment


def good(query: str) -> str:
    first, second = query.split()[:2]
    return (
        f"hyde: Set the {first} to 20 and its {second} to 30, then restart the service on port 8080.\n"
        f"lex: {first} settings file\nlex: {second} port restart\n"
        f"vec: How do I change the {first} on this machine?\n"
        f"vec: Where is the {second} of the service set by default?"
    )


def well(query: str, nth: int, headers: dict) -> Act:
    return Act(good(query))


@contextlib.contextmanager
def serving(behave: Behave) -> Iterator[ChatEndpoint]:
    server = ChatEndpoint(behave)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in generate_data.KEYS.values():
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def generate(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """`generate(server, *flags)`: the command on queries.txt → rows.jsonl; (exit code, its output)."""

    def generate(server: ChatEndpoint, *flags: str, queries: list[str] | None = None):
        if queries is not None:
            (tmp_path / "queries.txt").write_text("\n".join(queries) + "\n")
        if not {"--topics", "--queries"} & set(flags):
            flags = ("--queries", str(tmp_path / "queries.txt"), *flags)
        if "--url" not in flags:
            flags = ("--url", f"{server.url}/v1", *flags)
        output = str(tmp_path / "rows.jsonl")
        monkeypatch.setattr(sys, "argv", ["generate_data.py", "--model", "m", "-o", output, *flags])
        with pytest.raises(SystemExit) as ended:
            cli.run(generate_data.main)
        captured = capsys.readouterr()
        return ended.value.code, captured.out + captured.err

    return generate


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def queries(path: Path) -> list[str]:
    return [row["query"] for row in lines(path)]


def test_good_answers_become_rows(generate, tmp_path):
    with serving(well) as server:
        code, out = generate(server, "--price", "3", "15", queries=QUERIES)
    assert code == 0
    assert sorted(queries(tmp_path / "rows.jsonl")) == sorted(QUERIES)
    assert [kind for kind, _ in lines(tmp_path / "rows.jsonl")[0]["output"]] == (
        ["hyde", "lex", "lex", "vec", "vec"]
    )
    assert len(load_rows(str(tmp_path / "rows.jsonl")).train) == 20
    assert not (tmp_path / "rows.jsonl.rejects").exists()
    # 20 answers of 100 and 50 tokens: 2000 * 3 / 1e6 + 1000 * 15 / 1e6.
    assert "kept 20, rejected 0, no answer for 0, 0 requests repeated" in out
    assert "tokens: 2,000 in, 1,000 out, cost 0.0210" in out


BAD = {
    "walrus ladder": (Act("Sure! Here you are."), "does not start with hyde:, lex: or vec:"),
    "walrus kettle": (Act(""), "the expansion has no lines"),
    "walrus fiddle": (Act(None), "the expansion has no lines"),
    "walrus hammer": (
        Act(good("walrus hammer"), cut_off=True),
        "truncated at the endpoint's token limit",
    ),
    "walrus blanket": (Act("lex: walrus blanket\nvec: a walrus"), "score under 80: "),
    "badger ladder": (Act("lex: trees\nvec: how tall do trees grow"), "QMD would drop every line"),
    "badger kettle": (Act('{"hyde": "badger"}'), "does not start with"),
    "badger fiddle": (Act("hyde: a badger\nhyde: a fiddle\nlex: badger"), "more than one hyde"),
    "badger hammer": (Act("lex: badger \ud83d"), "unpaired surrogate"),
}


def test_bad_answers_are_rejected_with_the_reason_and_not_asked_again(generate, tmp_path):
    def behave(query, nth, headers):
        return BAD[query][0] if query in BAD else Act(good(query))

    with serving(behave) as server:
        code, out = generate(server, queries=QUERIES[:12])
        assert (code, len(server.asked)) == (0, 12)
        again, output_again = generate(server)
        assert (again, len(server.asked)) == (0, 12)
    assert "kept 3, rejected 9" in out and "12 done earlier" in output_again
    assert sorted(queries(tmp_path / "rows.jsonl")) == sorted(set(QUERIES[:12]) - set(BAD))
    rejects = {row["query"]: row for row in lines(tmp_path / "rows.jsonl.rejects")}
    assert rejects.keys() == BAD.keys()
    for query, (act, reason) in BAD.items():
        assert reason in rejects[query]["reason"]
        assert rejects[query]["answer"] == (act.text or "")


def test_lines_that_qmd_would_drop_are_removed(generate, tmp_path):
    def behave(query, nth, headers):
        return Act(f"```text\n{good(query)}\nvec: What does nobody here ask for?\n```")

    with serving(behave) as server:
        code, out = generate(server, queries=QUERIES[:2])
    assert code == 0 and "2 lines that QMD would drop" in out
    assert all(len(row["output"]) == 5 for row in lines(tmp_path / "rows.jsonl"))


TRANSIENT = {
    "500": Act(status=500, body="{}"),
    "529": Act(status=529, body="overloaded"),
    "429": Act(status=429, body="{}", headers={"Retry-After": "0.02"}),
    "429 without a time": Act(status=429, body="{}"),
    "cut in transit": Act("walrus " * 50, drop=True),
    "not JSON": Act(body="<html>Bad gateway</html>"),
    "another JSON": Act(body='{"error": "loading the model"}'),
}


@pytest.mark.parametrize("act", TRANSIENT.values(), ids=TRANSIENT)
def test_transient_errors_are_retried(act, generate, tmp_path):
    def behave(query, nth, headers):
        return act if nth == 1 and query in QUERIES[:3] else Act(good(query))

    with serving(behave) as server:
        code, out = generate(server, queries=QUERIES[:8])
    assert code == 0 and "kept 8, rejected 0, no answer for 0, 3 requests repeated" in out
    assert sorted(queries(tmp_path / "rows.jsonl")) == sorted(QUERIES[:8])
    assert server.times == {query: 1 + (query in QUERIES[:3]) for query in QUERIES[:8]}


def test_a_slow_answer_times_out_and_is_retried(generate, tmp_path):
    over = threading.Event()

    def behave(query, nth, headers):
        if (query, nth) == (QUERIES[0], 1):
            over.wait(PATIENCE)
        return Act(good(query))

    with serving(behave) as server:
        code, _ = generate(server, "--timeout", "0.7", queries=QUERIES[:4])
        over.set()
    assert code == 0 and server.times[QUERIES[0]] >= 2
    assert sorted(queries(tmp_path / "rows.jsonl")) == sorted(QUERIES[:4])


def test_no_request_is_sent_while_the_endpoint_wants_a_pause():
    refused = []

    async def send(text: str) -> Reply:
        if not refused:
            refused.append(time.monotonic())
            raise NoReply("status 429", retry=True, after=0.3)
        return Reply(str(time.monotonic() - refused[0]), False, 0, 0)

    async def two_at_once() -> list[Reply]:
        asked = endpoint.Endpoint(send, retries=1, timeout=PATIENCE)
        first = asyncio.create_task(asked.ask("a"))
        while not refused:
            await asyncio.sleep(0)
        return [await asked.ask("b"), await first]

    assert all(float(reply.text) >= 0.3 for reply in asyncio.run(two_at_once()))


def test_parallel_limits_the_requests_at_once(generate):
    together = threading.Barrier(3)

    def behave(query, nth, headers):
        if query in QUERIES[:3]:
            together.wait(PATIENCE)
        return Act(good(query))

    with serving(behave) as server:
        assert generate(server, "--parallel", "3", queries=QUERIES[:12])[0] == 0
    assert server.most_at_once == 3


@pytest.mark.parametrize("retries", [0, 2])
def test_the_same_command_continues_after_the_endpoint_died(retries, generate, tmp_path):
    order = itertools.count()  # requests come from several threads, and next() is atomic

    def behave(query, nth, headers):
        if next(order) < 9:
            return Act(good(query))
        time.sleep(0.2)  # an answer in progress that came later would end the row of failures
        return Act(status=503, body="{}")

    with serving(behave) as server:
        code, out = generate(server, "--retries", str(retries), queries=QUERIES)
    kept = queries(tmp_path / "rows.jsonl")
    assert code == 2 and len(kept) == server.answered >= 9
    assert "without an answer (last error: status 503: {}); run the same command" in out
    # It gave up after three queries and those in progress, without trying all the others.
    assert len(server.asked) <= server.answered + 7 * (retries + 1)

    with serving(well) as server:
        assert generate(server)[0] == 0
    assert sorted(queries(tmp_path / "rows.jsonl")) == sorted(QUERIES)
    assert sorted(server.times) == sorted(set(QUERIES) - set(kept))
    assert queries(tmp_path / "rows.jsonl")[: len(kept)] == kept


def test_a_query_without_an_answer_does_not_stop_the_others(generate, tmp_path):
    def behave(query, nth, headers):
        return Act(status=400, body="no") if query == QUERIES[0] else Act(good(query))

    with serving(behave) as server:
        code, out = generate(server, queries=QUERIES[:10])
    assert code == 2 and "1 queries without an answer (last error: status 400: no)" in out
    assert sorted(queries(tmp_path / "rows.jsonl")) == sorted(QUERIES[1:10])
    assert server.times[QUERIES[0]] == 1  # a refusal is not repeated


def start(server: ChatEndpoint, tmp_path: Path, *flags: str) -> subprocess.Popen[str]:
    (tmp_path / "queries.txt").write_text("\n".join(QUERIES))
    command = [sys.executable, ROOT / "dataset" / "generate_data.py", "--model", "m"]
    command += ["--queries", tmp_path / "queries.txt", "-o", tmp_path / "rows.jsonl"]
    return subprocess.Popen(
        [*command, "--url", f"{server.url}/v1", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def holding(after: int) -> Iterator[tuple[ChatEndpoint, threading.Event]]:
    """An endpoint that gives so many answers; the next ones wait for the event."""
    release = threading.Event()

    def behave(query, nth, headers):
        if server.answered >= after:
            release.wait(PATIENCE)
        return Act(good(query))

    with serving(behave) as server:
        try:
            yield server, release
        finally:
            release.set()


def wait_for_rows(path: Path, count: int) -> None:
    end = time.monotonic() + PATIENCE
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end, f"fewer than {count} rows"
        time.sleep(0.01)


def test_ctrl_c_waits_for_pending_answers(generate, tmp_path):
    path = tmp_path / "rows.jsonl"
    with holding(after=8) as (server, release):
        process = start(server, tmp_path, "--parallel", "4")
        wait_for_rows(path, 8)
        process.send_signal(signal.SIGINT)
        assert "waiting for pending answers" in process.stderr.readline()
        release.set()
        out, err = process.communicate(timeout=PATIENCE)
        # Every paid answer is a row.
        assert len(queries(path)) == len(server.asked) <= 12
        assert (process.returncode, err) == (130, "stopped; run the same command to continue\n")
        assert f"kept {len(server.asked)}, rejected 0" in out

        assert generate(server)[0] == 0
        assert server.times == dict.fromkeys(QUERIES, 1)
    assert sorted(queries(path)) == sorted(QUERIES)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    with holding(after=4) as (server, _):
        process = start(server, tmp_path)
        wait_for_rows(tmp_path / "rows.jsonl", 4)
        process.send_signal(signal.SIGINT)
        assert "waiting for pending answers" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE / 2)  # the endpoint is still holding
    assert (process.returncode, out, err) == (130, "", "")


def test_a_run_killed_in_the_middle_of_a_line_is_continued(generate, tmp_path):
    path = tmp_path / "rows.jsonl"
    with holding(after=9) as (server, release):
        process = start(server, tmp_path)
        wait_for_rows(path, 5)
        process.kill()
        process.communicate()
        release.set()
        whole = path.read_bytes()
        path.write_bytes(whole[:-40])
        code, out = generate(server)
    assert code == 0 and "removed an incomplete last line" in out
    assert f"{len(whole.splitlines()) - 1} done earlier" in out
    assert sorted(queries(path)) == sorted(QUERIES)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b""),
        (b'{"a": 1}\n', b'{"a": 1}\n'),
        (b'{"a": 1}', b'{"a": 1}\n'),
        (b'{"a": 1}\n{"b', b'{"a": 1}\n'),
        (b'{"a', b""),
        ('{"a": 1}\n{"é'.encode()[:-1], b'{"a": 1}\n'),
    ],
)
def test_an_incomplete_last_line_is_removed(before, after, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(before)
    repair(path)
    assert path.read_bytes() == after
    append(path, {"b": "é\ud83d"})
    assert path.read_bytes() == after + '{"b": "é\\ud83d"}\n'.encode()


def test_two_runs_cannot_write_to_one_file(generate, tmp_path):
    with serving(well) as server, (tmp_path / "rows.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, out = generate(server, queries=QUERIES)
    assert (code, server.asked) == (2, [])
    assert out == f"error: {tmp_path / 'rows.jsonl'}: another run is writing to it\n"


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_the_key_is_sent_but_never_saved_or_printed(generate, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")

    def behave(query, nth, headers):
        assert headers["authorization"] == f"Bearer {KEY}"
        if query == QUERIES[0]:
            return Act(f"lex: your key is {KEY}")
        if query == QUERIES[1]:
            return Act(good(query) + f"\nvec: The {query} opens with {KEY}, does it not?")
        return Act(status=401, body=json.dumps({"error": f"wrong key: {KEY}"}))

    with serving(behave) as server:
        code, out = generate(server, queries=QUERIES[:9])
    assert code == 2 and 'status 401: {"error": "wrong key: [key]"}' in out
    assert KEY not in out and KEY.encode() not in everything(tmp_path)
    assert b"your key is [key]" in (tmp_path / "rows.jsonl.rejects").read_bytes()
    assert b"opens with [key]" in (tmp_path / "rows.jsonl").read_bytes()


def test_a_malformed_key_is_rejected_without_printing_it(generate, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n{KEY}")
    with serving(well) as server:
        code, out = generate(server, queries=QUERIES)
    assert (code, out) == (
        2,
        "error: OPENAI_API_KEY contains a character that is not allowed in a key\n",
    )
    assert server.asked == []


def test_a_local_endpoint_needs_no_key_and_gets_the_options(generate):
    with serving(well) as server:
        assert generate(server, "--options", '{"temperature": 0.5}', queries=QUERIES[:1])[0] == 0
    assert "authorization" not in server.headers[0]
    assert (server.bodies[0]["model"], server.bodies[0]["temperature"]) == ("m", 0.5)


def test_duplicates_and_evaluation_queries_are_not_asked(generate, tmp_path):
    asked = ["walrus ladder", "Walrus  LADDER", "kafka consumer group rebalance static memberships"]
    with serving(well) as server:
        code, out = generate(server, queries=asked)
        assert generate(server)[0] == 0
    assert code == 0 and "kept 1, rejected 1" in out and "1 duplicate queries" in out
    assert server.times == {"walrus ladder": 1}
    assert lines(tmp_path / "rows.jsonl.rejects") == [
        {
            "query": "kafka consumer group rebalance static memberships",
            "reason": "nearly repeats the evaluation query "
            "'kafka consumer group rebalance static membership'",
            "answer": "",
        }
    ]


def test_rows_as_source_keep_their_category(generate, tmp_path):
    source = tmp_path / "source.jsonl"
    source.write_text(
        '{"query": "walrus ladder", "category": "short"}\n'
        '{"input": "otter kettle", "output": "lex: otter"}\n'
    )
    with serving(well) as server:
        assert generate(server, "--queries", str(source))[0] == 0
        source.write_text('{"query": "walrus ladder"}\n{"query": null}\n')
        code, out = generate(server, "--queries", str(source))
    found = {row["query"]: row.get("category") for row in lines(tmp_path / "rows.jsonl")}
    assert found == {"walrus ladder": "short", "otter kettle": None}
    assert code == 2 and out.startswith(f"error: {source}:2: no known format")


def test_each_topic_is_turned_into_queries_once(generate, tmp_path):
    (tmp_path / "topics.txt").write_text("tools\nanimals\nTools\n")
    flags = ("--topics", str(tmp_path / "topics.txt"), "--per-topic", "4")

    def behave(asked, nth, headers):
        if asked == "tools":
            return Act("Here are 4 queries:\n1. walrus ladder\n2. otter kettle\n- heron fiddle")
        if asked == "animals":
            return Act(status=400, body="no") if nth == 1 else Act("otter  Kettle\nlizard hammer")
        return Act(good(asked))

    with serving(behave) as server:
        code, out = generate(server, *flags)
        assert code == 2 and "1 queries without an answer" in out
        code, out = generate(server, *flags)
        assert code == 0 and generate(server, *flags)[0] == 0
    assert server.times == {
        "tools": 1,
        "animals": 2,
        "walrus ladder": 1,
        "otter kettle": 1,
        "heron fiddle": 1,
        "lizard hammer": 1,
    }
    found = {row["query"]: row["category"] for row in lines(tmp_path / "rows.jsonl")}
    assert found["lizard hammer"] == "animals" and found["otter kettle"] == "tools"


def test_the_anthropic_api(generate, tmp_path, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    once = dict(zip(QUERIES, TRANSIENT.values(), strict=False))

    def behave(query, nth, headers):
        assert headers["authorization"] == f"Bearer {KEY}"
        if query in once:
            return once[query] if nth == 1 else Act(good(query))
        if query == QUERIES[10]:
            return Act(good(query), cut_off=True)
        return Act(status=401, body=json.dumps({"error": {"message": f"wrong key: {KEY}"}}))

    with serving(behave) as server:
        flags = ("--api", "anthropic", "--url", server.url, "--options", '{"temperature": 0.5}')
        code, out = generate(server, *flags, queries=[*once, QUERIES[10], QUERIES[11]])
    assert code == 2 and "wrong key: [key]" in out and "Traceback" not in out
    assert f"kept {len(once)}, rejected 1, no answer for 1, {len(once)} requests repeated" in out
    assert f"tokens: {100 * len(once) + 100} in, {50 * len(once) + 50} out" in out
    assert sorted(queries(tmp_path / "rows.jsonl")) == sorted(once)
    assert (server.bodies[0]["model"], server.bodies[0]["temperature"]) == ("m", 0.5)
    assert KEY not in out and KEY.encode() not in everything(tmp_path)


def test_the_anthropic_api_needs_a_key_and_its_library(generate, monkeypatch):
    with serving(well) as server:
        code, out = generate(server, "--api", "anthropic", queries=QUERIES)
        assert code == 2 and out.startswith("error: --api anthropic needs a key: set ANTHROPIC_API")
        monkeypatch.setitem(sys.modules, "anthropic", None)
        code, out = generate(server, "--api", "anthropic")
    assert code == 2
    assert out == "error: --api anthropic needs its library: pip install anthropic\n"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--url", "localhost:8080"), "--url localhost:8080: not a URL"),
        (("--url", "http://[::1"), "--url http://[::1: not a URL"),
        (("--options", "[1]"), "--options must be a JSON object"),
        (("--options", "{"), "invalid loads value"),
        (("--parallel", "0"), "must be above 0"),
        (("--queries", "nowhere.txt"), "nowhere.txt: cannot be read"),
    ],
)
def test_a_wrong_argument_is_reported_in_one_line_and_leaves_no_file(
    flags, expected, generate, tmp_path
):
    with serving(well) as server:
        code, out = generate(server, *flags, queries=QUERIES)
    assert code == 2 and expected in out and "Traceback" not in out
    assert server.asked == [] and not (tmp_path / "rows.jsonl").exists()


def test_an_unreachable_endpoint_is_reported(generate):
    with serving(well) as server:
        url = server.url
    code, out = generate(server, "--url", url, "--retries", "1", queries=QUERIES)
    assert code == 2 and f"{url}/chat/completions: " in out and "Traceback" not in out


def test_retry_after_may_be_a_date():
    later = formatdate(time.time() + 30, usegmt=True)
    assert 28 <= endpoint.seconds_to_wait(later) <= 31
    assert endpoint.seconds_to_wait(formatdate(0, usegmt=True)) == 0
    for useless in (None, "", "inf", "nan", "soon"):
        assert endpoint.seconds_to_wait(useless) is None
    assert endpoint.seconds_to_wait("-5") == 0
