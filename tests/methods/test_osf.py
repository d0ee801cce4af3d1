"""OSF: what stays of a weight, under real AdamW; the share that is kept; plain layers again after each stage."""

import gc
import json
import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch
from conftest import compose_config, run_tiny
from torch import nn

from trace_hydra import build
from trace_hydra.context import batch_of
from trace_hydra.errors import ConfigError, MethodError
from trace_hydra.methods.factored import Factored
from trace_hydra.methods.osf import OSF, linear_layers, shares
from trace_hydra.models.attention import use_for_cpu
from trace_hydra.sizes import RunSize
from trace_hydra.train import state_mb

ORDER = "task_order=[FOMC,NumGLUE-cm,20Minuten]"
HARD = ["optim.optimizer.lr=0.01", "optim.optimizer.weight_decay=0.1", "optim.clip_norm=0.5", "budget.default_epochs=4"]
VALUES: dict[str, Any] = {
    "rank": "adaptive",
    "min_retention": 0.1,
    "target_retention": 0.8,
    "similarity": "absolute",
    "sample_rows": 4,
    "unprotected": "train",
    "lr_scale": 0.2,
}
PROJECTION = "model.layers.0.self_attn.q_proj"


def high(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The top singular directions of a weight as columns, (out, k), (k,) and (in, k), in fp64."""
    u, s, v = torch.linalg.svd(weight.double())
    return u[:, :rank], s[:rank], v[:rank].T


def inside(change: torch.Tensor, weight: torch.Tensor, rank: int) -> float:
    """Share of a change that lies in the kept directions of the old weight, on either side."""
    u, _, v = high(weight, rank)
    change = change.double()
    return float(max((u.T @ change).norm(), (change @ v).norm()) / change.norm())


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
@pytest.mark.parametrize("exact", [True, False])
def test_adamw_stays_out_of_the_kept_directions(shape, exact):
    """60 AdamW steps with decay and clipping: U_high' dW = 0 and dW V_high = 0 with `put_back`; PEFT's projection of
    the gradients alone lets the weight drift into them."""
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0])
    old = layer.weight.detach().clone()
    inputs, targets = torch.randn(64, shape[1]), torch.randn(64, shape[0])
    factored = Factored(layer, 5, "toy")
    weights = list(factored.module.osf_svd_params.parameters())
    assert sorted(weight.numel() for weight in weights) == sorted([11 * shape[0], 11, 11 * shape[1]])
    optimizer = torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        (factored.module(inputs) - targets).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.05)
        optimizer.step()
        if exact:
            factored.put_back()
    change = factored.module.get_delta_weight("toy").detach()
    assert float(change.norm()) > 0.3 * float(old.norm())
    assert inside(change, old, 5) < 1e-5 if exact else inside(change, old, 5) > 1e-2
    with torch.no_grad():
        before = factored.module(inputs)
    merged = factored.merge()
    assert merged is layer and inside(layer.weight.detach() - old, old, 5) < 1e-5
    if exact:
        u, s, v = high(old, 5)
        assert torch.allclose(u.T @ layer.weight.detach().double() @ v, torch.diag(s), atol=1e-5)
        assert torch.allclose(layer(inputs), before, atol=1e-5)
        params = {name.split(".")[-1]: one.detach() for name, one in factored.module.osf_svd_params.named_parameters()}
        rebuilt = (u * s) @ v.T + (params["U_low"] * params["S_low"]).double() @ params["V_low"].double()
        assert torch.allclose(layer.weight.detach().double(), rebuilt, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_factors_of_bf16_weights_are_orthonormal_and_stay_hooked(shape):
    """Factors are fp32 beside bf16 weights, and their gradients are projected; PEFT alone would round them to bf16."""
    from peft.tuners.osf import Linear, OSFConfig

    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False).bfloat16()
    old = layer.weight.detach().clone()
    plain = Linear(deepcopy(layer), "toy", config=OSFConfig(), effective_rank=5)
    factored = Factored(layer, 5, "toy")

    def off(module) -> float:
        bases = (module._osf_U_low_init["toy"].float().T, module._osf_V_low_init["toy"].float())
        return max(float((basis @ basis.T - torch.eye(11)).abs().max()) for basis in bases)

    assert off(factored.module) < 1e-5 and off(plain) > 1e-3
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight, old)
    factors = {name.split(".")[-1]: one for name, one in factored.module.osf_svd_params.named_parameters()}
    assert {weight.dtype for weight in factors.values()} == {torch.float32}
    for basis in factored.kept.values():
        assert torch.allclose(basis.T @ basis, torch.eye(5), atol=1e-5)
    factored.module(torch.randn(8, shape[1]).bfloat16()).float().square().mean().backward()
    u, _, v = high(old.float(), 5)
    for name, basis in (("U_low", u), ("V_low", v)):
        grad = factors[name].grad
        assert grad is not None
        grad = grad.double() if name == "U_low" else grad.double().T
        assert float((basis.T @ grad).norm()) < 1e-5 * float(grad.norm())


def stages(monkeypatch) -> dict[int, dict[str, Any]]:
    """Note, for each stage, weights and logits around wrapping and merging, and what was wrapped."""
    seen: dict[int, dict[str, Any]] = {}
    begin, end = OSF.begin_stage, OSF.end_stage

    def logits(ctx):
        ctx.model.eval()
        with torch.no_grad(), ctx.autocast():
            return ctx.label_logits(batch_of(ctx.encode(ctx.task.train[:3]), ctx.device))[0].float()

    def weights(ctx):
        return {name: weight.detach().clone() for name, weight in ctx.model.state_dict().items()}

    def watch_begin(self, ctx):
        note = seen.setdefault(ctx.stage.index, {"before": weights(ctx), "plain": logits(ctx)})
        begin(self, ctx)
        note["wrapped"] = logits(ctx)
        note["ranks"] = {name: one.module.effective_rank[one.adapter] for name, one in self.wrapped.items()}
        note["trainable"] = set(ctx.trainable())
        note["refs"] = [weakref.ref(one.module) for one in self.wrapped.values()]

    def watch_end(self, ctx):
        note = seen[ctx.stage.index]
        note["trained"] = logits(ctx)
        end(self, ctx)
        note["merged"], note["after"] = logits(ctx), weights(ctx)
        note["flags"] = {weight.requires_grad for weight in ctx.model.parameters()}
        note["state"] = json.loads(json.dumps(self.state_dict()))

    monkeypatch.setattr(OSF, "begin_stage", watch_begin)
    monkeypatch.setattr(OSF, "end_stage", watch_end)
    return seen


@pytest.mark.parametrize(
    ("extra", "rounding", "drift"),
    [([], 0.0, 1e-4), (["trainer.precision=bf16-mixed"], 0.0, 0.05), (["model.dtype=bfloat16"], 2.0**-9, 0.05)],
)
def test_no_stage_changes_the_kept_directions(extra, rounding, drift, tmp_path, monkeypatch):
    """Over each whole stage of a real run: dW lies outside, wrapping and merging move no logit by more than rounding.

    1e-4: where the last kept and the first free singular value are close, fp32 tells their directions apart to less
    than 1e-7 (without `after_step` and the projection in `merge` it is above 1e-2). Weights in bf16 have 8 bits, so a
    merged one is off by 2^-9 of its size at most.
    """
    seen = stages(monkeypatch)
    run = run_tiny(tmp_path, ["method=osf", ORDER, *HARD, *extra])
    assert sorted(seen) == [1, 2, 3]
    names = set(run.weights_before)
    for note in seen.values():
        assert set(note["before"]) == set(note["after"]) == names and note["flags"] == {True}
        assert 0 < len(note["ranks"]) <= 14  # two layers of q, k, v, o, gate, up, down
        for name, rank in note["ranks"].items():
            old, new = (note[when][f"{name}.weight"].float() for when in ("before", "after"))
            change = float((new - old).norm())
            assert inside(new - old, old, rank) * change < 1e-4 * change + rounding * float(new.norm())
            u, s, v = high(old, rank)
            assert torch.allclose(u.T @ new.double() @ v, torch.diag(s), atol=1e-4 + rounding * float(new.norm()))
        scale = float(note["plain"].abs().max())
        assert float((note["wrapped"] - note["plain"]).abs().max()) < (1e-5 if not extra else 0.02) * scale
        assert float((note["trained"] - note["plain"]).abs().max()) > 0.3 * scale
        assert float((note["merged"] - note["trained"]).abs().max()) < drift * float(note["trained"].abs().max())


def test_wrappers_are_gone_when_a_stage_ends(tmp_path, monkeypatch):
    """PEFT's gradient hooks hold their layer; removed by `merge`, nothing of a stage outlives it."""
    seen = stages(monkeypatch)
    run = run_tiny(tmp_path, ["method=osf", "task_order=[FOMC]"])
    gc.collect()
    assert seen[1]["refs"] and not any(ref() for ref in seen[1]["refs"])
    assert type(run.ctx.model.get_submodule(PROJECTION)) is nn.Linear and not hasattr(run.ctx.model, "peft_config")


def test_shares_by_hand():
    """|0.2|, |-0.1|, |0.3|: mean 0.2, I = 1, 0.5, 1.5, r = 0.1 + 0.7 I = 0.8, 0.45, 1.15 -> 1.
    Signed: mean 0.4/3, I = 1.5, -0.75, 2.25, r = 1.15 -> 1, -0.425 -> 0.1, 1.675 -> 1."""
    scores = {"a": 0.2, "b": -0.1, "c": 0.3}
    assert shares(scores, 0.1, 0.8, "absolute") == pytest.approx({"a": 0.8, "b": 0.45, "c": 1.0})
    assert shares(scores, 0.1, 0.8, "signed") == pytest.approx({"a": 1.0, "b": 0.1, "c": 1.0})
    assert shares({"a": 0.0, "b": 0.0}, 0.1, 0.8, "signed") == {"a": 0.1, "b": 0.1}


def test_ranks_are_the_shares_of_the_last_task(tmp_path, monkeypatch):
    """k = round(r m), m = 32 in every layer of the tiny model; stage 1 measures on its own task."""
    seen = stages(monkeypatch)
    measured: list[tuple[int, dict[str, float]]] = []
    importance = OSF._importance

    def watch(self, ctx):
        measured.append((ctx.stage.index, importance(self, ctx)))
        return measured[-1][1]

    monkeypatch.setattr(OSF, "_importance", watch)
    run_tiny(tmp_path, ["method=osf", ORDER, *HARD])
    assert [stage for stage, _ in measured] == [1, 1, 2, 3]
    for stage, (_, scores) in zip((1, 2, 3), (measured[0], measured[1], measured[2]), strict=True):
        ratios = shares(scores, 0.1, 0.8, "absolute")
        expected = {name: round(32 * ratio) for name, ratio in ratios.items()}
        assert seen[stage]["ranks"] == {name: rank for name, rank in expected.items() if rank < 32}
        assert len(set(expected.values())) > 3
        for name, rank in expected.items():  # what is kept whole stands still, everything else moves
            old, new = (seen[stage][when][f"{name}.weight"] for when in ("before", "after"))
            assert torch.equal(old, new) == (rank == 32)
    kept = [share for _, scores in measured[:3] for share in shares(scores, 0.1, 0.8, "absolute").values()]
    assert 1.0 in kept


def test_importance_is_the_mean_cosine_of_what_a_layer_saw(tmp_path):
    """q_proj of the first layer reads the normed embeddings; down_proj is 64 -> 32, so the first 32 inputs count."""
    run = run_tiny(tmp_path, ["method=osf", "method.sample_rows=4", "task_order=[FOMC]"])
    ctx, model = run.ctx, run.ctx.model
    ctx.rng.seed(0)
    found = run.method._importance(ctx)
    assert found.keys() == linear_layers(ctx).keys() and "lm_head" not in found
    ctx.rng.seed(0)
    rows = ctx.encode(ctx.rng.sample(list(ctx.task.train), 4))
    cosines: dict[str, list[float]] = {PROJECTION: [], "model.layers.1.mlp.down_proj": []}

    def see(_layer, arguments, _output):
        for x in arguments[0][0]:
            y = model.model.layers[1].mlp.down_proj.weight @ x
            cosines["model.layers.1.mlp.down_proj"].append(float(x[:32] @ y / x[:32].norm() / y.norm()))

    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(see)
    with torch.no_grad():
        for row in rows:
            ids = torch.as_tensor(row.ids.astype("int64"))
            for x in model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)):
                y = model.get_submodule(PROJECTION).weight @ x
                cosines[PROJECTION].append(float(x @ y / x.norm() / y.norm()))
            model(ids[None])
    handle.remove()
    for name, values in cosines.items():
        assert found[name] == pytest.approx(sum(values) / len(values), abs=1e-6)


