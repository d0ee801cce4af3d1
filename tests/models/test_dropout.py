"""Dropout by few random bits: as likely, as large on average, and repeatable as PyTorch's."""

import pytest
import torch
from conftest import run_tiny
from torch import nn

from trace_hydra.models.dropout import FewDraws, draw_less


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.93])
def test_share_and_mean(p):
    torch.manual_seed(0)
    count = 1_000_003  # no multiple of four
    output = FewDraws(p)(torch.ones(count, dtype=torch.float64))
    kept = 1 - p
    # Six standard deviations of a share of independent draws, and what rounding p to 2^-16 may add.
    within = 6 * (p * kept / count) ** 0.5 + 2**-17
    assert abs((output == 0).double().mean().item() - p) < within
    assert output.mean().item() == pytest.approx(1, abs=within / kept)
    assert output.unique().numel() == 2


def test_neighbours_are_independent():
    torch.manual_seed(0)
    dropped = (FewDraws(0.5)(torch.ones(400_000)) == 0).double() - 0.5
    for apart in (1, 2, 3, 4, 8):  # four elements share a draw
        correlation = (dropped[:-apart] * dropped[apart:]).mean() / 0.25
        assert abs(correlation) < 6 / 400_000**0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_goes_where_the_value_went(dtype):
    input = torch.ones(7, 13, dtype=dtype, requires_grad=True)
    output = FewDraws(0.3)(input)
    assert output.dtype == dtype and output.shape == input.shape
    output.sum().backward()
    assert input.grad is not None and torch.equal(input.grad, output.detach())


def test_seed_decides_and_eval_does_nothing():
    layer, input = FewDraws(0.5), torch.ones(100)
    torch.manual_seed(3)
    one = layer(input)
    torch.manual_seed(3)
    assert torch.equal(layer(input), one)
    assert torch.equal(layer.eval()(input), input)


def test_takes_the_place_of_pytorchs_alone():
    class Own(nn.Dropout):
        pass

    deep = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    model = nn.ModuleDict(
        {"some": nn.Dropout(0.5), "none": nn.Dropout(0.0), "all": nn.Dropout(1.0), "tiny": nn.Dropout(1e-7),
         "own": Own(0.5), "deep": deep}
    ).eval()  # fmt: skip
    draw_less(model)
    kinds = {name: type(module) for name, module in model.items() if name != "deep"}
    others = {"none": nn.Dropout, "all": nn.Dropout, "tiny": nn.Dropout, "own": Own}
    assert kinds == {"some": FewDraws, **others}
    assert type(deep[1]) is FewDraws and deep[1].p == 0.1 and not deep[1].training


def test_a_run_with_adapters_trains_with_it(tmp_path, monkeypatch):
    seen = []
    before = FewDraws.forward
    monkeypatch.setattr(FewDraws, "forward", lambda self, input: seen.append(self.training) or before(self, input))
    run_tiny(tmp_path, ["method=seqft", "tuning=lora", "task_order=[C-STANCE]"])
    assert any(seen)
