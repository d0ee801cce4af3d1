"""GEM: the dual problem is solved exactly, and no gradient opposes that of a memory."""

import pytest
import torch
from conftest import run_tiny

from trace_hydra.data.batches import collate
from trace_hydra.errors import ConfigError
from trace_hydra.methods import gradients
from trace_hydra.methods.gem import GEM

ORDER = "task_order=[FOMC,NumGLUE-cm,20Minuten]"
FAST = "optim.optimizer.lr=0.02"  # steps so large that the tasks come into conflict
VALUES = {"memory_rows": 2, "reference_batch": 2, "reference_micro_batch": 2, "margin": 0.0}


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def project(gradient: torch.Tensor, memories: torch.Tensor, margin: float = 0.0) -> torch.Tensor:
    dual = gradients.solve_dual(memories @ memories.T, memories @ gradient, margin)
    return gradient + dual @ memories


def hildreth(memories: torch.Tensor, gradient: torch.Tensor, margin: float, sweeps: int = 3000) -> torch.Tensor:
    """Solve the same problem by coordinate descent: each v_k in turn goes to its best value, not below the margin."""
    matrix, linear = (memories @ memories.T).tolist(), (memories @ gradient).tolist()
    values = [margin] * len(linear)
    for _ in range(sweeps):
        for k, row in enumerate(matrix):
            slope = linear[k] + sum(a * b for a, b in zip(row, values, strict=True))
            values[k] = max(margin, values[k] - slope / row[k])
    return torch.tensor(values, dtype=torch.float64)


def test_one_and_two_memories_by_hand():
    """m = (0, 1), g = (1, -2): v = 2, g~ = (1, 0). With two orthogonal memories both components go."""
    assert project(vector(1, -2), vector(0, 1)[None]).tolist() == [1, 0]
    assert torch.allclose(project(vector(-1, -2, 3), torch.eye(3, dtype=torch.float64)[:2]), vector(0, 0, 3))


def test_margin_is_a_lower_bound_of_the_dual():
    """m = (0, 1), g = (1, -0.2): v = max(0.2, 0.5), g~ = (1, 0.3); with g = (1, -2) the bound does not matter.

    Two memories, the second not opposed by g = (-1, 3): v = (1, 0.5), so 0.5 m_2 is added and g~ = (0, 3.5).
    """
    assert torch.allclose(project(vector(1, -0.2), vector(0, 1)[None], 0.5), vector(1, 0.3))
    assert torch.allclose(project(vector(1, -2), vector(0, 1)[None], 0.5), vector(1, 0))
    assert torch.allclose(project(vector(-1, 3), torch.eye(2, dtype=torch.float64), 0.5), vector(0, 3.5))


def test_a_conflict_vanishes_where_official_trace_doubles_it():
    """m = (0, 1), g = (1, -2), m.g = -2. v <= 0 (GEM.py:93-101) with q = -m.g has its optimum at v = -2: m.g~ = -4."""
    memory, gradient = vector(0, 1), vector(1, -2)
    official = gradient + min(0.0, float(memory @ gradient)) * memory
    assert float(memory @ official) == 2 * float(memory @ gradient) == -4
    assert float(memory @ project(gradient, memory[None])) == 0


@pytest.mark.parametrize("margin", [0.0, 0.3])
@pytest.mark.parametrize("number", [1, 2, 3, 5, 7])
def test_dual_is_optimal_on_random_problems(number, margin):
    """Bounds, slopes and complementarity (together: the optimum of a convex problem), and the objective of coordinate
    descent. Memories of every scale, correlated, and with one that is the sum of two others."""
    torch.manual_seed(number)
    compared = 0
    for trial in range(12):
        width = 4 if trial % 3 == 0 else 20  # 4 < 5, 7: memories are linearly dependent
        shared = torch.randn(width, dtype=torch.float64)
        memories = torch.randn(number, width, dtype=torch.float64) + trial % 2 * shared
        if trial % 4 == 1 and number > 2:
            memories[-1] = memories[0] + memories[1]
        gradient = torch.randn(width, dtype=torch.float64) - shared
        dual = gradients.solve_dual(memories @ memories.T, memories @ gradient, margin)
        projected = gradient + dual @ memories
        slope = memories @ projected  # also <g_k, g~>
        assert (dual >= margin - 1e-12).all() and (slope >= -1e-7).all()
        assert torch.allclose((dual - margin) * slope, torch.zeros(number, dtype=torch.float64), atol=1e-6)
        other = gradient + hildreth(memories, gradient, margin) @ memories
        assert float(projected.norm()) <= float(other.norm()) + 1e-9
        if (memories @ other >= -1e-6).all():  # it has converged
            assert torch.allclose(projected, other, atol=1e-3)
            compared += 1
    assert compared >= 8


def test_projection_is_the_nearest_admissible_gradient():
    """Of 2000 random directions that oppose no memory, scaled at best, none is nearer to g than g~."""
    torch.manual_seed(0)
    memories, gradient = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    gradient -= memories.sum(0)
    nearest = float((project(gradient, memories) - gradient).norm())
    points = torch.randn(2000, 4, dtype=torch.float64) * 2
    points = points[(points @ memories.T >= 0).all(1)]
    assert len(points) > 50
    scale = ((points @ gradient) / points.square().sum(1)).clamp(min=0)
    assert float((points * scale[:, None] - gradient).norm(dim=1).min()) >= nearest - 1e-9


def test_memory_gradients_of_all_zeros_are_harmless():
    memories = torch.stack([torch.zeros(3, dtype=torch.float64), vector(0, 0, 1)])
    assert torch.allclose(project(vector(1, 2, -3), memories), vector(1, 2, 0))


