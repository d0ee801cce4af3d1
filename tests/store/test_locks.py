"""Locks across processes, hosts and crashes. Time is a clock that sleeping advances, or does not matter."""

import fcntl
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

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

COUNTER = """
import sys, time
from pathlib import Path
from trace_hydra.store import locks
path, counter = Path(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(3):
    with locks.hold(path, what="it", poll_s=0.02) as held:
        value = int(counter.read_text())
        time.sleep(0.002)
        counter.write_text(str(value + held))
"""

VISITOR = """
import os, signal, sys, time
from pathlib import Path
from trace_hydra.store import locks
path, journal, dies = Path(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND), sys.argv[3] == "dies"
print("ready", flush=True)
sys.stdin.readline()
with locks.hold(path, what="it", poll_s=0.02):
    os.write(journal, f"in {os.getpid()}\\n".encode())
    time.sleep(0.01)
    os.write(journal, f"out {os.getpid()}\\n".encode())
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
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


def test_a_held_lock_is_one_file_with_a_complete_record_and_a_released_one_none(path):
    with locks.hold(path, what="it") as held:
        record = record_of(path)
        assert held and files(path) == [f"{path.name}.1"]
        assert set(record) == {"host", "boot", "pidns", "pid", "started", "token", "beat"}
        assert record["pid"] == os.getpid() and locks.alive(record) is True
    assert files(path) == [] and locks.holder(path) is None


def test_the_folder_is_made(tmp_path):
    with locks.hold(tmp_path / "store" / "locks" / "answers-ab", what="it") as held:
        assert held and (tmp_path / "store" / "locks" / "answers-ab.1").is_file()


def test_an_exception_releases(path):
    with pytest.raises(ZeroDivisionError), locks.hold(path, what="it"):
        raise ZeroDivisionError
    assert files(path) == []


def test_locks_whose_names_begin_alike_are_apart(path):
    longer = path.with_name(path.name + ".7")
    with locks.hold(path, what="it"), locks.hold(longer.with_name(path.name + "ef"), what="other") as held:
        assert held and files(path) == [f"{path.name}.1", f"{path.name}ef.1"]


def test_twenty_processes_lose_no_update(path, tmp_path, start):
    """Twenty processes add 1 three times each, with a pause between reading and writing: 60."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    processes = [start(COUNTER, path, counter, ready=False) for _ in range(20)]
    for process in processes:
        read_line(process)
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait(PATIENCE_S) for process in processes] == [0] * 20
    assert counter.read_text() == "60" and files(path) == []


@pytest.mark.parametrize("reaped", [False, True], ids=["zombie", "gone"])
def test_a_killed_holder_is_overtaken_without_waiting(path, start, clock, reaped):
    process = start(HOLDER, path)
    assert locks.alive(record_of(path)) is True
    process.kill()
    if reaped:
        process.wait()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert locks.alive(record_of(path)) is False
    with locks.hold(path, what="it") as held:
        assert held and clock.naps == 0 and files(path) == [f"{path.name}.2"]
    assert files(path) == []


def test_a_reused_process_id_is_not_the_holder(path, clock):
    """Same host, boot, namespace and pid as this process, which runs, but started at another tick."""
    record = own_record(path)
    write(path, 1, {**record, "token": "theirs", "started": record["started"] - 1})
    with locks.hold(path, what="it") as held:
        assert held and clock.naps == 0


def test_ten_waiting_for_a_dead_holder_get_it_one_at_a_time_though_half_of_them_die_in_it(path, tmp_path, start):
    """The journal of 10 visits, 5 of them ended by SIGKILL, is in, out, in, out, ... each pair of one process."""
    journal = tmp_path / "journal"
    journal.touch()
    dead = start(HOLDER, path)
    visitors = [start(VISITOR, path, journal, "dies" if n % 2 else "lives", ready=False) for n in range(10)]
    for visitor in visitors:
        read_line(visitor)
        visitor.stdin.write("\n")
        visitor.stdin.flush()
    dead.kill()
    codes = [visitor.wait(PATIENCE_S) for visitor in visitors]
    assert codes == [0, -signal.SIGKILL] * 5
    words = [line.split() for line in journal.read_text().splitlines()]
    assert [word for word, _ in words] == ["in", "out"] * 10
    assert [pid for _, pid in words[::2]] == [pid for _, pid in words[1::2]]
    with locks.hold(path, what="it") as held:
        assert held
    assert files(path) == []


