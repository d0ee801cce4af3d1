"""report.html: one file that shows a run, or several, without a network."""

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from trace_hydra.collect import Run, settings_of
from trace_hydra.report import run_tables, run_view
from trace_hydra.report.bounds import delta_intervals
from trace_hydra.report.cells import Column, Grid, figure, mapping, number, text
from trace_hydra.report.curves import Curves, read_curves
from trace_hydra.report.examples import Forgotten, most_forgotten
from trace_hydra.report.facts import Settings, data_warnings, read_settings
from trace_hydra.report.groups import Member
from trace_hydra.report.heat import heat_rows, row_name
from trace_hydra.report.hostile import plain
from trace_hydra.report.published_view import beside
from trace_hydra.report.reading import fitted
from trace_hydra.report.set_page import set_page
from trace_hydra.report.template import drawn, render
from trace_hydra.statistics import RunScores

log = logging.getLogger(__name__)


def report_page(
    members: Sequence[Member],
    left_out: Sequence[Mapping[str, str]],
    *,
    title: str,
    where: Path,
    partial: Sequence[Member] = (),
) -> str:
    """Write the page of a set of runs; of a single one that is all there is, whole or not, its own.

    Args:
        members: Whole runs.
        left_out: `folder` and `reason` of those that do not count, partial ones included.
        title: Of a page of several.
        where: Folder that the page will lie in; runs below or beside it are linked to.
        partial: Runs that lack cells or hold numbers that are not finite; never averaged.
    """
    if len(members) + len(partial) == 1 and len(left_out) == len(partial):
        (alone,) = (*members, *partial)
        return run_page(alone.run.results, alone.folder)
    return set_page(members, left_out, title=title, where=where)


def page_of_run(results: Mapping[str, Any], directory: Path) -> str:
    """Write the page of a run; where that fails, one that says so: results are not lost for a page."""
    try:
        return run_page(results, directory)
    except Exception as error:  # a fault of ours, or files that somebody changed under the run
        log.exception("report.html of %s", directory)
        why = f"{type(error).__name__}: {error}"
        again = shlex.join(["python", "-m", "trace_hydra.report", str(directory)])
        return render(
            "failed.html", kind="Run of TRACE", title=plain(directory.name), sections=[], why=why, again=again
        )


def run_page(results: Mapping[str, Any], directory: Path) -> str:
    """Write the page of one run.

    Args:
        results: What its results.json holds, or will hold; what is missing or of another kind is said on the page.
        directory: The run's; answers, audit, settings and curves are read from there, and what cannot be is said so.

    Raises:
        DataError: If `results` has no score matrix.
    """
    results, wrong = fitted(results)
    scores = run_view.scores_of(results, directory)
    settings = read_settings(directory)
    curves = read_curves(directory)
    memory = {} if isinstance(curves, str) else curves.memory
    forgotten, note = most_forgotten(results, directory)
    return render(
        "run.html",
        kind="Run of TRACE",
        title=plain(results.get("name", directory.name)),
        sections=_SECTIONS,
        footer=f"{directory}: every number is that of results.json, rounded here.",
        sentence=run_view.sentence(results),
        notices=[*wrong, *run_view.notices(results, scores)],
        verdicts=run_view.verdicts(results, scores),
        interval_note=_INTERVALS[isinstance(scores, str)],
        more=run_view.more_numbers(results, scores),
        tasks=results["tasks"],
        matrix_rows=heat_rows(results["tasks"], results["matrix"], "not scored"),
        carried=len(results.get("carried") or ()),
        last=run_view.last_row(results, scores),
        forgotten=list(map(_forgotten, forgotten)),
        forgotten_note=note,
        **_published(results, directory),
        warnings=data_warnings(results, directory),
        cost=run_tables.cost(results, memory),
        totals=run_tables.totals(results, memory),
        exceptions=run_view.exceptions(results),
        **_settings(settings),
        **_capability(results, scores),
        **_training(curves, results),
        **_charts(results, scores),
        disclosures=run_view.disclosures(results),
        rescore=shlex.join(["python", "-m", "trace_hydra.score", str(directory), "protocol=official"]),
        versions=", ".join(f"{name} {plain(version)}" for name, version in mapping(results.get("versions")).items()),
    )


