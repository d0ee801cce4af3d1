"""Trees of state survive JSON and named tensors exactly."""

import json
import math
import pickle
from collections import OrderedDict, defaultdict, deque, namedtuple
from random import Random

import numpy as np
import pytest
import torch
from lightning.pytorch.loops.progress import _BatchProgress
from torch import nn

from trace_hydra.errors import StoreError
from trace_hydra.store.tensors import read_tensors, write_tensors
from trace_hydra.store.tree import pack, unpack

Point = namedtuple("Point", "x y")


def same(one, other) -> bool:
    """Equal, type by type, bit by bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        raw = [value.detach().contiguous().reshape(-1).view(torch.uint8) for value in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(a, b) and same(one[a], other[b]) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, set | frozenset):
        return one == other and sorted(map(_typed, one)) == sorted(map(_typed, other))
    if isinstance(one, list | tuple | deque):
        limits = getattr(one, "maxlen", None) == getattr(other, "maxlen", None)
        return limits and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return one.hex() == other.hex() and math.copysign(1, one) == math.copysign(1, other)
    return one == other


def _typed(value) -> str:
    return f"{type(value)}{value!r}"


def through_json(tree):
    plain, tensors = pack(tree)
    return unpack(json.loads(json.dumps(plain, allow_nan=False, sort_keys=True)), tensors)


VALUES = {
    "scalars": [None, True, False, 0, 1, -1, 1.0, -0.0, 0.1, 5e-324, "", "ü😀", b"", b"\0\xff"],
    "floats": [math.nan, -math.nan, math.inf, -math.inf],
    "integers": [2**63, -(2**63), 2**63 - 1, 10**5000, {10**5000: 1}],
    "surrogates": ["\ud83d\ude00", "\udc80", {"\ud800": 1}],
    "dicts": {"b": 1, "a": 2, 3: "int", None: 0, True: 1, 2.5: 0, math.inf: 1, (1, ("x", None)): 2, "!": ["dict", []]},
    "empties": [{}, [], (), set(), frozenset(), deque(), {"a": {}}],
    "sets": [{1, "a", None, (1, 2)}, frozenset({frozenset({1}), 2.0})],
    "deques": [deque([1, 2], 3), deque([[1], (2,)])],
    "torch": [torch.bfloat16, torch.float32, torch.Size([2, 3]), torch.Size([])],
    "numpy": [np.float32(0.1), np.float64(math.nan), np.int8(-3), np.bool_(True), np.str_("x"), np.str_(""),
              np.datetime64("2020-01-02"), np.complex64(1 + 2j)],
    "arrays": [np.arange(6, dtype=">i2").reshape(2, 3), np.zeros((0, 4)), np.array(3.5), np.array(["ab", "c"]),
               np.arange(6.0).reshape(2, 3).T, np.array([True, False])],
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_equal_and_of_the_same_type(name):
    assert same(through_json(VALUES[name]), VALUES[name])


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool,
          torch.uint16, torch.complex64, torch.float8_e4m3fn]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (0, 4)])
def test_tensors_of_any_dtype_come_back_through_a_file(dtype, shape, tmp_path):
    tensor = torch.randint(0, 2, shape).to(dtype)
    plain, tensors = pack({"x": [tensor, tensor.reshape(-1)]})
    write_tensors(tensors, tmp_path / "file")
    assert same(unpack(json.loads(json.dumps(plain)), dict(read_tensors(tmp_path / "file")))["x"][0], tensor)


def test_memory_order_of_an_array_is_kept_and_it_can_be_written():
    array = through_json(np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    assert array.flags.f_contiguous and not array.flags.c_contiguous
    array[0, 0] = 7
    assert array[0, 0] == 7


def test_one_tensor_is_stored_once_and_names_follow_the_order():
    first, second = torch.zeros(3), torch.ones(2)
    plain, tensors = pack([second, {"a": first, "b": second}, first])
    assert list(tensors) == ["t0", "t1"] and torch.equal(tensors["t0"], second)
    back = unpack(plain, tensors)
    assert back[0] is back[1]["b"] and back[2] is back[1]["a"]


def test_a_set_is_packed_the_same_however_it_was_filled():
    names = [f"name-{number}" for number in range(50)]
    assert pack(set(names)) == pack(set(reversed(names)))


def test_ordered_and_default_dicts_become_dicts():
    tree = [OrderedDict(b=1, a=2), defaultdict(list, x=[1])]
    assert same(through_json(tree), [{"b": 1, "a": 2}, {"x": [1]}])


def test_states_of_optimizer_schedule_loop_and_randomness_continue_alike():
    """Two AdamW steps, state through JSON, one more step: equal to three steps in a row, bit by bit."""

    def make():
        torch.manual_seed(0)
        layer = nn.Linear(4, 2)
        optimizer = torch.optim.AdamW(layer.parameters(), amsgrad=True)
        return layer, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def step(layer, optimizer, schedule):
        optimizer.zero_grad()
        layer(torch.arange(4.0)).square().sum().backward()
        optimizer.step()
        schedule.step()

    whole, cut = make(), make()
    for _ in range(2):
        step(*whole)
        step(*cut)
    again = make()
    for one, old in zip(again, cut, strict=True):
        state = old.state_dict()
        one.load_state_dict(through_json(state))
        assert same(through_json({**state}), {**state})
    step(*whole)
    step(*again)
    assert torch.equal(whole[0].weight, again[0].weight)
    loop = _BatchProgress()
    loop.increment_ready()
    assert same(through_json(loop.state_dict()), loop.state_dict())
    draws = Random(1)
    states = [draws.getstate(), torch.get_rng_state(), np.random.default_rng(0).bit_generator.state]
    assert same(through_json(states), states)


LOOP: list = []
LOOP.append({"again": LOOP})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [1, object()]}, r"tree\['a'\]\[1\] is a builtins.object"),
        ({"f": print}, r"tree\['f'\]"),
        ([Point(1, 2)], r"tree\[0\] is a test_store_tree.Point"),
        ({"a": 1j}, r"tree\['a'\] is a builtins.complex"),
        (LOOP, r"tree\[0\]\['again'\] contains itself"),
        ({"a": torch.zeros(2).to_sparse()}, r"tree\['a'\]"),
        ({"a": torch.zeros(2, device="meta")}, r"tree\['a'\]"),
        (np.array([object()]), "tree is a numpy.ndarray"),
        ({torch.float32: {(1, torch.zeros(1)): 1}}, r"\[1\] is a torch.Tensor.*as a key"),
        ({"a": bytearray(b"x")}, "bytearray"),
    ],
)
def test_anything_else_is_refused_by_its_path(tree, message):
    with pytest.raises(TypeError, match=message):
        pack(tree)


@pytest.mark.parametrize(
    "plain",
    [{"a": 1}, {"!": ["code", "os.system"]}, {"!": ["dtype", "load"]}, {"!": ["tensor", "t9"]}, {"!": []}, {"!": 3},
     {"!": ["tuple"]}, {"!": ["int", "zz"]}, {"!": ["array", "t0", "O", [1], "C"]}, {"!": ["dict", [[[], 1]]]},
     {"!": ["bits", "t0", "complex64", [5]]}, [[{"!": ["float", "00"]}]]],
)  # fmt: skip
def test_what_pack_did_not_write_is_refused(plain):
    with pytest.raises(StoreError):
        unpack(plain, {"t0": torch.zeros(8, dtype=torch.uint8)})


def test_no_pickle_is_involved(monkeypatch):
    monkeypatch.setattr(pickle, "dumps", None)
    monkeypatch.setattr(pickle, "loads", None)
    assert same(through_json(VALUES["arrays"]), VALUES["arrays"])
