"""Figures say the numbers of results.json, whatever the shape of the run and whatever its names are."""

import copy
import io
import math
import re
import unicodedata

import matplotlib
import pytest
from PIL import Image
from report_doubles import TASKS, capability, write_run
from svg_reading import Drawing

from trace_hydra.colours import colour_of
from trace_hydra.errors import DataError
from trace_hydra.report import figures, style
from trace_hydra.report.curves import Curves
from trace_hydra.report.figures import PublishedPoint, RunPoint, SamplesPoint, Score
from trace_hydra.statistics import Comparison, CriticalDifference, Difference, Estimate

HOSTILE = (
    "<script>alert(1)</script>",
    "$\\frac{a",
    "a\x00b\x1b[31m",
    "\u202eltr\ud800",
    "=1+1|`x`",
    "&amp; ' \"",
    "n" * 300,
    "\x00" * 60,
    "任务",
)


def shaped(tmp_path, **changes) -> dict:
    return write_run(tmp_path / "run", rows=5, **changes)


def flat(results: dict) -> list[float]:
    return [cell for row in results["matrix"] for cell in row if cell is not None]


def estimate(value, low=None, high=None, note="") -> Estimate:
    return Estimate(value, low, high, note)


@pytest.mark.parametrize("tasks", [TASKS[:1], TASKS[:3], TASKS])
@pytest.mark.parametrize("row0", [True, False])
def test_the_heat_map_has_every_score_once(tmp_path, tasks, row0):
    results = shaped(tmp_path, tasks=tasks, row0=row0)
    drawing = Drawing(figures.heat_map(results))
    assert sorted(drawing.numbers()) == sorted(f"{score:.1f}" for score in flat(results))
    assert {*tasks, "before"} <= set(drawing.texts)
    assert "score, 0-100" in drawing.said and results["protocol"]["fingerprint"] in drawing.said


def test_the_heat_map_has_the_intervals_of_its_cells(tmp_path):
    results = shaped(tmp_path, tasks=TASKS[:2])
    drawing = Drawing(figures.heat_map(results, {(1, TASKS[0]): (12.34, 98.76), (2, TASKS[1]): (0.0, 50.04)}))
    assert [text for text in drawing.texts if " to " in text] == ["12.3 to 98.8", "0.0 to 50.0"]


def test_a_difference_of_matrices_is_signed_and_empty_where_either_lacks_a_cell(tmp_path):
    one = {"name": "a", "tasks": ["A", "B"], "matrix": [[1.0, None], [60.0, 5.0], [40.25, 80.0]]}
    other = {"name": "b", "tasks": ["A", "B"], "matrix": [[3.5, 2.0], [60.0, None], [20.0, 80.04]]}
    drawing = Drawing(figures.matrix_difference(one, other))
    cells = ["−2.5", "0.0", "+20.2", "0.0"]  # −0.04 rounds to nothing
    assert [text for text in drawing.numbers() if text in cells and text != "0.0"] == ["−2.5", "+20.2"]
    assert drawing.texts.count("0.0") >= 2 and "difference, points" in drawing.said
    with pytest.raises(DataError, match="A > B and B > A"):
        figures.matrix_difference(one, {**other, "tasks": ["B", "A"]})


@pytest.mark.parametrize("tasks", [TASKS[:1], TASKS])
def test_lines_say_the_score_of_the_own_stage_and_the_last(tmp_path, tasks):
    results = shaped(tmp_path, tasks=tasks)
    drawing = Drawing(figures.lines_over_stages(results, {(1, tasks[0]): (10.0, 20.0)}))
    for place, task in enumerate(tasks, start=1):
        assert f"{place} {task}" in drawing.texts
        for row in (place, len(tasks)):
            assert f"{results['matrix'][row][place - 1]:.1f}" in drawing.numbers()
    assert "95 % interval" in drawing.said


def test_lines_of_a_task_that_was_never_scored_say_so(tmp_path):
    results = shaped(tmp_path, tasks=TASKS[:2])
    for row in results["matrix"]:
        row[1] = None
    assert Drawing(figures.lines_over_stages(results)).texts.count("not scored") == 1


def test_abilities_are_those_of_results_json():
    drawing = Drawing(figures.capability_bars({"capability": capability()}))
    for text in ("−3.5  (45.0 → 41.5)", "−10.0  (60.0 → 50.0)", "−12.0  (win 30 %, lose 42 %)", "−3.5", "−12.0"):
        assert text in drawing.texts
    assert {"ΔR^G general", "ΔR^I instructions", "ΔR^S safety", "quiz"} <= set(drawing.texts)
    assert "points" in drawing.said


def test_abilities_without_a_score_or_not_measured_are_said_so():
    found = capability()
    found["sets"]["quiz"] |= {"before": None, "after": None, "delta": None, "interval": None}
    assert "nothing was scored" in Drawing(figures.capability_bars({"capability": found})).said
    assert "no capability set was measured" in Drawing(figures.capability_bars({"capability": {}})).said


