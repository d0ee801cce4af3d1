"""One stage of training: phases, Trainers, what it cost."""

import json
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import Tensor

from trace_hydra.build import Parts
from trace_hydra.context import StageContext, batch_of
from trace_hydra.data.encode import TrainBatches
from trace_hydra.errors import MethodError
from trace_hydra.plan import Effort, Phase, Stage
from trace_hydra.stage import StageModule


def train_stage(config: DictConfig, parts: Parts, ctx: StageContext, carried: dict[str, Any]) -> Effort:
    """Train one stage, a new Trainer a phase, and let the method keep what it needs.

    Args:
        config: The run's.
        parts: Its method, optimizer and trainer.
        ctx: Already moved to the stage.
        carried: With optim.carry, the optimizer's state from phase to phase; changed in place.

    Raises:
        MethodError: If a phase has nothing to train, a loss is not finite, or a declared term does nothing.
    """
    method = parts.method
    started = time.monotonic()
    tokens = steps = trainable = 0
    ctx.model.to(ctx.device)  # type: ignore[arg-type]
    method.begin_stage(ctx)
    seen: dict[str, float] = {}
    for number, phase in enumerate(method.phases(ctx)):
        done = _train_phase(config, parts, ctx, phase, number, carried)
        trainable = max(trainable, sum(weight.numel() for weight in ctx.trainable().values()))
        tokens, steps = tokens + done.tokens, steps + done.steps
        seen.update(done.terms)
    if steps > 1:  # at a stage's first step a penalty on what changed since is 0
        _check_terms(method.terms, seen, ctx.stage)
    ctx.model.to(ctx.device).eval()  # type: ignore[arg-type]
    seconds = time.monotonic() - started
    plain = _plain_step_s(config, ctx) if steps else None
    method.end_stage(ctx)
    stored = method.num_stored_examples()
    return Effort(tokens, steps, seconds, trainable, state_mb(method.state_dict()), stored, plain)


@dataclass(frozen=True)
class _PhaseDone:
    tokens: int
    steps: int
    terms: Mapping[str, float]
    """Largest magnitude of each loss term."""


def _train_phase(
    config: DictConfig, parts: Parts, ctx: StageContext, phase: Phase, number: int, carried: dict[str, Any]
) -> _PhaseDone:
    """Fit once. Trainer and optimizer end with the call: what comes after a stage needs their memory."""
    rows = ctx.encode(phase.examples)
    batches = TrainBatches(
        rows,
        batch_size=config.budget.batch_size,
        micro_batch_size=config.budget.micro_batch_size,
        seed=f"{config.seed.train}-{ctx.stage.index}-{number}",
    )
    module = _module(config, parts, ctx, phase, len(rows), carried)
    trainer = parts.trainer(
        max_epochs=phase.epochs,
        accumulate_grad_batches=config.budget.batch_size // config.budget.micro_batch_size,
        logger=False,
        callbacks=list(parts.callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    _fit(trainer, module, batches)
    if config.optim.carry:
        carried.update(state=trainer.optimizers[0].state_dict()["state"], names=list(ctx.trainable()))
    for weight in ctx.model.parameters():
        weight.grad = None  # Lightning leaves the last one, as large as the weights
    return _PhaseDone(sum(len(row.ids) for row in rows) * phase.epochs, trainer.global_step, module.seen_terms)


def _plain_step_s(config: DictConfig, ctx: StageContext) -> float | None:
    """Time the passes of a plain step: a micro-batch of the task's rows of middling length, scaled to a step's tokens.

    Weights, gradients and random state stay as they are. The time of the optimizer is not in it.
    """
    rows = sorted(ctx.encode(ctx.task.train), key=lambda row: len(row.ids))
    weights = list(ctx.trainable().values())
    size = min(config.budget.micro_batch_size, len(rows))
    if not weights or not size:
        return None
    start = (len(rows) - size) // 2
    batch = batch_of(rows[start : start + size], ctx.device)
    devices = [ctx.device] if ctx.device.type == "cuda" else []
    ctx.model.train()
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        _wait(ctx.device)
        begun = time.monotonic()
        with ctx.autocast():
            loss = ctx.lm_loss(batch)
        if loss.requires_grad:
            torch.autograd.grad(loss, weights, allow_unused=True)
            _wait(ctx.device)
        seconds = time.monotonic() - begun
    ctx.model.eval()
    if not loss.requires_grad:
        return None
    tokens = sum(len(row.ids) for row in rows) / len(rows) * min(config.budget.batch_size, len(rows))
    return seconds * tokens / sum(len(row.ids) for row in rows[start : start + size])


def _wait(device: torch.device) -> None:
    """Let the device finish, so that a clock sees its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def state_mb(state: Mapping[str, Any]) -> float:
    """Size of a method's state: tensors as they are, everything else as JSON; in 10^6 bytes."""
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    rest = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return (size + (len(json.dumps(rest)) if rest else 0)) / 1e6


def _fit(trainer: Trainer, module: StageModule, batches: TrainBatches) -> None:
    """Fit; Ctrl-C stays a KeyboardInterrupt (Lightning turns it into SystemExit and ignores further signals)."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, batches)
    except SystemExit as exit_:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from exit_


def _module(
    config: DictConfig, parts: Parts, ctx: StageContext, phase: Phase, num_rows: int, carried: Mapping[str, Any]
) -> StageModule:
    if not num_rows or not ctx.trainable():
        raise MethodError(
            f"stage {ctx.stage.index} ({ctx.stage.task}), phase '{phase.name}': {num_rows} rows and "
            f"{len(ctx.trainable())} trainable tensors; there is nothing to train."
        )
    if carried and carried["names"] != list(ctx.trainable()):
        raise MethodError(
            f"optim.carry=true: the optimizer carries the state of {len(carried['names'])} tensors, stage "
            f"{ctx.stage.index} ({ctx.stage.task}) trains others. Set optim.carry=false for a method that trains new "
            "weights in each stage."
        )
    steps = ceil(num_rows / config.budget.batch_size) * phase.epochs
    return StageModule(
        method=parts.method,
        ctx=ctx,
        phase=phase,
        optimizer=parts.optimizer,
        schedule=config.optim.schedule,
        warmup_steps=round(config.optim.warmup_ratio * steps),
        total_steps=steps,
        clip_norm=config.optim.clip_norm,
        optimizer_state=carried.get("state"),
    )


def _check_terms(terms: tuple[str, ...], seen: Mapping[str, float], stage: Stage) -> None:
    if stage.index < 2 or not seen:
        return
    for term in terms:
        if seen.get(term) == 0.0:
            raise MethodError(
                f"stage {stage.index} ({stage.task}): loss term '{term}' was 0.0 at every step; it does nothing."
            )
