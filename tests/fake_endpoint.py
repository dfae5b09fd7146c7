"""A loopback chat endpoint whose answers, errors and delays a test decides.

It implements OpenAI's chat completions and the messages of the Anthropic API.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Act:
    """The response to one request: an answer with `text`, unless another field changes it."""

    text: str | None = ""
    status: int = 200
    body: str | None = None  # raw body instead of an answer in the protocol's form
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False  # close the connection after half of the body
    cut_off: bool = False  # the token limit was reached


# (query or topic, how often it has been asked, request headers) → response
Behave = Callable[[str, int, dict], Act]


class ChatEndpoint(ThreadingHTTPServer):
    """Records requests in `asked`, `bodies` and `headers`. Every answer reports 100 tokens in, 50 out."""

    daemon_threads = True

    def __init__(self, behave: Behave):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = behave
        self.lock = threading.Lock()
        self.times: Counter[str] = Counter()
        self.asked: list[str] = []
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.answered = self.at_once = self.most_at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *args: object) -> None:
        """Ignore clients that hang up: tests do."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatEndpoint

    def log_message(self, *args: object) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        what = text.splitlines()[-1].partition(": ")[2]
        headers = {name.lower(): value for name, value in self.headers.items()}
        with server.lock:
            server.times[what] += 1
            server.asked.append(what)
            server.bodies.append(body)
            server.headers.append(headers)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            self.answer(server.behave(what, server.times[what], headers))
        finally:
            with server.lock:
                server.at_once -= 1

    def answer(self, act: Act) -> None:
        if act.body is not None:
            raw = act.body.encode()
        elif self.path == "/v1/chat/completions":
            raw = json.dumps(completion(act)).encode()
        elif self.path == "/v1/messages":
            raw = json.dumps(message(act)).encode()
        else:
            raise ValueError(f"no such path: {self.path}")
        self.send_response(act.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        for name, value in act.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw[: len(raw) // 2] if act.drop else raw)
        self.close_connection = self.close_connection or act.drop
        self.server.answered += act.status == 200 and not act.drop


def completion(act: Act) -> dict:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": act.text},
        "finish_reason": "length" if act.cut_off else "stop",
    }
    return {
        "object": "chat.completion",
        "choices": [choice],
        "usage": {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150},
    }


def message(act: Act) -> dict:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": act.text}],
        "stop_reason": "max_tokens" if act.cut_off else "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 100, "output_tokens": 50},
    }
