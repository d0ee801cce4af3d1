"""The capability sets of a run: the start model once, the trained one where asked, and the deltas between them."""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from trace_hydra import keys
from trace_hydra.capability.base import CapabilitySet, Pair, Record
from trace_hydra.capability.deltas import compare_sets
from trace_hydra.capability.subject import Subject
from trace_hydra.errors import CapabilityError, StoreError
from trace_hydra.files import write_lines
from trace_hydra.metrics.records import json_rows

log = logging.getLogger(__name__)

VERSION = 1
"""Raised when a change here alters what the start model is asked; part of its key."""


class CapabilityBoard:
    """Measures sets and keeps what they gave; files of a row lie in `<run>/capability/<row>/`.

    Args:
        sets: By their key in `capability.sets`.
        rows: Rows of the matrix (from 1) behind which the trained model is measured.
        model_key: What decides the start model's answers beside a set's own identity: weights, precision, decoding.
        store: Where the start model's records are kept for other runs.
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
        store: Path,
        directory: Path,
        config: Mapping[str, Any],
        samples: int,
        seed: int,
        notify: Callable[[int, Mapping[str, Any], list[Pair]], None],
    ):
        self.sets, self.rows, self.model_key = sets, rows, model_key
        self.store, self.directory, self.config = store, directory, config
        self.samples, self.seed, self.notify = samples, seed, notify
        self.before: dict[str, list[Record]] = {}
        """Set key -> records of the start model."""
        self.stages: dict[int, dict[str, Any]] = {}
        """Row -> its deltas."""
        self.failed: dict[str, str] = {}
        """"<row>/<set key>" -> why it was not measured or compared."""
        self.tokens = 0

    def start(self, subject: Subject) -> None:
        """Take the start model's records from the store, or let it answer and keep them."""
        for name, one in self.sets.items():
            path = self.store / "capability" / f"{self.start_key(one)}.jsonl"
            records = _stored(path)
            if records is None:
                log.info("capability %s: the start model answers; kept for other runs.", name)
                records = one.measure(subject)
                _keep(records, path)
            self.before[name] = records
            write_lines(records, records_file(self.directory, 0, name))
        self.tokens += subject.tokens

    def start_key(self, one: CapabilitySet) -> str:
        """Hash what decides the start model's records: model, decoding, set."""
        return keys.digest([VERSION, self.model_key, type(one).__qualname__, one.version, one.answers_identity()])

    def after(self, row: int, subject: Subject) -> None:
        """Measure and compare behind a row, if it is one of `rows`.

        A set that fails is noted and the others go on: a finished training run is not lost for it. Answers are on disk
        before they are compared, so `python -m trace_hydra.capability` can ask a judge again.
        """
        if row not in self.rows or not self.sets:
            return
        pairs: list[Pair] = []
        for name, one in self.sets.items():
            log.info("capability %s: the model answers after stage %d.", name, row)
            try:
                records = one.measure(subject)
                write_lines(records, records_file(self.directory, row, name))
                found = compare(name, one, self.before[name], records)
            except CapabilityError as error:
                self._fail(row, name, str(error))
            except Exception as error:  # hours of training stand behind this; the traceback goes to the log
                log.exception("capability %s", name)
                self._fail(row, name, f"{type(error).__name__}: {error}")
            else:
                write_lines(found, pairs_file(self.directory, row, name))
                pairs += found
        self.tokens += subject.tokens
        self.stages[row] = summarise(self.sets, pairs, samples=self.samples, seed=self.seed)
        self.notify(row, self.stages[row], pairs)

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
    return directory / "capability" / str(row) / f"{name}.jsonl"


def pairs_file(directory: Path, row: int, name: str) -> Path:
    """Say where a set's pairs lie."""
    return directory / "capability" / str(row) / f"{name}.pairs.jsonl"


def read_records(path: Path) -> list[Record]:
    """Read records or pairs.

    Raises:
        StoreError: If the file is missing or a line is no JSON.
    """
    return [record for _, record in json_rows(path, StoreError)]


def _keep(records: list[Record], path: Path) -> None:
    """Store records behind a line that says how to know them again; a run does not end for want of it."""
    try:
        write_lines([{"sha256": _hash(records), "records": len(records)}, *records], path)
    except StoreError as error:
        log.warning("paths.store: the start model's answers are not kept for other runs: %s", error)


def _stored(path: Path) -> list[Record] | None:
    """Read stored records; None if they are not there or not whole."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # only here, a text may hold other line ends
        head, *records = [json.loads(line) for line in lines]
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        head, records = {}, []
    if not isinstance(head, dict) or head.get("sha256") != _hash(records):
        log.warning("%s is not whole; the start model is measured again.", path)
        return None
    return records


def _hash(records: list[Record]) -> str:
    return hashlib.sha256(json.dumps(records, ensure_ascii=True, sort_keys=True).encode()).hexdigest()
