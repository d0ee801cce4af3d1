"""The main path: compose, plan, fit, score, log, report."""

import logging
import random
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from trace_hydra import __version__, build, report, train
from trace_hydra.build import Parts
from trace_hydra.callbacks.base import RunCallback
from trace_hydra.capability.board import CapabilityBoard
from trace_hydra.capability.subject import StartModel, Subject
from trace_hydra.context import StageContext
from trace_hydra.data.audit import audit_tasks
from trace_hydra.files import write_json, write_lines
from trace_hydra.loggers import close_loggers, open_loggers
from trace_hydra.models.generate import Decoding
from trace_hydra.plan import Effort, Stage
from trace_hydra.prepare import Prepared, epochs_of, prepare, show_plan, token_counter
from trace_hydra.scoreboard import Scoreboard

log = logging.getLogger(__name__)


def run(config: DictConfig, directory: Path) -> float | None:
    """Train through the task order, score, log and report.

    Args:
        config: Composed from conf/, not yet checked.
        directory: Where results, predictions and logs go; exists.

    Returns:
        OP on the 0-100 scale, for sweepers; None if a cell of the last row is missing.

    Raises:
        TraceHydraError: Whatever a user can cause; configuration and data errors before the model is loaded.
    """
    started = time.monotonic()
    with _quiet():
        parts = build.validate(config)
        prepared = prepare(config, parts, directory)
        show_plan(prepared)
        for notice in filter(None, (one.notice() for one in parts.capability.values())):
            print(notice)
        _start_directory(prepared, config, parts)
        callbacks: list[RunCallback] = parts.callbacks
        loggers = open_loggers(parts.loggers, prepared.run)
        exit_code = 1
        try:
            for callback in callbacks:
                callback.on_run_start(prepared.run, loggers)
            board = Scoreboard(prepared.run, prepared.tasks, prepared.views, config.protocol, callbacks)
            abilities = _abilities(config, parts, prepared, callbacks)
            ctx = _load(config, parts, prepared, abilities)
            efforts = _train_and_score(config, parts, prepared, ctx, board, abilities)
            results = _results(config, parts, prepared, board, efforts, abilities, time.monotonic() - started)
            report.write_results(results, prepared.run.directory)
            for callback in callbacks:
                callback.on_run_end(results)
            exit_code = 0
        except BaseException as error:
            for callback in callbacks:
                callback.on_run_error(error)
            raise
        finally:
            close_loggers(loggers, exit_code)
    return results["op"]


def _train_and_score(
    config: DictConfig,
    parts: Parts,
    prepared: Prepared,
    ctx: StageContext,
    board: Scoreboard,
    abilities: CapabilityBoard,
) -> list[Effort]:
    """Go through the stages; returns what each cost."""
    method, efforts = parts.method, []
    ctx.enter(Stage(0, "", 0, 0, 0, 0, ""), next(iter(prepared.views.values())))
    _reseed(config.seed.train, 0)
    method.setup(ctx)
    board.score_row(0, method, ctx)
    carried: dict[str, Any] = {}
    for stage in prepared.run.stages:
        ctx.enter(stage, prepared.views[stage.task])
        for callback in parts.callbacks:
            callback.on_stage_start(stage)
        _reseed(config.seed.train, stage.index)
        effort = train.train_stage(config, parts, ctx, carried)
        efforts.append(effort)
        for callback in parts.callbacks:
            callback.on_stage_end(stage, effort)
        board.score_row(stage.index, method, ctx)
        with _undisturbed(ctx):
            abilities.after(stage.index, Subject(ctx, method))
    return efforts


def _load(config: DictConfig, parts: Parts, prepared: Prepared, abilities: CapabilityBoard) -> StageContext:
    """Load the model and hand it to a context; the capability sets see it before anything is added to it."""
    trainer = parts.trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    decoding = config.protocol.decoding
    ctx = StageContext(
        model=parts.model.load(),
        tokenizer=prepared.tokenizer,
        encoder=prepared.encoder,
        tuning=parts.tuning,
        device=trainer.strategy.root_device,
        decoding=Decoding(decoding.do_sample, decoding.temperature, decoding.top_p),
        batch_tokens=config.evaluation.batch_tokens,
        instructions={name: view.instruction for name, view in prepared.views.items()},
        alignment=prepared.data.alignment,
        epochs_of=lambda task: epochs_of(config.budget, task),
        generation_seed=config.seed.generation,
        data_seed=config.seed.data,
        autocast=trainer.precision_plugin.forward_context,
        num_stages=len(prepared.run.stages),
        all_tasks=prepared.views if parts.method.sees_all_tasks else None,
    )
    with _undisturbed(ctx):
        abilities.start(Subject(ctx, StartModel(parts.method)))
    _reseed(config.seed.train, 0)  # an adapter's first weights are drawn
    ctx.model = parts.tuning.apply(ctx.model)
    ctx.prefix = parts.tuning.prefix(ctx.model)
    return ctx


