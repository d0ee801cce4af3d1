"""Differences between methods: pairs, rows, p, effects, ranks and the smallest difference that can be seen."""

import numpy as np
import pytest
from scipy import stats
from statistics_doubles import World, given_run, triangle, two_methods

from trace_hydra.statistics import compare, corrected, critical_difference, score_number, smallest_difference

SCORE = score_number("alpha")


def flat(values, seed=0, method="one", rows=30):
    """A run of one task whose rows all score the same."""
    return given_run({(1, "alpha"): [values] * rows}, tasks=["alpha"], seed=seed, method=method)


def two(first, second, **keep):
    groups = {
        "one": [flat(value, seed) for seed, value in enumerate(first)],
        "two": [flat(value, seed, "two") for seed, value in enumerate(second)],
    }
    return compare(groups, keep.get("number", SCORE)).differences[0]


def test_pairs_are_tested_as_pairs():
    """Rows that do not matter: the paired t test of scipy, p and interval; d_z is the mean over the deviation."""
    first, second = [40.0, 52.0, 61.0], [37.0, 50.0, 57.0]
    found, expected = two(first, second), stats.ttest_1samp(np.subtract(first, second), 0)
    interval = expected.confidence_interval()
    assert (found.difference, found.low, found.high) == pytest.approx((3.0, interval.low, interval.high))
    assert found.p == pytest.approx(expected[1])
    assert found.effect == pytest.approx(3.0)  # differences 3, 2, 4: mean 3, deviation 1
    assert (found.pairs, found.rows) == (3, 30)


def test_other_seeds_are_compared_unpaired_and_it_is_said():
    groups = {
        "one": [flat(value, seed) for seed, value in enumerate([40.0, 52.0, 61.0])],
        "two": [flat(value, 10 + seed, "two") for seed, value in enumerate([20.0, 33.0, 25.0])],
    }
    found = compare(groups, SCORE).differences[0]
    welch = stats.ttest_ind([40.0, 52.0, 61.0], [20.0, 33.0, 25.0], equal_var=False)
    interval = welch.confidence_interval()
    assert found.pairs == 0 and "unpaired" in found.note
    assert found.difference == 25
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, welch[1]))


def test_what_has_no_counterpart_is_left_out_and_said():
    groups = {"one": [flat(50.0 + seed, seed) for seed in range(3)], "two": [flat(40.0, seed) for seed in range(2)]}
    found = compare(groups, SCORE).differences[0]
    assert found.pairs == 2 and found.difference == 10.5 and "1 without a counterpart" in found.note


