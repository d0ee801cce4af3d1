"""One Lightning module a stage: it calls the method's hooks, sums its loss terms and keeps them for the loggers."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from trace_hydra.context import StageContext
from trace_hydra.errors import MethodError
from trace_hydra.methods.base import Method
from trace_hydra.plan import Phase

log = logging.getLogger(__name__)

_ADVICE = "Lower optim.optimizer.lr%s, set trainer.precision=32-true, or leave such steps out: on_nonfinite=skip_batch."


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
    ):
        super().__init__()
        self.method, self.ctx, self.phase = method, ctx, phase
        self.model = ctx.model
        self.build_optimizer = optimizer
        self.schedule, self.warmup_steps, self.total_steps = schedule, warmup_steps, total_steps
        self.clip_norm = clip_norm
        self.optimizer_state = optimizer_state
        self.last_terms: dict[str, float] = {}
        """Loss terms of the last micro-batch, by name."""
        self.last_shape = "before the first"
        """Rows x tokens of the last micro-batch, for messages."""
        self.steps_before = 0
        """Optimizer steps of the stage's phases before this one."""
        self.last_tokens = 0
        """Tokens of the last micro-batch without padding."""
        self.seen_terms: dict[str, float] = dict(seen_terms or {})
        """Largest magnitude of each term in this phase."""
        self.skipping = on_nonfinite == "skip_batch"
        self.skipped = skipped
        """Steps of this phase that were not taken, for a value that was not finite."""
        self._step_ids: list[str] = []
        self._bad: str | None = None

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule over what trains now."""
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        optimizer = self.build_optimizer(weights)
        if self.optimizer_state:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": self.optimizer_state})
        for group in optimizer.param_groups:
            group["lr"] *= self.phase.lr_scale
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Leave eval mode: models arrive in it, and Lightning would keep dropout and checkpointing off."""
        self.model.train()

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Sum the method's loss terms.

        Raises:
            MethodError: If a term is not finite (unless such steps are skipped) or a declared one is missing.
        """
        self._step_ids += batch["example_ids"]
        self.last_shape = f"the last of {' x '.join(map(str, batch['input_ids'].shape))} tokens"
        terms = self.method.losses(self.ctx, batch)
        self._check(terms)
        self.last_tokens = int(batch["attention_mask"].sum())
        total = torch.stack([term.float() for term in terms.values()]).sum()
        return total * batch.get("weight", 1.0)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the method edit the accumulated gradients; it sees none that are not finite.

        Raises:
            MethodError: If there are such gradients, unless such steps are skipped.
        """
        if self._bad is None and not self._finite():
            if not self.skipping and self._scales():
                return  # the scaler leaves the step out
            if not self.skipping:
                raise MethodError(f"{self.where()}: the gradient is not finite, rows {self._rows()}. {self._advice()}")
            self._bad = "a gradient is not finite"
        if self._bad is None:
            self.method.edit_gradients(self.ctx)
            return
        for weight in self.parameters():
            weight.grad = None  # an optimizer leaves such weights, and their state, alone

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip what the method left; Lightning's own clipping refuses fused optimizers.

        Raises:
            MethodError: If the gradient is not finite.
        """
        weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(weights, self.clip_norm if self.clip_norm is not None else float("inf"))
        if not torch.isfinite(norm) and not self._scales():
            what = f"the norm of the gradient, as the method left it, is {float(norm)}"
            raise MethodError(f"{self.where()}: {what}, rows {self._rows()}. {self._advice()}")

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        """Step, then let the method change weights."""
        where = self.where()
        super().optimizer_step(*arguments, **keywords)
        if self._bad is not None:
            self.skipped += 1
            log.warning("%s: %s; no step is taken for rows %s.", where, self._bad, self._rows())
        else:
            self.method.after_step(self.ctx)
        self._bad, self._step_ids = None, []

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

    def _finite(self) -> bool:
        gradients = [weight.grad for weight in self.parameters() if weight.grad is not None]
        if not gradients:
            return True
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)  # type: ignore  # 16-bit ones would overflow
        return bool(torch.stack(norms).isfinite().all())  # one wait for the device

    def _scales(self) -> bool:
        """Whether a gradient scaler (16-mixed) is at work: steps that are not finite belong to finding the scale."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def _advice(self) -> str:
        return _ADVICE % f" (now {self.optimizers().param_groups[0]['lr']:g})"  # type: ignore[union-attr]

    def where(self) -> str:
        """Name stage, phase and step."""
        stage = self.ctx.stage
        return f"stage {stage.index} ({stage.task}), phase '{self.phase.name}', step {self.trainer.global_step + 1}"

    def _rows(self) -> str:
        shown = ", ".join(self._step_ids[:8])
        return f"{shown}, and {len(self._step_ids) - 8} more" if len(self._step_ids) > 8 else shown

    def _check(self, terms: Mapping[str, Tensor]) -> None:
        where = self.where()
        if missing := [name for name in self.method.terms if name not in terms]:
            raise MethodError(f"{where}: method.losses gave no term {missing}; it gave {sorted(terms)}.")
        self.last_terms = {name: float(term.detach()) for name, term in terms.items()}
        for name, value in self.last_terms.items():
            if not torch.isfinite(torch.tensor(value)):
                if not self.skipping:
                    raise MethodError(f"{where}: loss term '{name}' is {value}, rows {self._rows()}. {_ADVICE % ''}")
                self._bad = f"loss term '{name}' is {value}"
                continue
            self.seen_terms[name] = max(self.seen_terms.get(name, 0.0), abs(value))
