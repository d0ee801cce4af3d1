"""What a method changed since its stage began, so that a killed run goes on within the stage.

A resumed run has weights and method as they were at the stage's start and has called `begin_stage` and `phases` again.
That brings back teachers, hooks and closures; what training changed in the method since is laid over it:

    snapshot = Snapshot(method, model)           # right behind phases(), in both runs
    tree = snapshot.changes()                    # `store.tree.pack` takes it apart for a file
    snapshot.apply(tree)                         # in the resumed run, before it trains

Objects keep their identity: one that was there when the stage began is changed in place, so that hooks and closures see
it; one made since is made anew; one that stands in several places still does, and views of one memory share it.

Captured: all that `vars(method)` reaches through dict (OrderedDict, defaultdict, Counter), list, tuple, set, frozenset,
deque, objects of Python classes (frozen ones too), modules that are not the model's (weights, buffers, mode), torch's
optimizers and schedulers, tensors with their `.grad`, numpy arrays, random.Random, torch.Generator, numpy Generator,
enum members, numbers and text.
Left as `begin_stage` makes it again: the model, its modules and weights, tensors that share their memory; callables,
hook handles, locks, files, loggers, weak references, iterators, objects of libraries (torch, transformers, peft, ...).
Where training put another such object, the one that `begin_stage` puts there stays; if there is none, or if training
made a module, `apply` raises.
Not captured: what no attribute reaches (variables of a closure, `ctx.rng`, global random states); autograd graphs; that
numpy arrays share memory; the order of a set, whose members are told apart by `repr`. Objects nested hundreds of levels
deep exceed Python's recursion. Of objects of kinds unknown here `Snapshot` warns if they can change.
"""

import logging
import re
import weakref
from collections import defaultdict
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trace_hydra.overlay import Overlay
from trace_hydra.reach import FIXED, Walk, digest, is_object, members, own, package, reference

log = logging.getLogger(__name__)


class Snapshot:
    """Knows how a method looked when its stage began, by fingerprints: no tensor is copied or kept alive.

    Args:
        method: As `begin_stage` and `phases` left it.
        model: What trains; its weights are stored by others.
    """

    def __init__(self, method: object, model: nn.Module):
        self.method, self.model = method, model
        walk = Walk(method, model)
        self.digests = {name: digest(record) for name, record in walk.records.items()}
        self.contents = {name: _content(one) for name, one in walk.records.items() if one["kind"] == "tensor"}
        self.fixed = {name: one["items"] for name, one in walk.records.items() if one.get("type") in FIXED}
        self.known = {id(one): (name, type(one), _weak(one)) for name, one in walk.objects.items()}
        for path, cls in walk.unknown.items():
            log.warning("%s is a %s; what changes in it within a stage is lost when a run is resumed.", path, cls)

    def changes(self) -> dict[str, Any]:
        """Give what is not as it was when the stage began, as a tree that `store.tree.pack` takes.

        Tensors and arrays in it share memory with the method's: store or clone them before training goes on.
        """
        walk = Walk(self.method, self.model, self._name_of)
        records = {name: one for name, one in walk.records.items() if self.digests.get(name) != digest(one)}
        _attach_data(records, walk, self.contents)
        return {"records": records, "start": self._overview()}

    def apply(self, tree: Mapping[str, Any]) -> None:
        """Bring the method, as it was when this snapshot was taken, to where `changes` of another run found it.

        Raises:
            MethodError: If something cannot be brought back; the method is then as it was.
        """
        start = self._overview()
        if apart := sorted(name for name in {*start, *tree["start"]} if start.get(name) != tree["start"].get(name)):
            message = (
                "%s began the stage in another state than in the run that stopped: a cache, or inexact arithmetic."
            )
            log.info(message, ", ".join(apart))
        walk = Walk(self.method, self.model, hashes=False)
        trusted = {package(cls) for cls in type(self.method).__mro__ if own(cls)} | {package(Snapshot)}
        Overlay(walk, tree["records"], self.model, trusted).run()

    def _name_of(self, value: Any) -> str | None:
        """The name of an object if it was there when the stage began."""
        name, cls, weak = self.known.get(id(value), ("", None, None))
        if cls is not type(value) or (weak is not None and weak() is not value):
            return None
        if name in self.fixed:  # another may have got the address of one that is gone; its items tell
            items = [("at", self._name_of(one)) if is_object(one) else reference(one) for one in members(value)]
            return name if digest(items) == digest(self.fixed[name]) else None
        return name  # a new dict or list may pass for one that is gone; as that one is gone, nobody else can tell

    def _overview(self) -> dict[str, str]:
        """A digest of each attribute as the stage began."""
        hashes: dict[str, Any] = defaultdict(sha256)
        for name, one in self.digests.items():
            hashes[re.split(r"[.\[]", name)[1] if name != "method" else name].update(one)
        return {attribute: one.hexdigest()[:16] for attribute, one in hashes.items()}


