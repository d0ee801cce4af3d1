"""Command lines without the seconds that imports take: a process that has imported everything forks for each.

Each command is a process of its own, with its own arguments, environment, working directory, output and exit status.
What is read from the environment while a package is imported is as in the first process. Tests of start-up and of
signals start a fresh interpreter instead.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from threading import Timer
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIRST = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
"""Of the first process: what packages read when they are imported."""


def run_module(
    module: str,
    *arguments: object,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    limit_s: float | None = None,
) -> subprocess.CompletedProcess:
    """Do what `subprocess.run([sys.executable, "-m", module, ...], capture_output=True, text=True)` does.

    Args:
        limit_s: Seconds after which the process and all of its group are killed (SIGKILL); its status is then -9.
    """
    given = [str(one) for one in arguments]
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        request = {
            "module": module, "arguments": given, "cwd": str(cwd), "env": dict(os.environ if env is None else env),
            "out": str(out), "err": str(err),
        }  # fmt: skip
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        pid = json.loads(server.stdout.readline())
        killer = Timer(limit_s or 0, _kill, [pid])
        if limit_s is not None:
            killer.start()
        status = json.loads(server.stdout.readline())
        killer.cancel()
        return subprocess.CompletedProcess([module, *given], status, out.read_text(), err.read_text())


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


@functools.cache
def _server() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, **FIRST, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def serve() -> dict[str, Any]:
    """Fork for each request, and say how it ended; returns the request in the fork."""
    for line in sys.stdin:
        request = json.loads(line)
        if (child := os.fork()) == 0:
            return request
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


def become(request: Mapping[str, Any]) -> None:
    """Take on what the request says, as an interpreter that was started so."""
    import runpy

    os.setsid()
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for number, path in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        descriptor = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(descriptor, number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115 - the process's own
    sys.path[0:0] = [request["cwd"], *filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [request["module"], *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    import gc

    import transformers.models.llama.modeling_llama  # noqa: F401 - all of these are here to be imported

    import trace_hydra.capability.board
    import trace_hydra.models.tiny
    import trace_hydra.run  # noqa: F401

    gc.freeze()
    become(serve())
