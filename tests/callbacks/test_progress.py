"""Time left, by hand with a clock that the test moves."""

import io
import json
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from doubles import Clock, two_tasks

from trace_hydra import terminal
from trace_hydra.callbacks.estimate import Estimate
from trace_hydra.callbacks.progress import ProgressCallback
from trace_hydra.callbacks.status import StatusCallback
from trace_hydra.callbacks.tracker import Tracker
from trace_hydra.metrics.continual import ScoreMatrix
from trace_hydra.plan import Effort


@pytest.fixture
def run_info(tmp_path):
    return two_tasks(tmp_path)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def train(callback: Tracker, clock: Clock, *, seconds: float, tokens: int, global_step: int, loss: float = 1.0):
    clock.now += seconds
    module = SimpleNamespace(readings=SimpleNamespace(means={"lm": loss}), last_tokens=tokens)
    callback.on_train_batch_end(SimpleNamespace(global_step=global_step, world_size=1), module, None, None, 0)


def answer(callback: Tracker, clock: Clock, row: int, task: str, *, count: int, seconds: float):
    callback.on_scoring_start(row, task, count)
    clock.now += seconds
    callback.on_scoring_batch_end(count, 5 * count)
    callback.on_cell_scored(row, task, None)  # type: ignore[arg-type]


def test_time_left_is_tokens_and_examples_times_their_measured_cost(run_info):
    """50 of 400 tokens in 5 s: 350 left at 0.1 s = 35 s. Row 0: A 10 in 10 s (1 s each), B not yet measured.

    Examples left: row 0 B 20, row 1 A 10, row 2 A 10 and B 20. A costs 20 x 1 s; B 40 x the mean of all, 1 s = 40 s.
    Together 35 + 20 + 40 = 95 s. After B's 20 of row 0 in 60 s (3 s each): 35 + 20 x 1 + 20 x 3 = 115 s.
    """
    estimate = Estimate(run_info)
    estimate.add_scoring(0, "A", 10, 10.0)
    estimate.end_cell(0, "A")
    assert estimate.seconds_left() is None  # no training measured yet
    estimate.add_training(1, 50, 5.0)
    assert estimate.seconds_left() == pytest.approx(95.0)
    estimate.add_scoring(0, "B", 20, 60.0)
    assert estimate.seconds_left() == pytest.approx(115.0)


def test_plans_that_do_not_come_true_are_dropped(run_info):
    """Stage 1 took 60 of 100 planned tokens in 6 s; once it is over, only stage 2's 300 are left: 30 s."""
    estimate = Estimate(run_info)
    estimate.add_training(1, 60, 6.0)
    estimate.end_training(1)
    for row, task, _ in run_info.cells:
        estimate.end_cell(row, task)
    assert estimate.seconds_left() == pytest.approx(30.0)
    estimate.add_training(2, 900, 90.0)
    assert estimate.seconds_left() == 0.0


def test_nothing_left_without_cells_and_stages_is_zero(run_info):
    estimate = Estimate(run_info)
    estimate.end_training(2)
    for row, task, _ in run_info.cells:
        estimate.end_cell(row, task)
    assert estimate.seconds_left() == 0.0


def test_lines_through_a_run(run_info, clock):
    """Row 0: 30 answers in 30 s. Training: 50 tokens in 10 s (0.2 s a token).

    After the first micro-batch 40 s are gone; left are 350 tokens x 0.2 = 70 s and 40 answers x 1 s = 40 s: 110 s, so
    40 of 150 s = 27 %. The second micro-batch brings the optimizer step, 50 s gone, 60 + 40 = 100 s left: 33 %.
    """
    stream = io.StringIO()
    callback = ProgressCallback(interval_s=5.0, clock=clock, stream=stream)
    callback.on_run_start(run_info, [])
    answer(callback, clock, 0, "A", count=10, seconds=10)
    answer(callback, clock, 0, "B", count=20, seconds=20)
    callback.on_stage_start(run_info.stages[0])
    callback.on_train_start(SimpleNamespace(global_step=0), None)
    train(callback, clock, seconds=10, tokens=50, global_step=0, loss=1.234)
    train(callback, clock, seconds=10, tokens=50, global_step=1, loss=0.5)
    callback.on_run_end({})
    assert stream.getvalue().splitlines() == [
        "[scoring row 0/2 A] answer 10/10 · 0:10 gone · time left not known yet",
        "[scoring row 0/2 B] answer 20/20 · 0:30 gone · time left not known yet",
        "[stage 1/2 A] step 0/2 loss 1.23 · run 27 % · 0:40 gone · about 1:50 left",
        "[stage 1/2 A] step 1/2 loss 0.50 · run 33 % · 0:50 gone · about 1:40 left",
    ]


