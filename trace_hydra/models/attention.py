"""Causal attention for CPUs, as transformers calls it: by blocks of matrices, in place of PyTorch's kernel.

Forward and backward pass together took 2.5 ms by blocks and 18.8 by PyTorch's kernel for 16 rows of 64 tokens, 22 and
84 for 4 of 512, 67 and 174 for one of 2,048 (9 heads of 64, 3 key heads, bf16, one thread of an AMD EPYC). The results
differ by rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from trace_hydra.models import remembered
from trace_hydra.models.blocks import causal_attention

NAME = "sdpa_by_blocks"
"""As transformers knows it."""
_by_blocks: Callable[..., Any] = torch.compiler.disable(causal_attention)
"""A compiler would make code for every number of blocks."""


def use_for_cpu(model: PreTrainedModel) -> None:
    """Let a model that attends by PyTorch's kernel, on a CPU, attend by blocks."""
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
    if (found := remembered.attend(module, query, key, value, attention_mask, scaling, keywords)) is not None:
        return found, None
    length = query.shape[2]
    plain = attention_mask is None and keywords.get("is_causal") is not False and key.shape[2] == length
    if not plain or length == 1 or dropout > 0 or keywords.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **keywords
        )
    return _by_blocks(query, key, value, scaling if scaling is not None else query.shape[-1] ** -0.5), None
