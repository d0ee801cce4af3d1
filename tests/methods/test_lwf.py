"""Distillation by hand: direction, temperature, top-k with its rest; what is recorded, when and for which positions."""

import copy
from dataclasses import replace
from math import log
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import run_tiny

from trace_hydra.context import StageContext
from trace_hydra.data.encode import EncodedRow
from trace_hydra.errors import ConfigError, MethodError
from trace_hydra.methods import distill
from trace_hydra.methods.distill import SoftTargets, batch_of, kd_from_topk, labels_per_row, record_rows, soften
from trace_hydra.methods.lwf import LwF
from trace_hydra.models.forward import lm_loss

TWO = "task_order=[FOMC,20Minuten]"


def logits_of(*rows: list[float]) -> torch.Tensor:
    """Logits whose softmax is the given probabilities."""
    return torch.tensor(rows).log()


def kd(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0, top_k: int | None = None) -> float:
    return kd_from_topk(student, soften(teacher, temperature, top_k), temperature).item()


def test_direction_by_hand():
    """Teacher (1/2, 1/2), student (3/4, 1/4), T = 1: KL(teacher || student) = ln(2 / sqrt(3)) = 0.143841 nats.

    The other direction, which official TRACE takes, is 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812.
    """
    teacher, student = logits_of([0.5, 0.5]), logits_of([0.75, 0.25])
    assert kd(student, teacher) == pytest.approx(0.143841, abs=1e-6)
    assert kd(teacher, student) == pytest.approx(0.130812, abs=3e-4)


def test_temperature_by_hand():
    """Teacher logits (ln 4, 0) are (2/3, 1/3) at T = 2, the student (1/2, 1/2).

    4 * (2/3 ln(4/3) + 1/3 ln(2/3)) = 4 * 0.056633 = 0.226532.
    """
    teacher = torch.tensor([[log(4.0), 0.0]])
    assert kd(torch.zeros(1, 2), teacher, temperature=2.0) == pytest.approx(0.226532, rel=1e-3)


def test_gradient_by_hand():
    """T (q - p) / positions: T = 2, p = (2/3, 1/3), q = (1/2, 1/2), two positions: (-1/6, 1/6) each; none to p."""
    student = torch.zeros(2, 2, requires_grad=True)
    teacher = torch.tensor([[log(4.0), 0.0]] * 2, requires_grad=True)
    kd_from_topk(student, soften(teacher, 2.0, None), 2.0).backward()
    assert student.grad is not None and teacher.grad is None
    assert torch.allclose(student.grad, torch.tensor([[-1 / 6, 1 / 6]] * 2), atol=1e-4)


@pytest.mark.parametrize(("top_k", "expected"), [(1, 0.143841), (2, 0.218012), (4, 0.244174), (None, 0.244174)])
def test_top_k_with_the_rest_as_one_bucket_by_hand(top_k, expected):
    """Teacher (1/20, 1/2, 3/10, 3/20), student uniform; the likeliest tokens stand second and third.

    k = 1: 1/2 ln 2 + 1/2 ln((1/2) / (3/4)) = 0.143841
    k = 2: 1/2 ln 2 + 3/10 ln(6/5) + 1/5 ln((1/5) / (1/2)) = 0.346574 + 0.054696 - 0.183258 = 0.218012
    all:   1/2 ln 2 + 3/10 ln(6/5) + 3/20 ln(3/5) + 1/20 ln(1/5) = 0.401270 - 0.076624 - 0.080472 = 0.244174
    """
    teacher, student = logits_of([0.05, 0.5, 0.3, 0.15]), torch.zeros(1, 4)
    assert kd(student, teacher, top_k=top_k) == pytest.approx(expected, abs=2e-4)


def test_without_a_rest_bucket_mass_could_move_unseen():
    """k = 1, teacher (1/2, 1/4, 1/4), student (1/10, 9/20, 9/20): renormalised over the kept token alone both are 1."""
    value = kd(logits_of([0.1, 0.45, 0.45]), logits_of([0.5, 0.25, 0.25]), top_k=1)
    assert value == pytest.approx(0.5 * log(5) + 0.5 * log(0.5 / 0.9), abs=3e-4)


def random_pair(positions: int = 40, vocab: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(positions, vocab, generator=generator)
    return teacher + torch.randn(positions, vocab, generator=generator), teacher


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_equals_torchs_kl_and_top_k_is_a_growing_lower_bound(temperature):
    student, teacher = random_pair()
    exact = temperature**2 * torch.nn.functional.kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="batchmean"
    )
    assert kd(student, teacher, temperature) == pytest.approx(exact.item(), rel=2e-3)
    assert kd(student, teacher, temperature, top_k=200) == kd(student, teacher, temperature)
    bounds = [kd(student, teacher, temperature, top_k) for top_k in (1, 8, 64, 199)]
    assert bounds == sorted(bounds) and bounds[0] > 0 and bounds[-1] == pytest.approx(exact.item(), rel=2e-3)


