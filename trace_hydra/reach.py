"""Everything an object reaches, by name, with a plain record of each: what `snapshot` compares and stores."""

import hashlib
import io
import json
import logging
import sys
import threading
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cache
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trace_hydra.store.tree import pack

MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
SEQUENCES = (list, tuple, set, frozenset, deque)
FIXED = ("tuple", "frozenset")
"""Types of sequences that cannot change."""
FACTORIES: dict[str, Any] = {
    cls.__name__: cls for cls in (bool, int, float, str, bytes, dict, OrderedDict, Counter, *SEQUENCES)
}
"""Default factories that can be made again by their name."""
_VALUES = (type(None), bool, int, float, str, bytes, torch.dtype, torch.Size)
_FOREIGN = frozenset((
    *("torch", "transformers", "peft", "tokenizers", "accelerate", "lightning", "pytorch_lightning"),
    *("lightning_fabric", "safetensors", "bitsandbytes", "datasets", "hydra", "omegaconf", "wandb"),
))  # fmt: skip
_LEFT = (types.ModuleType, weakref.ref, logging.Logger, io.IOBase, Iterator, torch.device, threading.Event,
         type(threading.Lock()), type(threading.RLock()))  # fmt: skip
_OPTIMIZER = ("state", "param_groups")
_SCHEDULER = ("last_epoch", "base_lrs", "_last_lr", "_step_count")
_MODULE = {"training", "_parameters", "_buffers", "_modules"}
_ROW = 4096  # words that share their multipliers
_SMALL = 1 << 16  # bytes