def _attach_data(records: dict[str, dict[str, Any]], walk: Walk, contents: Mapping[str, Any]) -> None:
    """Give changed and new tensors and arrays their data.

    A tensor gets "data", flat, with "stride" and "offset" in it; or "like", the name of one that had the same content
    when the stage began; or "on", the name of one that is there since then, whose memory it is a view of.
    """
    first = {content: name for name, content in contents.items()}
    old: dict[Any, list[str]] = defaultdict(list)
    new: dict[Any, list[str]] = defaultdict(list)
    for name, one in walk.objects.items():
        record = records.get(name, {})
        if isinstance(one, np.ndarray) and record:
            record["data"] = one
        elif isinstance(one, Tensor) and (name in walk.records or name.startswith("model:")):
            memory = (one.untyped_storage().data_ptr(), one.dtype, one.device, one.numel() == 0)
            (new if name.startswith("+") else old)[memory].append(name)
            if record and not name.startswith("+") and contents.get(name) != _content(record):
                record.update(_data_of([one])[0])
    for memory, listed in new.items():
        hosts = [] if memory[-1] else [(name, walk.objects[name]) for name in old[memory]]
        for names in _overlapping([(name, walk.objects[name]) for name in listed]):
            tensors = [walk.objects[name] for name in names]
            low, high = min(one.storage_offset() for one in tensors), max(map(_end, tensors))
            host = next((pair for pair in hosts if pair[1].storage_offset() <= low and high <= _end(pair[1])), None)
            like = first.get(_content(records[names[0]])) if len(names) == 1 else None
            if host is not None:
                parts = [_view_of(one, *host) for one in tensors]
            else:
                parts = _data_of(tensors) if like is None else [{"like": like}]
            for name, part in zip(names, parts, strict=True):
                records[name].update(part)


def _data_of(tensors: list[Tensor]) -> list[dict[str, Any]]:
    """Describe tensors over one stretch of memory; one with gaps in it is compacted if it stands alone."""
    low, high = min(one.storage_offset() for one in tensors), max(map(_end, tensors))
    if len(tensors) == 1 and high - low > tensors[0].numel():
        compact = tensors[0].detach().contiguous()
        return [{"data": compact.reshape(-1), "stride": list(compact.stride()), "offset": 0}]
    flat = torch.as_strided(tensors[0].detach(), (high - low,), (1,), low)
    return [{"data": flat, "stride": list(one.stride()), "offset": one.storage_offset() - low} for one in tensors]


def _view_of(tensor: Tensor, name: str, host: Tensor) -> dict[str, Any]:
    offset = tensor.storage_offset() - host.storage_offset()
    layout = [list(host.shape), list(host.stride())]
    return {"on": name, "layout": layout, "stride": list(tensor.stride()), "offset": offset}


def _overlapping(named: list[tuple[str, Tensor]]) -> list[list[str]]:
    """Part tensors of one memory into groups that overlap, directly or through others."""
    groups: list[list[str]] = []
    reached = 0
    for name, tensor in sorted(named, key=lambda pair: pair[1].storage_offset()):
        if not groups or tensor.storage_offset() >= reached:
            groups.append([])
        groups[-1].append(name)
        reached = max(reached, _end(tensor))
    return groups


def _end(tensor: Tensor) -> int:
    """Where a tensor ends in its memory, in elements."""
    if not tensor.numel():
        return int(tensor.storage_offset())
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return int(tensor.storage_offset()) + 1 + sum((size - 1) * stride for size, stride in steps)


def _content(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record["hash"], record["dtype"], tuple(record["shape"])


def _weak(value: Any) -> Any:
    try:
        return weakref.ref(value)
    except TypeError:
        return None