def test_growing_rank_starts_plain_and_grows(tmp_path, monkeypatch):
    """m = 32 and three stages: k = 0, round(32 / 3) = 11, round(64 / 3) = 21; nothing is measured or stored."""
    seen = stages(monkeypatch)
    run = run_tiny(tmp_path / "a", ["method=osf", "method.rank=growing", ORDER])
    assert [set(seen[stage]["ranks"].values()) for stage in (1, 2, 3)] == [set(), {11}, {21}]
    assert run.method.state_dict() == {}
    plain = run_tiny(tmp_path / "b", ["method=seqft", "task_order=[FOMC]"])
    assert all(torch.equal(seen[1]["after"][name], weight) for name, weight in plain.weights_after.items())


@pytest.mark.parametrize("choice", ["train", "freeze"])
def test_what_is_not_wrapped_trains_or_not(choice, tmp_path, monkeypatch):
    seen = stages(monkeypatch)
    run = run_tiny(tmp_path, ["method=osf", f"method.unprotected={choice}", "method.target_retention=0.2", ORDER])
    wrapped = {f"{name}.weight" for name in linear_layers(run.ctx)}
    others = set(run.weights_before) - wrapped
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= others
    for note in seen.values():
        assert len(note["ranks"]) == 14
        assert all(torch.equal(note["before"][name], note["after"][name]) == (choice == "freeze") for name in others)
        factors = {name for name in note["trainable"] if ".osf_svd_params." in name}
        assert len(factors) == 3 * 14 and note["trainable"] - factors == (others if choice == "train" else set())


