"""benchmarks.scale: what runs share is counted once, and the queue agrees with what queueing theory gives exactly."""

import json
from math import ceil

import pytest
from conftest import ROOT

from benchmarks import scale, scale_queue
from benchmarks.scale_cost import MODELS, Planner, Rates, answering_seconds, cost_of, method_names
from benchmarks.scale_queue import BYTES, DAY_S, DEVICES, LOGIN, METADATA, Load, Site
from trace_hydra import build
from trace_hydra.cost import memory_of, skeleton
from trace_hydra.cost_rows import TaskRows
from trace_hydra.prepare import prepare

NOTHING = Load(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
ORDERS = ("trace", "reversed")


@pytest.fixture(scope="module")
def planner():
    return Planner(("data=trace5000", "budget=paper", "paths.data=null", "capability=none", "callbacks=none"))


def test_every_method_is_found():
    assert method_names() == sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))


def test_llama2_70b_has_the_published_number_of_weights(planner):
    config = planner.config(*MODELS["70B"])
    model = skeleton(build.validate(config, files=False))
    assert sum(weight.numel() for weight in model.parameters()) == config.model.parameters == 68_976_648_192


def test_runs_share_what_their_keys_share(planner):
    """2 orders x 2 seeds: sequential stages are all different; those of single tasks differ by seed only.

    Row 0 has 8 cells whatever order and seed where the method has no part in it. A run has 8 + 36 cells and 7 before a
    task's stage; one whose tasks stand alone scores row 0 and the diagonal.
    """
    counts = {}
    for method in ("seqft", "single_task"):
        work, _ = cost_of(planner, Rates(), *MODELS["7B"], f"method={method}", orders=ORDERS, seeds=(0, 1))
        counts[method] = {key: number for key, number in work.numbers().items() if "distinct" in key or key == "cells"}
    assert counts["seqft"] == {"distinct_stages": 32, "cells": 4 * 51, "distinct_cells": 8 + 4 * 43}
    assert counts["single_task"]["distinct_stages"] == 16
    assert counts["single_task"]["distinct_cells"] < counts["single_task"]["cells"] == 4 * 16


def test_device_seconds_by_hand(planner):
    """One run of two tasks: 5000 rows, 1 and 5 passes, at 1e15 FLOP/s; weights of fp32 stay behind each stage."""
    overrides = ("task_order.tasks=[FOMC,NumGLUE-cm]", "method=seqft", *MODELS["7B"])
    config = planner.config(*overrides)
    parts = build.validate(config, files=False)
    memory = memory_of(config, parts, skeleton(parts))
    other = Planner(("data=trace5000", "budget=paper", "paths.data=null", "capability=none", *overrides[:1]))
    work, facts = cost_of(other, Rates(training_flops=1e15), *overrides[1:], orders=("trace",), seeds=(0,))
    expected = 5000 * (memory.train_flops(93, 2) + 5 * memory.train_flops(56, 2)) / 1e15
    assert work.numbers()["training_h"] == pytest.approx(expected / 3600, rel=1e-4)
    weights = [size for key, size in work.stored.items() if key in work.training]
    assert weights == [4 * 6738415616] * 2 and (facts["devices"], facts["fits"]) == (2, True)
    assert work.loaded == 2 * 6738415616 and not any(work.saved.values())  # no stage takes ten minutes


def test_answers_wait_for_weights_and_products(planner):
    """10 rows of 100 + 28 tokens in batches of 4096 // 128 = 32: 28 steps, each reads 2 bytes a weight."""
    config = planner.config(*MODELS["7B"])
    parts = build.validate(config, files=False)
    memory = memory_of(config, parts, skeleton(parts))
    task = TaskRows("FOMC", 10, 10, 1, 102, 2, 102, 2, 100, 100, 28)
    rates = Rates(reading_flops=1e15, weight_bytes=1e12)
    expected = 28 * 2 * 6738415616 / 1e12 + 10 * memory.forward_flops(128, 28) / 1e15
    assert answering_seconds(task, 0, 28, 4096, memory, rates) == pytest.approx(expected)


def test_the_plan_of_stand_ins_is_that_of_the_rows(tmp_path):
    """Of rows that are at hand: the same stages, tokens and cells, with other keys, for the texts are others."""
    from trace_hydra.cost_rows import rows_of

    planner = Planner(("debug=smoke", "callbacks=none", "logger=none"))
    config = planner.config("task_order.tasks=[FOMC,ScienceQA]")
    parts = build.validate(config)
    real, stand_in = prepare(config, parts, tmp_path), planner.prepared(config, parts, rows_of(config, parts))
    assert [one.tokens for one in stand_in.run.stages] == [one.tokens for one in real.run.stages]
    assert [one.steps for one in stand_in.run.stages] == [one.steps for one in real.run.stages]
    assert stand_in.run.cells == real.run.cells
    assert not {one.key for one in stand_in.run.stages} & {one.key for one in real.run.stages}


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_waiting_is_that_of_a_queue_with_fixed_service(share):
    """M/D/1 (Pollaczek-Khinchine): a sweep waits share x s / (2 (1 - share)) on average; 52,000 at 0.6."""
    pytest.importorskip("simpy")
    seconds = 20.0
    load, site = Load(**{**vars(NOTHING), "plan_sweep_s": seconds}), Site(runs=1, stages=1)
    seen = scale_queue.simulate(load, site, share * DAY_S / seconds, days=20)[LOGIN]
    assert seen.mean_wait_s == pytest.approx(share * seconds / (2 * (1 - share)), rel=0.05)
    assert seen.busy_s / DAY_S / 20 == pytest.approx(share, rel=0.02)