def test_a_line_every_interval_only(run_info, clock):
    """Ten batches a second apart and an interval of 4 s: lines at 4 s and 8 s."""
    stream = io.StringIO()
    callback = ProgressCallback(interval_s=4.0, clock=clock, stream=stream)
    callback.on_run_start(run_info, [])
    callback.on_stage_start(run_info.stages[0])
    callback.on_train_start(SimpleNamespace(global_step=0), None)
    for step in range(10):
        train(callback, clock, seconds=1, tokens=10, global_step=step)
    assert [line.split(" · ")[1] for line in stream.getvalue().splitlines()] == ["0:04 gone", "0:08 gone"]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["piped", "terminal"])
def test_quiet_writes_nothing(run_info, clock, stream):
    callback = ProgressCallback(interval_s=0.0, mode="quiet", clock=clock, stream=stream)
    callback.on_run_start(run_info, [])
    answer(callback, clock, 0, "A", count=10, seconds=10)
    callback.on_run_end({})
    assert stream.getvalue() == ""


def test_terminal_line_is_updated_in_place_and_makes_room(run_info, clock, monkeypatch):
    """On a terminal no line break is written; log records and finished rows find an erased line."""
    monkeypatch.setenv("COLUMNS", "30")
    stream = Terminal()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
        callback = ProgressCallback(interval_s=100.0, clock=clock, stream=stream)
        callback.on_run_start(run_info, [])
        answer(callback, clock, 0, "A", count=10, seconds=10)
        drawn = stream.getvalue()
        assert "\n" not in drawn and drawn.startswith("\r\x1b[2K[scoring row 0/2 A]")
        assert len(drawn.rpartition("\x1b[2K")[2]) < 30  # as wide as the terminal it would wrap
        logging.getLogger().warning("hello")
        assert stream.getvalue() == drawn + "\r\x1b[2Khello\n"
        answer(callback, clock, 0, "B", count=20, seconds=10)
        callback.on_row_scored(0, ScoreMatrix(["A", "B"]))
        assert stream.getvalue().endswith("\r\x1b[2K")
        callback.on_run_end({})
        assert handler.filters == []
    finally:
        logging.getLogger().removeHandler(handler)


def test_a_stage_shorter_than_an_interval_is_seen_on_a_terminal(run_info, clock, monkeypatch):
    """The clock stands still: the line is drawn at the start of a stage, and steps wait for the interval."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    callback = ProgressCallback(interval_s=5.0, clock=clock, stream=stream)
    callback.on_run_start(run_info, [])
    callback.on_stage_start(run_info.stages[1])
    drawn = stream.getvalue()
    assert "[stage 2/2 B] step 0/" in drawn
    callback.on_train_start(SimpleNamespace(global_step=0), None)
    train(callback, clock, seconds=0, tokens=50, global_step=1)
    assert stream.getvalue() == drawn


def test_error_before_the_start_is_survived():
    """`on_run_error` may come before `on_run_start` if another callback's start failed."""
    callback = ProgressCallback(interval_s=1.0)
    callback.on_run_error(RuntimeError())
    assert not callback._active


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_narrow_terminals_get_what_matters(run_info, clock, monkeypatch, width):
    """The place always, then time left, the sweep, the step, the rest; no line is as wide as the terminal.

    Left are 350 tokens at 0.2 s and 60 answers at 1 s: 130 s.
    """
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    terminal.set_sweep_note("sweep 3/12 done, about 2:00:00 left")
    stream = Terminal()
    try:
        callback = ProgressCallback(interval_s=5.0, clock=clock, stream=stream)
        callback.on_run_start(run_info, [])
        answer(callback, clock, 0, "A", count=10, seconds=10)
        callback.on_stage_start(run_info.stages[0])
        callback.on_train_start(SimpleNamespace(global_step=0), None)
        train(callback, clock, seconds=10, tokens=50, global_step=1)
    finally:
        terminal.set_sweep_note("")
    line = stream.getvalue().rpartition("\x1b[2K")[2]
    assert line.startswith("[stage 1/2 A]") and "about 2:10 left" in line and len(line) < width
    assert ("sweep 3/12 done" in line) == (width > 60) and ("loss" in line) == (width == 200)
    assert ("step 1/2" in line) == (width in (60, 200))  # beside the sweep's note there is no room for it at 80


