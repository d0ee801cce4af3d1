"""A chat endpoint for tests, on loopback, that does what it is told."""

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from trace_hydra.capability.client import ChatClient

Answer = tuple[int, dict[str, str], bytes] | None
"""Status, headers, body; None: say nothing until the client has gone."""


def completion(text: str | None, num_in: int = 100, num_out: int = 10, **message: Any) -> Answer:
    """What a chat model answers."""
    content = {
        "id": "1",
        "object": "chat.completion",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, **message}}
        ],
        "usage": {"prompt_tokens": num_in, "completion_tokens": num_out, "total_tokens": num_in + num_out},
    }
    return 200, {}, json.dumps(content).encode()


def failure(status: int, message: str = "no", headers: dict[str, str] | None = None, code: str | None = None) -> Answer:
    """How OpenAI-compatible endpoints report an error."""
    return status, headers or {}, json.dumps({"error": {"message": message, "code": code}}).encode()


class ChatServer:
    """Base URL and what came in; `script` maps (number of the request from 0, its body) to an answer."""

    def __init__(self, script: Callable[[int, dict[str, Any]], Answer]):
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.at_once = self.most_at_once = 0
        self.url = ""

    def answer(self, body: dict[str, Any], key: str | None) -> Answer:
        """Note a request and look its answer up."""
        with self.lock:
            number = len(self.requests)
            self.requests.append(body)
            self.keys.append(key)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return self.script(number, body)
        finally:
            with self.lock:
                self.at_once -= 1


@contextmanager
def serving(script: Callable[[int, dict[str, Any]], Answer]):
    """Serve on a free port."""
    chat = ChatServer(script)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = chat.answer(body, self.headers.get("Authorization"))
            if answer is None:
                chat.closing.wait(30)
                return
            status, headers, content = answer
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(content)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    chat.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield chat
    finally:
        chat.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def question(text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


def client(url: str, folder: Any, **changes: Any) -> ChatClient:
    """A client in haste."""
    settings: dict[str, Any] = {
        "name": "test",
        "base_url": url,
        "model": "some-model",
        "api_key_env": None,
        "temperature": 0.0,
        "max_tokens": 10,
        "timeout_s": 10.0,
        "retries": 2,
        "backoff_s": 0.01,
        "concurrency": 1,
        "requests_per_minute": None,
        "max_usd": None,
        "usd_per_million_input": None,
        "usd_per_million_output": None,
        "cache": str(folder),
    }
    return ChatClient(**{**settings, **changes})
