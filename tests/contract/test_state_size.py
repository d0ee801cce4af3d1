"""The estimate of `debug=cost` against what a run then holds and trains, over every file of conf/method."""

from pathlib import Path

import pytest
from conftest import ROOT, SMALLER, run_tiny

from trace_hydra import build, train
from trace_hydra.cost import estimate_run

METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
TASKS = ["FOMC", "NumGLUE-cm", "20Minuten"]
SLACK = 250
"""Bytes of JSON (names, counters) that formulas leave out."""
# What is stored depends on the data: how many directions are independent, which demonstrations fit, how long the rows
# are that were drawn. Then the estimate must be no less than `low` and no more than `high` times what is stored.
BOUNDS = {"gpm": (1.0, 3.0), "ogd": (1.0, 3.0), "seekr": (0.7, 1.4)}
BOUNDS["icl"] = (0.7, float("inf"))  # demonstrations of the last task, and here none of them fits the prompt

# How many directions train depends on the data: the estimate is no less, and no more than so many times as many.
TRAINED_AT_MOST = {"osf": 2.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One tiny run of three stages per method, and its estimate from the same configuration, made when first asked."""
    cache = {}

    def get(name: str):
        if name not in cache:
            directory: Path = tmp_path_factory.mktemp(name)
            run = run_tiny(
                directory,
                [
                    f"method={name}",
                    f"task_order=[{','.join(TASKS)}]",
                    "evaluation=diagonal_last",
                    *SMALLER.get(name, ()),
                ],
            )
            cache[name] = run, estimate_run(run.config, build.validate(run.config, files=False))
        return cache[name]

    return get


@pytest.mark.parametrize("name", METHODS)
def test_stored_bytes_are_those_of_the_run(name, runs):
    """After the last stage; within 10 %, or within the bounds of what depends on the data."""
    run, estimate = runs(name)
    real = train.state_mb(run.method.state_dict()) * 1e6
    low, high = BOUNDS.get(name, (0.9, 1.1))
    assert low * real - SLACK <= estimate.state.stored <= high * real + SLACK, (estimate.state.stored, real)


@pytest.mark.parametrize("name", METHODS)
def test_trained_weights_are_those_of_the_run(name, runs):
    """The most of any stage."""
    run, estimate = runs(name)
    real = max(stage["effort"]["trainable_params"] for stage in run.results["stages"])
    assert real <= estimate.trained <= TRAINED_AT_MOST.get(name, 1.0) * real


@pytest.mark.parametrize("name", METHODS)
def test_steps_are_those_of_the_plan(name, runs):
    """The estimate plans as `prepare` does, from the same rows."""
    run, estimate = runs(name)
    assert estimate.compute["optimizer steps"] == sum(stage["steps"] for stage in run.results["stages"])
