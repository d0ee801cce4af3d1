"""One maker at a time, across processes and hosts, without flock (which shared file systems may lack or ignore).

A lock saves double work and no more: entries are published by rename, so two makers of one entry do no harm. It is the
set of files `<path>.<n>`, each the record of one process. To take it:

1. Read all of them. A record is dead if its process is seen to be gone (same host, boot and pid namespace), or if its
   file stayed the same for a lease by the observer's own monotonic clock. Wall clocks are never asked.
2. If all are dead, or none is there, create `<path>.<highest n + 1>` exclusively and complete (a hard link to a draft).
3. Read all again. Whoever finds nothing beside the own file but what was dead before, byte for byte, holds the lock and
   removes the dead; anyone else withdraws and waits. Of two who create at once, the later sees the earlier.

The holder beats: it counts up within its file. Putting a new file in its place instead could bring back a lock that
somebody overtook between look and write.
"""

import errno
import functools
import itertools
import json
import logging
import os
import platform
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

log = logging.getLogger(__name__)

_REMIND_S = 60.0
_RECORD_LIMIT = 4096
_JITTER = random.SystemRandom()  # the seeded generators belong to the run


@contextmanager
def hold(
    path: Path,
    *,
    what: str,
    lease_s: float = 60.0,
    beat_s: float = 10.0,
    poll_s: float = 0.5,
    notify: Callable[[str], None] | None = None,
    give_up: Callable[[], bool] | None = None,
) -> Iterator[bool]:
    """Hold a lock for a block; wait for it first if another process, thread or host holds it. Not re-entrant.

    Whoever waited has to look again whether there is still anything to make.

    Args:
        path: Base name of the lock's files; the folder is made.
        what: Begins the message of a waiting process ("stage 3 (FOMC)").
        lease_s: A holder that cannot be seen to be dead is taken for dead after this much silence; several `beat_s`.
        beat_s: The holder shows that it lives this often.
        poll_s: Longest pause between two looks.
        notify: Takes the message, at once and then every minute; by default it is logged.
        give_up: Asked after each pause; True ends the waiting.

    Yields:
        True if held, or if no lock can be had because the folder cannot be written (logged once); False if given up.
    """
    queue = _Queue(path, lease_s, beat_s, poll_s)
    said_at: float | None = None
    while (claim := queue.attempt()) is None:
        now = time.monotonic()
        if queue.blocker and (said_at is None or now - said_at >= _REMIND_S):
            said_at = now
            (notify or log.info)(f"{what} is being made by {queue.blocker}")
        time.sleep(poll_s * _JITTER.uniform(0.5, 1.0))
        if give_up is not None and give_up():
            yield False
            return
    with claim:
        yield True


def holder(path: Path) -> dict[str, Any] | None:
    """The record of a lock's holder: host, boot, pidns, pid, started, token, beat; {} if unreadable, None without any.

    Of several, the newest that is not known to be dead.
    """
    found: dict[int, _Seen] = {}
    with suppress(OSError):
        found = _read_all(path)
    records = [found[number].record for number in sorted(found, reverse=True)]
    return next((record for record in records if alive(record) is not False), records[0] if records else None)


def this_process() -> dict[str, Any]:
    """Describe this process, for `alive` to be asked about later."""
    return {**_place(), "pid": os.getpid(), "started": _started(os.getpid())}


def alive(record: dict[str, Any]) -> bool | None:
    """Whether the process of a record runs; None if that cannot be seen from here (another host, a damaged record)."""
    if any(record.get(key) != value for key, value in _place().items()):
        return None
    pid, started = record.get("pid"), record.get("started")
    if type(pid) is not int or pid < 1:
        return None
    try:
        now_started = _started(pid)
    except ProcessLookupError:
        return False
    return type(started) is not int or now_started is None or started == now_started


class _Seen(NamedTuple):
    """One lock file: what has to change to show life, and the record ({} if unreadable)."""

    sign: object
    record: dict[str, Any]


