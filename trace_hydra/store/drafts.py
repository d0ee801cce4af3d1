"""Folders in which something is made before it is renamed to its place.

A draft's name says whose it is: no moment, however short, leaves one behind that nobody knows the maker of.
"""

import hashlib
import uuid
from pathlib import Path
from typing import Any

from trace_hydra.store import locks


def begin(root: Path, name: str) -> Path:
    """Make an empty draft below a store's root; several of one name can be."""
    me = locks.this_process()
    draft = root / "drafts" / f"{name}-{uuid.uuid4().hex[:12]}.{_place(me)}.{me['pid']}.{me['started'] or 0}"
    draft.mkdir(parents=True)
    return draft


def alive(draft: Path) -> bool | None:
    """Whether the process runs that makes a draft; None if that cannot be seen from here."""
    me = locks.this_process()
    _, *owner = draft.name.rsplit(".", 3)
    if len(owner) < 3 or owner[0] != _place(me) or not all(one.isdecimal() for one in owner[1:]):
        return None
    return locks.alive({**me, "pid": int(owner[1]), "started": int(owner[2]) or None})


def _place(process: dict[str, Any]) -> str:
    where = "\n".join(process[key] for key in ("host", "boot", "pidns"))
    return hashlib.sha256(where.encode()).hexdigest()[:8]
