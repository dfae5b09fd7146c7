"""Vectors of documents and queries: embedders, QMD's chunks, a cache on disk, nearest documents.

Three embedders: `wordllama` (static vectors, offline, the default), any endpoint with OpenAI's
embeddings API (`http://localhost:11434/v1#embeddinggemma` is Ollama with QMD's own model), and `none`.
Vectors are kept in ~/.cache/qmd-finetune-mlx/vectors (or $XDG_CACHE_HOME), one SQLite file per
embedder, which may be deleted at any time. Vectors are compared exactly, without an approximate index.
"""

import hashlib
import importlib.util
import json
import os
import re
import sqlite3
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np

from expander.cli import Progress
from expander.qmd import JS_WHITESPACE
from expander.retrieval.collection import SPACE, Document
from expander.retrieval.index import HITS

# QMD's chunks: 900 tokens, 15 % overlap, cut at the best place in the last 200 tokens. Sizes in
# characters assume 3 to a token; a chunk that turns out to have more than 900 tokens is split again.
CHUNK_TOKENS = 900
CHUNK_CHARACTERS, OVERLAP_CHARACTERS, WINDOW_CHARACTERS = 2700, 405, 600
# Places to cut at and how good they are; at the start of the window they count 0.3 as much.
BREAKS = tuple(
    (re.compile(pattern), score)
    for pattern, score in (
        *((rf"\n#{{{level}}}(?!#)", 110 - 10 * level) for level in range(1, 7)),
        (r"\n```", 80),
        (rf"\n(?:---|\*\*\*|___){SPACE}*\n", 60),
        (r"\n\n+", 20),
        (rf"\n[-*]{SPACE}", 5),
        (rf"\n[0-9]+\.{SPACE}", 5),
        (r"\n", 1),
    )
)
FENCE = re.compile(r"\n```")

DOCUMENTS_AT_ONCE = 64  # embedded, then saved
SIMILARITIES_AT_ONCE = 2**24  # float32, so 64 MB
NEAREST_CHUNKS = 3 * HITS  # QMD looks at this many chunks, then takes each document's best
PROBE = "the same text gets the same vector"
BATCH, TRIES, FIRST_WAIT, TIMEOUT = 32, 4, 1.0, 300.0  # texts, requests, seconds, seconds


class Embedder(Protocol):
    """Turns texts into vectors of unit length; a text without any token gets zeros."""

    name: str  # as the user writes it
    identity: str  # what decides the vectors: the key of the cache

    def query_text(self, query: str) -> str: ...
    def document_text(self, title: str, chunk: str) -> str: ...
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts that `query_text` or `document_text` made; float32, (texts, dimension)."""
        ...


def read_embedder(name: str) -> Embedder | None:
    """`wordllama`, `none` or URL#MODEL.

    Raises:
        ValueError: none of these.
    """
    if name == "none":
        return None
    if name == "wordllama":
        return WordLlama()
    if re.match("https?://", name):
        return Endpoint(name)
    raise ValueError(
        f"embedder {name}: expected wordllama, none, or the address and model of an endpoint, "
        "such as http://localhost:11434/v1#embeddinggemma"
    )


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 (float32); rows of zeros stay."""
    vectors = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def wordllama_folder() -> Path:
    """The folder of the installed wordllama package, which holds its weights and its tokenizer."""
    package = importlib.util.find_spec("wordllama")
    if package is None:
        raise ValueError("wordllama is not installed; run pip install -r requirements.txt")
    return Path(package.submodule_search_locations[0])


class WordLlama:
    """The mean of static token vectors (256 numbers), from the files in PyPI's wordllama.

    They are read without importing the package: it configures the root logger when imported, and
    pads every text of a batch to the longest.
    """

    name = "wordllama"

    def __init__(self):
        from safetensors.numpy import load_file

        self.identity = f"wordllama {version('wordllama')} l2_supercat_256"
        self._tokenizer = chunk_tokenizer()
        weights = load_file(wordllama_folder() / "weights" / "l2_supercat_256.safetensors")
        self._table = weights["embedding.weight"].astype(np.float32)  # (vocabulary, 256)

    def query_text(self, query: str) -> str:
        return query

    def document_text(self, title: str, chunk: str) -> str:
        return f"{title}\n{chunk}" if title else chunk

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), self._table.shape[1]), dtype=np.float32)
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        for row, encoding in enumerate(encodings):
            if encoding.ids:  # the mean of nothing is NaN
                vectors[row] = self._table[encoding.ids].mean(axis=0)
        return unit_length(vectors)