def test_a_model_is_at_distance_zero_from_itself():
    """Rounding to fp16 leaves less than 1e-5 nats, whole or top-k; hard certainties and huge logits stay finite."""
    student, _ = random_pair()
    for top_k in (None, 64):
        assert 0 <= kd(student, student, 2.0, top_k) < 1e-5
    hard = torch.tensor([[1e5, 0.0, -1e5], [0.0, 0.0, 300.0]])
    for top_k in (None, 1):
        assert kd(hard, hard, 1.0, top_k) == pytest.approx(0.0, abs=1e-6)


def test_bytes_of_a_record():
    """6 * 64 + 4 bytes a position at top_k=64, 2 * vocabulary without."""
    _, teacher = random_pair(10, 200)

    def size(targets: SoftTargets) -> int:
        parts = (targets.log_probs, targets.tokens, targets.log_rest)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    assert size(soften(teacher, 2.0, 64)) == 10 * 388 and size(soften(teacher, 2.0, None)) == 10 * 400


def test_no_positions_give_zero():
    empty = torch.zeros(0, 5, requires_grad=True)
    value = kd_from_topk(empty, soften(empty, 2.0, 2), 2.0)
    value.backward()
    assert value.item() == 0.0


def watched(tmp_path, overrides, at_begin=None, at_loss=None):
    """Run LwF; `at_begin` is called behind begin_stage with what it got, `at_loss` behind losses, with the terms."""
    begin, losses = LwF.begin_stage, LwF.losses

    def watch_begin(method, ctx):
        begin(method, ctx)
        if at_begin:
            at_begin(method, ctx)

    def watch_losses(method, ctx, batch):
        terms = losses(method, ctx, batch)
        if at_loss:
            at_loss(method, ctx, batch, terms)
        return terms

    with patch.object(LwF, "begin_stage", watch_begin), patch.object(LwF, "losses", watch_losses):
        return run_tiny(tmp_path, ["method=lwf", *overrides])


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_term_equals_a_teacher_kept_in_memory(tmp_path, top_k, tuning):
    """A copy of the model at the start of stage 2, run on each batch; KL token by token in float64, labels only.

    Batches hold rows of different length, so padding is there to be left out.
    """
    teachers, checked = {}, []

    def at_begin(method, ctx):
        teachers[ctx.stage.index] = copy.deepcopy(ctx.model).eval()

    def at_loss(method, ctx, batch, terms):
        if ctx.stage.index < 2:
            assert terms["lwf"].item() == 0.0
            return
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with torch.no_grad():
            teacher = teachers[ctx.stage.index](**given).logits.double() / 2
            student = ctx.model(**given).logits.double() / 2
        values = []
        for row, position in (batch["labels"] != -100).nonzero().tolist():
            p, q = teacher[row, position - 1].softmax(0), student[row, position - 1].softmax(0)
            if top_k:
                order = p.argsort(descending=True)
                p, q = p[order], q[order]
                p = torch.cat([p[:top_k], p[top_k:].sum()[None]])
                q = torch.cat([q[:top_k], q[top_k:].sum()[None]])
            values.append((p * (p / q).log()).sum().item())
        expected = 0.5 * 4 * sum(values) / len(values)
        checked.append((terms["lwf"].item(), expected, int(batch["attention_mask"].min())))
        assert terms["lm"].item() == pytest.approx(lm_loss(ctx.model, dict(batch)).item(), rel=1e-5)

    watched(
        tmp_path,
        [
            "task_order=[FOMC,NumGLUE-cm]",
            f"tuning={tuning}",
            f"method.top_k={'null' if top_k is None else top_k}",
            "method.weight=0.5",
            "budget.default_epochs=3",
            *(["tuning.dropout=0", "optim.optimizer.lr=0.1"] if tuning == "lora" else ["optim.optimizer.lr=0.01"]),
        ],
        at_begin,
        at_loss,
    )
    assert len(checked) == 9 and min(padded for _, _, padded in checked) == 0
    assert max(value for value, _, _ in checked) > 1e-4  # fifty times the tolerance below
    for value, expected, _ in checked:
        assert value == pytest.approx(expected, rel=0.02, abs=2e-6)


