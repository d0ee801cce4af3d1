"""Experience replay (Wang et al. 2023, arXiv:2310.06762, section 4.1: 10 % of historical data and LIMA).

Paper -> code:  10 % of each earlier task -> fraction, a seeded sample;  LIMA -> alignment, all rows the data has
    when=mixed: the memory joins the new task's rows in every pass (Chaudhry et al. 2019, arXiv:1902.10486)
    when=after: a phase of its own behind the task's, `epochs` passes, as in training/replay.py:413-483
Differs from official TRACE: a random sample (there the first rows of the file, utils/data/data_utils.py:246-253);
    mixed by default; the memory is seen once a pass, not once a device (there x8 on 8 GPUs).
Memory: the text of the kept rows, on the CPU; no weights. Compute: one forward and backward per replayed row.
"""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Literal

from trace_hydra.context import StageContext
from trace_hydra.errors import ConfigError
from trace_hydra.methods.memory import RowKeeper, kept_rows, rows_size
from trace_hydra.plan import Phase
from trace_hydra.sizes import RunSize, StateSize


class Replay(RowKeeper):
    """Train on each task together with, or followed by, rows of the earlier ones.

    Args:
        fraction: Share of each task's train rows that is kept, in (0, 1].
        when: "mixed" or "after".
        epochs: Passes over the memory when="after", at least 1.
        alignment: Whether the data's alignment rows (LIMA) are replayed too, from the first stage on.
    """

    sharded = True
    published = MappingProxyType({"full": "Replay"})

    def __init__(self, *, fraction: float, when: Literal["mixed", "after"], epochs: int, alignment: bool):
        super().__init__()
        if not 0 < fraction <= 1:
            raise ConfigError(
                f"method.fraction={fraction} must be in (0, 1]; it is the share of each earlier task kept."
            )
        if when not in ("mixed", "after"):
            raise ConfigError(f"method.when={when!r} must be 'mixed' or 'after'.")
        if epochs < 1:
            raise ConfigError(f"method.epochs={epochs} must be at least 1.")
        self.fraction, self.when, self.epochs, self.alignment = fraction, when, epochs, alignment

    def phases(self, ctx: StageContext) -> Sequence[Phase]:
        """The task with its memory in one phase, or two phases, the memory second."""
        passes = ctx.epochs_of(ctx.task.name)
        replayed = [*self.memory.examples(), *(ctx.alignment if self.alignment else ())]
        if self.when == "mixed" or not replayed:
            return [Phase("task", [*ctx.task.train, *replayed], passes)]
        return [Phase("task", ctx.task.train, passes), Phase("replay", replayed, self.epochs)]

    def rows_per_pass(self, rows: Sequence[int], stage: int, alignment: int) -> int:
        """The task's rows, the kept share of earlier tasks, and the alignment rows."""
        replayed = sum(kept_rows(count, self.fraction) for count in rows[: stage - 1])
        return rows[stage - 1] + replayed + (alignment if self.alignment else 0)

    def state_size(self, size: RunSize) -> StateSize:
        """The kept rows."""
        return StateSize(stored=rows_size(size, [kept_rows(rows, self.fraction) for rows in size.rows]))

    def end_stage(self, ctx: StageContext) -> None:
        """Keep a share of this task."""
        self.memory.keep(ctx.task.name, ctx.task.train, self.fraction, ctx.rng)
