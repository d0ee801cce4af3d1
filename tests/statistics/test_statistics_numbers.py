"""Estimates by hand, from formulas and from the bootstrap they stand for."""

import math

import numpy as np
import pytest
from statistics_doubles import TASKS, World, given_run, triangle

from trace_hydra.metrics.bootstrap import bootstrap
from trace_hydra.metrics.continual import FORMULAS, summary
from trace_hydra.statistics import across_runs, of_run, score_number
from trace_hydra.statistics.contrasts import contrast

RNG = np.random.default_rng


def a_run(rows=200, seed=0, **noise):
    world = World(triangle(60, 35, 3), rows, **{"row": 10, "row_stage": 5, "answer": 20, **noise})
    return world.draw(RNG(seed), [(0, 0)])[0]


@pytest.mark.parametrize("number", FORMULAS)
def test_a_number_is_the_sum_of_what_its_rows_add(number):
    run = a_run()
    found = contrast(run, number)
    assert not isinstance(found, str)
    assert found.value == summary(run.matrix)[number]
    assert sum(part.values.mean() for part in found.parts.values()) == pytest.approx(found.value)


@pytest.mark.parametrize("number", ["op", "bwt", "bwt_over_t", "fwt"])
def test_one_run_agrees_with_the_paired_bootstrap(number):
    """20,000 replicates of the percentile interval; linear numbers, 200 rows: both tend to the same ends."""
    run = a_run()
    cells = {cell: scores.values.tolist() for cell, scores in run.cells.items()}
    low, high = bootstrap(run.tasks, cells, samples=20_000, seed=1)[number]
    found = of_run(run, number)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03 * (high - low))


def test_pairing_is_used():
    """Two cells of a task with the same hard rows: BWT's interval is narrow where OP's is wide."""
    run = a_run(row=30, row_stage=0, answer=2)
    op, bwt = of_run(run, "op"), of_run(run, "bwt")
    assert bwt.high - bwt.low < 0.3 * (op.high - op.low)  # type: ignore[operator]  # not None here


def test_one_run_by_hand():
    """Rows 10, 20, 30, 40: mean 25, s^2 = 500/3, t_3 = 3.18245; 25 +- 3.18245 * sqrt(500/12) = 25 +- 20.5426."""
    run = given_run({(1, "alpha"): [10, 20, 30, 40]}, tasks=["alpha"])
    found = of_run(run, score_number("alpha"))
    assert (found.value, found.low, found.high) == (
        25,
        pytest.approx(4.45740, abs=1e-4),
        pytest.approx(45.54260, abs=1e-4),
    )
    assert "one run" in found.note and "not covered" in found.note


def test_a_share_of_right_rows_has_wilsons_interval():
    """7 of 20: (0.35 + z^2/40 -+ z sqrt(0.35 * 0.65/20 + z^2/1600)) / (1 + z^2/20), z = 1.959964: 0.18119, 0.56715."""
    run = given_run({(1, "alpha"): [100] * 7 + [0] * 13}, tasks=["alpha"])
    found = of_run(run, score_number("alpha"))
    assert (found.low, found.high) == (pytest.approx(18.119, abs=1e-3), pytest.approx(56.715, abs=1e-3))


@pytest.mark.parametrize("score", [0, 100])
def test_rows_that_are_all_equal_do_not_prove_the_score(score):
    """0 of 81 right: z^2 / (n + z^2) = 4.5278 % are not excluded."""
    run = given_run({(1, "alpha"): [score] * 81}, tasks=["alpha"])
    found = of_run(run, score_number("alpha"))
    assert found.value == score
    assert max(abs(found.low - score), abs(found.high - score)) == pytest.approx(4.5278, abs=1e-4)  # type: ignore  # not None here
    assert min(abs(found.low - score), abs(found.high - score)) == 0  # type: ignore[operator]  # not None here


def test_several_runs_of_equal_rows_have_an_interval_too():
    runs = [given_run({(1, "alpha"): [0] * 81}, tasks=["alpha"], seed=seed) for seed in range(3)]
    found = across_runs(runs, score_number("alpha"))
    assert found.low == 0 and 2 < found.high < 6  # type: ignore[operator]  # not None here


def test_runs_whose_rows_do_not_matter_have_students_interval():
    """Rows all alike in a run, scores 40, 50, 60: 50 +- 4.30265 * 10 / sqrt(3) = 50 +- 24.8414."""
    runs = [given_run({(1, "alpha"): [40 + 10 * seed] * 50}, tasks=["alpha"], seed=seed) for seed in range(3)]
    found = across_runs(runs, score_number("alpha"))
    assert (found.value, found.low, found.high) == (
        50,
        pytest.approx(25.1586, abs=1e-3),
        pytest.approx(74.8414, abs=1e-3),
    )
    assert "3 seeds" in found.note and "one order" in found.note


