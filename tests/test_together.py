"""Jobs of one store at the same time: what several need is made once, and a run directory has one run."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from contract.test_resume import without_clocks

WATCHED = """
import sys
from trace_hydra import scoreboard
from trace_hydra.__main__ import main
from trace_hydra.capability.mini import Mini
from trace_hydra.live import Live

def told(what, function):
    def tell(*given, **named):
        print(what(*given), file=sys.stderr, flush=True)
        return function(*given, **named)
    return tell

answer = scoreboard.answer_prompts
scoreboard.answer_prompts = told(lambda method, ctx, prompts, view: f"MADE {ctx.stage.index} {view.name}", answer)
Mini.measure = told(lambda one, subject: f"MADE capability {type(subject.method).__name__}", Mini.measure)
Live._train = told(lambda live, stage: f"MADE stage {stage.index}", Live._train)
main()
"""
"""The command line, telling what it makes itself."""
SETTINGS = [
    "debug=smoke", "logger=none", "callbacks=none", "task_order=[FOMC,Py150]", "data.rows.train=8", "data.rows.test=3",
    "budget.default_epochs=20",
]  # fmt: skip


def start(folder: Path, *extra: str) -> subprocess.Popen:
    places = [f"paths.runs={folder / 'runs'}", f"paths.store={folder / 'store'}"]
    return subprocess.Popen(
        [sys.executable, "-c", WATCHED, *SETTINGS, *places, *extra],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(jobs: list[subprocess.Popen]) -> list[Counter]:
    """What each job made itself."""
    said = [job.communicate(timeout=300) for job in jobs]
    assert [job.returncode for job in jobs] == [0] * len(jobs), [err[-2000:] for _, err in said]
    return [Counter(line for line in err.splitlines() if line.startswith("MADE")) for _, err in said]


def results(folder: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in (folder / "runs").glob("*/results.json")}


@pytest.mark.long
def test_the_same_command_twice_at_once_trains_once(tmp_path):
    """In the same run directory: one waits for the other, finds all in the store, and ends with the same results."""
    made = finish([start(tmp_path) for _ in range(2)])
    assert sorted(map(len, made)) == [0, len(made[0] or made[1])] and not set((made[0] & made[1]).elements())
    (run,) = (tmp_path / "runs").iterdir()
    assert "is being made by" in (run / "trace_hydra.log").read_text()
    finish([start(tmp_path / "alone")])
    ((name, found),) = results(tmp_path).items()
    assert without_clocks(found) == without_clocks(results(tmp_path / "alone")[name]) and found["complete"]
    assert not list((tmp_path / "store" / "locks").iterdir()) and not list((tmp_path / "store" / "drafts").iterdir())


@pytest.mark.long
def test_the_start_model_answers_once_for_four_methods(tmp_path):
    """Row 0 has two cells and a capability set; every other cell belongs to its method."""
    methods = ("seqft", "ewc", "replay", "lwf")
    made = sum(finish([start(tmp_path, f"method={name}", "tuning=full") for name in methods]), Counter())
    shared = {name: count for name, count in made.items() if name.startswith("MADE 0 ") or "StartModel" in name}
    assert shared == {"MADE 0 FOMC": 1, "MADE 0 Py150": 1, "MADE capability StartModel": 1}
    found = results(tmp_path).values()
    assert len(found) == 4 and all(one["complete"] for one in found)
    assert len({str(one["matrix"][0]) for one in found}) == 1
    assert not list((tmp_path / "store" / "locks").iterdir())
