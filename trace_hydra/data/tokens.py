"""What tokenising gave, by what decided it: for data sets it takes seconds to minutes, in every process of a run."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np

from trace_hydra.data.task import texts_hash
from trace_hydra.keys import digest

ENCODING_VERSION = 1
"""Raised when rows become other tokens than before."""
WORTH_KEEPING = 500_000
"""Characters: what takes less than half a second is made anew."""

Rows = tuple[Sequence[list[int] | np.ndarray], list[int], list[bool]]
"""Ids of each row, how many of them are prompt, whether it was cut."""


class Cache(Protocol):
    """Named arrays by key, kept between processes; whoever reads has what was written, or nothing."""

    def load(self, key: str) -> dict[str, np.ndarray] | None:
        """Look arrays up."""

    def save(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays, if there is room."""


def worth_keeping(texts: Sequence[str]) -> bool:
    """Whether it takes longer to tokenise texts than to read what they became."""
    return sum(map(len, texts)) >= WORTH_KEEPING


def tokens_key(kind: str, texts: Sequence[str], tokenizer: str, settings: Mapping[str, Any]) -> str:
    """Hash what decides the tokens of texts.

    Args:
        kind: What is made of the texts.
        texts: In order.
        tokenizer: From `tokenizer_digest`.
        settings: All else that counts.
    """
    decided = {"version": ENCODING_VERSION, "kind": kind, "tokenizer": tokenizer, "settings": dict(settings)}
    return digest({**decided, "texts": texts_hash(texts), "number": len(texts)})


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Hash a tokenizer; None for one whose Python code has a part in what it does."""
    backend, kind = getattr(tokenizer, "backend_tokenizer", None), type(tokenizer)
    if backend is None or not kind.__module__.startswith("transformers."):
        return None
    names = [kind.__qualname__, tokenizer.eos_token_id, version("transformers"), version("tokenizers")]
    return digest([*names, hashlib.sha256(backend.to_str().encode()).hexdigest()])


def packed(rows: Rows) -> dict[str, np.ndarray]:
    """Lay rows end to end; ids take as few bytes as the largest needs."""
    ids, num_prompt, cut = rows
    flat = np.array([token for row in ids for token in row], dtype=np.int64)
    return {
        "ids": flat.astype(np.min_scalar_type(int(flat.max(initial=0)))),
        "lengths": np.array([len(row) for row in ids], dtype=np.int32),
        "num_prompt": np.array(num_prompt, dtype=np.int32),
        "cut": np.array(cut, dtype=np.uint8),
    }


def unpacked(arrays: Mapping[str, np.ndarray]) -> Rows:
    """Take rows apart again; their ids are arrays, int32."""
    ends = np.cumsum(arrays["lengths"], dtype=np.int64)[:-1]
    ids = np.split(arrays["ids"].astype(np.int32), ends) if len(arrays["lengths"]) else []
    return ids, arrays["num_prompt"].tolist(), arrays["cut"].astype(bool).tolist()
