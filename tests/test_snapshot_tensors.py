"""What a snapshot makes of tensors and what shares memory or identity: weights, views, teachers, hooks, closures."""

import copy
import logging
import threading
from functools import partial

import torch
from snapshot_doubles import Plain, carried, model, same, stored

from trace_hydra.reach import fingerprint
from trace_hydra.snapshot import Snapshot
from trace_hydra.store.tree import pack


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
