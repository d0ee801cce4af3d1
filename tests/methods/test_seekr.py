"""SEEKR: importance, head choice and distilled attention against references written here."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import compose_config, run_tiny

from trace_hydra import build
from trace_hydra.data.batches import collate
from trace_hydra.errors import ConfigError, MethodError
from trace_hydra.methods.attention import attention_distance, choose_heads, measure
from trace_hydra.methods.seekr import SelectiveAttention
from trace_hydra.plan import Stage

ORDER = "task_order=[FOMC,NumGLUE-cm,20Minuten]"
GOOD: dict[str, Any] = {
    "fraction": 0.5,
    "logits_weight": 0.5,
    "attention_weight": 10.0,
    "layers": 2,
    "heads": 3,
    "queries": 20,
}


def test_heads_are_chosen_within_the_important_layers():
    """Sums 6, 5, 9: with two layers, 1 falls out though its head 1 is the second largest of all; then the 3 largest."""
    importance = torch.tensor([[3.0, 1.0, 2.0], [0.5, 4.5, 0.0], [7.0, 0.5, 1.5]])
    assert choose_heads(importance, 2, 3) == [(0, 0), (0, 2), (2, 0)]
    assert choose_heads(importance, 3, 3) == [(0, 0), (1, 1), (2, 0)]
    assert choose_heads(importance, 1, 2) == [(2, 0), (2, 2)]
    assert choose_heads(importance, 24, 128) == [(layer, head) for layer in range(3) for head in range(3)]


def test_attention_distance_by_hand():
    """Old (1/2, 1/2), new (3/4, 1/4): KL(old || new) = ln(2 / sqrt 3) = 0.143841, not the reverse's 0.130812.

    Layer 0 has two heads with KL 0.143841 and 0, layer 5 one with (1, 0) against (1/2, 1/2): ln 2. Means over a layer's
    heads, then over layers: (0.071921 + 0.693147) / 2.
    """
    old = torch.tensor([[[0.5, 0.5]], [[0.5, 0.5]], [[1.0, 0.0]]])
    new = torch.tensor([[[0.75, 0.25]], [[0.5, 0.5]], [[0.5, 0.5]]])
    first = math.log(2 / math.sqrt(3))
    assert float(attention_distance(new[:1], old[:1], [(0, 0)])) == pytest.approx(first, abs=1e-6)
    found = attention_distance(new, old, [(0, 0), (0, 1), (5, 0)])
    assert float(found) == pytest.approx((first / 2 + math.log(2)) / 2, abs=1e-6)
    two_queries = torch.cat([new[:1], new[1:2]], 1), torch.cat([old[:1], old[1:2]], 1)
    assert float(attention_distance(*two_queries, [(0, 0)])) == pytest.approx(first / 2, abs=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    values = [f"method.{key}={value}" for key, value in GOOD.items()]
    return run_tiny(tmp_path_factory.mktemp("seekr"), ["method=seekr", ORDER, *values])


def batch_of(run, *examples):
    return collate(run.ctx.encode(examples))


def attention_of(model, batch):
    names = ("input_ids", "attention_mask")
    output = model(**{name: batch[name] for name in names}, use_cache=False, output_attentions=True)
    return output.logits, output.attentions


def test_kept_attention_and_logits_are_the_models_at_stage_end(run):
    """The last task's rows: nothing trained since, so recomputing gives the same up to fp16 (relative 2^-11)."""
    kept = {name: one for name, one in run.method.memory.items() if name.startswith("20Minuten/")}
    assert len(kept) == 3 and len(run.method.memory) == 9  # half of 6 rows a task
    for one in kept.values():
        batch = batch_of(run, one.example)
        logits, attention = attention_of(run.ctx.model.eval(), batch)
        assert len(one.queries) == 20 == len(set(one.queries)) and one.queries == sorted(one.queries)
        expected = torch.stack([attention[layer][0, head][one.queries] for layer, head in one.heads])
        assert one.attention.shape == expected.shape == (3, 20, batch["input_ids"].shape[1])
        assert torch.allclose(one.attention.float(), expected, atol=1e-6, rtol=2**-11)
        expected = logits[0, :-1][batch["labels"][0, 1:] != -100]
        assert torch.allclose(one.logits.float(), expected, atol=1e-6, rtol=2**-11)


