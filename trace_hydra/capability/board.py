"""The capability sets of a run: the start model once, the trained one where asked, and the deltas between them."""

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from trace_hydra import keys, ranks
from trace_hydra.capability.base import CapabilitySet, Pair, Record
from trace_hydra.capability.deltas import compare_sets
from trace_hydra.capability.subject import Subject
from trace_hydra.errors import CapabilityError, EngineError, StoreError
from trace_hydra.files import as_lines, write_bytes, write_lines
from trace_hydra.metrics.records import json_rows
from trace_hydra.names import inside
from trace_hydra.store.entries import DamagedEntry, Store

log = logging.getLogger(__name__)

VERSION = 1
"""Raised when a change here alters what the start model is asked; part of its key."""


class CapabilityBoard:
    """Measures sets and keeps what they gave; files of a row lie in `<run>/capability/<row>/`.

    Args:
        sets: By their key in `capability.sets`.
        rows: Rows of the matrix (from 1) behind which the trained model is measured.
        model_key: What decides the start model's answers beside a set's own identity: weights, precision, decoding.
        states: Row -> key of the model's state there; 0 is the start model.
        store: Where records are kept for other runs.
        directory: Of the run.
        config: The `capability` node, for comparing again later.
        samples: Bootstrap replicates.
        seed: Of the bootstrap.
        notify: Called with (row, deltas, pairs) after a measured row.
    """

    def __init__(
        self,
        sets: Mapping[str, CapabilitySet],
        *,
        rows: Collection[int],
        model_key: Mapping[str, Any],
        states: Mapping[int, str],
        store: Store,
        directory: Path,
        config: Mapping[str, Any],
        samples: int,
        seed: int,
        notify: Callable[[int, Mapping[str, Any], list[Pair]], None],
    ):
        self.sets, self.rows, self.model_key, self.states = sets, rows, model_key, states
        self.store, self.directory, self.config = store, directory, config
        self.samples, self.seed, self.notify = samples, seed, notify
        self.before: dict[str, list[Record]] = {}
        """Set key -> records of the start model."""
        self.stages: dict[int, dict[str, Any]] = {}
        """Row -> its deltas."""
        self.failed: dict[str, str] = {}
        """"<row>/<set key>" -> why it was not measured or compared."""
        self.tokens = 0
        self.keys: list[str] = []
        """Of the entries of the store it stands on."""
        self._written: dict[Path, list[Record] | list[Pair]] = {}

    def start(self, untouched: Callable[[], AbstractContextManager[Subject]]) -> None:
        """Take the start model's records from the store, or let it answer and keep them."""
        for name, one in self.sets.items():
            records = self._records(0, name, one, untouched)
            self.before[name] = records
            self._write(records, records_file(self.directory, 0, name))

    def key(self, row: int, one: CapabilitySet) -> str:
        """Hash what decides a set's records: the model's state, decoding, the set and its code."""
        return keys.digest(self._decided(row, one))

    def after(self, row: int, trained: Callable[[], AbstractContextManager[Subject]]) -> None:
        """Measure and compare behind a row, if it is one of `rows`.

        A set that fails is noted and the others go on: a finished training run is not lost for it. Answers are on disk
        before they are compared, so `python -m trace_hydra.capability` can ask a judge again.
        """
        if row not in self.rows or not self.sets:
            return
        pairs: list[Pair] = []
        for name, one in self.sets.items():
            try:
                records = self._records(row, name, one, trained)
                self._write(records, records_file(self.directory, row, name))
                found = ranks.on_first(partial(compare, name, one, self.before[name], records))
            except (CapabilityError, EngineError) as error:
                self._fail(row, name, str(error))
            except StoreError:
                raise
            except Exception as error:  # hours of training stand behind this; the traceback goes to the log
                if ranks.size() > 1:  # the others may not have failed
                    raise
                log.exception("capability %s", name)
                self._fail(row, name, f"{type(error).__name__}: {error}")
            else:
                self._write(found, pairs_file(self.directory, row, name))
                pairs += found
        self.stages[row] = summarise(self.sets, pairs, samples=self.samples, seed=self.seed)
        self.notify(row, self.stages[row], pairs)

    def write(self) -> None:
        """Write the files that are gone, should somebody have deleted the directory under the run."""
        for path, records in self._written.items():
            if not path.is_file():
                write_lines(records, path)

    def results(self) -> dict[str, Any]:
        """What stands in results.json under `capability`; {} without sets."""
        if not self.sets:
            return {}
        last = self.stages.get(max(self.stages, default=0), {})
        return {
            **last,
            "row": max(self.stages, default=None),
            "fingerprint": fingerprint(self.sets),
            "tokens": self.tokens,
            "bootstrap": {"samples": self.samples, "seed": self.seed},
            "config": self.config,
            "failed": self.failed,
            "stages": {str(row): found for row, found in self.stages.items()},
        }

    def _write(self, records: list[Record] | list[Pair], path: Path) -> None:
        self._written[path] = records
        write_lines(records, path)

    def _decided(self, row: int, one: CapabilitySet) -> dict[str, Any]:
        return {
            "version": VERSION,
            "model": self.model_key,
            "state": self.states[row],
            "set": type(one).__qualname__,
            "set_version": one.version,
            "answers": one.answers_identity(),
        }

    def _records(
        self, row: int, name: str, one: CapabilitySet, subject: Callable[[], AbstractContextManager[Subject]]
    ) -> list[Record]:
        """Take a set's records from the store, or measure and store them."""
        decided = self._decided(row, one)
        key = keys.digest(decided)
        self.keys.append(key)
        what = f"capability {name} {f'after stage {row}' if row else 'of the start model'}"
        if (stored := self._stored(key)) is not None:
            return stored
        with self.store.lock("capability", key, what, give_up=lambda: self.store.find("capability", key) is not None):
            if (stored := self._stored(key)) is not None:
                return stored
            log.info("%s: the model answers; kept for other runs.", what)
            with subject() as asked:
                records = one.measure(asked)
            self.tokens += asked.tokens
            content = as_lines(records)
            self.store.publish(
                "capability",
                key,
                lambda folder: write_bytes(content, folder / "records.jsonl"),
                inputs=decided,
                versions=self.model_key["versions"],
                uses=[f"stages/{self.states[row]}"] if row else [],
                facts={"set": name, "row": row, "tokens": asked.tokens},
                needs=len(content),
            )
        return records

    def _stored(self, key: str) -> list[Record] | None:
        entry = self.store.find("capability", key)
        if entry is None:
            return None
        try:
            records = read_records(entry.file("records.jsonl"))
        except DamagedEntry as error:
            log.warning("%s", error)
            return None
        self.tokens += entry.facts["tokens"]
        return records

    def _fail(self, row: int, name: str, reason: str) -> None:
        self.failed[f"{row}/{name}"] = reason
        log.warning(
            "capability %s after stage %s: %s\nThe run goes on. If a judge could not be asked, ask it about the stored "
            "answers with: python -m trace_hydra.capability %s",
            name,
            row,
            reason,
            self.directory,
        )


