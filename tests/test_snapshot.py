"""A method's changes within a stage, taken from one object and laid over another that began the stage alike."""

import copy
import enum
import itertools
import json
import logging
import threading
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_tiny
from torch import Tensor, nn

from trace_hydra.data.task import Example
from trace_hydra.errors import MethodError
from trace_hydra.methods.memory import ExampleMemory
from trace_hydra.reach import fingerprint
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


def values(_model):
    return dict(number=1, text="a", flag=True, nothing=None, raw=b"x", dtype=torch.float32, mood=Mood.COLD, gone=1)


def change_values(method):
    method.number, method.text, method.flag, method.nothing = 1.0, "b", 1, float("nan")
    method.raw, method.dtype, method.mood, method.new = b"y", torch.bfloat16, Mood.WARM, np.float32(0.5)
    del method.gone


def containers(_model):
    shared = [1]
    return dict(
        rows=[Example("1", "p", "a"), Example("2", "p", "a")],
        memory=ExampleMemory(),
        shared=(shared, {"again": shared}),
        counts=Counter("aab"),
        groups=defaultdict(list, x=[1]),
        order=OrderedDict(a=1, b=2),
        last=deque([1, 2, 3], maxlen=3),
        names={"a", "b"},
        fixed=frozenset({1}),
        pair=Pair(1, [2]),
        frozen=[Frozen("a"), Frozen("b", (1,))],
        slotted=Slotted(),
        keyed={Frozen("k"): 1, (1, "x"): 2},
    )


def change_containers(method):
    method.rows[1] = replace(method.rows[1], answer="b")
    method.rows.append(Example("3", "q", "c", "because"))
    method.memory.keep("T", method.rows, 0.5, Random(0))
    method.shared[0].append(2)
    method.counts["c"] += 5
    method.groups["y"].append(1)
    method.order.move_to_end("a")
    method.last.append(4)
    method.names.add("c")
    method.fixed = frozenset({1, 2, (3, "x")})
    method.pair = Pair(method.pair.right, 3)
    method.frozen[1] = Frozen("c", (1, [2]), torch.ones(2))
    method.slotted.change()
    method.keyed[Frozen("new")] = method.rows
    method.new = {"deep": [OrderedDict(z=deque([1], 2)), defaultdict(set, q={1}), Counter("zz")], 3: (4, None)}


def cycles(_model):
    ring: list = [1]
    ring.append(ring)
    return dict(ring=ring, table={})


def change_cycles(method):
    method.ring.append({"up": method.ring})
    method.table["self"] = method
    loop: list = []
    loop.append((loop, 1))
    method.loop = loop


def randomness(_model):
    return dict(
        rng=Random(1), other=Random(2), generator=torch.Generator().manual_seed(3), numpy=np.random.default_rng(4)
    )


def change_randomness(method):
    method.rng.gauss(0, 1)
    torch.rand(3, generator=method.generator)
    method.numpy.random(5)
    method.more = [Random(7), torch.Generator().manual_seed(8)]


def tensors(one):
    base = torch.arange(6.0)
    return dict(
        average={name: weight.detach().clone() for name, weight in one.named_parameters()},
        base=base,
        view=base[2:4],
        learned=nn.Parameter(torch.ones(2)),
        leaf=torch.ones(3, requires_grad=True),
        frozen=torch.ones(3, requires_grad=True),
        counts=torch.zeros(4),
        half=torch.ones(2, 3, dtype=torch.bfloat16),
        array=np.arange(4.0),
        growing=torch.zeros(0),
        spread=torch.zeros(1).expand(5),
    )


def change_tensors(method):
    method.average["0.weight"].mul_(0.5)
    method.view.add_(1)
    with torch.no_grad():
        method.learned.add_(1)
        method.leaf.mul_(3)
    method.frozen.requires_grad_(False)
    method.leaf.grad = torch.full((3,), 2.0)
    method.counts += 1  # zeros and ones have the same exclusive or
    method.half = method.half.t() * 2
    method.array[1] = 9
    method.growing = torch.cat([method.growing, torch.tensor([1.0])])
    method.spread[:1] = 3  # all five are one element
    method.empty = torch.zeros(0, 3, dtype=torch.int8)
    method.scalar = torch.tensor(2, dtype=torch.int16)
    method.made = nn.Parameter(torch.zeros(2), requires_grad=False)