class _Queue:
    """A process that wants a lock, and for how long it has heard nothing from those before it."""

    def __init__(self, path: Path, lease_s: float, beat_s: float, poll_s: float):
        self.path, self.lease_s, self.beat_s, self.poll_s = path, lease_s, beat_s, poll_s
        self.blocker = ""
        self._silence: dict[int, tuple[object, float]] = {}
        self._looked_at = time.monotonic()

    def attempt(self) -> AbstractContextManager[object] | None:
        """Take the lock if nobody alive has it; entering keeps it, leaving releases it. None: wait."""
        try:
            found = _read_all(self.path)
            self._listen(found)
            for number in sorted(found, reverse=True):
                record = found[number].record
                if alive(record) is not False and self._silence[number][1] < self.lease_s:
                    who = f"{record.get('host')} process {record.get('pid')}" if record else "an unknown process"
                    self.blocker = f"{who}; waiting ({_file(self.path, number)})"
                    return None
            claim = _Claim(self.path, max(found, default=0) + 1, self.beat_s)
            return claim if claim.make() and claim.confirm(found) else None
        except OSError as error:
            _warn_unlocked(self.path.parent, error.strerror or str(error))
            return nullcontext()

    def _listen(self, found: dict[int, _Seen]) -> None:
        """Add the time since the last look to the silence of each file that is as it was.

        A long gap between looks counts as a short one: this process was suspended, and perhaps the holder with it.
        """
        now = time.monotonic()
        passed, self._looked_at = min(now - self._looked_at, 2 * self.poll_s), now
        before, self._silence = self._silence, {}
        for number, seen in found.items():
            sign, quiet_s = before.get(number, (None, 0.0))
            self._silence[number] = (seen.sign, quiet_s + passed if sign == seen.sign else 0.0)


