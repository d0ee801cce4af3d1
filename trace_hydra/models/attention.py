"""Causal attention for CPUs: products of whole matrices for short rows, PyTorch's blockwise kernel for long ones.

PyTorch's CPU kernel works in blocks that pay for long rows only. Forward and backward pass together took 1.7 ms here
and 10.1 there for 8 rows of 64 tokens, 13.9 and 27.5 for 4 of 256, and as long for rows of 512 (9 heads of 64, bf16,
one thread of an AMD EPYC). The results differ by rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from trace_hydra.models.precision import at_least_fp32

NAME = "sdpa_short_rows"
"""As transformers knows it."""
LONGEST = 384
"""Tokens of the rows whose scores are computed as one matrix."""


def use_for_cpu(model: PreTrainedModel) -> None:
    """Let a model that attends by PyTorch's kernel, on a CPU, choose by the length of its rows."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


@contextmanager
def by_pytorch(model: Any) -> Iterator[None]:
    """Let the model attend by PyTorch's kernel for a while, for code that knows no other."""
    ours = model.config._attn_implementation == NAME
    try:
        if ours:
            model.set_attn_implementation("sdpa")
        yield
    finally:
        if ours:
            model.set_attn_implementation(NAME)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attend; what transformers asks of such a function.

    Args:
        module: The attention layer.
        query: (batch, heads, seq, size).
        key: (batch, key heads, keys, size).
        value: (batch, key heads, keys, size).
        attention_mask: As `sdpa_mask` makes it; None: every token sees itself and those before it.
        dropout: Of the weights.
        scaling: Of the scores; None: 1 / sqrt(size).
        keywords: Further settings, which the general function understands.

    Returns:
        (batch, seq, heads, size), and no weights.
    """
    batch, heads, length, size = query.shape
    plain = attention_mask is None and keywords.get("is_causal") is not False and key.shape[2] == length
    if not plain or not 1 < length <= LONGEST or keywords.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **keywords
        )
    shared = key.shape[1]  # heads that have keys of their own; several query heads read each
    grouped = (query * (scaling if scaling is not None else size**-0.5)).reshape(batch, shared, -1, size)
    scores = torch.matmul(grouped, key.transpose(-1, -2)).view(batch, shared, heads // shared, length, length)
    hidden = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    scores = scores.masked_fill(hidden, float("-inf"))
    weights = torch.softmax(scores, -1, dtype=at_least_fp32(scores.dtype)).to(value.dtype)
    if dropout > 0:
        weights = nn.functional.dropout(weights, dropout)
    read = torch.matmul(weights.view(batch, shared, -1, length), value).view(batch, heads, length, size)
    return read.transpose(1, 2).contiguous(), None