def test_a_cut_run_continues_with_the_same_factors(tmp_path, monkeypatch):
    """From the weights and the state on disk after stage 2, a new method gives stage 3 the same factors."""
    seen = stages(monkeypatch)
    run = run_tiny(tmp_path, ["method=osf", ORDER, *HARD])
    fresh = build.validate(run.config)
    ctx = run.ctx
    model = fresh.model.load()
    use_for_cpu(model)
    ctx.model = fresh.tuning.apply(model)
    ctx.model.load_state_dict(seen[2]["after"])
    fresh.method.load_state_dict(seen[2]["state"])
    first = seen.pop(3)
    fresh.method.begin_stage(ctx)  # ctx still stands at stage 3
    assert seen[3]["ranks"] == first["ranks"] and torch.equal(seen[3]["wrapped"], first["wrapped"])


@pytest.mark.parametrize("settings", [["method.min_retention=0.2"], ["method.rank=growing"]])
@pytest.mark.parametrize("unprotected", ["train", "freeze"])
def test_state_size_is_that_of_a_real_run(settings, unprotected, tmp_path, monkeypatch):
    """Stored: JSON of one number a layer. Device: all tensors of the wrapped layers but their weights; all layers keep
    min_retention = target_retention = 0.2 here."""
    device, trained, begin = [], [], OSF.begin_stage

    def watch(self, ctx):
        begin(self, ctx)
        modules = [one.module for one in self.wrapped.values()]
        tensors = [one for module in modules for one in (*module.parameters(), *module.buffers())]
        bytes_of_weights = sum(4 * one.layer.weight.numel() for one in self.wrapped.values())
        device.append(sum(one.numel() * one.element_size() for one in tensors) - bytes_of_weights)
        trained.append(sum(one.numel() for one in ctx.trainable().values()))

    monkeypatch.setattr(OSF, "begin_stage", watch)
    more = ["method.target_retention=0.2", f"method.unprotected={unprotected}"]
    run = run_tiny(tmp_path, ["method=osf", ORDER, *more, *settings])
    shapes = {name: tuple(weight.shape) for name, weight in run.weights_before.items()}
    linear = frozenset(f"{name}.weight" for name in linear_layers(run.ctx)) | {"lm_head.weight"}
    found = run.method.state_size(run_size(shapes, linear))
    assert found.device == max(device) > 0 and found.trained == max(trained) > 0
    assert found.stored == pytest.approx(1e6 * state_mb(run.method.state_dict()), rel=0.03)


