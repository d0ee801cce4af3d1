"""The workspace and the report as W&B stores them: JSON without times, random ids or names of a server."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from trace_hydra import colours
from trace_hydra.dashboard.facts import Facts
from trace_hydra.errors import ConfigError
from trace_hydra.keys import digest

TITLE = "TRACE: forgetting by method and order"
GROUPING = ("method_name", "order_name", "comparable")
"""Keys of the runs' W&B configuration; what differs in one of them is never averaged."""
_SCALE = (0.0, 100.0)
_STAGE, _TOKENS = "progress/stage", "progress/tokens"
_BAND = "mean ± 1 standard error over the runs of a group"
_HELP = f"""Runs are grouped by method, task order and everything else that must be equal for them to be averaged
(`comparable`: model, tuning, data, protocol with its fingerprint, settings); what is left are seeds. Lines and bars are
the {_BAND}; one run alone has no band. That is no 95 % interval: a run's own, over test rows, is `op_ci_low` ...
`op_ci_high`; the one over runs stands in the report, if it was made with `--runs`. Scores are 0-100; stage 0 is before
training. A method has the same colour everywhere."""
_COLUMNS = (
    *(f"config:{name}.value" for name in ("method_name", "order_name", "seed.train")),
    *(f"summary:{name}" for name in ("op", "bwt", "forgetting", "delta_general", "delta_if", "delta_safety")),
)


def build(facts: Facts) -> dict[str, Any]:
    """Make both pages.

    Returns:
        `workspace` and `report`, each with `name` (by which it is found again), `title`, `description` and `spec`.

    Raises:
        ConfigError: If wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ConfigError(
            f"trace_hydra.dashboard needs wandb-workspaces ({error}): pip install 'trace-hydra[dashboard]'."
        ) from error
    sections = {name: list(panels) for name, panels in _sections(reports, facts)}
    return {
        "format": 1,
        "workspace": _workspace(workspaces, facts, sections),
        "report": _report(reports, facts, sections),
    }


def _sections(wr: Any, facts: Facts) -> Iterable[tuple[str, Iterable[Any]]]:
    """Lay out what both pages show: name -> panels."""

    def lines(title: str, y: str | Sequence[str], x: str = _STAGE, **more: Any) -> Any:
        axis = {"title_x": "stage (0: before training)" if x == _STAGE else "prompt and answer tokens trained on"}
        band = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stderr", "smoothing_type": "none"}
        y = [y] if isinstance(y, str) else list(y)
        return wr.LinePlot(title=title, x=x, y=y, max_runs_to_show=100, **axis, **band, **more)

    def bars(title: str, metric: str, **more: Any) -> Any:
        band = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stderr"}
        return wr.BarPlot(title=title, metrics=[metric], max_bars_to_show=100, **band, **more)

    def matching(title: str, regex: str, x: str = _STAGE, **more: Any) -> Any:
        return lines(title, [], x, metric_regex=regex, **more)

    points = {"title_y": "points"}
    score = {"title_y": "score", "range_y": _SCALE}
    yield (
        "Result",
        [
            wr.MarkdownPanel(markdown=_HELP),
            bars("OP: mean score at the end", "op", range_x=_SCALE),
            bars("BWT", "bwt"),
            bars("Forgetting", "forgetting"),
            wr.ScatterPlot(title="OP against BWT, a point a run", x=wr.SummaryMetric("bwt"), y=wr.SummaryMetric("op")),
            lines("OP of the tasks so far", "progress/op", **score),
            lines("BWT so far", "progress/bwt", **points),
        ],
    )
    yield (
        "Score matrix",
        [
            wr.MediaBrowser(title="Score matrix", media_keys=["matrix/heat_map"], num_columns=1, gallery_axis="step"),
            wr.WeavePanelSummaryTable(table_name="matrix/table"),
        ],
    )
    yield "Tasks over stages", [lines(task, f"score/{task}", **score) for task in facts.tasks]
    yield (
        "What is left of the start model",
        [
            lines("General ability, change", "capability/delta_general", **points),
            lines("Instruction following, change", "capability/delta_if", **points),
            lines("Safety, change", "capability/delta_safety", **points),
            matching("Each set, score", f"^capability/({_other_than('delta_')})[^/]*$", title_y="score"),
            matching("Each set, change", r"^capability/[^/]+/delta$", **points),
            wr.WeavePanelSummaryTable(table_name="capability/worst_drops"),
        ],
    )
    yield "Answers over stages", [wr.WeavePanelSummaryTable(table_name="samples/answers")]
    yield (
        "Training",
        [
            lines("Loss", "train/loss", _TOKENS, title_y="nats a token, weighted terms"),
            matching("Loss terms", r"^train/loss/.+$", _TOKENS, title_y="as the method weights them"),
        ],
    )
    yield (
        "Cost",
        [
            lines("Throughput", "train/tokens_per_s", _TOKENS, title_y="tokens a second"),
            lines("Peak memory of the device", "train/device_memory_gb", _TOKENS, title_y="10^9 bytes"),
            lines("Peak memory of the process", "train/host_memory_gb", _TOKENS, title_y="10^9 bytes"),
            lines("A step relative to plain fine-tuning", "method/step_ratio", title_y="ratio"),
            lines("What the method keeps", "method/state_mb", title_y="10^6 bytes"),
            lines("Weights that train", "method/trainable_params", title_y="number"),
        ],
    )


def _other_than(prefix: str) -> str:
    """Match how a name begins that does not begin with `prefix`; W&B's expressions have no lookahead."""
    return "|".join(f"{prefix[:place]}[^{prefix[place]}/]" for place in range(len(prefix)))


