"""Embedders, an endpoint that answers well and badly, QMD's chunks, the cache, nearest documents."""

import json
import sqlite3
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import wordllama as package

from expander.retrieval.collection import Document
from expander.retrieval.embed import (
    CHUNK_TOKENS,
    PROBE,
    Endpoint,
    VectorCache,
    VectorIndex,
    WordLlama,
    cache_folder,
    chunk_text,
    cut,
    embed_documents,
    read_embedder,
    unit_length,
)


@pytest.fixture(scope="session")
def wordllama():
    return WordLlama()


class Letters:
    """Vectors of a text's first letter; counts what it is asked, and may break after some texts."""

    def __init__(self, name="letters", breaks_after=None):
        self.name = self.identity = name
        self.asked: list[str] = []
        self.breaks_after = breaks_after

    def query_text(self, query):
        return query

    def document_text(self, title, chunk):
        return f"{title}{chunk}"

    def embed(self, texts):
        self.asked += texts
        if self.breaks_after is not None and len(self.asked) > self.breaks_after:
            raise KeyboardInterrupt
        vectors = np.zeros((len(texts), 128), dtype=np.float32)
        for row, text in enumerate(texts):
            if text:
                vectors[row, ord(text[0]) % 128] = 1
        return vectors


@contextmanager
def endpoint(monkeypatch, answer):
    """`answer(body, times)` → (status, JSON); yields the address and the requests."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            """Say nothing."""

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, dict(self.headers), body))
            status, value = answer(body, len(requests))
            raw = value.encode() if isinstance(value, str) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def vectors_of(body, *_):
    rows = [
        {"index": number, "embedding": [len(text), 1.0]}
        for number, text in enumerate(body["input"])
    ]
    return 200, {"data": rows[::-1]}  # order is by index, not by place


# wordllama


def test_wordllama_agrees_with_its_own_package(wordllama):
    folder = Path(package.__file__).parent
    theirs = package.WordLlama.load(cache_dir=folder, disable_download=True)
    texts = ["hello world", "x", "the quick brown fox " * 50, "東京タワー 😀", "</s> <unk>"]
    np.testing.assert_allclose(wordllama.embed(texts), theirs.embed(texts, norm=True), atol=1e-6)


def test_an_empty_text_has_zeros_and_not_nan(wordllama):
    vectors = wordllama.embed(["", "boiler"])
    assert vectors.dtype == np.float32
    assert not vectors[0].any()
    assert np.linalg.norm(vectors[1]) == pytest.approx(1)
    assert wordllama.embed([]).shape == (0, 256)


def test_the_embedder_leaves_the_log_alone():
    code = (
        "import logging; from expander.retrieval.embed import WordLlama; WordLlama();"
        "assert logging.getLogger().level == logging.WARNING and not logging.getLogger().handlers"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["", "words", "ftp://localhost/v1#m", "localhost:11434#m"])
def test_an_unknown_embedder_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="expected wordllama, none"):
        read_embedder(name)


def test_the_names_of_embedders():
    assert read_embedder("none") is None
    assert read_embedder("wordllama").name == "wordllama"
    assert read_embedder("http://localhost:1/v1#m").name == "http://localhost:1/v1#m"


# An endpoint


def test_an_endpoint_is_asked_in_batches_and_answered_in_order(monkeypatch):
    with endpoint(monkeypatch, vectors_of) as (url, requests):
        vectors = Endpoint(f"{url}/#gemma").embed(["x" * n for n in range(1, 41)])
    assert [len(body["input"]) for _, _, body in requests] == [32, 8]
    assert requests[0][0] == "/v1/embeddings"
    assert requests[0][2]["model"] == "gemma"
    assert "Authorization" not in requests[0][1]
    expected = unit_length(np.array([[n, 1.0] for n in range(1, 41)]))
    np.testing.assert_allclose(vectors, expected, rtol=1e-6)


def test_the_prompts_are_qmds():
    gemma = Endpoint("http://localhost:1/v1#embeddinggemma")
    assert gemma.query_text("boiler") == "task: search result | query: boiler"
    assert gemma.document_text("Heat", "hot") == "title: Heat | text: hot"
    assert gemma.document_text("", "hot") == "title: none | text: hot"
    qwen = Endpoint("http://localhost:1/v1#Qwen3-Embedding-0.6B")
    assert qwen.query_text("boiler").startswith("Instruct: Retrieve relevant documents")
    assert qwen.query_text("boiler").endswith("\nQuery: boiler")
    assert qwen.document_text("Heat", "hot") == "Heat\nhot"


def test_a_busy_endpoint_is_asked_again(monkeypatch):
    def answer(body, times):
        return vectors_of(body) if times == 3 else (503, {"error": {"message": "loading"}})

    with endpoint(monkeypatch, answer) as (url, requests):
        assert Endpoint(f"{url}#m", wait=0).embed(["x"]).shape == (1, 2)
    assert len(requests) == 3


@pytest.mark.parametrize(
    ("answer", "message", "requests_made"),
    [
        ((500, {"error": "no memory"}), "in 4 tries: status 500: no memory", 4),
        ((404, {"error": {"message": "model\nm"}}), "no vectors: status 404: model m", 1),
        ((401, "bad key sk-secret"), "no vectors: status 401", 1),
        ((401, {"error": "bad key sk-secret"}), "bad key [key]", 1),
        ((200, "<html>"), "its answer holds no embeddings", 1),
        ((200, {"data": [{"index": 0}]}), "its answer holds no embeddings", 1),
        ((200, {"data": []}), "asked for 1 finite vectors", 1),
        ((200, '{"data": [{"index": 0, "embedding": [NaN, 1]}]}'), "asked for 1 finite", 1),
    ],
)
def test_a_failing_endpoint_ends_in_one_line(monkeypatch, answer, message, requests_made):
    with endpoint(monkeypatch, lambda *_: answer) as (url, requests):
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        with pytest.raises(ValueError) as caught:
            Endpoint(f"{url}#m", wait=0).embed(["x"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and "sk-secret" not in str(caught.value)
    assert len(requests) == requests_made
    assert requests[0][1]["Authorization"] == "Bearer sk-secret"


def test_nobody_listening_ends_in_one_line(monkeypatch):
    with endpoint(monkeypatch, vectors_of) as (url, _):
        pass
    with pytest.raises(ValueError, match="no vectors in 4 tries"):
        Endpoint(f"{url}#m", wait=0).embed(["x"])


@pytest.mark.parametrize("name", ["http://localhost/v1", "http://#m", "http://localhost/v1#"])
def test_an_address_without_a_model_is_refused(name):
    with pytest.raises(ValueError, match="expected the address and model"):
        Endpoint(name)


def test_a_key_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as caught:
        Endpoint("https://user:secret@localhost/v1#m")
    assert "secret" not in str(caught.value)


# Chunks


def test_a_short_text_is_one_chunk_and_a_blank_one_none():
    assert chunk_text("Serviced in May", len) == ["Serviced in May"]
    assert chunk_text(" \n\u3000", len) == []


def test_a_cut_is_at_the_best_break_of_the_window():
    # 100 characters at most, the last 20 are the window: a heading at 85 beats a newline at 99.
    text = "a" * 85 + "\n# B" + "b" * 10 + "\n" + "c" * 60
    assert cut(text, 100, 10, 20) == [(0, 85), (75, 160)]
    # A paragraph at 81, at (1 - .7 * .9025) of 20, still beats a newline at 99.
    text = "a" * 81 + "\n\n" + "b" * 16 + "\n" + "c" * 60
    assert cut(text, 100, 10, 20)[0] == (0, 81)
    # No break in the window: at the full size.
    assert cut("a" * 150, 100, 10, 20) == [(0, 100), (90, 150)]


def test_a_fenced_block_is_not_cut_at_its_lines():
    text = "a" * 70 + "\n```\n" + "code\n" * 5 + "more " * 8 + "\n```\n" + "b" * 40
    assert cut(text, 100, 10, 20)[0] == (0, 100)


def test_chunks_hold_at_most_900_tokens_and_overlap():
    words = " ".join(str(number) for number in range(3000))
    chunks = chunk_text(words, lambda text: len(text))  # a token per character
    assert all(len(chunk) <= CHUNK_TOKENS for chunk in chunks)
    assert "".join(chunks).count(" 1500 ") >= 1
    assert chunks[1][:50] in chunks[0]


# The cache


def documents(*texts):
    return [Document(f"d{n}", "", text) for n, text in enumerate(texts)]


def test_document_vectors_are_made_once(tmp_path):
    first, second = Letters(), Letters()
    index = embed_documents(documents("apple", "bread", "apple"), first, tmp_path)
    assert first.asked == [PROBE, "apple", "bread"]
    again = embed_documents(documents("bread", "cake"), second, tmp_path)
    assert second.asked == [PROBE, "cake"]
    np.testing.assert_array_equal(index.vectors[1], again.vectors[0])
    assert index.owners.tolist() == [0, 1, 2]


def test_another_embedder_has_its_own_vectors(tmp_path):
    embed_documents(documents("apple"), Letters("one"), tmp_path)
    other = Letters("two")
    embed_documents(documents("apple"), other, tmp_path)
    assert "apple" in other.asked
    assert len(list(tmp_path.iterdir())) == 2


def test_a_model_replaced_under_its_name_starts_afresh(tmp_path):
    embed_documents(documents("apple"), Letters(), tmp_path)
    changed = Letters()
    changed.embed = lambda texts: (
        changed.asked.extend(texts) or np.eye(1, 64).repeat(len(texts), axis=0)
    )
    assert embed_documents(documents("apple"), changed, tmp_path).vectors.shape == (1, 64)
    assert changed.asked == [PROBE, "apple"]


def test_a_cut_off_run_keeps_what_it_has(tmp_path):
    texts = [f"{n} text" for n in range(200)]
    with pytest.raises(KeyboardInterrupt):
        embed_documents(documents(*texts), Letters(breaks_after=150), tmp_path)
    rest = Letters()
    embed_documents(documents(*texts), rest, tmp_path)
    assert rest.asked == [PROBE, *texts[128:]]


def test_a_damaged_cache_is_named(tmp_path):
    embed_documents(documents("apple"), Letters(), tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"no database, but longer than nothing" * 100)
    with pytest.raises(OSError, match=r"letters.*sqlite.*may be deleted"):
        VectorCache(tmp_path, Letters())


def test_the_cache_holds_plain_numbers(tmp_path):
    embed_documents(documents("apple"), Letters(), tmp_path)
    (path,) = tmp_path.iterdir()
    rows = sqlite3.connect(path).execute("SELECT vector FROM vectors").fetchall()
    assert all(np.frombuffer(blob, dtype="<f4").sum() == 1 for (blob,) in rows)


def test_the_cache_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "qmd-finetune-mlx" / "vectors"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "qmd-finetune-mlx" / "vectors"


def test_blank_documents_have_no_vector_and_titles_count(tmp_path):
    made = [Document("blank", "", " "), Document("title", "apple", ""), Document("b", "", "bread")]
    index = embed_documents(made, Letters(), tmp_path)
    assert index.owners.tolist() == [1, 2]
    assert index.nearest(["apple"]) == [["title", "b"]]
    with pytest.raises(ValueError, match="no text"):
        embed_documents(made[:1], Letters(), tmp_path)


# Nearest documents


def index_of(rows, owners, ids):
    return VectorIndex(Fixed(), ids, unit_length(np.array(rows)), np.array(owners))


class Fixed(Letters):
    """Queries are written as their vectors."""

    def embed(self, texts):
        return unit_length(np.array([[float(x) for x in text.split(",")] for text in texts]))


def test_a_documents_best_chunk_counts():
    index = index_of([[1, 0], [0, 1], [1, 1]], [0, 0, 1], ["long", "short"])
    assert index.nearest(["0,1", "1,0.9"]) == [["long", "short"], ["short", "long"]]
    assert index.nearest(["0,1"], limit=1) == [["long"]]


def test_equal_vectors_stay_in_order_and_a_query_of_nothing_finds_nothing():
    index = index_of([[1, 0]] * 3, [0, 1, 2], ["a", "b", "c"])
    assert index.nearest(["1,0", "0,0"]) == [["a", "b", "c"], []]


def test_only_the_60_nearest_chunks_are_looked_at():
    near = [[1, n / 1000] for n in range(60)]
    index = index_of([*near, [0, 1]], [0] * 60 + [1], ["long", "far"])
    assert index.nearest(["1,0"]) == [["long"]]


def test_many_queries_are_compared_in_parts(monkeypatch):
    index = index_of([[1, 0], [0, 1]], [0, 1], ["a", "b"])
    monkeypatch.setattr("expander.retrieval.embed.SIMILARITIES_AT_ONCE", 4)
    assert index.nearest(["1,0", "0,1"] * 3) == [["a", "b"], ["b", "a"]] * 3
