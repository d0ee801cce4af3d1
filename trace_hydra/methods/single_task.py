"""Upper bound: every task alone, from the start model (Wang et al. 2023, arXiv:2310.06762, Table 27, row FT).

Paper -> code:  one fine-tuned model per task -> the start weights come back before each stage; a task is answered by
    its own model, so its cell is scored right after its stage and carried down (`cells`)
Differs from official TRACE: no code there.
Memory: one copy of the weights that train, on the CPU.
"""

from types import MappingProxyType

import torch
from torch import Tensor

from trace_hydra.context import StageContext
from trace_hydra.methods.base import Method
from trace_hydra.sizes import RunSize, StateSize


class SingleTask(Method):
    """Train on each task as if it were the only one."""

    sharded = True
    cells = "diagonal"
    sees_task_id = True
    stages_apart = True
    published = MappingProxyType({"full": "Single-task FT"})

    def __init__(self):
        self.start: dict[str, Tensor] = {}

    def setup(self, ctx: StageContext) -> None:
        """Copy the weights that train."""
        self.start = {name: weight.detach().cpu().clone() for name, weight in ctx.trainable().items()}

    def begin_stage(self, ctx: StageContext) -> None:
        """Put the start weights back."""
        with torch.no_grad():
            for name, weight in ctx.trainable().items():
                weight.copy_(self.start[name])

    def state_size(self, size: RunSize) -> StateSize:
        """One copy of what trains."""
        return StateSize(host=size.weight_bytes * size.num_trainable)
