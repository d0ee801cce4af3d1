"""The main path: compose, plan, fit, score, log, report."""

import gc
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from trace_hydra import build, heartbeat, inputs, keys, ranks, terminal
from trace_hydra.build import Parts
from trace_hydra.callbacks.status import StatusCallback
from trace_hydra.capability.board import CapabilityBoard
from trace_hydra.capability.subject import Subject
from trace_hydra.data.audit import audit_tasks
from trace_hydra.files import write_bytes, write_json, write_lines
from trace_hydra.interrupt import Interrupts
from trace_hydra.live import Live, undisturbed
from trace_hydra.loggers import close_loggers, open_loggers
from trace_hydra.memory import OutOfMemory, smaller
from trace_hydra.models.checkpoint import remember_hashes
from trace_hydra.plan import Effort
from trace_hydra.prepare import Prepared, prepare, show_plan, token_counter
from trace_hydra.report import results as report
from trace_hydra.scoreboard import Scoreboard
from trace_hydra.space import check_space
from trace_hydra.store.entries import Store
from trace_hydra.store.shared import open_store
from trace_hydra.strategies import device_of

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
    shown = logging.WARNING if config.progress == "quiet" else logging.NOTSET
    logs = terminal.plain_logs(shown)
    with quiet(), logs, Interrupts() as interrupts, ranks.joined(device_of(config.trainer)):
        parts = build.validate(config)
        if not ranks.is_first():
            parts = replace(parts, callbacks=[], loggers=[])
        elif (heart := heartbeat.current()) is not None:
            parts = replace(parts, callbacks=[*parts.callbacks, StatusCallback(heart.tell)])
        store = open_store(Path(config.paths.store))
        remember_hashes(store.root / "hashes.json")
        prepared = prepare(config, parts, directory)
        if terminal.mode_of(config.progress, sys.stderr) != "quiet":
            show_plan(prepared)
        for notice in filter(None, (one.notice() for one in parts.capability.values())):
            print(notice)
        ranks.on_first(lambda: check_space(config, parts, prepared, store))
        with store.lock("runs", keys.digest(str(directory.resolve())), f"run directory {directory}"):
            store.note_run(directory, _uses(prepared), finished=False)
            ranks.on_first(lambda: report.clear(directory))
            ranks.on_first(lambda: _write_inputs(prepared, parts))
            composed = {path.name: path.read_bytes() for path in (directory / ".hydra").glob("*.yaml")}
            loggers = open_loggers(parts.loggers, prepared.run)
            exit_code = 1
            try:
                for callback in parts.callbacks:
                    callback.on_run_start(prepared.run, loggers)
                results = _results_of(config, parts, prepared, store, interrupts, started)
                _restore_directory(prepared, parts, composed)
                for callback in parts.callbacks:
                    callback.on_run_end(results)
                exit_code = 0
            except BaseException as error:
                for callback in parts.callbacks:
                    callback.on_run_error(error)
                raise
            finally:
                parts.engine.close()
                close_loggers(loggers, exit_code)
    return results["op"]


def _results_of(
    config: DictConfig, parts: Parts, prepared: Prepared, store: Store, interrupts: Interrupts, started: float
) -> dict[str, Any]:
    """Train, score and write results.json; again with smaller micro-batches if memory ran out and on_oom says so."""
    micro: dict[int, int] = {}
    while True:
        live = Live(config, parts, prepared, store, interrupts)
        board = Scoreboard(prepared, config.protocol, parts.callbacks, live)
        abilities = _abilities(config, parts, prepared, store)
        try:
            efforts = _train_and_score(prepared, parts, live, board, abilities)
            break
        except OutOfMemory as error:
            if config.on_oom != "halve" or error.size == 1:
                raise
            size = smaller(config.budget.batch_size, error.size)
            log.warning("%s\nFrom stage %d on, the micro-batch is %d rows.", str(error), error.stage, size)
            micro |= {stage.index: size for stage in prepared.run.stages if stage.index >= error.stage}
        del live, board, abilities  # they hold the model; before the next one is loaded
        gc.collect()
        prepared = prepare(config, parts, prepared.run.directory, micro=micro)
        store.note_run(prepared.run.directory, _uses(prepared), finished=False)
    board.write()
    abilities.write()
    results = _results(config, parts, prepared, board, efforts, abilities, time.monotonic() - started)
    ranks.on_first(lambda: report.write_results(results, prepared.run.directory))
    store.note_run(prepared.run.directory, _uses(prepared, abilities), finished=True)
    return results


