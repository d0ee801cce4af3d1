"""What of a store can go, and its removal: `python -m trace_hydra.store gc`. Loads no torch."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trace_hydra.store import drafts
from trace_hydra.store.entries import Store
from trace_hydra.store.survey import Item, Note, Survey, changed, folder_size, other_folders

Keep = Literal["last", "adapters", "none"]
WEIGHT_FILES = ("weights.safetensors", "state.safetensors")
"""Files of a stage that only training on and answering need."""
_DAY_S = 86400.0


@dataclass(frozen=True)
class Action:
    """One thing that can go."""

    name: str
    what: str
    """"remove" or "drop weights"."""
    size: int
    reason: str
    do: Callable[[Store], bool]
    """Does it; False if somebody holds it now."""


def plan(
    found: Survey, *, older_than: float, unused: bool = False, keep: Keep | None = None, now: float | None = None
) -> list[Action]:
    """List what can go. What an unfinished run stands on stays, and so does what is locked.

    Args:
        found: The store.
        older_than: Days; what nobody is known to want stays for so long, for a run elsewhere may be at it.
        unused: Also entries that no run stands on and nothing was made from that one does.
        keep: Also weights of stages of finished runs: all but the last stage's ("last"), those of stages that train
            most of the model ("adapters"), all ("none").
        now: Seconds since the epoch.
    """
    before = (time.time() if now is None else now) - older_than * _DAY_S
    busy = {name for note in found.notes if not note.finished for name in note.uses}
    actions = [
        *_drafts(found, before),
        *_damaged(found),
        *_tokens(found, before),
        *_checkpoints(found, busy, before),
        *map(_note, found.gone),
    ]
    removed = set()
    if unused:
        needed = found.needed()
        for item in found.items.values():
            wanted = item.kind == "partial" or item.name in needed or item.name in found.locked
            if not wanted and item.problem is None and item.made <= before:
                removed.add(item.name)
                actions.append(_removal(item, "no run stands on it"))
    if keep is not None:
        actions += [one for one in _weights(found, busy, keep) if one.name not in removed]
    return actions


def _drafts(found: Survey, before: float) -> Iterator[Action]:
    for folder in other_folders(found.root, "drafts"):
        alive = drafts.alive(folder)
        if alive is False or (alive is None and changed(folder) <= before):
            reason = "its writer is gone" if alive is False else "left behind"
            yield Action(f"drafts/{folder.name}", "remove", folder_size(folder), reason, _folder_removal(folder))


def _damaged(found: Survey) -> Iterator[Action]:
    for folder in other_folders(found.root, "damaged"):
        yield Action(f"damaged/{folder.name}", "remove", folder_size(folder), "set aside", _folder_removal(folder))


def _tokens(found: Survey, before: float) -> Iterator[Action]:
    for folder in other_folders(found.root, "tokens"):
        if changed(folder) <= before:  # reading them counts as a change
            removal = _folder_removal(folder)
            yield Action(f"tokens/{folder.name}", "remove", folder_size(folder), "not read any more", removal)


def _checkpoints(found: Survey, busy: set[str], before: float) -> Iterator[Action]:
    """Checkpoints of stages that are stored, and old ones that no unfinished run could take up."""
    for item in found.items.values():
        if item.kind != "partial" or item.problem is not None:
            continue
        stage = f"stages/{item.manifest['inputs'].get('stage')}"
        if stage in found.locked:
            continue
        stored = found.items.get(stage)
        if stored is not None and stored.problem is None and not stored.dropped:
            yield _removal(item, "its stage is stored")
        elif stage not in busy and item.made <= before:
            yield _removal(item, "no unfinished run goes on from it")


def _weights(found: Survey, busy: set[str], keep: Keep) -> Iterator[Action]:
    for item in found.items.values():
        there = [name for name in WEIGHT_FILES if name in item.manifest.get("files", {})]
        runs = found.runs_of(item.name)
        if item.kind != "stages" or item.problem is not None or not there or not runs:
            continue
        if item.name in busy or item.name in found.locked or (keep == "adapters" and not is_whole(item)):
            continue
        if keep == "last" and any(run.stages[-1] == item.name for run in runs):
            continue
        size = sum(item.manifest["files"][name]["size"] for name in there)
        yield Action(item.name, "drop weights", size, f"{len(runs)} finished runs", _weights_removal(item))


def is_whole(item: Item) -> bool:
    """Tell whether a stage trained most of the model, so that its weights are as large as that."""
    return item.facts["effort"]["trainable_params"] > 0.5 * item.facts["parameters"]


def _removal(item: Item, reason: str) -> Action:
    def do(store: Store) -> bool:
        with store.lock(item.kind, item.key, item.name, give_up=lambda: True) as held:
            if held:
                store.discard(item.kind, item.key)
            return held and not item.folder.exists()

    return Action(item.name, "remove", item.size, reason, do)


def _weights_removal(item: Item) -> Callable[[Store], bool]:
    def do(store: Store) -> bool:
        with store.lock(item.kind, item.key, item.name, give_up=lambda: True) as held:
            entry = store.find(item.kind, item.key) if held else None
            if entry is not None:
                store.drop(entry, WEIGHT_FILES)
            return entry is not None

    return do


def _folder_removal(folder: Path) -> Callable[[Store], bool]:
    def do(_: Store) -> bool:
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()

    return do


def _note(note: Note) -> Action:
    def do(_: Store) -> bool:
        note.path.unlink(missing_ok=True)
        return True

    return Action(f"runs/{note.path.stem}", "remove", 0, f"{note.directory} is gone", do)
