"""Start-up, planning, the way to the first optimizer step, and memory over many stages, each in fresh processes.

    python -m benchmarks.startup --out startup.json [--only help plan-tiny] [--repeats 3]

Wall time and the processor time of user code are taken from outside. The measured commands write to a temporary
folder; the base model comes from the user's store, as in a run with a warm cache.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

STAGES = 50
JOBS = 1000
_REPORT = "BENCHMARK_REPORT"
"""Variable that names the file a child writes its measurements to."""
_STARTED = "BENCHMARK_STARTED"


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        goal: Upper bound of the median of `measure`.
        measure: "wall_s", or a number that the child reports.
        arguments: Of the interpreter, given a temporary folder.
        warm: Whether a first call is left out of the numbers.
        repeats: Most calls; the user may ask for fewer.
    """

    goal: float
    measure: str
    arguments: Callable[[Path], list[str]]
    warm: bool = True
    repeats: int = 5


def main() -> int:
    """Measure what was asked for; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    parser.add_argument("--only", nargs="*", choices=sorted(CASES), help="measure these (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="most calls of each (default: 5)")
    parser.add_argument("--child", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return _child(options.child[0], Path(options.child[1]))
    found = {}
    for name in options.only or CASES:
        found[name] = _measured(CASES[name], options.repeats)
        print(f"{name}: {json.dumps(found[name])}", file=sys.stderr)
    _show(found)
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "cases": found}, indent=1), encoding="utf-8")
    return int(any(not one["reached"] for one in found.values()))


def machine() -> dict[str, Any]:
    """Say what the numbers were taken on."""
    from importlib.metadata import version

    packages = ("hydra-core", "omegaconf", "torch", "lightning", "transformers")
    return {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
        **{name: version(name) for name in packages},
    }


def _measured(case: Case, repeats: int) -> dict[str, Any]:
    calls = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = case.arguments(Path(folder))
        if case.warm:
            _call(arguments, Path(folder))
        for _ in range(min(case.repeats, repeats)):
            calls.append(_call(arguments, Path(folder)))
    number = statistics.median(one[case.measure] for one in calls)
    return {"goal": case.goal, "measure": case.measure, "median": number, "reached": number < case.goal, "calls": calls}


def _call(arguments: list[str], folder: Path) -> dict[str, Any]:
    """Run the interpreter once; wall and user seconds, and what the child reports."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    environment = {**os.environ, "WANDB_MODE": "offline", _REPORT: str(report), _STARTED: str(time.time())}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, time.monotonic()
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(
            f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
        )
    user = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    found: dict[str, Any] = {"wall_s": round(seconds, 3), "user_s": round(user, 3)}
    return found | (json.loads(report.read_text()) if report.exists() else {})


def _show(found: Mapping[str, Any]) -> None:
    table = Table(title="start-up", title_justify="left")
    for column in ("case", "measure", "median", "goal", "user s", ""):
        table.add_column(column, justify="left" if column in ("case", "measure", "") else "right", no_wrap=True)
    for name, one in found.items():
        user = statistics.median(call["user_s"] for call in one["calls"])
        verdict = "reached" if one["reached"] else "missed"
        table.add_row(name, one["measure"], f"{one['median']:.2f}", f"{one['goal']:g}", f"{user:.2f}", verdict)
    Console(width=max(Console().width, 90)).print(table)


def _child(kind: str, folder: Path) -> int:
    """Do one thing with the package's own command line, watched from within."""
    watch, arguments = CHILDREN[kind]
    sys.argv[1:] = [*arguments, f"paths.runs={folder / 'runs'}", f"paths.store={_store(folder)}"]
    watch(sys.argv)
    from trace_hydra.__main__ import main as command

    command()
    return 0


def _store(folder: Path) -> Path:
    """Make a store that has the user's base models and nothing else."""
    from trace_hydra.store.__main__ import default_root

    store, models = folder / "store", default_root() / "models"
    store.mkdir(exist_ok=True)
    models.mkdir(parents=True, exist_ok=True)
    if not (store / "models").exists():
        (store / "models").symlink_to(models)
    return store


def _report(**numbers: Any) -> None:
    Path(os.environ[_REPORT]).write_text(json.dumps(numbers))


def _since_start() -> float:
    return round(time.time() - float(os.environ[_STARTED]), 2)


def _watch_plan(argv: list[str]) -> None:
    """End a sweep where it would launch its first job."""
    from hydra.core.plugins import Plugins

    Plugins.instance()
    from hydra_plugins.trace_hydra_sweeper import sweeper

    def launch(self: Any, order: Any, halt: Path) -> None:
        _report(planned_s=_since_start(), jobs=len(order), rss_mb=_status_mb("VmRSS"))
        os._exit(0)

    sweeper.TraceSweeper._launch = launch  # type: ignore[method-assign]


