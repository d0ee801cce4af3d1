"""A stage under way on disk: saved by time and steps, and taken up again to the same bytes.

A checkpoint holds the weights that are not the start model's, what the method changed since the stage began,
optimizer, schedule, loop counters and the state of all random generators. A stage is taken up by restoring the stage
before, calling `begin_stage` and `phases` again, which makes teachers, anchors and hooks anew, and laying the
checkpoint over that.
"""

import json
import logging
import random
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback
from torch import Tensor

from trace_hydra import ranks
from trace_hydra.context import StageContext
from trace_hydra.data.batches import TrainBatches
from trace_hydra.errors import MethodError, Stopped, StoreError
from trace_hydra.fingerprint import Fingerprints
from trace_hydra.interrupt import Interrupts
from trace_hydra.methods.base import Method
from trace_hydra.models.weights import put_weights, weights_of
from trace_hydra.plan import Stage
from trace_hydra.snapshot import Snapshot
from trace_hydra.store import tree
from trace_hydra.store.entries import DamagedEntry, Entry, Store
from trace_hydra.store.tensors import read_tensors, tensor_bytes, write_tensors
from trace_hydra.strategies import whole

log = logging.getLogger(__name__)

_STEP_DIGITS = 8
"""Hexadecimal digits behind the stage's key: a stage under way may have two checkpoints for a moment."""


@dataclass
class Progress:
    """How far a stage is."""

    phase: int = 0
    """The phase that trains, from 0."""
    tokens: int = 0
    """Of the phases before it."""
    steps: int = 0
    """Of the phases before it."""
    trainable: int = 0
    """The most weights that trained in a phase before it."""
    seconds: float = 0.0
    terms: dict[str, float] = field(default_factory=dict)
    """Largest magnitude of each loss term in the phases before it."""
    skipped: int = 0
    """Steps not taken for a value that was not finite, in the phases before it."""


