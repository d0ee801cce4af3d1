"""Room on disk: what is estimated before a run against what it writes, and what `store.keep` leaves."""

import json
from collections import namedtuple

import pytest
from conftest import TINY, compose_config, run_tiny

from trace_hydra import build, space
from trace_hydra.errors import StoreError
from trace_hydra.live import WEIGHTS
from trace_hydra.prepare import prepare
from trace_hydra.resume import StageCheckpoints
from trace_hydra.store.entries import Store

ORDER = "task_order=[FOMC,Py150,NumGLUE-cm]"
LARGE = "tuning.r=64"
"""So that headers of files do not count beside an adapter's tensors."""


def estimated(folder, *overrides):
    """`check_space` of a run that has not begun."""
    rows = ["data.rows.train=6", "data.rows.test=3"]
    config = compose_config([*TINY, *rows, f"paths.runs={folder}", f"paths.store={folder / 'new'}", *overrides])
    parts = build.validate(config)
    return space.check_space(config, parts, prepare(config, parts, folder / "run"), Store(folder / "new"))


@pytest.fixture
def checkpoint_sizes(monkeypatch):
    """Bytes of every checkpoint that a run publishes; they are removed when their stage is stored."""
    sizes = []
    save = StageCheckpoints.save

    def watched(saver, lightning):
        save(saver, lightning)
        sizes.append(saver._all()[-1].size)

    monkeypatch.setattr(StageCheckpoints, "save", watched)
    return sizes


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=seqft", "tuning=full"],
        ["method=lora", "tuning=lora", LARGE],
        ["method=ewc", "tuning=full"],
        ["method=replay", "tuning=full", "method.alignment=false"],
        ["method=ogd", "tuning=lora", LARGE],
        ["method=seqft", "tuning=full", "optim.carry=true"],
    ],
    ids=lambda given: "-".join(one.split("=")[1] for one in given),
)
def test_the_estimate_is_what_is_written(tmp_path, checkpoint_sizes, overrides):
    """All stages and one checkpoint, within 20 %."""
    shared = [ORDER, "evaluation=diagonal_last", "evaluation.row0=false", *overrides]
    guessed = estimated(tmp_path, *shared)
    run_tiny(tmp_path, [*shared, "checkpoint.every_steps=1"])
    store = Store(tmp_path / "store")
    written = sum(entry.size for entry in store.entries("stages")) + max(checkpoint_sizes)
    assert guessed == pytest.approx(written, rel=0.2)
    assert not list(store.entries("partial"))


def test_a_run_without_room_is_refused_with_the_numbers(tmp_path, monkeypatch):
    """Three stages of 37,216 fp32 weights and a checkpoint with AdamW's two numbers each: (3 + 1 + 2) * 148,864 bytes
    = 0.89 MB. With 1 GB in reserve, 1.0008 GB are too little for all, enough for two stages and a checkpoint."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: usage(0, 0, 1.0008e9))
    with pytest.raises(StoreError) as caught:
        estimated(tmp_path, ORDER)
    for part in (f"paths.store={tmp_path / 'new'}", "3 stages", "1.00 GB are free", "reserve_gb=1", "store.keep=last"):
        assert part in str(caught.value)
    needed = estimated(tmp_path, ORDER, "store.keep=last")
    assert needed == 5 * 148_864
    assert estimated(tmp_path, ORDER, "store.reserve_gb=0") == 6 * 148_864


def kept(seen):
    """Stage -> whether its weights are there."""
    store = Store(seen.directory.parent / "store")
    stages = json.loads((seen.directory / "results.json").read_text())["stages"]
    return {stage["task"]: store.find("stages", stage["key"]).has(WEIGHTS) for stage in stages}  # type: ignore[union-attr]


def numbers(seen):
    results = json.loads((seen.directory / "results.json").read_text())
    return {key: results[key] for key in ("matrix", "op", "bwt", "cells", "confidence")}


@pytest.mark.parametrize(
    ("keep", "tuning", "left"),
    [
        ("last", "full", [False, False, True]),
        ("adapters", "full", [False, False, False]),
        ("adapters", "lora", [True, True, True]),
        ("none", "lora", [False, False, False]),
    ],
)
def test_what_keep_leaves_and_a_run_again_needs(tmp_path, keep, tuning, left):
    """The same command again loads no model and gives the same numbers; the weights that went do not come back."""
    given = [ORDER, "evaluation=diagonal_last", f"tuning={tuning}", f"store.keep={keep}"]
    first = run_tiny(tmp_path, given)
    assert list(kept(first).values()) == left
    before = numbers(first)
    again = run_tiny(tmp_path, given)
    assert not hasattr(again, "ctx") and numbers(again) == before
    assert list(kept(again).values()) == left


def test_a_longer_order_trains_the_stages_without_weights_again(tmp_path):
    """FOMC and Py150 are stored without weights; a third task needs Py150's, and so all are trained, to the same
    weights as in a run that never dropped any. The estimate counts all three."""
    short, long = "task_order=[FOMC,Py150]", ORDER
    run_tiny(tmp_path / "a", [short, "store.keep=none"])
    config = compose_config(
        [*TINY, "data.rows.train=6", "data.rows.test=3", long, f"paths.runs={tmp_path}",
         f"paths.store={tmp_path / 'a' / 'store'}"]
    )  # fmt: skip
    parts = build.validate(config)
    prepared = prepare(config, parts, tmp_path / "run")
    needed = space.check_space(config, parts, prepared, Store(tmp_path / "a" / "store"))
    assert needed == 6 * 148_864
    extended, whole = run_tiny(tmp_path / "a", [long]), run_tiny(tmp_path / "b", [long])
    assert numbers(extended) == numbers(whole)
    assert kept(extended) == {"FOMC": True, "Py150": True, "NumGLUE-cm": True}
    stages = json.loads((whole.directory / "results.json").read_text())["stages"]
    for key in (stage["key"] for stage in stages):
        entries = [Store(tmp_path / name / "store").find("stages", key) for name in "ab"]
        assert entries[0].manifest["files"][WEIGHTS] == entries[1].manifest["files"][WEIGHTS]  # type: ignore[union-attr]
