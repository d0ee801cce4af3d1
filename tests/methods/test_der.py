"""Kept logits are the model's own, both replay terms by hand, the reservoir is fair, and draws are seeded."""

import copy
from math import e, log
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import run_tiny
from torch import nn

from trace_hydra.data.batches import collate
from trace_hydra.data.encode import EncodedRow
from trace_hydra.data.task import Example
from trace_hydra.errors import ConfigError, MethodError
from trace_hydra.methods.der import DER
from trace_hydra.methods.distill import batch_of

ONE = "task_order=[FOMC]"
THREE = "task_order=[FOMC,NumGLUE-cm,20Minuten]"


def der(buffer_size: int = 500, alpha: float = 0.2, beta: float = 0.5, replay_batch_size: int | None = None) -> DER:
    return DER(buffer_size=buffer_size, alpha=alpha, beta=beta, replay_batch_size=replay_batch_size)


def rows(count: int, name: str) -> tuple[Example, ...]:
    return tuple(Example(f"{name}-{number}", f"prompt {number}", str(number)) for number in range(count))


def toy(method: DER, logits: list[list[float]], kept: list[list[float]], label: int) -> tuple[Any, nn.Parameter]:
    """A context whose model gives `logits` (one position each) for the one kept row; its own task has loss 7."""
    weight = nn.Parameter(torch.tensor(logits))
    ctx: Any = SimpleNamespace(
        device="cpu",
        rng=Random(0),
        stage=SimpleNamespace(index=2),
        task=SimpleNamespace(name="b"),
        lm_loss=lambda batch: torch.tensor(7.0),
        label_logits=lambda batch: (weight, torch.tensor([label] * len(logits))),
        encode=lambda examples: [EncodedRow(np.arange(4, dtype=np.int32), 3, False, one.id) for one in examples],
    )
    method.rows, method.logits = list(rows(1, "a")), [torch.tensor(kept, dtype=torch.float16)]
    method.begin_stage(ctx)
    return ctx, weight


BATCH = {"example_ids": ["train-0"]}


def test_terms_and_gradient_by_hand():
    """Kept z = (1, 2), now h = (2, 4), label 0; alpha 1/5, beta 1/2.

    alpha * ((2 - 1)^2 + (4 - 2)^2) / 2 = 0.2 * 2.5 = 0.5; gradient 0.2 * (h - z) = (0.2, 0.4)
    beta * (ln(e^2 + e^4) - 2) = 0.5 * ln(1 + e^2) = 1.063464
    """
    method = der()
    ctx, weight = toy(method, [[2.0, 4.0]], [[1.0, 2.0]], 0)
    terms = method.losses(ctx, BATCH)
    assert list(terms) == ["lm", "der_logits", "der_labels"] == list(method.terms)
    assert terms["lm"].item() == 7.0 and terms["der_logits"].item() == pytest.approx(0.5)
    assert terms["der_labels"].item() == pytest.approx(0.5 * log(1 + e**2))
    terms["der_logits"].backward()
    assert weight.grad is not None and torch.allclose(weight.grad, torch.tensor([[0.2, 0.4]]))


def test_terms_are_means_over_answer_tokens():
    """Two positions at distance (0, 0) and (4, 0): 0.2 * 16 / 4 = 0.8; more tokens do not weigh more."""
    method = der()
    ctx, _ = toy(method, [[1.0, 2.0], [5.0, 3.0]], [[1.0, 2.0], [1.0, 3.0]], 1)
    assert method.losses(ctx, BATCH)["der_logits"].item() == pytest.approx(0.8)


def test_beta_zero_is_plain_der():
    method = der(beta=0.0)
    ctx, _ = toy(method, [[2.0, 4.0]], [[1.0, 2.0]], 0)
    assert list(method.losses(ctx, BATCH)) == ["lm", "der_logits"] == list(method.terms)


def test_kept_logits_of_another_shape_are_an_error():
    method = der()
    ctx, _ = toy(method, [[2.0, 4.0]], [[1.0, 2.0], [1.0, 2.0]], 0)
    with pytest.raises(MethodError, match=r"stage 2 \(b\): kept logits of \['a-0'\] are \(2, 2\)"):
        method.losses(ctx, BATCH)


def test_reservoir_keeps_every_row_with_the_same_probability():
    """30, 20 and 10 rows into 12 places: each of the 60 stays with probability 1/5, whatever task it is of.

    2,000 seeds: 400 +- 18 (one standard deviation) each; all within 5 of them, and tasks 6, 4, 2 rows on average.
    """
    counts: dict[str, int] = {}
    for seed in range(2000):
        method, rng = der(buffer_size=12), Random(seed)
        for name, count in (("a", 30), ("b", 20), ("c", 10)):
            method._reservoir(rows(count, name), rng)
            assert len(method.rows) == 12 == len(set(method.rows))
        assert method.num_seen == 60
        for row in method.rows:
            counts[row.id] = counts.get(row.id, 0) + 1
    assert len(counts) == 60 and all(abs(count - 400) < 90 for count in counts.values())
    by_task = [sum(count for one, count in counts.items() if one[0] == name) / 2000 for name in "abc"]
    assert by_task == pytest.approx([6.0, 4.0, 2.0], abs=0.2)


