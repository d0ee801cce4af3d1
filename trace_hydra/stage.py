"""One Lightning module a stage: it calls the method's hooks, sums its loss terms and keeps them for the loggers."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from trace_hydra import ranks
from trace_hydra.context import StageContext
from trace_hydra.data.batches import to_device
from trace_hydra.errors import MethodError
from trace_hydra.memory import is_out_of_memory
from trace_hydra.methods.base import Method
from trace_hydra.models.dropout import draw_less
from trace_hydra.models.precision import at_least_fp32
from trace_hydra.plan import Phase
from trace_hydra.readings import Readings
from trace_hydra.strategies import average, average_gradients, load_optimizer, put_whole, whole

log = logging.getLogger(__name__)


class StageModule(LightningModule):
    """Trains one phase of a stage.

    Args:
        method: Gives the losses and edits gradients and weights.
        ctx: The stage; its model is what trains.
        phase: What is trained on.
        optimizer: Builds the optimizer from parameters; its learning rate is scaled by the phase.
        schedule: "constant", "linear" or "cosine"; the last two fall to 0 at the end of the phase.
        warmup_steps: Optimizer steps of linear warm-up.
        total_steps: Optimizer steps of the phase.
        clip_norm: Largest global gradient norm, or None.
        optimizer_state: State of the last phase's optimizer to go on with, over the same weights (optim.carry).
        on_nonfinite: "stop", or "skip_batch": no step is taken where a loss or gradient is not finite.
        seen_terms: Of the part of the phase that is behind us, if it is taken up again.
        skipped: Likewise.
        seed: Any string, another for each phase; what processes draw for themselves in a step depends on it.
        votes: Asked in each step that several processes share: whether this one was asked to stop, and whether it is
            time to save; `agreed` is then whether any said so.
    """

    strict_loading = False  # type: ignore[assignment]  # a checkpoint's weights are put back by `resume`

    def __init__(
        self,
        *,
        method: Method,
        ctx: StageContext,
        phase: Phase,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: str,
        warmup_steps: int,
        total_steps: int,
        clip_norm: float | None,
        optimizer_state: dict[int, Any] | None = None,
        on_nonfinite: str = "stop",
        seen_terms: Mapping[str, float] | None = None,
        skipped: int = 0,
        seed: str = "",
        votes: Callable[[], tuple[bool, bool]] = lambda: (False, False),
    ):
        super().__init__()
        self.method, self.ctx, self.phase = method, ctx, phase
        self.model = ctx.model
        self._whole = (ctx.model,)
        """Not a part of this module while `model` is a sharded twin of it."""
        self.seed = seed
        self.build_optimizer = optimizer
        self.schedule, self.warmup_steps, self.total_steps = schedule, warmup_steps, total_steps
        self.clip_norm = clip_norm
        self.optimizer_state = optimizer_state
        self.readings = Readings(seen_terms)
        """Loss terms and gradient norms, as far as the device has been asked for them."""
        self.last_shape = "before the first"
        """Rows x tokens of the last micro-batch, for messages."""
        self.steps_before = 0
        """Optimizer steps of the stage's phases before this one."""
        self.last_tokens = 0
        """Tokens of the last step without padding."""
        self.tokens_seen = 0
        """Tokens of the stage's steps so far without padding, earlier phases and all processes included."""
        self.skipping = on_nonfinite == "skip_batch"
        self.skipped = skipped
        """Steps of this phase that were not taken, for a value that was not finite."""
        self.votes, self.agreed = votes, (False, False)
        self._meets = self._has_told = False
        """Whether the backward pass under way is the last of the step."""
        # A method may not be able to work with gradients that are not finite.
        self._looks_first = self.skipping or type(method).edit_gradients is not Method.edit_gradients

    def configure_model(self) -> None:
        """Let a strategy that splits weights do so; `whole_again` undoes it."""
        if (shard := getattr(self.trainer.strategy, "shard", None)) is not None and self.model is self.ctx.model:
            self.model = self.ctx.model = shard(self._whole[0].cpu())

    def whole_again(self) -> None:
        """Bring split weights back to the model that they are of."""
        if self.sharded:
            put_whole(self._whole[0], self.model)
            self.model = self.ctx.model = self._whole[0]

    @property
    def sharded(self) -> bool:
        """Whether the weights are split over the processes now."""
        return self.model is not self._whole[0]

    @property
    def _zero(self) -> Any:
        """DeepSpeed's engine, where it holds weights and gradients; else None."""
        return getattr(self.trainer.strategy, "engine", None)

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule over what trains now."""
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        optimizer = self.build_optimizer(weights)
        if self.optimizer_state:
            load_optimizer(optimizer, {**optimizer.state_dict(), "state": self.optimizer_state})
        for group in optimizer.param_groups:
            group["lr"] *= self.phase.lr_scale
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Leave eval mode: models arrive in it, and Lightning would keep dropout and checkpointing off."""
        if self.device.type == "cpu":
            draw_less(self.model)
        self.model.train()

    def on_train_end(self) -> None:
        """Read what nobody has asked for."""
        self.read()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a step's micro-batches."""
        return [to_device(one, device) for one in batch]

    def training_step(self, batch: Sequence[dict[str, Any]], batch_index: int) -> Tensor:
        """Sum the method's loss terms over the micro-batches of a step; the last one's backward pass is Lightning's.

        Raises:
            MethodError: If a declared term is missing.
        """
        (self._zero.begin if self._zero else self.optimizers().zero_grad)()  # type: ignore[union-attr]
        self.readings.begin(self.where(), batch[0]["step_ids"])
        self.last_tokens = sum(one["num_tokens"] for one in batch)
        self.tokens_seen += batch[0]["step_tokens"]
        self._meets = False
        with ranks.own_draws(self.ctx, f"{self.seed}-{self.trainer.global_step}"), self._told():
            self._communicate(False)
            for one in batch[:-1]:
                loss = self._loss(one)
                with torch.autocast(self.device.type, enabled=False):  # as Lightning's; gradient hooks compute too
                    self.trainer.strategy.backward(loss, None)
            self._communicate(True)
            loss = self._loss(batch[-1])
        self._meets = ranks.size() > 1
        return loss

    def backward(self, loss: Tensor, *arguments: Any, **keywords: Any) -> None:
        """Take a backward pass."""
        with self._told():
            if self._zero:
                self._zero.backward(loss)
            else:
                super().backward(loss, *arguments, **keywords)

    def on_after_backward(self) -> None:
        """Behind the last backward pass of a step, put together what the processes have of it."""
        if self._meets:
            self._meets = False
            self._meet(None)
            self.readings.pool(average)

    def optimizer_zero_grad(self, *arguments: Any, **keywords: Any) -> None:
        """Keep the gradients of the micro-batches before the last; `training_step` clears them before the first."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the method edit the accumulated gradients; it sees none that are not finite.

        Raises:
            MethodError: If there are such gradients, unless such steps are skipped.
        """
        if self._looks_first:
            if not self._scales():
                self.readings.watch("the gradient", self._norm())
            if problem := self.readings.problem():
                if not self.skipping:
                    raise MethodError(f"{problem}. {self._advice()}")
                self._drop_gradients()
                return
        self.method.edit_gradients(self.ctx)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip what the method left; Lightning's own clipping refuses fused optimizers."""
        if self._zero:  # clips as it steps
            if not self._looks_first:
                self.readings.watch("the gradient", self._norm())
            return
        weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights])  # type: ignore[misc]
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(weights, self.clip_norm, norm)
        if weights and not self._scales():
            self.readings.watch("the gradient, as the method left it,", whole(norm))

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        """Step, then let the method change weights."""
        super().optimizer_step(*arguments, **keywords)
        if self.skipping and (problem := self.readings.problem()):
            self.skipped += 1
            self.readings.drop()
            log.warning("%s; no step is taken.", problem)
        else:
            self.method.after_step(self.ctx)

    def read(self) -> None:
        """Ask the device for what was measured since it was last asked: the only wait for it in plain training.

        Raises:
            MethodError: If a value was not finite; the weights are then lost and were not stored.
        """
        if problem := self.readings.read():
            raise MethodError(f"{problem}. {self._advice()}")

    def _rate(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        progress = min(progress, 1.0)
        if self.schedule == "linear":
            return 1.0 - progress
        return 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * progress))))

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        """Sum the terms of a micro-batch, by its share of the step."""
        self.last_shape = f"the last of {' x '.join(map(str, batch['input_ids'].shape))} tokens"
        terms = self._forward(lambda: self.method.losses(self.ctx, batch))
        if missing := [name for name in self.method.terms if name not in terms]:
            raise MethodError(f"{self.where()}: method.losses gave no term {missing}; it gave {sorted(terms)}.")
        self.readings.add(terms, batch["weight"])
        return torch.stack([term.to(at_least_fp32(term.dtype)) for term in terms.values()]).sum() * batch["weight"]

    def _forward(self, call: Callable[[], Any]) -> Any:
        """Let the method take its passes through the model."""
        return self._zero.forward(call) if self._zero else call()

    def _communicate(self, now: bool) -> None:
        """Say whether the next backward pass of split weights is a step's last; FSDP's adds up over the processes."""
        if self._zero:
            self._zero.boundary(now)
        elif self.sharded:
            self.model.set_requires_gradient_sync(now)  # type: ignore[operator]

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tell the processes that wait for this one's gradients of an error.

        Split weights make processes meet within the passes too: who fails there ends, and the launcher ends the others.
        """
        try:
            yield
        except Exception as error:
            if ranks.size() > 1 and not self.sharded and not self._has_told:
                self._has_told = True
                self._meet(error)
            raise

    def _meet(self, error: Exception | None) -> None:
        """Agree on how the step went, and average the gradients.

        Raises:
            FailedElsewhere: If it failed in another process.
            torch.OutOfMemoryError: If memory ran out in another process, so that all of them can do something about it.
        """
        failure = 0 if error is None else 1 if is_out_of_memory(error) else 2
        weights = [] if error is not None else [weight for weight in self.parameters() if weight.requires_grad]
        missing = any(weight.grad is None for weight in weights)
        worst, lacks, *agreed = ranks.most([failure, missing, *self.votes()])
        self.agreed = bool(agreed[0]), bool(agreed[1])
        if worst == 2 and failure < 2:
            raise ranks.FailedElsewhere(1)
        if worst == 1 and failure == 0:
            raise torch.OutOfMemoryError("another process could not allocate memory")
        if worst == 0 and not self.sharded:
            average_gradients(weights, bool(lacks))

    def _drop_gradients(self) -> None:
        """Let the optimizer leave the weights, and their state, alone in this step."""
        if self._zero:
            self._zero.drop()
        for weight in self.parameters():
            weight.grad = None

    def _norm(self) -> Tensor:
        if self._zero:
            return self._zero.norm()
        gradients = [weight.grad for weight in self.parameters() if weight.grad is not None]
        if not gradients:
            return torch.zeros(())
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)  # type: ignore  # 16-bit ones would overflow
        return whole(torch.stack(norms).norm())

    def _scales(self) -> bool:
        """Whether a gradient scaler (16-mixed) is at work: steps that are not finite belong to finding the scale."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def _advice(self) -> str:
        rate = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        return (
            f"Lower optim.optimizer.lr (now {rate:g}), set trainer.precision=32-true, or leave such steps out: "
            "on_nonfinite=skip_batch."
        )

    def where(self) -> str:
        """Name stage, phase and step."""
        stage = self.ctx.stage
        return f"stage {stage.index} ({stage.task}), phase '{self.phase.name}', step {self.trainer.global_step + 1}"
