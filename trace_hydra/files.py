"""Files that appear whole or not at all."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_hydra import ranks
from trace_hydra.errors import StoreError


def write_json(content: Any, path: Path) -> None:
    """Write JSON whole or not at all.

    Raises:
        StoreError: If it cannot be written, or holds what JSON cannot (NaN, an object of another type).
    """
    write_bytes(as_json(content, path), path)


def as_json(content: Any, path: Path, indent: int | None = 2) -> bytes:
    """Write JSON to memory; `path` is where it will go.

    Raises:
        StoreError: If it holds what JSON cannot.
    """
    try:
        text = json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise StoreError(f"cannot write {path}: {error}.") from error
    # A lone surrogate, which a row may hold, becomes its JSON escape.
    return (text + "\n").encode("utf-8", "backslashreplace")


def write_bytes(content: bytes, path: Path) -> None:
    """Write a file so that it is there whole, on disk, or as it was before; of a run's processes, rank 0 writes.

    Raises:
        StoreError: If it cannot be written; names path and reason.
    """
    if ranks.is_first():
        put_bytes(content, path)


def put_bytes(content: bytes, path: Path, *, durable: bool = True) -> None:
    """Write a file as `write_bytes` does, whatever the process.

    Args:
        content: All of it.
        path: Its folder is made.
        durable: Whether it must be on disk afterwards; else a crash of the machine may leave it empty.

    Raises:
        StoreError: If it cannot be written; names path and reason.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.unlink(missing_ok=True)  # of a killed process with this number
            with partial.open("xb") as file:  # never through a link that waits there
                file.write(content)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}; it takes {len(content):,} bytes. Free space or change "
            "paths.runs (or paths.store, if it lies there)."
        ) from error


def write_lines(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write JSON lines whole or not at all.

    Raises:
        StoreError: If the file cannot be written.
    """
    write_bytes(as_lines(records), path)


def as_lines(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Write JSON lines to memory."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return text.encode("utf-8", "backslashreplace")


def sync_folder(folder: Path) -> None:
    """Bring the new name to disk too; some systems cannot open folders, there the file system decides."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
