"""Fisher information by hand and by a loop of its own, the penalty and its gradient, online sums."""

import copy
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import run_tiny
from torch import nn

from trace_hydra.data.batches import collate
from trace_hydra.errors import ConfigError, MethodError
from trace_hydra.methods.ewc import EWC
from trace_hydra.methods.fisher import diagonal_fisher

ONE = "task_order=[FOMC]"
TWO = "task_order=[FOMC,20Minuten]"


def ewc(strength: float = 400.0, gamma: float = 1.0, fisher_examples: int = 500, fisher_reduction: str = "mean") -> EWC:
    return EWC(strength=strength, gamma=gamma, fisher_examples=fisher_examples, fisher_reduction=fisher_reduction)


class LinearSoftmax:
    """log p(y | x) = sum over positions t of log softmax(W x_t)[y_t], with what `diagonal_fisher` asks of a context."""

    def __init__(self, weight: list[list[float]], rows: list[tuple[list[list[float]], list[int]]]):
        self.weight = nn.Parameter(torch.tensor(weight))
        self.unused = nn.Parameter(torch.ones(3))
        self.rows = rows

    def trainable(self):
        return {"weight": self.weight, "unused": self.unused}

    def batches(self, examples, batch_size):
        assert batch_size == 1
        return iter(examples)

    def label_logits(self, row):
        inputs, labels = row
        return torch.tensor(inputs) @ self.weight.T, torch.tensor(labels)

    autocast = staticmethod(torch.enable_grad)  # any context manager that does nothing here


def fisher_of(model: LinearSoftmax, reduction: str = "sum") -> dict[str, torch.Tensor]:
    ctx: Any = model
    return diagonal_fisher(ctx, ctx.rows, reduction)


def test_fisher_by_hand():
    """W = 0, two classes: p = 1/2. Row 1: x = (1, 2), y = 0: gradient (1/2, 1; -1/2, -1), squared (1/4, 1; 1/4, 1).

    Row 2: x = (2, 0), y = 1: (-1, 0; 1, 0), squared (1, 0; 1, 0). Mean: (5/8, 1/2; 5/8, 1/2).
    The squared mean gradient (per batch, as in the official code) would be (1/16, 1/4; 1/16, 1/4).
    """
    fisher = fisher_of(LinearSoftmax([[0.0, 0.0], [0.0, 0.0]], [([[1.0, 2.0]], [0]), ([[2.0, 0.0]], [1])]))
    assert fisher["weight"].tolist() == [[0.625, 0.5], [0.625, 0.5]]
    assert fisher["unused"].tolist() == [0.0, 0.0, 0.0]


def test_fisher_is_of_the_whole_answer_or_of_the_mean_over_its_tokens():
    """The same position twice doubles the gradient of the sum: 4 times the Fisher; the mean leaves it as it is.

    Two positions whose gradients cancel (y = 0 and y = 1 at p = 1/2) give 0: sum first, then square.
    """
    zero = [[0.0, 0.0], [0.0, 0.0]]
    twice = LinearSoftmax(zero, [([[1.0, 2.0], [1.0, 2.0]], [0, 0])])
    assert fisher_of(twice)["weight"].tolist() == [[1.0, 4.0], [1.0, 4.0]]
    assert fisher_of(twice, "mean")["weight"].tolist() == [[0.25, 1.0], [0.25, 1.0]]
    assert fisher_of(LinearSoftmax(zero, [([[1.0, 2.0], [1.0, 2.0]], [0, 1])]))["weight"].abs().max() == 0.0