_INTERVALS = (
    "Intervals: 95 %, over test rows and items, which all stages share (docs/statistics.md). Those of results.json, "
    "the terminal and report.md are percentiles of a paired bootstrap: narrower where rows are few or score alike.",
    "Intervals: 95 %, bootstrap over test rows and items, as they stand in results.json.",
)
_SECTIONS = [
    ("verdict", "Verdict"),
    ("matrix-heading", "Scores"),
    ("forgotten", "Forgotten"),
    ("capability", "Abilities"),
    ("published", "Published"),
    ("training", "Training"),
    ("cost-heading", "Cost"),
    ("data", "Data"),
    ("settings-heading", "Settings"),
    ("reproduce", "Make it again"),
]


def _forgotten(found: Forgotten) -> dict[str, Any]:
    answers = [
        {**vars(one), "shown_before": figure(one.score_before), "shown_after": figure(one.score_after)}
        for one in found.answers
    ]
    said = {
        "shown_before": figure(found.before),
        "shown_after": figure(found.after),
        "shown_change": figure(found.change, sign=True),
    }
    return {**vars(found), **said, "answers": answers}


def _settings(settings: Settings) -> dict[str, Any]:
    return {
        "settings": settings,
        "changed": run_tables.changed(settings),
        "all_settings": run_tables.settings(settings) if settings.leaves else None,
    }


def _capability(results: Mapping[str, Any], scores: RunScores | str) -> dict[str, Any]:
    found = mapping(results.get("capability"))
    measured = found.get("row")
    none = ""
    if not found:
        none = "Not measured: capability=none."
    elif not measured:
        none = "Not measured behind training."
    grids = [*run_tables.capability(results, scores), *filter(None, [run_tables.stages(results)])]
    failed = [f"{plain(key)}: {plain(why, 500)}" for key, why in mapping(found.get("failed")).items()]
    return {"capability_none": none, "capability_grids": grids, "failed": failed}


def _published(results: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    run = Run(directory.name, results, settings_of(directory))
    found, alone = beside({"this run": [run]})
    return {"beside": found, "alone": alone}


def _training(curves: Curves | str, results: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(curves, str):
        return {"curve": None, "curve_note": curves, "curve_table": None}
    planned = sum(mapping(stage.get("effort")).get("steps") or 0 for stage in results.get("stages") or ())
    said = f"Loss by optimizer step, from {curves.source}"
    if curves.averaged > 1:
        said += f", averaged over {curves.averaged} logs a point"
    if planned and curves.steps[-1] < planned:
        said += f"; it holds steps up to {curves.steps[-1]:,.0f} of {planned:,}"
    chart = drawn("training_curves", curves, results["tasks"], title="Loss over training", described=said)
    columns = [Column("stage", numeric=False), Column("first step"), Column("last step")]
    columns += [Column(f"{plain(term, 40)}: {which}") for term in curves.terms for which in ("first", "last")]
    rows = []
    for stage in sorted(set(curves.stages)):
        places = [place for place, own in enumerate(curves.stages) if own == stage]
        ends = [values[place] for values in curves.terms.values() for place in (places[0], places[-1])]
        rows.append(
            [
                text(row_name(results["tasks"], stage)),
                number(curves.steps[places[0]], digits=0),
                number(curves.steps[places[-1]], digits=0),
                *(number(value if value == value else None, "not logged", digits=3) for value in ends),  # NaN is not
            ]
        )
    table = Grid("curves", "Loss at the ends of each stage, nats a label token", columns, rows)
    return {"curve": chart, "curve_note": f"{said}.", "curve_table": table}


def _charts(results: Mapping[str, Any], scores: RunScores | str) -> dict[str, Markup | None]:
    described = "A panel a task; the numbers stand in the table of scores above."
    lines = drawn(
        "lines_over_stages", results, run_view.cell_intervals(scores), title="Scores over stages", described=described
    )
    bars = None
    if mapping(mapping(results.get("capability")).get("sets")):
        described = "A bar an area and set; the numbers stand in the table below."
        ends = delta_intervals(results, scores)
        bars = drawn("capability_bars", results, ends, title="Change of abilities", described=described)
    return {"lines": lines, "bars": bars}
