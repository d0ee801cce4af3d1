"""Loggers as the tests open them, what a run logs into them, and the upload of what W&B left on disk."""

import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from conftest import compose_config

from trace_hydra.callbacks.matrix import MatrixCallback
from trace_hydra.loggers import log_metrics
from trace_hydra.metrics.continual import ScoreMatrix
from trace_hydra.metrics.score import TaskScore
from trace_hydra.plan import RunInfo
from trace_hydra.report import results as report
from trace_hydra.targets import instantiate
from trace_hydra.wandb_pieces import sync_command

KEY = "a" * 40
SCORES = {(0, "A"): 1.5, (0, "B"): 2.5, (1, "A"): 60.0, (1, "B"): 5.0, (2, "A"): 40.25, (2, "B"): 80.0}


def factory(**changes) -> partial:
    """The default `logger=wandb` with some keys changed."""
    node = compose_config([]).logger.wandb
    return instantiate({**node, **changes})


def impatient(**changes):
    return factory(**{"init_timeout_s": 1.0, "finish_timeout_s": 20.0, **changes})


def folders(run: Any) -> list[Path]:
    return sorted(path for path in (run.directory / "wandb").glob("*run-*") if not path.is_symlink())


def play(run: RunInfo, loggers: list) -> dict:
    """Score every cell through the callback, write the results and hand them to it."""
    callback = MatrixCallback(show=False, heat_map=True)
    callback.on_run_start(run, loggers)
    matrix, scores = ScoreMatrix(run.tasks), {}
    for row in range(3):
        if row:
            callback.on_stage_start(run.stages[row - 1])
        for task in run.tasks:
            value = SCORES[row, task]
            matrix.set(row, task, value)
            scores[row, task] = TaskScore(task, "greedy", "accuracy", 1, value, {"accuracy": value}, [])
            callback.on_cell_scored(row, task, scores[row, task])
        callback.on_row_scored(row, matrix)
    results = report.build_results(
        run=run,
        matrix=matrix,
        scores=scores,
        carried={},
        intervals={"op": [50.0, 70.5], "bwt": [-30.0, -10.0], "fwt": [1.0, 4.0], "forgetting": [10.0, 30.0]},
        wall_clock_s=1.0,
        tokens={"train": [1, 2], "evaluate": [1, 2, 3]},
        truncated={},
        task_specs={},
        seeds={},
        scoring="corrected",
        versions={},
    )
    callback.on_run_end(results)
    return results


def stage_of(loggers: list, stage: int, steps: range) -> None:
    """Log what a stage logs: losses by step, then a score, with values that say where they belong."""
    for step in steps:
        log_metrics(loggers, {"train/loss": 1 / step, "progress/step": step, "progress/stage": stage}, step)
    log_metrics(loggers, {"score/A": 10.0 * stage, "progress/stage": stage}, stage)


def upload(found: list[Path], url: str) -> None:
    """Run the printed command."""
    command = sync_command(found)
    assert command is not None
    program, *arguments = shlex.split(command)
    environment = {
        "PATH": "/usr/bin:/bin",
        "WANDB_BASE_URL": url,
        "WANDB_API_KEY": KEY,
        "HOME": str(found[0]),
        "WANDB_ERROR_REPORTING": "false",
    }
    program = str(Path(sys.executable).with_name(program))
    subprocess.run([program, *arguments], env=environment, cwd=found[0], check=True, capture_output=True, timeout=60)


def killed_environment(home: Path) -> dict[str, str]:
    """Of a process without an account; the fonts are those that this one found already."""
    import matplotlib

    places = {
        "HOME": home,
        "NETRC": home / "netrc",
        "WANDB_CONFIG_DIR": home,
        "MPLCONFIGDIR": matplotlib.get_cachedir(),
    }
    return {**{name: str(place) for name, place in places.items()}, "OMP_NUM_THREADS": "1"}
