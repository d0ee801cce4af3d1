"""What a job leaves in its folder about how it went: error.txt and status.json. No torch here."""

import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trace_hydra import __version__, ranks
from trace_hydra.errors import Stopped, StoreError, TraceHydraError
from trace_hydra.files import put_bytes, write_bytes
from trace_hydra.heartbeat import STATUS, Heartbeat
from trace_hydra.interrupt import Interrupts
from trace_hydra.store import locks
from trace_hydra.terminal import plain

HALT = "TRACE_HYDRA_SWEEP_HALT"
"""Environment variable: the file whose presence keeps further jobs of a sweep from starting. Processes that a launcher
starts inherit it, so it works with every launcher on a shared file system."""
ERROR = "error.txt"
_STOPPED = (75, 130)
"""Exit codes of processes that a signal stopped."""
_SENT_BACK = ContextVar("sent_back", default=False)


class NotStarted(TraceHydraError):
    """A job that did not start because its sweep was halted."""


class JobEnded(TraceHydraError):
    """A job that failed or was stopped; its own error need not survive the way from another process."""


@contextmanager
def watched(directory: Path, arguments: Sequence[str], *, fail_fast: bool) -> Iterator[None]:
    """Keep error.txt and status.json of a job; what it raises passes through.

    Args:
        directory: The run's; exists.
        arguments: Overrides that make this job alone.
        fail_fast: A failure halts the sweep.

    Raises:
        NotStarted: If the sweep was halted before.
    """
    from trace_hydra import entry  # what only reads a job's files needs no omegaconf

    halt = halt_file()
    with Interrupts():  # from the start: imports alone take seconds, and the run's own come later
        if halt is not None and halt.exists():
            raise NotStarted("the sweep was halted before this job started.")
        again = arguments if halt else entry.typed() or arguments
        heart = Heartbeat(directory, again, halt.name if halt else None)
        try:
            if ranks.is_first():
                (directory / ERROR).unlink(missing_ok=True)
            with heart:
                yield
        except ranks.FailedElsewhere as other:  # that process has said why
            heart.end("stopped" if other.code in _STOPPED else "failed")
            raise
        except (Stopped, KeyboardInterrupt):
            heart.end("stopped", sent_back=sent_back())
            if halt is not None and not sent_back():
                put_up(halt, "stopped")
            raise
        except BaseException as error:
            write_error(directory, error, arguments)
            heart.end("failed")
            if halt is not None and fail_fast:
                put_up(halt, "failed")
            raise
        heart.end("done")


@contextmanager
def sent_back_when_stopped() -> Iterator[None]:
    """Within a launcher's process: a job that a signal stops is its launcher's to requeue, and `Stopped` reaches it."""
    token = _SENT_BACK.set(True)
    try:
        yield
    finally:
        _SENT_BACK.reset(token)


def sent_back() -> bool:
    """Say whether a stopped job goes back to its queue, so that the sweep goes on; not once the sweep was halted."""
    halt = halt_file()
    return _SENT_BACK.get() and not (halt is not None and halt.exists())


def halt_file() -> Path | None:
    """Say which file halts the sweep this process works for; None outside of sweeps."""
    given = os.environ.get(HALT)
    return Path(given) if given else None


def put_up(halt: Path, reason: str) -> None:
    """Keep further jobs of the sweep from starting."""
    with suppress(StoreError):
        write_bytes(reason.encode(), halt)


def status(directory: Path, halt: Path) -> Mapping[str, Any]:
    """Read how a job of the sweep went.

    Returns:
        `state` running, done, failed or stopped, and the process; {} if it did not start within this sweep. "running"
        has become "stopped" where the process is known to be gone.
    """
    try:
        found = json.loads((directory / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or found.get("sweep") != halt.name:
        return {}
    gone = found["state"] == "running" and locks.alive(found["process"]) is False
    return {**found, "state": "stopped" if gone else found["state"]}


def send(directory: Path, halt: Path, number: int) -> None:
    """Send a signal to a job that runs in another process of this machine."""
    found = status(directory, halt)
    process = found.get("process", {})
    if found.get("state") == "running" and process.get("pid") != os.getpid() and locks.alive(process) is True:
        with suppress(ProcessLookupError):
            os.kill(process["pid"], number)


def write_error(directory: Path, error: BaseException, arguments: Sequence[str]) -> None:
    """Write error.txt: message, command, traceback. A full disk must not hide the error, so nothing is raised."""
    lines = [
        f"{type(error).__name__}: {error}",
        "",
        f"command:   python -m trace_hydra {shlex.join(arguments)}",
        f"folder:    {directory}",
        f"when:      {datetime.now(UTC).isoformat(timespec='seconds')}, trace_hydra {__version__}",
        "",
        *(part.rstrip("\n") for part in traceback.format_exception(error)),
    ]
    with suppress(StoreError):
        put_bytes(("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"), directory / ERROR)


def report_end(error: BaseException, directory: Path) -> None:
    """Say on stderr at once how a job of a sweep ended."""
    if isinstance(error, Stopped | KeyboardInterrupt):
        text = f"stopped: {directory}"
    else:
        text = f"job failed: {error or type(error).__name__}\n  traceback: {directory / ERROR}"
    print(plain(f"trace_hydra: {text}", keep="\n"), file=sys.stderr, flush=True)
