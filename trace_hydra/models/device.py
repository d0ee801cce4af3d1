"""What is done to a loaded model for the device that it trains on."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from trace_hydra.models.attention import use_for_cpu
from trace_hydra.models.compiled import compile_layers
from trace_hydra.models.kernels import use_kernels


def fit_to(device: torch.device, model: PreTrainedModel, trainer: Mapping[str, Any], kernels: str) -> None:
    """Choose attention, kernels and compilation, in place.

    Args:
        device: Where the model will train.
        model: As loaded, on the CPU.
        trainer: The `trainer` node.
        kernels: One of `kernels.KINDS`.

    Raises:
        ConfigError: If the compiler does not work, or the architecture lacks such kernels.
    """
    if device.type == "cpu":
        use_for_cpu(model)
    use_kernels(model, kernels)
    if trainer.get("compile"):
        compile_layers(model, device)
