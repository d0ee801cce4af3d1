"""Reads what an offline W&B run wrote: protobuf records in LevelDB's log format (blocks of 32 KiB).

Checksums are ignored.
"""

import json
import struct
import time
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> list[Any]:
    """Parse every record of a `.wandb` file."""
    from wandb.proto import wandb_internal_pb2

    data, place, found, parts = path.read_bytes(), 7, [], b""  # the file starts with 7 bytes of its own
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        if kind not in (FULL, FIRST, MIDDLE, LAST) or place + HEADER + length > len(data):
            break  # the rest is being written
        chunk = data[place + HEADER : place + HEADER + length]
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        place += HEADER + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(parts)
            found.append(record)
    return found


def read(folder: Path) -> dict[str, Any]:
    """Give a run folder's `run` (record), `config`, `history` (list of rows), `summary`, `metrics` and `exit_code`.

    `finish` returns some milliseconds before wandb's own process has written the last records; this waits for them.
    """
    (path,) = folder.glob("run-*.wandb")
    patience = time.monotonic() + 20
    while (found := _sort_out(path))["exit_code"] is None and time.monotonic() < patience:
        time.sleep(0.01)
    return found


def _sort_out(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "metrics": {}, "exit_code": None}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            result["run"] = record.run
            result["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            result["history"].append(_items(record.history.item))
        elif kind == "summary":
            result["summary"] |= _items(record.summary.update)
        elif kind == "metric":
            result["metrics"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "exit":
            result["exit_code"] = record.exit.exit_code
    return result


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