def modules(_model):
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2)).eval()
    layer = nn.Linear(2, 1)
    return dict(teacher=teacher, layer=layer, optimizer=torch.optim.AdamW(layer.parameters(), lr=0.1))


def change_modules(method):
    method.teacher[1].train()
    method.teacher[2].running_mean.add_(1)
    method.layer(torch.ones(2)).sum().backward()
    method.optimizer.step()
    method.optimizer.param_groups[0]["lr"] = 0.05


CASES = [(values, change_values), (containers, change_containers), (cycles, change_cycles),
         (randomness, change_randomness), (tensors, change_tensors), (modules, change_modules)]  # fmt: skip


@pytest.mark.parametrize(("begin", "change"), CASES, ids=[begin.__name__ for begin, _ in CASES])
def test_second_object_equals_the_first_and_goes_on_alike(begin, change):
    first, second, _ = carried(lambda one: Plain(model=one, **begin(one)), change)
    assert same(vars(first), vars(second))


def test_random_generators_go_on_alike():
    first, second, _ = carried(lambda one: Plain(model=one, **randomness(one)), change_randomness)
    for _ in range(3):
        assert first.rng.random() == second.rng.random() and first.rng.gauss(0, 1) == second.rng.gauss(0, 1)
        assert first.more[0].random() == second.more[0].random() and first.other.random() == second.other.random()
        for of in (lambda method: method.generator, lambda method: method.more[1]):
            assert torch.equal(torch.rand(2, generator=of(first)), torch.rand(2, generator=of(second)))
        assert np.array_equal(first.numpy.random(2), second.numpy.random(2))


@pytest.mark.parametrize(("begin", "change"), CASES[1:], ids=[begin.__name__ for begin, _ in CASES[1:]])
def test_objects_of_the_start_are_changed_in_place(begin, change):
    """What was there before and is there still, in the first object, is the same object in the second."""
    first, second = (Plain(model=one, **begin(one)) for one in (model(), model()))
    before = [dict(vars(one)) for one in (first, second)]
    snapshots = [Snapshot(one, one.model) for one in (first, second)]
    change(first)
    snapshots[1].apply(stored(snapshots[0].changes()))
    kept = [name for name, one in before[0].items() if vars(first).get(name) is one]
    assert len(kept) > 1 and all(vars(second)[name] is before[1][name] for name in kept)


@pytest.mark.parametrize(("begin", "change"), CASES, ids=[begin.__name__ for begin, _ in CASES])
def test_a_second_kill_is_survived_too(begin, change):
    """Kill, resume, kill, resume: changes are always those since the stage began."""
    methods = [Plain(model=one, **begin(one)) for one in (model(), model(), model())]
    snapshots = [Snapshot(one, one.model) for one in methods]
    change(methods[0])
    snapshots[1].apply(stored(snapshots[0].changes()))
    methods[1].late = [1, 2]
    snapshots[2].apply(stored(snapshots[1].changes()))
    methods[0].late = [1, 2]
    assert same(vars(methods[0]), vars(methods[2]))


@pytest.mark.parametrize(
    ("before", "after"), [(1, True), (1, 1.0), (0.0, -0.0), (1, np.int64(1)), ("1", b"1"), ((1,), [1])]
)
def test_values_that_compare_equal_or_look_alike_are_told_apart(before, after):
    first, second, _ = carried(
        lambda one: Plain(model=one, kept=[before]), lambda method: method.kept.__setitem__(0, after)
    )
    assert type(second.kept[0]) is type(after) and repr(second.kept) == repr(first.kept) == repr([after])


def test_the_order_of_a_set_is_none_of_its_content():
    """0 and 8 share a place in a set's table of 8, so which was there first decides the order."""
    orders = [set(), set()]
    for one, items in zip(orders, [(0, 8), (8, 0)], strict=True):
        for item in items:
            one.add(item)
    assert list(orders[0]) != list(orders[1])
    starts = [Snapshot(Plain(names=one), model()).changes()["start"] for one in orders]
    assert starts[0] == starts[1]


def test_nothing_changed_nothing_stored():
    for begin, _ in CASES:
        method = Plain(model=model(), **begin(model()))
        assert Snapshot(method, method.model).changes()["records"] == {}


