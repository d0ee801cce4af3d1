"""Tokens of data sets in a store, `tokens/<key>/<SHA-256 of the file>.safetensors`: a cache without manifests or locks.

A file is written whole or not at all, and read only if its bytes have the hash that is its name. Whoever finds none, or
one that is damaged, makes it anew; two who do so at once write the same bytes. Loads no torch.
"""

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from trace_hydra.errors import StoreError
from trace_hydra.files import write_bytes

log = logging.getLogger(__name__)

FOLDER = "tokens"
_KEY = re.compile(r"[0-9a-f]+")


class TokenFiles:
    """The cache of one store.

    Args:
        root: `paths.store`.
    """

    def __init__(self, root: Path):
        self.root = root / FOLDER

    def load(self, key: str) -> dict[str, np.ndarray] | None:
        """Read arrays; None if they are not there, or damaged. That they were of use is noted in the folder's time."""
        folder = self.root / _sound(key)
        for path in sorted(folder.glob("*.safetensors")):
            try:
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() == path.stem:
                    os.utime(folder)
                    return load(content)
                log.warning("%s is damaged; it is made again.", path)
                path.unlink(missing_ok=True)
            except (OSError, SafetensorError) as error:
                log.debug("%s: %s", path, error)
        return None

    def save(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write arrays; a store that cannot be written is left as it is. Of a run's processes, rank 0 writes."""
        content = save(dict(arrays))
        try:
            write_bytes(content, self.root / _sound(key) / f"{hashlib.sha256(content).hexdigest()}.safetensors")
        except StoreError as error:
            log.debug("%s", error)


def _sound(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise StoreError(f"{key!r} is no key; a key is a hash of hexadecimal digits.")
    return key
