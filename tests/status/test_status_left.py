"""Time left of a sweep, by hand."""

import pytest

from trace_hydra.status.left import Left, Work, beside, time_left

A, B, C = ("tiny", "full", "one"), ("tiny", "full", "two"), ("big", "full", "one")
PIECES = (("trained", 1000), ("trained", 500), ("answered", 40), ("answered", 10))


def test_waiting_jobs_cost_what_jobs_like_them_measured():
    """0.1 s a token and 0.5 s an answer; 60 s of its own in the finished job. 1000 tokens + 40 answers: 100 + 20 + 60.

    One at a time: 30 s of the running job, then 180 s.
    """
    ended = [Work(A, rates={"trained": [100, 10.0], "answered": [10, 5.0]}, beside_s=60.0)]
    running = [Work(A, left_s=30.0)]
    assert time_left(ended, running, [Work(A, pieces=(0, 2))], PIECES, 1) == Left(210.0)


def test_what_jobs_share_is_counted_once_and_what_runs_claims_it():
    """Piece 0 belongs to the running job, piece 1 to the first that waits: 500 tokens, then 40 answers."""
    rates = {"trained": [100, 10.0], "answered": [10, 5.0]}
    running = [Work(A, left_s=30.0, pieces=(0,), rates=rates)]
    waiting = [Work(A, pieces=(0, 1)), Work(A, pieces=(0, 1, 2))]
    assert time_left([], running, waiting, PIECES, 1).seconds == pytest.approx(30 + 50 + 20)


def test_jobs_side_by_side():
    """Two places, taken by jobs with 10 s and 50 s left; then 100 s (ends at 110) and 20 s (50 to 70)."""
    rates = {"trained": [10, 1.0], "answered": [10, 5.0]}
    running = [Work(A, left_s=10.0, rates=rates), Work(A, left_s=50.0)]
    waiting = [Work(A, pieces=(0,)), Work(A, pieces=(2,))]
    assert time_left([], running, waiting, PIECES, 2).seconds == pytest.approx(110)
    assert time_left([], running, waiting, PIECES, None).seconds == pytest.approx(110)


def test_another_method_of_the_same_model_is_a_guide_another_model_is_none():
    rates = {"trained": [100, 10.0]}
    ended = [Work(A, rates=rates)]
    assert time_left(ended, [], [Work(B, pieces=(1,))], PIECES, 1).seconds == pytest.approx(50)
    unknown = time_left(ended, [], [Work(C, pieces=(1,))], PIECES, 1)
    assert unknown == Left(None, "no job of big full has trained anything yet")


def test_what_is_in_the_store_costs_nothing():
    """A job whose pieces are all there takes what a job takes beside them."""
    ended = [Work(A, rates={"trained": [100, 10.0]}, beside_s=7.0)]
    assert time_left(ended, [], [Work(A)], PIECES, 1) == Left(7.0)


def test_a_running_job_without_an_account_is_taken_by_its_plan():
    ended = [Work(A, rates={"trained": [100, 10.0]})]
    assert time_left(ended, [Work(A, pieces=(1,))], [], PIECES, 1).seconds == pytest.approx(50)
    assert time_left([], [Work(A, pieces=(1,))], [], PIECES, 1).seconds is None


@pytest.mark.parametrize("found", [None, "x", [1], [0, 5], [1, -1], [1, "a"], {}])
def test_damaged_rates_are_no_measurement(found):
    assert time_left([Work(A, rates={"trained": found})], [], [Work(A, pieces=(0,))], PIECES, 1).seconds is None


def test_nothing_to_do_is_zero():
    assert time_left([], [], [], (), None) == Left(0.0)


def test_beside():
    """100 s, of which 60 + 30 were measured."""
    assert beside(100.0, {"trained": [5, 60.0], "answered": [1, 30.0], "beside": [1, 99.0]}) == pytest.approx(10)


def test_capability_that_nobody_measured_is_said_to_be_missing():
    """Two rows at 5 s each are 10 s; without a measurement they are named instead."""
    rates = {"trained": [100, 10.0]}
    waiting = [Work(A, pieces=(1,), measured=2)]
    assert time_left([Work(A, rates=rates)], [], waiting, PIECES, 1) == Left(50.0, uncounted=("capability",))
    known = [Work(A, rates={**rates, "measured": [3, 15.0]})]
    assert time_left(known, [], waiting, PIECES, 1) == Left(60.0)
