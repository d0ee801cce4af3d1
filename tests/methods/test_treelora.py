"""TreeLoRA: the pull by hand and in a run, what is stored, and that a run can be cut. The tree: test_tree.py."""

from math import prod
from unittest.mock import patch

import pytest
import torch
from conftest import compose_config, run_tiny

from trace_hydra import build
from trace_hydra.errors import ConfigError, MethodError
from trace_hydra.methods.tree import LevelSearch, gradient_distance
from trace_hydra.methods.treelora import TreeLoRA, alignment
from trace_hydra.sizes import RunSize
from trace_hydra.train import state_mb

ORDER = "task_order=[FOMC,NumGLUE-cm,20Minuten]"
LONGER = ["budget.default_epochs=2", "optim.optimizer.lr=0.05"]  # four steps a stage that change something
SETTINGS = {"strength": 0.5, "exploration": 2.0, "depth": None}


def test_pull_by_hand():
    """Updates (1, 2) and ((3, -1)), gradients (0.5, -1) and ((2, 4)): 0.5 - 2 + 6 - 4 = 0.5; its gradient is theirs."""
    updates = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([[3.0, -1.0]], requires_grad=True)]
    gradients = [torch.tensor([0.5, -1.0]), torch.tensor([[2.0, 4.0]])]
    value = alignment(updates, gradients)
    value.backward()
    assert value.item() == 0.5
    pairs = zip(updates, gradients, strict=True)
    assert all(update.grad is not None and torch.equal(update.grad, one) for update, one in pairs)


def test_pull_is_the_change_of_the_earlier_loss_to_first_order():
    """Loss |w|^2 / 2 at w = (1, 2), gradient (1, 2); update (0.001, -0.002): -0.003 of an exact -0.0029975."""
    weight, update = torch.tensor([1.0, 2.0]), torch.tensor([0.001, -0.002])
    exact = 0.5 * float((weight + update).square().sum() - weight.square().sum())
    assert float(alignment([update], [weight])) == pytest.approx(exact, rel=1e-3)


def watched(tmp_path, overrides, at_step=None):
    """Run three stages; returns the run and per stage the true mean task gradient of each level, from autograd alone.

    `at_step` is called with method, ctx, terms and step number behind `losses`.
    """
    losses, edit, begin = TreeLoRA.losses, TreeLoRA.edit_gradients, TreeLoRA.begin_stage
    sums: dict[int, dict[str, torch.Tensor]] = {}
    steps: dict[int, int] = {}

    def watch_begin(method, ctx):
        begin(method, ctx)
        names = [name for name in ctx.trainable() if ".lora_A." in name][: method.depth]
        sums[ctx.stage.index] = {name: torch.zeros_like(ctx.trainable()[name]) for name in names}
        steps[ctx.stage.index] = 0

    def watch_losses(method, ctx, batch):
        terms = losses(method, ctx, batch)
        found = sums[ctx.stage.index]
        weights = [ctx.trainable()[name] for name in found]
        grads = torch.autograd.grad(terms["lm"], weights, retain_graph=True)
        for total, one in zip(found.values(), grads, strict=True):
            total += one * float(batch["weight"])
        if at_step:
            at_step(method, ctx, terms, steps[ctx.stage.index])
        return terms

    def watch_edit(method, ctx):
        edit(method, ctx)
        steps[ctx.stage.index] += 1

    with (
        patch.object(TreeLoRA, "begin_stage", watch_begin),
        patch.object(TreeLoRA, "losses", watch_losses),
        patch.object(TreeLoRA, "edit_gradients", watch_edit),
    ):
        torch.manual_seed(0)  # of the adapter
        run = run_tiny(tmp_path, ["method=treelora", ORDER, *LONGER, *overrides])
    means = {stage: {name: one / steps[stage] for name, one in found.items()} for stage, found in sums.items()}
    return run, means


@pytest.mark.parametrize("strength", [0.5, 20.0])
def test_stored_are_the_mean_task_gradients_without_the_pull(tmp_path, strength):
    """Mean over optimizer steps, micro-batches by their labels, of grad lm alone, though the pull is in `.grad`."""
    run, means = watched(tmp_path, [f"method.strength={strength}"])
    assert set(means) == {1, 2, 3} and run.config.budget.batch_size == 2 * run.config.budget.micro_batch_size
    for stage, found in means.items():
        assert list(found) == list(run.method.gradients) and len(found) == 4  # two layers, q and v
        for name, expected in found.items():
            stored = run.method.gradients[name]
            assert stored.shape == (3, *expected.shape) and stored.device.type == "cpu"
            assert (stored[stage - 1] - expected).norm() < 1e-5 * max(1, strength) * expected.norm()
            assert expected.norm() > 1e-4


def test_term_is_the_pull_of_the_chosen_tasks_and_starts_at_zero(tmp_path):
    """Against the definition at every pass; each lora_A gets the gradient strength * g_k, lora_B none."""
    starts, seen = {}, []

    def at_step(method, ctx, terms, step):
        stage, weights = ctx.stage.index, ctx.trainable()
        if step == 0 and stage not in starts:
            starts[stage] = {name: one.detach().clone() for name, one in weights.items()}
        if stage == 1:
            assert terms["treelora"].item() == 0.0 and method.chosen == []
            return
        names = list(method.gradients)
        stored = [method.gradients[name][task] for name, task in zip(names, method.chosen, strict=True)]
        assert all(task < stage - 1 for task in method.chosen)
        expected = sum(
            0.7 * float((one * (weights[name].detach() - starts[stage][name])).sum())
            for name, one in zip(names, stored, strict=True)
        )
        assert terms["treelora"].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)
        assert (step > 0) == (terms["treelora"].item() != 0.0)
        grads = torch.autograd.grad(terms["treelora"], list(weights.values()), retain_graph=True, allow_unused=True)
        for name, grad in zip(weights, grads, strict=True):
            assert (grad is None) == (".lora_B." in name)
            if grad is not None:
                assert torch.allclose(grad, 0.7 * stored[names.index(name)], rtol=1e-5)
        seen.append((stage, step))

    run, _ = watched(tmp_path, ["method.strength=0.7"], at_step)
    assert {(2, 0), (2, 3), (3, 0), (3, 3)} <= set(seen) and run.terms[3]["treelora"] > 0


