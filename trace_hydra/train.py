"""One stage of training: phases, Trainers, what it cost."""

import json
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from trace_hydra import ranks
from trace_hydra.build import Parts
from trace_hydra.context import StageContext, batch_of
from trace_hydra.data.batches import TrainBatches
from trace_hydra.errors import MethodError
from trace_hydra.fingerprint import Fingerprints
from trace_hydra.memory import give_back, out_of_memory_named, out_of_memory_outside
from trace_hydra.methods.base import Method
from trace_hydra.plan import Effort, Phase, Stage
from trace_hydra.resume import Progress, StageCheckpoints
from trace_hydra.stage import StageModule
from trace_hydra.strategies import SHARDED, build_trainer

_OUTSIDE = (
    "debug=cost tells what the method holds; lower protocol.max_prompt_tokens, or train fewer weights (tuning=lora)"
)


@dataclass(frozen=True)
class Training:
    """What stages are trained with."""

    config: DictConfig
    parts: Parts
    checkpoints: StageCheckpoints
    start: Fingerprints
    """Of the start model's weights."""


def begin_stage(
    training: Training, ctx: StageContext, method: Method, carried: dict[str, Any], before: Collection[str]
) -> list[Phase]:
    """Let the method prepare a stage; one that was interrupted is then where its last checkpoint was made.

    Args:
        training: The run's settings.
        ctx: Already moved to the stage; the model is in the state that the stage begins with.
        method: Likewise.
        carried: With optim.carry, the optimizer's state from phase to phase; changed in place.
        before: Names of the weights that are not the start model's.
    """
    ctx.model.to(ctx.device)  # type: ignore[arg-type]
    ctx.training = True
    with out_of_memory_outside(f"stage {ctx.stage.index} ({ctx.stage.task}), before training", _OUTSIDE):
        method.begin_stage(ctx)
        phases = list(method.phases(ctx))
    training.checkpoints.begin(ctx.stage.key, ctx, method, training.start, before, carried)
    return phases


def train_stage(
    training: Training, ctx: StageContext, method: Method, phases: list[Phase], carried: dict[str, Any]
) -> Effort:
    """Train what is left of a stage, a new Trainer a phase, and let the method keep what it needs.

    Raises:
        MethodError: If a phase has nothing to train, a loss is not finite, or a declared term does nothing.
        Stopped: If a signal arrived before the last step; a checkpoint was saved.
    """
    saver = training.checkpoints
    progress = saver.progress
    for number, phase in enumerate(phases[progress.phase :], start=progress.phase):
        progress = _train_phase(training, ctx, method, phase, number, progress, carried)
        saver.end_phase(progress)
    if progress.steps > 1:  # at a stage's first step a penalty on what changed since is 0
        _check_terms(method.terms, progress.terms, ctx.stage)
    ctx.model.to(ctx.device).eval()  # type: ignore[arg-type]
    seconds = saver.seconds()
    with out_of_memory_outside(f"stage {ctx.stage.index} ({ctx.stage.task}), after the last step", _OUTSIDE):
        # A plain pass of the whole model takes more memory than one of a model that is split.
        split = training.config.trainer.get("strategy") in SHARDED
        plain = _plain_step_s(training.config, ctx) if progress.steps and not split else None
        method.end_stage(ctx)
    ctx.training = False
    stored = method.num_stored_examples()
    kept = state_mb(method.state_dict())
    return Effort(
        progress.tokens, progress.steps, seconds, progress.trainable, kept, stored, plain, skipped=progress.skipped
    )


