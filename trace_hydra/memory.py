"""What is said when memory runs out, and giving back what is no longer used."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from trace_hydra.errors import MethodError

if TYPE_CHECKING:
    from trace_hydra.stage import StageModule


class OutOfMemory(MethodError):
    """Memory ran out in a step; a smaller micro-batch takes less.

    Attributes:
        stage: Index of the stage.
        size: Rows of the micro-batch.
    """

    stage: int
    size: int


def give_back() -> None:
    """Return the host memory of freed tensors to the system, where the C library is glibc; else do nothing.

    Tensors of a few MB and of ever other sizes lie between small objects that live on: the heap of a run with a model
    of 135 million weights grew by some 0.2 GB a stage.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def smaller(batch_size: int, size: int) -> int:
    """Halve a micro-batch, rounded down to what divides the batch; at least 1."""
    return next(rows for rows in range(max(1, size // 2), 0, -1) if batch_size % rows == 0)


@contextmanager
def out_of_memory_named(module: "StageModule", batch_size: int, size: int) -> Iterator[None]:
    """Turn the allocators' errors into one that says what was tried and what to do.

    Raises:
        OutOfMemory: With the batch's shape, what is in use, and the micro-batch.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = (
            f"Set budget.micro_batch_size={smaller(batch_size, size)} (the step stays {batch_size} rows), or "
            "on_oom=halve to have that done"
            if size > 1
            else "The micro-batch is one row: lower protocol.max_prompt_tokens, set "
            "model.gradient_checkpointing=true, or train fewer weights (tuning=lora)"
        )
        raised = OutOfMemory(
            f"{module.where()}: memory ran out with a micro-batch of {size} rows, {module.last_shape}{_in_use()}: "
            f"{_first_line(error)}. {advice}."
        )
        raised.stage, raised.size = module.ctx.stage.index, size
        raise raised from error


@contextmanager
def out_of_memory_outside(what: str, advice: str) -> Iterator[None]:
    """Name what was done when memory ran out, where it was no step of training.

    Raises:
        MethodError: With what is in use, and the advice.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MethodError(f"{what}: memory ran out{_in_use()}: {_first_line(error)}. {advice}.") from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an allocator's error."""
    # PyTorch's CPU allocator, and CUDA's libraries, raise a plain RuntimeError.
    told = ("allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in told)


def _in_use() -> str:
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    used = torch.cuda.memory_allocated()
    return f" ({used / 1e9:.1f} GB in tensors, {free / 1e9:.1f} of {total / 1e9:.1f} GB free)"