def test_what_was_trained_before_a_restart_is_not_to_do(run_info, clock):
    """Step 1 of 2 was in the checkpoint: 50 of stage A's 100 tokens. 50 + 300 left, of which 50 take 5 s: 30 s more."""
    tracker = Tracker(clock)
    tracker.on_run_start(run_info, [])
    tracker.on_stage_start(run_info.stages[0])
    tracker.on_train_start(SimpleNamespace(global_step=1), SimpleNamespace(steps_before=0))
    assert tracker.estimate.train_tokens == {1: 50, 2: 300} and tracker.done == 1
    train(tracker, clock, seconds=5, tokens=50, global_step=2)
    for row, task, _ in run_info.cells:
        tracker.estimate.end_cell(row, task)
    assert tracker.estimate.seconds_left() == pytest.approx(30) and tracker.done == 2


def test_what_a_stage_takes_beside_its_steps_counts(run_info, clock):
    """Stage A: 10 s in steps and 6 s of other work. Stage B: 300 tokens at 0.1 s, and 6 s."""
    tracker = Tracker(clock)
    tracker.on_run_start(run_info, [])
    tracker.on_stage_start(run_info.stages[0])
    clock.now += 4
    tracker.on_train_start(SimpleNamespace(global_step=0), SimpleNamespace(steps_before=0))
    train(tracker, clock, seconds=10, tokens=100, global_step=2)
    clock.now += 2
    tracker.on_stage_end(run_info.stages[0], Effort(0, 0, 0.0, 0, 0.0, 0))
    for row, task, _ in run_info.cells:
        tracker.estimate.end_cell(row, task)
    assert tracker.estimate.seconds_left() == pytest.approx(36)


def test_a_stage_from_the_store_is_no_measurement(run_info, clock):
    tracker = Tracker(clock)
    tracker.on_run_start(run_info, [])
    tracker.on_stage_start(run_info.stages[0])
    clock.now += 1
    tracker.on_stage_end(run_info.stages[0], Effort(0, 0, 0.0, 0, 0.0, 0))
    assert tracker.estimate.seconds_left() is None and tracker.estimate.train_tokens == {1: 0, 2: 300}
    assert tracker.estimate.rates()["beside"] == [0, 0]


def test_capability_is_named_until_it_is_measured(run_info, clock):
    """Rows 0 and 2: two sets of row 0 took 3 s and 4 s, so row 2 takes 7 s."""
    tracker = Tracker(clock)
    tracker.on_run_start(replace(run_info, measured=(0, 2)), [])
    assert tracker.estimate.uncounted == ["capability"]
    for seconds in (3, 4):
        tracker.on_measuring_start(0)
        clock.now += seconds
        tracker.on_measuring_end(0)
    assert tracker.estimate.uncounted == []
    tracker.on_scoring_start(0, "A", 10)
    tracker.estimate.end_training(2)
    for row, task, _ in run_info.cells:
        tracker.estimate.end_cell(row, task)
    assert tracker.estimate.seconds_left() == pytest.approx(7)
    tracker.on_capability(2, {}, [])
    assert tracker.estimate.seconds_left() == 0


def test_status_is_told_at_boundaries_and_once_a_second(run_info, clock):
    told: list[tuple[Any, bool]] = []
    callback = StatusCallback(lambda facts, now: told.append((facts, now)), clock)
    callback.on_run_start(run_info, [])
    callback.on_stage_start(run_info.stages[0])
    callback.on_train_start(SimpleNamespace(global_step=0), SimpleNamespace(steps_before=0))
    for step in range(1, 11):
        train(callback, clock, seconds=0.25, tokens=10, global_step=step)
    assert [now for _, now in told] == [True, True, False, False]  # start, stage, 1 s, 2 s
    assert (told[-1][0]["doing"], told[-1][0]["done"], told[-1][0]["rates"]["trained"]) == ("training", 8, [80.0, 2.0])
    callback.on_run_end({"op": 1.5, "bwt": None})
    assert told[-1][0]["op"] == 1.5 and told[-1][0]["bwt"] is None and told[-1][0]["percent"] == 100.0
    json.dumps([facts for facts, _ in told], allow_nan=False)
