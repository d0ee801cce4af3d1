"""Real sweeps on a pseudo-terminal, piped, quiet and killed; and what `python -m trace_hydra.status` says of them."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import ROOT
from zygote import run_module

SETTINGS = [
    "debug=smoke", "logger=none", "capability=none", "task_order=[FOMC,Py150]", "data.rows.train=8",
    "data.rows.test=2", "evaluation.bootstrap_samples=10", "callbacks.progress.interval_s=0",
]  # fmt: skip
ERASE = "\r\x1b[2K"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def command(folder: Path, *given: str) -> list[str]:
    return ["-m", *SETTINGS, f"paths.runs={folder}/runs", f"paths.store={folder}/store", "seed=1,2", *given]


def on_a_terminal(arguments: list[str], columns: int, **variables: str) -> tuple[int, str]:
    """Run on a pseudo-terminal; returns the exit code and all that was written to it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    names = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT,
        env={**environment, "TERM": "xterm", "OMP_NUM_THREADS": "1", **variables}, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        said += part
    os.close(ours)
    return process.wait(), said.decode().replace("\r\n", "\n")


def drawn(said: str) -> list[str]:
    """What stood in the line that is redrawn, in turn."""
    return [part.split("\n")[0] for part in said.split(ERASE)[1:] if part.startswith("[")]


def status(folder: Path, *given: str) -> subprocess.CompletedProcess:
    return run_module("trace_hydra.status", folder / "runs", *given)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [40, pytest.param(100, marks=pytest.mark.long)])
def test_on_a_terminal(columns, tmp_path):
    """One line redrawn, never as wide as the terminal; colours, and no other codes; the matrix as stages finish."""
    code, said = on_a_terminal(["trace_hydra", *command(tmp_path)], columns)
    assert code == 0, said[-3000:]
    assert any(line.startswith("[stage 2/2 Py150]") for line in drawn(said))
    assert max(len(COLOUR.sub("", line)) for line in drawn(said)) < columns
    rest = COLOUR.sub("", said.replace(ERASE, ""))
    assert "\x1b" not in rest and "\r" not in rest
    assert rest.count("scores after 1 FOMC") == 2 and "2 done" in rest
    code, said = on_a_terminal(["trace_hydra.status", f"{tmp_path}/runs"], columns)
    assert code == 0 and "\x1b[32mdone\x1b[0m  OP " in said
    assert max(map(len, COLOUR.sub("", said).splitlines())) <= columns
    code, said = on_a_terminal(["trace_hydra.status", f"{tmp_path}/runs"], columns, NO_COLOR="1")
    assert code == 0 and "\x1b" not in said
    code, said = on_a_terminal(["trace_hydra.status", f"{tmp_path}/runs"], columns, TERM="dumb")
    assert code == 0 and "\x1b" not in said


@pytest.mark.long
def test_jobs_side_by_side_share_one_line(tmp_path):
    """No job draws a line of its own or prints its matrix; the sweep's line counts, and each job that ends is said."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    more = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "budget.default_epochs=20"]
    code, said = on_a_terminal(["trace_hydra", *command(tmp_path, *more)], 120)
    assert code == 0, said[-3000:]
    lines = drawn(said)
    assert lines and all(line.startswith("[sweep ") for line in lines), lines
    assert "scores after" not in said and "2 done" in said


@pytest.mark.slow
@pytest.mark.parametrize("encoding", [pytest.param("utf-8", marks=pytest.mark.long), "ascii"])
def test_piped(encoding, tmp_path):
    """Plain lines in the stream's encoding, no codes."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "40"}
    done = subprocess.run(
        [sys.executable, "-m", "trace_hydra", *command(tmp_path, "seed=1")], capture_output=True, cwd=ROOT,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert "\x1b" not in out + err and "\r" not in out + err
    assert re.search(r"^\[stage 2/2 Py150\] step \d+/\d+", err, re.M)
    assert "scores after 1 FOMC" in out and "1 done" in out


@pytest.mark.slow
def test_quiet(tmp_path):
    """Only what the sweep gave: a job's closing numbers and the closing table."""
    done = run_module("trace_hydra", *command(tmp_path, "progress=quiet", "seed=1"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "BWT" in done.stdout and "1 done" in done.stdout
    assert not any(word in done.stdout for word in ("train tokens", "scores after", "HYDRA", "step "))


def test_an_unknown_mode_is_refused(tmp_path):
    done = run_module("trace_hydra", *SETTINGS, f"paths.runs={tmp_path}", "progress=loud")
    assert done.returncode == 2 and "progress=loud is none of auto, bar, lines, quiet" in done.stderr


@pytest.mark.long
def test_killed(tmp_path):
    """kill -9 in the first job: status says which stage it was in, that it is dead, and how to go on."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trace_hydra", *command(tmp_path, "budget.default_epochs=300")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    jobs: list[dict] = []
    while not any(job["state"] == "running" and job["doing"] == "training" for job in jobs):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
        done = status(tmp_path, "--json")
        jobs = json.loads(done.stdout)["jobs"] if done.returncode == 0 else []
    assert sorted(job["state"] for job in jobs) == ["running", "waiting"]
    assert {job["pid"] for job in jobs} == {process.pid, None}
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    found = json.loads(status(tmp_path, "--json").stdout)
    assert sorted(job["state"] for job in found["jobs"]) == ["dead", "not started"]
    assert found["left"]["seconds"] == 0 and found["sweeps"][0]["state"] == "dead"
    said = status(tmp_path).stdout
    assert "dead  stage 1/2 FOMC, step" in said and "its process is gone; last sign of life" in said
    assert f"cd {ROOT} && python -m trace_hydra -m" in said and "seed=1,2" in said
    again = run_module("trace_hydra", *command(tmp_path, "budget.default_epochs=1"))
    assert again.returncode == 0
    states = [job["state"] for job in json.loads(status(tmp_path, "--json").stdout)["jobs"]]
    assert sorted(states) == ["dead", "done", "done", "not started"]  # with other settings: other jobs


@pytest.mark.slow
def test_names_and_errors_cannot_steer_the_terminal(tmp_path):
    """An override holds the code that clears a screen; the job fails with it in its message."""
    given = command(tmp_path, "seed=1", "+data.tasks.FOMC.metric='\x1b[2Jx'")
    code, said = on_a_terminal(["trace_hydra", *given], 100)
    assert code != 0 and "\x1b[2J" not in said and "\\x1b[2J" in said
    code, said = on_a_terminal(["trace_hydra.status", f"{tmp_path}/runs"], 100)
    assert code == 0 and "failed" in COLOUR.sub("", said) and "\x1b[2J" not in said


def test_a_folder_without_runs_and_one_that_is_not_there(tmp_path):
    for folder in (tmp_path, tmp_path / "not"):
        done = run_module("trace_hydra.status", folder)
        assert done.returncode == 2 and str(folder) in done.stderr and "Traceback" not in done.stderr


def test_watch_ends_with_the_last_run(tmp_path):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "error.txt").write_text("DataError: x")
    done = status(tmp_path, "--watch", "0.01", "--json")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1
    assert "must be above 0" in status(tmp_path, "--watch", "0").stderr
