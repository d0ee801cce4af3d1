"""A method of nothing but attributes, classes of its module, its changes carried to another method, a comparison."""

import enum
import json
from collections import deque, namedtuple
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trace_hydra.snapshot import Snapshot
from trace_hydra.store.tree import pack, unpack

Pair = namedtuple("Pair", "left right")


class Mood(enum.Enum):
    COLD = 1
    WARM = 2


@dataclass(frozen=True)
class Frozen:
    name: str
    values: tuple = ()
    tensor: Any = field(default=None, compare=False)


class Slotted:
    __slots__ = ("__hidden", "free", "later")

    def __init__(self):
        self.free, self.__hidden = 1, [1]

    def change(self):
        self.free, self.later = 2, "x"
        self.__hidden.append(2)

    @property
    def hidden(self):
        return self.__hidden


class Plain:
    """A method that is nothing but attributes."""

    model: Any

    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def stored(tree):
    """Through JSON and copies of the tensors, as a file would."""
    plain, tensors = pack(tree)
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    return unpack(json.loads(json.dumps(plain, allow_nan=False)), copies)


def carried(begin, change) -> tuple[Any, Any, dict]:
    """Begin a stage twice, change the first, lay that over the second: both, and the tree.

    Args:
        begin: Takes a model, gives a method.
        change: Trains it: changes the method.
    """
    first, second = begin(model()), begin(model())
    one, other = Snapshot(first, first.model), Snapshot(second, second.model)
    change(first)
    tree = stored(one.changes())
    other.apply(tree)
    return first, second, tree


def same(one, other, seen=None) -> bool:
    """Equal in type, value and sharing, all the way down."""
    seen = {} if seen is None else seen
    if id(one) in seen:
        return seen[id(one)][0] is other
    if type(one) is not type(other):
        return False
    if one is None or isinstance(one, bool | int | float | str | bytes | torch.dtype | enum.Enum):
        return repr(one) == repr(other)
    seen[id(one)] = (other, one)
    if isinstance(one, Tensor):
        alike = one.dtype == other.dtype and one.requires_grad == other.requires_grad and one.stride() == other.stride()
        return alike and torch.equal(one, other) and same(one.grad, other.grad, seen)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, Random):
        return one.getstate() == other.getstate()
    if isinstance(one, torch.Generator):
        return torch.equal(one.get_state(), other.get_state())
    if isinstance(one, dict):
        if len(one) != len(other) or not all(same(a, b, seen) for a, b in zip(one, other, strict=True)):
            return False
        factory = getattr(one, "default_factory", None) is getattr(other, "default_factory", None)
        return factory and all(same(a, b, seen) for a, b in zip(one.values(), other.values(), strict=True))
    if isinstance(one, set | frozenset):
        return one == other
    if isinstance(one, list | tuple | deque):
        return len(one) == len(other) and all(same(a, b, seen) for a, b in zip(one, other, strict=True))
    if isinstance(one, nn.Module):
        states = (same(dict(a.state_dict()), dict(b.state_dict())) for a, b in [(one, other)])
        modes = [[part.training for part in module.modules()] for module in (one, other)]
        return all(states) and modes[0] == modes[1]
    if callable(one) or not (hasattr(one, "__dict__") or hasattr(one, "__slots__")):
        return True
    return same(_state(one), _state(other), seen)


def _state(one) -> dict:
    slots = [name for cls in type(one).__mro__ for name in getattr(cls, "__slots__", ())]
    names = [f"_{type(one).__name__}{name}" if name.startswith("__") else name for name in slots]
    return {**{name: getattr(one, name) for name in names if hasattr(one, name)}, **getattr(one, "__dict__", {})}
