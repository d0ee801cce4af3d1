"""What methods say about runs of several processes, over every file of conf/method."""

import random

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALLER, compose_config, method_node, run_tiny

from trace_hydra import build, inputs, ranks
from trace_hydra.methods.base import Method
from trace_hydra.prepare import prepare
from trace_hydra.stage import StageModule
from trace_hydra.targets import locate

METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))


def kind(name: str) -> type[Method]:
    return locate(method_node(name)._target_)


def settings(name: str) -> list[str]:
    overrides = [f"method={name}", "task_order=[FOMC,NumGLUE-cm]", "evaluation=diagonal_last", *SMALLER.get(name, ())]
    tuning = compose_config([f"method={name}"]).tuning
    return [*overrides, "tuning.dropout=0.0"] if "dropout" in tuning else overrides


@pytest.mark.parametrize("name", METHODS)
def test_what_draws_while_losses_are_computed_says_so(name, tmp_path, monkeypatch):
    """The number of processes is then in the key of its stages."""
    drawn = []

    def states(ctx):
        return ctx.rng.getstate(), random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()  # type: ignore[union-attr]

    def watched(module, batch, loss=StageModule._loss):
        before = states(module.ctx)
        found = loss(module, batch)
        drawn.append(before != states(module.ctx))
        return found

    monkeypatch.setattr(StageModule, "_loss", watched)
    run_tiny(tmp_path, settings(name))
    assert any(drawn) == kind(name).draws_in_losses


@pytest.mark.parametrize("name", [name for name in METHODS if kind(name).sharded])
def test_split_weights_train_as_whole_ones(name, tmp_path, monkeypatch):
    """A group of one process; what a method does with weights or gradients then fails, for they are DTensors."""
    whole = run_tiny(tmp_path / "whole", settings(name))
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(key, value)
    split = run_tiny(tmp_path / "split", [*settings(name), "trainer=fsdp"])
    assert not torch.distributed.is_initialized()
    assert split.results["matrix"] == whole.results["matrix"]
    for weight, value in whole.weights_after.items():
        torch.testing.assert_close(split.weights_after[weight], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if not kind(name).sharded])
def test_other_methods_are_refused_where_weights_are_split(name, monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    found = build.problems_of(
        compose_config([f"method={name}", "model=tiny", "trainer=fsdp", "trainer.accelerator=cpu"])
    )
    assert any(f"method={name} with trainer.strategy=fsdp" in problem for problem in found)


@pytest.mark.parametrize(("override", "counts"), [("tuning=full", False), ("tuning=lora", True), ("method=der", True)])
def test_the_number_of_processes_is_in_the_key_where_more_than_rounding_depends_on_it(
    override, counts, tmp_path, monkeypatch
):
    config = compose_config(["debug=smoke", "task_order=[FOMC]", "logger=none", "capability=none", override])
    parts = build.validate(config)
    keys = [prepare(config, parts, tmp_path).run.stages[0].key]
    monkeypatch.setattr(ranks, "size", lambda: 2)
    keys.append(prepare(config, parts, tmp_path).run.stages[0].key)
    assert (keys[0] != keys[1]) == counts and inputs.without_effect("trainer.strategy")
