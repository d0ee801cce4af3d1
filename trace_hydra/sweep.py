"""What a sweep needs before it starts: per job its stages and answers, what the store has of them, and a good order."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trace_hydra import build, guard, inputs
from trace_hydra.data.encode import Encoder
from trace_hydra.data.task import Task, TaskData
from trace_hydra.errors import ConfigError, StoreError, TraceHydraError, problem_list
from trace_hydra.keys import digest
from trace_hydra.plan import RunInfo
from trace_hydra.prepare import Prepared, count_task, prepare
from trace_hydra.report.results import SCHEMA
from trace_hydra.store.entries import Entry, Store

log = logging.getLogger(__name__)

_ENCODING = ("prompt", "truncation", "special_tokens", "max_prompt_tokens", "max_answer_tokens")


@dataclass(frozen=True)
class Job:
    """One combination of a sweep's values, composed."""

    number: int
    """Place in the sweep, from 0."""
    overrides: tuple[str, ...]
    directory: Path
    """Where the run lies; the same configuration has the same one in every sweep."""
    config: DictConfig | Mapping[str, Any]
    """As composed, or resolved to plain values."""


@dataclass(frozen=True)
class Piece:
    """A stage or the answers to a cell, as the store knows it."""

    key: str
    amount: int
    """Train tokens of a stage; answers of a cell."""
    stored: bool


@dataclass(frozen=True)
class JobPlan:
    """What one job needs."""

    number: int
    overrides: tuple[str, ...]
    directory: Path
    stages: tuple[Piece, ...] = ()
    cells: tuple[Piece, ...] = ()
    measured: int = 0
    """Rows at which capability is measured."""
    done: bool = False
    """results.json is there, complete, and answers this question."""
    problem: str | None = None
    """Why it cannot run."""
    same_as: int | None = None
    """An earlier job with the same run directory; only that one is launched."""

    @property
    def to_run(self) -> bool:
        """Whether it is to be launched."""
        return not self.done and self.problem is None and self.same_as is None

    def first_new(self, claimed: Iterable[str] = ()) -> str | None:
        """Key of the first stage that must be trained and is not in `claimed`; None if there is none."""
        return next((one.key for one in self.stages if not one.stored and one.key not in set(claimed)), None)


def plan_jobs(jobs: Sequence[Job], halted: Callable[[], bool] = lambda: False) -> list[JobPlan]:
    """Plan every job; what they share (rows, tokenizers, token counts) is read once.

    Args:
        jobs: In the order of the sweep.
        halted: Asked before each job; what is left unplanned then has no stages.
    """
    shared, first, plans = _Shared(), dict[Path, int](), list[JobPlan]()
    with _quiet():
        for job in jobs:
            plan = JobPlan(job.number, job.overrides, job.directory)
            if job.directory in first:
                plan = replace(plan, same_as=first[job.directory])
            elif job.config.get("cost") is None and not halted():
                plan = _plan(job, plan, shared)
            first.setdefault(job.directory, job.number)
            plans.append(plan)
    return plans


def in_order(plans: Sequence[JobPlan]) -> list[JobPlan]:
    """Order the jobs to run so that those side by side train different stages.

    Of jobs whose first new stage is the same, one goes ahead; those with the most jobs behind them come first. The rest
    follow in the same way, with what the leaders train taken as there. Otherwise the order stays.
    """
    waiting, ordered, claimed = [plan for plan in plans if plan.to_run], list[JobPlan](), set[str]()
    while waiting:
        groups: dict[str | None, list[JobPlan]] = {}
        for plan in waiting:
            groups.setdefault(plan.first_new(claimed), []).append(plan)
        alone = groups.pop(None, [])
        leaders = [group[0] for group in sorted(groups.values(), key=len, reverse=True)]
        claimed |= {piece.key for plan in leaders for piece in plan.stages}
        ordered += [*leaders, *alone]
        waiting = [plan for plan in waiting if plan not in leaders and plan not in alone]
    return ordered


def is_done(directory: Path, stages: Sequence[str], fingerprint: str) -> bool:
    """Tell whether results.json is whole and belongs to these stages and this protocol."""
    results = read_results(directory)
    return (
        results is not None
        and results.get("schema") == SCHEMA
        and results.get("complete") is True
        and (results.get("protocol") or {}).get("fingerprint") == fingerprint
        and [stage.get("key") for stage in results.get("stages") or []] == list(stages)
    )