def reference(ctx, rows, parameters):
    """Gradient on rows in eval mode through `.grad`, which is put back; all rows in one pass."""
    kept = [weight.grad for weight in parameters.values()]
    for weight in parameters.values():
        weight.grad = None
    ctx.model.eval()
    ctx.lm_loss(collate(ctx.encode(rows))).backward()
    flat = gradients.read_gradients(parameters)
    for weight, grad in zip(parameters.values(), kept, strict=True):
        weight.grad = grad
    ctx.model.train()
    return flat


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_every_step_is_the_solution_over_all_weights(tuning, margin, tmp_path, monkeypatch):
    """Each edit of a run of three stages against coordinate descent on references taken apart, dropout off."""
    edit, seen = GEM.edit_gradients, []

    def watch(self, ctx):
        parameters = ctx.trainable()
        before = gradients.read_gradients(parameters)
        memories = [reference(ctx, rows, parameters) for rows in self.memory.by_task.values()]
        edit(self, ctx)
        assert ctx.model.training and all(module.training for module in ctx.model.modules())
        after = gradients.read_gradients(parameters)
        if not memories:
            assert torch.equal(before, after)
            return
        stacked = torch.stack(memories).double()
        conflicts = stacked @ before.double()
        if (conflicts >= 0).all():
            assert torch.equal(before, after)
        else:
            expected = before.double() + hildreth(stacked, before.double(), margin, 300) @ stacked
            assert torch.allclose(after.double(), expected, atol=1e-5 * float(before.norm()))
        lowest = stacked @ after.double() / stacked.norm(dim=1) / after.norm()
        assert (lowest > -1e-6).all()
        seen.append((len(memories), bool((conflicts < 0).any())))

    monkeypatch.setattr(GEM, "edit_gradients", watch)
    run = run_tiny(
        tmp_path,
        [
            "method=gem",
            f"tuning={tuning}",
            f"method.margin={margin}",
            "method.reference_micro_batch=32",
            "budget.default_epochs=3",
            ORDER,
            FAST,
        ],
    )
    assert run.results["complete"]
    assert {number for number, _ in seen} == {1, 2} and {conflict for _, conflict in seen} == {True, False}


def test_without_a_past_task_it_is_sequential_fine_tuning(tmp_path):
    first = run_tiny(tmp_path / "a", ["method=gem", "task_order=[FOMC]"])
    plain = run_tiny(tmp_path / "b", ["method=seqft", "task_order=[FOMC]"])
    assert all(torch.equal(weight, plain.weights_after[name]) for name, weight in first.weights_after.items())


def test_loss_gradient_weights_passes_by_rows(tmp_path):
    """Three rows, two a pass, shortest first: (2 x gradient of the first two + gradient of the third) / 3."""
    run = run_tiny(tmp_path, ["method=gem", "task_order=[FOMC]"])
    rows = run.data.tasks["FOMC"].train[:3]
    run.ctx.model.train()
    encoded = sorted(run.ctx.encode(rows), key=lambda row: len(row.ids))
    by_id = {row.id: row for row in rows}
    parameters = run.ctx.trainable()
    run.ctx.model.zero_grad(set_to_none=True)
    pairs = [[by_id[row.example_id] for row in part] for part in (encoded[:2], encoded[2:])]
    expected = (2 * reference(run.ctx, pairs[0], parameters) + reference(run.ctx, pairs[1], parameters)) / 3
    assert torch.allclose(gradients.loss_gradient(run.ctx, encoded, 2), expected, atol=1e-6)
    assert all(weight.grad is None for weight in parameters.values())


def test_dropout_is_off_while_checkpointing_stays_on():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout())).train()
    model[1].gradient_checkpointing = True  # type: ignore[assignment]
    model[0].eval()
    with gradients.without_dropout(model):
        assert [module.training for module in model.modules()] == [False, False, True, False]
    assert [module.training for module in model.modules()] == [True, False, True, True]


def test_flat_vectors_go_there_and_back():
    layer = torch.nn.Linear(2, 1)
    parameters = dict(layer.named_parameters())
    layer.weight.grad = torch.tensor([[1.0, 2.0]])
    assert gradients.read_gradients(parameters).tolist() == [1, 2, 0]
    gradients.write_gradients(parameters, torch.tensor([3.0, 4.0, 0.0]))
    assert layer.weight.grad.tolist() == [[3, 4]] and layer.bias.grad is None
    gradients.write_gradients(parameters, torch.tensor([3.0, 4.0, 5.0]))
    assert layer.bias.grad is not None and layer.bias.grad.tolist() == [5]
    gradients.write_weights(parameters, torch.tensor([6.0, 7.0, 8.0]))
    assert gradients.read_weights(parameters).tolist() == [6, 7, 8]


def test_memory_holds_the_rows_asked_for(tmp_path):
    run = run_tiny(tmp_path, ["method=gem", "method.memory_rows=4", "method.reference_batch=2", ORDER])
    assert run.method.num_stored_examples() == 12
    assert {task: len(rows) for task, rows in run.method.memory.by_task.items()} == dict.fromkeys(run.data.tasks, 4)
    for task, rows in run.method.memory.by_task.items():
        assert set(rows) <= set(run.data.tasks[task].train)


@pytest.mark.parametrize(
    ("key", "value"), [("memory_rows", 0), ("reference_batch", 0), ("reference_micro_batch", 0), ("margin", -0.1)]
)
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"method.{key}={value}"):
        GEM(**{**VALUES, key: value})
