"""A clock that sleeping advances, holders in processes of their own, holders that are only a file."""

import json
import subprocess
import sys
import time

import pytest

from trace_hydra.store import locks

PATIENCE_S = 60.0
"""Longest wait for another process or thread; reached only if a test fails."""

FOREIGN = {"host": "elsewhere", "boot": "b", "pidns": "n", "pid": 1, "started": 1, "token": "theirs", "beat": 0}

HOLDER = """
import sys, time
from pathlib import Path
from trace_hydra.store import locks
with locks.hold(Path(sys.argv[1]), what="it"):
    print("held", flush=True)
    time.sleep(600)
"""


class Clock:
    """Stands for the module `time` in locks: sleeping advances it and calls `during`."""

    def __init__(self):
        self.now, self.naps, self.during = 1000.0, 0, lambda: None

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now, self.naps = self.now + seconds, self.naps + 1
        assert self.naps < 10_000, "waits for ever"
        self.during()

    def time(self):
        raise AssertionError("a wall clock was asked")


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(locks, "time", clock)
    return clock


@pytest.fixture
def path(tmp_path):
    """Base name of a lock; its folder is there and empty."""
    (tmp_path / "locks").mkdir()
    return tmp_path / "locks" / "stages-0123abcd"


@pytest.fixture
def start():
    """Start python code in a process and wait for the line it prints; what still runs is killed at the end."""
    started = []

    def start(code, *args, ready=True):
        command = [sys.executable, "-c", code, *map(str, args)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        if ready:
            read_line(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def read_line(process):
    assert process.stdout.readline()


def files(path):
    return sorted(file.name for file in path.parent.iterdir())


def write(path, number, record):
    path.with_name(f"{path.name}.{number}").write_text(json.dumps(record))


def record_of(path):
    record = locks.holder(path)
    assert record is not None
    return record


def own_record(path):
    """Record of a lock held by this process, as its file has it."""
    with locks.hold(path, what="it"):
        return record_of(path)


def until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)
