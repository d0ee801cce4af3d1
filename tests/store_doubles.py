"""An entry of three files, published and used as the package does it."""

from pathlib import Path
from typing import Any

from trace_hydra.store.entries import DamagedEntry, Store

KEY, OTHER = "a" * 16, "b" * 16
CONTENT = {
    "weights.bin": bytes(range(256)) * 5,
    "state.json": b'{"rows": [1, 2, 3]}',
    "answers.jsonl": b'{"raw": "A"}\n',
}
VERSIONS = {"torch": "2.13"}


def write(folder: Path, extra: bytes = b"") -> None:
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content + extra)


def publish(store: Store, key: str = KEY, kind: str = "stages", extra: bytes = b"", **given) -> Any:
    settings = {"inputs": {"seed": 42, "key": key}, "versions": VERSIONS, "facts": {"tokens": 7}, **given}
    return store.publish(kind, key, lambda folder: write(folder, extra), **settings)


def use(store: Store, key: str = KEY, kind: str = "stages") -> Any:
    """Read an entry as the package does: found, then each file verified."""
    try:
        entry = store.find(kind, key)
        return None if entry is None else {name: entry.file(name).read_bytes() for name in CONTENT}
    except DamagedEntry:
        return None