class StageCheckpoints(Callback):
    """Saves the stage that trains, and takes it up again.

    Args:
        store: Where checkpoints go, under `partial`.
        every_s: Seconds between two, or None.
        every_steps: Optimizer steps between two, or None.
        share: Most of the time that saving by time may take, in (0, 1].
        interrupts: Asked after each step whether to save and stop.
        versions: Package -> version.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        store: Store,
        *,
        every_s: float | None,
        every_steps: int | None,
        share: float,
        interrupts: Interrupts,
        versions: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.store, self.every_s, self.every_steps, self.share = store, every_s, every_steps, share
        self.interrupts, self.versions, self._clock = interrupts, versions, clock
        self.io = _Io(self)
        self.key = ""

    def begin(
        self,
        key: str,
        ctx: StageContext,
        method: Method,
        start: Fingerprints,
        before: Collection[str],
        carried: dict[str, Any],
    ) -> Progress:
        """Look for a checkpoint of a stage right after `begin_stage` and `phases`, and lay it over.

        Args:
            key: The stage's.
            ctx: At the stage.
            method: Trains.
            start: Of the start model's weights.
            before: Names of weights that were not the start model's when the stage began.
            carried: Optimizer state from phase to phase; changed in place.
        """
        self.key, self._ctx, self._method, self._start, self._before = key, ctx, method, start, set(before)
        self._carried = carried
        self._baseline = Snapshot(method, ctx.model)
        self._pending: dict[str, Any] | None = None
        self._random: dict[str, Any] | None = None
        self.progress = Progress()
        self._since = self._last_save = self._clock()
        self._cost, self._saved_step = 0.0, 0
        if (entry := self._take_newest()) is not None:
            stage = ctx.stage
            log.info("stage %d (%s) goes on from its checkpoint at %s.", stage.index, stage.task, entry.facts["at"])
        return self.progress

    def seconds(self) -> float:
        """Seconds of the stage so far, earlier processes included."""
        return self.progress.seconds + self._clock() - self._since

    def take_up(self, batches: TrainBatches, number: int) -> str | None:
        """Move a phase's batches to where its checkpoint was made; returns what to hand to `fit` as `ckpt_path`."""
        if self._pending is None or number != self.progress.phase:
            return None
        loops = self._pending["lightning"]["loops"]["fit_loop"]
        done = loops["epoch_loop.batch_progress"]["current"]["ready"]
        batches.start_at(self._pending["lightning"]["epoch"], done)
        return str(self.store.folder("partial", self.key))

    def loaded(self) -> dict[str, Any]:
        """Give Lightning its part of the checkpoint, once."""
        saved, self._pending = self._pending, None
        return saved["lightning"] if saved else {}

    def end_phase(self, progress: Progress) -> None:
        """Note that a phase is over; `progress` counts it."""
        self._restore_random()
        progress.seconds, self._since = self.seconds(), self._clock()
        self.progress = progress

    def finish(self) -> None:
        """Remove the checkpoints of a stage that is stored, and let go of its model."""
        del self._ctx, self._method, self._baseline
        for entry in self._all():
            self.store.discard("partial", entry.key)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the signals back, and start counting steps."""
        self.interrupts.install()
        self._step = self._saved_step = trainer.global_step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Put the random generators where they were, right before the first batch after a restart."""
        self._restore_random()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save behind an optimizer step, if it is time or the run is asked to stop."""
        self._step = trainer.global_step
        stop, save = self.interrupts.requested, self._due(self._step)
        if ranks.size() > 1:
            stops, save = pl_module.agreed
            stop = next(filter(None, ranks.gather(stop))) if stops else None
        save = save or stop is not None
        if save or pl_module.readings.due:
            pl_module.read()
        if save and self.store.writable:
            self._terms, self._skipped = dict(pl_module.readings.seen), pl_module.skipped
            begun = self._clock()
            try:
                trainer.save_checkpoint("partial")
            except StoreError as error:
                log.warning("the stage under way was not saved: %s", error)
            self._last_save = self._clock()
            self._cost, self._saved_step = self._last_save - begun, self._step
        if stop is not None:
            raise Stopped(stop)

    def votes(self) -> tuple[bool, bool]:
        """Say whether this process was asked to stop, and whether it is time to save by the clock of rank 0."""
        return self.interrupts.requested is not None, ranks.is_first() and self._due(self._step + 1)

    def save(self, lightning: dict[str, Any]) -> None:
        """Publish a checkpoint; `lightning` is what its Trainer dumps."""
        lightning = {key: value for key, value in lightning.items() if key not in ("state_dict", "callbacks")}
        _count_epochs(lightning)
        progress = {**asdict(self.progress), "seconds": self.seconds()}
        plain, tensors = tree.pack(
            {
                "lightning": lightning,
                "progress": progress,
                "terms": self._terms,
                "skipped": self._skipped,
                "method": self._baseline.changes(),
                "rng": self._ctx.rng.getstate(),
                "random": _random_state(),
                "carried": self._carried,
            }
        )
        weights = self._weights()
        check_finite("weight", weights, self._ctx.stage, f"after step {self._step}")

        def write(folder: Path) -> dict[str, str]:
            (folder / "state.json").write_text(json.dumps(plain, allow_nan=False), encoding="utf-8")
            return {
                "weights.safetensors": write_tensors(weights, folder / "weights.safetensors"),
                "state.safetensors": write_tensors(tensors, folder / "state.safetensors"),
            }

        older = [entry.key for entry in self._all()]
        count = 1 + max((int(key[-_STEP_DIGITS:], 16) for key in older), default=0)
        self.store.publish(
            "partial",
            f"{self.key}{count:0{_STEP_DIGITS}x}",
            write,
            inputs={"stage": self.key},
            versions=self.versions,
            facts={"at": f"phase {self.progress.phase + 1}, step {self._step}"},
            needs=tensor_bytes(weights) + tensor_bytes(tensors),
        )
        for key in older:
            self.store.discard("partial", key)

    def pending_terms(self) -> tuple[dict[str, float], int]:
        """Give the loss terms seen, and steps skipped, in the phase that is taken up."""
        return (self._pending["terms"], self._pending["skipped"]) if self._pending else ({}, 0)

    def _weights(self) -> dict[str, Tensor]:
        """Take the weights that are not the start model's; split ones are collected one by one, for rank 0."""
        found = {}
        for name, tensor in weights_of(self._ctx.model).items():
            collected = whole(tensor)
            if collected is not tensor:
                collected = collected.cpu()
                if not ranks.is_first():
                    continue
            if name in self._before or self._start.changed({name: collected}):
                found[name] = collected
        return found

    def _due(self, step: int) -> bool:
        if self.every_steps is not None and step - self._saved_step >= self.every_steps:
            return True
        if self.every_s is None:
            return False
        return self._clock() - self._last_save >= max(self.every_s, self._cost / self.share)

    def _all(self) -> list[Entry]:
        """Checkpoints of the stage, oldest first."""
        folder = self.store.root / "partial"
        keys = ranks.on_first(lambda: sorted(path.name for path in folder.glob(f"{self.key}*")))
        found = [self.store.find("partial", key) for key in keys if len(key) == len(self.key) + _STEP_DIGITS]
        return [entry for entry in found if entry is not None]

    def _take_newest(self) -> Entry | None:
        """Bring model and method to the newest checkpoint that is whole; nothing changes if there is none."""
        for entry in reversed(self._all()):
            try:
                weights = entry.file("weights.safetensors")
                tensors = dict(read_tensors(entry.file("state.safetensors")))
                saved = tree.unpack(entry.json("state.json"), tensors)
                self._baseline.apply(saved["method"])  # all or nothing
            except DamagedEntry as error:
                log.warning("%s", error)
                continue
            except MethodError as error:
                log.warning("the checkpoint at %s cannot be taken up: %s", entry.facts["at"], error)
                continue
            put_weights(self._ctx.model, read_tensors(weights))
            self._ctx.rng.setstate(saved["rng"])
            self._carried.clear()
            self._carried.update(saved["carried"])
            self.progress = Progress(**saved["progress"])
            self._random, self._pending = saved["random"], saved
            return entry
        return None

    def _restore_random(self) -> None:
        if self._random is not None:
            _set_random_state(self._random)
            self._random = None


