"""Records of what a method reached, laid over the objects of another one like it."""

import sys
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from enum import Enum
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trace_hydra.errors import MethodError
from trace_hydra.reach import (
    FACTORIES,
    FIXED,
    MAPPINGS,
    SEQUENCES,
    Walk,
    attributes,
    class_name,
    is_object,
    plain_class,
    slots,
)

_CONTAINERS: dict[str, Any] = {cls.__name__: cls for cls in (*MAPPINGS, *SEQUENCES)}
_ENGINES = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
_DATA = ("data", "like", "on")
_NOTHING = object()
_Change = Callable[[], None]


class Overlay:
    """Brings objects to what records say. All that can fail comes first, then the objects change.

    Nothing here runs code of a class: objects are made without their constructor, and attributes are put into them.

    Args:
        start: The objects as they are, without hashes.
        records: Name -> record, for objects that changed or are new.
        model: New tensors that were on an accelerator go to its device.
        trusted: Packages whose classes may be made anew, beside those that `start` has.
    """

    def __init__(self, start: Walk, records: Mapping[str, dict[str, Any]], model: nn.Module, trusted: set[str]):
        self.start, self.records, self.trusted = start, records, trusted
        self.device = next((one.device for one in model.parameters()), torch.device("cpu"))
        self.classes = {class_name(type(one)): type(one) for one in start.objects.values()}
        self.made: dict[str, Any] = {}
        self.memory: dict[int, Tensor] = {}  # id of stored data -> its copy, which tensors of one memory share
        self.changes: list[_Change] = []

    def run(self) -> None:
        """Do it.

        Raises:
            MethodError: If something cannot be brought back; nothing has changed then.
        """
        for name in self.records:
            self.find(name, name)
        with torch.no_grad():
            for change in self.changes:
                change()

    def find(self, name: str, where: str) -> Any:
        """Give the object of a name: made already, there since the start, or new."""
        record, old = self.records.get(name), self.start.objects.get(name)
        if name in self.made:
            return self.made[name]
        if record is None:
            if old is None:
                raise _refusal(where, f"begin_stage made no {name}")
            return old
        if old is None:
            return self.create(name, record)
        was = self.start.records.get(name, {})
        if any(was.get(key) != record.get(key) for key in ("kind", "type", "class")):
            raise _refusal(
                name, f"begin_stage made a {class_name(type(old))}, which it was not in the run that stopped"
            )
        self.made[name] = old
        self.changes.append(self.change(old, record, name))
        return old

    def value(self, ref: Any, where: str, present: Any = _NOTHING) -> Any:
        """Follow a reference; `present` stands in that place now."""
        match ref:
            case ("at", str() as name):
                gone = not (name.startswith("+") or name in self.records or name in self.start.objects)
                # What did not change in training is as begin_stage makes it, be it something else here.
                return present if gone and present is not _NOTHING else self.find(name, where)
            case ("enum", str() as cls, str() as member):
                found = self.find_class(cls, where)
                if not issubclass(found, Enum) or member not in found.__members__:
                    raise _refusal(where, f"{cls} has no member {member}")
                return found.__members__[member]
            case ("left", _) if present is not _NOTHING and is_object(present) and self.start.kind(present) == "left":
                return present
            case ("left" | "unknown", cls):
                raise _refusal(where, f"training put a {cls} there, which is not stored")
        return ref

    def find_class(self, name: str, where: str) -> type:
        """Look a class up: one that the method has objects of, or of a trusted module that is imported already."""
        if name in self.classes:
            return self.classes[name]
        module, _, path = name.partition(":")
        found: Any = sys.modules.get(module) if module.partition(".")[0] in self.trusted else None
        for part in path.split("."):
            found = getattr(found, "__dict__", {}).get(part)
        if not isinstance(found, type):
            raise _refusal(where, f"its class {name} is not known")
        return found

    def create(self, name: str, record: Mapping[str, Any]) -> Any:
        """Make an object anew, with all it holds."""
        where, kind = name.removeprefix("+"), record["kind"]
        if record.get("type") in FIXED:
            items = [self.value(one, where) for one in record["items"]]
            if name not in self.made:  # one of the items may hold it
                self.made[name] = self._fixed(record, items, where)
            return self.made[name]
        self.made[name] = new = getattr(self, f"_new_{kind}")(record, where)
        self.change(new, {key: one for key, one in record.items() if key not in _DATA}, where)()
        return new

    def change(self, target: Any, record: Mapping[str, Any], where: str) -> _Change:
        """Look up all that an object is to hold; what is returned puts it there."""
        return getattr(self, f"_change_{record['kind']}")(target, record, where)

    def _fixed(self, record: Mapping[str, Any], items: list[Any], where: str) -> Any:
        if not record["class"]:
            return _CONTAINERS[record["type"]](items)
        cls = self.find_class(record["class"], where)
        if not issubclass(cls, tuple):
            raise _refusal(where, f"{record['class']} is no tuple")
        return tuple.__new__(cls, items)

    def _new_mapping(self, record: Mapping[str, Any], where: str) -> Any:
        if record["type"] != "defaultdict":
            return _CONTAINERS[record["type"]]()
        if record["factory"] == "?":
            raise _refusal(where, "training put a defaultdict there, whose factory is not stored")
        factory = FACTORIES.get(record["factory"])
        return defaultdict(factory)

    def _change_mapping(self, target: Any, record: Mapping[str, Any], where: str) -> _Change:
        old = dict(target) if len(target) == len(record["items"]) else {}
        pairs = []
        for key_ref, ref in record["items"]:
            key = self.value(key_ref, where)
            pairs.append((key, self.value(ref, f"{where}[{key!r}]", old.get(key, _NOTHING))))

        def change() -> None:
            target.clear()
            for key, one in pairs:
                target[key] = one

        return change

    def _new_sequence(self, record: Mapping[str, Any], where: str) -> Any:
        return deque(maxlen=record["maxlen"]) if record["type"] == "deque" else _CONTAINERS[record["type"]]()

    def _change_sequence(self, target: Any, record: Mapping[str, Any], where: str) -> _Change:
        refs = record["items"]
        old = list(target) if len(target) == len(refs) and not isinstance(target, set) else [_NOTHING] * len(refs)
        items = [self.value(ref, f"{where}[{place}]", old[place]) for place, ref in enumerate(refs)]

        def change() -> None:
            target.clear()
            (target.update if isinstance(target, set) else target.extend)(items)

        return change

    def _new_object(self, record: Mapping[str, Any], where: str) -> Any:
        cls = self.find_class(record["class"], where)
        if not plain_class(cls) or issubclass(cls, nn.Module | Optimizer):
            raise _refusal(where, f"training made a {record['class']}, which cannot be made anew")
        return object.__new__(cls)

    def _change_object(self, target: Any, record: Mapping[str, Any], where: str) -> _Change:
        old, new = attributes(target) or {}, record["attributes"]
        found = {name: self.value(ref, f"{where}.{name}", old.get(name, _NOTHING)) for name, ref in new.items()}

        def change() -> None:
            fixed = slots(type(target))
            for name in old.keys() - found.keys():
                object.__delattr__(target, name)
            for name, one in found.items():
                if name in fixed:
                    object.__setattr__(target, name, one)
                else:
                    vars(target)[name] = one  # no property or __setattr__ runs

        return change

    def _new_random(self, record: Mapping[str, Any], where: str) -> Any:
        if record["type"] == "Random":
            return Random()
        if record["type"] == "Generator":
            return torch.Generator("cpu" if record["cpu"] else self.device)
        if record["type"] not in _ENGINES:
            raise _refusal(where, f"numpy's {record['type']} is not known")
        return np.random.Generator(getattr(np.random, record["type"])())

    def _change_random(self, target: Any, record: Mapping[str, Any], where: str) -> _Change:
        def change() -> None:
            if isinstance(target, Random):
                target.setstate(record["state"])
            elif isinstance(target, torch.Generator):
                target.set_state(torch.frombuffer(bytearray(record["state"]), dtype=torch.uint8))
            else:
                target.bit_generator.state = record["state"]

        return change

    def _new_array(self, record: Mapping[str, Any], where: str) -> np.ndarray:
        return np.array(record["data"], order="K")

    def _change_array(self, target: np.ndarray, record: Mapping[str, Any], where: str) -> _Change:
        data = record.get("data")
        if data is None:
            return lambda: None
        if target.shape != data.shape or target.dtype != data.dtype or not target.flags.writeable:
            raise _refusal(where, "the array's shape or dtype changed in place, or it cannot be written")
        return lambda: np.copyto(target, data)

    def _new_tensor(self, record: Mapping[str, Any], where: str) -> Tensor:
        shape, name = record["shape"], record.get("like", record.get("on"))
        if name is None:
            tensor = self._view(self._memory(record), record)
        else:
            other = self.start.objects.get(name)
            if not isinstance(other, Tensor) or ("like" in record and list(other.shape) != shape):
                raise _refusal(where, f"begin_stage made no {name} of its shape")
            if "on" in record and [list(other.shape), list(other.stride())] != record["layout"]:
                raise _refusal(where, f"begin_stage made a {name} of another layout, whose memory it shared")
            tensor = other.detach().clone() if "like" in record else self._view(other.detach(), record)
        return nn.Parameter(tensor, requires_grad=record["trains"]) if record["parameter"] else tensor

    def _change_tensor(self, target: Tensor, record: Mapping[str, Any], where: str) -> _Change:
        gradient = self.value(record["gradient"], f"{where}.grad")

        def change() -> None:
            if "data" in record:
                _put(target, self._view(record["data"], record), record["data"])
            if target.is_leaf and target.requires_grad != record["trains"]:
                target.requires_grad_(record["trains"])
            if target.is_leaf and target.grad is not gradient:
                target.grad = gradient

        return change

    def _memory(self, record: Mapping[str, Any]) -> Tensor:
        data: Tensor = record["data"]
        if id(data) not in self.memory:
            self.memory[id(data)] = data.to("cpu" if record["cpu"] else self.device, copy=True)
        return self.memory[id(data)]

    def _view(self, memory: Tensor, record: Mapping[str, Any]) -> Tensor:
        start = memory.storage_offset() + record["offset"]
        return torch.as_strided(memory, record["shape"], record["stride"], start)


def _put(target: Tensor, values: Tensor, flat: Tensor) -> None:
    """Write values into a tensor in place; one of another shape or dtype gets new memory."""
    if target.shape != values.shape or target.dtype != values.dtype:
        target.data = values.to(target.device, copy=True)
    elif any(step == 0 and size > 1 for size, step in zip(target.shape, target.stride(), strict=True)):
        torch.as_strided(target, flat.shape, (1,)).copy_(flat)  # elements share memory, as they did when it was stored
    else:
        target.copy_(values)


def _refusal(where: str, why: str) -> MethodError:
    return MethodError(
        f"{where}: {why}. The stage cannot go on from its checkpoint; remove that (store, partial) to train it anew."
    )
