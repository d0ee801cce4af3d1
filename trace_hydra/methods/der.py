"""Dark experience replay, DER++ (Buzzega et al. 2020, arXiv:2004.07211, eq. 6), on answer tokens.

Paper -> code:  M, a reservoir over all rows seen -> rows, at most buffer_size (`_reservoir`: Vitter's algorithm R)
        z, the logits kept with a row -> logits[i], (answer tokens, vocabulary);  h(x') -> the model's logits now
        alpha * ||z - h(x')||^2 -> loss term "der_logits";  beta * cross-entropy on kept rows -> "der_labels"
        beta=0 is DER without ++;  replay batches as large as the task's -> replay_batch_size: null
Differs from the paper: rows enter the reservoir, and logits are taken, at the end of the rows' own stage in eval mode
    (there at each step of training, so the first stage replays too); the squared distance is a mean over answer tokens
    AND vocabulary, as in the authors' code, whose alpha and beta the yaml has; one draw serves both terms (there two).
Differs from official TRACE: not there.
Memory: on the CPU, the text of the kept rows and 2 * vocabulary bytes (fp16, not fp32: half the size) per answer token
    of theirs. 500 rows of 100 tokens: 3.2 GB for a vocabulary of 32,000, 15 GB for 152,000.
Compute: from the second stage on one more forward and backward pass per row (replay_batch_size: null).
"""

from collections.abc import Mapping
from dataclasses import asdict
from random import Random
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_hydra.context import StageContext, batch_of
from trace_hydra.data.encode import EncodedRow
from trace_hydra.data.task import Example
from trace_hydra.errors import ConfigError, MethodError
from trace_hydra.methods.base import Method
from trace_hydra.methods.distill import answer_loss, record_rows
from trace_hydra.sizes import RunSize, StateSize


class DER(Method):
    """Train on a task, and with every batch on a few rows of earlier ones and on the logits the model had for them.

    Args:
        buffer_size: Rows kept in all, at least 1.
        alpha: Weight of the distance to the kept logits, above 0.
        beta: Weight of the loss on the kept rows' answers, at least 0.
        replay_batch_size: Kept rows drawn for each forward pass, at least 1; None: as many as the batch has. Never
            more than are kept.
    """

    version = 2
    draws_in_losses = True
    published = MappingProxyType({"full": "DER++"})

    def __init__(self, *, buffer_size: int, alpha: float, beta: float, replay_batch_size: int | None):
        if buffer_size < 1:
            raise ConfigError(f"method.buffer_size={buffer_size} must be at least 1; it is the number of rows kept.")
        if not alpha > 0:
            raise ConfigError(f"method.alpha={alpha} must be above 0; it is the weight of the kept logits.")
        if not beta >= 0:
            raise ConfigError(f"method.beta={beta} must be at least 0; it is the weight of the kept rows' answers.")
        if replay_batch_size is not None and replay_batch_size < 1:
            raise ConfigError(
                f"method.replay_batch_size={replay_batch_size} must be at least 1, or null for as many as the batch "
                "has; it is the number of kept rows drawn for a forward pass."
            )
        self.buffer_size, self.alpha, self.beta = buffer_size, alpha, beta
        self.replay_batch_size = replay_batch_size
        self.terms = ("lm", "der_logits", "der_labels") if beta else ("lm", "der_logits")
        self.rows: list[Example] = []
        self.logits: list[Tensor] = []
        self.num_seen = 0
        self._encoded: list[EncodedRow] = []

    def begin_stage(self, ctx: StageContext) -> None:
        """Encode the kept rows as they were when their logits were taken."""
        self._encoded = ctx.encode(self.rows)

    def losses(self, ctx: StageContext, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The task's loss, and two terms on kept rows; those are 0 in the first stage."""
        loss = ctx.lm_loss(batch)
        if not self._encoded:
            return {"lm": loss, **{term: loss.new_zeros(()) for term in self.terms[1:]}}
        count = self.replay_batch_size or len(batch["example_ids"])
        chosen = ctx.rng.sample(range(len(self.rows)), min(count, len(self.rows)))
        logits, labels = ctx.label_logits(batch_of([self._encoded[index] for index in chosen], ctx.device))
        kept = torch.cat([self.logits[index].to(logits.device).float() for index in chosen])
        if kept.shape != logits.shape:
            raise MethodError(
                f"stage {ctx.stage.index} ({ctx.task.name}): kept logits of {[self.rows[at].id for at in chosen]} are "
                f"{tuple(kept.shape)}, the model gives {tuple(logits.shape)}; tokenizer or length limits changed."
            )
        terms = {"lm": loss, "der_logits": self.alpha * F.mse_loss(logits.float(), kept)}
        if self.beta:
            terms["der_labels"] = self.beta * answer_loss(logits, labels)
        return terms

    def end_stage(self, ctx: StageContext) -> None:
        """Let the task's rows into the reservoir and keep the logits of those that got in."""
        self._encoded = []
        entered = self._reservoir(ctx.task.train, ctx.rng)
        rows = ctx.encode([self.rows[slot] for slot in entered])
        kept = record_rows(ctx, rows, lambda logits: logits.to("cpu", torch.float16, copy=True))
        by_slot = dict(enumerate(self.logits)) | dict(zip(entered, kept, strict=True))
        self.logits = [by_slot[slot] for slot in range(len(self.rows))]

    def num_stored_examples(self) -> int:
        """The rows in the reservoir."""
        return len(self.rows)

    def state_size(self, size: RunSize) -> StateSize:
        """Rows and fp16 logits of the reservoir; on the device the graph of a second micro-batch."""
        kept = min(self.buffer_size, sum(size.rows))
        logits = 2 * size.mean_answer_tokens * size.vocabulary
        rows = min(kept, self.replay_batch_size or size.micro_batch)
        return StateSize(
            stored=kept * (size.mean_row_bytes + logits),
            device=size.activation_bytes * rows / size.micro_batch + 2 * rows * logits,
        )

    def state_dict(self) -> dict[str, Any]:
        """The kept rows, their logits by slot, and how many rows went by."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "num_seen": self.num_seen,
            **{f"logits.{slot}": logits for slot, logits in enumerate(self.logits)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the kept rows and their logits back."""
        self.rows = [Example(**row) for row in state["rows"]]
        self.num_seen = state["num_seen"]
        self.logits = [state[f"logits.{slot}"] for slot in range(len(self.rows))]

    def _reservoir(self, examples: tuple[Example, ...], rng: Random) -> list[int]:
        """Offer rows one by one; each row ever seen stays with the same probability. Returns the slots that changed."""
        entered: set[int] = set()
        for example in examples:
            self.num_seen += 1
            if len(self.rows) < self.buffer_size:
                entered.add(len(self.rows))
                self.rows.append(example)
            elif (slot := rng.randrange(self.num_seen)) < self.buffer_size:
                entered.add(slot)
                self.rows[slot] = example
        return sorted(entered)
