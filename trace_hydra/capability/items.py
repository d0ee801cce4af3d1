"""Items of the sets that need no download: reading, choosing and scoring what several of them share."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from trace_hydra.capability.subject import Likelihood, Subject
from trace_hydra.errors import CapabilityError

OWN = Path(__file__).with_name("mini_items")
"""Written for this package; no item is taken from a benchmark."""

T = TypeVar("T")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CapabilityError: If it is missing or no JSON in UTF-8; names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CapabilityError(f"{path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise CapabilityError(f"{path} is no JSON in UTF-8: {error}.") from error


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """Choose `limit` items evenly from the whole, always the same ones; None: all."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[place * len(items) // limit] for place in range(limit)]


def limit_problems(key: str, limit: Any) -> list[str]:
    """Say what is wrong with a limit."""
    if limit is None or (type(limit) is int and limit > 0):
        return []
    return [f"{key}={limit!r} must be null (all items) or a whole number of at least 1."]


def prompt_mode(subject: Subject) -> str:
    """Name how a chat question reaches the model: "chat" if its tokenizer has a template, else "raw"."""
    return "chat" if getattr(subject.tokenizer, "chat_template", None) else "raw"


def encode(subject: Subject, prompts: Sequence[str], max_new_tokens: int, mode: str) -> list[list[int]]:
    """Encode prompts for generation; the limit is the model's own, so no score depends on the protocol's."""
    room = max(subject.max_length - max_new_tokens, 1)
    return subject.encoder(mode).prompts(prompts, "", room)[0]


def likelihoods(subject: Subject, contexts: Sequence[str], continuations: Sequence[str], mode: str) -> list[Likelihood]:
    """Score each continuation behind its context.

    Raw contexts are joined with their continuations before they become tokens, so that " Paris" gets the tokens it has
    within a text; where the joined text does not begin with the context's tokens, and behind a chat template, the
    continuation is encoded apart. What does not fit the model is cut from the context's start.
    """
    encoder = subject.encoder(mode)
    heads, alone = encoder.text_ids(contexts), encoder.text_ids(continuations)
    joined = encoder.text_ids([a + b for a, b in zip(contexts, continuations, strict=True)])
    rows = []
    for head, tail, both in zip(heads, alone, joined, strict=True):
        if mode == "raw" and len(both) > len(head) and both[: len(head)] == head:
            tail = both[len(head) :]
        room = max(subject.max_length - len(tail), 1)
        rows.append(([*encoder.prefix, *head, *encoder.suffix][-room:] or [encoder.end_id], tail))
    return subject.log_likelihoods(contexts, rows)


def value_of(likelihood: Likelihood, norm: str) -> float:
    """Log-likelihood of all tokens ("total") or per token ("mean"), nats."""
    return likelihood.total / (likelihood.num_tokens if norm == "mean" else 1)


def is_best(values: Sequence[float], right: int) -> bool:
    """Tell whether the right value is larger than every other; False at a tie, and if it is not a number."""
    others = [value for place, value in enumerate(values) if place != right]
    return math.isfinite(values[right]) and all(values[right] > value for value in others)