def curves(**changes) -> Curves:
    own = {"steps": [1, 2, 3, 4], "stages": [1, 1, 2, 2], "terms": {"loss": [2, 1, 3, 1], "extra": [1, math.nan, 1, 1]}}
    return Curves("csv/metrics.csv", **{**own, **changes})


def test_curves_stand_over_steps_or_over_tokens_and_name_their_stages():
    by_step = Drawing(figures.training_curves(curves(), ["A", "B"]))
    assert {"optimizer step", "loss", "extra", "1 A", "2 B"} <= set(by_step.texts)
    by_token = Drawing(figures.training_curves(curves(tokens=[1e6, 2e6, 3e6, 4e6]), ["A", "B"]))
    assert "trained tokens so far, millions" in by_token.texts and "optimizer step" not in by_token.texts


def test_published_points_are_hollow_and_named_by_their_group():
    ours = [RunPoint("mine", "plain", estimate(50.0, 45.0, 55.0), estimate(-5.0, -8.0, -2.0))]
    theirs = [PublishedPoint("SeqFT", "TRACE, order 1", 48.7, -8.3), PublishedPoint("SEEKR", "SEEKR, o1", 55.0, -2.6)]
    drawing = Drawing(figures.op_against_bwt(ours, theirs))
    assert {"mine", "SeqFT", "SEEKR", "published: TRACE, order 1", "published: SEEKR, o1"} <= set(drawing.texts)
    assert "ours, line: 95 % interval" in drawing.texts
    grey = [line for line in drawing.styles() if f"stroke: {style.QUIET}" in line and "stroke-linejoin" in line]
    assert grey and not any(re.search(r"fill: #", line) for line in grey)


def test_a_group_without_bwt_is_named_with_the_reason():
    points = [RunPoint("alone", "plain", estimate(50.0), estimate(None, note="needs at least 2 tasks"))]
    assert "not shown: alone: needs at least 2 tasks" in Drawing(figures.op_against_bwt(points)).said


def test_a_method_has_one_colour_whoever_else_is_there():
    for others in ((), ("zeta", "alpha")):
        values = {name: [Score(1.0, "trace", 0)] for name in (*others, "plain")}
        assert f"fill: {colour_of('plain')}" in "\n".join(Drawing(figures.spread(values, "op")).styles())


def difference(one, other, value, **changes) -> Difference:
    own = {"low": None, "high": None, "p": None, "p_adjusted": None, "effect": None, "rows": 10, "pairs": 2, "note": ""}
    return Difference(one=one, other=other, number="op", difference=value, **{**own, **changes})


def test_differences_have_their_interval_p_and_effect_or_a_reason():
    found = (
        difference("a", "b", 5.04, low=1.25, high=8.83, p=0.004, p_adjusted=0.0124, effect=1.3),
        difference("a", "c", -2.0, low=-6.0, high=2.0, p=0.0001, p_adjusted=0.0003),
        difference("b", "c", None, note="other test rows"),
    )
    drawing = Drawing(figures.differences(Comparison("op", found, "")))
    assert "+5.0 [+1.2, +8.8]  p = 0.012  d = +1.30" in drawing.texts
    assert "−2.0 [−6.0, +2.0]  p < 0.001" in drawing.texts
    assert {"a − b", "a − c", "b − c", "other test rows"} <= set(drawing.texts)


def test_ranks_stand_in_their_order_with_the_critical_difference():
    ranks = {"good": 1.25, "fair": 2.0, "poor": 2.75}
    found = CriticalDifference(ranks, 8, 0.0102, 1.17, (("good", "fair"),), "")
    drawing = Drawing(figures.critical_difference(found))
    assert {"good  1.25", "fair  2.00", "2.75  poor", "critical difference 1.17"} <= set(drawing.texts)
    assert "Mean rank over 8 tasks, 1 is best, Friedman p = 0.010" in drawing.texts
    empty = CriticalDifference({}, 0, None, None, (), "a critical difference needs 3 methods, not 2")
    assert "needs 3 methods" in Drawing(figures.critical_difference(empty)).said


def test_spread_shows_runs_by_order_and_seed_with_the_mean():
    values = {"a": [Score(1.0, "trace", 0), Score(2.0, "reversed", 1)], "b": [Score(3.0, "trace", 0)], "c": []}
    drawing = Drawing(figures.spread(values, "bwt", means={"a": estimate(-1.5, -2.0, -1.0), "b": estimate(None)}))
    for text in ("2 runs", "1 run", "0 runs", "no value", "−1.5", "order trace", "order reversed"):
        assert text in drawing.said
    assert "seeds 0, 1" in drawing.said and "BWT, points (negative: forgetting)" in drawing.texts
    assert "One seed: 4" in Drawing(figures.spread({"a": [Score(1.0, "trace", 4)]}, "op")).said


