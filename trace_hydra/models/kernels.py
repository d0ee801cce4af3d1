"""Kernels for norms, rotary positions and gated layers: transformers' own, or Liger's (arXiv:2410.10989)."""

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

from trace_hydra.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

KINDS = ("torch", "liger")
TAKEN = {
    "rope": True, "rms_norm": True, "swiglu": True, "geglu": True,
    # logits are computed at labels only; these would take the place of the model's forward pass, or of torch's function
    "cross_entropy": False, "fused_linear_cross_entropy": False,
}  # fmt: skip
"""What is asked of Liger; it hears of these what an architecture has."""


def kernel_problems(kernels: str, accelerator: str) -> list[str]:
    """List why these kernels cannot run here.

    Args:
        kernels: model.kernels.
        accelerator: trainer.accelerator.
    """
    if kernels not in KINDS:
        return [f"model.kernels={kernels!r} is none of {', '.join(KINDS)}."]
    if kernels == "torch":
        return []
    if find_spec("liger_kernel") is None:
        return [f"model.kernels={kernels} needs liger-kernel: pip install 'trace-hydra[liger]'."]
    import torch

    if accelerator == "cpu" or not torch.cuda.is_available():
        there = "trainer.accelerator=cpu uses none" if accelerator == "cpu" else "there is none"
        return [f"model.kernels={kernels} needs a GPU, and {there}. Set model.kernels=torch."]
    return []


def use_kernels(model: "PreTrainedModel", kernels: str) -> None:
    """Put kernels into a loaded model, in place.

    Liger also replaces classes and the rotary function in transformers' module of the architecture: models of it that
    are loaded later in this process get them too.

    Args:
        model: Not wrapped.
        kernels: One of `KINDS`.

    Raises:
        ConfigError: If there are none for the architecture.
    """
    if kernels == "torch":
        return
    from liger_kernel.transformers import monkey_patch  # type: ignore[import-not-found]  # an extra

    known = sorted(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN)
    if (architecture := model.config.model_type) not in known:  # Liger would write that into its log and do nothing
        raise ConfigError(
            f"model.kernels={kernels}: Liger has none for the architecture {architecture!r}. It knows "
            f"{', '.join(known)}. Set model.kernels=torch."
        )
    monkey_patch._apply_liger_kernel_to_instance(model=model, **TAKEN)
    log.info("%s computes norms, rotary positions and gated layers by Liger's kernels.", type(model).__name__)