def test_sensitivity_is_the_squared_gradient_by_attention_weights(run, monkeypatch):
    """Central differences: each weight of each head is moved by hand inside the attention, in fp64."""
    from transformers.models.llama import modeling_llama

    model = run.ctx.model
    example = replace(run.data.tasks["FOMC"].train[0], prompt="ab", answer="c")
    batch = batch_of(run, example)
    length = batch["input_ids"].shape[1]
    moved: dict[str, Any] = {"layer": None}

    def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
        scores = query @ key.transpose(2, 3) * scaling
        causal = torch.ones(length, length).triu(1).bool()
        weights = scores.masked_fill(causal, -math.inf).softmax(-1)
        if module.layer_idx == moved["layer"]:
            change = torch.zeros_like(weights)
            change[0, moved["head"], moved["query"], moved["key"]] = moved["by"]
            weights = weights + change
        return (weights @ value).transpose(1, 2).contiguous(), weights

    def loss(**change) -> float:
        moved.update(change)
        logits, _ = attention_of(model, batch)
        return F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:]).item()

    model.double().eval()
    try:
        _, _, found = measure(run.ctx, batch)
        monkeypatch.setattr(modeling_llama, "eager_attention_forward", attend)
        expected = torch.zeros(2, 2, dtype=torch.float64)
        for layer in range(2):
            for head in range(2):
                for query in range(length):
                    for key in range(length):
                        place = {"layer": layer, "head": head, "query": query, "key": key}
                        slope = (loss(**place, by=1e-2) - loss(**place, by=-1e-2)) / 2e-2
                        expected[layer, head] += slope**2 / length**2
    finally:
        model.float()
    assert float(expected.min()) > 0
    assert torch.allclose(found.double(), expected, rtol=1e-3)


def test_importance_is_sensitivity_times_change_summed_over_tasks(run):
    """A stage whose "training" is noise added to the weights, against the definitions written out."""
    ctx = run.ctx
    method: Any = SelectiveAttention(**GOOD)
    weights = {name: weight.detach().clone() for name, weight in ctx.model.state_dict().items()}
    ctx.model.eval()
    ctx.model.zero_grad()  # what the last fit left
    total = torch.zeros(2, 2)
    try:
        for task in ("FOMC", "NumGLUE-cm"):
            ctx.task = run.views[task]
            method.begin_stage(ctx)
            chosen = [(example, queries) for example, queries, _ in method._chosen]
            before = [attention_of(ctx.model, batch_of(run, example))[1] for example, _ in chosen]
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for weight in ctx.model.parameters():
                    weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
            sensitivity, change = torch.zeros(2, 2), torch.zeros(2, 2)
            for (example, queries), old in zip(chosen, before, strict=True):
                batch = batch_of(run, example)
                logits, new = attention_of(ctx.model, batch)
                loss = F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:])
                slopes = torch.autograd.grad(loss, new)
                for layer in range(2):
                    for head in range(2):
                        sensitivity[layer, head] += (slopes[layer][0, head] ** 2).mean()
                        difference = (new[layer] - old[layer])[0, head, queries]
                        change[layer, head] += (difference**2).mean() / len(chosen)
            total += (sensitivity / sensitivity.sum(1, keepdim=True) * change).detach()
            method.end_stage(ctx)
            assert torch.allclose(method.importance, total, rtol=1e-4)
            heads = [one.heads for name, one in method.memory.items() if name.startswith(task)]
            assert heads == [choose_heads(total, 2, 3)] * 3
        assert float(total.min()) > 0 and not ctx.model.training
        assert all(weight.grad is None for weight in ctx.model.parameters())
    finally:
        ctx.model.load_state_dict(weights)
        ctx.task = run.views["20Minuten"]


