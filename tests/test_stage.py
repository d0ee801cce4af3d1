"""Training: accumulation, schedules, fresh or carried optimizers, dropout, clipping, non-finite losses."""

import pytest
import torch
from conftest import run_tiny

from trace_hydra import run as main_path
from trace_hydra.errors import MethodError
from trace_hydra.methods.base import Method
from trace_hydra.stage import StageModule

ONE = "task_order=[FOMC]"
TWO = "task_order=[FOMC,NumGLUE-cm]"


def difference(one, other) -> float:
    return max(float((weight - other.weights_after[name]).abs().max()) for name, weight in one.weights_after.items())


def test_accumulation_gives_the_same_weights(tmp_path):
    """6 rows in steps of 4: whole, in micro-batches of 2, and of 1 (one answer token a row, so means agree)."""
    settings = [ONE, "budget.batch_size=4", "optim.optimizer._target_=torch.optim.SGD", "~optim.optimizer.betas"]
    runs = [run_tiny(tmp_path / str(size), [*settings, f"budget.micro_batch_size={size}"]) for size in (4, 2, 1)]
    assert runs[0].results["tokens"]["train"] == runs[2].results["tokens"]["train"]
    assert difference(runs[0], runs[1]) < 1e-6 and difference(runs[0], runs[2]) < 1e-6
    moved = max(
        float((weight - runs[0].weights_before[name]).abs().max()) for name, weight in runs[0].weights_after.items()
    )
    assert moved > 1e-5


def record_steps(monkeypatch) -> list[dict]:
    steps = []
    step = StageModule.optimizer_step

    def watch(module, epoch, batch, optimizer, *rest, **keywords):
        state = [len(optimizer.state), optimizer.param_groups[0]["lr"]]
        step(module, epoch, batch, optimizer, *rest, **keywords)
        steps.append({"stage": module.ctx.stage.index, "known": state[0], "lr": state[1]})

    monkeypatch.setattr(StageModule, "optimizer_step", watch)
    return steps


def test_optimizer_is_new_in_every_stage_by_default(tmp_path, monkeypatch):
    steps = record_steps(monkeypatch)
    run_tiny(tmp_path, [TWO])
    firsts = [next(step for step in steps if step["stage"] == stage) for stage in (1, 2)]
    assert [step["known"] for step in firsts] == [0, 0]


def test_optimizer_can_be_carried_as_in_the_official_code(tmp_path, monkeypatch):
    steps = record_steps(monkeypatch)
    carried = run_tiny(tmp_path / "a", [TWO, "optim.carry=true"])
    first = next(step for step in steps if step["stage"] == 2)
    assert first["known"] > 0
    assert difference(carried, run_tiny(tmp_path / "b", [TWO])) > 0


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        ("constant", 0.0, [1, 1, 1, 1]),
        ("linear", 0.0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0.0, [1, 0.853553, 0.5, 0.146447]),  # (1 + cos(pi k / 4)) / 2
        ("constant", 0.5, [0.5, 1, 1, 1]),
    ],
)
def test_schedules_by_hand(tmp_path, monkeypatch, schedule, warmup, factors):
    """6 rows, batch 4, 2 epochs: 4 optimizer steps of learning rate 1e-3 times the factor."""
    steps = record_steps(monkeypatch)
    run_tiny(
        tmp_path,
        [
            ONE,
            f"optim.schedule={schedule}",
            f"optim.warmup_ratio={warmup}",
            "budget.default_epochs=2",
            "budget.batch_size=4",
        ],
    )
    assert [step["lr"] / 1e-3 for step in steps] == pytest.approx(factors, rel=1e-4)


def test_model_is_in_training_mode_during_fit_and_dropout_acts(tmp_path, monkeypatch):
    """Pretrained models arrive in eval mode; LoRA's dropout must be on while training and off while scoring."""
    modes = {"losses": set(), "answer": set()}
    for hook in modes:
        original = getattr(Method, hook)

        def watch(self, ctx, *rest, hook=hook, original=original):
            modes[hook].add(all(module.training for module in ctx.model.modules()))
            return original(self, ctx, *rest)

        monkeypatch.setattr(Method, hook, watch)
    run_tiny(tmp_path, [ONE, "method=lora"])
    assert modes == {"losses": {True}, "answer": {False}}


class Watching(Method):
    """Keeps the gradient's norm before clipping and after the step."""

    def __init__(self):
        self.before, self.after = [], []

    def norm(self, ctx) -> float:
        return float(torch.cat([weight.grad.flatten() for weight in ctx.trainable().values()]).norm())

    def edit_gradients(self, ctx):
        self.before.append(self.norm(ctx))

    def after_step(self, ctx):
        self.after.append(self.norm(ctx))


