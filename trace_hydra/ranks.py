"""The processes of one run: which one this is, and what they tell each other.

A launcher (torchrun, srun, ...) says by RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* who there is. All processes run the
same code in step. What depends on files or clocks is decided on rank 0 and told (`on_first`); everything here does
nothing, or only calls, where there is one process. No torch is loaded before `joined`.
"""

import atexit
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from random import Random
from typing import Any, TypeVar

from trace_hydra.errors import Stopped, TraceHydraError

T = TypeVar("T")
_PATIENCE_S = 10.0
"""How long a process whose run failed elsewhere waits until that has been said."""
_LONGEST = timedelta(days=30)
"""Of waiting for rank 0, which may wait for another run's stage; a process that is gone is noticed at once."""
_state: dict[str, Any] = {"group": None, "alone": 0, "store": None, "times": 0}


class FailedElsewhere(BaseException):
    """Another process of the run has failed and said why; no `Exception`: nothing may swallow it.

    Attributes:
        code: The exit code of that process.
    """

    def __init__(self, code: int):
        super().__init__(f"another process of the run ended with {code}")
        self.code = code


class LostProcess(TraceHydraError):
    """Another process of the run is gone without a word."""


def launched() -> bool:
    """Whether a launcher started this process as one of a group, be it a group of one."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def size() -> int:
    """Processes of the run."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def rank() -> int:
    """This process, from 0."""
    return int(os.environ["RANK"]) if launched() else 0


def local_rank() -> int:
    """This process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if launched() else 0


def is_first() -> bool:
    """Whether this process writes, prints and decides."""
    return rank() == 0


@contextmanager
def joined(device: Any = None) -> Iterator[None]:
    """Connect the processes for a block; with an error on one of them, it ends on all of them.

    Args:
        device: The torch.device of this process, of type "cuda" or "cpu".

    Raises:
        FailedElsewhere: If another process failed first.
        LostProcess: If another process is gone.
    """
    if not launched():
        yield
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, *_ = next(rendezvous("env://", rank(), size()))
    on_cuda = device is not None and device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    _state["times"] += 1  # a launcher's store may outlive a run, and what that one has said
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, store=PrefixStore(f"run{_state['times']}", store), rank=rank(), world_size=size())
    _state["group"] = group = dist.new_group(backend="gloo", timeout=_LONGEST)
    _state["store"] = PrefixStore(f"end{_state['times']}", store)
    try:
        yield
    except BaseException as error:  # no collective may follow, not even the group's end: others may wait in one
        ended = _first_to_fail(error)
        if ended is error:
            raise
        raise ended from error
    else:
        dist.barrier(group=group)  # type: ignore[arg-type]
        dist.destroy_process_group()
    finally:
        _state.update(group=None, store=None)


def on_first(call: Callable[[], T]) -> T:
    """Call on rank 0 and return to all what it returned, or raise on all what it raised; it must be picklable.

    Within the call, `on_first` is a plain call.
    """
    if size() == 1 or _state["alone"] or _state["group"] is None:
        return call()
    import torch.distributed as dist

    told: list[Any] = [None]
    error = None
    if is_first():
        _state["alone"] += 1
        try:
            told = [(True, call())]
        except BaseException as raised:  # noqa: BLE001 - raised again, on all ranks
            error = raised
            told = [(False, _portable(raised))]
        finally:
            _state["alone"] -= 1
    dist.broadcast_object_list(told, src=0, group=_state["group"])
    if error is not None:
        raise error
    good, value = told[0]
    if not good:
        raise value
    return value


def gather(value: T) -> list[T]:
    """Give everybody everybody's value, in the order of ranks."""
    if size() == 1 or _state["group"] is None:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value, group=_state["group"])
    return found


def most(values: Sequence[int]) -> list[int]:
    """Give everybody the largest of each number; does not touch the accelerator."""
    if size() == 1 or _state["group"] is None:
        return list(values)
    import torch
    import torch.distributed as dist

    found = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=_state["group"])
    return found.tolist()


