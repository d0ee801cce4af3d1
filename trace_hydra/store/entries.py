"""The artifact store: entries that exist whole or not at all, found by a hash of everything that decided them.

An entry is a folder `<root>/<kind>/<key>/` with a manifest that was written last. It is made in `<root>/drafts/`, on
the same file system, and renamed to its place; nothing in it changes afterwards but that files may be dropped.
"""

import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from trace_hydra.errors import StoreError
from trace_hydra.files import sync_folder, write_bytes
from trace_hydra.store import drafts, locks
from trace_hydra.store.manifest import MANIFEST, SCHEMA, describe, file_problem, look, sealed

log = logging.getLogger(__name__)

KINDS = ("stages", "answers", "capability", "partial")
KEY = re.compile(r"[0-9a-f]{8,64}")
"""What can be a key."""
_GONE = "gone-"
"""Beginning of the names of entries that are being removed."""


class DamagedEntry(StoreError):
    """An entry whose files are not those of its manifest; it has been set aside."""


class Entry:
    """A complete entry of a store.

    Attributes:
        kind: One of `KINDS`.
        key: Hash of what decided it.
        folder: Where its files lie.
        manifest: manifest.json.
    """

    def __init__(self, store: "Store", kind: str, key: str, manifest: Mapping[str, Any]):
        self.store, self.kind, self.key, self.manifest = store, kind, key, manifest
        self.folder = store.folder(kind, key)
        self._sound: set[str] = set()

    @property
    def name(self) -> str:
        """`<kind>/<key>`."""
        return f"{self.kind}/{self.key}"

    @property
    def facts(self) -> Mapping[str, Any]:
        """What is told about the entry beside its files, such as what a stage cost."""
        return self.manifest["facts"]

    @property
    def uses(self) -> Sequence[str]:
        """Names of the entries it was made from."""
        return self.manifest["uses"]

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(one["size"] for one in self.manifest["files"].values())

    def has(self, name: str) -> bool:
        """Tell whether the file is there; weights may have been dropped."""
        return name in self.manifest["files"]

    def file(self, name: str) -> Path:
        """Return a file whose size and hash are those of the manifest; it is hashed once a process.

        Raises:
            DamagedEntry: If they are not; the whole entry has been set aside.
        """
        path, described = self.folder / name, self.manifest["files"].get(name)
        if name not in self._sound:
            problem = file_problem(path, described) if described else f"manifest.json does not name {name}"
            if problem is not None:
                now = self.store.find(self.kind, self.key)
                if now is not None and now.manifest == self.manifest:  # no other process dropped or made it meanwhile
                    self.store.set_aside(self.kind, self.key, problem)
                raise DamagedEntry(f"{self.folder}: {problem}. It is not used, and made again.")
            self._sound.add(name)
        return path

    def json(self, name: str) -> Any:
        """Read a JSON file of the entry.

        Raises:
            DamagedEntry: As `file`.
        """
        return json.loads(self.file(name).read_text(encoding="utf-8"))

    def problems(self) -> list[str]:
        """Check every file against the manifest; sets nothing aside."""
        found = [file_problem(self.folder / name, one) for name, one in self.manifest["files"].items()]
        return [problem for problem in found if problem is not None]


