"""SLoRA: the score, the choice of the rank, and what becomes of weights and adapters at a stage's end."""

from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from conftest import compose_config, run_tiny
from torch import Tensor

from trace_hydra import build, train
from trace_hydra.errors import ConfigError
from trace_hydra.methods.slora import SLoRA, denoised, left_basis, ranks_of, scores, thin_svd
from trace_hydra.sizes import RunSize

TENTHS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
TASKS = ["FOMC", "NumGLUE-cm", "20Minuten"]
BASE = ["method=slora", f"task_order=[{','.join(TASKS)}]", "optim.optimizer.lr=0.02"]
SCALE = 4.0
"""alpha / r of conf/tuning/lora.yaml: 32 / 8."""


def unit(*places: int, size: int = 6) -> Tensor:
    """Unit vectors as columns."""
    return torch.eye(size, dtype=torch.float64)[:, list(places)]


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0]


def planted(signal: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Base (20, 16) and factors of an update of rank 10: `signal` directions in the base's top 10, the rest outside.

    Returns:
        Base weight, B, A, the signal part of B A. Its singular values are 10, 9, ..., so signal comes first.
    """
    left, right = orthonormal(20, 20, seed), orthonormal(16, 16, seed + 1)
    base = left[:, :16] @ torch.diag(torch.arange(16, 0, -1).double()) @ right.T
    inside = left[:, :10] @ orthonormal(10, 10, seed + 2)[:, :signal]
    outside = left[:, 10:] @ orthonormal(10, 10, seed + 3)[:, : 10 - signal]
    sizes, write = torch.arange(10, 0, -1).double(), torch.cat([inside, outside], 1)
    read = orthonormal(16, 10, seed + 4)
    mix = torch.randn(10, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = write[:, :signal] * sizes[:signal] @ read[:, :signal].T
    return base, write * sizes @ mix, torch.linalg.solve(mix, read.T), kept


def test_score_by_hand():
    """Base diag(6, ..., 1): U_0 = e1, e2, e3, so r = 3, out = 6.

    Update e1, e2, e5: o = 1, 2, 2; o + (3 - c)(3 - o) / (6 - c) = 1 + 2 * 2 / 5, 2 + 1 * 1 / 4, 2: best c = 2.
    Update e1, e4, e2: o = 1, 1, 2; 1 + 2 * 2 / 5, 1 + 1 * 2 / 4, 2: best c = 3.
    Top c against top c: e1, e4, e2 with e1; e1, e2; e1, e2, e3: 1, 1, 2.
    """
    basis = left_basis(torch.diag(torch.tensor([6.0, 5, 4, 3, 2, 1])), 3)
    assert torch.allclose(basis.abs().double(), unit(0, 1, 2), atol=1e-6)
    assert scores(unit(0, 1, 4), basis, [1, 2, 3], "completed") == pytest.approx([1.8, 2.25, 2.0])
    assert scores(unit(0, 3, 1), basis, [1, 2, 3], "completed") == pytest.approx([1.8, 1.5, 2.0])
    assert scores(unit(0, 3, 1), basis, [1, 2, 3], "top_c") == pytest.approx([1, 1, 2])


@pytest.mark.parametrize("c", [1, 3, 5])
def test_score_is_the_released_one_averaged_over_completions(c):
    """||[U_c, Q]^T U_0||_F^2 for Q uniform among r - c orthonormal directions off U_c, 20000 draws: within 0.01."""
    basis, left = orthonormal(12, 6, 0), orthonormal(12, 6, 1)
    drawn = torch.Generator().manual_seed(2)
    (expected,) = scores(left, basis, [c], "completed")
    off = torch.eye(12, dtype=torch.float64) - left[:, :c] @ left[:, :c].T
    random = off @ torch.randn(20000, 12, 6 - c, generator=drawn, dtype=torch.float64)
    completion = torch.linalg.qr(random)[0] if c < 6 else random
    padded = torch.cat([left[:, :c].expand(20000, -1, -1), completion], 2)
    found = (padded.transpose(1, 2) @ basis).square().sum((1, 2)).mean()
    assert float(found) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("signal", [2, 4, 7])
def test_planted_noise_is_removed(signal):
    """What lies in the base's subspace stays, to rounding; what lies outside goes; the rank is the planted one."""
    base, b, a, kept = planted(signal)
    wide, tall = denoised(b, a, left_basis(base, 10), ranks_of(TENTHS, 10), "completed")
    assert wide.shape == (20, signal) and tall.shape == (signal, 16)
    assert torch.allclose((wide @ tall).double(), kept, atol=1e-4)
    assert torch.allclose(wide.T @ wide, tall @ tall.T, atol=1e-4)  # balanced


def test_the_maximum_lies_inside_where_top_c_only_grows():
    """Signal 4 of 10: "completed" rises to 4 and falls; "top_c" never falls, so that it removes nothing."""
    base, b, a, _ = planted(4)
    left, basis = thin_svd(b, a)[0], left_basis(base, 10)
    rising = np.diff(scores(left, basis, range(1, 11), "completed"))
    assert (rising[:3] > 0.05).all() and (rising[3:] < -0.05).all()
    assert (np.diff(scores(left, basis, range(1, 11), "top_c")) > -1e-6).all()
    assert len(denoised(b, a, basis, range(1, 11), "top_c")[1]) == 10


def test_without_evidence_nothing_is_removed():
    """Rank 6 and out 6: U_0 spans everything, every score is 6, so that all six directions stay."""
    drawn = torch.Generator().manual_seed(0)
    b, a = torch.randn(6, 6, generator=drawn), torch.randn(6, 9, generator=drawn)
    wide, tall = denoised(b, a, left_basis(torch.randn(6, 9, generator=drawn), 6), range(1, 7), "completed")
    assert len(tall) == 6 and torch.allclose(wide @ tall, b @ a, atol=1e-5)


def test_a_direction_pays_exactly_if_it_beats_chance():
    """The score rises if the squared projection is above (r - o_c) / (out - c), and only then; 40 random updates."""
    for seed in range(40):
        left, basis = orthonormal(15, 6, seed), orthonormal(15, 6, 100 + seed)
        values, projections = scores(left, basis, range(1, 7), "completed"), (basis.T @ left).square().sum(0)
        for c in range(1, 6):
            chance = (6 - float(projections[:c].sum())) / (15 - c)
            assert (values[c] > values[c - 1]) == (float(projections[c]) > chance)


@pytest.mark.parametrize("shape", [(12, 9, 4), (9, 12, 4), (3, 9, 5), (9, 3, 5)])
def test_thin_svd_is_the_full_one(shape):
    """Out, in, rank; also ranks above a side, where only min(out, in) singular values exist."""
    out, inside, rank = shape
    drawn = torch.Generator().manual_seed(0)
    b, a = torch.randn(out, rank, generator=drawn), torch.randn(rank, inside, generator=drawn)
    u, s, vt = thin_svd(b, a)
    count = min(shape)
    assert u.shape == (out, count) and vt.shape == (count, inside)
    full = np.linalg.svd(b.double().numpy() @ a.double().numpy(), full_matrices=False)
    assert np.allclose(s, full[1][:count])
    assert torch.allclose(u * s @ vt, b.double() @ a.double())
    assert torch.allclose(u.T @ u, torch.eye(count).double()) and torch.allclose(vt @ vt.T, torch.eye(count).double())
    signs = np.sign((u.numpy() * full[0][:, :count]).sum(0))
    assert np.allclose(u.numpy() * signs, full[0][:, :count])


@pytest.mark.parametrize("shape", [(10, 25), (25, 10), (12, 12)])
def test_left_basis_is_that_of_the_svd(shape):
    """Column by column, up to the sign."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = torch.linalg.svd(weight.double())[0][:, :5]
    found = left_basis(weight, 5).double()
    assert torch.allclose((found * expected).sum(0).abs(), torch.ones(5).double(), atol=1e-5)
    assert left_basis(weight, 99).shape == (shape[0], min(shape))


def test_candidates():
    """Rank 64: those of the released code, 44 and 12 among them; a small rank gives no candidate twice or below 1."""
    assert ranks_of(TENTHS, 64) == [6, 12, 19, 25, 32, 38, 44, 51, 57, 64]
    assert ranks_of(TENTHS, 8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert ranks_of([0.01], 8) == [1]


def watched(tmp_path, overrides: list[str]):
    """Run three stages; returns the run and for each stage the weights just before and after `end_stage`."""
    ends: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    end = SLoRA.end_stage

    def watch(method, ctx):
        before = {name: one.clone() for name, one in ctx.model.state_dict().items()}
        state = torch.get_rng_state()
        end(method, ctx)
        assert torch.equal(torch.get_rng_state(), state)
        ends.append((before, {name: one.clone() for name, one in ctx.model.state_dict().items()}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SLoRA, "end_stage", watch)
        return run_tiny(tmp_path, [*BASE, *overrides]), ends


def layers_of(weights: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix(".base_layer.weight") for name in weights if name.endswith(".base_layer.weight")]


def cleaned(weights: dict[str, Tensor], layer: str, pretrained: dict[str, Tensor]) -> tuple[Any, int]:
    """B A truncated at the best c, by numpy's full SVDs of update and pretrained weight, for out = 32, r = 8."""
    a, b = (weights[f"{layer}.lora_{key}.default.weight"].double().numpy() for key in "AB")
    u, s, vt = np.linalg.svd(b @ a)
    basis = np.linalg.svd(pretrained[f"{layer}.base_layer.weight"].double().numpy())[0][:, :8]
    best, rank = -1.0, 0
    for c in range(1, 9):
        inside = np.linalg.norm(basis.T @ u[:, :c]) ** 2
        score = inside + (8 - c) * (8 - inside) / (32 - c)
        best, rank = (score, c) if score > best else (best, rank)
    return (u[:, :rank] * s[:rank]) @ vt[:rank], rank


def base_of(weights: dict[str, Tensor], layer: str) -> Any:
    return weights[f"{layer}.base_layer.weight"].double().numpy()


@pytest.mark.parametrize("kept_scale", [1.0, 0.25])
def test_pre_merges_what_is_kept_and_starts_a_new_adapter(tmp_path, kept_scale):
    """In each stage W grows by kept_scale * alpha / r * truncation; at r / alpha = 0.25 that is the truncation itself.

    U_0 stays that of the pretrained weight. B is 0 and A new, so that the model answers with W alone.
    """
    run, ends = watched(tmp_path, [f"method.kept_scale={kept_scale}"])
    removed = 0
    for stage, (before, after) in enumerate(ends):
        for number, layer in enumerate(layers_of(before)):
            kept, rank = cleaned(before, layer, run.weights_before)
            assert run.method.ranks[stage][number] == rank
            removed += rank < 8
            growth = base_of(after, layer) - base_of(before, layer)
            assert np.allclose(growth, kept_scale * SCALE * kept, atol=1e-5) and np.abs(growth).max() > 1e-3
            a, b = (after[f"{layer}.lora_{key}.default.weight"] for key in "AB")
            assert not b.any() and not torch.equal(a, before[f"{layer}.lora_A.default.weight"])
            assert float(a.abs().max()) <= 32**-0.5 and float(a.std()) == pytest.approx((3 * 32) ** -0.5, rel=0.15)
    assert removed
    layer = layers_of(run.weights_after)[0]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = run.ctx.model.eval().get_submodule(layer)(x)
    assert np.allclose(found, x.double().numpy() @ base_of(ends[-1][1], layer).T, atol=1e-5)
    assert not np.allclose(found, x.double().numpy() @ base_of(run.weights_before, layer).T, atol=1e-3)


def test_post_merges_raw_updates_and_cleans_each_at_the_end(tmp_path):
    """After stages 1 and 2, W = W_0 + sum of 4 B A as with sequential LoRA; in the end W_0 + sum of 4 truncations."""
    run, ends = watched(tmp_path, ["method.variant=post"])
    assert len(run.method.ranks) == 3
    for number, layer in enumerate(layers_of(run.weights_before)):
        raw = clean = base_of(run.weights_before, layer)
        for stage, (before, after) in enumerate(ends):
            a, b = (before[f"{layer}.lora_{key}.default.weight"].double().numpy() for key in "AB")
            kept, rank = cleaned(before, layer, run.weights_before)
            raw, clean = raw + SCALE * b @ a, clean + SCALE * kept
            assert run.method.ranks[stage][number] == rank
            assert np.allclose(base_of(after, layer), raw if stage < 2 else clean, atol=1e-5)
        assert not np.allclose(raw, clean, atol=1e-3)


@pytest.mark.parametrize("variant", ["pre", "post"])
def test_one_adapter_is_cleaned_in_place(tmp_path, variant):
    """The base never moves; the adapter's product becomes its truncation, and removed columns of B train on.

    d loss / d B[:, i] = (d loss / d y)^T (A_i x): zero if row i of A were zero, as after a plain truncation.
    """
    run, ends = watched(tmp_path, ["method.adapters=one", f"method.variant={variant}"])
    names = [name for name in run.weights_before if "lora_" not in name]
    assert all(torch.equal(run.weights_before[name], run.weights_after[name]) for name in names)
    removed = []
    for stage, (before, after) in enumerate(ends):
        for number, layer in enumerate(layers_of(before)):
            kept, rank = cleaned(before, layer, run.weights_before)
            a, b = (after[f"{layer}.lora_{key}.default.weight"] for key in "AB")
            if variant == "post" and stage < 2:
                assert torch.equal(b, before[f"{layer}.lora_B.default.weight"])
                continue
            assert run.method.ranks[stage if variant == "pre" else 0][number] == rank
            assert np.allclose(b.double().numpy() @ a.double().numpy(), kept, atol=1e-5)
            assert not b[:, rank:].any() and a[rank:].any(1).all()
            removed += [(layer, rank)] * (rank < 8 and stage == 2)
    assert removed
    (batch,) = list(run.ctx.batches(run.ctx.task.train[:2], 2))
    run.ctx.model.zero_grad(set_to_none=True)
    run.ctx.lm_loss(batch).backward()
    for layer, rank in removed:
        gradient = run.ctx.model.get_parameter(f"{layer}.lora_B.default.weight").grad
        assert gradient is not None and gradient[:, rank:].abs().sum(0).gt(0).all()


@pytest.mark.parametrize("overrides", [[], ["method.variant=post"], ["method.adapters=one"]])
def test_what_trains_stays_and_what_is_kept_has_the_planned_size(tmp_path, overrides):
    """The same weights train in each stage; state_size gives the bytes of the state within 3 %."""
    run = run_tiny(tmp_path, [*BASE, *overrides])
    assert len({frozenset(names) for names in run.trainable.values()}) == 1 and len(run.trainable) == 3
    weights = {name: tuple(one.shape) for name, one in run.weights_after.items()}
    trainable = frozenset(run.trainable[1])
    many = dict.fromkeys(RunSize.__dataclass_fields__, 0)
    size = RunSize(**{**many, "weights": weights, "trainable": trainable, "rows": [6, 6, 6]})  # type: ignore[arg-type]
    assert size.num_trainable == sum(prod(weights[name]) for name in trainable)
    assert run.method.state_size(size).stored == pytest.approx(1e6 * train.state_mb(run.method.state_dict()), rel=0.03)


@pytest.mark.parametrize("overrides", [["method.kept_scale=0.5"], ["method.variant=post"], ["method.adapters=one"]])
@pytest.mark.parametrize("cut", [1, 2])
def test_a_cut_run_continues_to_the_same_weights(tmp_path, overrides, cut):
    """After stage `cut` only the two state_dicts go on, through the disk's formats, into a new model and method."""
    whole = run_tiny(tmp_path / "whole", [*BASE, *overrides])
    continued = run_tiny(tmp_path / "continued", [*BASE, *overrides], cut=(cut, whole.snapshots[cut]))
    assert all(torch.equal(one, continued.weights_after[name]) for name, one in whole.weights_after.items())
    assert whole.results["matrix"][-1] == continued.results["matrix"][-1]
    assert whole.method.ranks == continued.method.ranks


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["method.variant=during"], "method.variant=during"),
        (["method.adapters=two"], "method.adapters=two"),
        (["method.similarity=cosine"], "method.similarity=cosine"),
        (["method.ratios=[]"], "method.ratios=[]"),
        (["method.ratios=[0.5,1.5]"], "1.5"),
        (["method.kept_scale=0"], "method.kept_scale=0"),
        (["method.adapters=one", "method.kept_scale=0.5"], "method.adapters=per_task"),
        (["tuning=full"], "Use tuning=lora"),
    ],
)
def test_wrong_settings_are_refused(override, message):
    config = compose_config(["model=tiny", "method=slora", *override])
    assert any(message in problem for problem in build.problems_of(config))


@pytest.mark.parametrize("key", ["variant", "adapters", "similarity"])
def test_wrong_words_are_refused_in_code_too(key):
    right = {"variant": "pre", "adapters": "one", "ratios": [1.0], "similarity": "top_c", "kept_scale": 1.0}
    with pytest.raises(ConfigError, match=f"method.{key}='other'"):
        SLoRA(**{**right, key: "other"})  # type: ignore[arg-type]