class Endpoint:
    """A model behind OpenAI's embeddings API, with the prompts that QMD writes for it.

    The key, if the endpoint needs one, comes from OPENAI_API_KEY only.

    Args:
        name: URL#MODEL, such as http://localhost:11434/v1#embeddinggemma.

    Raises:
        ValueError: no model in `name`, or not an address.
    """

    def __init__(self, name: str, wait: float = FIRST_WAIT):
        import httpx2

        url, _, self._model = name.partition("#")
        try:
            address = httpx2.URL(f"{url.rstrip('/')}/embeddings")
        except httpx2.InvalidURL:
            address = None
        if not self._model or address is None or not address.host:
            raise ValueError(
                f"embedder {name}: expected the address and model of an endpoint, such as "
                "http://localhost:11434/v1#embeddinggemma"
            )
        if address.userinfo:
            raise ValueError("embedder: put the key into OPENAI_API_KEY, not into the address")
        self.name, self._address, self._wait = name, str(address), wait
        self.identity = f"{name} with QMD's prompts"
        key = os.environ.get("OPENAI_API_KEY", "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx2.Client(headers=headers, timeout=TIMEOUT)
        # QMD's rule; Qwen3-Embedding wants an instruction, every other model EmbeddingGemma's prompts.
        self._is_qwen = re.search("qwen.*embed|embed.*qwen", self._model, re.IGNORECASE) is not None

    def query_text(self, query: str) -> str:
        if self._is_qwen:
            return f"Instruct: Retrieve relevant documents for the given query\nQuery: {query}"
        return f"task: search result | query: {query}"

    def document_text(self, title: str, chunk: str) -> str:
        if self._is_qwen:
            return f"{title}\n{chunk}" if title else chunk
        return f"title: {title or 'none'} | text: {chunk}"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Raises ValueError if the endpoint refuses, or gives no vectors after several tries."""
        batches = [self._ask(texts[at : at + BATCH]) for at in range(0, len(texts), BATCH)]
        if len({batch.shape[1] for batch in batches}) > 1:
            raise ValueError(f"embedder {self.name}: its vectors differ in length")
        return unit_length(np.concatenate(batches))

    def _ask(self, texts: Sequence[str]) -> np.ndarray:
        import httpx2

        body = {"model": self._model, "input": list(texts), "encoding_format": "float"}
        for attempt in range(1, TRIES + 1):
            try:
                response = self._client.post(self._address, json=body)
            except httpx2.RequestError as error:
                reason, again = str(error) or type(error).__name__, True
            else:
                if response.is_success:
                    return self._vectors(response.content, len(texts))
                # What the endpoint answers may repeat the key: show its error message only.
                reason = f"status {response.status_code}{_error_message(response.content)}"
                again = response.status_code in (408, 429) or response.status_code >= 500
            if not again or attempt == TRIES:
                break
            time.sleep(self._wait * 2 ** (attempt - 1))
        key = os.environ.get("OPENAI_API_KEY", "")
        reason = reason.replace(key, "[key]") if key else reason
        tried = f" in {attempt} tries" if attempt > 1 else ""
        raise ValueError(f"embedder {self._address}: no vectors{tried}: {reason}")

    def _vectors(self, content: bytes, count: int) -> np.ndarray:
        try:
            rows = sorted(json.loads(content)["data"], key=lambda row: row.get("index", 0))
            vectors = np.array([row["embedding"] for row in rows], dtype=np.float32)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"embedder {self._address}: its answer holds no embeddings") from None
        if vectors.ndim != 2 or len(vectors) != count or not np.isfinite(vectors).all():
            raise ValueError(
                f"embedder {self._address}: asked for {count} finite vectors, got an array of "
                f"{vectors.shape} with {np.count_nonzero(~np.isfinite(vectors))} other numbers"
            )
        return vectors


def _error_message(content: bytes) -> str:
    try:
        message = json.loads(content)["error"]
        message = message["message"] if isinstance(message, dict) else message
    except (ValueError, LookupError, TypeError):
        return ""
    return f": {' '.join(str(message).split())[:200]}"


# Chunks


def chunk_tokenizer():
    """The tokenizer that counts a chunk's tokens: wordllama's, which is Llama 2's.

    QMD counts with its embedding model's, which an endpoint does not offer.
    """
    from tokenizers import Tokenizer

    path = wordllama_folder() / "tokenizers" / "l2_supercat_tokenizer_config.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def chunk_text(text: str, count_tokens: Callable[[str], int]) -> list[str]:
    """Overlapping chunks of at most 900 tokens; none of a blank text.

    Source: `chunkDocumentByTokens` of QMD 2.8.3 (which counts UTF-16 units where this counts
    characters).
    """
    if not text.strip(JS_WHITESPACE):
        return []
    chunks: list[str] = []
    for start, end in cut(text, CHUNK_CHARACTERS, OVERLAP_CHARACTERS, WINDOW_CHARACTERS):
        chunks += _within_limit(text[start:end], count_tokens)
    return chunks


def _within_limit(text: str, count_tokens: Callable[[str], int]) -> Iterator[str]:
    # No tokenizer makes more tokens than bytes, but for one that marks the start.
    if len(text.encode()) < CHUNK_TOKENS or len(text) <= 1:
        yield text
        return
    tokens = count_tokens(text)
    if tokens <= CHUNK_TOKENS:
        yield text
        return
    per_token = len(text) / tokens
    size = max(1, min(len(text) - 1, int(CHUNK_TOKENS * per_token * 0.95)))
    overlap = min(size - 1, int(OVERLAP_CHARACTERS * per_token / 2))
    window = max(1, int(WINDOW_CHARACTERS * per_token / 2))
    for start, end in cut(text, size, overlap, window):
        yield from _within_limit(text[start:end], count_tokens)


def cut(text: str, size: int, overlap: int, window: int) -> list[tuple[int, int]]:
    """(start, end) of chunks of at most `size` characters, cut at the best break of the window.

    A break's score falls with the square of its distance from the full size, to 0.3 of it at
    `window` characters; breaks in fenced code do not count.
    """
    if len(text) <= size:
        return [(0, len(text))]
    places, scores = _breaks(text)
    spans: list[tuple[int, int]] = []
    start = 0
    while True:
        end = full = min(start + size, len(text))
        if full < len(text):
            best = -1.0
            near = slice(bisect_left(places, full - window), bisect_right(places, full))
            for place, score in zip(places[near], scores[near], strict=True):
                value = score * (1 - 0.7 * ((full - place) / window) ** 2)
                if value > best:
                    best, end = value, place
            if end <= start:
                end = full
        spans.append((start, end))
        if end >= len(text):
            return spans
        start = end - overlap if end - overlap > start else end


def _breaks(text: str) -> tuple[list[int], list[int]]:
    """Places in order where a text may be cut, and their scores."""
    scores: dict[int, int] = {}
    for pattern, score in BREAKS:
        for match in pattern.finditer(text):
            scores[match.start()] = max(score, scores.get(match.start(), 0))
    fences = list(FENCE.finditer(text))
    for number in range(0, len(fences), 2):
        start = fences[number].start()
        end = fences[number + 1].end() if number + 1 < len(fences) else len(text)
        for place in [place for place in scores if start < place < end]:
            del scores[place]
    places = sorted(scores)
    return places, [scores[place] for place in places]


# The cache


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qmd-finetune-mlx" / "vectors"


class VectorCache:
    """Vectors of one embedder by the digest of their text, in a SQLite file.

    If the embedder gives the probe another vector than before (a model was replaced under its name),
    the cache starts afresh.

    Raises:
        OSError: the file cannot be used.
    """

    def __init__(self, folder: Path, embedder: Embedder):
        digest = hashlib.sha256(embedder.identity.encode()).hexdigest()[:12]
        slug = re.sub(r"[^\w.]+", "-", embedder.name).strip("-")[-40:]
        self.path = folder / f"{slug}-{digest}.sqlite"
        folder.mkdir(parents=True, exist_ok=True)
        probe = embedder.embed([embedder.query_text(PROBE)])[0]
        with self._named_errors():
            self._database = sqlite3.connect(self.path, timeout=60)
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS vectors (digest BLOB PRIMARY KEY, vector BLOB NOT NULL)"
            )
        known = self.get([PROBE]).get(PROBE)
        if known is None or known.shape != probe.shape or known @ probe < 0.99:
            with self._named_errors(), self._database:
                self._database.execute("DELETE FROM vectors")
            self.put([PROBE], probe[None])

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(f"vector cache {self.path}: {error}; it may be deleted") from None

    @staticmethod
    def _key(text: str) -> bytes:
        return hashlib.sha256(text.encode()).digest()

    def get(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The vectors that are there, by text."""
        found = {}
        with self._named_errors():
            for text in texts:
                row = self._database.execute(
                    "SELECT vector FROM vectors WHERE digest = ?", (self._key(text),)
                ).fetchone()
                if row:
                    found[text] = np.frombuffer(row[0], dtype="<f4")
        return found

    def put(self, texts: Sequence[str], vectors: np.ndarray) -> None:
        """Save vectors in one transaction, so that a run that is cut off keeps those before."""
        rows = (
            (self._key(text), vector.astype("<f4").tobytes())
            for text, vector in zip(texts, vectors, strict=True)
        )
        with self._named_errors(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)

    def close(self) -> None:
        self._database.close()


# Nearest documents


class VectorIndex:
    """The vectors of a collection's chunks.

    Args:
        vectors: unit length, float32, (chunks, dimension).
        owners: the position in `ids` of each chunk's document, (chunks,).
    """

    def __init__(
        self, embedder: Embedder, ids: Sequence[str], vectors: np.ndarray, owners: np.ndarray
    ):
        self.embedder, self.ids, self.vectors, self.owners = embedder, ids, vectors, owners

    def nearest(self, queries: Sequence[str], limit: int = HITS) -> list[list[str]]:
        """For each query, vec or hyde line, the documents with the most similar chunks, best first.

        QMD takes the 60 nearest chunks, so long documents may leave fewer than `limit`. A query
        without any token finds nothing.
        """
        embedded = self.embedder.embed([self.embedder.query_text(query) for query in queries])
        rows = max(1, SIMILARITIES_AT_ONCE // max(1, len(self.vectors)))
        found: list[list[str]] = []
        for at in range(0, len(embedded), rows):
            batch = embedded[at : at + rows]
            similarities = batch @ self.vectors.T  # (queries, chunks)
            for query, row in zip(batch, similarities, strict=True):
                found.append(self._documents(row, limit) if query.any() else [])
        return found

    def _documents(self, similarities: np.ndarray, limit: int) -> list[str]:
        count = min(NEAREST_CHUNKS, len(similarities))
        chunks = np.argpartition(-similarities, count - 1)[:count]
        # Rounded, so that equal texts stay in order whatever the BLAS makes of the last digit.
        order = np.lexsort((chunks, -similarities[chunks].round(6)))
        owners = dict.fromkeys(self.owners[chunks[order]].tolist())
        return [self.ids[owner] for owner in list(owners)[:limit]]


def embed_documents(
    documents: Sequence[Document], embedder: Embedder, folder: Path | None = None
) -> VectorIndex:
    """Chunk and embed documents, or take their vectors from the cache.

    Args:
        folder: of the cache; default: `cache_folder()`.
    """
    tokenizer = None

    def count_tokens(text: str) -> int:
        nonlocal tokenizer  # loaded when the first long text needs it
        tokenizer = tokenizer or chunk_tokenizer()
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    progress = Progress(f"documents embedded by {embedder.name}", len(documents))
    parts, owners = [], []
    with closing(VectorCache(folder or cache_folder(), embedder)) as cache:
        for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
            texts = []
            batch = documents[start : start + DOCUMENTS_AT_ONCE]
            for owner, document in enumerate(batch, start):
                chunks = chunk_text(document.text, count_tokens)
                if not chunks and document.title.strip():
                    chunks = [""]  # some collections have documents that are a title only
                texts += [embedder.document_text(document.title, chunk) for chunk in chunks]
                owners += [owner] * len(chunks)
            vectors = cache.get(texts)
            missing = [text for text in dict.fromkeys(texts) if text not in vectors]
            if missing:
                made = embedder.embed(missing)
                cache.put(missing, made)
                vectors.update(zip(missing, made, strict=True))
                progress(start + len(batch))
            parts += [vectors[text] for text in texts]
    if not parts:
        raise ValueError("there is no text in the documents to embed")
    return VectorIndex(
        embedder,
        [document.id for document in documents],
        np.stack(parts).astype(np.float32, copy=False),
        np.array(owners, dtype=np.int32),
    )