@pytest.mark.parametrize("content", [json.dumps(FOREIGN), "", "{", "[1]", "9" * 5000], ids=lambda text: text[:2] or "0")
def test_a_silent_holder_of_another_host_is_overtaken_after_the_lease(path, clock, content):
    """Looks are at most 0.5 s apart, so 60 s of silence are noticed between 60 and 60.5 s; damaged files alike."""
    path.with_name(f"{path.name}.1").write_text(content)
    began = clock.now
    with locks.hold(path, what="it") as held:
        assert held and 60.0 <= clock.now - began <= 60.5
    assert files(path) == []


@pytest.mark.parametrize("readable", [True, False])
def test_a_holder_of_another_host_keeps_its_lock_while_its_beat_changes(path, clock, monkeypatch, readable):
    """It beats every 50 s for 10 minutes, then no more: overtaken 60 to 60.5 s after the last beat was seen."""
    file = path.with_name(f"{path.name}.1")
    write(path, 1, FOREIGN)
    began, beats = clock.now, [0]

    def beat():
        if clock.now - began >= 50 * (beats[0] + 1) and beats[0] < 12:
            beats[0] += 1
            write(path, 1, {**FOREIGN, "beat": beats[0]})
            os.utime(file, ns=(0, beats[0]))

    def refuse(file):
        if file.name.endswith(".1"):
            raise PermissionError
        return read(file)

    read = locks._read
    if not readable:
        monkeypatch.setattr(locks, "_read", refuse)
    clock.during = beat
    with locks.hold(path, what="it") as held:
        assert held and 660.0 <= clock.now - began <= 661.0


def test_a_suspended_observer_takes_its_own_absence_for_no_silence(path, clock):
    """Both were stopped for an hour (a suspended job); the holder beats just after the observer looked."""
    write(path, 1, FOREIGN)

    def stop():
        if clock.naps == 1:
            clock.now += 3600
        if clock.naps == 2:
            write(path, 1, {**FOREIGN, "beat": 1})

    clock.during = stop
    with locks.hold(path, what="it", give_up=lambda: clock.naps == 3) as held:
        assert not held
    assert record_of(path)["token"] == "theirs"


@pytest.mark.parametrize("jump", [1e6, -1e6])
def test_jumps_of_the_wall_clock_change_nothing(path, clock, monkeypatch, jump):
    """Files dated a million seconds off, and every call of time.time a jump further."""
    now = [time.time()]

    def jumping():
        now[0] += jump
        return now[0]

    monkeypatch.setattr(time, "time", jumping)
    clock.time = jumping
    write(path, 1, FOREIGN)
    os.utime(path.with_name(f"{path.name}.1"), (now[0] + jump, now[0] + jump))
    began = clock.now
    with locks.hold(path, what="it") as held:
        assert held and 60.0 <= clock.now - began <= 60.5


def test_a_beating_holder_of_this_host_is_never_overtaken(path, clock):
    """The observer's lease of 60 s passes 16 times, but in each 50 s of it the holder's thread beats once."""

    def wait_for_a_beat():
        seen = record_of(path)["beat"]
        until(lambda: record_of(path)["beat"] != seen)

    clock.during = wait_for_a_beat
    with locks.hold(path, what="it", beat_s=0.005):
        token = record_of(path)["token"]
        with locks.hold(path, what="it", poll_s=50.0, give_up=lambda: clock.now > 2000) as held:
            assert not held and record_of(path)["token"] == token


def test_a_living_process_that_stopped_beating_is_overtaken_after_the_lease(path, clock):
    """A hung or stopped process; its pid is this process's, alive all the time."""
    write(path, 1, {**own_record(path), "token": "theirs"})
    began = clock.now
    with locks.hold(path, what="it") as held:
        assert held and clock.now - began >= 60.0


@pytest.mark.parametrize("number", [1, 2])
def test_who_lost_the_lock_is_told_and_takes_nothing_away(path, caplog, number):
    """Overtaken by a host that knows of no other, or whose numbers go on."""
    with locks.hold(path, what="it", beat_s=0.005) as held:
        path.with_name(f"{path.name}.1").unlink()
        write(path, number, FOREIGN)
        until(lambda: "lost the lock" in caplog.text)
        assert held
    assert files(path) == [f"{path.name}.{number}"] and len(caplog.records) == 1


