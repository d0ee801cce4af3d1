"""A run that is killed right behind any checkpoint, and started again, ends with the same bytes; every method."""

import hashlib
import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import ROOT, SMALLER, run_tiny, some

from trace_hydra.resume import StageCheckpoints

METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
TASKS = ["FOMC", "NumGLUE-cm", "20Minuten"]
SETTINGS = [
    f"task_order=[{','.join(TASKS)}]", "checkpoint.every_steps=1", "budget.batch_size=4", "budget.micro_batch_size=2",
    "budget.default_epochs=2", "budget.epochs={}",
]  # fmt: skip
CLOCKS = ("wall_clock_s", "seconds", "plain_step_s", "step_ratio")
"""Fields of results.json that a clock decides."""


class Killed(BaseException):
    """Stands for kill -9: nothing catches it, and nothing is saved for it."""


def settings(name: str) -> list[str]:
    return [f"method={name}", *SETTINGS, *SMALLER.get(name, ())]


def without_clocks(value):
    if isinstance(value, dict):
        return {key: without_clocks(one) for key, one in value.items() if key not in CLOCKS}
    return [without_clocks(one) for one in value] if isinstance(value, list) else value


def outcome(directory: Path) -> dict:
    """Everything a run leaves: hashes of all stages' weights and states, of all predictions, and its results."""
    found = {}
    for manifest in sorted((directory / "store" / "stages").glob("*/manifest.json")):
        described = json.loads(manifest.read_text())
        found |= {f"{manifest.parent.name}/{name}": one["sha256"] for name, one in described["files"].items()}
    for path in sorted((directory / "run" / "predictions").rglob("*.jsonl")):
        found[str(path.relative_to(directory))] = hashlib.sha256(path.read_bytes()).hexdigest()
    found["results"] = without_clocks(json.loads((directory / "run" / "results.json").read_text()))
    return found


def run_killed(directory: Path, overrides: list[str], after: int) -> bool:
    """Run until `after` checkpoints were made in this process; returns whether it got that far."""
    save, saved = StageCheckpoints.save, []

    def save_and_die(self, lightning):
        save(self, lightning)
        saved.append(1)
        if len(saved) == after:
            raise Killed

    with patch.object(StageCheckpoints, "save", save_and_die):
        try:
            run_tiny(directory, overrides)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_ends_with_the_same_bytes(name, tmp_path):
    """Killed behind the 2nd checkpoint, and the 5th after that; 4 steps a stage, more where rows are replayed."""
    run_tiny(tmp_path / "whole", settings(name))
    kills = 0
    for after in (2, 5, 100):
        kills += run_killed(tmp_path / "killed", settings(name), after)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    trains = any((tmp_path / "whole" / "store").glob("partial"))
    assert kills > 0 or not trains


@pytest.mark.parametrize("name", some(METHODS, 4))
def test_a_run_killed_between_stages_ends_with_the_same_bytes(name, tmp_path):
    """Stages are trained anew from restored ones whose rows are answered already, so nothing but training touches them.

    What a stage begins with may not depend on whether the model was restored, nor on whether it answered before.
    """
    run = run_tiny(tmp_path, settings(name))
    whole = outcome(tmp_path)
    store = tmp_path / "store"
    for stage in run.results["stages"][1:]:
        shutil.rmtree(store / "stages" / stage["key"])
    for manifest in (store / "answers").glob("*/manifest.json"):
        if json.loads(manifest.read_text())["facts"]["row"] > 1:
            shutil.rmtree(manifest.parent)
    run_tiny(tmp_path, settings(name))
    assert outcome(tmp_path) == whole


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=replay", "method.when=after"],  # two phases in a stage
        ["method=seqft", "optim.carry=true"],
        ["method=seqft", "optim.schedule=cosine", "optim.warmup_ratio=0.3"],
        ["method=seqft", "trainer.precision=bf16-mixed"],
        ["method=lora", "trainer.precision=bf16-true"],
    ],
    ids=lambda one: "_".join(one),
)
def test_a_killed_run_with_other_settings(overrides, tmp_path):
    """Killed behind the last step of an epoch, of the next, in the middle of an epoch, and behind a last step again."""
    run_tiny(tmp_path / "whole", [*overrides, *SETTINGS])
    kills = sum(run_killed(tmp_path / "killed", [*overrides, *SETTINGS], after) for after in (2, 2, 3, 1, 100))
    assert kills == 4 and outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
