"""Sweeps that are planned, issued again, halted, stopped and run side by side."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, compose_config
from zygote import run_module

from trace_hydra import job, sweep, sweep_text
from trace_hydra.store.entries import Store
from trace_hydra.sweep import JobPlan, Piece

ORDERS = "task_order=[FOMC,Py150],[FOMC,NumGLUE-cm],[FOMC],[Py150,FOMC]"
"""Seven stages, five of them distinct: FOMC, FOMC > Py150, FOMC > NumGLUE-cm, Py150, Py150 > FOMC."""
JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
LAUNCHERS = {
    "basic": ("hydra/launcher=basic",),
    "joblib": JOBLIB,
    "submitit_local": ("hydra/launcher=submitit_local",),
}
FAILS = "optim.optimizer.lr=1e30,1e-3"
"""The first job's loss is no number."""


def arguments(folder: Path, *given: str) -> list[str]:
    rows = ["data.rows.train=8", "data.rows.test=2"]
    tasks = [] if any("task_order" in one for one in given) else ["task_order.tasks=[FOMC]"]
    return [
        sys.executable, "-m", "trace_hydra", "-m", *TINY, *rows, *tasks, f"paths.runs={folder}",
        f"paths.store={folder}/store", *given,
    ]  # fmt: skip


def launch(folder: Path, *given: str) -> subprocess.CompletedProcess:
    return run_module(*arguments(folder, *given)[2:])


def finished(folder: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/results.json")}


def stage(key: str, stored: bool = False) -> Piece:
    return Piece(key, 10, stored)


def plan(number: int, *stages: Piece, **given) -> JobPlan:
    return JobPlan(number, (f"a={number}", "b=1"), Path(f"/runs/{number}"), stages, **given)


def test_jobs_that_share_stages_let_one_go_ahead():
    """0, 1, 3 and 5 begin with s1, 2 with s4. The larger group leads, then s4; of the rest 3 and 5 share s3."""
    plans = [
        plan(0, stage("s4")),
        plan(1, stage("s1"), stage("s2")),
        plan(2, stage("s1"), stage("s2")),
        plan(3, stage("s1"), stage("s3")),
        plan(4, stage("s5"), done=True),
        plan(5, stage("s1"), stage("s3"), stage("s6")),
        plan(6, stage("s7", stored=True)),
    ]
    assert [one.number for one in sweep.in_order(plans)] == [1, 0, 6, 3, 2, 5]


def test_the_order_stays_where_nothing_is_shared():
    assert [one.number for one in sweep.in_order([plan(n, stage(f"s{n}")) for n in range(5)])] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("states", "stopped", "code"),
    [
        (["done", "done before"], False, 0),
        (["done", "failed"], False, 1),
        (["done", "not started"], False, 1),
        (["done", "stopped"], False, 75),
        (["failed", "stopped"], False, 1),
        (["failed", "not started"], True, 75),
    ],
)
def test_exit_codes(states, stopped, code):
    ended = [sweep_text.Outcome(plan(number), state) for number, state in enumerate(states)]
    assert sweep_text.exit_code(ended, stopped) == code


def test_nothing_that_can_run_is_the_users_error():
    cannot = [sweep_text.Outcome(plan(number, problem="no"), "failed") for number in range(2)]
    assert sweep_text.exit_code(cannot) == 2
    assert sweep_text.exit_code([*cannot, sweep_text.Outcome(plan(2), "done")]) == 1


def test_jobs_are_named_by_what_they_do_not_share():
    assert sweep_text.label_jobs([plan(0), plan(1)]) == {0: "a=0", 1: "a=1"}
    assert sweep_text.label_jobs([plan(3)]) == {3: "3"}  # the name of its directory


def jobs_of(folder: Path, *combinations: list[str]) -> list[sweep.Job]:
    given = [*TINY, "data.rows.train=4", "data.rows.test=2", f"paths.store={folder}/store"]
    return [
        sweep.Job(number, tuple(one), folder / str(number), compose_config([*given, *one]))
        for number, one in enumerate(combinations)
    ]