def test_a_beat_brings_no_removed_lock_back(path, monkeypatch):
    """The file goes between the beat's look and its write, as an overtaker would remove it."""
    real, beats = locks._Claim._write, []

    def write_late(claim, stream, beat):
        if beat == 1:
            claim.file.unlink()
        real(claim, stream, beat)
        beats.append(beat)

    monkeypatch.setattr(locks._Claim, "_write", write_late)
    with locks.hold(path, what="it", beat_s=0.005):
        until(lambda: 1 in beats)
        assert files(path) == []


def test_beats_change_digits_only(path):
    """A reader that gets half of one beat and half of the next reads a record all the same."""
    file = path.with_name(f"{path.name}.1")
    with locks.hold(path, what="it", beat_s=0.002):
        first = file.read_bytes()
        until(lambda: record_of(path)["beat"] >= 10)
        later = file.read_bytes()
    assert len(first) == len(later)
    assert all(json.loads(first[:cut] + later[cut:])["token"] for cut in range(len(first)))


def test_a_slow_overtaker_withdraws_from_a_lock_that_is_somebody_elses_by_now(path, monkeypatch, start):
    """A finds T dead and pauses; B overtakes T, is done and gone; C takes path.1. A's path.2 must not count."""
    write(path, 1, {**own_record(path), "token": "T", "started": 0})
    make, others = locks._Claim.make, []

    def slow_make(claim):
        if not others:
            others.append(claim)
            with locks.hold(path, what="B"):
                pass
            others.append(start(HOLDER, path))
        return make(claim)

    monkeypatch.setattr(locks._Claim, "make", slow_make)
    with locks.hold(path, what="A", poll_s=0.01, give_up=lambda: True) as held:
        assert not held
    assert files(path) == [f"{path.name}.1"] and record_of(path)["pid"] == others[1].pid


def test_an_overtaker_withdraws_when_the_holder_beats_at_the_last_moment(path, monkeypatch, clock):
    write(path, 1, FOREIGN)
    make = locks._Claim.make

    def make_late(claim):
        write(path, 1, {**FOREIGN, "beat": 1})
        return make(claim)

    monkeypatch.setattr(locks._Claim, "make", make_late)
    with locks.hold(path, what="it", give_up=lambda: clock.now > 1070) as held:
        assert not held
    assert files(path) == [f"{path.name}.1"] and record_of(path)["token"] == "theirs"


def test_a_left_over_claim_above_a_living_one_gives_nobody_the_lock(path, clock):
    """An overtaker killed before it could withdraw: its file is dead, the holder below it is not."""
    with locks.hold(path, what="it"):
        record = record_of(path)
        write(path, 2, {**record, "token": "late", "started": 0})
        assert record_of(path)["token"] == record["token"]
        with locks.hold(path, what="it", give_up=lambda: True) as held:
            assert not held
    with locks.hold(path, what="it") as held:
        assert held and clock.naps == 1
    assert files(path) == []


