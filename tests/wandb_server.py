"""A W&B server of some dozen lines on the loopback device, with the ways in which a real one fails.

It keeps what wandb-core uploads as the real one does: lines of files by offset, a summary, a configuration.
"""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HEALTHY, ERRORS, REFUSES_KEY, SILENT = "healthy", "errors", "refuses key", "silent"


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, *_):
        """Say nothing where a client went away in the middle."""


class Server:
    """Answers on `url` as `behaviour` says, which may change while it runs.

    Attributes:
        runs: Run id -> file name -> offset -> line, beside `config`, `summary` (JSON text) and `complete`.
        requests: What was asked for, in order.
    """

    def __init__(self, behaviour: str = HEALTHY, silent_about: str = ""):
        self.behaviour, self.silent_about = behaviour, silent_about
        self.runs: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []
        self.lock, self.closing = threading.Lock(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                server.answer(self)

            do_PUT = do_GET = do_POST

            def log_message(self, *_):
                pass

        self._http = _Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop: from now on the port refuses, and open connections end without a word."""
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def history(self, run_id: str) -> list[dict[str, Any]]:
        """Give the rows of a run's curves in the order in which they stand on the server."""
        lines = self.runs[run_id].get("wandb-history.jsonl", {})
        return [json.loads(lines[place]) for place in sorted(lines)]

    def answer(self, request: Any) -> None:
        """Answer one request."""
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        asked = json.loads(body) if request.path == "/graphql" else {}
        name = asked.get("query", "").split("(")[0].strip().split("{")[0].strip() or request.path
        self.requests.append(name)
        if self.closing.is_set():
            request.close_connection = True
            return
        behaviour = self.behaviour
        if behaviour == SILENT or (self.silent_about and self.silent_about in name):
            self.closing.wait(600)
            return
        if behaviour == ERRORS:
            return self._send(request, 500, {"error": "broken"})
        if behaviour == REFUSES_KEY:
            return self._send(request, 401, {"error": "user is not logged in"})
        with self.lock:
            if request.path == "/graphql":
                content = {"data": self._query(name, asked.get("variables") or {})}
            elif request.path.endswith("/file_stream"):
                content = self._file_stream(request.path.split("/")[-2], json.loads(body))
            else:
                content = {}
        self._send(request, 200, content)

    @staticmethod
    def _send(request: Any, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _query(self, name: str, variables: dict[str, Any]) -> Any:
        if "Viewer" in name:
            return {"viewer": {"id": "1", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": None}}
        if "ServerFeatures" in name:
            return {"serverInfo": {"features": []}}
        if "UpsertBucket" in name:
            inserted = variables["name"] not in self.runs
            run = self.runs.setdefault(variables["name"], {})
            run |= {key: variables[key] for key in ("config", "summaryMetrics") if variables.get(key)}
            return {"upsertBucket": {"bucket": self._bucket(variables["name"]), "inserted": inserted}}
        if "RunResumeStatus" in name:
            found = self._bucket(variables["name"]) if variables["name"] in self.runs else None
            return {"model": {"id": "p", "name": "trace_hydra", "entity": _ENTITY, "bucket": found}}
        if "CreateRunFiles" in name:
            files = [{"name": one, "uploadUrl": f"{self.url}/upload/{one}"} for one in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if "CreateArtifact " in name or name.endswith("CreateArtifact"):
            return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": _SEQUENCE}}}
        return {"project": None}

    def _bucket(self, run_id: str) -> dict[str, Any]:
        run = self.runs[run_id]
        lines = {kind: run.get(file, {}) for kind, file in _FILES.items()}
        tails = {kind: json.dumps([lines[kind][place] for place in sorted(lines[kind])][-1:]) for kind in lines}
        return {
            "id": run_id,
            "name": run_id,
            "displayName": run_id,
            "project": {"id": "p", "name": "trace_hydra", "entity": _ENTITY},
            "config": run.get("config", "{}"),
            "summaryMetrics": run.get("summary", "{}"),
            **{f"{kind}LineCount": len(lines[kind]) for kind in _FILES},
            "historyTail": tails["history"],
            "eventsTail": tails["events"],
            "tags": [],
            "notes": "",
            "wandbConfig": '{"t": 1}',
        }

    def _file_stream(self, run_id: str, sent: dict[str, Any]) -> Any:
        run = self.runs.setdefault(run_id, {})
        for name, part in (sent.get("files") or {}).items():
            if name == "wandb-summary.json":
                run["summary"] = part["content"][-1]
            else:
                lines = run.setdefault(name, {})
                lines.update(enumerate(part["content"], start=part["offset"]))
        if sent.get("complete") is not None:
            run["complete"] = sent["complete"]
        return {"exitcode": None, "limits": {}}


_SEQUENCE = {"id": "s", "latestArtifact": {"id": "a", "versionIndex": 0}}
_ENTITY = {"id": "1", "name": "me"}
_FILES = {"history": "wandb-history.jsonl", "events": "wandb-events.jsonl", "log": "output.log"}


@contextmanager
def serve(behaviour: str = HEALTHY, silent_about: str = ""):
    """Run a server for the length of a `with` block."""
    server = Server(behaviour, silent_about)
    try:
        yield server
    finally:
        server.close()
