"""What a manifest says about an entry, and whether that is so."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_hydra.errors import StoreError

SCHEMA = 1
"""Of manifest.json; raised when entries of before cannot be read as they are."""
MANIFEST = "manifest.json"
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """Write a manifest with the hash of all it says, for no other file vouches for it.

    Raises:
        ValueError: If it holds NaN or infinity.
    """
    plain = json.loads(json.dumps(manifest, allow_nan=False))
    plain.pop("sha256", None)
    return json.dumps({**plain, "sha256": _seal(plain)}, indent=1).encode()


def look(folder: Path, kind: str, key: str) -> tuple[object, dict[str, Any] | None, str | None]:
    """Look at an entry's folder without hashing its files.

    Returns:
        What was seen, to compare with another look; the manifest, None if there is no entry; what is wrong, or None.

    Raises:
        StoreError: If a newer version wrote it.
    """
    raw = None
    try:
        seen = folder.stat().st_ino
    except OSError:
        return None, None, None
    try:
        if (folder / MANIFEST).is_symlink():  # it could change under the entry
            return (seen, raw), None, f"{MANIFEST} is a link"
        raw = (folder / MANIFEST).read_bytes()
        manifest = json.loads(raw)
    except FileNotFoundError:
        return (seen, raw), None, f"it has no {MANIFEST}"
    except (OSError, ValueError, RecursionError) as error:
        return (seen, raw), None, f"{MANIFEST} cannot be read ({error})"
    problem = manifest_problem(manifest, kind, key)
    if problem is None:
        sizes = {name: one["size"] for name, one in manifest["files"].items()}
        wrong = [name for name, size in sizes.items() if size_of(folder / name) != size]
        if wrong:
            problem = f"{wrong[0]} has {size_of(folder / wrong[0])} bytes instead of {sizes[wrong[0]]}"
    return (seen, raw), manifest, problem


def manifest_problem(manifest: Any, kind: str, key: str) -> str | None:
    """Say what is wrong with a manifest, None if nothing is.

    Raises:
        StoreError: If a newer version wrote it.
    """
    if not isinstance(manifest, dict):
        return "manifest.json holds no object"
    schema, seal = manifest.get("schema"), manifest.get("sha256")
    whole = seal == _seal({name: value for name, value in manifest.items() if name != "sha256"})
    if isinstance(schema, int) and schema > SCHEMA and (whole or seal is None):
        raise StoreError(
            f"{kind}/{key} in paths.store has schema {schema}; this trace_hydra knows {SCHEMA}. A newer version wrote "
            "it: update trace_hydra, or set paths.store to another folder."
        )
    if schema != SCHEMA:
        return f"manifest.json has schema {schema!r} instead of {SCHEMA}"
    if (manifest.get("kind"), manifest.get("key")) != (kind, key):
        return f"manifest.json is of {manifest.get('kind')}/{manifest.get('key')}"
    if not whole:
        return "manifest.json was changed: it has another SHA-256 than it says"
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(_is_description(name, one) for name, one in files.items()):
        return "manifest.json does not describe its files"
    if not isinstance(manifest.get("facts"), dict) or not isinstance(manifest.get("uses"), list):
        return "manifest.json lacks facts or uses"
    return None


def describe(folder: Path, known: Mapping[str, str]) -> dict[str, Any]:
    """Sizes and hashes of the files in a draft, each brought to disk."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name not in known:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        found[path.name] = {"size": path.stat().st_size, "sha256": known.get(path.name) or sha256(path)}
    return found


def sha256(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(plain: Mapping[str, Any]) -> str:
    """Hash all of a manifest but the hash itself; the same in every schema."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _is_description(name: Any, one: Any) -> bool:
    return (
        isinstance(name, str)
        and _FILE.fullmatch(name) is not None
        and isinstance(one, dict)
        and isinstance(one.get("size"), int)
        and isinstance(one.get("sha256"), str)
    )


def file_problem(path: Path, description: Mapping[str, Any]) -> str | None:
    """Say how a file differs from its description in a manifest, None if it does not."""
    if (size := size_of(path)) != description["size"]:
        return f"{path.name} has {size} bytes instead of {description['size']}"
    try:
        found = sha256(path)
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None if found == description["sha256"] else f"{path.name} has another SHA-256 than its manifest says"


def size_of(path: Path) -> int | None:
    """Bytes of a regular file; None if it is none."""
    try:
        return path.stat().st_size if path.is_file() and not path.is_symlink() else None
    except OSError:
        return None