def test_a_reservoir_of_one_row_is_a_fair_draw():
    """1 of 3 rows, 3,000 seeds: 1,000 +- 26 each; an index drawn from one too few would always drop the first row."""
    kept = []
    for seed in range(3000):
        method = der(buffer_size=1)
        method._reservoir(rows(3, "a"), Random(seed))
        kept.append(method.rows[0].id)
    assert all(abs(kept.count(f"a-{number}") - 1000) < 130 for number in range(3))


def test_reservoir_reports_the_places_that_changed():
    method = der(buffer_size=4)
    assert method._reservoir(rows(3, "a"), Random(0)) == [0, 1, 2]
    before = list(method.rows)
    changed = method._reservoir(rows(50, "b"), Random(0))
    assert changed == [slot for slot in range(4) if slot >= 3 or method.rows[slot] != before[slot]]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_kept_logits_are_the_models_own_at_the_end_of_the_rows_stage(tmp_path, tuning):
    """Each row's logits equal transformers' full logits at its labels, of the model its stage left, to fp16 rounding.

    9 of 18 rows stay, so later rows replace earlier ones together with their logits. The last model gives others.
    """
    models = {}
    end_stage = DER.end_stage

    def watch(method, ctx):
        models[ctx.task.name] = copy.deepcopy(ctx.model).eval()
        end_stage(method, ctx)

    with patch.object(DER, "end_stage", watch):
        run = run_tiny(
            tmp_path,
            ["method=der", "method.buffer_size=9", THREE, f"tuning={tuning}", "optim.optimizer.lr=0.02"],
        )
    home = {row: name for name in models for row in run.data.tasks[name].train}
    assert len(run.method.rows) == len(run.method.logits) == 9 and run.method.num_seen == 18
    names = [home[row] for row in run.method.rows]
    assert len(set(names)) == 3
    moved = []
    for name, row, kept in zip(names, run.ctx.encode(run.method.rows), run.method.logits, strict=True):
        batch = collate([row])
        with torch.no_grad():
            own, last = (model(input_ids=batch["input_ids"]).logits[0] for model in (models[name], run.ctx.model))
        assert kept.dtype == torch.float16 and kept.shape == (len(row.ids) - row.num_prompt, own.shape[-1])
        assert torch.allclose(kept.float(), own[row.num_prompt - 1 : -1], atol=2e-3)
        if name != "20Minuten":
            moved.append(float((kept.float() - last[row.num_prompt - 1 : -1]).abs().max()))
    assert min(moved) > 4e-3


def watch_draws(tmp_path, overrides) -> tuple[list[list[str]], Any]:
    """Ids of the rows replayed at each step, and the run."""
    drawn: list[list[str]] = []

    def watch(chosen, device):
        drawn.append([row.example_id for row in chosen])
        return batch_of(chosen, device)

    with patch("trace_hydra.methods.der.batch_of", watch):
        run = run_tiny(tmp_path, ["method=der", THREE, *overrides])
    return drawn, run


def test_draws_are_seeded_and_as_large_as_the_batch(tmp_path):
    """6 rows in micro-batches of 2, stages 2 and 3: six draws of two different rows; seed.data decides which."""
    first, _ = watch_draws(tmp_path / "a", ["seed=0"])
    again, _ = watch_draws(tmp_path / "b", ["seed=0"])
    other, _ = watch_draws(tmp_path / "c", ["seed=1"])
    assert first == again != other
    assert [len(one) for one in first] == [2] * 6


def test_replay_batch_size_is_bounded_by_what_is_kept(tmp_path):
    drawn, run = watch_draws(tmp_path, ["method.replay_batch_size=4", "method.buffer_size=3"])
    assert [len(one) for one in drawn] == [3] * 6 and len(run.method.rows) == 3


def test_only_rows_of_earlier_tasks_are_replayed(tmp_path):
    kept = {}
    begin = DER.begin_stage

    def watch(method, ctx):
        begin(method, ctx)
        kept[ctx.stage.index] = set(method.rows)

    with patch.object(DER, "begin_stage", watch):
        run = run_tiny(tmp_path, ["method=der", THREE])
    train = [set(run.data.tasks[name].train) for name in ("FOMC", "NumGLUE-cm", "20Minuten")]
    assert kept == {1: set(), 2: train[0], 3: train[0] | train[1]}


def test_first_stage_is_plain_fine_tuning(tmp_path):
    run = run_tiny(tmp_path / "a", ["method=der", ONE])
    plain = run_tiny(tmp_path / "b", ["method=seqft", ONE])
    assert run.terms[1]["der_logits"] == run.terms[1]["der_labels"] == 0.0
    assert all(torch.equal(weight, plain.weights_after[name]) for name, weight in run.weights_after.items())


def test_state_gives_rows_and_logits_back(tmp_path):
    run = run_tiny(tmp_path, ["method=der", THREE])
    fresh = der()
    fresh.load_state_dict(run.method.state_dict())
    assert fresh.rows == run.method.rows and fresh.num_seen == 18
    assert all(torch.equal(one, other) for one, other in zip(fresh.logits, run.method.logits, strict=True))


@pytest.mark.parametrize(
    ("key", "value"), [("buffer_size", 0), ("alpha", 0.0), ("beta", -0.1), ("replay_batch_size", 0)]
)
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(ConfigError, match=rf"method\.{key}={value}"):
        der(**{key: value})