def _watch_first_step(argv: list[str]) -> None:
    """End a run after its first optimizer step, and tell when its parts were done."""
    marks: dict[str, float] = {}
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from trace_hydra import build, live, run

    marks["imports"] = _since_start()

    def mark(owner: Any, name: str, label: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **given: Any) -> Any:
            marks.setdefault(f"before {label}", _since_start())
            try:
                return inner(*args, **given)
            finally:
                marks.setdefault(label, _since_start())

        setattr(owner, name, timed)

    mark(build, "validate", "validated")
    mark(run, "prepare", "planned")
    mark(live.Live, "_load", "model loaded")
    mark(live.Live, "_begin", "model ready")
    mark(live.Live, "at", "state reached")
    mark(live.train, "train_stage", "trained")

    def stepped(*_: Any) -> None:
        if "before trained" not in marks:  # the estimate of what an optimizer holds makes a step of its own
            return
        _report(first_step_s=_since_start(), marks=marks, rss_mb=_status_mb("VmRSS"))
        os._exit(0)

    register_optimizer_step_post_hook(stepped)


def _watch_memory(argv: list[str]) -> None:
    """Note the most memory of each stage of a run whose tasks have rows of 20 to 200 words, each task of others.

    Reported is how much more the last ten stages took at most than the first ten; and what was left behind each stage.
    """
    from trace_hydra.live import Live

    names = [f"Task{number:02}" for number in range(1, STAGES + 1)]
    root = Path(next(one for one in argv if one.startswith("paths.runs=")).partition("=")[2]).parent / "rows"
    for number, name in enumerate(names):
        words = [20 + (97 * number + 31 * row) % 180 for row in range(8)]
        rows = [{"prompt": f"Which word follows?\n{'two ' * count}\n", "answer": "two"} for count in words]
        (root / name).mkdir(parents=True, exist_ok=True)
        for split in ("train", "eval", "test"):
            (root / name / f"{split}.json").write_text(json.dumps(rows))
    facts = ",".join(f"{name}:{{metric:accuracy,max_new_tokens:4}}" for name in names)
    argv += [f"paths.data={root}", f"task_order=[{','.join(names)}]", f"+data.tasks={{{facts}}}"]
    peaks: list[float] = []
    left: list[float] = []
    close = Live.close

    def closed(live: Live, row: int) -> None:
        close(live, row)
        peaks.append(_status_mb("VmHWM"))
        left.append(_status_mb("VmRSS"))
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts anew
        if row == STAGES:
            growth = max(peaks[-10:]) / max(peaks[:10]) - 1
            _report(growth_percent=round(100 * growth, 2), peak_mb=peaks, left_mb=left)

    Live.close = closed  # type: ignore[method-assign]


def _status_mb(name: str) -> float:
    """Read a line of what the kernel says of this process, 10^6 bytes."""
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(f"{name}:"))
    return round(int(line.split()[1]) * 1024 / 1e6, 1)


_SWEEP = ["-m", "method=seqft,ewc,lwf,replay,olora", "seed=0,1,2,3,4", "tuning=lora"]
_RATES = "optim.optimizer.lr=" + ",".join(f"{number}e-6" for number in range(1, JOBS // 25 + 1))
_SMALL = ["debug=smoke", "logger=none", "callbacks=none"]
_STAGES = ["data=trace", "evaluation=diagonal_last", "capability=none", "store.keep=last"]
CHILDREN: dict[str, tuple[Callable[[list[str]], None], list[str]]] = {
    "plan-tiny": (_watch_plan, [*_SWEEP, _RATES, "model=tiny", *_SMALL]),
    "plan-default": (_watch_plan, [*_SWEEP, _RATES]),
    "first-step": (_watch_first_step, []),
    "first-step-cold": (_watch_first_step, []),
    "memory": (_watch_memory, [*_SMALL, *_STAGES]),
    "memory-default": (_watch_memory, ["logger=none", "callbacks=none", "budget.default_epochs=1", *_STAGES]),
}


def _of_child(kind: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["-m", "benchmarks.startup", "--child", kind, str(folder)]


CASES = {
    "cfg": Case(1.2, "wall_s", lambda folder: ["-m", "trace_hydra", "--cfg", "job"]),
    "help": Case(1.2, "wall_s", lambda folder: ["-m", "trace_hydra", "--help"]),
    "store-ls": Case(1.2, "wall_s", lambda folder: ["-m", "trace_hydra.store", "ls", "--store", str(folder)]),
    "collect": Case(1.2, "wall_s", lambda folder: ["-m", "trace_hydra.collect", "--help"]),
    "plan-tiny": Case(20, "planned_s", _of_child("plan-tiny"), warm=False, repeats=3),
    "plan-default": Case(20, "planned_s", _of_child("plan-default"), warm=False, repeats=3),
    "first-step-cold": Case(120, "first_step_s", _of_child("first-step-cold"), warm=False, repeats=1),
    "first-step": Case(25, "first_step_s", _of_child("first-step"), repeats=3),
    "memory": Case(2, "growth_percent", _of_child("memory"), warm=False, repeats=1),
    "memory-default": Case(2, "growth_percent", _of_child("memory-default"), warm=False, repeats=1),
}

if __name__ == "__main__":
    sys.exit(main())
