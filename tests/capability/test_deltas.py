"""Deltas by hand; intervals against a brute-force bootstrap written here."""

import numpy as np
import pytest

from trace_hydra.capability.base import paired
from trace_hydra.capability.deltas import compare_sets
from trace_hydra.errors import CapabilityError, DataError


def pair(name, category, index, before, after, area="general", **more):
    delta = more.pop("delta", None if before is None else after - before)
    own = {"area": area, "set": name, "category": category, "id": str(index), "measure": "m"}
    return {**own, "before": before, "after": after, "delta": delta, **more}


def compare(pairs, macro=(), samples=2000):
    return compare_sets(pairs, macro={name: True for name in macro}, samples=samples, seed=3)


def test_a_set_and_its_area_by_hand():
    """Set a: deltas 0, -100, -100, 0: -50. Set b: +100, 0: +50. Area: mean of the two sets, 0, not of the six items."""
    found = compare(
        [
            *(
                pair("a", "x", i, before, after)
                for i, (before, after) in enumerate([(0, 0), (100, 0), (100, 0), (0, 0)])
            ),
            *(pair("b", "x", i, before, after) for i, (before, after) in enumerate([(0, 100), (100, 100)])),
        ]
    )
    assert [found["sets"]["a"][key] for key in ("before", "after", "delta", "n")] == [50, 0, -50, 4]
    assert found["sets"]["b"]["delta"] == 50
    assert found["general"]["delta"] == 0 and found["general"]["n"] == 6 and found["general"]["sets"] == ["a", "b"]
    assert found["general"]["differs"] is False and "safety" not in found


def test_macro_averages_weigh_categories_alike():
    """Category x: three items, -100 each; y: one item, +20. Macro -40, micro (-300 + 20) / 4 = -70."""
    pairs = [*(pair("a", "x", i, 100, 0) for i in range(3)), pair("a", "y", 0, 10, 30)]
    macro, micro = compare(pairs, macro=["a"])["sets"]["a"], compare(pairs)["sets"]["a"]
    assert macro["delta"] == -40 and macro["before"] == 55 and macro["after"] == 15
    assert micro["delta"] == -70
    assert macro["categories"] == {
        "x": {"n": 3, "before": 100, "after": 0, "delta": -100},
        "y": {"n": 1, "before": 10, "after": 30, "delta": 20},
    }
    # Of 4^4 draws: only x (81/256), only y (1/256), and mixtures; each item of x weighs 1/3, y 1.
    assert macro["interval"][0] == pytest.approx(-100) == micro["interval"][0]
    assert macro["interval"][1] == pytest.approx((3 * 20 + 1 / 3 * -100) / (3 + 1 / 3))  # three times y: 12/256 > 2.5 %


def test_one_item_a_category_has_the_interval_of_a_plain_set():
    """As with a limit of one item a subject: drawn within subjects the interval would have no width at all."""
    deltas = [100.0, -100.0, 0.0, 0.0, 100.0, 0.0, 0.0, -100.0, 100.0, 0.0]
    many = [pair("a", f"subject {i}", 0, 0, d) for i, d in enumerate(deltas)]
    one = [pair("a", "x", i, 0, d) for i, d in enumerate(deltas)]
    assert compare(many, macro=["a"])["sets"]["a"]["interval"] == compare(one)["sets"]["a"]["interval"]
    assert compare(many, macro=["a"])["sets"]["a"]["differs"] is False


def test_intervals_are_paired_and_equal_a_bootstrap_of_the_differences():
    """The quantiles of the mean of resampled differences; unpaired draws would give an interval twice as wide."""
    rng = np.random.default_rng(0)
    before = rng.integers(0, 2, 80) * 100.0
    after = np.where(rng.random(80) < 0.1, 100 - before, before)
    found = compare([pair("a", "x", i, b, a) for i, (b, a) in enumerate(zip(before, after, strict=True))], samples=4000)
    differences = after - before
    draws = [differences[rng.integers(80, size=80)].mean() for _ in range(4000)]
    expected = np.quantile(draws, [0.025, 0.975])
    assert np.allclose(found["sets"]["a"]["interval"], expected, atol=1.3)  # one item is 1.25 points
    assert found["general"]["interval"] == found["sets"]["a"]["interval"]


def test_area_intervals_take_sets_as_independent():
    """Two sets of equal spread: the standard deviation of their mean is 1/sqrt(2) of one's (measured, +-10 %)."""
    deltas = [(0.0, 100.0 * (index % 2)) for index in range(40)]
    one = compare([pair("a", "x", i, *scores) for i, scores in enumerate(deltas)])
    two = compare([pair(name, "x", i, *scores) for name in "ab" for i, scores in enumerate(deltas)])
    width = [np.ptp(found["general"]["interval"]) for found in (one, two)]
    assert width[1] == pytest.approx(width[0] / np.sqrt(2), rel=0.1)


def test_judged_sets_are_counted_apart_and_lead_their_area():
    """Judged: +100, 0, -100, -100, one without verdict: -25 over 4. The scored set beside it stays out of the area."""
    judged = [pair("j", "x", i, None, None, "instruction", delta=d) for i, d in enumerate([100, 0, -100, -100, None])]
    found = compare([*judged, pair("checks", "x", 0, 0, 100, "instruction")])
    assert found["instruction"]["delta"] == -25 and found["instruction"]["measure"] == "judge"
    assert found["instruction"]["sets"] == ["j"] and found["sets"]["j"]["unscored"] == 1
    assert found["sets"]["j"]["before"] is None and found["sets"]["checks"]["delta"] == 100


def test_nothing_scored_gives_no_delta():
    found = compare([pair("j", "x", 0, None, None, "safety", delta=None)])
    assert "safety" not in found and found["sets"]["j"]["delta"] is None and found["sets"]["j"]["interval"] is None


def test_intervals_depend_on_the_seed_and_the_set_alone():
    own = [pair("a", "x", i, 0, 100 * (i % 3 == 0)) for i in range(30)]
    other = [pair("b", "x", i, 0, 100 * (i % 2)) for i in range(30)]
    assert compare(own)["sets"]["a"] == compare([*other, *own])["sets"]["a"]


def test_pairing_refuses_other_items():
    record = {"area": "general", "set": "a", "category": "x", "id": "1", "measure": "m", "score": 0.0}
    with pytest.raises(CapabilityError, match=r"different items, 2 of them.*'a', 'x', '1'"):
        paired([record], [{**record, "id": "2"}])


def test_bad_numbers_are_refused():
    with pytest.raises(DataError, match="samples >= 1"):
        compare([], samples=0)