def test_waiting_says_who_makes_it_at_once_and_every_minute(path, clock):
    """Given up after 150 s: told at 0, 60 and 120 s."""
    write(path, 1, FOREIGN)
    said = []
    with locks.hold(
        path,
        what="stage 3 (FOMC)",
        lease_s=1e9,
        notify=lambda text: said.append((clock.now, text)),
        give_up=lambda: clock.now >= 1150,
    ) as held:
        assert not held
    file = path.with_name(f"{path.name}.1")
    assert {text for _, text in said} == {f"stage 3 (FOMC) is being made by elsewhere process 1; waiting ({file})"}
    assert [int(when - 1000) // 60 for when, _ in said] == [0, 1, 2] and said[0][0] == 1000


def test_waiting_is_logged_where_nobody_listens(path, clock, caplog):
    path.with_name(f"{path.name}.1").touch()
    with caplog.at_level(logging.INFO, "trace_hydra"), locks.hold(path, what="it", give_up=lambda: True) as held:
        assert not held
    assert "it is being made by an unknown process; waiting" in caplog.text


def test_giving_up_leaves_the_holder_and_needs_one_pause(path, clock):
    write(path, 1, FOREIGN)
    with locks.hold(path, what="it", give_up=lambda: True) as held:
        assert not held and clock.naps == 1
    assert files(path) == [f"{path.name}.1"]


def test_a_free_lock_is_taken_without_asking_to_give_up(path):
    with locks.hold(path, what="it", give_up=lambda: True) as held:
        assert held


def test_a_forked_child_does_not_release(path):
    manager = locks.hold(path, what="it")
    assert manager.__enter__()
    child = os.fork()
    if child == 0:
        try:
            manager.__exit__(None, None, None)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert files(path) == [f"{path.name}.1"]
    manager.__exit__(None, None, None)
    assert files(path) == []


def test_no_file_lock_of_the_system_is_used(path, monkeypatch, clock):
    def refuse(*_):
        raise AssertionError("flock")

    for name in ("flock", "lockf", "fcntl"):
        monkeypatch.setattr(fcntl, name, refuse)
    monkeypatch.setattr(os, "lockf", refuse)
    write(path, 1, FOREIGN)
    with locks.hold(path, what="it") as held:
        assert held
    assert "fcntl" not in Path(locks.__file__).read_text()


def test_file_systems_without_hard_links(path, monkeypatch, clock):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with locks.hold(path, what="it") as held:
        assert held and files(path) == [f"{path.name}.1"] and record_of(path)["pid"] == os.getpid()
        with locks.hold(path, what="it", give_up=lambda: True) as second:
            assert not second
    assert files(path) == []


@pytest.mark.parametrize("writes", [0, 1], ids=["draft", "file"])
def test_a_full_disk_leaves_no_empty_lock_behind(path, monkeypatch, caplog, writes):
    """It is full when the draft is written or, where there are no hard links, at the file itself."""
    left = [writes]

    def full(*_):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "fsync", full)
    with locks.hold(path, what="it") as held:
        assert held and files(path) == []
    assert "No space left on device" in caplog.text


def test_a_folder_that_cannot_be_written_means_no_lock_and_one_warning(path):
    """In a process without root's rights, which reads and enters but does not write the folder."""
    code = """
import logging, os, sys
from pathlib import Path
from trace_hydra.store import locks
logging.basicConfig(format="%(levelname)s %(message)s")
os.chdir(sys.argv[1])  # the folders above may be closed to the user it becomes
if os.geteuid() == 0:
    os.seteuid(65534)
for _ in range(2):
    with locks.hold(Path("stages-ab"), what="it") as held:
        print(held, os.listdir("."))
"""
    path.parent.chmod(0o555)
    done = subprocess.run([sys.executable, "-c", code, str(path.parent)], capture_output=True, text=True)
    path.parent.chmod(0o755)
    assert done.stdout.splitlines() == ["True []"] * 2
    assert done.stderr.splitlines() == [
        "WARNING no locks in . (Permission denied): what another process makes at the same time is made twice."
    ]


def test_a_file_in_place_of_the_folder_means_no_lock(tmp_path, caplog):
    (tmp_path / "locks").touch()
    with locks.hold(tmp_path / "locks" / "stages-ab", what="it") as held:
        assert held and "no locks in" in caplog.text
    assert locks.holder(tmp_path / "locks" / "stages-ab") is None


def test_drafts_of_killed_processes_are_removed(path):
    path.with_name(f".{path.name}.{'a' * 32}").touch()
    other = path.with_name(f".{path.name}ef.{'a' * 32}")
    other.touch()
    with locks.hold(path, what="it"):
        pass
    assert files(path) == [other.name]


def test_what_cannot_be_seen_from_here_is_unknown(path):
    record = own_record(path)
    unknown = [FOREIGN, {}, {**record, "boot": "another"}, {**record, "pidns": "n"}, {**record, "pid": "1"}]
    assert [locks.alive(each) for each in [*unknown, {**record, "pid": -1}]] == [None] * 6
    assert locks.alive({**record, "started": None}) is True


def test_the_seeded_random_numbers_of_a_run_are_left_alone(path, clock):
    write(path, 1, FOREIGN)
    before = random.getstate()
    with locks.hold(path, what="it"):
        pass
    assert random.getstate() == before