class Walk:
    """What a method reaches: attributes and items, in depth.

    An object's name is the path it is first met on, or the name it had when the stage began; new ones have a "+" before
    the path. A record holds values as they are, and other objects as ("at", name).

    Args:
        method: Where it starts.
        model: Its modules and weights are named, but not recorded.
        known: Names objects that were there when the stage began; None: it begins now.
        hashes: Whether tensors and arrays get their fingerprint.
    """

    def __init__(
        self, method: object, model: nn.Module, known: Callable[[Any], str | None] | None = None, hashes: bool = True
    ):
        self.known, self.hashes = known, hashes
        self.names: dict[int, str] = {}
        self.objects: dict[str, Any] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.unknown: dict[str, str] = {}
        """Path -> class of objects that may change without being recorded."""
        for listed in (model.named_modules(), model.named_parameters(), model.named_buffers()):
            for name, one in listed:
                self.names[id(one)], self.objects[f"model:{name}"] = f"model:{name}", one
        self.storages = {_storage(one) for one in (*model.parameters(), *model.buffers()) if one.numel()}
        self.refer(method, "method")

    def refer(self, value: Any, path: str) -> Any:
        """Say where an object is to be found, or what value it is; record it when it is met for the first time."""
        if not is_object(value):
            return reference(value)
        if id(value) not in self.names:
            kind, name = self.kind(value), self.known(value) if self.known else path
            if name is None and kind == "left" and isinstance(value, Tensor):
                kind = "tensor"  # a view of the model's memory that training made: it can be made again
            if name is None and kind in ("left", "unknown"):
                return (kind, class_name(type(value)))
            name = name or f"+{path}"
            self.names[id(value)], self.objects[name] = name, value
            if kind not in ("left", "unknown"):
                self.records[name] = {"kind": kind, **getattr(self, f"_{kind}")(value, path)}
            elif isinstance(value, Iterator) or (kind == "unknown" and _mutable(type(value))):
                self.unknown[path] = class_name(type(value))
        return ("at", self.names[id(value)])

    def kind(self, value: Any) -> str:
        """How an object is recorded; "left": begin_stage makes it again, "unknown": perhaps nobody does."""
        cls = type(value)
        if isinstance(value, Tensor):
            if value.layout == torch.strided and value.numel() and _storage(value) in self.storages:
                return "left"
            plain = cls in (Tensor, nn.Parameter) and value.layout == torch.strided
            return "tensor" if plain and not (value.is_meta or value.is_quantized or value.is_nested) else "unknown"
        if isinstance(value, np.ndarray):
            plain = cls is np.ndarray and value.itemsize > 0
            return "array" if plain and not (value.dtype.hasobject or value.dtype.names) else "unknown"
        if cls in MAPPINGS:
            return "mapping"
        if cls in SEQUENCES or (isinstance(value, tuple) and own(cls)):
            return "sequence"
        if cls in (Random, torch.Generator, np.random.Generator):
            return "random"
        if attributes(value) is not None:
            return "object"
        return "left" if isinstance(value, _LEFT) or callable(value) or package(cls) in _FOREIGN else "unknown"

    def _tensor(self, value: Tensor, path: str) -> dict[str, Any]:
        hashed = self.hashes and _storage(value) not in self.storages
        return {
            "parameter": isinstance(value, nn.Parameter),
            "dtype": str(value.dtype),
            "shape": list(value.shape),
            "trains": value.is_leaf and value.requires_grad,
            "gradient": self.refer(value.grad if value.is_leaf else None, f"{path}.grad"),
            "cpu": value.device.type == "cpu",
            "hash": fingerprint(value) if hashed else b"",
        }

    def _array(self, value: np.ndarray, path: str) -> dict[str, Any]:
        raw = hashlib.sha256(value.tobytes()).digest() if self.hashes else b""
        return {"dtype": value.dtype.str, "shape": list(value.shape), "hash": raw}

    def _mapping(self, value: dict, path: str) -> dict[str, Any]:
        items = []
        for place, (key, one) in enumerate(list(value.items())):
            label = f"#{place}" if is_object(key) else repr(key)
            items.append([self.refer(key, f"{path}.key[{label}]"), self.refer(one, f"{path}[{label}]")])
        factory = getattr(value, "default_factory", None)
        name = getattr(factory, "__name__", "?") if factory else None
        return {
            "type": type(value).__name__,
            "factory": name if name is None or FACTORIES.get(name) is factory else "?",
            "items": items,
        }

    def _sequence(self, value: Any, path: str) -> dict[str, Any]:
        plain = type(value) in SEQUENCES
        return {
            "type": type(value).__name__ if plain else "tuple",
            "class": "" if plain else class_name(type(value)),
            "maxlen": getattr(value, "maxlen", None) if plain else None,
            "items": [self.refer(one, f"{path}[{place}]") for place, one in enumerate(members(value))],
        }

    def _random(self, value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Random):
            return {"type": "Random", "state": value.getstate(), "cpu": True}
        if isinstance(value, torch.Generator):
            state = value.get_state().numpy().tobytes()
            return {"type": "Generator", "state": state, "cpu": value.device.type == "cpu"}
        return {"type": type(value.bit_generator).__name__, "state": value.bit_generator.state, "cpu": True}

    def _object(self, value: Any, path: str) -> dict[str, Any]:
        found = {name: self.refer(one, f"{path}.{name}") for name, one in (attributes(value) or {}).items()}
        return {"class": class_name(type(value)), "attributes": found}


def is_object(value: Any) -> bool:
    """Whether a value has an identity that counts; numbers, text and enum members have none."""
    if isinstance(value, Enum):
        return value.name not in type(value).__members__  # a combination of flags
    return type(value) not in _VALUES and not (
        isinstance(value, np.generic) and not (value.dtype.hasobject or value.dtype.names)
    )


def reference(value: Any) -> Any:
    """How a record refers to what is no object: itself, or ("enum", class, member)."""
    return ("enum", class_name(type(value)), value.name) if isinstance(value, Enum) else value


def members(value: Any) -> list[Any]:
    """List a container's items; those of a set in an order that does not depend on the process."""
    if isinstance(value, set | frozenset):
        return sorted(value, key=lambda one: (type(one).__name__, repr(one)))
    return list(value)


