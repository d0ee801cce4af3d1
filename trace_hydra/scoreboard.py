"""The cells of a run as they come in: matrix, prediction files, callbacks."""

import logging
from pathlib import Path
from typing import Any

from trace_hydra import ranks
from trace_hydra.callbacks.base import RunCallback
from trace_hydra.errors import StoreError
from trace_hydra.evaluate import answer_prompts, score_answers
from trace_hydra.files import as_lines, write_bytes, write_lines
from trace_hydra.live import Live
from trace_hydra.memory import out_of_memory_outside
from trace_hydra.metrics.bootstrap import bootstrap
from trace_hydra.metrics.continual import ScoreMatrix
from trace_hydra.metrics.records import json_rows
from trace_hydra.metrics.score import TaskScore
from trace_hydra.names import inside
from trace_hydra.prepare import Prepared
from trace_hydra.store.entries import DamagedEntry

log = logging.getLogger(__name__)


class Scoreboard:
    """Scores the planned cells of each row and keeps what they gave.

    Args:
        prepared: The plan; its cells say what is scored, its entries what decides their answers.
        protocol: The `protocol` node.
        callbacks: Hear each cell and row.
        live: Answers what the store lacks.
    """

    def __init__(self, prepared: Prepared, protocol: Any, callbacks: list[RunCallback], live: Live):
        self.run, self.tasks, self.views = prepared.run, prepared.tasks, prepared.views
        self.entries, self.protocol, self.callbacks, self.live = prepared.entries, protocol, callbacks, live
        self.matrix = ScoreMatrix(list(self.run.tasks))
        self.scores: dict[tuple[int, str], TaskScore] = {}
        self.carried: dict[str, int] = {}
        """ "<row>,<task>" -> the row whose answers stand there too."""
        self.tokens = [0] * (len(self.run.tasks) + 1)
        """Prompt and generated tokens by row."""

    def score_row(self, row: int) -> None:
        """Score the planned cells of one row; carry a fixed diagonal down."""
        planned = [task for at, task, _ in self.run.cells if at == row]
        for task in planned:
            self._score(row, task)
        if self.live.method.cells == "diagonal" and row > 0:
            for column, task in enumerate(self.run.tasks[: row - 1], start=1):
                self.carried[f"{row},{task}"] = column
                self.scores[row, task] = self.scores[column, task]
                self.matrix.set(row, task, self.scores[column, task].score)
        if planned:
            for callback in self.callbacks:
                callback.on_row_scored(row, self.matrix)

    def intervals(self, samples: int, seed: int) -> dict[str, Any]:
        """95 % bootstrap intervals over test rows, see metrics/bootstrap.py."""
        rows = {cell: [one["score"] for one in score.rows] for cell, score in self.scores.items()}
        return bootstrap(list(self.run.tasks), rows, samples=samples, seed=seed)

    def write(self) -> None:
        """Write the prediction files that are gone, should somebody have deleted the directory under the run."""
        for row, task, _ in self.run.cells:
            path = predictions_file(self.run.directory, row, task)
            if not ranks.on_first(path.is_file):
                cell = score_answers(*self._answers(row, task), self.tasks[task], self.views[task], self.protocol)
                write_lines(cell.records, path)

    def _score(self, row: int, task: str) -> None:
        for callback in self.callbacks:
            callback.on_scoring_start(row, task, len(self.tasks[task].test))
        answers, tokens = self._answers(row, task)
        cell = score_answers(answers, tokens, self.tasks[task], self.views[task], self.protocol)
        self.matrix.set(row, task, cell.score.score)
        self.scores[row, task] = cell.score
        self.tokens[row] += cell.tokens
        write_lines(cell.records, predictions_file(self.run.directory, row, task))
        prompts = [example.prompt for example in self.tasks[task].test]
        for callback in self.callbacks:
            callback.on_cell_scored(row, task, cell.score)
            callback.on_answers(row, task, prompts, cell.records)

    def _answers(self, row: int, task: str) -> tuple[list[dict[str, Any]], int]:
        """Take a cell's answers from the store, or have the model give them and store them."""
        store, key = self.live.store, self.run.answers[row, task]
        prompts = [example.prompt for example in self.tasks[task].test]
        if (found := self._stored(key)) is not None:
            return found
        with store.lock("answers", key, f"row {row}, {task}", give_up=lambda: store.find("answers", key) is not None):
            if (found := self._stored(key)) is not None:
                return found
            ctx = self.live.at(row)
            ctx.on_generated = self._heard
            try:
                with out_of_memory_outside(
                    f"row {row}, {task}, answering", f"Lower evaluation.batch_tokens={ctx.batch_tokens}"
                ):
                    answers, tokens = answer_prompts(self.live.method, ctx, prompts, self.views[task])
            finally:
                ctx.on_generated = None
            decided, content = self.entries[f"answers/{row}/{task}"], as_lines(answers)
            store.publish(
                "answers",
                key,
                lambda folder: write_bytes(content, folder / "answers.jsonl"),
                inputs=decided,
                versions=decided["versions"],
                uses=[f"stages/{decided['state']}"] if row else [],
                facts={"task": task, "row": row, "tokens": tokens},
                needs=len(content),
            )
        return answers, tokens

    def _stored(self, key: str) -> tuple[list[dict[str, Any]], int] | None:
        entry = self.live.store.find("answers", key)
        if entry is None:
            return None
        try:
            return [one for _, one in json_rows(entry.file("answers.jsonl"), StoreError)], entry.facts["tokens"]
        except DamagedEntry as error:
            log.warning("%s", error)
            return None

    def _heard(self, num_examples: int, num_tokens: int) -> None:
        for callback in self.callbacks:
            callback.on_scoring_batch_end(num_examples, num_tokens)


def predictions_file(directory: Path, row: int, task: str) -> Path:
    """Say where the answers of a cell lie."""
    return inside(directory, "predictions", str(row), f"{task}.jsonl")
