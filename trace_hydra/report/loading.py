"""The runs below some folders, for a report: those that can be averaged, those that cannot, and what cannot be read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trace_hydra.collect import collect
from trace_hydra.errors import DataError
from trace_hydra.metrics.continual import ScoreMatrix
from trace_hydra.report.groups import Member
from trace_hydra.report.results import SCHEMA


@dataclass
class Loaded:
    """What lies below folders."""

    members: list[Member] = field(default_factory=list)
    """Whole runs, each once."""
    partial: list[Member] = field(default_factory=list)
    """Runs that lack cells or hold numbers that are not finite: shown, never averaged."""
    left_out: list[dict[str, str]] = field(default_factory=list)
    """`folder` and `reason`; partial runs are among them."""


def load(folders: Sequence[Path]) -> Loaded:
    """Read every run in and below some folders; a run that is there twice counts once.

    Raises:
        DataError: If a folder is not there, or none holds a run.
    """
    found, seen = Loaded(), dict[str, str]()
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder; name a run directory, a sweep's or one above.")
        collected = collect(folder)
        for one in collected.left_out:
            found.left_out.append({"folder": str(folder / one["folder"]), "reason": one["reason"]})
        for run in collected.partial:
            if not _damage(run.results):
                found.partial.append(Member(run, folder / run.folder))
        for run in collected.runs:
            name = str(folder / run.folder)
            if reason := _damage(run.results):
                found.left_out.append({"folder": name, "reason": reason})
            elif (other := seen.setdefault(run.identity, name)) != name:
                found.left_out.append({"folder": name, "reason": f"the same run as {other}"})
            else:
                found.members.append(Member(run, folder / run.folder))
    if not (found.members or found.partial or found.left_out):
        raise DataError(f"no run in or below {', '.join(map(str, folders))}; name a folder of run directories.")
    return found


def _damage(results: Mapping[str, Any]) -> str | None:
    """Say what of a results.json a report cannot work with."""
    schema = results.get("schema")
    if schema != SCHEMA:
        older = isinstance(schema, int) and schema < SCHEMA
        said = f"schema {str(schema)[:40]}, this version reads {SCHEMA}"
        return f"results.json is of {'an older' if older else 'another'} version ({said}); run it again"
    try:
        ScoreMatrix(results["tasks"], results.get("matrix"))
    except (DataError, TypeError) as error:
        return f"results.json is damaged: {error}"
    if wrong := [number for number, stage in enumerate(results["stages"], 1) if not _is_stage(stage)]:
        return f"results.json is damaged: stage {wrong[0]} lacks its task, rows or epochs"
    return _capability_damage(results.get("capability") or {})


def _is_stage(stage: Any) -> bool:
    whole = isinstance(stage, Mapping) and isinstance(stage.get("task"), str)
    return whole and all(isinstance(stage.get(key), int) for key in ("rows", "epochs"))


def _capability_damage(found: Any) -> str | None:
    sets = found.get("sets", {}) if isinstance(found, Mapping) else None
    if not isinstance(sets, Mapping) or not all(isinstance(one, Mapping) for one in sets.values()):
        return "results.json is damaged: capability.sets is no mapping"
    needed = {"area", "before", "after", "delta", "interval"}
    for name, one in sets.items():
        if lacking := needed - set(one):
            return f"results.json is damaged: capability.sets.{str(name)[:60]} lacks {', '.join(sorted(lacking))}"
    return None
