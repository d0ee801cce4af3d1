"""OGD: directions are logit gradients, the basis is orthonormal, and no update has a part in it."""

import pytest
import torch
from conftest import compose_config, run_tiny

from trace_hydra import build
from trace_hydra.data.batches import collate
from trace_hydra.errors import ConfigError
from trace_hydra.methods.gradients import extend_basis, project_off, read_weights
from trace_hydra.methods.ogd import OGD, logit_gradients

ORDER = "task_order=[FOMC,NumGLUE-cm,20Minuten]"
LONGER = ["optim.optimizer.lr=0.02", "budget.default_epochs=4"]


def off_identity(basis: torch.Tensor) -> float:
    return float((basis @ basis.T - torch.eye(len(basis))).abs().max())


def test_gram_schmidt_by_hand():
    """(3, 0, 0), then (1, 1, 0), then their sum (nothing new), then (0, 2, -5): e1, e2, -e3."""
    candidates = torch.tensor([[3.0, 0, 0], [1, 1, 0], [4, 1, 0], [0, 2, -5]])
    basis = extend_basis(torch.zeros(0, 3), candidates, 1e-3)
    assert torch.allclose(basis, torch.diag(torch.tensor([1.0, 1, -1])))
    assert project_off(torch.tensor([5.0, 6, 7]), basis[:2]).tolist() == [0, 0, 7]


def test_basis_stays_orthonormal_with_nearly_dependent_directions():
    """100 vectors that share 99.99 % of their energy; Gram-Schmidt once would lose three digits."""
    torch.manual_seed(0)
    candidates = torch.randn(1000) + 0.01 * torch.randn(100, 1000)
    basis = extend_basis(torch.zeros(0, 1000), candidates[:50], 1e-3)
    basis = extend_basis(basis, [*candidates[50:], torch.zeros(1000)], 1e-3)
    assert basis.shape == (100, 1000) and off_identity(basis) < 1e-5
    assert float(project_off(candidates, basis).norm(dim=1).max()) < 1e-4 * float(candidates.norm(dim=1).min())


def test_basis_never_outgrows_the_space():
    torch.manual_seed(0)
    assert extend_basis(torch.zeros(0, 5), torch.randn(20, 5), 1e-6).shape == (5, 5)


def test_direction_is_the_gradient_of_the_mean_ground_truth_logit(tmp_path):
    """Against a central difference along a random direction, the logits taken from the model's own full output."""
    run = run_tiny(tmp_path, ["method=ogd", "task_order=[FOMC]"])
    ctx, model = run.ctx, run.ctx.model.double()
    model.zero_grad(set_to_none=True)
    row = ctx.encode(run.data.tasks["FOMC"].train[:1])[0]
    (direction,) = logit_gradients(ctx, [row])

    def mean_logit() -> float:
        batch = collate([row])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits[0]  # (length, vocab)
        places = range(row.num_prompt, len(row.ids))
        return sum(float(logits[place - 1, int(row.ids[place])]) for place in places) / len(places)

    torch.manual_seed(0)
    weights = ctx.trainable().values()
    way = [torch.randn_like(weight) for weight in weights]
    values = []
    for step in (2e-4, -4e-4):
        with torch.no_grad():
            for weight, part in zip(weights, way, strict=True):
                weight += step * part
        values.append(mean_logit())
    flat = torch.cat([part.reshape(-1) for part in way])
    assert float(direction.double() @ flat) == pytest.approx((values[0] - values[1]) / 4e-4, rel=2e-3)
    assert all(weight.grad is None for weight in weights)


def watched_run(tmp_path, monkeypatch, overrides):
    """Run, and note stage, update and basis of every optimizer step."""
    steps, after, edit = [], OGD.after_step, OGD.edit_gradients

    def watch_edit(self, ctx):
        self.before = read_weights(ctx.trainable())
        edit(self, ctx)

    def watch_after(self, ctx):
        after(self, ctx)
        steps.append((ctx.stage.index, read_weights(ctx.trainable()) - self.before, self.basis))

    monkeypatch.setattr(OGD, "edit_gradients", watch_edit)
    monkeypatch.setattr(OGD, "after_step", watch_after)
    return run_tiny(tmp_path, ["method=ogd", ORDER, *LONGER, *overrides]), steps


def leak(update: torch.Tensor, basis: torch.Tensor) -> float:
    """Share of an update's norm that lies in the span."""
    return float((basis @ update).norm() / update.norm())


@pytest.mark.parametrize("extra", [[], ["optim.optimizer.weight_decay=0.1"], ["trainer.precision=bf16-mixed"]])
def test_no_update_of_adamw_has_a_part_in_the_protected_space(extra, tmp_path, monkeypatch):
    run, steps = watched_run(tmp_path, monkeypatch, ["method.directions_per_task=4", *extra])
    assert run.method.basis.shape[0] == 12 and off_identity(run.method.basis) < 1e-5
    assert all(basis is None for stage, _, basis in steps if stage == 1)
    later = [(update, basis) for stage, update, basis in steps if stage > 1]
    assert len(later) == 16 and {len(basis) for _, basis in later} == {4, 8}
    assert max(leak(update, basis) for update, basis in later) < 1e-4
    assert min(float(update.norm()) for update, _ in later) > 1e-2  # it still learns


def test_projecting_the_gradient_alone_would_leak(tmp_path, monkeypatch):
    """Why `after_step` exists: without it AdamW moves the weights within the protected space."""
    monkeypatch.setattr(OGD, "after_step", lambda self, ctx: None)
    _, steps = watched_run(tmp_path, monkeypatch, [])
    assert max(leak(update, basis) for stage, update, basis in steps if stage > 1) > 0.01


def test_a_stage_leaves_the_directions_it_started_with(tmp_path, monkeypatch):
    """Over the whole last stage the weights do not move along any stored direction."""
    run, steps = watched_run(tmp_path, monkeypatch, [])
    total = torch.stack([update for stage, update, _ in steps if stage == 3]).sum(0)
    basis = steps[-1][2]
    assert len(basis) == 12 and leak(total, basis) < 1e-5
    assert run.results["complete"]


def test_first_stage_is_plain_adapter_training(tmp_path):
    torch.manual_seed(0)  # the adapter's start comes from the global generator
    first = run_tiny(tmp_path / "a", ["method=ogd", "task_order=[FOMC]"])
    torch.manual_seed(0)
    plain = run_tiny(tmp_path / "b", ["method=lora", "task_order=[FOMC]"])
    assert all(torch.equal(weight, plain.weights_after[name]) for name, weight in first.weights_after.items())


def test_a_stage_adds_as_many_directions_as_rows(tmp_path):
    """6 rows a task, 3 tasks, all different: rank 18, where official TRACE's columns all are one (OGD.py:142)."""
    run = run_tiny(tmp_path, ["method=ogd", ORDER])
    basis = run.method.basis
    assert len(basis) == 18 and torch.linalg.matrix_rank(basis) == 18
    assert basis.dtype == torch.float32 and basis.device.type == "cpu"


def test_full_tuning_is_refused_with_the_reason():
    config = compose_config(["model=tiny", "method=ogd", "tuning=full"])
    assert any("one vector of all trainable weights" in problem for problem in build.problems_of(config))


def test_values_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"method.directions_per_task=0"):
        OGD(directions_per_task=0)
