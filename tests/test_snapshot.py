"""A method's changes within a stage, taken from one object and laid over another that began the stage alike."""

import copy
import itertools
import logging
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import snapshot_doubles
import torch
from conftest import run_tiny
from snapshot_doubles import model, same, stored
from torch import nn

from trace_hydra.errors import MethodError
from trace_hydra.snapshot import Snapshot


class Plain(snapshot_doubles.Plain):
    """Its changes may bring classes of its own module, this one."""


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


# Rows and logits kept, draws; averaged weights and a counter; searches in a tree, sums of gradients; counters.
REAL = {"ema": ["budget.default_epochs=2"], "treelora": ["budget.default_epochs=2"], "gem": []}


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