class _Claim:
    """A lock file of this process; as a context manager it beats until it is left, then it is removed."""

    def __init__(self, path: Path, number: int, beat_s: float):
        pid = os.getpid()
        self.path, self.number, self.beat_s = path, number, beat_s
        self.file = _file(path, number)
        self.record = {**_place(), "pid": pid, "started": _started(pid), "token": uuid.uuid4().hex}
        self._stop = threading.Event()

    def make(self) -> bool:
        """Create the file; False if another process has that number, OSError if the folder cannot be written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f".{self.path.name}.{self.record['token']}")
        try:
            with draft.open("xb", buffering=0) as stream:
                self._write(stream, 0)
            return self._link(draft)
        finally:
            with suppress(OSError):
                draft.unlink()

    def confirm(self, dead: dict[int, _Seen]) -> bool:
        """Whether the file just made is the lock, beside `dead` as found before; otherwise it is withdrawn."""
        stands = False
        try:
            others = {number: seen for number, seen in _read_all(self.path).items() if not self._made(seen.record)}
            stands = self._is_own() and all(dead.get(number) == seen for number, seen in others.items())
        finally:
            self._remove(below=stands, own=not stands)
        return stands

    def __enter__(self) -> None:
        threading.Thread(target=self._beat, name=f"lock {self.path.name}", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        if os.getpid() == self.record["pid"]:  # a forked child leaves the block too
            self._stop.set()
            self._remove(below=True, own=True)

    def _link(self, draft: Path) -> bool:
        try:
            os.link(draft, self.file)
        except FileExistsError:
            return self._is_own()  # a server that gets a request twice says so of the link that it made itself
        except FileNotFoundError:  # a holder removed the draft
            return False
        except OSError:  # no hard links here: exclusive at least, and complete a moment later
            try:
                stream = self.file.open("xb", buffering=0)
            except FileExistsError:
                return False
            with stream:
                try:
                    self._write(stream, 0)
                except OSError:
                    self.file.unlink()
                    raise
        return True

    def _beat(self) -> None:
        """Count up until released or overtaken."""
        for beat in itertools.count(1):
            if self._stop.wait(self.beat_s):
                return
            try:
                with self.file.open("r+b", buffering=0) as stream:
                    if self._made(_parse(stream.read(_RECORD_LIMIT))):
                        self._write(stream, beat)
                        continue
            except FileNotFoundError:
                pass
            except OSError:
                continue  # a server that does not answer may do so at the next beat
            break
        if not self._stop.is_set():
            reason = "this process was silent for too long, or the file was removed"
            log.warning("lost the lock %s: %s. The work goes on; another may do it too.", self.file, reason)

    def _write(self, stream: BinaryIO, beat: int) -> None:
        """Write the record; a beat changes digits and no length, so a reader in between misreads nothing."""
        stream.seek(0)
        stream.write(f'{json.dumps(self.record)[:-1]}, "beat": {beat:>12}}}\n'.encode())
        os.fsync(stream.fileno())

    def _made(self, record: dict[str, Any]) -> bool:
        return record.get("token") == self.record["token"]

    def _is_own(self) -> bool:
        try:
            return self._made(_parse(_read(self.file)))
        except OSError:
            return False

    def _remove(self, *, below: bool, own: bool) -> None:
        """Remove the files below the own, drafts of killed processes among them, and then the own, if it is still that.

        The own goes last: while it is there nothing below it can hold. A living process whose draft goes tries again.
        """
        if not self._is_own():
            return
        try:
            if below:
                draft = re.compile(rf"\.{re.escape(self.path.name)}\.[0-9a-f]{{32}}")
                names = [name for name in os.listdir(self.path.parent) if draft.fullmatch(name)]
                names += [_file(self.path, number).name for number in _numbers(self.path) if number < self.number]
                for name in names:
                    with suppress(OSError):  # another user's in a sticky folder
                        self.path.with_name(name).unlink()
            if own:
                self.file.unlink(missing_ok=True)
        except OSError as error:
            log.warning("cannot remove the lock %s: %s", self.file, error.strerror or error)


def _file(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _numbers(path: Path) -> list[int]:
    """Numbers of the files that are there."""
    name = re.compile(rf"{re.escape(path.name)}\.([1-9][0-9]*)")
    with suppress(FileNotFoundError):
        return [int(match[1]) for match in map(name.fullmatch, os.listdir(path.parent)) if match]
    return []


def _read_all(path: Path) -> dict[int, _Seen]:
    """The lock's files by number; OSError if the folder cannot be listed."""
    found = {}
    for number in _numbers(path):
        file = _file(path, number)
        with suppress(FileNotFoundError):
            try:
                content = _read(file)
                found[number] = _Seen(content, _parse(content))
            except PermissionError:  # another user's; a beat changes its time, which is compared with itself only
                found[number] = _Seen(file.stat().st_mtime_ns, {})
    return found


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(_RECORD_LIMIT)
    except OSError as error:
        if error.errno == errno.ESTALE:  # removed on the server between open and read
            raise FileNotFoundError(error.errno, error.strerror, str(file)) from error
        raise


def _parse(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _place() -> dict[str, str]:
    """Where process ids mean the same: host, its boot, and the pid namespace ("" where the system does not say)."""
    boot = pidns = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        pidns = os.readlink("/proc/self/ns/pid")
    return {"host": platform.node(), "boot": boot, "pidns": pidns}


def _started(pid: int) -> int | None:
    """Start of a process in clock ticks since boot (field 22 of /proc/<pid>/stat); None where that cannot be read.

    Raises:
        ProcessLookupError: If there is no such process, or only its exit status, not yet fetched by its parent.
    """
    try:
        # The second field is the program's name in parentheses and may hold both.
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (OSError, ValueError):  # no /proc, gone, or hidden from other users
        with suppress(PermissionError, OverflowError):
            os.kill(pid, 0)
        return None
    if state in (b"Z", b"X"):
        raise ProcessLookupError(pid)
    return int(fields[18])


@functools.cache  # once for each folder and reason
def _warn_unlocked(folder: Path, reason: str) -> None:
    log.warning("no locks in %s (%s): what another process makes at the same time is made twice.", folder, reason)
