"""A small SLURM of this machine: `sbatch`, `srun`, `squeue`, `scontrol` and `scancel` for submitit's batch files.

Each array task has a process of its own that plays controller and node for it (`_Task`). All state is in the folder
$FAKE_SLURM: `jobs/<id>.json` is written by that process alone; what others ask of it they leave as files in `inbox/`.
`events.jsonl` has what happened. As on a cluster, signals go to steps and not to the batch shell, and a job that is
requeued while it runs is ended first.
"""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel")
KILL_WAIT_S = 15.0
"""Between SIGTERM and SIGKILL."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED")


class FakeSlurm:
    """Makes the commands in a folder, and lets a test do what a cluster does to jobs."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("bin", "jobs", "inbox"):
            (folder / name).mkdir(parents=True)
        for command in COMMANDS:
            path = folder / "bin" / command
            path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S {Path(__file__)} {command} "$@"\n')
            path.chmod(0o755)

    def environment(self) -> dict[str, str]:
        """What a process needs to find the commands."""
        return {"PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "FAKE_SLURM": str(self.folder)}

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Array tasks by id."""
        return {path.stem: json.loads(path.read_text()) for path in sorted((self.folder / "jobs").glob("*.json"))}

    def events(self, kind: str) -> list[str]:
        """Ids of the jobs to which something happened, in order."""
        path = self.folder / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event["job"] for event in map(json.loads, lines) if event["kind"] == kind]

    def ask(self, job: str, what: str) -> None:
        """Do something to a job: timeout, preempt (warn, then SIGTERM and SIGKILL) or node_fail (SIGKILL at once)."""
        _ask(self.folder, job, what)

    def shut_down(self) -> None:
        """End every job and what plays its controller."""
        for record in self.jobs().values():
            for group in (record["controller"], record["group"]):
                with suppress(ProcessLookupError, PermissionError):
                    if group:
                        os.killpg(group, signal.SIGKILL)


class _Task:
    """Controller and node of one array task."""

    def __init__(self, folder: Path, job: str, script: Path, environment: dict[str, str], options: dict[str, str]):
        self.folder, self.job, self.script, self.environment, self.options = folder, job, script, environment, options
        name, _, delay = options["signal"].partition("@")
        self.warning, self.delay_s = getattr(signal, f"SIG{name}"), float(delay)
        self.limit_s = float(options["time"]) * float(os.environ.get("FAKE_SLURM_MINUTE_S", "60"))
        self.process: subprocess.Popen | None = None
        self.state, self.restarts = "PENDING", 0
        self.again = False
        """Whether it goes back to the queue once its processes are gone."""

    def run(self) -> None:
        """Play until the job has ended for good."""
        self.set("PENDING")
        while True:
            if self.state == "CANCELLED" or not self.wait_for_place():
                return self.set("CANCELLED")
            end = self.run_once()
            if not self.again:
                return self.set(end)
            self.restarts, self.again = self.restarts + 1, False
            self.set("PENDING")
            time.sleep(0.5)

    def wait_for_place(self) -> bool:
        """Wait until the array has room; False if cancelled before."""
        array, index = (*self.job.split("_"), None)[:2]
        at_once = int(self.options.get("array", "0%1").partition("%")[2] or 1)
        while index is not None:
            if {"cancel_pending", "cancel"} & set(self.asked()):
                return False
            with (self.folder / "place").open("a") as place:
                fcntl.flock(place, fcntl.LOCK_EX)
                others = [path for path in (self.folder / "jobs").glob(f"{array}_*.json") if path.stem != self.job]
                busy = sum(json.loads(path.read_text())["state"] in ("RUNNING", "COMPLETING") for path in others)
                if busy < at_once:
                    self.set("RUNNING")
                    break
            time.sleep(0.05)
        return True

    def run_once(self) -> str:
        """Run the script to its end, whatever brings it about; returns the state that it would leave."""
        output = self.options["output"].replace("%A", self.job.split("_")[0]).replace("%a", self.job.split("_")[-1])
        Path(output.replace("%j", self.job)).parent.mkdir(parents=True, exist_ok=True)
        with open(output.replace("%j", self.job), "ab") as stream:
            self.process = subprocess.Popen(
                ["bash", self.script],
                env={**self.environment, "SLURM_RESTART_COUNT": str(self.restarts)},
                stdout=stream, stderr=stream, start_new_session=True,
            )  # fmt: skip
        self.set("RUNNING")
        self.note("start")
        end, begun, kill_at, warned = "", time.monotonic(), float("inf"), False
        while (status := self.process.poll()) is None:
            now = time.monotonic()
            asked = self.asked(clear=True)
            if "timeout" in asked:
                self.limit_s = now - begun + self.delay_s
            if now - begun >= self.limit_s - self.delay_s and not warned:
                warned = True
                self.signal(self.warning)
            for one in asked:
                if one.startswith("signal:"):
                    self.signal(getattr(signal, f"SIG{one.partition(':')[2]}"))
            if "preempt" in asked:  # it stays RUNNING for the time of grace
                self.signal(signal.SIGCONT, signal.SIGTERM)
                self.limit_s, warned = now - begun + KILL_WAIT_S, True
            if "node_fail" in asked:
                self.note("node_fail")
                os.killpg(self.process.pid, signal.SIGKILL)
                self.again = True
            if "requeue" in asked:
                self.note("requeue")
                self.again = True
            over = now - begun >= self.limit_s
            if kill_at == float("inf") and (over or {"cancel", "requeue"} & set(asked)):
                end = "CANCELLED" if "cancel" in asked else "TIMEOUT" if over else "REQUEUED"
                self.set("COMPLETING")
                self.signal(signal.SIGCONT, signal.SIGTERM)
                kill_at = now + KILL_WAIT_S
            if now >= kill_at:
                self.note("killed")
                os.killpg(self.process.pid, signal.SIGKILL)
            time.sleep(0.02)
        if "requeue" in self.asked(clear=True):  # asked by a process that was then faster than this one
            self.note("requeue")
            self.again = True
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        (self.folder / "jobs" / f"{self.job}.step").unlink(missing_ok=True)
        self.limit_s = float(self.options["time"]) * float(os.environ.get("FAKE_SLURM_MINUTE_S", "60"))
        self.note("end")
        return end or ("COMPLETED" if status == 0 else "FAILED")

    def signal(self, *numbers: int) -> None:
        """Signal the step, if there is one."""
        with suppress(OSError, ValueError):
            for number in numbers:
                os.kill(int((self.folder / "jobs" / f"{self.job}.step").read_text()), number)

    def asked(self, clear: bool = False) -> list[str]:
        """What others left for this job."""
        found = sorted((self.folder / "inbox").glob(f"{self.job}@*"))
        what = [path.read_text() for path in found]
        for path in found if clear else ():
            path.unlink()
        return what

    def set(self, state: str) -> None:
        self.state = state
        record = {
            "state": state, "restarts": self.restarts, "controller": os.getpid(),
            "group": self.process.pid if self.process and self.process.returncode is None else None,
        }  # fmt: skip
        _write(self.folder / "jobs" / f"{self.job}.json", json.dumps(record))

    def note(self, kind: str) -> None:
        with (self.folder / "events.jsonl").open("a") as stream:
            stream.write(json.dumps({"job": self.job, "kind": kind}) + "\n")


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    draft.write_text(text)
    draft.rename(path)


def _ask(folder: Path, job: str, what: str) -> None:
    _write(folder / "inbox" / f"{job}@{time.monotonic_ns():020d}", what)


def sbatch(folder: Path, arguments: list[str]) -> None:
    """Read the options of a batch file, start what plays its tasks, and say the job's number."""
    script = Path(arguments[0])
    lines = re.findall(r"^#SBATCH --(\S+?)(?:=(.*))?$", script.read_text(), re.MULTILINE)
    options = {name: " ".join(shlex.split(value)) for name, value in lines}
    if "requeue" not in options:
        raise SystemExit("this cluster requeues only jobs that ask for it")
    number = str(100 + len(list(folder.glob("batch-*"))))
    kept = folder / f"batch-{number}.sh"
    kept.write_text(script.read_text())
    first, last = map(int, options["array"].partition("%")[0].split("-")) if "array" in options else (0, 0)
    for index in range(first, last + 1):
        job = f"{number}_{index}" if "array" in options else number
        environment = {
            **os.environ, "SLURM_JOB_ID": str(int(number) + index), "SLURM_JOB_NAME": options["job-name"],
            "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": options["ntasks-per-node"], "SLURM_JOB_NUM_NODES": "1",
            "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
            "SLURM_JOB_NODELIST": "node1", "FAKE_SLURM_JOB": job,
        }  # fmt: skip
        if "array" in options:
            environment |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": str(index)}
        if os.fork() == 0:
            os.setsid()
            for stream in (0, 1, 2):
                os.dup2(os.open(os.devnull, os.O_RDWR), stream)
            _Task(folder, job, kept, environment, options).run()
            os._exit(0)
    deadline = time.monotonic() + 20
    while len(list((folder / "jobs").glob(f"{number}*.json"))) < last + 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    print(f"Submitted batch job {number}")


def srun(folder: Path, arguments: list[str]) -> None:
    """Become the step: output to the files named, the process id noted."""
    job, names = os.environ["FAKE_SLURM_JOB"], {"--output": 1, "--error": 2}
    while arguments[0].startswith("--"):
        flag = arguments.pop(0)
        if flag in names:
            main, _, index = job.partition("_")
            path = arguments.pop(0).replace("%A", main).replace("%a", index).replace("%j", job).replace("%t", "0")
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), names[flag])
    _write(folder / "jobs" / f"{job}.step", str(os.getpid()))
    os.execvp(arguments[0], arguments)


