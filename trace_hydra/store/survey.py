"""What lies in a store and who uses it, looked at without changing anything. Loads no torch."""

import json
import logging
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trace_hydra.errors import StoreError
from trace_hydra.store import locks
from trace_hydra.store.entries import KEY, KINDS
from trace_hydra.store.manifest import MANIFEST, file_problem, manifest_problem, size_of

log = logging.getLogger(__name__)

OTHERS = ("models", "drafts", "damaged", "tokens")
"""Folders of a store that hold no entries: base models, entries being written or set aside, tokens of data sets."""


@dataclass(frozen=True)
class Item:
    """An entry as it lies there."""

    kind: str
    key: str
    folder: Path
    manifest: Mapping[str, Any]
    """{} if it cannot be read."""
    problem: str | None
    """What can be seen to be wrong without hashing."""

    @property
    def name(self) -> str:
        """`<kind>/<key>`."""
        return f"{self.kind}/{self.key}"

    @property
    def size(self) -> int:
        """Bytes of its files, as the manifest has them; of the folder where there is none."""
        files = self.manifest.get("files")
        return sum(one["size"] for one in files.values()) if files is not None else folder_size(self.folder)

    @property
    def uses(self) -> Sequence[str]:
        """Names of the entries it was made from."""
        return self.manifest.get("uses", ())

    @property
    def facts(self) -> Mapping[str, Any]:
        """Small JSON beside its files."""
        return self.manifest.get("facts", {})

    @property
    def dropped(self) -> Sequence[str]:
        """Files that were taken out for good."""
        return self.manifest.get("dropped", ())

    @property
    def made(self) -> float:
        """When its manifest was written, in seconds since the epoch; now if that cannot be read."""
        return changed(self.folder / MANIFEST)

    def what(self) -> str:
        """Say what it is, in a few words."""
        inputs = self.manifest.get("inputs", {})
        facts = self.facts
        if self.kind == "stages":
            run = inputs.get("run", {})
            parts = (
                str(run.get(node, {}).get("_target_", "?")).split(".")[-1] for node in ("model", "method", "tuning")
            )
            return f"{facts.get('task', '?')}: {' '.join(parts)}"
        if self.kind == "answers":
            return f"row {facts.get('row', '?')}, {facts.get('task', '?')}"
        if self.kind == "capability":
            return f"row {facts.get('row', '?')}, {facts.get('set', '?')}"
        return f"stage {str(inputs.get('stage', '?'))[:8]}, {facts.get('at', '?')}"

    def problems(self) -> list[str]:
        """Hash every file and compare with the manifest."""
        if self.problem is not None:
            return [self.problem]
        found = (file_problem(self.folder / name, one) for name, one in self.manifest["files"].items())
        return [problem for problem in found if problem is not None]


@dataclass(frozen=True)
class Note:
    """A run directory that stands on entries."""

    path: Path
    host: str
    directory: str
    uses: frozenset[str]
    stages: tuple[str, ...]
    """Names of its stages' entries, in order."""
    finished: bool

    @property
    def gone(self) -> bool:
        """Whether the run directory is known to be gone; those of other hosts cannot be seen from here."""
        return self.host == platform.node() and not Path(self.directory).is_dir()


