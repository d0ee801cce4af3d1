"""MIGU: whose gradient is kept, by hand and against an independent forward pass."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import compose_config, run_tiny
from torch import nn

from trace_hydra import build
from trace_hydra.methods.migu import Migu, mask

ORDER = "task_order=[FOMC,NumGLUE-cm,20Minuten]"


class Toy(nn.Module):
    """A linear layer of 4 neurons that copies its inputs (2 of them negated), with a bias of 0."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(2, 4)
        self.linear = nn.Linear(4, 4)
        with torch.no_grad():
            self.linear.weight.copy_(torch.diag(torch.tensor([1.0, -1.0, 1.0, -1.0])))
            self.linear.bias.zero_()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, x):
        return self.linear(x)


def toy(masked: float, first_stage: bool = False, stage: int = 2) -> tuple[Migu, Any, Toy]:
    """A method that has begun a stage on the toy; its loss is the sum of the outputs."""
    model = Toy().train()
    method = Migu(masked=masked, first_stage=first_stage)
    ctx: Any = SimpleNamespace(total=lambda tensor: tensor, model=model, stage=SimpleNamespace(index=stage))
    ctx.lm_loss = lambda batch: model(batch["x"]).sum()
    method.begin_stage(ctx)
    return method, ctx, model


def batch_of(rows: list[list[list[float]]], attention: list[list[int]]) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor(rows), "attention_mask": torch.tensor(attention)}


@pytest.mark.parametrize(
    ("count", "masked", "kept"), [(10, 0.7, 3), (8, 0.7, 3), (32, 0.7, 10), (4, 0.5, 2), (4, 0.0, 4), (3, 0.99, 1)]
)
def test_number_of_kept_neurons(count, masked, kept):
    """n - floor(masked * n); 0.7 * 10 must not be read as 6.99..."""
    magnitude = torch.rand(count, generator=torch.Generator().manual_seed(0))
    keep = mask(magnitude, masked)
    assert int(keep.sum()) == kept
    assert kept == count or magnitude[keep].min() > magnitude[~keep].max()


def test_magnitude_and_mask_by_hand():
    """Tokens |h| = (8, 1, 1, 0), (1, 5, 2, 2) and a padded one.

    Shares: (.8, .1, .1, 0) + (.1, .5, .2, .2) = (.9, .6, .3, .2): neurons 0 and 1 are kept.
    """
    method, ctx, model = toy(0.5)
    batch = batch_of([[[8.0, 1, 1, 0], [1, -5, 2, 2], [0, 0, 99, 99]]], [[1, 1, 0]])
    method.losses(ctx, batch)["lm"].backward()
    assert torch.allclose(method.magnitudes["linear"], torch.tensor([0.9, 0.6, 0.3, 0.2]))
    full = model.linear.weight.grad.clone()  # type: ignore[union-attr]
    assert full.abs().sum(1).min() > 0
    method.edit_gradients(ctx)
    grad, bias = model.linear.weight.grad, model.linear.bias.grad
    assert grad is not None and bias is not None
    assert torch.equal(grad[:2], full[:2]) and not grad[2:].any()
    assert bias.tolist() == [3.0, 3.0, 0.0, 0.0]
    assert method.magnitudes == {}


def test_normalisation_comes_before_the_mean():
    """A long vector (0, 0, 100, 0) counts as much as a short one: two short ones on neuron 1 win."""
    method, ctx, _ = toy(0.75)
    batch = batch_of([[[0.0, 0, 100, 0], [0, 0.1, 0, 0], [0, 0.1, 0, 0]]], [[1, 1, 1]])
    method.losses(ctx, batch)["lm"].backward()
    assert method.magnitudes["linear"].tolist() == pytest.approx([0.0, 2.0, 1.0, 0.0])
    method.edit_gradients(ctx)
    assert mask(torch.tensor([0.0, 2.0, 1.0, 0.0]), 0.75).tolist() == [False, True, False, False]


def test_micro_batches_add_up_until_the_step():
    """Neuron 0 leads in the first, neuron 1 in the second and third micro-batch: (1, 2, 0, 0); then from zero again."""
    method, ctx, model = toy(0.75)
    for row in ([5.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 1.0, 0, 0]):
        method.losses(ctx, batch_of([[row]], [[1]]))["lm"].backward()
    assert method.magnitudes["linear"].tolist() == [1.0, 2.0, 0.0, 0.0]
    method.edit_gradients(ctx)
    grad = model.linear.weight.grad
    assert grad is not None and grad.any(1).tolist() == [False, True, False, False]
    method.losses(ctx, batch_of([[[0.0, 0, 0, 1]]], [[1]]))
    assert method.magnitudes["linear"].tolist() == [0.0, 0.0, 0.0, 1.0]


