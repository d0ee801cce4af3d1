"""The score matrix while it fills up, and the run's numbers at its end: in the terminal and in every logger."""

import shutil
import sys
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trace_hydra.callbacks.base import RunCallback
from trace_hydra.callbacks.log import is_rank_zero, log_matrix, log_metrics, log_summary
from trace_hydra.callbacks.picture import heat_map_png, heat_map_title
from trace_hydra.callbacks.table import column_widths, matrix_blocks, matrix_text, row_label
from trace_hydra.metrics.continual import ScoreMatrix, summary
from trace_hydra.metrics.score import TaskScore
from trace_hydra.plan import RunInfo, Stage
from trace_hydra.terminal import mode_of, plain

HEADLINE = {"op": "OP", "bwt": "BWT", "fwt": "FWT", "forgetting": "forgetting"}
"""Key in results.json -> how it is printed."""
_LOST = 1.0
"""Points from which on a loss is coloured."""


class MatrixCallback(RunCallback):
    """Shows and logs each scored row, and at the end the matrix with OP, BWT, FWT and forgetting.

    Logged for each row: `score/<task>`, and `progress/op` and `progress/bwt` of the tasks trained so far, against
    `progress/stage` = row; to W&B the matrix as a table and a heat map too. Logged at the end: `op`, `bwt`, `fwt`,
    `forgetting`, each with `_ci_low` and `_ci_high`.

    Args:
        show: Print to stdout.
        heat_map: Draw the picture for W&B after every row (about half a second each).
        mode: As `progress`; quiet shows the end alone, and nothing where a line of the whole sweep is drawn.
    """

    def __init__(self, *, show: bool, heat_map: bool, mode: str = "auto"):
        self.show, self.heat_map, self.mode = show, heat_map, mode

    def on_run_start(self, run: RunInfo, loggers: list) -> None:
        """Take the plan and the loggers."""
        self._run, self._loggers = run, loggers
        self._row_scores: dict[str, float] = {}
        quiet = mode_of(self.mode, sys.stderr) == "quiet"
        self._show_rows = self.show and is_rank_zero() and not quiet
        self._show_end = self.show and is_rank_zero() and (not quiet or self.mode == "quiet")

    def on_stage_start(self, stage: Stage) -> None:
        """Forget the scores of the row before."""
        self._row_scores = {}

    def on_cell_scored(self, row: int, task: str, score: TaskScore) -> None:
        """Keep a score of the row under way."""
        self._row_scores[task] = score.score

    def on_row_scored(self, row: int, matrix: ScoreMatrix) -> None:
        """Print the rows so far and log this one."""
        metrics: dict[str, float | None] = {f"score/{task}": score for task, score in self._row_scores.items()}
        if row:
            so_far = summary(ScoreMatrix(matrix.tasks[:row], [one[:row] for one in matrix.rows[: row + 1]]))
            metrics |= {"progress/op": so_far["op"], "progress/bwt": so_far["bwt"]}
        log_metrics(self._loggers, {**metrics, "progress/stage": row}, row)
        run, rows = self._run, [list(one) for one in matrix.rows]
        title = heat_map_title(run.model, run.method, run.task_order, run.protocol, run.fingerprint)
        draw = (lambda: heat_map_png(matrix.tasks, rows, title)) if self.heat_map else None
        log_matrix(self._loggers, matrix.tasks, rows, row, draw)
        if self._show_rows and row < len(matrix.tasks):  # the last row is part of the block at the end
            print(f"\nscores after {plain(row_label(matrix.tasks, row))}" if row else "\nscores before training")
            _print_matrix(matrix)

    def on_run_end(self, results: Mapping[str, Any]) -> None:
        """Log and print the run's numbers."""
        metrics: dict[str, float | None] = {}
        for key in HEADLINE:
            low, high = _interval(results, key)
            metrics |= {key: results[key], f"{key}_ci_low": low, f"{key}_ci_high": high}
        log_summary(self._loggers, metrics, len(results["tasks"]))
        if self._show_end:
            self._print_end(results)

    def _print_end(self, results: Mapping[str, Any]) -> None:
        protocol = results["protocol"]
        print(f"\n{self._run.name}\nprotocol {protocol['name']} [{protocol['fingerprint']}], scores 0-100")
        _print_matrix(ScoreMatrix(results["tasks"], results["matrix"]))
        print()
        for key, name in HEADLINE.items():
            print(f"{name:<11}{_headline(results, key)}")
        for name in ("results.json", "report.md", "report.html", "matrix.png"):
            print(self._run.directory / name)


def _headline(results: Mapping[str, Any], key: str) -> str:
    """Write a number with its interval, or what it lacks."""
    if results[key] is None:
        lacking = list(results.get("missing", {}).get(key, []))
        return f"not known: {', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}"
    low, high = _interval(results, key)
    interval = "" if low is None else f"   95 % interval [{low:.2f}, {high:.2f}]"
    return f"{results[key]:8.2f}{interval}"


def _interval(results: Mapping[str, Any], key: str) -> tuple[float | None, float | None]:
    low, high = (results.get("confidence") or {}).get(key) or (None, None)
    return low, high


def _print_matrix(matrix: ScoreMatrix) -> None:
    """Print with rules and colours on a terminal, as plain text elsewhere."""
    width = shutil.get_terminal_size(fallback=(160, 24)).columns  # a file has no width
    if not sys.stdout.isatty():
        try:
            "·".encode(sys.stdout.encoding or "ascii")
            unscored = "·"
        except UnicodeEncodeError:
            unscored = "."
        print(matrix_text(matrix.tasks, matrix.rows, width=width, unscored=unscored))
        return
    for block in matrix_blocks(matrix.tasks, matrix.rows, width=width - 2):
        needed = sum(column_widths(block)) + 2 * len(block[0]) + 2
        Console(width=max(width, needed)).print(_rich_table(block))


def _rich_table(block: list[list[str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column, (name, width) in enumerate(zip(block[0], column_widths(block), strict=True)):
        table.add_column(Text(name), justify="right" if column else "left", no_wrap=True, min_width=width)
    own = {name: next((line for line in block[1:] if line[0].partition(" ")[2] == name), None) for name in block[0]}
    after = {name: line[block[0].index(name)] for name, line in own.items() if line is not None}
    for line in block[1:]:
        named = zip(block[0], line, strict=True)
        table.add_row(*(Text(cell, style=_style(line, name, cell, own, after)) for name, cell in named))
    return table


def _style(line: list[str], name: str, cell: str, own: Mapping[str, Any], after: Mapping[str, str]) -> str:
    """Make a task's score right after its stage bold, and what was lost of it since yellow."""
    if line is own.get(name):
        return "bold"
    trained_before = line[0].partition(" ")[0].isdigit() and own.get(name) is not None
    if not trained_before or int(line[0].partition(" ")[0]) <= int(own[name][0].partition(" ")[0]):
        return ""
    try:
        return "yellow" if float(after[name]) - float(cell) >= _LOST else ""
    except ValueError:  # not scored
        return ""
