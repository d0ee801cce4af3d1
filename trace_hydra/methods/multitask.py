"""Upper bound: all tasks at once (Wang et al. 2023, arXiv:2310.06762, Table 3, row MT).

Paper -> code:  joint training -> one phase in the last stage over all tasks' rows, each as often as its epochs say,
    in one shuffled pass; only the last row of the matrix exists, so OP is defined and BWT is not
Differs from official TRACE: no code there.
Memory: none. It sees all tasks' data at once, which no continual learner may.
"""

from collections.abc import Sequence
from types import MappingProxyType

from trace_hydra.context import StageContext
from trace_hydra.methods.base import Method
from trace_hydra.plan import Phase


class MultiTask(Method):
    """Train once on the union of all tasks."""

    sharded = True
    cells = "last"
    sees_all_tasks = True
    sees_num_stages = True
    published = MappingProxyType({"full": "Multi-task"})

    def phases(self, ctx: StageContext) -> Sequence[Phase]:
        """Nothing before the last stage, then everything."""
        if ctx.stage.index < ctx.num_stages or ctx.all_tasks is None:
            return []
        tasks = ctx.all_tasks.values()
        rows = [row for task in tasks for row in task.train for _ in range(ctx.epochs_of(task.name))]
        return [Phase("all tasks", rows, 1)]

    def rows_per_pass(self, rows: Sequence[int], stage: int, alignment: int) -> int:
        """All rows in the last stage, none before."""
        return sum(rows) if stage == len(rows) else 0
