"""Room on disk: what a run is going to write to the store, asked for before it starts."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from trace_hydra.build import Parts
from trace_hydra.cost import Estimate, estimate_run
from trace_hydra.cost_model import optimizer_bytes
from trace_hydra.cost_rows import sampled_rows
from trace_hydra.errors import StoreError, TraceHydraError
from trace_hydra.prepare import Prepared
from trace_hydra.store.entries import Store

log = logging.getLogger(__name__)

_SAMPLE = 200
"""Rows of a task that are counted: counting all would take as long as the plan took, for a few percent of accuracy."""


def check_space(config: DictConfig, parts: Parts, prepared: Prepared, store: Store) -> float | None:
    """Compare what the missing stages take with what is free.

    Returns:
        Bytes that will be written and stay, plus one checkpoint; None where nothing is missing, or a size is unknown.

    Raises:
        StoreError: If there is too little room; names the numbers and what needs less.
    """
    missing = _to_train(prepared, store)
    if not missing or not store.writable:
        return None
    try:
        rows = sampled_rows(config, parts.specs, prepared.data, prepared.encoder, _SAMPLE)
        estimate = estimate_run(config, parts, rows)
    except (TraceHydraError, AttributeError) as error:
        log.info("what the stages take on disk is not known: %s", error)
        return None
    optimizer = _trained(estimate) * optimizer_bytes(parts.optimizer, estimate.size.weight_bytes)
    carried = optimizer if config.optim.carry else 0.0
    stages = {index: sum(stage_bytes(estimate, parts, index)) + carried for index in missing}
    # What the method keeps since stages before is not in a checkpoint: it comes from the entry of the stage before.
    checkpoint = max(stage_bytes(estimate, parts, index)[0] for index in missing) + optimizer
    needed = _kept(stages, config.store.keep, adapters=_is_part(estimate)) + checkpoint
    free = shutil.disk_usage(_existing(store.root)).free
    if needed > free - config.store.reserve_gb * 1e9:
        last = _kept(stages, "last", adapters=False) + checkpoint
        raise StoreError(
            f"paths.store={store.root}: {len(missing)} stages and a checkpoint take about {needed / 1e9:.2f} GB; "
            f"{free / 1e9:.2f} GB are free, of which store.reserve_gb={config.store.reserve_gb:g} stay. Free space "
            f"(python -m trace_hydra.store gc), change paths.store, or set store.keep=last, which takes about "
            f"{last / 1e9:.2f} GB."
        )
    return needed


def _to_train(prepared: Prepared, store: Store) -> list[int]:
    """List the stages that the store lacks, and those without weights that they begin from."""
    entries = {stage.index: store.find("stages", stage.key) for stage in prepared.run.stages}
    found: set[int] = set()
    for stage in prepared.run.stages:
        if entries[stage.index] is not None:
            continue
        found.add(stage.index)
        for before in range(stage.index - 1, 0, -1):  # back to one that training can go on from
            entry = entries[before]
            if stage.apart or (entry is not None and not entry.manifest.get("dropped")):
                break
            found.add(before)
    return sorted(found)


def stage_bytes(estimate: Estimate, parts: Parts, index: int) -> tuple[float, float]:
    """Estimate a stage's entry: weights that are not the start model's, and the method's state after so many tasks."""
    size = estimate.size
    weights = estimate.parameters if parts.method.merges else _trained(estimate)
    if parts.method.cells == "last" and index < size.stages:
        weights = 0
    so_far = {key: getattr(size, key)[:index] for key in ("rows", "row_bytes", "row_tokens", "answer_tokens")}
    return weights * size.weight_bytes, parts.method.state_size(replace(size, **so_far)).stored


def _trained(estimate: Estimate) -> float:
    """Most weights that train in any stage; a method that draws them anew in each reaches all of the tuning's."""
    return max(estimate.trained, estimate.size.num_trainable)


def _kept(stages: dict[int, float], keep: str, *, adapters: bool) -> float:
    if keep == "all" or (keep == "adapters" and adapters):
        return sum(stages.values())
    return 2 * max(stages.values())  # the stage before goes when the next is stored


def _is_part(estimate: Estimate) -> bool:
    return estimate.trained <= 0.5 * estimate.parameters


def _existing(folder: Path) -> Path:
    return next(one for one in [folder, *folder.absolute().parents] if one.exists())
