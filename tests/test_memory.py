"""What a stage leaves in memory behind it, counted while Python's cyclic garbage collector is off."""

import gc

import pytest
import torch
from conftest import TINY, compose_config

from trace_hydra import build
from trace_hydra.callbacks.base import RunCallback
from trace_hydra.memory import give_back
from trace_hydra.run import run

TASKS = ["FOMC", "C-STANCE", "ScienceQA", "NumGLUE-cm"]


def alive() -> list[int]:
    """Bytes of tensors that some object holds, and the number of moments that an optimizer keeps."""
    held, moments = {}, 0
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, torch.nn.Parameter) and one.layout == torch.strided:  # no fake ones
            held[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, torch.optim.Optimizer):
            moments += len(one.state)
    return [sum(held.values()), moments]


class Watch(RunCallback):
    """Counts at the end of each stage."""

    def __init__(self):
        self.found: list[list[int]] = []

    def on_stage_end(self, stage, effort):
        self.found.append(alive())


@pytest.mark.parametrize("given", [["tuning=full"], ["tuning=lora"], ["method=replay"]], ids=lambda given: given[0])
def test_a_stage_leaves_no_tensors_behind(given, tmp_path, monkeypatch):
    """Weights' moments are twice as large as the weights: collected late, they were 1 GB a stage of SmolLM2."""
    watch = Watch()
    validate = build.validate

    def watched(config):
        parts = validate(config)
        parts.callbacks.append(watch)
        return parts

    monkeypatch.setattr(build, "validate", watched)
    rows = ["data.rows.train=6", "data.rows.test=2", f"task_order=[{','.join(TASKS)}]"]
    config = compose_config([*TINY, *rows, f"paths.runs={tmp_path}", f"paths.store={tmp_path / 'store'}", *given])
    gc.collect()
    gc.disable()
    try:
        run(config, tmp_path / "run")
    finally:
        gc.enable()
    held, moments = zip(*watch.found, strict=True)
    assert len(held) == len(TASKS) and set(moments) == {0}
    assert max(held[1:]) - min(held[1:]) < 2**14  # an encoded batch at most; the weights of full tuning are 2^17


def test_memory_is_given_back_wherever_it_runs():
    """Also where the C library has no such call."""
    give_back()
