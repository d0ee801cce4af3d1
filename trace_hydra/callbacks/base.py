"""The events of a run, beside Lightning's events of one fit."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback

from trace_hydra.metrics.continual import ScoreMatrix
from trace_hydra.metrics.score import TaskScore
from trace_hydra.plan import Effort, RunInfo, Stage


class RunCallback(Callback):
    """A Lightning callback that also hears the run as a whole. All hooks do nothing by default.

    One instance lives for the whole run and is handed to the Trainer of every phase, so Lightning's own hooks
    (`on_train_batch_end`, ...) are heard too; `trainer.global_step` restarts with each phase.
    """

    def on_run_start(self, run: RunInfo, loggers: list) -> None:
        """Hear the plan before anything is trained. `loggers` are Lightning loggers, already open."""

    def on_stage_start(self, stage: Stage) -> None:
        """Hear that a stage begins."""

    def on_stage_end(self, stage: Stage, effort: Effort) -> None:
        """Hear that a stage is trained, and what it cost; its row is scored next."""

    def on_scoring_start(self, row: int, task: str, num_examples: int) -> None:
        """Hear that one cell of the matrix (`row`, 0 = before training; `task`) is about to be scored."""

    def on_scoring_batch_end(self, num_examples: int, num_tokens: int) -> None:
        """Hear that a batch of answers is done: prompts in it, prompt and generated tokens without padding."""

    def on_cell_scored(self, row: int, task: str, score: TaskScore) -> None:
        """Hear one cell's score."""

    def on_answers(self, row: int, task: str, prompts: Sequence[str], records: Sequence[Mapping[str, Any]]) -> None:
        """Hear the answers behind a cell, one record a test row as predictions/<row>/<task>.jsonl holds them."""

    def on_row_scored(self, row: int, matrix: ScoreMatrix) -> None:
        """Hear that a row is complete. `matrix` holds all rows so far; later ones are None."""

    def on_measuring_start(self, row: int) -> None:
        """Hear that the model is about to answer a capability set; nothing is heard of answers from the store."""

    def on_measuring_end(self, row: int) -> None:
        """Hear that it has answered, or failed to."""

    def on_capability(self, row: int, deltas: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> None:
        """Hear the capability deltas after a stage, as results.json shows them, and the items behind them."""

    def on_run_end(self, results: Mapping[str, Any]) -> None:
        """Hear the finished results.json as a mapping, after it is on disk."""

    def on_run_error(self, error: BaseException) -> None:
        """Hear that the run ends early."""