def test_what_jobs_share_is_planned_and_counted_once(tmp_path, monkeypatch):
    """Two orders of two tasks, three jobs: 2 tasks are counted; equal first stages have equal keys."""
    counted = []
    count = sweep.count_task
    monkeypatch.setattr(sweep, "count_task", lambda task, *rest: counted.append(task.name) or count(task, *rest))
    ours, other = "task_order=[FOMC,Py150]", "task_order=[Py150,FOMC]"
    jobs = jobs_of(tmp_path, [ours], [other], [ours, "protocol.decoding.max_new_tokens=2"])
    plans = sweep.plan_jobs(jobs)
    assert sorted(counted) == ["FOMC", "Py150"]
    keys = [[piece.key for piece in one.stages] for one in plans]
    assert keys[0] == keys[2] and not set(keys[0]) & set(keys[1])
    assert all(one.to_run and not piece.stored for one in plans for piece in (*one.stages, *one.cells))
    assert {piece.amount for one in plans for piece in one.cells} == {2}
    # rows of one pass are the same in both orders; smoke's budget is one epoch
    assert sum(piece.amount for piece in plans[0].stages) == sum(piece.amount for piece in plans[1].stages) > 0


def test_stages_in_the_store_are_not_new(tmp_path):
    (job,) = jobs_of(tmp_path, ["task_order=[FOMC,Py150]"])
    (before,) = sweep.plan_jobs([job])
    store = Store(tmp_path / "store")
    store.publish("stages", before.stages[0].key, lambda folder: None, inputs={}, versions={})
    (after,) = sweep.plan_jobs([job])
    assert [piece.stored for piece in after.stages] == [True, False]
    assert after.first_new() == before.stages[1].key


def test_a_stage_whose_weights_were_dropped_is_new_if_they_are_needed(tmp_path):
    """Stage 1 without weights: stage 2 starts from them; alone with all its answers it would do."""
    (job,) = jobs_of(tmp_path, ["task_order=[FOMC,Py150]"])
    (before,) = sweep.plan_jobs([job])
    store = Store(tmp_path / "store")

    def write(folder):
        (folder / "weights.safetensors").write_bytes(b"x")

    for piece in before.stages:
        entry = store.publish("stages", piece.key, write, inputs={}, versions={})
        assert entry is not None
        store.drop(entry, ["weights.safetensors"])
    assert not any(piece.stored for piece in sweep.plan_jobs([job])[0].stages)
    for piece in before.cells:
        store.publish("answers", piece.key, lambda folder: None, inputs={}, versions={})
    assert all(piece.stored for piece in sweep.plan_jobs([job])[0].stages)
    store.discard("stages", before.stages[1].key)
    assert not any(piece.stored for piece in sweep.plan_jobs([job])[0].stages)


def test_jobs_that_cannot_run_or_are_there_twice_are_told_apart(tmp_path):
    jobs = jobs_of(tmp_path, ["method=seqft"], ["method=icl", "tuning=full"], ["method=seqft"])
    jobs[2] = sweep.Job(2, jobs[2].overrides, jobs[0].directory, jobs[2].config)
    runs, cannot, twice = sweep.plan_jobs(jobs)
    assert runs.to_run and not cannot.to_run and not twice.to_run
    assert "trains nothing" in str(cannot.problem) and twice.same_as == 0