def test_shared_rows_cancel():
    """Methods on the same hard rows: their difference is known far better than each of them."""
    rng = np.random.default_rng(0)
    hard = rng.normal(50, 25, 80)
    groups = {
        name: [given_run({(1, "alpha"): hard + shift + rng.normal(0, 2, 80)}, tasks=["alpha"], method=name)]
        for name, shift in (("one", 3.0), ("two", 0.0))
    }
    found = compare(groups, SCORE).differences[0]
    one, other = (run.cells[1, "alpha"].values for (run,) in groups.values())
    expected = stats.ttest_1samp(one - other, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert "nothing about other trainings" in found.note and found.effect is None


def test_methods_that_never_differ_are_not_told_apart():
    found = two([0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    assert found.difference == 0 and found.p == 1 and found.low < 0 < found.high  # type: ignore[operator]  # not None here


def test_other_rows_are_refused_by_name():
    groups = {
        "one": [given_run({(1, "alpha"): [1, 2]}, tasks=["alpha"], ids={"alpha": ["a", "b"]})],
        "two": [given_run({(1, "alpha"): [1, 2]}, tasks=["alpha"], ids={"alpha": ["a", "c"]})],
    }
    found = compare(groups, SCORE).differences[0]
    assert found.difference is None and found.p is None and "alpha" in found.note and "such as b" in found.note


def test_the_same_ids_of_other_prompts_are_refused():
    groups = {
        name: [given_run({(1, "alpha"): [1, 2]}, tasks=["alpha"], prompts={"alpha": ["x", name]})]
        for name in ("y", "z")
    }
    found = compare(groups, SCORE).differences[0]
    assert found.difference is None and "test-1 has another prompt" in found.note


def test_holm_by_hand():
    """p 0.01, 0.04, 0.03: times 3, 1, 2 in the order of size, then never falling: 0.03, 0.06, 0.06."""
    found = two([1.0, 2.0], [1.0, 1.0])
    three = corrected([*(type(found)(**{**vars(found), "p": p}) for p in (0.01, 0.04, 0.03))])
    assert [one.p_adjusted for one in three] == pytest.approx([0.03, 0.06, 0.06])


def test_every_pair_is_corrected_together():
    groups = {
        name: [flat(value + step, seed, name) for seed, step in enumerate((0.0, 1.5, 2.0))]
        for name, value in (("a", 10.0), ("b", 12.0), ("c", 40.0))
    }
    groups["b"][1] = flat(15.0, 1, "b")
    found = compare(groups, SCORE)
    assert len(found.differences) == 3 and "3 differences" in found.note
    assert all(one.p_adjusted >= one.p for one in found.differences)  # type: ignore[operator]  # not None here


def test_a_group_without_runs_has_no_difference():
    found = compare({"one": [flat(1.0)], "two": []}, SCORE).differences[0]
    assert found.difference is None and found.note == "no run of two"


def test_several_runs_of_one_order_and_seed_are_no_counterparts():
    found = compare({"one": [flat(1.0), flat(3.0)], "two": [flat(0.0), flat(2.0)]}, SCORE).differences[0]
    assert found.difference == 1 and found.pairs == 0 and "unpaired" in found.note


def test_p_says_what_the_interval_says():
    world = World(triangle(60, 40, 3), 40, row=10, answer=20, run=2)
    rng = np.random.default_rng(5)
    for _ in range(20):
        groups = {"one": world.draw(rng, [(0, 0), (0, 1), (0, 2)], shift=4.0), "two": world.draw(rng, [(0, 0), (0, 1)])}
        found = compare(groups, "op").differences[0]
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)  # type: ignore[operator]  # not None here


# ranks


def ranked(scores):
    """Methods with given scores on tasks, (task, method)."""
    tasks = [f"task{i}" for i in range(len(scores))]
    return {
        name: [
            given_run(
                {(len(tasks), task): [row[column]] * 2 for task, row in zip(tasks, scores, strict=True)}, tasks=tasks
            )
        ]
        for column, name in enumerate(("a", "b", "c"))
    }


def test_ranks_and_critical_difference():
    """Demšar 2006, Table 5a: q for 3 methods is 2.343; 8 tasks: CD = 2.343 * sqrt(3 * 4 / 48) = 1.1715."""
    scores = [[50 + i, 40 + i, 10 * (i % 3)] for i in range(8)]
    found = critical_difference(ranked(scores))
    assert found.ranks == {"a": 1.0, "b": 2.0, "c": 3.0} and found.blocks == 8
    assert found.distance == pytest.approx(1.1715, abs=5e-4)
    assert found.p == pytest.approx(stats.friedmanchisquare(*np.transpose(scores)).pvalue)
    assert found.cliques == (("a", "b"), ("b", "c"))
    assert found.wilcoxon["a", "b"] == pytest.approx(3 * 2 / 2**8)


def test_equal_methods_are_one_clique():
    found = critical_difference(ranked([[1, 1, 1]] * 4))
    assert found.p == 1 and found.cliques == (("a", "b", "c"),) and set(found.ranks.values()) == {2.0}


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        ({"a": [flat(1.0)], "b": [flat(1.0)]}, "3 methods"),
        ({name: [flat(1.0)] for name in "abc"}, "2 tasks"),
        ({name: [flat(1.0, seed)] for seed, name in enumerate("abc")}, "no order and seed"),
    ],
)
def test_no_diagram_without_a_reason(groups, reason):
    found = critical_difference(groups)
    assert not found.ranks and found.distance is None and reason in found.note


# power


def test_smallest_difference_of_81_rows():
    """A score of 50 % on 81 rows: variance 2500 * 81/80 / 81 = 31.25 each, sqrt(62.5) = 7.906 for two methods that are
    right independently; times t_80 (1.9901 + 0.8461) = 22.42 points."""
    run = given_run({(1, "alpha"): [0] * 40 + [50] + [100] * 40}, tasks=["alpha"])
    found = smallest_difference({"one": [run]}, SCORE)
    variance = run.cells[1, "alpha"].values.var(ddof=1) / 81
    assert found.points == pytest.approx((1.99006 + 0.84614) * np.sqrt(2 * variance), rel=1e-4)
    assert found.rows == 81 and found.with_training is None


def test_smallest_difference_is_found_as_often_as_said():
    world = World(triangle(60, 40, 3), 60, row=20, answer=15, run=1)
    rng = np.random.default_rng(8)
    design = [(0, seed) for seed in range(8)]
    smallest = np.median(
        [smallest_difference(two_methods(world, rng, design, 0.0), "op").with_training for _ in range(40)]  # type: ignore  # not None here
    )
    found = [compare(two_methods(world, rng, design, float(smallest)), "op").differences[0].p for _ in range(300)]
    assert 0.7 < np.mean(np.array(found) < 0.05) < 0.9


def test_smallest_difference_says_why_there_is_none():
    assert "no score of beta" in smallest_difference({"one": [flat(1.0)]}, score_number("beta")).note


def test_methods_that_answer_alike_show_no_noise():
    found = smallest_difference({"one": [flat(1.0)], "two": [flat(1.0)], "none": []}, SCORE)
    assert found.points is None and "no difference" in found.note
