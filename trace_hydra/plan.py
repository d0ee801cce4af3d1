"""Stages and phases, and what one run is: plain records without torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Phase:
    """One fit within a stage: a new Trainer, a new optimizer unless `optim.carry`."""

    name: str
    examples: Sequence[Any]
    """Rows to train on, `data.task.Example`; at least one."""
    epochs: int
    lr_scale: float = 1.0
    """Multiplies the optimizer's learning rate in this phase."""


@dataclass(frozen=True)
class Stage:
    """One position of the task order, as planned before training."""

    index: int
    """From 1; 0 means before training."""
    task: str
    rows: int
    """Rows a pass goes over, replayed rows included."""
    epochs: int
    steps: int
    """Optimizer steps, estimated from rows, epochs and the effective batch."""
    tokens: int
    """Prompt and answer tokens of all passes, after truncation, without padding."""
    key: str
    """Hash of everything that can change this stage's weights."""
    micro_batch: int = 0
    """Rows of a forward pass; 0: as `budget` says."""
    apart: bool = False
    """Whether it begins at the start model, whatever came before."""

    @property
    def draw(self) -> int:
        """What random draws of the stage are seeded with: its index, or 1 where any order of tasks shares it."""
        return 1 if self.apart and self.index else self.index


@dataclass(frozen=True)
class Effort:
    """What a stage cost."""

    tokens: int
    """Prompt and answer tokens of all passes, without padding."""
    steps: int
    """Optimizer steps."""
    seconds: float
    """Wall-clock seconds of the phases, from behind `begin_stage` to the end of the last one: steps, waiting for data,
    checkpoints; neither `begin_stage`, `end_stage` nor evaluation. Of a stage that was interrupted, also what earlier
    processes spent up to the checkpoint that was taken up. Measured where it trained
    (`StageCheckpoints.seconds`), by rank 0 of several; runs that take the stage from the store have the same number."""
    trainable_params: int
    """Weights that trained, the most of any phase."""
    state_mb: float
    """What the method keeps from here on, in 10^6 bytes."""
    stored_examples: int
    """Rows the method keeps from here on."""
    plain_step_s: float | None = None
    """Seconds that forward and backward pass of a step of plain fine-tuning take here and now, for the same weights;
    None where nothing trained, or nothing that plain fine-tuning would reach."""

    skipped: int = 0
    """Steps not taken, for a loss or gradient that was not finite (on_nonfinite=skip_batch)."""

    @property
    def step_ratio(self) -> float | None:
        """Seconds of an optimizer step, all of the phases' work included, relative to a plain one's passes."""
        return self.seconds / self.steps / self.plain_step_s if self.steps and self.plain_step_s else None


@dataclass(frozen=True)
class RunInfo:
    """What is known about a run before it trains; loggers and callbacks get it first."""

    name: str
    """`<model>-<method>-<tuning>-<data>-<task_order>-seed<N>-<run key>`; also the name of the run directory."""
    directory: Path
    model: str
    method: str
    tuning: str
    data: str
    task_order: str
    tasks: tuple[str, ...]
    """Training order = columns of the matrix."""
    seed: int
    protocol: str
    fingerprint: str
    config: Mapping[str, Any]
    """The whole resolved configuration."""
    stages: tuple[Stage, ...]
    cells: tuple[tuple[int, str, int], ...]
    """Cells of the matrix to score, in order: row (0 = before training), task, test rows."""
    answers: Mapping[tuple[int, str], str] = field(default_factory=dict)
    """Cell (row, task) -> key of its answers in the store."""
    measured: tuple[int, ...] = ()
    """Rows at which capability sets are answered, 0 (the start model) among them; none without sets."""
    disclosures: Mapping[str, Any] = field(default_factory=dict)
    """What the method needs that others do not: task ids at test, all tasks at once, gradients at test."""