def _train_phase(
    training: Training,
    ctx: StageContext,
    method: Method,
    phase: Phase,
    number: int,
    progress: Progress,
    carried: dict[str, Any],
) -> Progress:
    """Fit once. Trainer and optimizer end with the call: what comes after a stage needs their memory."""
    config, parts, saver = training.config, training.parts, training.checkpoints
    size = ctx.stage.micro_batch or config.budget.micro_batch_size
    rows = ctx.encode(phase.examples)
    seed = f"{config.seed.train}-{ctx.stage.draw}-{number}"
    batches = TrainBatches(
        rows,
        batch_size=config.budget.batch_size,
        micro_batch_size=size,
        seed=seed,
        rank=ranks.rank(),
        world_size=ranks.size(),
    )
    terms, skipped = saver.pending_terms()
    module = _module(training, ctx, method, phase, len(rows), carried, terms, skipped)
    module.steps_before, module.seed, module.votes = progress.steps, seed, saver.votes
    checkpoint = saver.take_up(batches, number)
    module.tokens_seen = progress.tokens + batches.tokens_before()
    trainer: Any = build_trainer(
        parts.trainer,
        max_epochs=phase.epochs,
        callbacks=[*parts.callbacks, saver],
        plugins=[saver.io],
        use_distributed_sampler=False,
    )
    try:
        with out_of_memory_named(module, config.budget.batch_size, size):
            trainer.fit(module, batches, ckpt_path=checkpoint)
    finally:
        _let_go(trainer.callbacks, module)
    if config.optim.carry:
        state = trainer.strategy.optimizer_state(trainer.optimizers[0])["state"]
        carried.update(state=state, names=list(ctx.trainable()))
    module.whole_again()
    for weight in ctx.model.parameters():
        weight.grad = None  # Lightning leaves the last one, as large as the weights
    for optimizer in trainer.optimizers:
        optimizer.state.clear()  # its objects refer to each other: moments as large as the model would wait for gc
    give_back()
    return Progress(
        phase=number + 1,
        tokens=progress.tokens + sum(len(row.ids) for row in rows) * phase.epochs,
        steps=progress.steps + trainer.global_step,
        trainable=max(progress.trainable, sum(weight.numel() for weight in ctx.trainable().values())),
        terms={**progress.terms, **module.readings.seen},
        skipped=progress.skipped + module.skipped,
    )


def _let_go(callbacks: Iterable[Any], module: StageModule) -> None:
    """Take from callbacks what Lightning put there; it would hold module, model and optimizer until the next fit."""
    for callback in callbacks:
        for name, value in list(vars(callback).items()):
            if getattr(value, "__self__", None) is module:
                delattr(callback, name)


def _plain_step_s(config: DictConfig, ctx: StageContext) -> float | None:
    """Time the passes of a plain step: a micro-batch of the task's rows of middling length, scaled to a step's tokens.

    Weights, gradients and random state stay as they are. The time of the optimizer is not in it.
    """
    rows = sorted(ctx.encode(ctx.task.train), key=lambda row: len(row.ids))
    weights = list(ctx.trainable().values())
    size = min(ctx.stage.micro_batch or config.budget.micro_batch_size, len(rows))
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


def _module(
    training: Training,
    ctx: StageContext,
    method: Method,
    phase: Phase,
    num_rows: int,
    carried: Mapping[str, Any],
    terms: Mapping[str, float],
    skipped: int,
) -> StageModule:
    config = training.config
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
        method=method,
        ctx=ctx,
        phase=phase,
        optimizer=training.parts.optimizer,
        schedule=config.optim.schedule,
        warmup_steps=round(config.optim.warmup_ratio * steps),
        total_steps=steps,
        clip_norm=config.optim.clip_norm,
        optimizer_state=carried.get("state"),
        on_nonfinite=config.on_nonfinite,
        seen_terms=terms,
        skipped=skipped,
    )


def _check_terms(terms: tuple[str, ...], seen: Mapping[str, float], stage: Stage) -> None:
    if stage.index < 2 or not seen:
        return
    for term in terms:
        if seen.get(term) == 0.0:
            raise MethodError(
                f"stage {stage.index} ({stage.task}): loss term '{term}' was 0.0 at every step; it does nothing."
            )
