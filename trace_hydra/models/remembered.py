"""Attention of few new tokens to remembered ones, on CPUs: by products of whole matrices.

Tokens that stand before all rows are kept once, and all rows' queries meet them in one product.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

States = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each layer, (1, key heads, tokens, size)."""
_BEFORE: ContextVar[States] = ContextVar("_BEFORE", default=())
_SCORES = 2**24
"""Scores that are computed at once, at most, but for those of one row."""


@contextmanager
def behind(states: States) -> Iterator[None]:
    """Let the tokens of all rows see these before their own."""
    token = _BEFORE.set(states)
    try:
        yield
    finally:
        _BEFORE.reset(token)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    keywords: Mapping[str, Any],
) -> Tensor | None:
    """Attend to remembered tokens, those before all rows included; None if that is not what is asked.

    Args:
        module: The attention layer.
        query: (rows, heads, tokens, size).
        key: (rows, key heads, columns, size).
        value: (rows, key heads, columns, size).
        mask: What each token sees of the columns, (rows, 1, tokens, columns), bool.
        scaling: Of the scores; None: 1 / sqrt(size).
        keywords: Further settings that transformers passes.

    Returns:
        (rows, tokens, heads, size).
    """
    if mask is None or mask.dtype != torch.bool or keywords.get("position_bias") is not None or torch.is_grad_enabled():
        return None
    before = _BEFORE.get()
    if not before and query.shape[2] == key.shape[2]:
        return None
    head = before[module.layer_idx] if before else None  # type: ignore[index]
    columns = key.shape[2] + (head[0].shape[2] if head else 0)
    at_once = max(1, _SCORES // (query.shape[1] * query.shape[2] * columns))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    found = [
        _attend(query[rows] * scale, key[rows], value[rows], mask[rows], head)
        for rows in (slice(start, start + at_once) for start in range(0, len(query), at_once))
    ]
    return found[0] if len(found) == 1 else torch.cat(found)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, head: tuple[Tensor, Tensor] | None) -> Tensor:
    """Attend with scaled queries to a head and to columns of their own."""
    rows, heads, length, size = query.shape
    shared = key.shape[1]  # heads that have keys of their own; several query heads read each
    grouped = query.reshape(rows, shared, -1, size)  # (rows, key heads, query heads of each * tokens, size)
    scores = torch.matmul(grouped, key.transpose(-1, -2)).view(rows, shared, -1, length, key.shape[2])
    scores = scores.masked_fill(mask.logical_not()[:, :, None], float("-inf")).view(rows, shared, -1, key.shape[2])
    num_before = 0
    if head is not None:
        num_before = head[0].shape[2]
        scores = torch.cat([_times(grouped, head[0][0].transpose(-1, -2)), scores], -1)
    weights = torch.softmax(scores, -1).to(value.dtype)  # in fp32 inside
    read = torch.matmul(weights[..., num_before:], value)
    if head is not None:
        read = read + _times(weights[..., :num_before], head[1][0])
    return read.view(rows, heads, length, size).transpose(1, 2).contiguous()


def _times(many: Tensor, one: Tensor) -> Tensor:
    """Multiply the matrices of all rows, (rows, key heads, n, m), by the same of each head, (key heads, m, k)."""
    rows, shared, count, _ = many.shape
    product = torch.matmul(many.transpose(0, 1).reshape(shared, rows * count, -1), one)
    return product.view(shared, rows, count, -1).transpose(0, 1)
