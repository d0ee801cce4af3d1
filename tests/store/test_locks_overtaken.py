"""Locks whose holders die, fall silent or come back: who overtakes, when, and who withdraws."""

import json
import os
import signal
import time

import lock_doubles
import pytest
from lock_doubles import FOREIGN, HOLDER, PATIENCE_S, files, own_record, read_line, record_of, until, write

from trace_hydra.store import locks

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

clock, path, start = lock_doubles.clock, lock_doubles.path, lock_doubles.start


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