def read_results(directory: Path) -> dict[str, Any] | None:
    """Read results.json of a run; None if it is not there or no JSON object."""
    try:
        found = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave notices, and what Lightning says of its trainers, to the runs."""
    import lightning.pytorch  # noqa: F401 - its import sets the level

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "transformers")]
    before = [logger.level for logger in loggers]
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The `srun` command is available")  # the plan is made without it
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def _plan(job: Job, plan: JobPlan, shared: "_Shared") -> JobPlan:
    try:
        run = shared.prepare(job).run
        stages, cells = _pieces(run, shared.store(Path(run.config["paths"]["store"])))
        return replace(
            plan,
            stages=stages,
            cells=cells,
            measured=len(run.measured),
            done=is_done(job.directory, [one.key for one in run.stages], run.fingerprint),
        )
    except TraceHydraError as error:
        return replace(plan, problem=str(error))
    except Exception:
        log.warning("job %d could not be planned; it runs without a plan.", job.number, exc_info=True)
        return plan


def _pieces(run: RunInfo, store: Store) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Look stages and cells up. A stage whose weights were dropped is new if something must be made from them."""
    cells = {
        (row, task): Piece(key := run.answers[row, task], answers, _find(store, "answers", key) is not None)
        for row, task, answers in run.cells
    }
    stages: list[Piece] = []
    wanted = False  # whether the stage after this one starts from its weights
    for stage in reversed(run.stages):
        entry = _find(store, "stages", stage.key)
        asked = wanted or any(row == stage.index and not piece.stored for (row, _), piece in cells.items())
        stored = entry is not None and not (asked and entry.manifest.get("dropped"))
        stages.append(Piece(stage.key, stage.tokens, stored))
        wanted = not stored and not stage.apart
    return tuple(reversed(stages)), tuple(cells.values())


def _find(store: Store, kind: str, key: str) -> Entry | None:
    try:
        return store.find(kind, key)
    except StoreError:  # of another version: the run says so
        return None


@dataclass
class _Shared:
    """What many jobs of a sweep read alike, kept while the sweep is planned."""

    checked: set[str] = field(default_factory=set)
    known: dict[Any, Any] = field(default_factory=dict)

    def prepare(self, job: Job) -> Prepared:
        try:
            plain = inputs.resolved(job.config)
        except OmegaConfBaseException:
            raise ConfigError(problem_list(build.problems_of(job.config))) from None  # type: ignore[arg-type]
        if found := guard.consent_problems(plain, job.overrides):
            raise ConfigError(problem_list(found))
        names = {key: digest(node) for key, node in plain.items()}
        config = self._config(plain, names)
        parts = self._validate(config, plain, names)
        proxies = {
            "model": _Model(parts.model, names["model"], self.known),
            "data": _Data(parts.data, names["data"], self.known),
            "trainer": self._trainer(parts.trainer, names["trainer"]),
        }
        count = self._counter(plain["protocol"])
        return prepare(config, replace(parts, **proxies), job.directory, count=count, plain=plain)

    def store(self, root: Path) -> Store:
        return _once(self.known, ("store", root), lambda: Store(root))

    def _config(self, plain: Mapping[str, Any], names: Mapping[str, str]) -> DictConfig:
        """Wrap plain values; jobs with equal nodes share them, for nothing in them refers to others."""
        config = OmegaConf.create({})
        for key, node in plain.items():
            wrapped = _once(
                self.known, ("node", key, names[key]), lambda key=key, node=node: OmegaConf.create({key: node})
            )
            config.__dict__["_content"][key] = wrapped._get_node(key)
        return config

    def _validate(self, config: DictConfig, plain: Mapping[str, Any], names: Mapping[str, str]) -> build.Parts:
        """Check a configuration; files that passed for another job are not read again."""
        nodes = [names[node] for node in ("model", "data", "capability", "judge", "paths")]
        files = digest([*nodes, sorted(map(str, plain["task_order"]["tasks"]))])
        parts = build.validate(config, files=files not in self.checked, plain=plain)
        self.checked.add(files)
        return parts

    def _trainer(self, build: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Build trainers, of which only the device is asked, once."""

        def trainer(**given: Any) -> Any:
            return _once(self.known, ("trainer", name), lambda: build(**given))

        return trainer

    def _counter(self, protocol: Mapping[str, Any]) -> Callable[[Task, str, Encoder], tuple[dict[str, int], int]]:
        encoding = tuple(protocol[key] for key in _ENCODING)

        def count(task: Task, instruction: str, encoder: Encoder) -> tuple[dict[str, int], int]:
            # Tasks and tokenizers live as long as `known` does, so their ids are their names.
            key = ("count", id(task), id(encoder.tokenizer), encoding)
            return _once(self.known, key, lambda: count_task(task, instruction, encoder))

        return count


class _Proxy:
    """Stands for a part of a run; what it loads is kept by the digest of its node."""

    def __init__(self, part: Any, name: str, known: dict[Any, Any]):
        self._part, self._name, self._known = part, name, known

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


class _Model(_Proxy):
    def load_tokenizer(self) -> Any:
        return _once(self._known, ("tokenizer", self._name), self._part.load_tokenizer)

    def identity(self) -> Any:
        return _once(self._known, ("identity", self._name), self._part.identity)


class _Data(_Proxy):
    def load(self, tasks: Sequence[str], *, seed: int) -> TaskData:
        drawn = seed if getattr(self._part, "sampled", True) else None  # sources from elsewhere may draw rows too
        key = ("data", self._name, drawn, tuple(sorted(tasks)))
        found = _once(self._known, key, lambda: self._part.load(list(tasks), seed=seed))
        return TaskData({task: found.tasks[task] for task in tasks}, found.alignment)


def _once(known: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    if key not in known:
        known[key] = make()
    return known[key]
