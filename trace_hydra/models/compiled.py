"""Decoder layers compiled by torch.compile: each once for all of its kind, whatever the shapes of batches.

Compiled is what trains: in train mode, with gradients, without a cache. Everything else (answers, log-likelihoods, a
layer that somebody watches by a hook) runs as without. Attention on a CPU (`models.blocks`) stays outside.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trace_hydra.errors import ConfigError

log = logging.getLogger(__name__)

ADVICE = (
    "Install a C++ compiler (g++, or the one that CXX names) and the headers of Python, or set trainer.compile=false."
)


def compile_problems(wanted: Any) -> list[str]:
    """List why torch.compile cannot run here, as far as that is known without trying."""
    if not isinstance(wanted, bool):
        return [f"trainer.compile={wanted!r} must be true or false."]
    if not wanted:
        return []
    named = os.environ.get("CXX")
    compilers = [named] if named else ["g++", "clang++"]
    if not any(shutil.which(one) for one in compilers):
        return [f"trainer.compile=true needs a C++ compiler, and there is no {' or '.join(compilers)}. {ADVICE}"]
    return []


def compile_layers(model: nn.Module, device: torch.device) -> None:
    """Let a model's decoder layers run compiled where they train, in place; names of weights stay as they are.

    Compiled is on the first pass, with sizes of batches left open.

    Args:
        model: Wrapped or not; what is put into its layers later is compiled with them.
        device: Where it will train.

    Raises:
        ConfigError: If the compiler does not work.
    """
    _try(device)
    for layer in decoder_layers(model):
        layer._compiled_call_impl = _Call(layer)


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Find the layers that transformers says are never to be split over devices."""
    kinds = {name for one in model.modules() for name in getattr(one, "_no_split_modules", None) or ()}
    yield from (one for one in model.modules() if type(one).__name__ in kinds)


class _Call:
    """Calls a layer compiled or as it is; what is compiled is shared by all layers of the same code."""

    def __init__(self, layer: nn.Module):
        self._layer = layer
        # Dropout draws what it would draw without.
        self._compiled = torch.compile(layer._call_impl, dynamic=True, options={"fallback_random": True})

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        layer = self._layer
        trains = layer.training and torch.is_grad_enabled() and keywords.get("past_key_values") is None
        # Compiled code would not hear of hooks that come later.
        if not trains or any(one._forward_hooks or one._forward_pre_hooks for one in layer.modules()):
            return layer._call_impl(*arguments, **keywords)
        return self._compiled(*arguments, **keywords)


def _try(device: torch.device) -> None:
    """Compile something small."""

    def small(values: torch.Tensor) -> torch.Tensor:
        return (values * 2).sin() + 1

    try:
        torch.compile(small)(torch.ones(8, device=device))
    # Broad on purpose: whatever a compiler or its absence makes torch raise.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines[0] if lines else type(error).__name__)[:300]
        raise ConfigError(
            f"trainer.compile=true: torch.compile does not work here: {reason.rstrip('.')}. {ADVICE}"
        ) from error
