"""What the whole benchmark costs: every method x orders x seeds, planned by the project, in GPU-hours and bytes.

Rows and weights are not needed: rows of TRACE's counts that say nothing stand for the release's, a tokenizer of bytes
for the model's, and lengths are the published ones (`trace_hydra/cost_rows.py`). What runs share is decided by the keys
of the plan itself: a stage, or the answers to a cell, that several runs would make under the same key is made once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from trace_hydra import build, entry, schema
from trace_hydra.build import Parts
from trace_hydra.cost import Estimate, estimate_run, memory_of, skeleton
from trace_hydra.cost_model import Memory, optimizer_bytes
from trace_hydra.cost_rows import RunRows, TaskRows, rows_of
from trace_hydra.data.encode import Encoder
from trace_hydra.data.task import Example, Task, TaskData, TaskSpec
from trace_hydra.methods.base import Method
from trace_hydra.models.tiny import Tiny
from trace_hydra.prepare import Prepared, prepare
from trace_hydra.space import stage_bytes

CONF = entry.project_root() / "conf"
ORDERS = ("trace", "trace_order2", "reversed")
SEEDS = (0, 1, 2)
ROWS = ("data=trace5000", "budget=paper", "paths.data=null", "capability=none", "logger=none", "callbacks=none")
MODELS: dict[str, tuple[str, ...]] = {
    "7B": ("model=llama2_7b_chat",),
    # arXiv:2307.09288 and the config.json of Llama-2-70b-chat-hf
    "70B": (
        "model=llama2_7b_chat",
        "model.name=llama2_70b_chat",
        "model.path=meta-llama/Llama-2-70b-chat-hf",
        "model.parameters=68976648192",
        "model.architecture.hidden_size=8192",
        "model.architecture.num_hidden_layers=80",
        "model.architecture.num_attention_heads=64",
        "model.architecture.num_key_value_heads=8",
        "model.architecture.intermediate_size=28672",
    ),
}
ANSWER_FRAME = 60
"""Bytes of a stored answer beside its text, as in `answers.jsonl`: names of fields, numbers."""
CHARACTERS_A_TOKEN = 4
DEVICE_BYTES = 80e9
_WORKS = ("losses", "edit_gradients", "after_step", "end_stage")
"""Hooks in which a method works beside the passes over its rows."""


@dataclass(frozen=True)
class Rates:
    """What turns work into time. Assumptions, unless `benchmarks.limit` measured them."""

    training_flops: float = 0.4 * 989e12
    """A second and device: 40 % of an H100's dense bf16 peak (its data sheet)."""
    reading_flops: float = 0.4 * 989e12
    """Likewise, of prompts."""
    weight_bytes: float = 0.5 * 3.35e12
    """Bytes of weights that a step of generation reads a second and device: half of an H100's HBM3."""
    disk_bytes: float = 1e9
    """A second, of the file system that the store lies on: how often a stage under way is saved depends on it."""
    source: str = "assumed: an H100 at 40 % of 989 TFLOP/s and 50 % of 3.35 TB/s"

    @staticmethod
    def of(measured: Mapping[str, Any]) -> "Rates":
        """Take the rates of a file that `python -m benchmarks.limit --out` wrote; generation stays assumed."""
        device = (measured.get("machine") or {}).get("device", "an unknown device")
        return Rates(
            training_flops=measured["training_gflops"] * 1e9,
            reading_flops=measured["reading_gflops"] * 1e9,
            source=f"measured on {device} (benchmarks.limit); generation assumed: {Rates.weight_bytes:.3g} bytes/s",
        )


