"""Orthogonal gradient descent (Farajtabar et al. 2020, arXiv:1910.07104, algorithm 1, variant OGD-GTL).

Paper -> code:  S -> basis, (directions, trainable weights), rows orthonormal by Gram-Schmidt over all tasks
    direction -> gradient of a train row's ground-truth logit at the weights its stage ended with (OGD-GTL)
    g~ = g - sum of proj_v(g) over v in S -> `edit_gradients`
Differs from the paper: a row has several answer tokens, so its direction is the gradient of the MEAN of their
    ground-truth logits; the optimizer need not be SGD: AdamW leaves the subspace its gradient was projected to, so
    after each step the weights' part in the span of S is put back to what it was when the stage began (`after_step`).
    This is exact up to the rounding of the weights' dtype, with weight decay too, and needs no copy of the weights,
    only one number a direction.
Differs from official TRACE: logit gradients (there gradients of the training loss); independent directions (there the
    same tensor object appended at every step, all columns equal and Gram-Schmidt divides by zero,
    model/Regular/OGD.py:142); the number of directions is bounded (there max_memories=150 is read by nothing).
Memory: 4 bytes per trainable weight and direction, on the CPU and, while a stage trains, again on the device: 20 GB for
    r=8 adapters of 7B (4.2 M weights) after 8 tasks of 150 directions.
Compute: per direction one forward and backward when a stage ends; per step 8 multiplications a number of the basis.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trace_hydra.context import StageContext, batch_of
from trace_hydra.data.encode import EncodedRow
from trace_hydra.errors import ConfigError, MethodError
from trace_hydra.methods.base import Method
from trace_hydra.methods.gradients import (
    extend_basis,
    gradient_of,
    project_off,
    read_gradients,
    read_weights,
    write_gradients,
    write_weights,
)
from trace_hydra.sizes import RunSize, StateSize

log = logging.getLogger(__name__)
_TOLERANCE = 1e-3  # a direction with less of its norm outside the span is rounding noise in fp32


class OGD(Method):
    """Move only where the outputs on rows of past tasks do not change to first order.

    Args:
        directions_per_task: Rows of each task whose logit gradients are protected, at least 1.
    """

    tunings = ("lora",)
    tuning_reason = (
        "the basis takes one vector of all trainable weights per stored direction (for 7B weights: 27 GB each in fp32)"
    )

    def __init__(self, *, directions_per_task: int):
        if directions_per_task < 1:
            raise ConfigError(
                f"method.directions_per_task={directions_per_task} must be at least 1; it is the number of rows "
                "of each task whose logit gradients are protected."
            )
        self.directions_per_task = directions_per_task
        self.basis: Tensor | None = None
        """(directions, trainable weights), CPU, fp32; None before the first stage ends."""
        self.active: Tensor | None = None
        """The basis on the device, while a stage trains."""
        self.held: Tensor | None = None
        """The weights' coordinates in the basis when the stage began, (directions,)."""

    def begin_stage(self, ctx: StageContext) -> None:
        """Note where the weights stand in the protected space.

        Raises:
            MethodError: If the stage trains other weights than the basis was made for.
        """
        if self.basis is None:
            return
        weights = read_weights(ctx.trainable())
        if len(weights) != self.basis.shape[1]:
            raise MethodError(
                f"stage {ctx.stage.index} ({ctx.stage.task}) trains {len(weights)} weights; the stored directions have "
                f"{self.basis.shape[1]}. Use the tuning they were made with."
            )
        self.active = self.basis.to(ctx.device)
        self.held = self.active @ weights

    def edit_gradients(self, ctx: StageContext) -> None:
        """Project the gradient off the protected space, so that optimizer and clipping see nothing of it."""
        if self.active is not None:
            parameters = ctx.trainable()
            write_gradients(parameters, project_off(read_gradients(parameters), self.active))

    def after_step(self, ctx: StageContext) -> None:
        """Undo what the optimizer moved within the protected space."""
        if self.active is not None and self.held is not None:
            parameters = ctx.trainable()
            weights = read_weights(parameters)
            write_weights(parameters, weights - (self.active @ weights - self.held) @ self.active)

    def end_stage(self, ctx: StageContext) -> None:
        """Add this task's directions to the basis."""
        self.active = self.held = None
        num_weights = sum(weight.numel() for weight in ctx.trainable().values())
        basis = self.basis if self.basis is not None else torch.zeros(0, num_weights)
        chosen = ctx.rng.sample(list(ctx.task.train), min(self.directions_per_task, len(ctx.task.train)))
        directions = logit_gradients(ctx, ctx.encode(chosen))
        self.basis = extend_basis(basis, directions, _TOLERANCE, ctx.device)
        log.info("%s: %d of %d directions are new.", ctx.task.name, len(self.basis) - len(basis), len(chosen))

    def state_size(self, size: RunSize) -> StateSize:
        """The basis if all directions are independent; it and three vectors on the device."""
        rows = min(sum(min(self.directions_per_task, rows) for rows in size.rows), size.num_trainable)
        basis = 4 * size.num_trainable * rows
        return StateSize(stored=basis, device=basis + 12 * size.num_trainable)

    def state_dict(self) -> dict[str, Any]:
        """The basis."""
        return {} if self.basis is None else {"basis": self.basis}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the basis back."""
        self.basis = state.get("basis")


def logit_gradients(ctx: StageContext, rows: list[EncodedRow]) -> Iterator[Tensor]:
    """Yield for each row the gradient of its mean ground-truth logit, (trainable weights,), fp32; `.grad` stays."""
    for row in rows:
        with torch.enable_grad():
            with ctx.autocast():
                logits, labels = ctx.label_logits(batch_of([row], ctx.device))  # (labels, vocab), (labels,)
            if not labels.numel():
                continue
            gradient = gradient_of(logits.float().gather(1, labels[:, None]).mean(), ctx.trainable())
        yield gradient  # outside of autocast, which would go on in whoever takes it