def test_weights_of_the_model_are_left_alone():
    def begin(one):
        return Plain(model=one, layers={"a": one[0]}, weights=list(one.parameters()), view=one[0].weight[:2].detach())

    def change(method):
        with torch.no_grad():
            method.view.zero_()
            method.weights[1].add_(5)
            method.model[1].running_mean.add_(1)
        method.weights.reverse()
        method.count = 1

    _, second, tree = carried(begin, change)
    assert not pack(tree)[1]
    fresh = model()
    assert all(
        torch.equal(one, other)
        for one, other in zip(second.model.state_dict().values(), fresh.state_dict().values(), strict=True)
    )
    assert all(
        one is other for one, other in zip(second.weights, reversed(list(second.model.parameters())), strict=True)
    )
    assert second.view.data_ptr() == second.model[0].weight.data_ptr() and second.count == 1


def test_a_view_of_a_weight_that_training_made_is_a_view_of_the_weight_again():
    first, second, tree = carried(
        lambda one: Plain(model=one), lambda method: setattr(method, "row", method.model[0].weight[1].detach())
    )
    assert not pack(tree)[1] and torch.equal(first.row, second.row)
    second.row.fill_(3)
    assert second.model[0].weight[1].tolist() == [3, 3, 3]


def test_an_unchanged_teacher_is_not_stored_and_one_changed_weight_is_stored_alone():
    def begin(one):
        return Plain(model=one, teacher=copy.deepcopy(one).eval(), steps=0, anchors=[torch.ones(4)])

    def change(method):
        method.steps = 3
        method.anchors.append(method.anchors[0].clone())  # a new tensor of old content

    first, second, tree = carried(begin, change)
    assert not pack(tree)[1] and same(vars(first), vars(second))
    assert second.anchors[1] is not second.anchors[0]

    def move(method):
        method.teacher[0].bias.data.add_(1)

    first, second, tree = carried(begin, move)
    assert [tuple(one.shape) for one in pack(tree)[1].values()] == [(3,)] and same(vars(first), vars(second))


def test_hooks_and_closures_see_what_is_restored():
    seen = []

    def begin(one):
        history: list[int] = []
        total = torch.zeros(2)
        handle = one[0].register_forward_hook(lambda *_: seen.append((list(history), total.tolist())))
        return Plain(model=one, history=history, total=total, handles=[handle], say=lambda: history[-1])

    def change(method):
        method.history += [1, 2]
        method.total += 5

    first, second, _ = carried(begin, change)
    assert second.say() == 2 and second.handles[0] is not first.handles[0]
    second.model[0](torch.ones(1, 3))
    assert seen == [([1, 2], [5, 5])]


def test_what_training_bound_anew_is_new_to_the_second_object_too():
    """A closure over the first list keeps that one in the first object, and so it does in the second."""

    def begin(one):
        history = [0]
        return Plain(model=one, history=history, first=lambda: history)

    def change(method):
        method.history = [1]

    first, second, _ = carried(begin, change)
    assert first.first() == second.first() == [0] and second.history == [1]


def test_views_made_in_training_share_memory_with_what_they_are_views_of():
    def begin(one):
        return Plain(model=one, flat=torch.zeros(6))

    def change(method):
        method.flat[0] = 1
        method.head = method.flat[:3]
        method.table = torch.arange(12.0).view(3, 4)
        method.rows = list(method.table)
        method.column = method.table.t()[1]
        method.slice = torch.arange(1000.0)[::100]

    first, second, tree = carried(begin, change)
    assert second.slice.is_contiguous() and first.slice.stride() == (100,)  # one with gaps is compacted
    first.slice = first.slice.clone()
    assert same(vars(first), vars(second))
    second.head.fill_(7)
    second.rows[1].fill_(8)
    assert second.flat.tolist() == [7, 7, 7, 0, 0, 0] and second.table[1].tolist() == [8] * 4
    assert second.column.tolist() == [1, 8, 9]
    assert sum(one.numel() for one in pack(tree)[1].values()) == 6 + 12 + 10  # of the slice, not of all 1000


def test_a_tensor_of_another_shape_keeps_its_identity():
    def begin(one):
        return Plain(model=one, tensor=torch.zeros(2))

    def change(method):
        method.tensor.data = torch.ones(3, dtype=torch.float16)

    methods = [begin(model()), begin(model())]
    tensor = methods[1].tensor
    snapshots = [Snapshot(one, one.model) for one in methods]
    change(methods[0])
    snapshots[1].apply(stored(snapshots[0].changes()))
    assert methods[1].tensor is tensor and same(methods[0].tensor, tensor)


