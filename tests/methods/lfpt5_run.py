"""A run of LFPT5 over three tasks with someone watching."""

from unittest.mock import patch

import torch
from conftest import run_tiny

from trace_hydra.methods.lfpt5 import LFPT5
from trace_hydra.models.tiny import Tiny

TASKS = ["FOMC", "NumGLUE-cm", "20Minuten"]
BASE = [
    "method=lfpt5",
    f"task_order=[{','.join(TASKS)}]",
    "method.prompt_length=4",
    "method.draft_tokens=40",
    "method.fraction=0.5",
    "evaluation=diagonal_last",
    "budget.lr_prompt=0.1",
]


def watched(tmp_path, overrides=(), at_begin=None, at_loss=None):
    """Run three tasks; `at_begin` is called behind begin_stage, `at_loss` behind losses, with the terms."""
    begin, losses = LFPT5.begin_stage, LFPT5.losses

    def watch_begin(method, ctx):
        begin(method, ctx)
        if at_begin:
            at_begin(method, ctx)

    def watch_losses(method, ctx, batch):
        terms = losses(method, ctx, batch)
        if at_loss:
            at_loss(method, ctx, batch, terms)
        return terms

    with (
        patch.object(LFPT5, "begin_stage", watch_begin),
        patch.object(LFPT5, "losses", watch_losses),
        patch.object(Tiny, "load", attentive),
    ):
        return run_tiny(tmp_path, [*BASE, *overrides])


def attentive(model, load=Tiny.load):
    """Load `tiny` with twenty times its layers' weights: as it is, its answers hardly depend on what stands before."""
    loaded = load(model)
    with torch.no_grad():
        for name, weight in loaded.named_parameters():
            weight.mul_(20 if "_proj" in name or "lm_head" in name else 1)
    return loaded