@dataclass
class Work:
    """What several runs take, what they share counted once; seconds of one device, bytes."""

    training: dict[str, float] = field(default_factory=dict)
    """Stage key -> device seconds of the passes over its rows."""
    beside: float = 0.0
    """Device seconds that steps take beyond those."""
    answering: dict[str, float] = field(default_factory=dict)
    """Answers key -> device seconds if answers are as long as the references."""
    at_most: dict[str, float] = field(default_factory=dict)
    """Likewise if all are as long as their limit."""
    stored: dict[str, float] = field(default_factory=dict)
    """Key -> bytes of the entry."""
    last: dict[str, float] = field(default_factory=dict)
    """Keys of last stages among them."""
    saved: dict[str, float] = field(default_factory=dict)
    """Stage key -> bytes of its checkpoints under way."""
    loaded: float = 0.0
    """Bytes of base models that runs read."""
    runs: int = 0
    stages: int = 0
    cells: int = 0

    def add(self, other: "Work") -> None:
        """Take another's in."""
        for name in ("training", "answering", "at_most", "stored", "last", "saved"):
            getattr(self, name).update(getattr(other, name))
        for name in ("loaded", "runs", "stages", "cells", "beside"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def numbers(self) -> dict[str, float]:
        """Sum up: hours of one device, bytes."""
        moved = self.loaded + sum(self.stored.values()) + sum(self.saved.values())
        last = sum(self.last.values()) + sum(size for key, size in self.stored.items() if key not in self.training)
        return {
            "runs": self.runs,
            "stages": self.stages,
            "distinct_stages": len(self.training),
            "cells": self.cells,
            "distinct_cells": len(self.answering),
            "training_h": sum(self.training.values()) / 3600,
            "training_with_steps_h": (sum(self.training.values()) + self.beside) / 3600,
            "answering_h": sum(self.answering.values()) / 3600,
            "answering_at_most_h": sum(self.at_most.values()) / 3600,
            "stored_bytes": sum(self.stored.values()),
            "stored_last_bytes": last,
            "moved_bytes": moved,
        }


class StandIn:
    """Data that is not at hand: TRACE's counts of rows, each with a text of its own that says nothing."""

    variant, sampled = None, False

    def __init__(self, specs: Mapping[str, TaskSpec], rows: RunRows):
        rows_by_name = {task.name: task for task in rows.tasks}
        self._tasks = {name: _task(spec, rows_by_name[name]) for name, spec in specs.items()}
        self._alignment = _examples("", "alignment", rows.alignment)

    def load(self, tasks: Sequence[str], *, seed: int) -> TaskData:
        """Give the tasks in the order asked for; the same objects, so that their hashes are taken once."""
        return TaskData({name: self._tasks[name] for name in tasks}, self._alignment)


class _Model:
    """The model of a run with a tokenizer that needs no file."""

    def __init__(self, model: Any, tokenizer: Any):
        self._model, self._tokenizer = model, tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def load_tokenizer(self) -> Any:
        return self._tokenizer


class Planner:
    """Composes and plans runs; what they have in common is made once.

    Args:
        overrides: Of all runs: data, budget.
    """

    def __init__(self, overrides: Sequence[str] = ROWS):
        self._overrides = list(overrides)
        self._data: StandIn | None = None
        self._tokenizer: Any = None
        schema.register()
        entry.register_resolvers()

    def config(self, *overrides: str) -> Any:
        """Compose a run."""
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", entry.rewrite_overrides([*self._overrides, *overrides]))

    def prepared(self, config: Any, parts: Parts, rows: RunRows) -> Prepared:
        """Plan a run as the project does, over rows that stand in."""
        self._data = self._data or StandIn(parts.specs, rows)
        self._tokenizer = self._tokenizer or _byte_tokenizer()
        lengths = {task.name: task for task in rows.tasks}

        def count(task: Task, instruction: str, encoder: Encoder) -> tuple[dict[str, int], int]:
            return {"train": 0, "test": 0}, round(lengths[task.name].train * lengths[task.name].row_tokens)

        stand_ins = replace(parts, data=self._data, model=_Model(parts.model, self._tokenizer))
        return prepare(config, stand_ins, Path("planned"), count=count)


def method_names() -> list[str]:
    """List the methods that there are."""
    return sorted(path.stem for path in (CONF / "method").glob("*.yaml"))


def cost_of(planner: Planner, rates: Rates, *overrides: str, orders: Sequence[str], seeds: Sequence[int]) -> Any:
    """Plan one method's runs.

    Returns:
        Their `Work`, and what is known about the method: tuning, devices, what is not counted.
    """
    model, work, facts = None, Work(), dict[str, Any]()
    for order in orders:
        config = planner.config(*overrides, f"task_order={order}")
        parts = build.validate(config, files=False)
        rows = rows_of(config, parts)
        model = skeleton(parts) if model is None else model
        estimate = estimate_run(config, parts, rows, model)
        memory = memory_of(config, parts, model)
        facts = facts or _facts(config, parts, estimate)
        for seed in seeds:
            config.seed.train = seed
            plan = planner.prepared(config, build.validate(config, files=False), rows)
            work.add(_run(plan, config, parts, rows, estimate, memory, rates))
    return work, facts


def _facts(config: Any, parts: Parts, estimate: Estimate) -> dict[str, Any]:
    kind = type(parts.method)
    beside = [name for name in _WORKS if getattr(kind, name) is not getattr(Method, name)]
    devices = max(1, ceil(estimate.device_total / DEVICE_BYTES))
    return {
        "tuning": str(config.tuning.name),
        "devices": devices,
        "fits": devices == 1 or parts.method.sharded,
        "trained": estimate.trained,
        "works_in": beside,
        "answers_itself": kind.answer is not Method.answer,
    }


def _run(
    plan: Prepared, config: Any, parts: Parts, rows: RunRows, estimate: Estimate, memory: Memory, rates: Rates
) -> Work:
    """Work of one run as if it shared nothing."""
    run, tasks = plan.run, {task.name: task for task in rows.tasks}
    work = Work(runs=1, stages=len(run.stages), cells=len(run.cells), loaded=2.0 * estimate.parameters)
    optimizer = estimate.trained * optimizer_bytes(parts.optimizer, estimate.size.weight_bytes)
    devices = max(1, ceil(estimate.device_total / DEVICE_BYTES))
    for stage, tokens in zip(run.stages, estimate.size.row_tokens, strict=True):
        task = tasks[stage.task]
        flops = stage.tokens / task.row_tokens * memory.train_flops(tokens, task.answer_tokens)
        weights, state = stage_bytes(estimate, parts, stage.index)
        seconds = flops / rates.training_flops
        work.training[stage.key] = seconds
        work.stored[stage.key] = weights + state
        saved = weights + optimizer
        every_s = max(config.checkpoint.every_s, saved / rates.disk_bytes / config.checkpoint.share)
        work.saved[stage.key] = seconds / devices // every_s * saved
    work.last = {run.stages[-1].key: work.stored[run.stages[-1].key]}
    prefix = estimate.size.row_tokens[0] - tasks[run.stages[0].task].row_tokens
    for (_, name), key in run.answers.items():
        task = tasks[name]
        expected = min(task.answer_tokens, task.max_new_tokens)
        for found, new in ((work.answering, expected), (work.at_most, task.max_new_tokens)):
            found[key] = answering_seconds(task, prefix, new, config.evaluation.batch_tokens, memory, rates)
        work.stored[key] = task.test * (CHARACTERS_A_TOKEN * expected + ANSWER_FRAME)
    return work


def answering_seconds(
    task: TaskRows, prefix: float, new: float, batch_tokens: int, memory: Memory, rates: Rates
) -> float:
    """Device seconds for a task's test rows: the products, and the weights that each step of generation reads.

    Args:
        task: Counts and lengths.
        prefix: Tokens before each prompt.
        new: Tokens of an answer.
        batch_tokens: `evaluation.batch_tokens`; rows of a batch have room for the longest answer in it.
        memory: The model.
        rates: What turns work into time.
    """
    prompt = prefix + task.prompt_tokens
    rows = max(1, int(batch_tokens // (prompt + task.max_new_tokens)))
    steps = ceil(task.test / rows) * new
    read = steps * 2 * memory.shape.count(memory.shape.weights) / rates.weight_bytes
    return read + task.test * memory.forward_flops(prompt + new, new) / rates.reading_flops


def total(works: Iterable[Work]) -> Work:
    """Put the work of several methods together; what they share counts once."""
    found = Work()
    for work in works:
        found.add(work)
    return found


def _task(spec: TaskSpec, rows: TaskRows) -> Task:
    train, test = _examples(spec.instruction, "train", rows.train), _examples(spec.instruction, "test", rows.test)
    return Task(spec, train=train, eval=test[:1], test=test)


def _examples(instruction: str, split: str, count: int) -> tuple[Example, ...]:
    return tuple(Example(f"{split}-{number}", f"{instruction}{number}\n", "A") for number in range(count))


def _byte_tokenizer() -> Any:
    config: Any = OmegaConf.to_container(OmegaConf.load(CONF / "model" / "tiny.yaml"))
    arguments: dict[str, Any] = {key: value for key, value in config.items() if key != "_target_"}
    return Tiny(**arguments).load_tokenizer()