def test_addresses_that_are_used_again_do_no_harm():
    """Tuples and tensors that go and come in a loop soon get old addresses; 200 rounds, each checked."""

    def begin(one):
        flat = torch.zeros(6)
        nested = ((1, [2]), {})
        return Plain(model=one, pair=(torch.zeros(2), [0]), flat=flat, view=flat[:3], nested=nested)

    first = begin(model())
    snapshot = Snapshot(first, first.model)
    for step in range(200):
        first.pair = (torch.full((2,), float(step)), [step])
        first.view = torch.full((3,), float(-step))  # no longer a view
        first.nested = ((step, [step]), {"x": (step,)})
        second = begin(model())
        other = Snapshot(second, second.model)
        other.apply(stored(snapshot.changes()))
        assert same(vars(first), vars(second))


def test_a_tensor_at_the_address_of_a_view_that_is_gone_is_no_view():
    def begin(one):
        flat = torch.zeros(6)
        return Plain(model=one, flat=flat, view=flat[:3])

    def change(method):
        address = id(method.view)
        del method.view
        made = []
        while len(made) < 10_000 and (not made or id(made[-1]) != address):
            made.append(torch.ones(3))
        method.view = made[-1]

    first, second, _ = carried(begin, change)
    assert same(vars(first), vars(second)) and second.flat.sum() == 0


def test_hook_handles_and_callables_stay_where_they_are():
    def begin(one):
        lock, handle = threading.Lock(), one[0].register_forward_hook(lambda *_: None)
        return Plain(model=one, things=[1, handle, lock], act=partial(print, 1), logger=logging.getLogger("x"))

    def change(method):
        method.things[1].remove()
        method.things[1] = method.model[0].register_forward_hook(lambda *_: None)
        method.things[0] = 2
        method.act = lambda: None

    methods = [begin(model()), begin(model())]
    old = list(methods[1].things), methods[1].act
    snapshots = [Snapshot(one, one.model) for one in methods]
    change(methods[0])
    snapshots[1].apply(stored(snapshots[0].changes()))
    assert methods[1].things == [2, *old[0][1:]] and methods[1].act is old[1]


def refused(method):
    method.things.append(lambda: None)


def refused_key(method):
    method.table = {"new": threading.Lock()}


def refused_value(method):
    method.when = Path("x")


def refused_module(method):
    method.layer = nn.Linear(2, 2)


def refused_factory(method):
    method.groups = defaultdict(lambda: 1)


def refused_over_data(method):
    method.number = len


REFUSED = [(refused, r"method\.things\[1\].*function"), (refused_key, r"method\.table\['new'\]"),
           (refused_value, r"method\.when.*pathlib"), (refused_module, r"method\.layer.*Linear"),
           (refused_factory, r"method\.groups.*defaultdict"), (refused_over_data, r"method\.number")]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[change.__name__ for change, _ in REFUSED])
def test_what_cannot_be_brought_back_is_named_and_nothing_is_changed(change, message):
    def begin(one):
        return Plain(model=one, things=[print], table={}, number=1, rows=[1])

    def both(method):
        method.rows.append(2)
        change(method)

    first, second = begin(model()), begin(model())
    one, other = Snapshot(first, first.model), Snapshot(second, second.model)
    both(first)
    with pytest.raises(MethodError, match=message):
        other.apply(stored(one.changes()))
    assert second.rows == [1] and second.number == 1


def test_a_start_that_differs_is_told(caplog):
    caplog.set_level(logging.INFO)
    first = Plain(model=model(), noise=torch.zeros(3), same=[1], cache={"x": 1})
    second = Plain(model=model(), noise=torch.ones(3), same=[1], cache=None)
    one, other = Snapshot(first, first.model), Snapshot(second, second.model)
    first.same.append(2)
    first.step = 1
    other.apply(stored(one.changes()))
    assert "cache, method, noise began the stage in another state" in caplog.text
    assert second.same == [1, 2] and second.step == 1 and second.noise.tolist() == [1, 1, 1] and second.cache is None

    third = Plain(model=model(), noise=[1], same=(1,))
    other = Snapshot(third, third.model)
    with pytest.raises(MethodError, match=r"method\.same.*tuple"):
        other.apply(stored(one.changes()))