@pytest.mark.parametrize(
    "change", [{"complete": False}, {"stages": [{"key": "b"}]}, {"protocol": {"fingerprint": "y"}}]
)
def test_done_means_the_same_stages_and_protocol(tmp_path, change):
    good = {"schema": sweep.SCHEMA, "complete": True, "stages": [{"key": "a"}], "protocol": {"fingerprint": "x"}}
    (tmp_path / "results.json").write_text(json.dumps(good))
    assert sweep.is_done(tmp_path, ["a"], "x")
    (tmp_path / "results.json").write_text(json.dumps({**good, **change}))
    assert not sweep.is_done(tmp_path, ["a"], "x")


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_damaged_results_json_is_not_done(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    assert not sweep.is_done(tmp_path, [], "x")


def test_a_job_whose_process_is_gone_was_stopped(tmp_path, monkeypatch):
    halt = tmp_path / "halt"
    monkeypatch.setenv(job.HALT, str(halt))
    code = (
        "import os, signal, sys; from pathlib import Path; from trace_hydra import job\n"
        "with job.watched(Path(sys.argv[1]), [], fail_fast=False): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT)
    assert json.loads((tmp_path / job.STATUS).read_text())["state"] == "running"
    assert job.status(tmp_path, halt)["state"] == "stopped"
    assert job.status(tmp_path, tmp_path / "another sweep") == {}


def test_a_sweep_issued_again_runs_only_what_is_missing(tmp_path):
    first = launch(tmp_path, "seed=0,1")
    assert first.returncode == 0, first.stderr
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/results.json")}
    again = launch(tmp_path, "seed=0,1,2")
    assert again.returncode == 0, again.stderr
    assert "2 done before, 1 to run" in again.stdout and "1 done" in again.stdout
    assert len(finished(tmp_path)) == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_plan_counts_shared_stages_once(tmp_path):
    """Four orders with seven stages; five distinct ones are trained, each by one job, and nothing is left to do."""
    done = launch(tmp_path, ORDERS)
    assert done.returncode == 0, done.stderr
    lines = [line.replace("│", " ").split() for line in done.stdout.splitlines()]
    needed, new = (next(line for line in lines if line[:1] == [word]) for word in ("needed", "new"))
    assert needed[1] == new[1] == "5"
    assert len(list((tmp_path / "store" / "stages").iterdir())) == 5
    assert_trained_once(tmp_path, 7, 5)


def assert_trained_once(folder: Path, stages: int, distinct: int) -> None:
    """A stage's seconds are measured where it is trained; all runs that use it report the same, to the last bit."""
    seconds: dict[str, set[float]] = {}
    reported = [one for results in finished(folder).values() for one in results["stages"]]
    for one in reported:
        seconds.setdefault(one["key"], set()).add(one["effort"]["seconds"])
    assert len(reported) == stages and len(seconds) == distinct
    assert all(len(found) == 1 for found in seconds.values()), seconds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "plugin"),
    [
        ("joblib", "hydra_joblib_launcher"),
        pytest.param("submitit_local", "hydra_submitit_launcher", marks=pytest.mark.long),
    ],
)
def test_side_by_side_no_stage_is_trained_twice(tmp_path, launcher, plugin):
    pytest.importorskip(f"hydra_plugins.{plugin}")
    done = launch(tmp_path, *LAUNCHERS[launcher], ORDERS)
    assert done.returncode == 0, done.stderr
    assert len(finished(tmp_path)) == 4
    assert_trained_once(tmp_path, 7, 5)


def test_a_failed_job_leaves_its_traceback_and_the_command(tmp_path):
    done = launch(tmp_path, FAILS)
    assert done.returncode == 1 and len(finished(tmp_path)) == 1
    (error,) = tmp_path.glob("*/error.txt")
    text = error.read_text()
    assert "Traceback (most recent call last)" in text and "optim.optimizer.lr=1e" in text and "MethodError" in text
    assert str(error) in done.stdout and str(error) in done.stderr
    assert not list(tmp_path.glob(".sweep-*.halt"))


def test_fail_fast_starts_nothing_after_a_failure(tmp_path):
    done = launch(tmp_path, FAILS, "sweep.fail_fast=true")
    assert done.returncode == 1 and not finished(tmp_path)
    assert "1 failed, 1 not started" in done.stdout
    assert not list(tmp_path.glob(".sweep-*.halt"))
    # the same without it runs the second; the setting is no part of the run's name
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("tiny-")]) == 1
    assert launch(tmp_path, FAILS).returncode == 1 and len(finished(tmp_path)) == 1


