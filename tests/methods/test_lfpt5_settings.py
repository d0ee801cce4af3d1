"""LFPT5's settings: weights of the losses by hand, stages without pseudo rows or KL, values that are refused."""

import logging
from math import log
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import run_tiny
from lfpt5_run import BASE, TASKS, watched

from trace_hydra.errors import ConfigError
from trace_hydra.methods.distill import soften
from trace_hydra.methods.lfpt5 import LFPT5
from trace_hydra.models.generate import Generated

GOOD: dict[str, Any] = {
    "prompt_length": 4,
    "lambda_lm": 0.1,
    "lambda_kl": 0.04,
    "fraction": 0.5,
    "draft_tokens": 40,
    "instruction": True,
    "temperature": 1.0,
    "top_p": 0.95,
    "generate_rows": 4,
    "top_k": None,
}


def toy(**changes):
    """A method that was taught (1/2, 1/2) at both answer tokens of a pseudo row, and a batch that begins with another.

    The model now says (3/4, 1/4) at the pseudo row's two tokens and (9/10, 1/10) at the other row's one.
    """
    method = LFPT5(**{**GOOD, **changes})
    probabilities = [[0.9, 0.1], [0.75, 0.25], [0.75, 0.25]]
    logits = torch.tensor(probabilities).log().requires_grad_()
    method.targets = {"pseudo-A-0": soften(torch.zeros(2, 2), 1.0, None)}
    labels = torch.tensor([[-100, 0, -100], [-100, 1, 1]])
    ids = torch.zeros(2, 3, dtype=torch.long)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": ids + 1, "example_ids": ["train-0", "pseudo-A-0"]}
    method.drafts = {row: None for row in batch["example_ids"]}  # type: ignore[misc]
    ctx: Any = SimpleNamespace(
        label_logits=lambda batch: (logits, torch.tensor([0, 1, 1])), lm_loss=lambda batch: torch.tensor(3.0)
    )
    with patch("trace_hydra.methods.lfpt5.batch_of", lambda rows, device: {}):
        return method.losses(ctx, batch), logits


def test_kl_direction_value_and_weights_by_hand():
    """KL((1/2, 1/2) || (3/4, 1/4)) = ln(2 / sqrt(3)) = 0.143841; the other way round it is 0.130812.

    lm = -(ln 0.9 + 2 ln 0.25) / 3 = 0.959309. d kl / d logits = lambda (q - p) / 2: 0.02 * (1/4, -1/4) = 0.005.
    """
    terms, logits = toy()
    assert terms["kl"].item() == pytest.approx(0.04 * 0.143841, rel=1e-4)
    assert terms["generation"].item() == pytest.approx(0.1 * 3.0) and list(terms) == ["lm", "generation", "kl"]
    assert terms["lm"].item() == pytest.approx(-(log(0.9) + 2 * log(0.25)) / 3)
    terms["kl"].backward()
    expected = torch.tensor([[0.0, 0.0], [0.005, -0.005], [0.005, -0.005]])
    assert logits.grad is not None and torch.allclose(logits.grad, expected, atol=1e-6)
    heavy, _ = toy(lambda_kl=0.08, lambda_lm=0.3)
    assert heavy["kl"].item() == pytest.approx(0.08 * 0.143841, rel=1e-4)
    assert heavy["generation"].item() == pytest.approx(0.9) and heavy["lm"].item() == terms["lm"].item()
    none, _ = toy(lambda_kl=0.0)
    assert list(none) == ["lm", "generation"]


def test_without_any_pseudo_row_the_stage_teaches_its_own(tmp_path, caplog):
    """A model that writes nothing: two warnings in stage 2, three in stage 3, finite terms, no row made."""

    def nothing(engine, model, tokenizer, prompts, **settings):
        return [Generated("", len(ids), 1, True) for ids in prompts]

    taught = {}
    with (
        patch("trace_hydra.engines.hf.HF.generate", nothing),
        caplog.at_level(logging.WARNING, "trace_hydra.methods.lfpt5"),
    ):
        run = watched(tmp_path, at_begin=lambda method, ctx: taught.update({ctx.stage.index: set(method.targets)}))
    assert taught == {1: set(), **{n: {row.id for row in run.data.tasks[TASKS[n - 1]].train} for n in (2, 3)}}
    assert not any(run.made_prompts.values()) and len(caplog.messages) == 5
    assert "stage 3 (20Minuten): no pseudo row of NumGLUE-cm is left" in caplog.text
    assert all(0 < abs(run.terms[stage]["kl"]) < 10 for stage in (2, 3))


def test_without_kl_nothing_is_recorded(tmp_path):
    recorded = []
    run = watched(tmp_path, ["method.lambda_kl=0"], lambda method, ctx: recorded.append(len(method.targets)))
    assert recorded == [0, 0, 0] and run.method.terms == ("lm", "generation") and run.made_prompts[3]
    assert all(set(terms) == {"lm", "generation"} for terms in run.terms.values())


def test_rows_per_pass_is_what_is_trained_on():
    """Half of 7 is 4 and of 10 is 5: 7, 10 + 4, 3 + 4 + 5."""
    assert [LFPT5(**GOOD).rows_per_pass([7, 10, 3], stage, 99) for stage in (1, 2, 3)] == [7, 14, 12]


def test_another_length_of_the_tuning_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"tuning.length=3 and method.prompt_length=4 differ"):
        run_tiny(tmp_path, [*BASE, "tuning.length=3"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompt_length", 0),
        ("lambda_lm", 0.0),
        ("lambda_kl", -0.1),
        ("fraction", 0.0),
        ("fraction", 1.5),
        ("draft_tokens", 1),
        ("temperature", 0.0),
        ("top_p", 0.0),
        ("generate_rows", 0),
        ("top_k", 0),
    ],
)
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(ConfigError, match=rf"method\.{key}={value} must be "):
        LFPT5(**{**GOOD, key: value})
