"""Causal attention by blocks of queries: products of matrices that stay in a CPU's cache, half of them never computed.

A block of queries sees the keys up to its own end, so of the scores above the diagonal only those within a block are
computed, and masked. Scores are in the type of the inputs, their softmax is computed in at least fp32.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KEPT = 2**23
"""Weights of a layer that are kept for the backward pass, at most; of more they are computed again."""
_SHORT = 512
"""Rows up to this length are computed by 64 queries at a time, longer ones by 128."""


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attend; every token to itself and those before it. Can be differentiated once.

    Args:
        query: (batch, heads, seq, size).
        key: (batch, key heads, seq, size); neighbouring query heads share a key head.
        value: Likewise.
        scaling: Of the scores.

    Returns:
        (batch, seq, heads, size).
    """
    if torch.is_autocast_enabled(query.device.type):
        kind = torch.get_autocast_dtype(query.device.type)
        query, key, value = (one if one.dtype == torch.float64 else one.to(kind) for one in (query, key, value))
    return _Blocks.apply(query, key, value, scaling)  # type: ignore[return-value]


class _Blocks(torch.autograd.Function):
    """Sizes below: n rows times key heads, r query heads a key head, d the size of a head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        batch, heads, length, size = query.shape
        shared = key.shape[1]
        keys, values = key.reshape(-1, length, size), value.reshape(-1, length, size)  # (n, seq, d)
        queries = (query * scaling).reshape(batch * shared, -1, length, size)  # (n, r, seq, d)
        output = query.new_empty(batch, length, heads, size)
        keep = any(ctx.needs_input_grad) and batch * heads * length * (length + 1) // 2 <= KEPT
        kept = []
        for start, end in _spans(length):
            weights = _weights(queries, keys, start, end)  # (n, r * block, end)
            read = torch.bmm(weights, values[:, :end]).view(batch, shared, -1, end - start, size)
            output[:, start:end].view(batch, end - start, shared, -1, size).copy_(read.permute(0, 3, 1, 2, 4))
            kept += [weights] if keep else []
        ctx.save_for_backward(queries, keys, values, *kept)
        ctx.scaling, ctx.shapes = scaling, (query.shape, key.shape)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        queries, keys, values, *kept = ctx.saved_tensors
        batch, heads, length, size = ctx.shapes[0]
        shared = ctx.shapes[1][1]
        of_queries = torch.empty_like(queries)
        # Sums over the blocks, in at least fp32.
        sums = torch.promote_types(keys.dtype, torch.float32)
        of_keys, of_values = torch.zeros_like(keys, dtype=sums), torch.zeros_like(values, dtype=sums)
        grouped = gradient.to(values.dtype).reshape(batch, length, shared, -1, size).permute(0, 2, 3, 1, 4)
        for index, (start, end) in enumerate(_spans(length)):
            weights = kept[index] if kept else _weights(queries, keys, start, end)
            given = grouped[:, :, :, start:end].reshape(batch * shared, -1, size)  # (n, r * block, d)
            of_values[:, :end] += torch.bmm(weights.transpose(1, 2), given)
            of_weights = torch.bmm(given, values[:, :end].transpose(1, 2))
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            block = queries[:, :, start:end]
            of_queries[:, :, start:end] = torch.bmm(of_scores, keys[:, :end]).view_as(block)
            of_keys[:, :end] += torch.bmm(of_scores.transpose(1, 2), block.reshape(len(keys), -1, size))
        of_queries = of_queries.mul_(ctx.scaling).view(batch, heads, length, size)
        shape = ctx.shapes[1]
        return of_queries, of_keys.to(keys.dtype).view(shape), of_values.to(values.dtype).view(shape), None


def _weights(queries: Tensor, keys: Tensor, start: int, end: int) -> Tensor:
    """Weights of the queries of a block, scaled already, over the keys up to its end: (n, r * block, end)."""
    width = end - start
    scores = torch.bmm(queries[:, :, start:end].reshape(len(keys), -1, keys.shape[-1]), keys[:, :end].transpose(1, 2))
    later = torch.full((width, width), float("-inf"), dtype=scores.dtype, device=scores.device).triu_(1)
    scores.view(len(keys), -1, width, end)[..., start:] += later
    return torch.softmax(scores, -1)  # of 16-bit numbers it is computed in fp32, in one pass


def _spans(length: int) -> Iterator[tuple[int, int]]:
    """Cut a row into blocks of queries."""
    width = 64 if length <= _SHORT else 128
    for start in range(0, length, width):
        yield start, min(start + width, length)