def attributes(value: Any) -> dict[str, Any] | None:
    """Give the attributes that are an object's state; None for what is not an object made of attributes."""
    cls = type(value)
    if isinstance(value, Optimizer):
        names = set(_OPTIMIZER)
    elif isinstance(value, LRScheduler):
        names = set(_SCHEDULER)
    elif isinstance(value, nn.Module):
        names = vars(value).keys() - (_module_attributes() - _MODULE) if own(cls) else _MODULE
    elif plain_class(cls):
        names = {*getattr(value, "__dict__", ()), *slots(cls)}
    else:
        return None
    found = {name: getattr(value, name) for name in slots(cls) if name in names and hasattr(value, name)}
    return found | {name: one for name, one in getattr(value, "__dict__", {}).items() if name in names}


def plain_class(cls: type) -> bool:
    """Whether instances consist of attributes: a Python class, neither of a library that is left nor of a builtin."""
    bases = (base for base in cls.__mro__ if base is not object)
    if not all(own(base) or base.__module__ in ("typing", "abc", "collections.abc") for base in bases):
        return False
    return not issubclass(cls, Enum) and (
        cls.__dictoffset__ != 0 or any("__slots__" in vars(base) for base in cls.__mro__)
    )


@cache
def slots(cls: type) -> tuple[str, ...]:
    """List a class's slots by the names they are kept under."""
    found = [name for base in cls.__mro__ for name, one in vars(base).items() if _is_slot(one)]
    return tuple(dict.fromkeys(found))


def own(cls: type) -> bool:
    """Whether a class is neither of the standard library nor of one that is left."""
    return package(cls) not in _FOREIGN and package(cls) not in sys.stdlib_module_names and package(cls) != "numpy"


def package(cls: type) -> str:
    """The outermost package of a class."""
    return cls.__module__.partition(".")[0]


def class_name(cls: type) -> str:
    """Module and qualified name."""
    return f"{cls.__module__}:{cls.__qualname__}"


def digest(record: Any) -> bytes:
    """Hash a record; 1, 1.0 and True differ."""
    try:
        text = repr(record)
    except ValueError:  # an integer of too many digits
        text = json.dumps(pack(record)[0])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def fingerprint(tensor: Tensor) -> bytes:
    """Hash a tensor's bytes where it is, the same on every device; no copy of it is made, if it is contiguous.

    Sums of 32-bit words times fixed random 64-bit numbers, modulo 2^64, then SHA-256. Two tensors that differ have the
    same one with a probability of at most 2^-33. (`torch.hash_tensor` is an exclusive or: it takes zeros for ones, and
    any order for any other.)
    """
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    size = len(flat) // (4 * _ROW) * (4 * _ROW) if len(flat) > _SMALL else 0
    hashed = hashlib.sha256(flat[size:].cpu().numpy().tobytes())
    if size:
        words = flat[:size] if flat.storage_offset() % 4 == 0 else flat[:size].clone()
        rows = words.view(torch.int32).view(-1, _ROW)
        factors = _factors(str(flat.device))
        on_host = flat.device.type == "cpu"  # an integer product of matrix and vector is there only, and 4 times faster
        parts = rows.split(64 if on_host else 1024)  # 2 or 32 MB as 64-bit integers
        sums = [torch.mv(part.long(), factors) if on_host else (part.long() * factors).sum(1) for part in parts]
        hashed.update(torch.cat(sums).cpu().numpy().tobytes())
    return hashed.digest()[:16]


@cache
def _factors(device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (_ROW,), generator=generator).to(device)


@cache
def _module_attributes() -> frozenset[str]:
    return frozenset(vars(nn.Module()))


def _is_slot(one: Any) -> bool:
    return isinstance(one, types.MemberDescriptorType)


def _mutable(cls: type) -> bool:
    """Whether equality says nothing about content, or nobody may rely on it: paths, dates, fractions are values."""
    return cls.__eq__ is object.__eq__ or cls.__hash__ is None


def _storage(tensor: Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr()
