"""Where a method keeps what it reads at every step: on the device if it is small, else on the CPU."""

import torch

from trace_hydra.sizes import RESIDENT_BYTES


def home(num_bytes: float, device: torch.device | str) -> torch.device:
    """Say where tensors of `num_bytes` together live while a stage trains: the device, or the CPU to be streamed.

    Streaming changes no result: each tensor crosses the bus when it is used, and the arithmetic is the device's.
    """
    return torch.device(device) if num_bytes <= RESIDENT_BYTES else torch.device("cpu")


def held(num_bytes: float, largest: float) -> float:
    """Bytes on the device that `home` leads to: everything, or the largest piece in flight."""
    return num_bytes if num_bytes <= RESIDENT_BYTES else largest