def test_gradients_are_edited_before_clipping_and_clipped_once_a_step(tmp_path, monkeypatch):
    """6 rows in steps of 4 with micro-batches of 2: two optimizer steps, so the hooks run twice, not three times."""
    method = Watching()
    with_method(monkeypatch, method)
    run_tiny(tmp_path, [ONE, "optim.clip_norm=0.01", "budget.batch_size=4", "budget.micro_batch_size=2"])
    assert len(method.before) == len(method.after) == 2
    assert min(method.before) > 0.1 and method.after == pytest.approx([0.01, 0.01], rel=1e-3)


class Broken(Method):
    """Gives a loss that is no number in the second stage."""

    def losses(self, ctx, batch):
        scale = float("nan") if ctx.stage.index == 2 else 1.0
        return {"lm": ctx.lm_loss(batch) * scale}


class Silent(Method):
    """Declares a penalty that is always zero."""

    terms = ("lm", "penalty")

    def losses(self, ctx, batch):
        loss = ctx.lm_loss(batch)
        return {"lm": loss, "penalty": loss * 0.0}


class Missing(Method):
    """Declares a penalty and gives none."""

    terms = ("lm", "penalty")


def with_method(monkeypatch, method):
    validate = main_path.build.validate

    def replaced(config):
        parts = validate(config)
        object.__setattr__(parts, "method", method)
        return parts

    monkeypatch.setattr(main_path.build, "validate", replaced)


def test_non_finite_loss_stops_with_stage_step_and_rows(tmp_path, monkeypatch):
    with_method(monkeypatch, Broken())
    with pytest.raises(MethodError, match=r"stage 2 \(NumGLUE-cm\).*step 1: loss term 'lm' is nan, rows train-"):
        run_tiny(tmp_path, [TWO])
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_penalty_that_is_zero_from_stage_2_on_is_an_error(tmp_path, monkeypatch):
    with_method(monkeypatch, Silent())
    with pytest.raises(MethodError, match=r"stage 2 \(NumGLUE-cm\): loss term 'penalty' was 0.0"):
        run_tiny(tmp_path, [TWO])


def test_a_declared_term_that_is_missing_is_an_error(tmp_path, monkeypatch):
    with_method(monkeypatch, Missing())
    with pytest.raises(MethodError, match=r"gave no term \['penalty'\]"):
        run_tiny(tmp_path, [ONE])


def test_gradient_checkpointing_changes_no_weight(tmp_path):
    plain = run_tiny(tmp_path / "a", [ONE])
    less = run_tiny(tmp_path / "b", [ONE, "++model.gradient_checkpointing=true"])
    assert difference(plain, less) < 1e-6


def test_a_phase_scales_its_learning_rate(tmp_path, monkeypatch):
    from trace_hydra.plan import Phase

    class Two(Method):
        def phases(self, ctx):
            return [Phase("first", ctx.task.train, 1), Phase("second", ctx.task.train, 1, lr_scale=0.1)]

    with_method(monkeypatch, Two())
    steps = record_steps(monkeypatch)
    run_tiny(tmp_path, [ONE, "budget.batch_size=8"])
    assert [step["lr"] for step in steps] == pytest.approx([1e-3, 1e-4])


def test_an_adapters_first_weights_come_from_the_seed(tmp_path):
    """Whatever random numbers were drawn before; another seed.train gives others."""
    starts = []
    for number, seed in enumerate((42, 42, 7)):
        torch.rand(number + 1)
        run = run_tiny(tmp_path / str(number), [ONE, "method=lora", f"seed.train={seed}", "seed.data=1"])
        starts.append({name: weight for name, weight in run.weights_before.items() if "lora_A" in name})
    assert all(torch.equal(weight, starts[1][name]) for name, weight in starts[0].items())
    assert not any(torch.equal(weight, starts[2][name]) for name, weight in starts[0].items())


def test_no_gradient_is_left_after_a_stage(tmp_path):
    run = run_tiny(tmp_path, [ONE])
    assert all(weight.grad is None for weight in run.ctx.model.parameters())


def test_a_carried_optimizer_refuses_other_weights(tmp_path, monkeypatch):
    """Half fine-tuning trains other matrices in each stage, as many of them, so their number would not tell."""
    with pytest.raises(MethodError, match=r"optim\.carry=true.*stage 2 \(NumGLUE-cm\) trains others"):
        run_tiny(tmp_path, [TWO, "method=hft", "method.outer=freeze", "optim.carry=true"])
