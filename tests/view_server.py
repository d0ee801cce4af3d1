"""What of a W&B server keeps workspaces and reports, on the loopback device, and the ways in which it fails."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STATUS = {401: "user is not logged in", 403: "permission denied", 404: "not found", 429: "rate limit exceeded"}
NO_PROJECT, SILENT, TRUNCATED, FOREIGN, ERRORS, EMPTY = (
    "no project",
    "silent",
    "truncated",
    "foreign",
    "errors",
    "empty",
)


class Views:
    """Answers on `url`.

    Attributes:
        stored: Id -> what was written: type, name, title, description, spec.
        asked: (operation, variables) in order.
        fault: None, an HTTP status, or one of the words above.
        at: The operation that goes wrong; "" means all.
    """

    def __init__(self, fault: Any = None, at: str = ""):
        self.fault, self.at = fault, at
        self.stored: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.authorizations: set[str] = set()
        self.closing = threading.Event()
        views = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                views.answer(self)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, request: Any) -> None:
        body = json.loads(request.rfile.read(int(request.headers.get("Content-Length") or 0)) or "{}")
        operation = body.get("query", "").split("(")[0].split()[-1] if body.get("query") else request.path
        variables = body.get("variables") or {}
        self.asked.append((operation, variables))
        self.authorizations.add(request.headers.get("Authorization") or "")
        fault = self.fault if self.at in ("", operation) else None
        if fault == SILENT:
            self.closing.wait(60)
            request.close_connection = True
        elif fault == TRUNCATED:
            self._send(request, 200, b'{"data": {"project": {"id": "UHJ', announced=400)
            request.close_connection = True
        elif fault == FOREIGN:
            self._send(request, 200, b"<html>Sign in to the guest network</html>", kind="text/html")
        elif isinstance(fault, int):
            problem = {"errors": [{"message": STATUS.get(fault, "internal error")}]}
            self._send(request, fault, json.dumps(problem).encode())
        elif fault == ERRORS:
            problem = {"data": None, "errors": [{"message": "could not parse spec\n\x1b[31mof view", "path": ["view"]}]}
            self._send(request, 200, json.dumps(problem).encode())
        elif fault == EMPTY:
            self._send(request, 200, b'{"data": {}}' if operation == "UpsertView" else b'{"data": {"project": {}}}')
        else:
            known = fault != NO_PROJECT
            self._send(request, 200, json.dumps({"data": self._data(operation, variables, known)}).encode())

    @staticmethod
    def _send(
        request: Any, status: int, data: bytes, *, announced: int | None = None, kind: str = "application/json"
    ) -> None:
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(announced or len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _data(self, operation: str, asked: dict[str, Any], known: bool) -> Any:
        if operation == "Project":
            return {"project": {"id": "UHJvamVjdDox", "internalId": "4711"} if known else None}
        if operation == "Views":
            place = (asked["type"], asked["name"])
            same = [one for one, view in self.stored.items() if (view["type"], view["name"]) == place]
            nodes = [{"node": {"id": one, "name": self.stored[one]["name"]}} for one in same]
            return {"project": {"allViews": {"edges": nodes}}}
        assert operation == "UpsertView", operation
        identifier = asked.get("id") or f"Vmlldzo{len(self.stored)}=="  # a name alone does not find an earlier view
        self.stored[identifier] = {key: asked[key] for key in ("type", "name", "title", "description", "spec")}
        return {"upsertView": {"view": {"id": identifier, "name": asked["name"]}}}


@contextmanager
def serve_views(fault: Any = None, at: str = ""):
    """Run a server for the length of a `with` block."""
    views = Views(fault, at)
    try:
        yield views
    finally:
        views.close()
