"""status.json of a run: written whole, and never in a run's way."""

import json
import threading

import pytest
from doubles import Clock

from trace_hydra import heartbeat, job
from trace_hydra.errors import StoreError
from trace_hydra.heartbeat import Heartbeat


def read(folder):
    return json.loads((folder / "status.json").read_text())


def test_what_is_told_and_when_it_was_told(tmp_path):
    """Told at 4 s, written at 10 s: 10 s gone, 6 s quiet."""
    clock = Clock()
    heart = Heartbeat(tmp_path, ["a=1"], "s.halt", clock=clock)
    with heart:
        assert read(tmp_path)["progress"] == {} and heartbeat.current() is heart
        clock.now = 4.0
        heart.tell({"stage": 1})
        assert read(tmp_path)["progress"] == {}  # with the next beat
        clock.now = 10.0
        heart._write()
        found = read(tmp_path)
        assert (found["progress"], found["gone_s"], found["quiet_s"]) == ({"stage": 1}, 10.0, 6.0)
        heart.tell({"stage": 2}, True)
        assert read(tmp_path)["progress"] == {"stage": 2} and read(tmp_path)["beat"] > found["beat"]
    assert heartbeat.current() is None


def test_it_beats_while_nobody_tells_it_anything(tmp_path):
    with Heartbeat(tmp_path, [], None, beat_s=0.01):
        first = read(tmp_path)["beat"]
        for _ in range(1000):
            if read(tmp_path)["beat"] > first + 2:
                break
            threading.Event().wait(0.01)
        else:
            pytest.fail("no beat")


def test_nothing_is_written_after_the_end(tmp_path):
    heart = Heartbeat(tmp_path, [], None, beat_s=0.001)
    with heart:
        pass
    heart.end("done")
    thread = heart._thread
    thread.join(10)
    assert not thread.is_alive() and read(tmp_path)["state"] == "done"


@pytest.mark.parametrize("error", [StoreError("full"), OSError("gone")])
def test_a_disk_that_refuses_stops_nothing(error, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(heartbeat, "put_bytes", refuse)
    with job.watched(tmp_path, [], fail_fast=False):
        heart = heartbeat.current()
        assert heart is not None
        heart.tell({"stage": 1}, True)
    assert not (tmp_path / "status.json").exists()


def test_what_json_cannot_hold_stops_nothing(tmp_path):
    with Heartbeat(tmp_path, [], None) as heart:
        heart.tell({"loss": float("nan"), "object": object()}, True)
    assert read(tmp_path)["progress"] == {}


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, "done"),
        (ValueError("x"), "failed"),
        (KeyboardInterrupt(), "stopped"),
        (job.Stopped("SIGTERM"), "stopped"),
    ],
)
def test_a_job_outside_of_sweeps_says_how_it_went_too(error, state, tmp_path):
    try:
        with job.watched(tmp_path, ["a=1"], fail_fast=False):
            assert read(tmp_path)["state"] == "running"
            if error is not None:
                raise error
    except BaseException as raised:  # noqa: BLE001 - the one above
        assert raised is error
    found = read(tmp_path)
    assert (found["state"], found["sweep"], found["arguments"]) == (state, None, ["a=1"])


@pytest.mark.parametrize(("code", "state"), [(75, "stopped"), (130, "stopped"), (1, "failed")])
def test_a_run_that_ended_on_another_process(code, state, tmp_path):
    with pytest.raises(job.ranks.FailedElsewhere), job.watched(tmp_path, [], fail_fast=False):
        raise job.ranks.FailedElsewhere(code)
    assert read(tmp_path)["state"] == state
