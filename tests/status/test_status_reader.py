"""How runs and sweeps stand, from folders made by hand."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from trace_hydra.heartbeat import Heartbeat
from trace_hydra.status.model import Job, Status
from trace_hydra.status.reader import SKEW_S, Reader
from trace_hydra.status.text import lines
from trace_hydra.store import locks
from trace_hydra.sweep import JobPlan, Piece
from trace_hydra.sweep_record import RecordWriter, read_records, remove_superseded

ELSEWHERE = {"host": "elsewhere", "boot": "b", "pidns": "p", "pid": 7, "started": 1}
GONE = {"pid": 2**22 + 1, "started": 1}
"""Together with this machine's place: a process that cannot be."""
PROGRESS = {
    "model": "tiny", "tuning": "full", "method": "one", "doing": "training", "stage": 2, "stages": 8, "task": "FOMC",
    "done": 12, "planned": 50, "percent": 25.0, "left_s": 90.0, "uncounted": [],
    "rates": {"trained": [100, 10.0], "answered": [10, 5.0]},
}  # fmt: skip


def here(**given: Any) -> dict[str, Any]:
    return {**locks.this_process(), **given}


def put(directory: Path, *, age_s: float = 0.0, **given: Any) -> Path:
    """Write a status.json whose clocks both say that it is `age_s` seconds old."""
    directory.mkdir(parents=True, exist_ok=True)
    at = time.time() - age_s
    status = {
        "schema": 1, "state": "running", "sweep": None, "process": here(), "arguments": ["method=one"],
        "folder": "/somewhere", "started": at - 60, "beat": 3, "beat_s": 10.0, "at": at, "gone_s": 60.0, "quiet_s": 0.0,
        "progress": PROGRESS, **given,
    }  # fmt: skip
    path = directory / "status.json"
    path.write_text(json.dumps(status))
    os.utime(path, (at, at))
    return path


def read(folder: Path) -> Status:
    return Reader(folder).read()


def only(folder: Path) -> Job:
    (job,) = read(folder).jobs
    return job


def text(folder: Path, **given: Any) -> str:
    return "\n".join(lines(read(folder), width=None, colour=False, **given))


def sweep(folder: Path, numbers: int = 3, **given: Any) -> RecordWriter:
    """Record a sweep of jobs that all train a stage of 1000 tokens and have one of 500 of their own."""
    record = RecordWriter(folder / f".sweep-here-1-{given.pop('id', 'abc')}.halt", ["-m", "a=1,2"], 1, False)
    plans = [
        JobPlan(number, (f"a={number}",), folder / f"job{number}",
                (Piece("shared", 1000, False), Piece(f"own{number}", 500, False)), **given)
        for number in range(numbers)
    ]  # fmt: skip
    names = {plan.number: f"a={plan.number}" for plan in plans}
    record.write(plans, plans, names, dict.fromkeys(names, ("tiny", "full", "one")))
    return record


def rewrite(record: RecordWriter, **given: Any) -> None:
    record.path.write_text(json.dumps({**json.loads(record.path.read_text()), **given}))


def test_a_run_under_way(tmp_path):
    put(tmp_path / "run")
    job = only(tmp_path)
    assert (job.state, job.stage, job.stages, job.task, job.percent) == ("running", 2, 8, "FOMC", 25.0)
    assert job.left_s == pytest.approx(90, abs=5)
    said = text(tmp_path)
    assert "running  stage 2/8 FOMC, step 12/50 · 25 % · about 1:" in said and "To go on" not in said
    assert only(tmp_path / "run").state == "running"  # its own folder may be asked for


def test_time_left_runs_on_between_beats(tmp_path):
    """90 s left when it last moved, 20 s before the last beat, which is 30 s old: 40 s."""
    put(tmp_path / "run", age_s=30, quiet_s=20.0)
    assert only(tmp_path).left_s == pytest.approx(40, abs=5)


def test_a_process_of_this_machine_that_is_gone_is_dead(tmp_path):
    put(tmp_path / "run", process=here(**GONE), age_s=130)
    job = only(tmp_path)
    assert (
        job.state == "dead" and job.left_s is None and job.note.startswith("its process is gone; last sign of life 2:1")
    )
    assert "cd /somewhere && python -m trace_hydra method=one" in text(tmp_path)