class _Io(CheckpointIO):
    """Where Lightning's Trainer saves to and loads from."""

    def __init__(self, owner: StageCheckpoints):
        self._owner = owner

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Publish in the store."""
        self._owner.save(checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Give what `begin` read; JSON and safetensors, so loading runs no code."""
        return {**self._owner.loaded(), "state_dict": {}, "callbacks": {}}

    def remove_checkpoint(self, path: Any) -> None:
        """Leave removal to the owner."""


def _count_epochs(lightning: dict[str, Any]) -> None:
    """Say that the epoch under way was begun.

    A Trainer that was taken up at the end of an epoch counts one begun epoch too few from then on. Taken up again at
    the end of the last one, it would believe that one still to come.
    """
    over = lightning["epoch"]
    counts = {"ready": over + 1, "started": over + 1, "processed": over, "completed": over}
    lightning["loops"]["fit_loop"]["epoch_progress"] = {"total": counts, "current": dict(counts)}


def check_finite(what: str, tensors: Mapping[str, Tensor], stage: Stage, when: str) -> None:
    """Keep what is not finite out of the store.

    Raises:
        MethodError: Naming the first tensor with such a value.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise MethodError(
                f"stage {stage.index} ({stage.task}): {what} {name} is not finite {when}; it is not stored. Lower "
                "optim.optimizer.lr, or set trainer.precision=32-true."
            )


def _random_state() -> dict[str, Any]:
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])
