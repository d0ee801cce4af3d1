"""Nested state as JSON and named tensors, and back: optimizer states, schedulers, loop states, random states.

What JSON knows stays as it is; everything else becomes an object with the one key "!", [kind, ...]. Nothing that is
loaded names code: kinds are those of this file.
"""

import base64
import struct
from collections import OrderedDict, defaultdict, deque
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trace_hydra.errors import StoreError

_TAG = "!"
_LARGE = 1 << 63  # integers from here on as hex: Python reads at most 4300 decimal digits
_MAPPINGS = (dict, OrderedDict, defaultdict)
_SEQUENCES: dict[type, str] = {tuple: "tuple", set: "set", frozenset: "frozenset", deque: "deque"}
_MAKE = {"tuple": tuple, "set": set, "frozenset": frozenset}
_PLAIN = {  # dtypes that safetensors has a name for; others go as their bytes
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
}


def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Take a tree apart.

    It may hold dict (OrderedDict and defaultdict come back as dict, in order), list, tuple, set, frozenset, deque,
    strided tensors, numpy arrays and scalars, str, bytes, int, float, bool, None, torch.dtype and torch.Size. Keys and
    members of sets may be any of them that holds no tensor, array, list or dict.

    Tensors are detached, not copied, and stay on their device: a Parameter comes back as a tensor, and none requires
    a gradient. An object that stands in several places comes back as several equal ones, a tensor as one.

    Returns:
        The tree for `json.dumps(..., allow_nan=False)`; tensors "t0", "t1", ... in the order they were met.

    Raises:
        TypeError: If it holds anything else or contains itself; names the path.
    """
    packer = _Packer()
    return packer.pack(tree, "tree"), packer.tensors


def unpack(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """Put together what `pack` took apart.

    Args:
        plain: The JSON part.
        tensors: By name; those in the tree are these objects, where safetensors has their dtype.

    Raises:
        StoreError: If the JSON is not `pack`'s, or a tensor is missing.
    """
    if isinstance(plain, list):
        return [unpack(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    try:
        kind, *parts = plain[_TAG]
        return _unpack(kind, parts, tensors)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError, struct.error) as error:
        what = f"{str(plain)[:200]!r} ({type(error).__name__}: {error})"
        raise StoreError(f"stored state cannot be read: {what}. Remove the entry; it is made again.") from error


class _Packer:
    def __init__(self):
        self.tensors: dict[str, Tensor] = {}
        self.seen: dict[int, tuple[Any, str]] = {}  # id -> tensor or array (kept alive), its name
        self.open: set[int] = set()  # containers around the current place

    def pack(self, value: Any, path: str, key: bool = False) -> Any:
        """Pack a value; `key` says that it is a key or a member of a set."""
        cls = type(value)
        if value is None or cls is bool:
            return value
        if cls is int:
            return value if -_LARGE < value < _LARGE else {_TAG: ["int", hex(value)]}
        if cls is float:
            return value if isfinite(value) else {_TAG: ["float", struct.pack(">d", value).hex()]}
        if cls is str:
            return value if _encodable(value) else {_TAG: ["str", value.encode("utf-8", "surrogatepass").hex()]}
        if cls is bytes:
            return {_TAG: ["bytes", base64.b64encode(value).decode()]}
        if cls is torch.dtype:
            return {_TAG: ["dtype", str(value).removeprefix("torch.")]}
        if cls is torch.Size:
            return {_TAG: ["size", *value]}
        if isinstance(value, np.generic) and not (value.dtype.hasobject or value.dtype.names):
            return {_TAG: ["scalar", value.dtype.str, np.asarray(value).tobytes().hex()]}
        if not key and isinstance(value, Tensor) and cls in (Tensor, torch.nn.Parameter) and _strided(value):
            return self._tensor(value)
        if not key and isinstance(value, np.ndarray) and cls is np.ndarray and _holds_bytes(value):
            return self._array(value)
        return self._container(value, path, key)

    def _container(self, value: Any, path: str, key: bool) -> Any:
        cls = type(value)
        if id(value) in self.open:
            raise TypeError(f"{path} contains itself.")
        if cls not in (list, *_MAPPINGS, *_SEQUENCES) or (key and cls not in (tuple, frozenset)):
            place = " as a key or member of a set" if key else ""
            raise TypeError(f"{path} is a {cls.__module__}.{cls.__qualname__}, which cannot be stored{place}.")
        self.open.add(id(value))
        try:
            if cls in _MAPPINGS:
                return {_TAG: ["dict", [self._pair(one, item, path) for one, item in value.items()]]}
            hashed = key or cls in (set, frozenset)
            items = [self.pack(item, f"{path}[{place}]", hashed) for place, item in enumerate(value)]
        finally:
            self.open.discard(id(value))
        if cls is list:
            return items
        if cls in (set, frozenset):
            items.sort(key=repr)  # not the order of this process
        return {_TAG: [_SEQUENCES[cls], items, *([value.maxlen] if cls is deque else [])]}

    def _pair(self, key: Any, value: Any, path: str) -> list[Any]:
        name = _shown(key)
        return [self.pack(key, f"{path} key {name}", True), self.pack(value, f"{path}[{name}]")]

    def _tensor(self, value: Tensor) -> Any:
        plain = value.detach().resolve_conj().resolve_neg()
        if value.dtype in _PLAIN:
            return {_TAG: ["tensor", self._name(value, lambda: plain)]}
        name = self._name(value, lambda: plain.contiguous().reshape(-1).view(torch.uint8))
        return {_TAG: ["bits", name, str(value.dtype).removeprefix("torch."), list(value.shape)]}

    def _array(self, value: np.ndarray) -> Any:
        order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
        name = self._name(value, lambda: _from_bytes(value.tobytes(order)))
        return {_TAG: ["array", name, value.dtype.str, list(value.shape), order]}

    def _name(self, value: Any, make: Any) -> str:
        if id(value) not in self.seen:
            self.seen[id(value)] = value, f"t{len(self.tensors)}"
            self.tensors[self.seen[id(value)][1]] = make()
        return self.seen[id(value)][1]


def _unpack(kind: str, parts: list[Any], tensors: dict[str, Tensor]) -> Any:
    match kind, parts:
        case "dict", [pairs]:
            return {unpack(key, tensors): unpack(value, tensors) for key, value in pairs}
        case "tuple" | "set" | "frozenset", [items]:
            return _MAKE[kind](unpack(item, tensors) for item in items)
        case "deque", [items, maxlen]:
            return deque((unpack(item, tensors) for item in items), maxlen)
        case "int", [text]:
            return int(text, 16)
        case "float", [text]:
            return struct.unpack(">d", bytes.fromhex(text))[0]
        case "str", [text]:
            return bytes.fromhex(text).decode("utf-8", "surrogatepass")
        case "bytes", [text]:
            return base64.b64decode(text, validate=True)
        case "dtype", [name]:
            return _dtype(name)
        case "size", sizes:
            return torch.Size(sizes)
        case "scalar", [name, text]:
            dtype = np.dtype(name)
            return np.frombuffer(bytes.fromhex(text), dtype)[0] if dtype.itemsize else dtype.type()
        case "tensor", [name]:
            return tensors[name]
        case "bits", [name, dtype, shape]:
            return tensors[name].contiguous().view(_dtype(dtype)).reshape(shape)
        case "array", [name, dtype, shape, order]:
            raw = np.frombuffer(tensors[name].cpu().numpy().tobytes(), np.dtype(dtype))
            return raw.reshape(shape, order=order).copy(order)
    raise ValueError(f"no kind {kind!r} with {len(parts)} parts")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch has no dtype {name!r}")
    return found


def _strided(value: Tensor) -> bool:
    return value.layout == torch.strided and not (value.is_meta or value.is_quantized or value.is_nested)


def _holds_bytes(value: np.ndarray) -> bool:
    return not value.dtype.hasobject and not value.dtype.names and value.itemsize > 0


def _shown(key: Any) -> str:
    try:
        return repr(key)
    except ValueError:  # an integer of too many digits
        return "..."


def _encodable(text: str) -> bool:
    """Whether UTF-8 can hold a text; JSON would join two lone surrogates to one character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _from_bytes(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.zeros(0, dtype=torch.uint8)