class Store:
    """Entries below a folder; any number of processes and hosts may use it at once.

    Args:
        root: `paths.store`; made if it can be. One that cannot be written is only read.
    """

    def __init__(self, root: Path):
        self.root = root
        self.writable = self._probe()
        if self.writable:
            self._sweep_drafts()

    def folder(self, kind: str, key: str) -> Path:
        """Say where an entry lies.

        Raises:
            StoreError: If it is no kind or no key.
        """
        if kind not in KINDS or not KEY.fullmatch(key):
            raise StoreError(f"{kind}/{key} names no entry of a store; a key is a hash of hexadecimal digits.")
        return self.root / kind / key

    def find(self, kind: str, key: str) -> Entry | None:
        """Look an entry up. A damaged one is set aside; hashes are compared when a file is read.

        Raises:
            StoreError: If it was written by a version that this one cannot read.
        """
        folder, before = self.folder(kind, key), None
        while True:
            seen, manifest, problem = look(folder, kind, key)
            if problem is None:
                return None if manifest is None else Entry(self, kind, key, manifest)
            if seen == before:  # the same twice: it is not that another process puts, drops or removes it right now
                self.set_aside(kind, key, problem)
                return None
            before = seen

    def entries(self, kind: str) -> Iterator[Entry]:
        """Go through the entries of a kind, by key; damaged ones are set aside."""
        folder = self.root / kind
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if KEY.fullmatch(path.name) and (entry := self.find(kind, path.name)) is not None:
                yield entry

    def publish(
        self,
        kind: str,
        key: str,
        write: Callable[[Path], Mapping[str, str] | None],
        *,
        inputs: Mapping[str, Any],
        versions: Mapping[str, str],
        uses: Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
        needs: int | None = None,
    ) -> Entry | None:
        """Make an entry, unless a sound one came meanwhile.

        Args:
            kind: One of `KINDS`.
            key: Hash of `inputs`.
            write: Fills the folder it is given; may return the SHA-256 of files it has hashed.
            inputs: What the key covers, readable; nothing of this machine.
            versions: Package -> version.
            uses: Names of the entries it was made from.
            facts: Small JSON beside the files.
            needs: Bytes it takes, for the message if there is no room.

        Returns:
            The entry; None if the store cannot be written.

        Raises:
            StoreError: If there is no room, or writing fails; nothing is left, and what was there before is unchanged.
        """
        if not self.writable:
            return None
        place = self.folder(kind, key)
        draft = None
        try:
            draft = drafts.begin(self.root, f"{kind}-{key}")
            known = write(draft) or {}
            manifest = {
                "schema": SCHEMA, "kind": kind, "key": key, "inputs": inputs, "uses": list(uses),
                "facts": dict(facts or {}), "files": describe(draft, known), "versions": dict(versions),
            }  # fmt: skip
            write_bytes(sealed(manifest), draft / MANIFEST)
            self._rename(draft, place, kind, key)
        except (OSError, StoreError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            raise self._no_room(place, cause, needs) from error
        finally:
            if draft is not None:
                shutil.rmtree(draft, ignore_errors=True)
        return self.find(kind, key)

    def drop(self, entry: Entry, names: Sequence[str]) -> None:
        """Take files out of an entry for good; its manifest says so from then on."""
        gone = [name for name in names if entry.has(name)]
        if not gone or not self.writable:
            return
        files = {name: one for name, one in entry.manifest["files"].items() if name not in gone}
        dropped = sorted({*entry.manifest.get("dropped", ()), *gone})
        manifest = {**entry.manifest, "files": files, "dropped": dropped}
        write_bytes(sealed(manifest), entry.folder / MANIFEST)
        entry.manifest = json.loads((entry.folder / MANIFEST).read_bytes())
        for name in gone:
            (entry.folder / name).unlink(missing_ok=True)

    def discard(self, kind: str, key: str) -> None:
        """Remove an entry: renamed away first, so that nobody sees a part of it."""
        gone = self.root / "drafts" / f"{_GONE}{uuid.uuid4().hex[:12]}"
        try:
            gone.parent.mkdir(parents=True, exist_ok=True)
            os.rename(self.folder(kind, key), gone)
        except OSError:
            return
        shutil.rmtree(gone, ignore_errors=True)

    def set_aside(self, kind: str, key: str, reason: str) -> None:
        """Move an entry that cannot be trusted to `damaged/`, and say so."""
        place = self.root / "damaged" / f"{kind}-{key}-{uuid.uuid4().hex[:6]}"
        where = f"it is now {place}"
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            os.rename(self.folder(kind, key), place)
        except FileNotFoundError:
            return  # another process did that first
        except OSError as error:
            where = f"it could not be moved ({error.strerror})"
        log.warning("store: %s/%s is damaged: %s; %s, and is made again.", kind, key, reason, where)

    def lock(
        self, kind: str, key: str, what: str, give_up: Callable[[], bool] | None = None
    ) -> AbstractContextManager[bool]:
        """Hold the right to make an entry, see `locks.hold`; of a store that is only read, everybody does."""
        if not self.writable:
            return nullcontext(True)
        return locks.hold(self.root / "locks" / f"{kind}-{key}", what=what, give_up=give_up)

    def note_run(self, directory: Path, uses: Sequence[str], *, finished: bool) -> None:
        """Note which entries a run directory stands on; of this machine, for `ls`, `gc` and `export`."""
        if self.writable:
            place = {"host": platform.node(), "directory": str(directory.resolve())}
            note = {**place, "uses": list(uses), "finished": finished}
            name = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
            write_bytes(json.dumps(note).encode(), self.root / "runs" / f"{name}.json")

    def _probe(self) -> bool:
        probe = self.root / "drafts" / f"probe-{uuid.uuid4().hex[:12]}"
        try:
            probe.mkdir(parents=True)
            probe.rmdir()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._no_room(self.root, error, None) from error
            log.warning(
                "paths.store=%s cannot be written (%s): what it holds is used, nothing is added, and a run that is "
                "killed begins again. Set paths.store to a folder of yours.",
                self.root,
                error.strerror,
            )
            return False
        return True

    def _rename(self, draft: Path, place: Path, kind: str, key: str) -> None:
        sync_folder(draft)
        place.parent.mkdir(parents=True, exist_ok=True)
        for last in (False, True):
            try:
                os.rename(draft, place)
                break
            except OSError as error:
                if last or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if self.find(kind, key) is not None:  # made by someone else meanwhile; if damaged, now set aside
                    return
        sync_folder(place.parent)

    def _sweep_drafts(self) -> None:
        """Remove what processes that are dead were writing."""
        for draft in (self.root / "drafts").iterdir():
            if draft.name.startswith(_GONE) or drafts.alive(draft) is False:
                shutil.rmtree(draft, ignore_errors=True)

    def _no_room(self, place: Path, error: OSError, needs: int | None) -> StoreError:
        wanted = f" It needs {needs:,} bytes" if needs is not None else ""
        try:
            free = f"{shutil.disk_usage(self.root).free:,} bytes are free"
        except OSError:
            free = "how much is free is not known"
        return StoreError(
            f"cannot write {place}: {error.strerror or error}.{wanted + '; ' if wanted else ' '}{free}. Free space "
            "(python -m trace_hydra.store gc), set store.keep=last, or change paths.store; the same command then goes "
            "on from the last checkpoint."
        )