@dataclass(frozen=True)
class Survey:
    """A store at one moment."""

    root: Path
    items: Mapping[str, Item]
    """By name, in the order of kinds and keys."""
    notes: Sequence[Note]
    """Of run directories that are not known to be gone."""
    gone: Sequence[Note]
    locked: Mapping[str, Mapping[str, Any]]
    """`<kind>/<key>` -> record of a holder that is not known to be dead."""

    def runs_of(self, name: str) -> list[Note]:
        """List the runs that stand on an entry."""
        return self._runs.get(name, [])

    @cached_property
    def _runs(self) -> Mapping[str, list[Note]]:  # asked for every entry; going through all notes each time adds up
        found: dict[str, list[Note]] = {}
        for note in self.notes:
            for name in note.uses:
                found.setdefault(name, []).append(note)
        return found

    def users_of(self, name: str) -> list[str]:
        """List the entries that were made from one."""
        return [item.name for item in self.items.values() if name in item.uses]

    def needed(self) -> set[str]:
        """List what a run stands on, and all it was made from."""
        found: set[str] = set()
        waiting = [name for note in self.notes for name in note.uses]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += self.items[name].uses if name in self.items else ()
        return found

    def resolve(self, text: str) -> Item:
        """Find an entry by its key, `<kind>/<key>`, or a beginning that only one has.

        Raises:
            StoreError: If none or several fit.
        """
        found = [item for item in self.items.values() if item.key.startswith(text) or item.name.startswith(text)]
        exact = [item for item in found if text in (item.key, item.name)]
        if len(exact or found) == 1:
            return (exact or found)[0]
        if not found:
            raise StoreError(f"{self.root} holds no entry {text!r}. List them with: python -m trace_hydra.store ls")
        raise StoreError(
            f"{text!r} fits {len(found)} entries: {', '.join(item.name for item in found[:5])}. Add digits."
        )


def survey(root: Path, ignore_hosts: Sequence[str] = ()) -> Survey:
    """Look at a store.

    Args:
        root: `paths.store`.
        ignore_hosts: Hosts whose notes do not count, because their run directories are gone.

    Raises:
        StoreError: If there is none.
    """
    if not root.is_dir():
        raise StoreError(f"there is no store at {root}. Name one with --store, or set TRACE_HYDRA_STORE.")
    items = {item.name: item for kind in KINDS for item in _items(root, kind)}
    notes = [note for note in _notes(root) if note.host not in ignore_hosts]
    gone = [note for note in notes if note.gone]
    return Survey(root, items, [note for note in notes if not note.gone], gone, _locked(root))


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder; links are not followed, what vanishes meanwhile counts nothing."""
    places = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    return sum(size_of(path) or 0 for path in places)


def changed(path: Path) -> float:
    """When a file or folder changed, in seconds since the epoch; infinity (never old) if that cannot be read."""
    try:
        return path.stat().st_mtime
    except OSError:
        return float("inf")


def other_folders(root: Path, which: str) -> list[Path]:
    """List what lies in one of `OTHERS`."""
    folder = root / which
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def model_problems(folder: Path) -> list[str]:
    """Hash the files of a converted base model and compare with its manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        found = [file_problem(folder / name, one) for name, one in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"manifest.json cannot be read ({error})"]
    return [problem for problem in found if problem is not None]


def _items(root: Path, kind: str) -> Iterator[Item]:
    for folder in other_folders(root, kind):
        key, problem, manifest = folder.name, None, {}
        if not KEY.fullmatch(key):
            continue
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            problem = manifest_problem(manifest, kind, key)
        except StoreError as error:  # of a newer version
            problem = str(error)
        except (OSError, ValueError) as error:
            problem = f"manifest.json cannot be read ({error})"
        if problem is not None:
            yield Item(kind, key, folder, {}, problem)
            continue
        wrong = [
            f"{name} has {size_of(folder / name)} bytes instead of {one['size']}"
            for name, one in manifest["files"].items()
            if size_of(folder / name) != one["size"]
        ]
        yield Item(kind, key, folder, manifest, "; ".join(wrong) or None)


def _notes(root: Path) -> Iterator[Note]:
    for path in sorted((root / "runs").glob("*.json")):
        try:
            note = json.loads(path.read_text(encoding="utf-8"))
            uses = [str(name) for name in note["uses"]]
            stages = tuple(name for name in uses if name.startswith("stages/"))
            host = note.get("host", platform.node())
            yield Note(path, host, str(note["directory"]), frozenset(uses), stages, note["finished"] is True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            log.warning("store: %s cannot be read and is left out.", path)


def _locked(root: Path) -> dict[str, Mapping[str, Any]]:
    folder = root / "locks"
    found = {}
    names = {path.name.rpartition(".")[0] for path in folder.iterdir()} if folder.is_dir() else set()
    for name in sorted(name for name in names if name and not name.startswith(".")):
        record = locks.holder(folder / name)
        if record is not None and locks.alive(record) is not False:
            kind, _, key = name.partition("-")
            found[f"{kind}/{key}"] = record
    return found
