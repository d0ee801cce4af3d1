"""Tell whether tensors changed, without keeping copies of them."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class Fingerprints:
    """Remembers what tensors held.

    A changed tensor is nearly always told by `torch.hash_tensor`, an XOR of its elements, in a tenth of the time of a
    SHA-256. XOR misses pairs that change alike (two equal elements, say); where it agrees, SHA-256 decides.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]):
        self._known = {name: (quick_hash(tensor), _exact(tensor)) for name, tensor in tensors}

    def changed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pick the tensors that hold something else than they did, or were not there."""
        return {name: tensor for name, tensor in tensors.items() if not self._same(name, tensor)}

    def _same(self, name: str, tensor: Tensor) -> bool:
        if name not in self._known:
            return False
        quick, exact = self._known[name]
        return quick == quick_hash(tensor) and exact == _exact(tensor)


def quick_hash(tensor: Tensor) -> tuple[torch.dtype, torch.Size, int]:
    """Give type, shape and a hash of the elements, which pairs of elements that change alike leave as it is."""
    hashed = 0
    if tensor.numel() and not tensor.is_complex():
        hashed = int(torch.hash_tensor(tensor.detach()).view(torch.int64))
    return tensor.dtype, tensor.shape, hashed


def _exact(tensor: Tensor) -> bytes:
    raw = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(raw)).digest()  # type: ignore[arg-type]
