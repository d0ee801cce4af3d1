"""Losses and gradients that are not finite: the run names the rows and stops, or leaves the step out."""

import json
import logging
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import run_tiny
from contract.test_resume import outcome, run_killed
from safetensors.torch import load_file

from trace_hydra.errors import MethodError
from trace_hydra.methods.base import Method
from trace_hydra.stage import StageModule

FAULT: dict = {}
"""What goes wrong: "loss" or "gradient" and the value, at the micro-batches (stage, number from 1) of "at"."""
CALLS: list = []
"""(hook, stage, micro-batches seen in the stage) of edit_gradients and after_step."""


class Poison(torch.autograd.Function):
    """Leaves the loss and makes its gradient what is given."""

    @staticmethod
    def forward(ctx, loss, value):
        ctx.value = value
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.value, None


class Faulty(Method):
    """Plain fine-tuning whose losses, gradients, weights or state go wrong as `FAULT` says."""

    def begin_stage(self, ctx):
        self.seen, self.ids = 0, []

    def losses(self, ctx, batch):
        self.seen += 1
        self.ids.append(batch["example_ids"])
        loss, value = ctx.lm_loss(batch), FAULT.get("value", 1.0)
        if FAULT.get("what") in ("loss", "gradient") and (ctx.stage.index, self.seen) in FAULT["at"]:
            loss = loss * value if FAULT["what"] == "loss" else Poison.apply(loss, value)
            FAULT["rows"] = [*FAULT.get("rows", ()), *self.ids[-1]]
        return {"lm": loss}

    def edit_gradients(self, ctx):
        CALLS.append(("edit", ctx.stage.index, self.seen))
        assert all(bool(weight.grad.isfinite().all()) for weight in ctx.trainable().values() if weight.grad is not None)

    def after_step(self, ctx):
        CALLS.append(("after", ctx.stage.index, self.seen))
        if FAULT.get("what") == "weight" and (ctx.stage.index, self.seen) in FAULT["at"]:
            with torch.no_grad():
                next(iter(ctx.trainable().values())).reshape(-1)[-1] = FAULT["value"]

    def state_dict(self):
        bad = FAULT.get("what") == "state" and self.seen and (2, 8) in FAULT["at"]
        return {"x": torch.tensor([0.0, FAULT["value"] if bad else 1.0])}


SETTINGS = [
    "method=seqft", "method._target_=test_nonfinite.Faulty", "trust.targets=[test_nonfinite.]",
    "task_order=[FOMC,NumGLUE-cm,20Minuten]", "budget.batch_size=4", "budget.micro_batch_size=2", "budget.epochs={}",
    "budget.default_epochs=2", "data.rows.train=8", "evaluation=diagonal_last", "checkpoint.every_steps=1",
]  # fmt: skip
"""Three stages of four steps of two micro-batches of two rows."""
SKIP = [*SETTINGS, "on_nonfinite=skip_batch"]
VALUES = [float("nan"), float("inf"), float("-inf")]


@pytest.fixture(autouse=True)
def no_fault():
    FAULT.clear()
    CALLS.clear()
    yield
    FAULT.clear()


def stored_tensors(folder: Path) -> list[torch.Tensor]:
    files = [*(folder / "store").rglob("*.safetensors")]
    return [tensor for file in files for tensor in load_file(file).values() if tensor.is_floating_point()]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    FAULT.clear()
    folder = tmp_path_factory.mktemp("sound")
    run_tiny(folder, SETTINGS)
    return folder


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_run_stops_and_names_where(what, value, sound, tmp_path):
    """Stage 2, micro-batch 6: the second of step 3, which is the first of the second epoch. Then all is well again."""
    FAULT.update(what=what, value=value, at={(2, 6)})
    with pytest.raises(MethodError) as caught:
        run_tiny(tmp_path, SETTINGS)
    message = str(caught.value)
    named = f"loss term 'lm' is {value}" if what == "loss" else "the gradient is "
    for part in ("stage 2 (NumGLUE-cm), phase 'task', step 3: ", named, *FAULT["rows"], "optim.optimizer.lr"):
        assert part in message
    assert message.count("train-") == 4  # the whole step's rows, not those before
    stages, partial = (list((tmp_path / "store" / kind).iterdir()) for kind in ("stages", "partial"))
    assert len(stages) == 1 and len(partial) == 1  # behind step 2
    assert all(bool(tensor.isfinite().all()) for tensor in stored_tensors(tmp_path))
    FAULT.clear()
    run_tiny(tmp_path, SETTINGS)
    assert outcome(tmp_path) == outcome(sound)


