"""A-GEM: the closed form by hand, and no gradient that opposes the average memory."""

import pytest
import torch
from conftest import run_tiny

from trace_hydra.data.batches import collate
from trace_hydra.errors import ConfigError
from trace_hydra.methods import agem, gradients
from trace_hydra.methods.agem import AGEM

ORDER = "task_order=[FOMC,NumGLUE-cm,20Minuten]"


def weight_with(gradient: list[float]) -> dict[str, torch.Tensor]:
    """Two weights whose gradients together are the vector."""
    weights = {name: torch.zeros(1, requires_grad=True) for name in ("a", "b")}
    for weight, value in zip(weights.values(), gradient, strict=True):
        weight.grad = torch.tensor([value])
    return weights


def test_projection_by_hand():
    """g = (3, -1), g_ref = (-1, 2): g'g_ref = -5, g_ref'g_ref = 5, so g~ = g + g_ref = (2, 1), orthogonal to g_ref."""
    weights = weight_with([3.0, -1.0])
    assert agem.project(weights, torch.tensor([-1.0, 2.0]))
    assert gradients.read_gradients(weights).tolist() == [2, 1]


@pytest.mark.parametrize("reference", [[1.0, 2.0], [1.0, 3.0], [0.0, 0.0]])
def test_agreement_changes_nothing(reference):
    """g = (3, -1): dot products 1, 0 and 0."""
    weights = weight_with([3.0, -1.0])
    assert not agem.project(weights, torch.tensor(reference))
    assert gradients.read_gradients(weights).tolist() == [3, -1]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_every_step_of_a_run(tuning, tmp_path, monkeypatch):
    """Each edit against eq. 11 with a reference over ALL memories taken apart through `.grad`, dropout off."""
    edit, seen = AGEM.edit_gradients, []

    def watch(self, ctx):
        parameters = ctx.trainable()
        before = gradients.read_gradients(parameters)
        kept = [weight.grad for weight in parameters.values()]
        reference = None
        if len(self.memory):
            for weight in parameters.values():
                weight.grad = None
            ctx.model.eval()
            rows = [row for task in self.memory.by_task.values() for row in task]
            ctx.lm_loss(collate(ctx.encode(rows))).backward()
            ctx.model.train()
            reference = gradients.read_gradients(parameters)
            for weight, grad in zip(parameters.values(), kept, strict=True):
                weight.grad = grad
        edit(self, ctx)
        after = gradients.read_gradients(parameters)
        dot = 0.0 if reference is None else float(before.double() @ reference.double())
        if reference is None or dot >= 0:
            assert torch.equal(before, after)
        else:
            expected = before - dot / float(reference.double().square().sum()) * reference
            assert torch.allclose(after, expected, atol=1e-5 * float(before.norm()))
        if reference is not None:
            assert float(after @ reference) > -1e-5 * float(after.norm() * reference.norm())
            seen.append((len(self.memory), dot < 0))

    monkeypatch.setattr(AGEM, "edit_gradients", watch)
    # As many rows as there are in a pass, so that the reference is one mean over tokens as in the check.
    sizes = ["method.memory_rows=3", "method.reference_batch=32", "method.reference_micro_batch=32"]
    more = ["optim.optimizer.lr=0.02", "budget.default_epochs=3"]
    run = run_tiny(tmp_path, ["method=agem", f"tuning={tuning}", *sizes, *more, ORDER])
    assert run.results["complete"]
    assert {rows for rows, _ in seen} == {3, 6} and {conflict for _, conflict in seen} == {True, False}


def test_reference_rows_are_drawn_from_all_memories(tmp_path, monkeypatch):
    """Two of 12 rows a step: over the last stage both tasks and more than two rows are seen."""
    seen: list[set[tuple[int, ...]]] = []
    taken = agem.loss_gradient

    def watch(ctx, rows, rows_per_pass):
        if ctx.stage.index == 3:
            seen.append({tuple(row.ids) for row in rows})
        return taken(ctx, rows, rows_per_pass)

    monkeypatch.setattr(agem, "loss_gradient", watch)
    run = run_tiny(tmp_path, ["method=agem", "method.reference_batch=2", "budget.default_epochs=6", ORDER])
    owners = {
        tuple(row.ids): task
        for task in ("FOMC", "NumGLUE-cm")
        for row in run.ctx.encode(run.method.memory.by_task[task])
    }
    assert all(len(rows) == 2 for rows in seen)
    assert {owners[row] for rows in seen for row in rows} == {"FOMC", "NumGLUE-cm"}
    assert len(set().union(*seen)) > 4


def test_without_a_past_task_it_is_sequential_fine_tuning(tmp_path):
    first = run_tiny(tmp_path / "a", ["method=agem", "task_order=[FOMC]"])
    plain = run_tiny(tmp_path / "b", ["method=seqft", "task_order=[FOMC]"])
    assert all(torch.equal(weight, plain.weights_after[name]) for name, weight in first.weights_after.items())


@pytest.mark.parametrize("key", ["memory_rows", "reference_batch", "reference_micro_batch"])
def test_values_out_of_range_are_refused(key):
    with pytest.raises(ConfigError, match=f"method.{key}=0"):
        AGEM(**{"memory_rows": 1, "reference_batch": 1, "reference_micro_batch": 1, key: 0})