@pytest.mark.slow
def test_fail_fast_reaches_other_processes(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = launch(tmp_path, FAILS, "sweep.fail_fast=true", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1")
    assert done.returncode == 1 and not finished(tmp_path) and "1 not started" in done.stdout


def test_a_job_that_cannot_run_does_not_stop_the_others(tmp_path):
    done = launch(tmp_path, "method=icl,seqft", "tuning=full")
    assert done.returncode == 1, done.stderr
    assert [results["method"] for results in finished(tmp_path).values()] == ["seqft"]
    (error,) = tmp_path.glob("*/error.txt")
    assert "trains nothing" in error.read_text() and "1 cannot run" in done.stdout


def test_nothing_to_run_is_the_users_error_and_one_message(tmp_path):
    """Both jobs have the same problem: it is said once, each folder has it, nothing was started."""
    done = launch(tmp_path, "method=icl", "tuning=full", "seed=0,1")
    assert done.returncode == 2 and "#0, #1 failed" in done.stdout, done.stderr
    assert done.stdout.count("trains nothing") == 1 and len(list(tmp_path.glob("*/error.txt"))) == 2
    assert not list(tmp_path.glob(f"*/{job.STATUS}")) and "Traceback" not in done.stderr


@pytest.mark.slow
def test_estimates_can_be_swept(tmp_path):
    """debug=cost needs no rows and no plan of stages."""
    done = launch(tmp_path, "debug=cost", "seed=0,1")
    assert done.returncode == 0 and len(list(tmp_path.glob("cost/*/cost.json"))) == 2, done.stderr


@pytest.mark.slow
def test_another_sweeper_still_works(tmp_path):
    done = launch(tmp_path, "hydra/sweeper=basic", "seed=0,1")
    assert done.returncode == 0 and len(finished(tmp_path)) == 2, done.stderr


@pytest.mark.slow
def test_a_subdirectory_by_job_number_survives_a_reissue(tmp_path):
    """Numbers are places in the sweep; a job that is skipped or goes ahead does not shift the others."""
    given = ("seed=0,1", "hydra.sweep.subdir=${hydra:job.num}")
    assert launch(tmp_path, *given).returncode == 0
    (tmp_path / "0" / "results.json").unlink()
    again = launch(tmp_path, *given)
    assert again.returncode == 0 and "1 done before, 1 to run" in again.stdout, again.stderr
    assert {name: results["seed"]["train"] for name, results in finished(tmp_path).items()} == {"0": 0, "1": 1}


def start(folder: Path, *given: str) -> subprocess.Popen:
    return subprocess.Popen(
        arguments(folder, *given), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


def wait_for(what, timeout_s: float = 120.0):
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)
    return found


def running(folder: Path) -> list[int]:
    """Process ids of jobs that run now."""
    found = []
    for path in folder.glob(f"*/{job.STATUS}"):
        try:
            record = json.loads(path.read_text())
        except FileNotFoundError:
            continue
        if record["state"] == "running":
            found.append(record["process"]["pid"])
    return found


LONG = ("budget.default_epochs=250", "evaluation=diagonal_last", "checkpoint.every_steps=20")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", pytest.param("joblib", marks=pytest.mark.long)])
def test_a_stopped_sweep_ends_with_75_and_goes_on(tmp_path, launcher):
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    process = start(tmp_path, *LAUNCHERS[launcher], "seed=0,1,2", *LONG)
    wait_for(lambda: list(tmp_path.glob("store/partial/*")))
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert "stopped" in out and "not started" in out and not list(tmp_path.glob("*/error.txt"))
    assert not list(tmp_path.glob(".sweep-*.halt"))
    again = launch(tmp_path, *LAUNCHERS[launcher], "seed=0,1,2", *LONG)
    assert again.returncode == 0 and len(finished(tmp_path)) == 3, again.stdout + again.stderr


@pytest.mark.long
def test_a_killed_worker_does_not_take_the_sweep_along(tmp_path):
    """joblib gives up all jobs when the process of one dies; they go on from their checkpoints in a second round."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    process = start(tmp_path, *JOBLIB, "seed=0,1,2", *LONG)
    wait_for(lambda: list(tmp_path.glob("store/partial/*")))
    os.kill(running(tmp_path)[0], signal.SIGKILL)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and len(finished(tmp_path)) == 3, out


def test_stopped_while_planning(tmp_path, monkeypatch):
    """Jobs that were not planned have no stages and are not launched."""
    jobs = jobs_of(tmp_path, ["seed=0"], ["seed=1"])
    asked = iter([False, True])
    plans = sweep.plan_jobs(jobs, lambda: next(asked))
    assert [bool(one.stages) for one in plans] == [True, False]


def test_the_plan_goes_on_without_a_plan_for_one_job(tmp_path, monkeypatch, caplog):
    """A bug in planning is logged, and the job runs."""
    monkeypatch.setattr(sweep, "prepare", lambda *given, **keywords: SimpleNamespace())
    (only,) = sweep.plan_jobs(jobs_of(tmp_path, ["seed=0"]))
    assert only.to_run and not only.stages and "could not be planned" in caplog.text