def _uses(prepared: Prepared, abilities: CapabilityBoard | None = None) -> list[str]:
    """Name the entries of the store that a run stands on."""
    return [
        *(f"stages/{stage.key}" for stage in prepared.run.stages),
        *(f"answers/{key}" for key in prepared.run.answers.values()),
        *(f"capability/{key}" for key in (abilities.keys if abilities else ())),
    ]


def _train_and_score(prepared: Prepared, parts: Parts, live: Live, board: Scoreboard, abilities: CapabilityBoard):
    """Go through the stages; returns what each cost. No model is loaded where the store has everything."""
    efforts = []

    @contextmanager
    def trained() -> Iterator[Subject]:
        ctx = live.at(len(efforts))
        with _measuring(parts, len(efforts)), undisturbed(ctx):
            yield Subject(ctx, live.method)

    @contextmanager
    def untouched() -> Iterator[Subject]:
        with live.untouched() as subject, _measuring(parts, 0):
            yield subject

    abilities.start(untouched)
    board.score_row(0)
    for stage in prepared.run.stages:
        for callback in parts.callbacks:
            callback.on_stage_start(stage)
        effort = live.ensure(stage)
        efforts.append(effort)
        for callback in parts.callbacks:
            callback.on_stage_end(stage, effort)
        board.score_row(stage.index)
        abilities.after(stage.index, trained)
        live.close(stage.index)
    return efforts


@contextmanager
def _measuring(parts: Parts, row: int) -> Iterator[None]:
    """Let the callbacks hear that a capability set is being answered."""
    for callback in parts.callbacks:
        callback.on_measuring_start(row)
    try:
        yield
    finally:
        for callback in parts.callbacks:
            callback.on_measuring_end(row)


def _abilities(config: DictConfig, parts: Parts, prepared: Prepared, store: Store) -> CapabilityBoard:
    """Set up the capability sets; what decides the start model's answers is its key."""
    for one in parts.capability.values():
        for warning in one.warnings(parts.model):
            log.warning(warning)
    decoding = OmegaConf.to_container(config.protocol.decoding, resolve=True)

    def notify(row: int, deltas: Mapping[str, Any], pairs: list[dict[str, Any]]) -> None:
        for callback in parts.callbacks:
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
            "versions": {name: inputs.versions()[name] for name in ("torch", "transformers")},
            "engine": inputs.engine_identity(config, parts),
        },
        states={0: "start", **{stage.index: stage.key for stage in prepared.run.stages}},
        store=store,
        directory=prepared.run.directory,
        config=prepared.run.config["capability"],
        samples=config.evaluation.bootstrap_samples,
        seed=config.seed.data,
        notify=notify,
    )


def _write_inputs(prepared: Prepared, parts: Parts) -> None:
    """Write what the run reads: rows and audit."""
    directory = prepared.run.directory
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


def _restore_directory(prepared: Prepared, parts: Parts, composed: Mapping[str, bytes]) -> None:
    """Write again what is gone, should somebody have deleted the directory under the run; `composed` is Hydra's."""
    directory = prepared.run.directory
    for name, content in composed.items():
        if not (directory / ".hydra" / name).is_file():
            write_bytes(content, directory / ".hydra" / name)
    if not (directory / "audit.json").is_file():
        _write_inputs(prepared, parts)


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
        versions=inputs.versions(),
        engine=inputs.engine_identity(config, parts),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's and transformers' chatter out of the output; as before afterwards."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    bars = is_progress_bar_enabled()
    names = ("lightning.pytorch", "lightning.fabric", "transformers", "httpx")
    before = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
        warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated")  # DeepSpeed calls it
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
