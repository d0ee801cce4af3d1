"""A run of which one process fails: python failing.py HOW RANK STEP OVERRIDES...; HOW is error, memory, kill or nan."""

import os
import signal
import sys

import torch

from trace_hydra import ranks
from trace_hydra.__main__ import main
from trace_hydra.stage import StageModule

how, where, when = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
loss, count = StageModule._loss, 0


def fail(module, batch):
    global count
    count += 1
    if ranks.rank() == where and count == when:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "nan":
            return loss(module, batch) * float("nan")
        raise torch.OutOfMemoryError("allocate memory") if how == "memory" else ValueError("a fault of this process")
    return loss(module, batch)


StageModule._loss = fail  # type: ignore[method-assign]  # the fault
sys.argv[1:] = sys.argv[4:]
main()