def watched(seen: list):
    """Record, for each optimizer step, whether weights and the optimizer's state are as before."""
    step = StageModule.optimizer_step

    def look(module):
        optimizer = module.optimizers()
        states = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
        return [value.clone() for value in (*module.model.state_dict().values(), *states)]

    def watch(module, *arguments, **keywords):
        before = look(module)
        step(module, *arguments, **keywords)
        after = look(module)
        same = len(before) == len(after) and all(map(torch.equal, before, after))
        seen.append((module.ctx.stage.index, module.method.seen // 2, same))

    return patch.object(StageModule, "optimizer_step", watch)


@pytest.mark.parametrize("value", VALUES[:2])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("micro", [5, 6])
def test_a_bad_micro_batch_skips_its_step(what, value, micro, tmp_path, caplog):
    """Either micro-batch of step 3 of stage 2 spoils it: no hook is called, weights and optimizer stay."""
    FAULT.update(what=what, value=value, at={(2, micro)})
    steps: list = []
    with watched(steps):
        run = run_tiny(tmp_path, SKIP)
    assert [(stage, step) for stage, step, same in steps if same] == [(2, 3)] and len(steps) == 12
    for hook in ("edit", "after"):
        called = [(stage, seen // 2) for name, stage, seen in CALLS if name == hook]
        assert called == [(stage, step) for stage in (1, 2, 3) for step in (1, 2, 3, 4) if (stage, step) != (2, 3)]
    assert [stage["effort"]["skipped"] for stage in run.results["stages"]] == [0, 1, 0]
    (said,) = [record.getMessage() for record in caplog.records if "no step is taken" in record.getMessage()]
    assert "stage 2 (NumGLUE-cm), phase 'task', step 3" in said and said.count("train-") == 4
    assert all(row in said for row in FAULT["rows"])
    assert run.results["complete"] and all(bool(tensor.isfinite().all()) for tensor in stored_tensors(tmp_path))


def test_skipping_is_the_same_however_the_run_got_there(tmp_path, caplog):
    """Killed behind the checkpoint of the skipped step, and behind each after it; the step is counted once."""
    caplog.set_level(logging.INFO)
    FAULT.update(what="loss", value=float("nan"), at={(2, 6)})
    run_tiny(tmp_path / "whole", SKIP)
    kills = [run_killed(tmp_path / "killed", SKIP, after) for after in (7, 1, 100)]  # checkpoints of this start
    assert kills == [True, True, False] and "goes on from its checkpoint at phase 1, step 3" in caplog.text
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_a_run_without_faults_is_not_changed_by_skipping(sound, tmp_path):
    run = run_tiny(tmp_path, SKIP)
    assert [stage["effort"]["skipped"] for stage in run.results["stages"]] == [0, 0, 0]
    hashes = [[value for name, value in outcome(folder).items() if name.endswith(".safetensors")]
              for folder in (sound, tmp_path)]  # fmt: skip
    assert sorted(hashes[0]) == sorted(hashes[1])


def test_a_stage_whose_every_step_is_bad_leaves_the_weights(tmp_path):
    """Nothing is trained in stage 2, and nothing breaks."""
    FAULT.update(what="gradient", value=float("nan"), at={(2, number) for number in range(1, 9)})
    run = run_tiny(tmp_path, SKIP)
    assert run.results["stages"][1]["effort"]["skipped"] == 4
    one, two = (run.snapshots[stage][0] for stage in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("policy", ["stop", "skip_batch"])
@pytest.mark.parametrize("every", ["1", "null"])
def test_weights_that_are_not_finite_are_not_stored(policy, every, tmp_path):
    """A method breaks a weight behind the last step of stage 2, which no loss sees: no stage, no checkpoint has it."""
    FAULT.update(what="weight", value=float("inf"), at={(2, 8)})
    with pytest.raises(MethodError, match=r"stage 2 \(NumGLUE-cm\): weight .* is not finite after"):
        run_tiny(tmp_path, [*SETTINGS, f"on_nonfinite={policy}", f"checkpoint.every_steps={every}"])
    assert len(list((tmp_path / "store" / "stages").iterdir())) == 1
    assert all(bool(tensor.isfinite().all()) for tensor in stored_tensors(tmp_path))


def test_a_state_that_is_not_finite_is_refused(tmp_path):
    FAULT.update(what="state", value=float("nan"), at={(2, 8)})
    with pytest.raises(MethodError, match=r"stage 1 \(FOMC\): the method's state t\d+ is not finite after training"):
        run_tiny(tmp_path, SETTINGS)
    assert not (tmp_path / "store" / "stages").exists()


def test_what_is_skipped_stands_in_the_report(tmp_path):
    FAULT.update(what="loss", value=float("nan"), at={(1, 1), (3, 3)})
    run = run_tiny(tmp_path, SKIP)
    assert [stage["effort"]["skipped"] for stage in run.results["stages"]] == [1, 0, 1]
    assert "not finite: FOMC 1, 20Minuten 1." in (run.directory / "report.md").read_text()
    assert json.loads((run.directory / "results.json").read_text())["complete"]