def test_samples_and_epochs_show_ours_and_published_points():
    points = [SamplesPoint(500, 1, 30.0, 27.0, 33.0, "mine"), SamplesPoint(500, 3, 35.04, series="mine")]
    theirs = [SamplesPoint(500, 1, 23.7, series="TRACE", published=True)]
    drawing = Drawing(figures.samples_epochs([*points, *theirs]))
    assert {"30.0", "35.0", "23.7", "500 rows a task, mine", "500 rows a task, TRACE"} <= set(drawing.texts)
    assert {"epochs of every task", "OP, 0-100"} <= set(drawing.texts)


def hostile_figures():
    tasks = list(HOSTILE)
    rows = [[50.0] * len(tasks) for _ in range(len(tasks) + 1)]
    results = {
        "name": HOSTILE[0], "model": HOSTILE[1], "method": HOSTILE[2], "task_order": HOSTILE[3], "tasks": tasks,
        "protocol": {"name": HOSTILE[4], "fingerprint": HOSTILE[5]}, "matrix": rows,
    }  # fmt: skip
    sets = {name: {**capability()["sets"]["quiz"], "area": "general"} for name in HOSTILE}
    found = {**capability(), "sets": sets}
    some = estimate(50.0, 40.0, 60.0)
    pairs = tuple(difference(one, HOSTILE[0], 1.0, low=0.5, high=1.5, note=one) for one in HOSTILE)
    lacking = tuple(difference(one, HOSTILE[0], None, note=one) for one in HOSTILE)
    terms = {name: [1.0, 2.0, 1.0, 1.0] for name in HOSTILE}
    yield figures.heat_map(results)
    yield figures.matrix_difference(results, {**results, "name": HOSTILE[3]})
    yield figures.lines_over_stages(results)
    yield figures.capability_bars({"capability": found})
    yield figures.training_curves(curves(terms=terms), tasks)
    yield figures.op_against_bwt(
        [
            RunPoint(name, name, some, estimate(None, note=name) if place % 2 else some)
            for place, name in enumerate(HOSTILE)
        ],
        [PublishedPoint(name, name, 40.0, -3.0, name) for name in HOSTILE],
    )
    yield figures.differences(Comparison(HOSTILE[1], pairs + lacking, ""))
    ranks = {name: place + 1.0 for place, name in enumerate(HOSTILE)}
    yield figures.critical_difference(CriticalDifference(ranks, 2, 0.5, 1.0, (HOSTILE[:2],), ""))
    yield figures.critical_difference(CriticalDifference({}, 0, None, None, (), "".join(HOSTILE)))
    yield figures.spread({name: [Score(1.0, name, 0)] for name in HOSTILE}, HOSTILE[1])
    yield figures.samples_epochs([SamplesPoint(5, 1, 1.0, series=name, published=True) for name in HOSTILE])


@pytest.mark.filterwarnings("error", "ignore:Glyph .* missing from font")
def test_hostile_and_long_names_are_text_in_every_figure():
    """Nothing of a name is markup or mathematics; what cannot be seen is spelled out; the figure stays a figure."""
    for place, figure in enumerate(hostile_figures()):
        drawing = Drawing(figure)
        assert "<script" not in drawing.source and not any(len(text) > 250 for text in drawing.texts)
        assert not [one for one in drawing.said if unicodedata.category(one) in ("Cc", "Cf", "Cs") and one != "\n"]
        assert figure.get_size_inches().max() < 40
        kind, begins = (("png", b"\x89PNG"), ("pdf", b"%PDF"))[place % 2]
        assert style.to_bytes(figure, kind).startswith(begins)


def test_the_same_figure_gives_the_same_bytes_whatever_the_settings(tmp_path):
    results = shaped(tmp_path, tasks=TASKS[:2])
    for kind in style.FORMATS:
        first = style.to_bytes(figures.lines_over_stages(results), kind)
        with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": True, "text.usetex": True}):
            again = style.to_bytes(figures.lines_over_stages(copy.deepcopy(results)), kind)
        assert first == again, kind


def test_drawing_leaves_matplotlibs_settings_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    style.to_bytes(figures.heat_map(shaped(tmp_path, tasks=TASKS[:2])), "svg")
    assert dict(matplotlib.rcParams) == before


def test_pictures_have_their_size(tmp_path):
    figure = figures.lines_over_stages(shaped(tmp_path, tasks=TASKS[:1]))
    width, height = figure.get_size_inches()
    image = Image.open(io.BytesIO(style.to_bytes(figure, "png")))
    assert image.size == (round(width * style.DPI), round(height * style.DPI))


def test_svg_text_is_text_in_a_family_that_every_reader_has(tmp_path):
    source = Drawing(figures.heat_map(shaped(tmp_path, tasks=TASKS[:1]))).source
    assert "sans-serif" in source and not re.search(r'id="DejaVuSans', source)


@pytest.mark.parametrize(("value", "text"), [(1.25, "+1.2"), (-0.04, "0.0"), (-3.0, "−3.0"), (0.0, "0.0")])
def test_signed_numbers(value, text):
    """Python rounds 1.25 to even."""
    assert style.signed(value) == text
