"""What a W&B run has on disk: its id, and one folder ("piece") for each time the run was started.

wandb names a piece `run-<start>-<id>`, or `offline-run-<start>-<id>`, and keeps everything in its `run-<id>.wandb`:
protobuf records in LevelDB's log format. An upload leaves `run-<id>.wandb.synced` beside it.
"""

import logging
import re
import secrets
import shlex
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_hydra.callbacks.axes import STAGE, STEP, positions
from trace_hydra.errors import StoreError
from trace_hydra.files import write_bytes
from trace_hydra.wandb_labels import ID, ID_FILE

log = logging.getLogger(__name__)

UPLOADED = "uploaded"
"""Empty file in the piece of an online run that the server took to its end."""

_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_BLOCK, _HEADER, _PREFIX = 32768, 7, 7  # of LevelDB's log; wandb puts 7 bytes of its own before it
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class Earlier:
    """What earlier starts of a run left."""

    next_step: int
    """Of W&B's own step, which counts calls of `log` and may not go back."""
    logged: dict[str, float]
    """Metric -> how far along its axis it is."""


def run_id(directory: Path) -> str:
    """Give the W&B id of a run directory, the same for every start; letters, digits, "-" and "_" only.

    It is kept in the directory: two directories are two W&B runs, a copied one stays the same run. Where the file
    cannot be written a warning says so, and the id holds for this start alone.
    """
    path = directory / ID_FILE
    try:
        found = path.read_text(encoding="utf-8").strip()
        if ID.fullmatch(found):
            return found
        log.warning("%s holds no W&B id (%.80r); this is a new W&B run.", path, found)
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        log.warning("%s cannot be read (%s); this is a new W&B run.", path, error)
    new = secrets.token_hex(6)
    try:
        write_bytes(f"{new}\n".encode(), path)
    except StoreError as error:
        log.warning("%s The run is a new W&B run if it is started again.", error)
    return new


def pieces(directory: Path, run: str) -> list[Path]:
    """List the folders of a W&B run that hold something, first start first."""
    found = [
        path
        for path in directory.glob(f"wandb/*run-*-{run}*")
        if not path.is_symlink() and (path / f"run-{run}.wandb").is_file() and any(_records(path / f"run-{run}.wandb"))
    ]
    return sorted(found, key=lambda path: path.name.removeprefix("offline-"))


def earlier(directory: Path, run: str) -> Earlier:
    """Read what earlier starts logged; what cannot be read counts as not logged."""
    entries = [entry for piece in pieces(directory, run) for entry in _history(piece / f"run-{run}.wandb")]
    last = max((int(entry["_step"]) for entry in entries if entry.get("_step") is not None), default=-1)
    return Earlier(last + 1, positions(entries))


def history(directory: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a run's curves, first start first: metric -> number; what is no number is left out."""
    paths = [path for path in directory.glob("wandb/*run-*/run-*.wandb") if not path.parent.is_symlink()]
    for path in sorted(paths, key=lambda path: path.parent.name.removeprefix("offline-")):
        for record in _records(path):
            if record.WhichOneof("record_type") == "history":
                named = ((item.key or item.nested_key[0], item.value_json) for item in record.history.item)
                yield {name: float(text) for name, text in named if _NUMBER.fullmatch(text)}


def is_offline(piece: Path) -> bool:
    """Say whether nothing of a piece was uploaded while it ran."""
    return piece.name.startswith("offline-")


def is_uploaded(piece: Path) -> bool:
    """Say whether the server has all of a piece."""
    return (piece / UPLOADED).is_file() or any(piece.glob("run-*.wandb.synced"))


def sync_command(found: list[Path]) -> str | None:
    """Write the command that uploads what the server lacks, None for nothing.

    Pieces follow on each other, so what comes after the first one that is missing is uploaded again; the server knows
    it by its steps. `wandb sync` passes over pieces that were online, even if named, unless told not to.
    """
    missing = [index for index, piece in enumerate(found) if not is_uploaded(piece)]
    if not missing:
        return None
    rest = found[missing[0] :]
    flags = [flag for flag, needed in _FLAGS.items() if any(map(needed, rest))]
    return shlex.join(["wandb", "sync", *flags, *map(str, rest)])


_FLAGS = {
    "--include-online": lambda piece: not is_offline(piece),
    "--include-synced": lambda piece: any(piece.glob("run-*.wandb.synced")),
}


def _history(path: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a run's curves: metric -> value, `...` for what is no number; axes and `_step` are numbers."""
    for record in _records(path):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                name = item.key or item.nested_key[0]  # a table's own keys stand below its name
                row[name] = float(item.value_json) if name in (STEP, STAGE, "_step") else ...
            yield row


def _records(path: Path) -> Iterator[Any]:
    """Parse the records of a `.wandb` file up to its end or to where a kill cut it off. Checksums are ignored."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    data, place, parts = path.read_bytes(), _PREFIX, b""
    while place + _HEADER <= len(data):
        if (room := _BLOCK - place % _BLOCK) < _HEADER:
            place += room
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        chunk = data[place + _HEADER : place + _HEADER + length]
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or len(chunk) < length:
            return
        parts = chunk if kind in (_FULL, _FIRST) else parts + chunk
        place += _HEADER + length
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            try:
                record.ParseFromString(parts)
            except DecodeError:
                return
            yield record
