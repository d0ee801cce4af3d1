"""Changes of every kind of value that a method may hold: numbers, containers, cycles, generators, tensors, modules."""

from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from snapshot_doubles import Frozen, Mood, Pair, Plain, Slotted, carried, model, same, stored
from torch import nn

from trace_hydra.data.task import Example
from trace_hydra.methods.memory import ExampleMemory
from trace_hydra.snapshot import Snapshot


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
