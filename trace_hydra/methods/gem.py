"""Gradient episodic memory (Lopez-Paz & Ranzato 2017, arXiv:1706.08840, eq. 6-11).

Paper -> code:  M_k -> memory, `memory_rows` random train rows of each task, drawn when its stage ends
    g -> the accumulated gradient of all trainable weights as ONE vector;  g_k -> gradient of the lm loss on
        `reference_batch` rows of M_k at the present weights, dropout off, taken anew at every step
    eq. 7, <g, g_k> >= 0 for all k -> nothing is changed while it holds
    eq. 11, min_v 1/2 v'GG'v + g'G'v, v >= 0 -> `gradients.solve_dual` (exact, fp64), then g~ = G'v + g
    gamma -> margin: the bound is v >= gamma, as in the authors' code. The optimum's gradient G g~ is the multiplier of
        the bound and so not negative: <g~, g_k> >= 0 holds for every gamma >= 0, where the paper's wording (add gamma
        to v* after solving) does not ensure it. A larger gamma adds more of the past tasks' gradients to g~.
Differs from the paper: a seeded batch of the memory, not all of it, gives g_k; random rows, not the last ones.
    The gradient is constrained, the weights are moved by the optimizer: exact under SGD, as in the paper; AdamW
    rescales g~ and mixes it with its past, so its update may still oppose some g_k.
Differs from official TRACE: references are gradients of remembered rows at the present weights (there the gradient of a
    task's last mini-batch, once, model/Regular/GEM.py:160-163); one problem over all weights (there one per tensor);
    v >= margin (there, by the sign of the constraint, v <= margin: a single conflict doubles, GEM.py:93-101).
Memory: text of `memory_rows` rows a task; during a step 4 bytes per trainable weight on the device for the gradient
    being taken, and 4 per past task to keep them: there up to 8 GB (`resident.home`), else on the CPU, from where they
    are read piece by piece. So 7B with tuning=full needs 27 GB more on the device and 189 GB on the CPU at task 8.
Compute: per step one forward and backward on `reference_batch` rows for each past task, and at most 2^tasks solves.
"""

import logging
from types import MappingProxyType

import torch

from trace_hydra.context import StageContext
from trace_hydra.data.encode import EncodedRow
from trace_hydra.errors import ConfigError
from trace_hydra.methods.gradients import add_references, draw, loss_gradient, reference_products, solve_dual
from trace_hydra.methods.memory import RowKeeper, kept_rows, rows_size
from trace_hydra.methods.resident import held, home
from trace_hydra.sizes import RunSize, StateSize

log = logging.getLogger(__name__)


class GEM(RowKeeper):
    """Turn a gradient that would raise the loss on a past task's memory to the nearest one that does not.

    Args:
        memory_rows: Rows kept of each task, at least 1.
        reference_batch: Rows of a memory that give its gradient at a step, at least 1.
        reference_micro_batch: Rows of a forward pass of those, at least 1.
        margin: gamma, the lower bound of v, at least 0.
    """

    published = MappingProxyType({"full": "GEM"})

    def __init__(self, *, memory_rows: int, reference_batch: int, reference_micro_batch: int, margin: float):
        super().__init__()
        for key, value, meaning in (
            ("memory_rows", memory_rows, "the number of rows kept of each task"),
            ("reference_batch", reference_batch, "the number of remembered rows behind a reference gradient"),
            ("reference_micro_batch", reference_micro_batch, "the number of those rows in a forward pass"),
        ):
            if value < 1:
                raise ConfigError(f"method.{key}={value} must be at least 1; it is {meaning}.")
        if not 0 <= margin < float("inf"):
            raise ConfigError(
                f"method.margin={margin} must be at least 0; it is the lower bound of the dual variables."
            )
        self.memory_rows = memory_rows
        self.reference_batch = reference_batch
        self.reference_micro_batch = reference_micro_batch
        self.margin = margin
        self.encoded: dict[str, list[EncodedRow]] = {}
        self.steps = self.projected = 0

    def begin_stage(self, ctx: StageContext) -> None:
        """Encode the memory."""
        self.encoded = {task: ctx.encode(rows) for task, rows in self.memory.by_task.items()}
        self.steps = self.projected = 0

    def edit_gradients(self, ctx: StageContext) -> None:
        """Replace the gradient where it opposes that of a past task."""
        if not self.encoded:
            return
        parameters = ctx.trainable()
        shape = (len(self.encoded), sum(weight.numel() for weight in parameters.values()))
        references = torch.zeros(shape, device=home(4 * shape[0] * shape[1], ctx.device))
        for rows, reference in zip(self.encoded.values(), references, strict=True):
            chosen = draw(rows, self.reference_batch, ctx.rng)
            loss_gradient(ctx, chosen, self.reference_micro_batch, reference)
        gram, conflict = reference_products(parameters, references)
        self.steps += 1
        if (conflict >= 0).all():
            return
        self.projected += 1
        add_references(parameters, solve_dual(gram, conflict, self.margin), references)

    def state_size(self, size: RunSize) -> StateSize:
        """Rows; on the device one gradient as it is taken, and those of all past tasks there or on the CPU."""
        rows = [kept_rows(count, self.memory_rows / count) for count in size.rows]
        vectors = 4 * size.num_trainable * (size.stages - 1)
        return StateSize(
            stored=rows_size(size, rows),
            device=4 * size.num_trainable + held(vectors, 0),
            host=vectors - held(vectors, 0),
        )

    def end_stage(self, ctx: StageContext) -> None:
        """Keep rows of this task."""
        if self.steps:
            log.info("%s: %d of %d gradients opposed a memory.", ctx.task.name, self.projected, self.steps)
        self.memory.keep(ctx.task.name, ctx.task.train, self.memory_rows / len(ctx.task.train), ctx.rng)