def total(tensor: Any) -> Any:
    """Add a tensor up over all processes, on its device."""
    if size() == 1 or _state["group"] is None:
        return tensor
    import torch.distributed as dist

    added = tensor.clone()
    dist.all_reduce(added)
    return added


def shared_out(items: Sequence[int], work: Callable[[Sequence[int]], dict[int, T]]) -> dict[int, T]:
    """Do a share of the work, every so many-th item, and collect what all did.

    Args:
        items: Anything that identifies work, the heaviest first; the same on all processes.
        work: Gives a value for each item it is given.
    """
    if size() == 1:
        return work(items)
    own = items[rank() :: size()]
    found: dict[int, T] = {}
    for part in gather(work(own) if own else {}):
        found.update(part)
    return found


@contextmanager
def own_draws(ctx: Any, seed: str) -> Iterator[None]:
    """Let a block draw numbers of this process alone; afterwards all processes draw the same again.

    Dropout, and what a method draws for the rows it sees, thus differ between processes, while there is one state of
    all random generators to be saved.

    Args:
        ctx: Has `device` and `rng`.
        seed: Of the step; the rank is added to it.
    """
    if size() == 1:
        yield
        return
    import random

    import numpy as np
    import torch

    drawn = Random(f"{seed}-{rank()}")
    before = random.getstate(), np.random.get_state(), ctx.rng
    with torch.random.fork_rng(devices=[ctx.device] if ctx.device.type == "cuda" else []):
        torch.manual_seed(drawn.getrandbits(32))
        random.seed(drawn.getrandbits(32))
        np.random.seed(drawn.getrandbits(32))
        ctx.rng = Random(drawn.getrandbits(64))
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            ctx.rng = before[2]


def _portable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - an error of any library, whose own may not survive
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _first_to_fail(error: BaseException) -> BaseException:
    """Find out who failed first; that one says why, the others wait for it and end with the same code."""
    store = _state["store"]
    if isinstance(error, FailedElsewhere):
        return _await(store) or error
    try:
        first = store.add("failed", 1) == 1
    except RuntimeError:  # rank 0 had the store and is gone
        return FailedElsewhere(1)
    if not first:
        return _await(store) or FailedElsewhere(1)
    store.set("code", str(exit_code(error)))
    atexit.register(_said, store)  # runs behind the message, or the traceback
    if isinstance(error, RuntimeError) and _is_lost(error):
        return LostProcess(
            f"another process of this run is gone ({str(error).splitlines()[0]}). Its own output says why, if it "
            "could. The same command goes on from the last checkpoint."
        )
    return error


def exit_code(error: BaseException) -> int:
    """The exit code that an error ends the command line with."""
    if isinstance(error, FailedElsewhere):
        return error.code
    return 75 if isinstance(error, Stopped) else 2 if isinstance(error, TraceHydraError) else 1


def _await(store: Any) -> FailedElsewhere | None:
    with suppress(RuntimeError):
        store.wait(["code"], timedelta(seconds=_PATIENCE_S))
        code = int(store.get("code"))
        with suppress(RuntimeError):
            store.wait(["said"], timedelta(seconds=_PATIENCE_S))
        with suppress(RuntimeError):
            store.add("heard", 1)
        return FailedElsewhere(code)
    return None


def _said(store: Any) -> None:
    """Let the others go; rank 0, which may hold the store, waits until they have heard."""
    with suppress(RuntimeError):
        store.set("said", "1")
        if is_first() and not os.environ.get("TORCHELASTIC_USE_AGENT_STORE"):
            import time

            until = time.monotonic() + 1.0
            while store.add("heard", 0) < size() - 1 and time.monotonic() < until:
                time.sleep(0.02)


def _is_lost(error: RuntimeError) -> bool:
    told = ("connection closed by peer", "connection reset", "broken pipe", "gloo", "remote process exited")
    return any(text in str(error).lower() for text in told)
