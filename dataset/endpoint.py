"""Chat endpoints: one request, and retries, pauses and giving up around it."""

import asyncio
import contextlib
import json
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx2

ANTHROPIC_MAX_TOKENS = 1024  # the API requires a limit; an expansion has about 150 tokens
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between attempts, doubled each time
GIVE_UP = 3  # stop after this many texts in a row without a reply


class NoReply(Exception):
    """A request failed; `retry` is True if it may succeed later."""

    def __init__(self, reason: str, retry: bool, after: float | None = None):
        super().__init__(" ".join(reason.split())[:300])
        self.retry = retry
        self.after = after  # seconds that the endpoint asks to wait; None if it does not


class Stopped(Exception):
    """The run was stopped, by the user or because the endpoint gives no replies."""


@dataclass(frozen=True)
class Reply:
    text: str
    cut_off: bool
    tokens_in: int
    tokens_out: int


Send = Callable[[str], Awaitable[Reply]]


def seconds_to_wait(header: str | None) -> float | None:
    """A Retry-After header (seconds or a date) as seconds from now; None if it is neither.

    >>> seconds_to_wait("7"), seconds_to_wait("soon")
    (7.0, None)
    """
    try:
        seconds = float(header or "")
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header or "").timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def refusal(status: int, headers: Mapping[str, str], text: str) -> NoReply:
    """The error for an HTTP status other than success."""
    retry = status in (408, 429) or status >= 500
    return NoReply(f"status {status}: {text}", retry, seconds_to_wait(headers.get("retry-after")))


def hider(key: str) -> Callable[[str], str]:
    """A function that masks the key in whatever an endpoint returns, before it is saved or printed."""
    return lambda text: text.replace(key, "[key]") if key else text


def openai_sender(url: str, model: str, key: str, options: dict) -> Send:
    """A sender for endpoints with OpenAI's chat completions.

    Args:
        key: API key; empty to send none.
        options: more fields of the request.

    Raises:
        ValueError: the URL is invalid.
    """
    hide = hider(key)
    address = f"{url.rstrip('/')}/chat/completions"
    try:
        valid = httpx2.URL(address).scheme in ("http", "https")
    except httpx2.InvalidURL:
        valid = False
    if not valid:
        raise ValueError(f"--url {url}: not a URL such as http://localhost:8080/v1")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    client = httpx2.AsyncClient(headers=headers, timeout=None)  # `Endpoint` sets the timeout

    async def send(text: str) -> Reply:
        body = {"model": model, "messages": [{"role": "user", "content": text}]}
        try:
            response = await client.post(address, json=body | options)
        except httpx2.RequestError as error:
            raise NoReply(f"{address}: {error or type(error).__name__}", retry=True) from None
        answer = hide(response.text)
        if not response.is_success:
            raise refusal(response.status_code, response.headers, answer)
        try:
            value = json.loads(answer)
            choice, usage = value["choices"][0], value.get("usage") or {}
            return Reply(
                (choice["message"]["content"] or "").strip(),
                choice.get("finish_reason") == "length",
                int(usage.get("prompt_tokens") or 0),
                int(usage.get("completion_tokens") or 0),
            )
        except (ValueError, LookupError, TypeError, AttributeError):
            raise NoReply(f"not a chat completion: {answer!r}", retry=True) from None

    return send


def anthropic_sender(url: str | None, model: str, key: str, options: dict) -> Send:
    """A sender for the Anthropic API, through its optional library.

    Raises:
        ValueError: the library is not installed, or the key is empty.
    """
    try:
        import anthropic  # not in requirements.txt
    except ImportError:
        raise ValueError("--api anthropic needs its library: pip install anthropic") from None
    if not key:
        raise ValueError("--api anthropic needs a key: set ANTHROPIC_API_KEY in the environment")
    hide = hider(key)
    client = anthropic.AsyncAnthropic(api_key=key, base_url=url, max_retries=0)

    async def send(text: str) -> Reply:
        try:
            answer = await client.messages.create(
                model=model,
                max_tokens=ANTHROPIC_MAX_TOKENS,
                messages=[{"role": "user", "content": text}],
                extra_body=options,
            )
            reply = "".join(block.text for block in answer.content if block.type == "text")
            used, cut_off = answer.usage, answer.stop_reason == "max_tokens"
            return Reply(hide(reply).strip(), cut_off, used.input_tokens, used.output_tokens)
        except anthropic.APIStatusError as error:
            response = error.response
            raise refusal(response.status_code, response.headers, hide(error.message)) from None
        except anthropic.APIError as error:
            raise NoReply(hide(f"{error} {error.__cause__ or ''}"), retry=True) from None
        except (ValueError, TypeError, AttributeError):
            raise NoReply("not a message of the Anthropic API", retry=True) from None

    return send


class Endpoint:
    """Sends with retries; sets `stop` when the endpoint seems to be dead."""

    def __init__(self, send: Send, retries: int, timeout: float):
        self.send, self.retries, self.timeout = send, retries, timeout
        self.stop = asyncio.Event()
        self.free_at = 0.0  # time before which the endpoint wants no request
        self.failed_in_a_row = 0
        self.count: Counter[str] = Counter()  # repeated, tokens in, tokens out

    async def pause(self, seconds: float) -> None:
        """Wait; raise Stopped at once if the run is stopped."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), seconds)
        if self.stop.is_set():
            raise Stopped

    async def ask(self, text: str) -> Reply:
        """Send a text and return the reply.

        Raises:
            NoReply: the request was refused, or all retries failed.
            Stopped: `stop` is set.
        """
        for attempt in range(self.retries + 1):
            await self.pause(self.free_at - time.monotonic())
            try:
                async with asyncio.timeout(self.timeout):
                    reply = await self.send(text)
            except TimeoutError:
                failure = NoReply(f"no answer within {self.timeout:g} s", retry=True)
            except NoReply as error:
                failure = error
            else:
                self.failed_in_a_row = 0
                self.count["tokens in"] += reply.tokens_in
                self.count["tokens out"] += reply.tokens_out
                return reply
            if not failure.retry or attempt == self.retries:
                break
            self.count["repeated"] += 1
            if failure.after is None:
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt)
                await self.pause(wait * random.uniform(0.75, 1.25))
            else:
                self.free_at = max(self.free_at, time.monotonic() + failure.after)
        self.failed_in_a_row += 1
        if self.failed_in_a_row >= GIVE_UP:
            self.stop.set()
        raise failure
