"""WiSE-FT, weight-space ensembling (Wortsman et al. 2022, arXiv:2109.01903, eq. 1), after each stage.

Paper -> code:  theta_0, the start model -> start, copied before stage 1;  theta_1, fine-tuned -> what a stage leaves
    (1 - alpha) theta_0 + alpha theta_1 -> `interpolate`, in fp32;  alpha -> alpha
    when="each_stage": the next stage goes on from the interpolated weights; when="answer": it goes on from the
    fine-tuned ones, and the model is interpolated for its answers only (the paper's, applied after every stage)
    tuning=lora: theta_0 is the base model, so the interpolation of the merged weights W + s B A is W + alpha s B A, and
    exactly that comes from B <- alpha B (interpolating A and B apart would not give it)
Differs from the paper: there is one fine-tuning; here one after each task.
Differs from official TRACE: no code there.
Memory: one copy of the trained weights in their own precision on the CPU (tuning=lora: none), with when="answer" two
    (tuning=lora: one). Compute: one pass over the weights a stage, nothing per step.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from trace_hydra.context import StageContext
from trace_hydra.errors import ConfigError
from trace_hydra.methods.base import Method
from trace_hydra.sizes import RunSize, StateSize


class WiseFT(Method):
    """Move the weights back towards the start model after each stage.

    Args:
        alpha: Weight of the fine-tuned model, in [0, 1]: 0 is the start model, 1 plain fine-tuning.
        when: "each_stage" or "answer".
    """

    sharded = True

    def __init__(self, *, alpha: float, when: Literal["each_stage", "answer"]):
        if not 0 <= alpha <= 1:
            raise ConfigError(f"method.alpha={alpha} must be in [0, 1]; it is the weight of the fine-tuned model.")
        if when not in ("each_stage", "answer"):
            raise ConfigError(f"method.when={when!r} must be 'each_stage' or 'answer'.")
        self.alpha, self.when = alpha, when
        self.start: dict[str, Tensor] = {}
        self.tuned: dict[str, Tensor] = {}

    def setup(self, ctx: StageContext) -> None:
        """Copy the start weights; an adapter's start is no change, nothing to copy."""
        if ctx.tuning.name != "lora":
            self.start = _copies(ctx)

    def begin_stage(self, ctx: StageContext) -> None:
        """Go on from the fine-tuned weights if the model was interpolated for its answers only."""
        with torch.no_grad():
            for name, weight in ctx.trainable().items() if self.tuned else ():
                weight.copy_(self.tuned[name])
        self.tuned = {}

    def end_stage(self, ctx: StageContext) -> None:
        """Interpolate the weights in place."""
        if self.when == "answer":
            self.tuned = _copies(ctx)
        with torch.no_grad():
            for name, weight in ctx.trainable().items():
                if ctx.tuning.name != "lora":
                    weight.copy_(interpolate(self.start[name].to(weight.device), weight, self.alpha))
                elif ".lora_B." in name:
                    weight.mul_(self.alpha)

    def state_size(self, size: RunSize) -> StateSize:
        """One copy of what trains, none under tuning=lora; one more with when="answer"."""
        adapters = any(".lora_" in name for name in size.trainable)
        copies = (not adapters) + (self.when == "answer")
        return StateSize(stored=copies * size.weight_bytes * size.num_trainable)

    def state_dict(self) -> dict[str, Any]:
        """The start weights, and the fine-tuned ones with when="answer"."""
        start = {f"start.{name}": weight for name, weight in self.start.items()}
        return {**start, **{f"tuned.{name}": weight for name, weight in self.tuned.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take both back."""
        self.start, self.tuned = (
            {name.removeprefix(kind): weight for name, weight in state.items() if name.startswith(kind)}
            for kind in ("start.", "tuned.")
        )


def interpolate(start: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    """Compute (1 - alpha) * start + alpha * tuned (eq. 1) in fp32; alpha 0 and 1 give the ends bit for bit."""
    return (1 - alpha) * start.float() + alpha * tuned.float()


def _copies(ctx: StageContext) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().clone() for name, weight in ctx.trainable().items()}
