"""Types of numbers: what losses are computed in, and weights in autocast's type, cast once instead of in every pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The type to compute losses, and softmax, of such numbers in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def cast_once(model: nn.Module) -> Iterator[None]:
    """Under autocast, give linear layers copies of their weights in autocast's type; the results are the same bits.

    Autocast keeps its casts only of weights that train. The copies take memory: where a GPU has too little free,
    nothing happens.
    """
    device = next(model.parameters()).device
    layers = [one for one in model.modules() if isinstance(one, nn.Linear) and one.weight.dtype == torch.float32]
    if not layers or not torch.is_autocast_enabled(device.type):
        yield
        return
    kind = torch.get_autocast_dtype(device.type)
    size = sum(layer.weight.numel() for layer in layers) * kind.itemsize
    if device.type == "cuda" and size > 0.5 * torch.cuda.mem_get_info(device)[0]:
        yield
        return
    before = [(layer, layer.weight, layer.bias) for layer in layers]
    try:
        for layer, weight, bias in before:
            layer.weight = nn.Parameter(weight.detach().to(kind), requires_grad=False)
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach().to(kind), requires_grad=False)
        yield
    finally:
        for layer, weight, bias in before:
            layer.weight, layer.bias = weight, bias
