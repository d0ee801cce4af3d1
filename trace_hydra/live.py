"""The model of a run: loaded when something must be trained or answered, and brought to the state that asks for it."""

import gc
import json
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from trace_hydra import inputs, keys, ranks, train
from trace_hydra.build import Parts
from trace_hydra.capability.subject import StartModel, Subject
from trace_hydra.context import StageContext
from trace_hydra.engines.base import State
from trace_hydra.errors import MethodError, StoreError
from trace_hydra.fingerprint import Fingerprints, quick_hash
from trace_hydra.interrupt import Interrupts
from trace_hydra.memory import give_back
from trace_hydra.methods.base import Method
from trace_hydra.models.device import fit_to
from trace_hydra.models.generate import Decoding
from trace_hydra.models.weights import put_weights, weights_of
from trace_hydra.plan import Effort, Stage
from trace_hydra.prepare import Prepared, epochs_of
from trace_hydra.resume import StageCheckpoints, check_finite
from trace_hydra.store import tree
from trace_hydra.store.entries import DamagedEntry, Entry, Store
from trace_hydra.store.tensors import read_tensors, tensor_bytes, write_tensors
from trace_hydra.strategies import build_trainer
from trace_hydra.targets import instantiate

log = logging.getLogger(__name__)

BEFORE = Stage(0, "", 0, 0, 0, 0, "")
"""Where a run is before its first stage."""
WEIGHTS = "weights.safetensors"
"""Of a stage's entry: the weights that are not the start model's."""


