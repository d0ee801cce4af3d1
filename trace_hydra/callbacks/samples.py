"""The same few test rows after every stage: what was asked, what the model answered, and what that scored."""

from collections.abc import Mapping, Sequence
from typing import Any

from trace_hydra.callbacks.base import RunCallback
from trace_hydra.callbacks.log import log_table
from trace_hydra.callbacks.table import row_label
from trace_hydra.metrics.continual import ScoreMatrix
from trace_hydra.plan import RunInfo, Stage

NAME = "samples/answers"
COLUMNS = ("task", "id", "after", "score", "answer", "reference", "prompt")


class AnswerSamples(RunCallback):
    """Logs to W&B, after each scored row, a table of all answers so far to a fixed set of test rows.

    A test row's answers stand below each other in the order of the stages, so that one sees an answer being learned and
    forgotten. Files hold all answers anyway (`predictions/`), so the other loggers get none.

    Args:
        rows: Test rows of each task, evenly spaced over its test set, the first one among them.
        characters: Of a text that the table shows.
    """

    def __init__(self, *, rows: int, characters: int):
        self.rows, self.characters = rows, characters

    def on_run_start(self, run: RunInfo, loggers: list) -> None:
        """Take the loggers."""
        self._run, self._loggers = run, loggers
        self._found: dict[tuple[int, int, int], list[Any]] = {}  # place of task, of test row, stage

    def on_stage_start(self, stage: Stage) -> None:
        """Forget what a start that ran out of memory heard of this stage and later ones."""
        self._found = {place: line for place, line in self._found.items() if place[2] < stage.index}

    def on_answers(self, row: int, task: str, prompts: Sequence[str], records: Sequence[Mapping[str, Any]]) -> None:
        """Keep the chosen ones."""
        after = row_label(self._run.tasks, row)
        for place in chosen(len(records), self.rows):
            one = records[place]
            texts = [self._shown(text) for text in (one["prediction"], one["reference"], prompts[place])]
            line = [task, str(one["id"]), after, float(one["scores"]["score"]), *texts]
            self._found[self._run.tasks.index(task), place, row] = line

    def on_row_scored(self, row: int, matrix: ScoreMatrix) -> None:
        """Log all so far."""
        if self._found:
            log_table(self._loggers, NAME, COLUMNS, [self._found[place] for place in sorted(self._found)], row)

    def _shown(self, text: str) -> str:
        return text if len(text) <= self.characters else text[: self.characters] + " …"


def chosen(available: int, wanted: int) -> list[int]:
    """Choose rows by their places alone, so that every run on the same test set shows the same ones."""
    count = min(available, max(0, wanted))
    return [place * available // count for place in range(count)]