def test_a_silent_process_that_exists_is_said_to_be_silent(tmp_path):
    put(tmp_path / "run", age_s=600)
    job = only(tmp_path)
    assert job.state == "running" and "no heartbeat for 10:0" in job.note


def test_another_machines_process_is_dead_when_both_clocks_say_so(tmp_path):
    path = put(tmp_path / "run", process=ELSEWHERE, age_s=60 + SKEW_S - 20)
    assert only(tmp_path).state == "running"
    put(tmp_path / "run", process=ELSEWHERE, age_s=60 + SKEW_S + 20)
    assert only(tmp_path).state == "dead" and "cannot be asked" in only(tmp_path).note
    os.utime(path)  # the file system's clock says now: the other machine's is slow
    assert only(tmp_path).state == "running"
    put(tmp_path / "run", process=ELSEWHERE, age_s=-9999)  # and fast ones
    assert only(tmp_path).state == "running" and only(tmp_path).heard_s == 0


def test_what_moves_between_two_looks_lives_whatever_the_clocks_say(tmp_path):
    """The reader's clock is an hour ahead: dead at first sight. A beat is heard: running; 400 s without: dead."""
    now = [0.0]
    reader = Reader(tmp_path, wall=lambda: time.time() + 3600, monotonic=lambda: now[0])
    put(tmp_path / "run", process=ELSEWHERE)
    assert reader.read().jobs[0].state == "dead"
    put(tmp_path / "run", process=ELSEWHERE, beat=4)
    now[0] = 10
    assert reader.read().jobs[0].state == "running"
    now[0] = 200
    assert reader.read().jobs[0].state == "running"
    now[0] = 410
    assert reader.read().jobs[0].state == "dead"


def test_failed_shows_the_error_and_where_it_lies(tmp_path):
    put(tmp_path / "run", state="failed")
    (tmp_path / "run" / "error.txt").write_text("MethodError: the loss is nan\n\ncommand: ...")
    said = text(tmp_path)
    assert "failed  MethodError: the loss is nan" in said and "run/error.txt" in said and "To go on" in said
    (tmp_path / "run" / "error.txt").unlink()
    assert "no error.txt could be written" in text(tmp_path)


def test_interrupted(tmp_path):
    put(tmp_path / "run", state="stopped")
    assert only(tmp_path).state == "interrupted"
    put(tmp_path / "run", state="stopped", sent_back=True)
    assert only(tmp_path).note == "back in its queue"


def test_done_shows_numbers_that_are_there_and_says_which_are_not(tmp_path):
    put(tmp_path / "run", state="done", progress={**PROGRESS, "op": 41.5, "bwt": None})
    (tmp_path / "run" / "results.json").write_text('{"op": 41.5, "bwt": null}')
    assert "done  OP 41.50  BWT not known" in text(tmp_path)
    (tmp_path / "run" / "results.json").unlink()
    assert "no results.json" in text(tmp_path)