def test_fisher_equals_the_closed_form_of_a_linear_softmax():
    """d log p / d W = sum_t (onehot(y_t) - p_t) x_t^T, squared, averaged; 12 rows of 1 to 4 tokens, in float64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, generator=generator)
    rows = []
    for number in range(12):
        inputs = torch.randn(1 + number % 4, 5, generator=generator)
        rows.append((inputs.tolist(), torch.randint(3, (len(inputs),), generator=generator).tolist()))
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for inputs, labels in rows:
        gradient = torch.zeros(3, 5, dtype=torch.float64)
        for x, label in zip(torch.tensor(inputs, dtype=torch.float64), labels, strict=True):
            error = -torch.exp(weight.double() @ x) / torch.exp(weight.double() @ x).sum()
            error[label] += 1.0
            gradient += torch.outer(error, x)
        expected += gradient**2 / len(rows)
    assert torch.allclose(fisher_of(LinearSoftmax(weight.tolist(), rows))["weight"].double(), expected, rtol=1e-5)


def reference_fisher(ctx, examples, reduction) -> dict[str, torch.Tensor]:
    """transformers' own mean loss, for the sum times its number of labels, `backward` and `.grad`, a row at a time."""
    model = copy.deepcopy(ctx.model)
    total: dict[str, torch.Tensor] = {}
    for row in ctx.encode(examples):
        batch = collate([row])
        model.zero_grad()
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        (loss * (len(row.ids) - row.num_prompt) if reduction == "sum" else loss).backward()
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                total[name] = total.get(name, 0.0) + weight.grad.double() ** 2
    return {name: value / len(examples) for name, value in total.items()}


def assert_same(fisher, expected):
    assert fisher.keys() == expected.keys()
    for name, value in expected.items():
        assert float((fisher[name] - value).abs().max()) <= 1e-4 * float(value.abs().max()), name


@pytest.mark.parametrize(("tuning", "reduction"), [("full", "mean"), ("full", "sum"), ("lora", "mean")])
def test_fisher_of_a_run_equals_a_loop_and_sums_over_stages(tmp_path, tuning, reduction):
    """gamma = 0.5: F* = 0.5 F_1 + F_2, each at the weights that its stage left; the anchor is the last weights."""
    seen = []
    end_stage = EWC.end_stage

    def watch(method, ctx):
        seen.append(reference_fisher(ctx, ctx.task.train, reduction))
        end_stage(method, ctx)
        seen.append({name: value.clone() for name, value in method.fisher.items()})

    with patch.object(EWC, "end_stage", watch):
        changed = [f"tuning={tuning}", "method.gamma=0.5", f"method.fisher_reduction={reduction}"]
        run = run_tiny(tmp_path, ["method=ewc", TWO, *changed])
    first, after_first, second, after_second = seen
    assert_same(after_first, first)
    assert_same(after_second, {name: 0.5 * first[name] + second[name] for name in first})
    assert all(torch.equal(run.method.anchor[name], weight) for name, weight in run.ctx.trainable().items())
    assert run.method._pull == {}  # what a stage holds on the device is gone behind it
    assert all(one.device.type == "cpu" and one.dtype == torch.float32 for one in run.method.state_dict().values())


def test_fisher_leaves_gradients_weights_and_mode_alone(tmp_path):
    run = run_tiny(tmp_path, ["method=ewc", ONE])
    for weight in run.ctx.model.parameters():
        weight.grad = torch.full_like(weight, 7.0)
    diagonal_fisher(run.ctx, run.data.tasks["FOMC"].train[:2], "sum")
    assert all(bool((weight.grad == 7.0).all()) for weight in run.ctx.model.parameters())
    assert all(torch.equal(weight, run.weights_after[name]) for name, weight in run.ctx.model.state_dict().items())


def test_fisher_takes_a_seeded_sample(tmp_path):
    """2 of 6 rows, from `ctx.rng`: the same again, and not the first two of the file for every seed."""
    taken = []

    def watch(ctx, examples, reduction):
        taken.append([example.id for example in examples])
        return diagonal_fisher(ctx, examples, reduction)

    with patch("trace_hydra.methods.ewc.diagonal_fisher", watch):
        for number, seed in enumerate((0, 0, 1)):
            run_tiny(tmp_path / str(number), ["method=ewc", ONE, "method.fisher_examples=2", f"seed={seed}"])
    assert taken[0] == taken[1] != taken[2] and all(len(set(one)) == 2 for one in taken)


