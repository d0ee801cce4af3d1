"""A model's weights by name: what is stored of it, and how it is put back."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """List parameters and persistent buffers by name; tied ones once."""
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {**dict(model.named_parameters()), **buffers}


def put_weights(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Copy tensors over the model's own of the same names, one at a time.

    Names that the model lacks are left out: a method that adds weights brings them with its own state.

    Returns:
        The names of all tensors.
    """
    own, names = weights_of(model), set()
    with torch.no_grad():
        for name, tensor in tensors:
            names.add(name)
            if name in own:
                own[name].copy_(tensor)
    return names