def _workspace(ws: Any, facts: Facts, sections: dict[str, list[Any]]) -> dict[str, Any]:
    from wandb_workspaces import expr

    name = _identifier("workspace")
    paths = [*_group_paths(facts)]
    page = ws.Workspace(
        entity="",
        project="",
        name=TITLE,
        sections=[
            ws.Section(name=title, panels=panels, is_open=True, layout_settings=ws.SectionLayoutSettings(columns=3))
            for title, panels in sections.items()
        ],
        settings=ws.WorkspaceSettings(x_axis=_STAGE, max_runs=100, tooltip_number_of_runs="all_runs"),
        runset_settings=ws.RunsetSettings(
            groupby=[expr.Config(key) for key in GROUPING],
            order=[expr.Ordering(expr.Summary("op"), ascending=False)],
            group_colors={path[0] if len(path) == 1 else ws.GroupPath(*path): colour for path, colour in paths},
            run_settings={one: ws.RunSettings(color=colour) for one, colour in facts.run_colours.items()},
            pinned_columns=list(_COLUMNS),
        ),
    )
    page._internal_runset_id = _identifier("workspace runs")
    for title, panels in sections.items():
        _name_panels(f"workspace {title}", panels)
    spec = json.loads(page._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    return {"name": f"nw-{name}-v", "title": TITLE, "description": "", "spec": spec}


def _report(wr: Any, facts: Facts, sections: dict[str, list[Any]]) -> dict[str, Any]:
    blocks = [wr.H1("How to read this"), wr.MarkdownBlock(_HELP)]
    if facts.table:
        blocks += [wr.H1("Means over runs"), wr.MarkdownBlock(_markdown(facts))]
    for title, panels in sections.items():
        shown = [panel for panel in panels if not isinstance(panel, wr.MarkdownPanel)]
        _place(wr, shown)
        runs = wr.Runset(name="runs", groupby=[f"config.{key}" for key in GROUPING])
        runs._id = _identifier(f"report runs {title}")
        keys = [wr.Config(key) for key in GROUPING]
        grid = wr.PanelGrid(
            runsets=[runs],
            panels=shown,
            custom_run_colors={
                **{
                    wr.RunsetGroup("runs", tuple(map(wr.RunsetGroupKey, keys, path))): colour
                    for path, colour in _group_paths(facts)
                },
                **facts.run_colours,
            },
        )
        _name_panels(f"report {title}", grid.panels)
        blocks += [wr.H1(title), grid]
    page = wr.Report(project="", entity="", title=TITLE, blocks=blocks, width="fluid")
    spec = json.loads(page._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    return {"name": _identifier("report"), "title": TITLE, "description": "Made by trace_hydra.dashboard", "spec": spec}


def _group_paths(facts: Facts) -> Iterable[tuple[tuple[str, ...], str]]:
    """Give every group at every depth the colour of its method."""
    for method in facts.methods:
        colour = colours.colour_of(method)
        yield (method,), colour
        for order in facts.orders:
            yield (method, order), colour
    for group in facts.groups:
        yield group, colours.colour_of(group[0])


def _place(wr: Any, panels: Sequence[Any]) -> None:
    """Lay panels out in a report's grid of 24 columns: three in a row, a table over the whole width."""
    x = y = 0
    for panel in panels:
        width = 24 if isinstance(panel, wr.WeavePanelSummaryTable | wr.MediaBrowser) else 8
        if x + width > 24:
            x, y = 0, y + 8
        panel.layout = wr.Layout(x=x, y=y, w=width, h=8)
        x += width


def _name_panels(where: str, panels: Sequence[Any]) -> None:
    """Give panels ids that stay, so that a page made again is the same page."""
    for number, panel in enumerate(panels):
        panel._id = _identifier(f"{where} {number}")


def _identifier(text: str) -> str:
    return digest(["trace_hydra.dashboard", text], 12)


def _markdown(facts: Facts) -> str:
    """Write the table of means, and what it leaves out."""
    lines = [" | ".join(["", *map(_cell, line), ""]).strip() for line in facts.table]
    lines.insert(1, "|" + "---|" * len(facts.table[0]))
    note = "Mean ± half the 95 % interval (Student's t) over runs; a group of one run has no interval."
    if facts.left_out:
        note += f" {facts.left_out} run directories are not in it, because they are not finished or cannot be read."
    return "\n".join([*lines, "", note])


def _cell(text: str) -> str:
    """Show a text as it is: no Markdown, no HTML, no line break, no control character."""
    plain = "".join(one if one.isprintable() else "�" for one in text)
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~&$])", r"\\\1", plain)