def test_zero_at_the_first_step_and_not_later(tmp_path):
    """The student is the teacher until the first optimizer step (two micro-batches): only fp16 rounding is left."""
    values = []

    def at_loss(method, ctx, batch, terms):
        if ctx.stage.index == 2:
            values.append(terms["lwf"].item())

    watched(tmp_path, [TWO, "budget.default_epochs=2"], at_loss=at_loss)
    assert max(values[:2]) < 1e-6 and min(values[2:]) > 20 * max(map(abs, values[:2]))


def test_record_is_of_this_stage_in_eval_mode_without_gradient(tmp_path):
    """LoRA's dropout is off while the teacher speaks, no gradient is kept, every row is there once.

    There is no record in stage 1, and none is left behind the last stage.
    """
    calls, records = [], {}
    label_logits = StageContext.label_logits
    recording = []

    def watch(ctx, batch):
        if recording:
            calls.append((ctx.model.training, torch.is_grad_enabled()))
        return label_logits(ctx, batch)

    def watch_record(ctx, rows, keep):
        recording.append(True)
        kept = record_rows(ctx, rows, keep)
        recording.clear()
        return kept

    def at_begin(method, ctx):
        records[ctx.stage.index] = dict(method.targets)

    with (
        patch.object(StageContext, "label_logits", watch),
        patch("trace_hydra.methods.lwf.record_rows", watch_record),
    ):
        run = watched(tmp_path, [TWO, "tuning=lora"], at_begin)
    assert calls and set(calls) == {(False, False)}
    assert records[1] == {} and run.method.targets == {}
    rows = run.ctx.encode(run.data.tasks["20Minuten"].train)
    assert {name: len(kept.log_probs) for name, kept in records[2].items()} == {
        row.example_id: len(row.ids) - row.num_prompt for row in rows
    }
    assert all(not kept.log_probs.requires_grad for kept in records[2].values())


@pytest.mark.parametrize(("batch_tokens", "max_labels"), [(1, 1024), (300, 1024), (10**6, 20), (10**6, 1024)])
def test_recording_does_not_depend_on_how_rows_are_dealt_out(tmp_path, monkeypatch, batch_tokens, max_labels):
    """Row by row, a few at a time or all at once: the same logits in the order of the rows; the mode comes back."""
    run = run_tiny(tmp_path, ["method=lwf", "task_order=[20Minuten]"])
    rows = run.ctx.encode(run.data.tasks["20Minuten"].train)
    expected = [run.ctx.label_logits(batch_of([row], "cpu"))[0] for row in rows]
    monkeypatch.setattr(distill, "_MAX_LABELS", max_labels)
    run.ctx.batch_tokens = batch_tokens

    def keep(logits: torch.Tensor) -> torch.Tensor:
        assert not run.ctx.model.training and not torch.is_grad_enabled()
        return logits.clone()

    for mode in (True, False):
        run.ctx.model.train(mode)
        kept = record_rows(run.ctx, rows, keep)
        assert run.ctx.model.training is mode
        assert len(kept) == 6 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(kept, expected, strict=True))


def test_a_row_with_another_number_of_labels_is_an_error():
    method = LwF(temperature=2.0, weight=1.0, top_k=2)
    method.targets = {"train-0": soften(torch.zeros(3, 5), 2.0, 2)}
    batch = batch_of([EncodedRow(np.arange(6, dtype=np.int32), 4, False, "train-0")], "cpu")
    assert labels_per_row(batch) == [2]
    ctx: Any = SimpleNamespace(
        stage=SimpleNamespace(index=2),
        task=SimpleNamespace(name="FOMC"),
        label_logits=lambda batch: (torch.zeros(2, 5), torch.tensor([4, 4])),
    )
    with pytest.raises(MethodError, match=r"stage 2 \(FOMC\): row train-0 has 2 answer tokens, the record 3"):
        method.losses(ctx, batch)
    method.targets = {"train-1": method.targets["train-0"]}
    with pytest.raises(MethodError, match="row train-0 has 2 answer tokens, the record none of it"):
        method.losses(ctx, batch)


def test_ids_that_repeat_within_a_task_are_an_error(tmp_path):
    run = run_tiny(tmp_path, ["method=lwf", TWO])
    task = run.views["20Minuten"]
    run.ctx.task = replace(task, train=(*task.train, task.train[0]))
    with pytest.raises(MethodError, match="7 train rows have 6 different ids"):
        run.method.begin_stage(run.ctx)


@pytest.mark.parametrize(("key", "value"), [("temperature", 0.0), ("weight", 0.0), ("weight", -1.0), ("top_k", 0)])
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(ConfigError, match=rf"method\.{key}={value}"):
        LwF(**{"temperature": 2.0, "weight": 1.0, "top_k": 64, key: value})
