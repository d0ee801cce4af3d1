"""Exponential moving average of the weights (Tarvainen & Valpola 2017, arXiv:1703.01780, eq. 1).

Paper -> code:  theta'_t = alpha theta'_{t-1} + (1 - alpha) theta_t -> `after_step`;  theta' -> shadow, it starts as the
    weights themselves;  alpha -> decay
    warmup: alpha_t = min(decay, 1 - 1 / (t + 1)), as in the authors' code: while that is the smaller one, the average
    is the plain mean of the start and the t iterates
    Continual use: Stojanovski et al. 2022, arXiv:2211.03186: a fast model trains, its slow average answers
    continue_from="slow": after a stage the model is the average, the next stage goes on from it and t starts again;
    "fast": the model is the average for its answers only, fast weights and average go on in the next stage (the paper)
Differs from the paper: no consistency loss, the average is only a model to answer with. Under tuning=lora A and B are
    averaged apart, which is not the average of B A.
Differs from official TRACE: no code there.
Memory: 4 bytes per trainable parameter on the weights' device while a stage trains (a shadow on the CPU would cross the
    bus in every step); with continue_from="fast" average and fast weights are kept on the CPU between stages.
Compute: one pass over the trainable weights per optimizer step.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from trace_hydra.context import StageContext
from trace_hydra.errors import ConfigError
from trace_hydra.methods.base import Method
from trace_hydra.sizes import RunSize, StateSize


class WeightAverage(Method):
    """Answer with a moving average of the weights.

    Args:
        decay: Weight of the old average in each step, in [0, 1); 0 is plain fine-tuning.
        warmup: Whether the first steps take the plain mean.
        continue_from: "slow" or "fast": what the next stage starts from.
    """

    def __init__(self, *, decay: float, warmup: bool, continue_from: Literal["slow", "fast"]):
        if not 0 <= decay < 1:
            raise ConfigError(f"method.decay={decay} must be in [0, 1); it is the old average's weight in each step.")
        if continue_from not in ("slow", "fast"):
            raise ConfigError(f"method.continue_from={continue_from!r} must be 'slow' or 'fast'.")
        self.decay, self.warmup, self.continue_from = decay, warmup, continue_from
        self.step = 0
        """Steps averaged since the average started."""
        self.shadow: dict[str, Tensor] = {}
        self.fast: dict[str, Tensor] = {}

    def begin_stage(self, ctx: StageContext) -> None:
        """Start the average at the weights, or go on with fast weights and average."""
        weights = ctx.trainable()
        with torch.no_grad():
            for name in self.fast:
                weights[name].copy_(self.fast[name])
        if self.fast:
            self.shadow = {name: one.to(weights[name].device) for name, one in self.shadow.items()}
        else:
            self.step, self.shadow = 0, {name: one.detach().float().clone() for name, one in weights.items()}
        self.fast = {}

    def after_step(self, ctx: StageContext) -> None:
        """Move the average towards the new weights (eq. 1)."""
        self.step += 1
        decay = min(self.decay, 1 - 1 / (self.step + 1)) if self.warmup else self.decay
        with torch.no_grad():
            for name, weight in ctx.trainable().items():
                self.shadow[name].mul_(decay).add_(weight.float(), alpha=1 - decay)

    def end_stage(self, ctx: StageContext) -> None:
        """Put the average into the model."""
        weights = ctx.trainable()
        if self.continue_from == "fast":
            self.fast = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(self.shadow[name])
        self.shadow = {name: one.cpu() for name, one in self.shadow.items()} if self.fast else {}

    def state_size(self, size: RunSize) -> StateSize:
        """The average in fp32 on the device; with continue_from="fast" it and the fast weights are kept."""
        kept = (4 + size.weight_bytes) * size.num_trainable if self.continue_from == "fast" else 0
        return StateSize(stored=kept, device=4 * size.num_trainable)

    def state_dict(self) -> dict[str, Any]:
        """Steps, and with continue_from="fast" the average and the fast weights."""
        shadow = {f"shadow.{name}": one.cpu() for name, one in self.shadow.items()}
        return {"step": self.step, **shadow, **{f"fast.{name}": one for name, one in self.fast.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.step = state["step"]
        self.shadow, self.fast = (
            {name.removeprefix(kind): one for name, one in state.items() if name.startswith(kind)}
            for kind in ("shadow.", "fast.")
        )