def run_size(shapes: dict[str, tuple[int, ...]], linear: frozenset[str]) -> RunSize:
    rows = {"rows": [6] * 3, "row_bytes": [0.0] * 3, "row_tokens": [0.0] * 3, "answer_tokens": [0.0] * 3}
    sizes = {"width": 32, "layers": 2, "heads": 2, "vocabulary": 259, "micro_batch": 2, "alignment": 0}
    return RunSize(weights=shapes, trainable=frozenset(shapes), linear=linear, **rows, **sizes)  # type: ignore[arg-type]


def test_a_carried_optimizer_is_refused(tmp_path):
    """Its moments belong to the factors of the last stage, also where those have the same shapes."""
    same = ["method.min_retention=0.2", "method.target_retention=0.2"]
    with pytest.raises(MethodError, match=r"optim\.carry=false"):
        run_tiny(tmp_path, ["method=osf", "optim.carry=true", *same, ORDER])


def test_another_model_than_the_measured_one_is_refused(tmp_path):
    run = run_tiny(tmp_path, ["method=osf", "task_order=[FOMC]"])
    run.method.importance = {"somewhere.else": 1.0}
    with pytest.raises(MethodError, match="importance is stored for 1"):
        run.method.begin_stage(run.ctx)


BAD = [("rank", "falling"), ("min_retention", -0.1), ("min_retention", 1.0), ("target_retention", 0.05)]
BAD += [
    ("target_retention", 1.1),
    ("similarity", "cosine"),
    ("sample_rows", 0),
    ("unprotected", "keep"),
    ("lr_scale", 0.0),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"method.{key}="):
        OSF(**{**VALUES, key: value})


def test_other_tunings_are_refused():
    problems = build.problems_of(compose_config(["method=osf", "model=tiny", "tuning=lora"]))
    assert any("Use tuning=full" in problem for problem in problems)


def test_steps_are_scaled_where_factors_train(tmp_path):
    """growing keeps 0 of 2 in stage 1, which trains plainly, and half in stage 2; the rates are the optimizer's own."""
    run = run_tiny(tmp_path, ["method=osf", "method.rank=growing", "task_order=[FOMC,NumGLUE-cm]"])
    whole = run.config.optim.optimizer.lr
    assert run.rates == {1: whole, 2: pytest.approx(0.2 * whole)}
