"""Kill a run of three stages with SIGKILL at random moments until it has ended, and compare bytes.

    python tests/soak/soak.py --methods seqft replay ewc olora --kills 50 --seed 0

A point is a moment drawn evenly from the time that the whole run takes; after each kill the same command is given
again, with the next point. After six kills, or when the kills are used up, it runs to its end. The processes are forked
from one that has imported everything, so that every point falls into work; with --interpreters each is a fresh
interpreter, and points come from the last two thirds of its time. Not a test of the fast suite; `test_soak.py` runs a
short form.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from zygote import run_module  # noqa: E402

SETTINGS = [
    "debug=smoke", "logger=csv", "task_order=[FOMC,NumGLUE-cm,20Minuten]", "data.rows.train=8", "data.rows.test=3",
    "budget.default_epochs=20", "checkpoint.every_steps=5", "protocol.decoding.max_new_tokens=4",
    "evaluation.bootstrap_samples=20",
]  # fmt: skip
CLOCKS = ("wall_clock_s", "seconds", "plain_step_s", "step_ratio")
"""Fields of results.json that a clock decides."""
KILLS_A_RUN = 6
PHASES = ("start", "row 0", "stage 1", "stage 2", "stage 3", "after the last stage")


def command(method: str, folder: Path, extra: list[str]) -> list[str]:
    """Give the command line of a run below a folder."""
    places = [f"paths.runs={folder / 'runs'}", f"paths.store={folder / 'store'}"]
    return [sys.executable, "-m", "trace_hydra", f"method={method}", *SETTINGS, *places, *extra]


def without_clocks(value: Any) -> Any:
    """Leave out what a clock decides."""
    if isinstance(value, dict):
        return {key: without_clocks(one) for key, one in value.items() if key not in CLOCKS}
    return [without_clocks(one) for one in value] if isinstance(value, list) else value


def outcome(folder: Path) -> dict[str, Any]:
    """Hash all that a run leaves: weights and states of its stages, predictions, capability answers, results."""
    found: dict[str, Any] = {}
    for manifest in sorted((folder / "store").glob("*/*/manifest.json")):
        described = json.loads(manifest.read_text())
        if described["kind"] != "partial":
            key = f"{described['kind']}/{described['key']}"
            found |= {f"{key}/{name}": one["sha256"] for name, one in described["files"].items()}
    (run,) = (folder / "runs").glob("*/results.json")
    for path in sorted([*run.parent.glob("predictions/**/*.jsonl"), *run.parent.glob("capability/**/*.jsonl")]):
        found[str(path.relative_to(run.parent))] = hashlib.sha256(path.read_bytes()).hexdigest()
    found["results.json"] = without_clocks(json.loads(run.read_text()))
    return found


def phase_of(folder: Path) -> str:
    """Tell from the store how far a run had got."""
    stages = len(list((folder / "store" / "stages").glob("*/manifest.json")))
    if stages == 3:
        return PHASES[5]
    if stages or list((folder / "store" / "partial").glob("*/manifest.json")):
        return PHASES[2 + stages]
    return PHASES[1] if (folder / "store" / "answers").is_dir() else PHASES[0]


def fork(arguments: list[str], limit_s: float | None) -> int | None:
    """Run a command in a process that has imported everything, and kill it behind `limit_s`; returns the status."""
    done = run_module(*arguments[2:], limit_s=limit_s)
    if done.returncode > 0:
        print(done.stdout[-3000:], done.stderr[-3000:])
    return None if done.returncode == -signal.SIGKILL else done.returncode


def run(arguments: list[str], limit_s: float | None) -> int | None:
    """Run a command in a process group of its own, and kill the group behind `limit_s`; returns the status."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    if process.returncode:
        print(output.decode(errors="replace")[-3000:])
    return process.returncode


def soak(method: str, kills: int, seed: int, extra: list[str], *, interpreters: bool = False) -> dict[str, Any]:
    """Compare a run that is killed again and again with one that is not."""
    start: Callable[[list[str], float | None], int | None] = run if interpreters else fork
    if not interpreters:
        run_module("trace_hydra", "--cfg", "job")  # imports everything, which does not belong to the time of a run
    first = 0.33 if interpreters else 0.0
    folder = Path(tempfile.mkdtemp(prefix=f"soak-{method}-"))
    drawn = random.Random(f"{seed}-{method}")
    try:
        begun = time.monotonic()
        if start(command(method, folder / "whole", extra), None) != 0:
            raise SystemExit(f"{method}: the uninterrupted run failed")
        whole_s = time.monotonic() - begun
        whole = outcome(folder / "whole")
        done, finished, equal, seen = 0, 0, 0, Counter()
        while done < kills:
            finished += 1
            target = folder / f"killed-{finished}"
            for _ in range(min(KILLS_A_RUN, kills - done)):
                fresh, begun = not target.exists(), time.monotonic()
                status = start(command(method, target, extra), drawn.uniform(first, 1.0) * whole_s)
                if status is None:
                    done += 1
                    seen[phase_of(target)] += 1
                    continue
                if status != 0:
                    raise SystemExit(f"{method}: a run that was killed {done} times ended with status {status}")
                if fresh:  # never killed: the machine was less busy than before
                    whole_s = min(whole_s, time.monotonic() - begun)
                break
            else:
                if start(command(method, target, extra), None) != 0:
                    raise SystemExit(f"{method}: the last run failed")
            found = outcome(target)
            equal += found == whole
            for name in sorted(found.keys() | whole.keys()):
                if found.get(name) != whole.get(name):
                    print(f"{method}: {target.name} differs in {name}", file=sys.stderr, flush=True)
            left = [str(path) for path in (target / "store" / "drafts").glob("*") if any(path.iterdir())]
            if left:
                raise SystemExit(f"{method}: drafts were left: {left}")
        return {"method": method, "kills": done, "runs": finished, "equal": equal, "points": dict(seen)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Print a row a method; exit status 1 if any run differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["seqft", "replay", "ewc", "olora"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--interpreters", action="store_true", help="start a fresh interpreter each time")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    print("| method | kills | runs ended | byte-identical | points of the kills |\n|---|---|---|---|---|", flush=True)
    failed = False
    for method in arguments.methods:
        row = soak(method, arguments.kills, arguments.seed, arguments.overrides, interpreters=arguments.interpreters)
        points = ", ".join(f"{phase} {row['points'][phase]}" for phase in PHASES if phase in row["points"])
        print(f"| {method} | {row['kills']} | {row['runs']} | {row['equal']} | {points} |", flush=True)
        failed |= row["equal"] != row["runs"]
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
