"""Averaged gradient episodic memory (Chaudhry et al. 2019, arXiv:1812.00420, eq. 10-11).

Paper -> code:  M -> memory, `memory_rows` random train rows of each past task
    g_ref -> gradient of the lm loss on `reference_batch` rows drawn from the union of all memories at the present
        weights, dropout off, taken anew at every step
    eq. 11 -> g~ = g - (g'g_ref / g_ref'g_ref) g_ref if g'g_ref < 0, else g; over all trainable weights as one vector
Differs from the paper: the memory is filled when a stage ends, not while it trains. The gradient is constrained, the
    weights are moved by the optimizer: exact under SGD, as in the paper; AdamW rescales g~ and mixes it with its past.
Differs from official TRACE: no code there; its GEM projects on stored gradients, each tensor apart, with the wrong sign
    (model/Regular/GEM.py:93-101, :160-163), here the dot product over all weights is not negative.
Memory: text of `memory_rows` rows a task; during a step 4 bytes per trainable weight on the device while g_ref is
    taken, and 4 more to keep it there up to 8 GB (`resident.home`), else on the CPU.
Compute: per step one forward and backward on `reference_batch` rows, whatever the number of tasks.
"""

import logging

from torch import Tensor

from trace_hydra.context import StageContext
from trace_hydra.data.encode import EncodedRow
from trace_hydra.errors import ConfigError
from trace_hydra.methods.gradients import Parameters, add_references, draw, loss_gradient, reference_products
from trace_hydra.methods.memory import RowKeeper, kept_rows, rows_size
from trace_hydra.methods.resident import held
from trace_hydra.sizes import RunSize, StateSize

log = logging.getLogger(__name__)


class AGEM(RowKeeper):
    """Remove from a gradient what would raise the average loss on rows of past tasks.

    Args:
        memory_rows: Rows kept of each task, at least 1.
        reference_batch: Rows of all memories together that give the reference gradient at a step, at least 1.
        reference_micro_batch: Rows of a forward pass of those, at least 1.
    """

    def __init__(self, *, memory_rows: int, reference_batch: int, reference_micro_batch: int):
        super().__init__()
        for key, value, meaning in (
            ("memory_rows", memory_rows, "the number of rows kept of each task"),
            ("reference_batch", reference_batch, "the number of remembered rows behind the reference gradient"),
            ("reference_micro_batch", reference_micro_batch, "the number of those rows in a forward pass"),
        ):
            if value < 1:
                raise ConfigError(f"method.{key}={value} must be at least 1; it is {meaning}.")
        self.memory_rows = memory_rows
        self.reference_batch = reference_batch
        self.reference_micro_batch = reference_micro_batch
        self.encoded: list[EncodedRow] = []
        self.steps = self.projected = 0

    def begin_stage(self, ctx: StageContext) -> None:
        """Encode the memory."""
        self.encoded = ctx.encode(self.memory.examples())
        self.steps = self.projected = 0

    def edit_gradients(self, ctx: StageContext) -> None:
        """Project the gradient if it opposes the reference."""
        if not self.encoded:
            return
        parameters = ctx.trainable()
        rows = draw(self.encoded, self.reference_batch, ctx.rng)
        self.steps += 1
        self.projected += project(parameters, loss_gradient(ctx, rows, self.reference_micro_batch))

    def state_size(self, size: RunSize) -> StateSize:
        """Rows; on the device the reference as it is taken, and kept there or on the CPU."""
        rows = [kept_rows(count, self.memory_rows / count) for count in size.rows]
        vector = 4 * size.num_trainable
        return StateSize(stored=rows_size(size, rows), device=vector + held(vector, 0), host=vector - held(vector, 0))

    def end_stage(self, ctx: StageContext) -> None:
        """Keep rows of this task."""
        if self.steps:
            log.info("%s: %d of %d gradients opposed the memory.", ctx.task.name, self.projected, self.steps)
        self.memory.keep(ctx.task.name, ctx.task.train, self.memory_rows / len(ctx.task.train), ctx.rng)


def project(parameters: Parameters, reference: Tensor) -> bool:
    """Remove the part of the gradients that opposes a reference (eq. 11), in place; say whether there is any.

    Args:
        parameters: Their `.grad` together is g.
        reference: g_ref, (weights,), fp32.
    """
    square, conflict = reference_products(parameters, reference[None])
    if conflict[0] >= 0:
        return False
    add_references(parameters, -conflict / square[0], reference[None])
    return True
