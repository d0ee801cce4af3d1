"""The store of a run of several processes: rank 0 reads and writes it, the others are told.

Every call is made by all processes in step. The files of an entry are opened by all of them: `paths.store` lies on a
file system that all machines of a run see.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from trace_hydra import ranks
from trace_hydra.store.entries import Entry, Store


def open_store(root: Path) -> Store:
    """Open a store as the processes of the run need it."""
    return Store(root) if ranks.size() == 1 else SharedStore(root)


class SharedEntry(Entry):
    """An entry whose files rank 0 checks."""

    def file(self, name: str) -> Path:
        """Return a file that rank 0 has found sound; see `Entry.file`."""

        def check() -> None:
            super(SharedEntry, self).file(name)

        ranks.on_first(check)
        return self.folder / name


class SharedStore(Store):
    """A store that rank 0 reads and writes.

    Args:
        root: As for `Store`.
    """

    def __init__(self, root: Path):
        def probe() -> bool:
            super(SharedStore, self).__init__(root)
            return self.writable

        self.root = root
        self.writable = ranks.on_first(probe)

    def find(self, kind: str, key: str) -> Entry | None:
        """Look an entry up; see `Store.find`."""

        def look() -> Mapping[str, Any] | None:
            entry = super(SharedStore, self).find(kind, key)
            return None if entry is None else entry.manifest

        manifest = ranks.on_first(look)
        return None if manifest is None else SharedEntry(self, kind, key, manifest)

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
        """Make an entry on rank 0, which alone calls `write`; see `Store.publish`."""

        def make() -> bool:
            made = super(SharedStore, self).publish(
                kind, key, write, inputs=inputs, versions=versions, uses=uses, facts=facts, needs=needs
            )
            return made is not None

        return self.find(kind, key) if ranks.on_first(make) else None

    def drop(self, entry: Entry, names: Sequence[str]) -> None:
        """Take files out of an entry; see `Store.drop`."""
        ranks.on_first(lambda: super(SharedStore, self).drop(entry, names))

    def discard(self, kind: str, key: str) -> None:
        """Remove an entry; see `Store.discard`."""
        ranks.on_first(lambda: super(SharedStore, self).discard(kind, key))

    def set_aside(self, kind: str, key: str, reason: str) -> None:
        """Move an entry to `damaged/`; see `Store.set_aside`."""
        ranks.on_first(lambda: super(SharedStore, self).set_aside(kind, key, reason))

    def note_run(self, directory: Path, uses: Sequence[str], *, finished: bool) -> None:
        """Note what a run stands on; see `Store.note_run`."""
        ranks.on_first(lambda: super(SharedStore, self).note_run(directory, uses, finished=finished))

    def lock(
        self, kind: str, key: str, what: str, give_up: Callable[[], bool] | None = None
    ) -> AbstractContextManager[bool]:
        """Hold the right to make an entry, on rank 0 for all; see `Store.lock`."""
        return self._lock(kind, key, what, give_up)

    @contextmanager
    def _lock(self, kind: str, key: str, what: str, give_up: Callable[[], bool] | None) -> Iterator[bool]:
        with ExitStack() as held:
            yield ranks.on_first(lambda: held.enter_context(super(SharedStore, self).lock(kind, key, what, give_up)))
