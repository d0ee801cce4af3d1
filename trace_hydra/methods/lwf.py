"""Learning without forgetting (Li & Hoiem 2016, arXiv:1606.09282, eq. 2-3), on answer tokens.

Paper -> code:  Y_o, the old model's outputs on the new task's rows, recorded before training on it -> targets[row id]
        T -> temperature (2);  lambda_o -> weight (1)
        y'_o, the recorded probabilities at temperature T, eq. 3 -> `distill.soften`
        -sum y'_o log y^'_o, eq. 2 -> T^2 * KL(old || new), mean over the batch's answer tokens, loss term "lwf"
            (`distill.kd_from_topk`; the two differ by the entropy of y'_o, which has no gradient)
Differs from the paper: T^2, which keeps the gradient's size at any T (arXiv:1503.02531); the old model's `top_k`
    likeliest tokens and all others as one bucket, a lower bound (top_k: null is exact); every token is a classification
    over one vocabulary, so there is no new output layer to warm up. Nothing is distilled in the first stage.
Differs from official TRACE: KL(old || new) (there KL(new || old), model/Regular/LwF.py:32-34), T^2, answer tokens only
    (there prompt and padding too), teacher in eval mode without gradient, rows matched by id (there by step number).
Memory: 6 * top_k + 4 bytes per answer token of the stage's rows on the CPU while the stage trains (388 at top_k=64:
    some 230 MB for 5,000 MeetingBank rows), 2 * vocabulary with top_k: null. No second model, nothing between stages.
Compute: one forward pass per row and stage, and two softmaxes over the vocabulary per step.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from trace_hydra.context import StageContext
from trace_hydra.errors import ConfigError, MethodError
from trace_hydra.methods.base import Method
from trace_hydra.methods.distill import SoftTargets, answer_loss, kd_from_topk, labels_per_row, record_rows, soften
from trace_hydra.sizes import RunSize, StateSize


class LwF(Method):
    """Train on a task while answering its rows' prompts much as the model did before.

    Args:
        temperature: T, above 0.
        weight: lambda_o, above 0.
        top_k: Tokens kept of each of the old model's distributions, at least 1; None keeps the whole vocabulary.
    """

    sharded = True
    terms = ("lm", "lwf")
    published = MappingProxyType({"full": "LwF"})

    def __init__(self, *, temperature: float, weight: float, top_k: int | None):
        if not temperature > 0:
            raise ConfigError(f"method.temperature={temperature} must be above 0; it divides the logits.")
        if not weight > 0:
            raise ConfigError(f"method.weight={weight} must be above 0; it is the weight of the distillation term.")
        if top_k is not None and top_k < 1:
            raise ConfigError(
                f"method.top_k={top_k} must be at least 1, or null for the whole vocabulary; it is the number of "
                "tokens kept of each recorded distribution."
            )
        self.temperature, self.weight, self.top_k = temperature, weight, top_k
        self.targets: dict[str, SoftTargets] = {}

    def begin_stage(self, ctx: StageContext) -> None:
        """Record how the model, as the last stage left it, answers this stage's rows.

        Raises:
            MethodError: If two rows of the task share an id.
        """
        self.targets = {}
        if ctx.stage.index < 2:
            return
        rows = ctx.encode(ctx.task.train)
        recorded = record_rows(ctx, rows, lambda logits: soften(logits, self.temperature, self.top_k).to("cpu"))
        self.targets = {row.example_id: targets for row, targets in zip(rows, recorded, strict=True)}
        if len(self.targets) < len(rows):
            raise MethodError(
                f"stage {ctx.stage.index} ({ctx.task.name}): {len(rows)} train rows have {len(self.targets)} different "
                "ids, so recorded answers cannot be told apart."
            )

    def losses(self, ctx: StageContext, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The task's loss and the distillation term, both from one forward pass; 0 in the first stage."""
        logits, labels = ctx.label_logits(batch)  # (num_labels, vocab)
        loss = answer_loss(logits, labels)
        if not self.targets:
            return {"lm": loss, "lwf": loss.new_zeros(())}
        teacher = self._teacher(ctx, batch).to(logits.device)
        return {"lm": loss, "lwf": self.weight * kd_from_topk(logits, teacher, self.temperature)}

    def end_stage(self, ctx: StageContext) -> None:
        """Drop the record; the next stage makes its own."""
        self.targets = {}

    def state_size(self, size: RunSize) -> StateSize:
        """The largest record of a stage after the first, on the CPU; on the device a batch's softmaxes, fp32."""
        whole = self.top_k is None or self.top_k >= size.vocabulary
        each = 2 * size.vocabulary if whole else 6 * (self.top_k or 0) + 4
        answers = [rows * tokens for rows, tokens in zip(size.rows, size.answer_tokens, strict=True)]
        labels = size.micro_batch * max(size.answer_tokens)
        return StateSize(host=each * max(answers[1:], default=0), device=12 * labels * size.vocabulary)

    def _teacher(self, ctx: StageContext, batch: Mapping[str, Any]) -> SoftTargets:
        """What was recorded for the rows of a batch, row after row as `label_logits` gives them."""
        parts = []
        for row, count in zip(batch["example_ids"], labels_per_row(dict(batch)), strict=True):
            part = self.targets.get(row)
            if part is None or len(part.log_probs) != count:
                raise MethodError(
                    f"stage {ctx.stage.index} ({ctx.task.name}): row {row} has {count} answer tokens, the record "
                    f"{'none of it' if part is None else len(part.log_probs)}."
                )
            parts.append(part)
        return SoftTargets.join(parts)