def test_state_that_no_snapshot_sees_is_told(caplog):
    class Odd(dict):
        pass

    Snapshot(Plain(model=model(), odd=Odd(), path=Path("x"), turn=itertools.cycle([1])), model())
    assert "method.odd is a " in caplog.text and "method.turn is a itertools:cycle" in caplog.text
    assert "method.path" not in caplog.text


@pytest.mark.parametrize(
    "name", ["subprocess:Popen", "os:system", "trace_hydra.nowhere:X", "torch.nn:Linear", "test_snapshot:stored"]
)
def test_a_stored_tree_makes_no_foreign_class(name):
    method = Plain(model=model(), rows=[])
    records = {
        "method.rows": {"kind": "sequence", "type": "list", "class": "", "maxlen": None, "items": [("at", "+x")]},
        "+x": {"kind": "object", "class": name, "attributes": {}},
    }
    with pytest.raises(MethodError):
        Snapshot(method, method.model).apply({"records": records, "start": {}})
    assert method.rows == []


def test_fingerprints_tell_order_and_pairs_apart():
    """Exclusive or gives 0 for an even number of equal elements and forgets their order; so do not these."""
    some = [
        torch.zeros(40000),
        torch.ones(40000),
        -torch.ones(40000),
        torch.arange(40000.0),
        torch.arange(40000.0).flip(0),
    ]
    swapped = torch.arange(40000.0)
    swapped[[0, 8192]] = swapped[[8192, 0]]
    signs = torch.ones(40000)
    signs[[1, 3]] = -1
    some += [swapped, signs, torch.zeros(40001)[1:], torch.zeros(40001)]
    prints = [fingerprint(one) for one in some]
    assert len(set(prints)) == len(prints) - 1 and prints[0] == prints[-2]
    assert fingerprint(torch.arange(80000.0).to(torch.bfloat16)[1:]) == fingerprint(
        torch.arange(80000.0).to(torch.bfloat16)[1:].clone()
    )
    small = [
        torch.zeros(4),
        torch.ones(4),
        torch.tensor([1.0, 2, 3, 4]),
        torch.tensor([4.0, 3, 2, 1]),
        torch.tensor(1.0),
    ]
    assert len({fingerprint(one) for one in small}) == len(small)


# Rows and logits kept, draws; averaged weights and a counter; searches in a tree, sums of gradients; counters.
REAL = {"der": [], "ema": ["budget.default_epochs=2"], "treelora": ["budget.default_epochs=2"], "gem": []}


@pytest.mark.parametrize("name", REAL)
def test_real_methods_within_a_stage(name, tmp_path, monkeypatch):
    """After every loss and every step of two stages, changes are laid over a copy made when the stage began."""
    from conftest import compose_config

    from trace_hydra.targets import locate

    method_class = locate(compose_config([f"method={name}"]).method._target_)
    hooks = {hook: getattr(method_class, hook) for hook in ("phases", "losses", "after_step")}
    begun: dict[str, Any] = {}
    found: list[tuple[int, bool, int]] = []

    def phases(method, ctx):
        planned = hooks["phases"](method, ctx)
        begun.update(copy=duplicate(method, ctx.model), snapshot=Snapshot(method, ctx.model))
        return planned

    def check(method, ctx):
        tree = begun["snapshot"].changes()
        fresh = duplicate(begun["copy"], ctx.model)
        Snapshot(fresh, ctx.model).apply(stored(tree))
        found.append((ctx.stage.index, same(vars(method), vars(fresh)), len(tree["records"])))

    def losses(method, ctx, batch):
        terms = hooks["losses"](method, ctx, batch)
        check(method, ctx)
        return terms

    def after_step(method, ctx):
        hooks["after_step"](method, ctx)
        check(method, ctx)

    for hook, function in (("phases", phases), ("losses", losses), ("after_step", after_step)):
        monkeypatch.setattr(method_class, hook, function)
    run_tiny(tmp_path, [f"method={name}", "task_order=[FOMC,NumGLUE-cm]", *REAL[name]])
    assert {stage for stage, _, _ in found} == {1, 2} and all(equal for _, equal, _ in found)
    assert any(number for stage, _, number in found if stage == 2)


def duplicate(method, model):
    """Copy a method, not what it shares with the model."""
    shared = [*model.modules(), *model.parameters(), *model.buffers()]
    return copy.deepcopy(method, {id(one): one for one in shared})