def test_differences_beyond_what_floats_can_square_are_no_error():
    runs = [given_run({(1, "alpha"): [seed * 1e-170] * 5}, tasks=["alpha"], seed=seed) for seed in range(3)]
    assert across_runs(runs, "op").low is not None


def test_rows_shared_by_runs_are_no_new_evidence():
    """Twenty runs that answer 50 rows alike know no more about other rows than one does."""
    hard = RNG(0).normal(50, 20, 50)
    runs = [given_run({(1, "alpha"): hard}, tasks=["alpha"], seed=seed) for seed in range(20)]
    one, all_of_them = of_run(runs[0], score_number("alpha")), across_runs(runs, score_number("alpha"))
    assert (all_of_them.low, all_of_them.high) == (pytest.approx(one.low), pytest.approx(one.high))


def test_orders_count_as_orders():
    """Three orders that differ, three seeds that do not: as wide as three runs, not as nine."""
    world = World(triangle(60, 60, 3), 50, order=10, answer=0)
    runs = world.draw(RNG(3), [(order, seed) for order in range(3) for seed in range(3)])
    nine = across_runs(runs, "op")
    three = across_runs([run for run in runs if run.seed == 0], "op")
    assert (nine.low, nine.high) == (pytest.approx(three.low), pytest.approx(three.high))
    assert "3 orders" in nine.note and "3 seeds" in nine.note


def test_the_best_of_equal_rows_is_corrected():
    """Scores that never changed: the measured forgetting is luck alone, and its interval reaches 0."""
    world = World(triangle(50, 50, 4, before=50), 60, answer=30)
    found = [of_run(world.draw(RNG(seed), [(0, 0)])[0], "forgetting") for seed in range(50)]
    assert np.mean([one.value for one in found]) > 2  # type: ignore[arg-type]  # not None here
    assert sum(one.low <= 0 for one in found) > 45  # type: ignore[operator]  # not None here
    assert all(one.low <= one.value <= one.high for one in found)  # type: ignore[operator]  # not None here


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        ("bwt", "needs at least 2 tasks"),
        ("opp", "none of op"),
        (score_number("beta"), "no score of beta"),
        ("delta_general", "no delta of general"),
    ],
)
def test_what_is_missing_is_said(number, reason):
    found = of_run(given_run({(1, "alpha"): [1, 2]}, tasks=["alpha"]), number)
    assert found.value is None and found.low is None and found.high is None and reason in found.note


def test_a_missing_cell_is_named():
    found = of_run(given_run({(1, "alpha"): [1, 2], (2, "beta"): [1, 2]}), "op")
    assert found.value is None and "R[2,alpha]" in found.note


def test_a_single_row_has_no_interval():
    found = of_run(given_run({(1, "alpha"): [30]}, tasks=["alpha"]), "op")
    assert found.value == 30 and found.low is None and "single test row" in found.note


def test_runs_with_other_rows_have_no_common_interval():
    one = given_run({(1, "alpha"): [1, 2]}, tasks=["alpha"], ids={"alpha": ["a", "b"]})
    other = given_run({(1, "alpha"): [1, 2]}, tasks=["alpha"], ids={"alpha": ["a", "c"]}, seed=1)
    found = across_runs([one, other], "op")
    assert found.value == 1.5 and found.low is None and "other test rows of alpha" in found.note


def test_runs_with_other_tasks_have_no_mean():
    one = given_run({(1, "alpha"): [1, 2]}, tasks=["alpha"])
    found = across_runs([one, given_run({(1, "beta"): [1, 2]}, tasks=["beta"], seed=1)], "op")
    assert found.value is None and "other tasks" in found.note


def test_no_run():
    assert across_runs([], "op").value is None


def test_numbers_stay_within_what_is_possible():
    runs = [given_run({(1, "alpha"): [value] * 20}, tasks=["alpha"], seed=value) for value in (1, 30, 90)]
    found = across_runs(runs, "op")
    assert found.low == 0 and found.high == 100


def test_every_task_counts_in_the_test_worlds():
    assert len(TASKS) == 4 and math.isclose(triangle(60, 40, 3)[-1, 0], 40)


def test_clipped_change_is_never_above_zero():
    found = of_run(a_run(rows=10, answer=40), "bwt_clipped")
    assert found.value < 0 and found.low < found.value <= found.high <= 0  # type: ignore[operator]  # not None here