def _abilities(config: DictConfig, parts: Parts, prepared: Prepared, callbacks: list[RunCallback]) -> CapabilityBoard:
    """Set up the capability sets; what decides the start model's answers is its key."""
    for one in parts.capability.values():
        for warning in one.warnings(parts.model):
            log.warning(warning)
    decoding = OmegaConf.to_container(config.protocol.decoding, resolve=True)

    def notify(row: int, deltas: Mapping[str, Any], pairs: list[dict[str, Any]]) -> None:
        for callback in callbacks:
            callback.on_capability(row, deltas, pairs)

    return CapabilityBoard(
        parts.capability,
        rows=build.measured_rows(config),
        model_key={
            "model": parts.model.identity(),
            "precision": config.trainer.get("precision"),
            "decoding": decoding,
            "seed": config.seed.generation if config.protocol.decoding.do_sample else None,
            "truncation": config.protocol.truncation,
            "max_prompt_tokens": config.protocol.max_prompt_tokens,
            "room": parts.method.prefix_length(parts.tuning.prefix_length, len(parts.specs)),
            "versions": {name: _versions()[name] for name in ("torch", "transformers")},
        },
        store=Path(config.paths.store),
        directory=prepared.run.directory,
        config=prepared.run.config["capability"],
        samples=config.evaluation.bootstrap_samples,
        seed=config.seed.data,
        notify=notify,
    )


def _start_directory(prepared: Prepared, config: DictConfig, parts: Parts) -> None:
    """Take the results of an earlier run of the same key away and store what this one reads: rows and audit."""
    directory = prepared.run.directory
    report.clear(directory)
    for name, task in prepared.tasks.items():
        rows = [{"id": one.id, "prompt": one.prompt, "answer": one.answer} for one in task.test]
        write_lines(rows, directory / "test_rows" / f"{name}.jsonl")
    audit = audit_tasks(
        prepared.data,
        count_tokens=token_counter(prepared),
        files=getattr(parts.data, "files", None),
        variant=parts.data.variant,
    )
    write_json(audit, directory / "audit.json")


def _results(
    config: DictConfig,
    parts: Parts,
    prepared: Prepared,
    board: Scoreboard,
    efforts: list[Effort],
    abilities: CapabilityBoard,
    seconds: float,
) -> dict[str, Any]:
    specs = {
        name: {
            "metric": task.spec.metric,
            "instruction": task.instruction,
            "stop": list(task.spec.stop),
            "splitter": task.spec.splitter,
            "letters": task.spec.letters,
        }
        for name, task in prepared.tasks.items()
    }
    return report.build_results(
        run=prepared.run,
        matrix=board.matrix,
        scores=board.scores,
        carried=board.carried,
        intervals=board.intervals(config.evaluation.bootstrap_samples, config.seed.data),
        wall_clock_s=seconds,
        tokens={"train": [effort.tokens for effort in efforts], "evaluate": board.tokens},
        efforts=efforts,
        truncated=prepared.truncated,
        task_specs=specs,
        seeds=OmegaConf.to_container(config.seed, resolve=True),
        scoring=config.protocol.scoring,
        capability=abilities.results(),
        published={
            "model": config.model.get("published"),
            "method": parts.method.published.get(parts.tuning.name),
        },
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    found = {"trace_hydra": __version__}
    for package in ("torch", "lightning", "transformers", "peft", "datasets", "hydra-core", "wandb", "rapidfuzz"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _reseed(seed: int, stage: int) -> None:
    """Seed every global generator from seed and stage, so that a stage does not depend on how it was reached."""
    value = random.Random(f"{seed}-{stage}").getrandbits(32)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@contextmanager
def _undisturbed(ctx: StageContext) -> Iterator[None]:
    """Put the model on its device in eval mode; mode and random state are as before afterwards."""
    was_training = ctx.model.training
    ctx.model.to(ctx.device).eval()  # type: ignore[arg-type]
    state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[ctx.device] if ctx.device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])
            ctx.model.train(was_training)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's and transformers' chatter out of a run's output; as before afterwards."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    bars = is_progress_bar_enabled()
    names = ("lightning.pytorch", "lightning.fabric", "transformers", "httpx")
    before = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
        try:
            for name in names:
                logging.getLogger(name).setLevel(logging.ERROR)
            disable_progress_bar()
            yield
        finally:
            if bars:
                enable_progress_bar()
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)