def squeue(folder: Path, arguments: list[str]) -> None:
    """Print id or state of jobs that have not ended."""
    options = {argument.lstrip("-").partition("=")[0]: argument.partition("=")[2] for argument in arguments}
    for path in sorted((folder / "jobs").glob("*.json")):
        state = json.loads(path.read_text())["state"]
        if state not in ENDED and options.get("jobs", path.stem) == path.stem:
            print(options["format"].replace("%i", path.stem).replace("%T", state))


def scontrol(folder: Path, arguments: list[str]) -> None:
    """Requeue a job that runs or is about to end; refuse one that waits."""
    verb, job = arguments
    state = json.loads((folder / "jobs" / f"{job}.json").read_text())["state"]
    if verb != "requeue" or state not in ("RUNNING", "COMPLETING"):
        raise SystemExit(f"scontrol: {verb} of a job that is {state}")
    _ask(folder, job, "requeue")


def scancel(folder: Path, arguments: list[str]) -> None:
    """Cancel jobs, only those that wait with --state=PENDING; or signal their steps."""
    given = [argument for argument in arguments if argument.startswith("--")]
    for job in arguments[len(given) :]:
        state = json.loads((folder / "jobs" / f"{job}.json").read_text())["state"]
        if given and given[0].startswith("--signal="):
            _ask(folder, job, f"signal:{given[0].partition('=')[2].removeprefix('SIG')}")
        elif given == ["--state=PENDING"]:
            if state == "PENDING":
                _ask(folder, job, "cancel_pending")
        else:
            _ask(folder, job, "cancel")


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(os.environ["FAKE_SLURM"]), sys.argv[2:])