def test_runs_of_before_had_no_status(tmp_path):
    for name, file, content in (
        ("done", "results.json", '{"complete": true, "op": 12.0, "bwt": -1.0}'),
        ("failed", "error.txt", "DataError: x"),
        ("half", "results.json", '{"complete": tr'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(content)
    (tmp_path / "begun" / ".hydra").mkdir(parents=True)
    jobs = {job.folder: job for job in read(tmp_path).jobs}
    assert {name: job.state for name, job in jobs.items()} == {
        "done": "done", "failed": "failed", "half": "unknown", "begun": "unknown",
    }  # fmt: skip
    assert jobs["done"].op == 12.0 and jobs["begun"].note == "no status.json"


@pytest.mark.parametrize(
    "content",
    ["", "{", '{"state": "runn', "[]", "null", "\x00" * 50, "[" * 100_000, '{"state": 5, "process": 3, "progress": []}',
     '{"state": "running", "process": [], "progress": {"rates": 3, "left_s": "x", "uncounted": 4}, "beat_s": "y"}',
     '{"state": "running", "arguments": 3, "at": "x", "started": null, "progress": {"stage": 1e999}}',
     '{"state": "done", "progress": {"op": "41", "bwt": NaN}}'],
    ids=range(11),
)  # fmt: skip
def test_damaged_files_are_survived(content, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text(content)
    put(tmp_path / "other")
    jobs = {job.folder: job for job in read(tmp_path).jobs}
    assert jobs["other"].state == "running" and jobs["run"].op is None
    assert text(tmp_path)


def test_a_sweep_under_way(tmp_path):
    """The first job trains the shared stage. Its own 90 s; then 500 tokens at 0.1 s each for both that wait: 190 s."""
    record = sweep(tmp_path)
    put(tmp_path / "job0", sweep=record.name, progress={**PROGRESS, "left_s": 90.0})
    status = read(tmp_path)
    assert [job.state for job in status.jobs] == ["running", "waiting", "waiting"]
    assert status.left.seconds == pytest.approx(190, abs=5)
    assert "1 running, 2 waiting · about 3:" in text(tmp_path)
    assert f"running, process {os.getpid()} on" in text(tmp_path) and "To go on" not in text(tmp_path)


def test_a_dead_sweep(tmp_path):
    record = sweep(tmp_path)
    rewrite(record, process=here(**GONE))
    put(tmp_path / "job0", sweep=record.name, process=here(**GONE))
    status = read(tmp_path)
    assert [job.state for job in status.jobs] == ["dead", "not started", "not started"] and not status.open
    assert "python -m trace_hydra -m a=1,2" in text(tmp_path) and "is gone" in text(tmp_path)


def test_a_sweep_of_another_machine_lives_as_long_as_it_touches_its_record(tmp_path):
    record = sweep(tmp_path)
    rewrite(record, process=ELSEWHERE)
    assert {job.state for job in read(tmp_path).jobs} == {"waiting"}
    long_ago = time.time() - 1000
    os.utime(record.path, (long_ago, long_ago))
    assert {job.state for job in read(tmp_path).jobs} == {"not started"}
    rewrite(record, queued=True)
    os.utime(record.path, (long_ago, long_ago))
    assert "what was queued may still start" in text(tmp_path)


def test_what_an_earlier_sweep_left_is_not_this_ones(tmp_path):
    """A job that failed in the sweep of before waits in this one; one that was done before is done."""
    put(tmp_path / "job0", sweep="before", state="failed", age_s=500)
    put(tmp_path / "job1", sweep="before", state="done", age_s=500, progress={**PROGRESS, "op": 1.0, "bwt": 2.0})
    record = sweep(tmp_path, 3)
    jobs = json.loads(record.path.read_text())["jobs"]
    jobs[1]["plan"] = "done before"
    rewrite(record, jobs=jobs)
    assert [job.state for job in read(tmp_path).jobs] == ["waiting", "done", "waiting"]


def test_an_ended_sweep(tmp_path):
    record = sweep(tmp_path)
    record.end(75)
    for number, state in enumerate(("done", "stopped")):
        put(tmp_path / f"job{number}", sweep=record.name, state=state)
    assert [job.state for job in read(tmp_path).jobs] == ["done", "interrupted", "not started"]
    assert "ended with 75" in text(tmp_path) and "-m a=1,2" in text(tmp_path)


def test_the_record_of_an_older_sweep_goes_when_a_new_one_has_its_jobs(tmp_path):
    """Not while the older one runs, and not as long as one of its jobs is neither done nor in the new one."""
    old = sweep(tmp_path, 3, id="old")
    new = sweep(tmp_path, 2, id="new")
    directories = [tmp_path / "job0", tmp_path / "job1"]
    remove_superseded(tmp_path, new.path, directories)
    old.end(1)
    remove_superseded(tmp_path, new.path, directories)
    assert len(read_records(tmp_path)) == 2
    (tmp_path / "job2").mkdir()
    (tmp_path / "job2" / "results.json").write_text("{}")
    remove_superseded(tmp_path, new.path, directories)
    assert [record.path for record in read_records(tmp_path)] == [new.path]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"schema": 1, "jobs": [{}]}', '{"schema": 2}'])
def test_a_damaged_record_is_no_sweep(content, tmp_path):
    (tmp_path / ".sweep-x-1-y.json").write_text(content)
    put(tmp_path / "run")
    assert read(tmp_path).sweeps == [] and only(tmp_path).state == "running"


def test_reading_changes_nothing(tmp_path):
    record = sweep(tmp_path)
    put(tmp_path / "job0", sweep=record.name, process=here(**GONE))

    def seen() -> dict[str, tuple[int, bytes | None]]:
        paths = [tmp_path, *tmp_path.rglob("*")]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in paths}

    before = seen()
    text(tmp_path)
    assert seen() == before


def test_a_run_that_vanishes_while_it_is_read(tmp_path, monkeypatch):
    put(tmp_path / "run")
    monkeypatch.setattr(os, "scandir", lambda path: (_ for _ in ()).throw(FileNotFoundError(path)))
    assert read(tmp_path).jobs == []


def test_a_thousand_jobs_are_read_once_each(tmp_path, monkeypatch):
    """One status.json a job and the record; results.json of none: its numbers stand in status.json too."""
    record = sweep(tmp_path, 1000)
    for number in range(1000):
        put(tmp_path / f"job{number}", sweep=record.name, state="done", progress={**PROGRESS, "op": 1.0, "bwt": 0.5})
        (tmp_path / f"job{number}" / "results.json").write_text("{}")
    opened: list[str] = []
    plain_open = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: opened.append(path.name) or plain_open(path, *a, **k))
    status = read(tmp_path)
    assert status.counts == {"done": 1000} and opened.count("status.json") <= 2000 and "results.json" not in opened
    assert len(lines(status, width=None, colour=False)) < 60
    assert len(lines(status, width=None, colour=False, everything=True)) > 1000


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_every_line_fits_but_errors_and_commands(width, tmp_path):
    record = sweep(tmp_path)
    put(tmp_path / "job0", sweep=record.name)
    put(tmp_path / "job1", sweep=record.name, state="failed")
    (tmp_path / "job1" / "error.txt").write_text(f"DataError: {'long ' * 100}")
    put(tmp_path / f"lone-{'x' * 100}", state="stopped")
    found = lines(read(tmp_path), width=width, colour=False)
    free = [line for line in found if "error.txt" not in line and "python -m" not in line and "To go on" not in line]
    assert max(map(len, free)) <= width
    assert any("stage 2/8" in line for line in free)


HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\n\u202e"


@pytest.mark.parametrize("width", [None, 60])
def test_nothing_steers_the_terminal(width, tmp_path):
    record = sweep(tmp_path)
    jobs = json.loads(record.path.read_text())["jobs"]
    jobs[0]["label"] = HOSTILE
    rewrite(record, jobs=jobs, command=[HOSTILE], folder=HOSTILE)
    record = sweep(tmp_path, id="dead")
    rewrite(record, process={**here(**GONE), "host": HOSTILE}, command=[HOSTILE], folder=HOSTILE)
    put(tmp_path / "job0", sweep=record.name, progress={**PROGRESS, "task": HOSTILE, "doing": HOSTILE})
    put(tmp_path / "job1", sweep=record.name, state="failed")
    (tmp_path / "job1" / "error.txt").write_text(f"DataError: {HOSTILE}")
    put(tmp_path / f"lone{HOSTILE}", state="stopped", arguments=[HOSTILE], folder=HOSTILE)
    found = lines(read(tmp_path), width=width, colour=False)
    assert all(line.isprintable() for line in found)
    assert "\\x1b]0;owned" in "".join(found)


def test_colours_are_the_states_alone(tmp_path):
    put(tmp_path / "run")
    coloured = "\n".join(lines(read(tmp_path), width=80, colour=True))
    assert "\x1b[36mrunning\x1b[0m" in coloured and coloured.count("\x1b[") == 2


def test_what_a_heartbeat_writes_is_read(tmp_path):
    heart = Heartbeat(tmp_path, ["method=one"], None)
    with heart:
        assert only(tmp_path).state == "running" and "starting" in text(tmp_path)
        heart.tell(PROGRESS, True)
        assert only(tmp_path).stage == 2
    heart.end("stopped")
    assert only(tmp_path).state == "interrupted"