def test_penalty_and_its_gradient_by_hand():
    """theta (1, 2), theta* (0, 4), F (2, 1/2), strength 3, gamma 1/2.

    3/2 * 1/2 * (2 * 1^2 + 1/2 * 2^2) = 3; gradient 3 * 1/2 * F (theta - theta*) = (3, -3/2).
    """
    method = ewc(strength=3.0, gamma=0.5)
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    ctx: Any = SimpleNamespace(
        device="cpu", trainable=lambda: {"w": weight}, lm_loss=lambda batch: weight.sum() * 0 + 5
    )
    method.load_state_dict({"fisher.w": torch.tensor([2.0, 0.5]), "anchor.w": torch.tensor([0.0, 4.0])})
    method.begin_stage(ctx)
    terms = method.losses(ctx, {})
    assert {name: term.item() for name, term in terms.items()} == {"lm": 5.0, "ewc": 3.0}
    terms["ewc"].backward()
    assert weight.grad is not None and weight.grad.tolist() == [3.0, -1.5]


def test_first_stage_is_plain_fine_tuning_and_later_ones_are_not(tmp_path):
    """The penalty is 0 in stage 1, 0 at the first step of stage 2 (theta = theta*), above 0 from its second on."""
    one = run_tiny(tmp_path / "a", ["method=ewc", ONE])
    plain = run_tiny(tmp_path / "b", ["method=seqft", ONE])
    assert one.terms[1]["ewc"] == 0.0
    assert all(torch.equal(weight, plain.weights_after[name]) for name, weight in one.weights_after.items())
    values = []
    losses = EWC.losses

    def watch(method, ctx, batch):
        terms = losses(method, ctx, batch)
        if ctx.stage.index == 2:
            values.append(terms["ewc"].item())
        return terms

    with patch.object(EWC, "losses", watch):  # 6 rows, two a micro-batch, two micro-batches a step
        run_tiny(tmp_path / "c", ["method=ewc", TWO])
    assert values[:2] == [0.0, 0.0] and min(values[2:]) > 0.0


def test_a_stronger_penalty_keeps_important_weights_nearer(tmp_path):
    """Distance to the first stage's weights in the metric F falls by more than half from strength 1e-6 to 1e6."""
    distances = []
    for strength in (1e-6, 1e6):
        kept = {}
        end_stage = EWC.end_stage

        def watch(method, ctx, kept=kept, end_stage=end_stage):
            if ctx.stage.index == 2:
                method.strength = 2.0
                method.begin_stage(ctx)
                kept["distance"] = method.penalty(ctx).item()
            end_stage(method, ctx)

        with patch.object(EWC, "end_stage", watch):
            run_tiny(
                tmp_path / str(strength),
                ["method=ewc", TWO, f"method.strength={strength}", "budget.default_epochs=8"],
            )
        distances.append(kept["distance"])
    assert distances[1] < 0.5 * distances[0]


def test_state_gives_the_same_penalty_back(tmp_path):
    run = run_tiny(tmp_path, ["method=ewc", TWO])
    fresh = ewc()
    fresh.load_state_dict(run.method.state_dict())
    values = []
    with torch.no_grad():
        for weight in run.ctx.trainable().values():
            weight += 0.01
        for method in (run.method, fresh):
            method.begin_stage(run.ctx)
            values.append(method.penalty(run.ctx).item())
    assert values[0] == values[1] > 0


def test_an_overflowing_gradient_is_an_error(tmp_path):
    def overflowing(ctx, examples, reduction):
        return {name: torch.full_like(weight, float("inf")) for name, weight in ctx.trainable().items()}

    with (
        patch("trace_hydra.methods.ewc.diagonal_fisher", overflowing),
        pytest.raises(MethodError, match=r"stage 1 \(FOMC\): the Fisher sums to inf"),
    ):
        run_tiny(tmp_path, ["method=ewc", ONE])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("strength", 0.0),
        ("strength", float("nan")),
        ("gamma", 0.0),
        ("gamma", 1.1),
        ("fisher_examples", 0),
        ("fisher_reduction", "max"),
    ],
)
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(ConfigError, match=rf"method\.{key}={value}"):
        ewc(**{key: value})