def test_each_level_observes_one_distance_a_step_of_the_mean_gradient_so_far(tmp_path):
    """Stage 3 has two arms: 4 steps, so 4 observations a level; the first choice is task 0, the next the untried."""
    observed, choices = [], []
    observe = LevelSearch.observe

    def watch(search, task, distance):
        observed.append((search.level, task, distance))
        observe(search, task, distance)

    def at_step(method, ctx, terms, step):
        if ctx.stage.index == 3:
            choices.append((step, list(method.chosen)))

    with patch.object(LevelSearch, "observe", watch):
        run, means = watched(tmp_path, ["method.exploration=0"], at_step)
    last = observed[-16:]  # 4 levels, 4 steps, of stage 3
    assert len(observed) == 32 and [level for level, _, _ in last] == list(range(4)) * 4
    assert {tuple(chosen) for step, chosen in choices if step == 0} == {(0,) * 4}
    assert {tuple(chosen) for step, chosen in choices if step == 1} == {(1,) * 4}
    for level, name in enumerate(run.method.gradients):  # the last observation compares the whole stage's mean
        _, task, distance = last[12 + level]
        expected = gradient_distance(means[3][name], run.method.gradients[name][task])
        assert distance == pytest.approx(float(expected), abs=1e-4)
        tried = {one: cost for lev, one, cost in last[:8] if lev == level}  # without exploration the nearer is next
        assert last[8 + level][1] == min(tried, key=lambda one: (tried[one], one))


def test_a_strong_pull_lowers_the_earlier_loss_to_first_order(tmp_path):
    """Strength 1000 outweighs the task: at the last step the update points down the stored gradients."""
    values = []
    watched(
        tmp_path,
        ["method.strength=1000"],
        lambda method, ctx, terms, step: values.append((ctx.stage.index, terms["treelora"].item())),
    )
    assert all(value < 0 for stage, value in values[-2:] if stage == 3) and values[-1][0] == 3


def test_depth_bounds_the_levels(tmp_path):
    run, _ = watched(tmp_path, ["method.depth=3"])
    names = [name for name in run.ctx.trainable() if ".lora_A." in name]
    assert len(names) == 4 and list(run.method.gradients) == names[:3]


def test_first_stage_equals_plain_lora(tmp_path):
    """Nothing is pulled before there is a task to be pulled to, bit for bit."""
    torch.manual_seed(0)
    ours = run_tiny(tmp_path / "a", ["method=treelora", "task_order=[FOMC]"])
    torch.manual_seed(0)
    plain = run_tiny(tmp_path / "b", ["method=lora", "task_order=[FOMC]"])
    assert all(torch.equal(plain.weights_after[name], one) for name, one in ours.weights_after.items())
    assert any("lora_" in name for name in ours.weights_after)


def test_gradients_of_other_levels_are_refused(tmp_path):
    run = run_tiny(tmp_path, ["method=treelora", "task_order=[FOMC]"])
    run.method.depth = 2
    with pytest.raises(MethodError, match=r"gradients of 4 levels are stored"):
        run.method.begin_stage(run.ctx)


@pytest.mark.parametrize("depth", ["3", "null"])
def test_state_size_is_what_is_stored(tmp_path, depth):
    """Also nothing is left on the device behind a stage."""
    run = run_tiny(tmp_path, ["method=treelora", ORDER, f"method.depth={depth}"])
    weights = {name: tuple(one.shape) for name, one in run.ctx.model.named_parameters()}
    size = RunSize(
        weights=weights,
        trainable=frozenset(run.ctx.trainable()),
        linear=frozenset(),
        rows=[6, 6, 6],
        row_bytes=[1.0] * 3,
        row_tokens=[1.0] * 3,
        answer_tokens=[1.0] * 3,
        width=16,
        layers=2,
        heads=2,
        vocabulary=259,
        micro_batch=2,
        alignment=0,
    )
    found = run.method.state_size(size)
    assert found.stored / 1e6 == pytest.approx(state_mb(run.method.state_dict()), rel=1e-6)
    level = prod(next(shape for name, shape in weights.items() if ".lora_A." in name))
    assert found.device == 4 * level * (3 if depth == "3" else 4) * 4  # two earlier tasks, A_0 and the own gradient
    held = (run.method._stored, run.method._start, run.method._total, run.method._levels, run.method.searches)
    assert not any(held)


@pytest.mark.parametrize(
    ("key", "value"), [("strength", 0.0), ("strength", float("nan")), ("exploration", -0.1), ("depth", 0)]
)
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(ConfigError, match=rf"method\.{key}={value}"):
        TreeLoRA(**{**SETTINGS, key: value})


def test_other_tunings_are_refused_and_the_papers_values_stand():
    config = compose_config(["model=tiny", "method=treelora", "tuning=full"])
    assert any("Use tuning=lora" in problem for problem in build.problems_of(config))
    method = compose_config(["method=treelora"]).method
    assert (method.strength, method.exploration, method.depth) == (0.5, 2.0, 64)