class Live:
    """Trains the stages that the store lacks and brings the model to the state after any stage.

    Args:
        config: The run's.
        parts: Its parts; the method of a reloaded model is built anew.
        prepared: Rows, tokenizer, plan.
        store: Where stages come from and go to.
        interrupts: Says when to stop.
    """

    def __init__(self, config: DictConfig, parts: Parts, prepared: Prepared, store: Store, interrupts: Interrupts):
        self.config, self.parts, self.prepared, self.store = config, parts, prepared, store
        self.interrupts = interrupts
        self.method: Method = parts.method
        self.row: int | None = None
        """The stage whose state the model is in; None if it is not loaded, untouched, or half-way."""
        self._fresh = False
        """Whether the model is the start model with nothing added."""
        self._ctx: StageContext | None = None
        self._start: Fingerprints | None = None
        self._carried: dict[str, Any] = {}
        self._changed: set[str] = set()
        """Names of weights that are not the start model's in the state `row`."""
        settings = config.checkpoint
        self._checkpoints = StageCheckpoints(
            store,
            every_s=settings.every_s,
            every_steps=settings.every_steps,
            share=settings.share,
            interrupts=interrupts,
            versions=inputs.versions(),
        )

    @contextmanager
    def untouched(self) -> Iterator[Subject]:
        """Give the start model before anything is added to it; loads it if need be."""
        if not self._fresh:
            self._load()
        assert self._ctx is not None
        self.parts.engine.at(State(keys.digest(["untouched", self._start_key])))
        with undisturbed(self._ctx):
            yield Subject(self._ctx, StartModel(self.method))

    def at(self, row: int) -> StageContext:
        """Bring model and method to the state after a stage (0: before training), training what the store lacks."""
        if self.row != row:
            self._reach(row)
        assert self._ctx is not None
        self.parts.engine.at(State(self.stage(row).key or self._start_key, frozenset(self._changed)))
        self._ctx.enter(self.stage(row), self._view(row))
        return self._ctx

    def restored(self, row: int) -> StageContext:
        """Bring model and method to the state after a stage that is stored (0: before training); trains nothing.

        Raises:
            StoreError: If the stage is not stored, or without its weights.
            DamagedEntry: If its files are not those of its manifest.
        """
        self._begin()
        if row:
            stage = self.stage(row)
            entry = self.store.find("stages", stage.key)
            if entry is None or entry.manifest.get("dropped"):
                state = "is not in the store" if entry is None else "is in the store without its weights"
                raise StoreError(
                    f"stage {row} ({stage.task}), stages/{stage.key}, {state} ({self.store.root}). The run's own "
                    "command trains what it needs; keep weights with store.keep=all."
                )
            self._restore(entry, row)
        assert self._ctx is not None
        self._ctx.enter(self.stage(row), self._view(row))
        return self._ctx

    def ensure(self, stage: Stage) -> Effort:
        """Have a stage trained, here or by whoever did it before; returns what that cost."""
        if (entry := self.store.find("stages", stage.key)) is not None:
            return Effort(**entry.facts["effort"])
        what = f"stage {stage.index} ({stage.task})"
        with self.store.lock(
            "stages", stage.key, what, give_up=lambda: self.store.find("stages", stage.key) is not None
        ):
            if (entry := self.store.find("stages", stage.key)) is not None:
                return Effort(**entry.facts["effort"])
            return self._train(stage)

    def stage(self, row: int) -> Stage:
        """The planned stage of a row."""
        return self.prepared.run.stages[row - 1] if row else BEFORE

    def close(self, row: int) -> None:
        """Give memory back, and apply `store.keep` to the stages before a scored row, or to all with the last."""
        give_back()
        last = len(self.prepared.run.stages)
        keep = self.config.store.keep
        for index in [row - 1, *([last] if row == last else [])]:
            if keep == "all" or index < 1 or (keep == "last" and index == last):
                continue
            entry = self.store.find("stages", self.stage(index).key)
            if entry is not None and (keep != "adapters" or self._is_whole(entry)):
                self.store.drop(entry, [WEIGHTS, "state.safetensors"])

    def _is_whole(self, entry: Entry) -> bool:
        return entry.facts["effort"]["trainable_params"] > 0.5 * entry.facts["parameters"]

    @cached_property
    def _start_key(self) -> str:
        return inputs.key_of(inputs.start_inputs(self.config, self.parts))

    def _view(self, row: int):
        views = self.prepared.views
        return views[self.stage(row).task] if row else next(iter(views.values()))

    def _reach(self, row: int) -> None:
        """Reload, and restore the newest state at or before the row that is stored; train on from there."""
        self._begin()
        if row == 0:
            return
        stage = self.stage(row)
        if self._put_back(row):
            return
        with self.store.lock("stages", stage.key, f"stage {row} ({stage.task})"):
            if not self._put_back(row):  # nobody made it while we waited
                self._train(stage)

    def _put_back(self, row: int) -> bool:
        """Restore a stage if the store has it with its weights, whole."""
        entry = self.store.find("stages", self.stage(row).key)
        if entry is None or entry.manifest.get("dropped"):
            return False
        self._begin()
        try:
            self._restore(entry, row)
        except DamagedEntry as error:
            log.warning("%s", error)
            self.row, self._fresh = None, False  # a part of it may have been put back
            return False
        return True

    def _train(self, stage: Stage) -> Effort:
        """Train a stage and store it."""
        before = 0 if stage.apart else stage.index - 1
        ctx = self.at(before)
        if self._start is None:
            raise MethodError("the start model's fingerprints are missing.")  # _begin sets them
        ctx.enter(stage, self._view(stage.index))
        self.parts.engine.at(None)
        reseed(self.config.seed.train, stage.draw)
        training = train.Training(self.config, self.parts, self._checkpoints, self._start)
        self.row = None  # half-way states are of no use
        phases = train.begin_stage(training, ctx, self.method, self._carried, self._changed)
        with self.interrupts.hold():
            effort = train.train_stage(training, ctx, self.method, phases, self._carried)
            self._publish(stage, effort)
            self.row = stage.index if self._alike() else None
            self._checkpoints.finish()
        return effort

    def _alike(self) -> bool:
        """Whether all processes of the run ended a stage alike; else all of them take up what rank 0 has stored."""
        if ranks.size() == 1 or not self.store.writable:
            return True
        assert self._ctx is not None
        plain, tensors = tree.pack({"method": self.method.state_dict(), "carried": self._carried})
        found = {**weights_of(self._ctx.model), **{f"state.{name}": one for name, one in tensors.items()}}
        own = keys.digest({"plain": plain, "tensors": {name: quick_hash(one)[2] for name, one in found.items()}})
        if len(set(ranks.gather(own))) == 1:
            return True
        log.warning("the processes ended the stage in different states; all go on from what rank 0 has stored.")
        return False

    def _publish(self, stage: Stage, effort: Effort) -> None:
        assert self._ctx is not None and self._start is not None
        own = weights_of(self._ctx.model)
        weights = self._start.changed(own)
        self._changed = set(weights)
        plain, tensors = tree.pack({"method": self.method.state_dict(), "carried": self._carried})
        for where, group in (("weight", weights), ("the method's state", tensors)):
            check_finite(where, group, stage, "after training")

        def write(folder: Path) -> dict[str, str]:
            (folder / "state.json").write_text(json.dumps(plain, allow_nan=False), encoding="utf-8")
            return {
                WEIGHTS: write_tensors(weights, folder / WEIGHTS),
                "state.safetensors": write_tensors(tensors, folder / "state.safetensors"),
            }

        if (old := self.store.find("stages", stage.key)) is not None and old.manifest.get("dropped"):
            self.store.discard("stages", stage.key)
        decided = self.prepared.entries[f"stages/{stage.key}"]
        self.store.publish(
            "stages",
            stage.key,
            write,
            inputs=decided,
            versions=inputs.versions(),
            uses=[f"stages/{decided['previous']}"] if decided["previous"] else [],
            facts={
                "task": stage.task,
                "effort": asdict(effort),
                "parameters": sum(weight.numel() for weight in self._ctx.model.parameters()),
            },
            needs=tensor_bytes(weights) + tensor_bytes(tensors),
        )

    def _restore(self, entry: Entry, row: int) -> None:
        assert self._ctx is not None
        files = [entry.file(name) for name in (WEIGHTS, "state.safetensors")]
        saved = tree.unpack(entry.json("state.json"), dict(read_tensors(files[1])))
        self._changed = put_weights(self._ctx.model, read_tensors(files[0]))
        self.method.load_state_dict(saved["method"])
        self._carried.clear()
        self._carried.update(saved["carried"])
        self.row = row

    def _begin(self) -> None:
        """Bring model and method to where they are before the first stage."""
        if self.row == 0:
            return
        if self.row is not None and not self._changed and type(self.method).setup is Method.setup:
            self.method, self._carried, self.row = self._new_method(), {}, 0  # the weights are the start model's
            return
        if not self._fresh:
            self._load()
        ctx = self._ctx
        assert ctx is not None
        self._fresh = False
        reseed(self.config.seed.train, 0)  # an adapter's first weights are drawn
        ctx.model = self._convert(self.parts.tuning.apply(ctx.model))
        ctx.prefix = self.parts.tuning.prefix(ctx.model)
        ctx.enter(BEFORE, self._view(0))
        reseed(self.config.seed.train, 0)
        self.method.setup(ctx)
        self._start = Fingerprints(weights_of(ctx.model).items())
        self._changed = set()
        self.row = 0

    def _new_method(self) -> Method:
        return instantiate(OmegaConf.to_container(self.config.method, resolve=True))  # type: ignore[arg-type]

    def _load(self) -> None:
        """Load the start model into a new context, with a new method if the old one was used."""
        config, prepared, method = self.config, self.prepared, self.parts.method
        if self._ctx is not None:
            self._ctx.model = torch.nn.Module()  # two models need twice the memory
            self.method = method = self._new_method()
            gc.collect()  # Lightning's objects refer to each other, and one of them to the model
        trainer = build_trainer(self.parts.trainer)
        decoding = config.protocol.decoding
        self.method, self._carried, self.row, self._fresh = method, {}, None, True
        model = self.parts.model.load()
        fit_to(trainer.strategy.root_device, model, config.trainer, config.model.get("kernels") or "torch")
        # A fit converts the model for precisions such as bf16-true; done first, stored and kept states are alike.
        self._convert = trainer.precision_plugin.convert_module
        self._ctx = StageContext(
            model=trainer.precision_plugin.convert_module(model),
            tokenizer=prepared.tokenizer,
            encoder=prepared.encoder,
            tuning=self.parts.tuning,
            device=trainer.strategy.root_device,
            decoding=Decoding(decoding.do_sample, decoding.temperature, decoding.top_p),
            batch_tokens=config.evaluation.batch_tokens,
            instructions={name: view.instruction for name, view in prepared.views.items()},
            alignment=prepared.data.alignment,
            epochs_of=lambda task: epochs_of(config.budget, task),
            generation_seed=config.seed.generation,
            data_seed=config.seed.data,
            autocast=trainer.precision_plugin.forward_context,
            total_stages=len(prepared.run.stages),
            sees_num_stages=method.sees_num_stages or method.sees_all_tasks,
            makes_rows=method.makes_rows,
            all_tasks=prepared.views if method.sees_all_tasks else None,
            engine=self.parts.engine,
        )


def reseed(*parts: Any) -> None:
    """Seed every global generator from seed and stage, so that a stage does not depend on how it was reached."""
    value = random.Random("-".join(map(str, parts))).getrandbits(32)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@contextmanager
def undisturbed(ctx: StageContext) -> Iterator[None]:
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