def test_losses_by_hand(run):
    """One new row and two kept ones, padded to one length: each row's part written out, shares 1/3 and 2/3.

    The weights are first moved away from where the rows were kept.
    """
    ctx, method = run.ctx, run.method
    weights = {name: weight.detach().clone() for name, weight in ctx.model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in ctx.model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    try:
        with torch.no_grad():
            check_losses(run, ctx, method)
    finally:
        ctx.model.load_state_dict(weights)


def check_losses(run, ctx, method):
    new = run.data.tasks["20Minuten"].train[0]
    kept = [next(one for name, one in method.memory.items() if name.startswith(task)) for task in ("FOMC", "NumGLUE")]
    ctx.model.eval()
    terms = method.losses(ctx, batch_of(run, kept[0].example, new, kept[1].example))

    def row(example):
        batch = batch_of(run, example)
        logits, attention = attention_of(ctx.model, batch)
        mask = batch["labels"][0, 1:] != -100
        return logits[0, :-1][mask], batch["labels"][0, 1:][mask], attention

    assert set(terms) == {"lm", "seekr_replay", "seekr_logits", "seekr_attention"} == set(method.terms)
    logits, labels, _ = row(new)
    assert float(terms["lm"]) == pytest.approx(float(F.cross_entropy(logits, labels)) / 3, rel=1e-5)
    ce = kl = distance = 0.0
    tokens = 0
    for one in kept:
        logits, labels, attention = row(one.example)
        own, old = logits.log_softmax(-1), one.logits.float().log_softmax(-1)
        ce += float(-own[range(len(labels)), labels].sum())
        kl += float((old.exp() * (old - own)).sum())
        tokens += len(labels)
        layers: dict[int, list[float]] = {}
        for number, (layer, head) in enumerate(one.heads):
            now, then = attention[layer][0, head][one.queries].double(), one.attention[number].double()
            then = then / then.sum(1, keepdim=True)
            rows = torch.where(then > 0, then * (then.clamp_min(1e-30).log() - (now + 1e-8).log()), 0.0).sum(-1)
            layers.setdefault(layer, []).append(float(rows.mean()))
        distance += sum(sum(found) / len(found) for found in layers.values()) / len(layers) / 2
    assert float(terms["seekr_replay"]) == pytest.approx(0.5 * ce / tokens * 2 / 3, rel=1e-5)
    assert float(terms["seekr_logits"]) == pytest.approx(0.5 * kl / tokens * 2 / 3, rel=1e-4)
    assert float(terms["seekr_attention"]) == pytest.approx(10.0 * distance * 2 / 3, rel=1e-4)
    # New rows alone: nothing replayed. Kept rows alone: nothing new.
    alone = method.losses(ctx, batch_of(run, new))
    assert [float(alone[name]) for name in method.terms[1:]] == [0.0, 0.0, 0.0]
    assert float(method.losses(ctx, batch_of(run, kept[0].example))["lm"]) == 0.0


def test_same_kept_rows_by_seed(run):
    ctx = run.ctx
    chosen = []
    for seed in (0, 0, 1):
        method: Any = SelectiveAttention(**GOOD)
        data_seed, ctx.data_seed = ctx.data_seed, seed
        ctx.enter(Stage(1, "FOMC", 0, 0, 0, 0, ""), run.views["FOMC"])
        ctx.data_seed = data_seed
        method.begin_stage(ctx)
        chosen.append([(example.id, queries) for example, queries, _ in method._chosen])
    ctx.enter(Stage(3, "20Minuten", 0, 0, 0, 0, ""), run.views["20Minuten"])
    assert chosen[0] == chosen[1] != chosen[2]


def test_plan_counts_kept_rows(run):
    assert [stage["rows"] for stage in run.results["stages"]] == [6, 9, 12]
    assert [len(phase.examples) for phase in run.method.phases(run.ctx)] == [6 + 9]  # asked again after the last stage


def test_loaded_state_gives_the_same_losses(run):
    fresh: Any = SelectiveAttention(**GOOD)
    fresh.load_state_dict(run.method.state_dict())
    batch = batch_of(run, *(one.example for one in run.method.memory.values()))
    first, second = run.method.losses(run.ctx, batch), fresh.losses(run.ctx, batch)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("extra", [[], ["tuning=lora", "tuning.target_modules=[v_proj]"]])
def test_checkpointing_changes_nothing(extra, tmp_path):
    """Distilled attention trains through recomputed activations, and with adapters on the values alone."""
    runs = []
    for flag in ("false", "true"):
        torch.manual_seed(0)  # for the adapter's first weights
        runs.append(run_tiny(tmp_path / flag, ["method=seekr", ORDER, f"model.gradient_checkpointing={flag}", *extra]))
    assert all(runs[0].terms[stage] == pytest.approx(runs[1].terms[stage], rel=1e-3) for stage in (1, 2, 3))
    for name, weight in runs[0].weights_after.items():
        assert torch.allclose(weight, runs[1].weights_after[name], atol=1e-6)


def test_logits_can_be_left_out():
    method = SelectiveAttention(**{**GOOD, "logits_weight": 0.0})
    assert method.terms == ("lm", "seekr_replay", "seekr_attention")


def test_model_without_eager_attention_is_named():
    def refuse(kind):
        raise ValueError("no eager here")

    ctx: Any = SimpleNamespace(model=SimpleNamespace(set_attn_implementation=refuse))
    with pytest.raises(MethodError, match="no eager here"):
        SelectiveAttention(**GOOD).setup(ctx)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fraction", 0.0),
        ("fraction", 1.1),
        ("logits_weight", 1.0),
        ("attention_weight", 0),
        ("layers", 0),
        ("heads", 0),
        ("queries", 0),
    ],
)
def test_bad_values_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"method.{key}={value}"):
        SelectiveAttention(**{**GOOD, key: value})


def test_yaml_holds_the_authors_values():
    method: Any = build.validate(compose_config(["model=tiny", "method=seekr"])).method
    values = (method.fraction, method.logits_weight, method.attention_weight, method.layers, method.heads)
    assert values == (0.01, 0.5, 1000, 24, 128) and method.queries == 100