def test_nothing_is_counted_outside_training():
    """Not in eval mode, not after the stage, and not in the first stage unless asked for."""
    method, ctx, model = toy(0.5)
    model.eval()(torch.ones(1, 1, 4))
    assert method.magnitudes == {}
    method.end_stage(ctx)
    model.train()(torch.ones(1, 1, 4))
    assert method.magnitudes == {} and not model.linear._forward_hooks
    assert not toy(0.5, stage=1)[2].linear._forward_hooks
    assert toy(0.5, first_stage=True, stage=1)[2].linear._forward_hooks


def test_a_shared_output_layer_is_left_alone():
    model = Toy()
    model.linear.weight = model.embed.weight  # type: ignore[assignment]
    ctx: Any = SimpleNamespace(model=model, stage=SimpleNamespace(index=2))
    Migu(masked=0.5, first_stage=False).begin_stage(ctx)
    assert not model.linear._forward_hooks


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_kept_rows_of_a_run(tmp_path, tuning):
    """At every step from stage 2 on each linear layer has floor(0.7 n) rows without gradient; stage 1 has all."""
    seen: dict[int, list[Any]] = {}
    edit = Migu.edit_gradients

    def watch(method, ctx):
        full = {name: weight.grad.clone() for name, weight in ctx.trainable().items()}
        edit(method, ctx)
        seen.setdefault(ctx.stage.index, []).append((full, {n: w.grad.clone() for n, w in ctx.trainable().items()}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Migu, "edit_gradients", watch)
        run = run_tiny(tmp_path, ["method=migu", f"tuning={tuning}", ORDER])
    assert sorted(seen) == [1, 2, 3] and len(seen[2]) == 2
    for stage, steps in seen.items():
        for full, edited in steps:
            for name, grad in edited.items():
                linear = grad.dim() == 2 and "embed_tokens" not in name
                if stage == 1 or not linear:
                    assert torch.equal(grad, full[name])
                    continue
                same = (grad == full[name]).all(1)
                zero = ~grad.any(1)
                assert (same | zero).all()
                assert int(zero.sum()) >= int(0.7 * len(grad) + 1e-9)
                if full[name].any(1).all():
                    assert int(zero.sum()) == int(0.7 * len(grad) + 1e-9)
    if tuning == "lora":
        assert {".lora_A." in name for name in seen[2][0][1]} == {True, False}
    assert not any(module._forward_hooks for module in run.ctx.model.modules())


def test_magnitudes_against_an_independent_pass(tmp_path):
    """One micro-batch on the tiny model: the recorded sum of a layer equals one from its inputs, padding left out."""
    run = run_tiny(tmp_path, ["method=seqft", "task_order=[FOMC,NumGLUE-cm]"])
    method, ctx = Migu(masked=0.7, first_stage=False), run.ctx
    method.begin_stage(ctx)
    ctx.model.train()
    (batch,) = list(ctx.batches(ctx.task.train[:3], 3))
    assert not batch["attention_mask"].all()
    inputs = {}
    name = "model.layers.1.mlp.up_proj"
    handle = ctx.model.get_submodule(name).register_forward_hook(lambda _m, x, _y: inputs.update(x=x[0].detach()))
    method.losses(ctx, batch)
    handle.remove()
    expected = torch.zeros(64)
    for row, length in zip(inputs["x"], batch["attention_mask"].sum(1).tolist(), strict=True):
        for token in row[:length]:
            output = (run.weights_after[f"{name}.weight"] @ token).abs()
            expected += output / output.sum()
    assert torch.allclose(method.magnitudes[name], expected, atol=1e-4)
    labels = int((batch["labels"] != -100).sum())
    assert float(method.magnitudes["lm_head"].sum()) == pytest.approx(labels, rel=1e-4)
    method.end_stage(ctx)


def test_masked_zero_equals_seqft(tmp_path):
    """Nothing masked: bit for bit sequential fine-tuning, so hooks change nothing else."""
    none = run_tiny(tmp_path / "a", ["method=migu", "method.masked=0.0", ORDER])
    plain = run_tiny(tmp_path / "b", ["method=seqft", ORDER])
    some = run_tiny(tmp_path / "c", ["method=migu", ORDER])
    assert all(torch.equal(plain.weights_after[name], weight) for name, weight in none.weights_after.items())
    assert any(not torch.equal(plain.weights_after[name], weight) for name, weight in some.weights_after.items())


def test_gradient_checkpointing_gives_the_same_weights(tmp_path):
    """Recomputing counts every token of a layer twice, which ranks its neurons alike."""
    plain = run_tiny(tmp_path / "a", ["method=migu", "task_order=[FOMC,NumGLUE-cm]"])
    again = run_tiny(
        tmp_path / "b", ["method=migu", "task_order=[FOMC,NumGLUE-cm]", "model.gradient_checkpointing=true"]
    )
    for name, weight in plain.weights_after.items():
        assert torch.allclose(again.weights_after[name], weight, atol=1e-5)


@pytest.mark.parametrize("value", ["-0.1", "1.0"])
def test_wrong_settings_are_refused(value):
    config = compose_config(["model=tiny", "method=migu", f"method.masked={value}"])
    assert any(f"method.masked={value}" in problem for problem in build.problems_of(config))