def compare(key: str, one: CapabilitySet, before: list[Record], after: list[Record]) -> list[Pair]:
    """Pair the records of a set, each pair with the set's key in `capability.sets`."""
    return [{**pair, "key": key} for pair in one.compare(before, after)]


def summarise(sets: Mapping[str, CapabilitySet], pairs: list[Pair], *, samples: int, seed: int) -> dict[str, Any]:
    """Compute the deltas of a row, with what each set adds about its pairs."""
    owner = {pair["set"]: sets[pair["key"]] for pair in pairs}
    macro = {name: one.macro for name, one in owner.items()}
    found = compare_sets(pairs, macro=macro, samples=samples, seed=seed)
    for name, one in owner.items():
        found["sets"][name] |= one.summary([pair for pair in pairs if pair["set"] == name])
    return found


def fingerprint(sets: Mapping[str, CapabilitySet]) -> str:
    """Hash items, prompts, settings and versions of all sets: 12 hex digits."""
    parts = {name: [type(one).__qualname__, one.version, one.identity()] for name, one in sets.items()}
    return keys.digest(parts, 12)


def records_file(directory: Path, row: int, name: str) -> Path:
    """Say where a set's records lie; row 0 is the start model."""
    return inside(directory, "capability", str(row), f"{name}.jsonl")


def pairs_file(directory: Path, row: int, name: str) -> Path:
    """Say where a set's pairs lie."""
    return inside(directory, "capability", str(row), f"{name}.pairs.jsonl")


def read_records(path: Path) -> list[Record]:
    """Read records or pairs.

    Raises:
        StoreError: If the file is missing or a line is no JSON.
    """
    return [record for _, record in json_rows(path, StoreError)]
