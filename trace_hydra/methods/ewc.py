"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3), one quadratic penalty for all tasks.

Paper -> code:  lambda -> strength;  F_i -> fisher[name], mean squared gradient of log p(answer | prompt), a row at a
        time, at the end of the task's stage (`fisher.diagonal_fisher`, reduction "sum");  theta*_A -> anchor[name]
    lambda/2 * sum_i F_i (theta_i - theta*_A,i)^2 -> loss term "ewc", from the second stage on (0 in the first)
    later tasks: online EWC (Schwarz et al. 2018, arXiv:1805.06370, eq. 9): F* <- gamma F* + F behind each stage, the
        penalty takes gamma F* around the last weights. gamma=1: the sum of all tasks' F, with the latest anchor.
Differs from the paper: one anchor for all tasks, not one a task (T times the memory); answers come from the data, not
    from the model (the empirical Fisher); F from a sample of the rows.
Scale: F is not normalised. With "sum" a task of T-token answers has up to T^2 times the F of the same loss's mean over
    tokens, so no strength fits short and long answers: on FOMC, ScienceQA, NumGLUE-cm 400 forgot more than no penalty.
    The default is therefore "mean": F of what "lm" is, and of the loss that official TRACE's 400 goes with. The term
    is logged apart from "lm", mean and largest F in trace_hydra.log.
Differs from official TRACE: Fisher at the end of the stage, a row at a time, of the task loss alone (there the squared
    gradient of every training batch along the path, penalty included, model/Regular/EWC.py:36-40, 123).
Memory: 8 bytes per trainable parameter (F and anchor, fp32) on the CPU. From the second stage on, on the device while
    it trains: the same again up to 8 GB (`resident.home`), else one weight's at a time; and 4 per trainable parameter
    for the penalty's gradient during a backward pass.
Compute: one forward and backward pass per `fisher_examples` row and stage; a sum over the weights per micro-batch,
    for which F and anchor cross the bus twice where they are not kept on the device.
"""

import logging
from collections.abc import Mapping
from math import isfinite
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from trace_hydra.context import StageContext
from trace_hydra.errors import ConfigError, MethodError
from trace_hydra.methods.base import Method
from trace_hydra.methods.fisher import diagonal_fisher
from trace_hydra.methods.resident import held, home
from trace_hydra.sizes import RunSize, StateSize

log = logging.getLogger(__name__)


class EWC(Method):
    """Hold the weights that mattered for earlier tasks near where they were.

    Args:
        strength: lambda, above 0.
        gamma: Share of the earlier tasks' Fisher that is kept from stage to stage, in (0, 1].
        fisher_examples: Rows of each task that its Fisher is taken from, at least 1; all if there are fewer.
        fisher_reduction: Over an answer's tokens: "mean", as in the loss; "sum", the answer's log-likelihood.
    """

    terms = ("lm", "ewc")
    published = MappingProxyType({"full": "EWC"})

    def __init__(self, *, strength: float, gamma: float, fisher_examples: int, fisher_reduction: str):
        if not strength > 0:
            raise ConfigError(f"method.strength={strength} must be above 0; it is the weight of the penalty.")
        if not 0 < gamma <= 1:
            raise ConfigError(
                f"method.gamma={gamma} must be in (0, 1]; it is the share of earlier tasks' Fisher that stays."
            )
        if fisher_examples < 1:
            raise ConfigError(
                f"method.fisher_examples={fisher_examples} must be at least 1; it is the number of rows behind the "
                "Fisher of a task."
            )
        if fisher_reduction not in ("mean", "sum"):
            raise ConfigError(
                f"method.fisher_reduction={fisher_reduction} must be mean (over an answer's tokens, as in the loss) or "
                "sum (the log-likelihood of the whole answer)."
            )
        self.strength, self.gamma = strength, gamma
        self.fisher_examples, self.fisher_reduction = fisher_examples, fisher_reduction
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self._pull: dict[str, tuple[Tensor, Tensor]] = {}  # Fisher and anchor while a stage trains

    def begin_stage(self, ctx: StageContext) -> None:
        """Copy Fisher and anchor to the device if they are small."""
        place = home(8 * sum(fisher.numel() for fisher in self.fisher.values()), ctx.device)
        self._pull = {name: (fisher.to(place), self.anchor[name].to(place)) for name, fisher in self.fisher.items()}

    def losses(self, ctx: StageContext, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The task's loss, and the penalty; the penalty is 0 in the first stage and at the first step of any."""
        loss = ctx.lm_loss(batch)
        return {"lm": loss, "ewc": self.penalty(ctx) if self._pull else loss.new_zeros(())}

    def penalty(self, ctx: StageContext) -> Tensor:
        """Compute strength/2 * gamma * sum F (theta - theta*)^2 over what trains: scalar fp32, with gradient."""
        weights = ctx.trainable()
        parts = [_Pull.apply(weights[name], fisher, anchor) for name, (fisher, anchor) in self._pull.items()]
        return 0.5 * self.strength * self.gamma * torch.stack(parts).sum()

    def end_stage(self, ctx: StageContext) -> None:
        """Add this task's Fisher and move the anchor here.

        Raises:
            MethodError: If a gradient is not finite.
        """
        self._pull = {}
        rows = ctx.task.train
        sample = ctx.rng.sample(list(rows), min(len(rows), self.fisher_examples))
        new = diagonal_fisher(ctx, sample, self.fisher_reduction)
        total = float(sum(fisher.sum(dtype=torch.float64) for fisher in new.values()))
        if not isfinite(total):
            raise MethodError(
                f"stage {ctx.stage.index} ({ctx.task.name}): the Fisher sums to {total} over {len(sample)} rows; a "
                "gradient overflowed. Set trainer.precision=32-true or bf16-mixed."
            )
        log.info(
            "Fisher of %s: %d rows, mean %.3g, largest %.3g.",
            ctx.task.name,
            len(sample),
            total / sum(fisher.numel() for fisher in new.values()),
            max(float(fisher.max()) for fisher in new.values()),
        )
        for name, fisher in new.items():
            self.fisher[name] = self.gamma * self.fisher[name] + fisher if name in self.fisher else fisher
        self.anchor = {
            name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in ctx.trainable().items()
        }

    def state_size(self, size: RunSize) -> StateSize:
        """Fisher and anchor; on the device again or a weight's at a time, and the penalty's gradient."""
        kept = 8 * size.num_trainable
        return StateSize(stored=kept, device=4 * size.num_trainable + held(kept, 12 * size.largest_trainable))

    def state_dict(self) -> dict[str, Any]:
        """Fisher and anchor of each weight."""
        return {
            **{f"fisher.{name}": fisher for name, fisher in self.fisher.items()},
            **{f"anchor.{name}": anchor for name, anchor in self.anchor.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take Fisher and anchor back."""
        for kind, kept in (("fisher", self.fisher), ("anchor", self.anchor)):
            kept.clear()
            kept.update({key.removeprefix(f"{kind}."): state[key] for key in state if key.startswith(f"{kind}.")})


class _Pull(torch.autograd.Function):
    """sum F (theta - theta*)^2 over a weight; F and theta* come to its device only while they are used."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, fisher: Tensor, anchor: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight)
        ctx.kept = fisher, anchor
        return (fisher.to(weight.device) * (weight.float() - anchor.to(weight.device)).square()).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (weight,), (fisher, anchor) = ctx.saved_tensors, ctx.kept
        difference = weight.float() - anchor.to(weight.device)
        return (gradient * fisher.to(weight.device) * (2 * difference)).to(weight.dtype), None, None
