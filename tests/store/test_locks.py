"""Locks across processes, hosts and crashes. Time is a clock that sleeping advances, or does not matter."""

import fcntl
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import lock_doubles
import pytest
from lock_doubles import FOREIGN, PATIENCE_S, files, own_record, read_line, record_of, write

from trace_hydra.store import locks

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

clock, path, start = lock_doubles.clock, lock_doubles.path, lock_doubles.start


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