@pytest.mark.long
def test_what_is_full_has_a_queue_that_grows():
    """A file system at 0.8 of what it can take keeps up; at 1.25 its queue fills the devices, and then runs wait."""
    pytest.importorskip("simpy")
    load = Load(**{**vars(NOTHING), "device_s": 60.0, "moved_bytes": 100e9})
    site = Site(devices=64, runs=1, stages=1)
    full = scale_queue.breaks_at(load, site)[BYTES]
    assert full == pytest.approx(DAY_S / 100)
    low, high = (scale_queue.simulate(load, site, rate * full, days=60) for rate in (0.8, 1.25))
    assert low[BYTES].busy_s / DAY_S / 60 == pytest.approx(0.8, rel=0.05) and low[DEVICES].end == 0
    assert high[BYTES].busy_s / DAY_S / 60 == pytest.approx(1.0, abs=0.01)
    assert high[DEVICES].end > 1.5 * high[DEVICES].halfway > 100


def test_shares_by_hand():
    """800 stages a day are 100 runs, 11.1 sweeps. Metadata: 3 x 25 calls, 600 / 10 x 4 for beats, 1 ms each."""
    load = Load(600, 1e9, 2e9, 5e8, 3, 9, 0.5, 0.25, 1e-4, 1e4)
    site = Site(devices=8, moved_bytes_s=1e9, operation_s=1e-3, capacity_bytes=100e12, memory_bytes=64e9)
    found = scale_queue.utilisation(load, site, 800)
    assert found[DEVICES] == pytest.approx(800 * 600 / 8 / DAY_S)
    assert found[METADATA] == pytest.approx(800 * (75 + 240) * 1e-3 / DAY_S)
    assert found["file system: room, keep=all"] == pytest.approx(800 * 30 * 2e9 / 100e12)
    assert found["login node: memory of a scan"] == pytest.approx(800 * 3 * 30 * 1e4 / 64e9)
    scan = 800 * 3 * 30 * (1e-4 + 10e-3)
    assert found[LOGIN] == pytest.approx((100 / 9 * 9 + 100 * 0.75 + scan) / DAY_S)
    assert scale_queue.enough_devices(load, site, 800).devices == ceil(800 * 600 / DAY_S / 0.8)


@pytest.mark.long
def test_the_store_is_measured(tmp_path):
    pytest.importorskip("simpy")
    from benchmarks.scale_store import measure

    found = measure(tmp_path, size=120, megabytes=1, jobs=2)
    assert all(number > 0 for name, number in found.items() if name not in ("plan_job_s", "write_bytes_s"))
    numbers = {"distinct_stages": 4, "training_with_steps_h": 1, "answering_h": 1, "moved_bytes": 8, "stored_bytes": 4,
               "stored_last_bytes": 2, "distinct_cells": 8}  # fmt: skip
    load = scale.load_of(numbers, found)
    assert (load.device_s, load.moved_bytes, load.entries, load.stored_last_bytes) == (1800, 2, 3, 0.5)
    assert scale.day_of(load, Site(), 100, 0.2)["full_after_days"] == {"all": 1e12, "last": 2e12}


def test_measured_rates_and_ratios_count(tmp_path):
    rates = Rates.of({"training_gflops": 4e5, "reading_gflops": 5e5, "machine": {"device": "a GPU"}})
    assert (rates.training_flops, rates.reading_flops) == (4e14, 5e14) and "a GPU" in rates.source
    for number, ratios in enumerate(([1.0, 3.0], [2.0, None])):
        (tmp_path / str(number)).mkdir()
        stages = [{"effort": {"step_ratio": ratio}} for ratio in ratios]
        (tmp_path / str(number) / "results.json").write_text(json.dumps({"method": "mine", "stages": stages}))
    assert scale.step_ratios(tmp_path) == {"mine": 2.0}
    plain, longer = (scale.costs_of("7B", ["lora"], rates, given)["lora"] for given in ({}, {"lora": 1.5}))
    assert longer["training_with_steps_h"] == pytest.approx(1.5 * plain["training_h"])
    assert longer["training_h"] == plain["training_h"] == plain["training_with_steps_h"]
