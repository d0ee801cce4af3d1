"""Arithmetic of the time left: what is still to do, times what it has cost so far."""

from collections import defaultdict
from typing import Any

from trace_hydra.plan import RunInfo


class Estimate:
    """Counts work done and measures its speed; does not look at a clock itself.

    Time left = train tokens to do / measured tokens per second + stages to do times what a stage takes beside its steps
    + for each cell to do, its examples times the measured seconds per example of its task (of all tasks together where
    that one was not scored yet) + rows to measure capability at, times the seconds that took. What came from the store
    took no time, and is no measurement.
    """

    def __init__(self, run: RunInfo):
        self.train_tokens = {stage.index: float(stage.tokens) for stage in run.stages}
        """Still to do, by stage."""
        self.cells = {(row, task): count for row, task, count in run.cells}
        """Examples still to answer, by cell."""
        self.measurements = set(run.measured)
        """Rows whose capability is still to be measured."""
        self._trained = [0.0, 0.0]  # tokens, seconds
        self._beside: dict[int, float] = {}  # stage -> seconds of what is no step
        self._answered: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # examples, seconds
        self._measured: defaultdict[int, float] = defaultdict(float)  # row -> seconds

    def add_training(self, stage: int, tokens: int, seconds: float) -> None:
        """Count tokens trained on, and the time they took."""
        self._trained[0] += tokens
        self._trained[1] += seconds
        self.train_tokens[stage] = max(0, self.train_tokens.get(stage, 0) - tokens)

    def skip_training(self, stage: int, tokens: float) -> None:
        """Count tokens as done that an earlier start of the run trained on."""
        self.train_tokens[stage] = max(0, self.train_tokens.get(stage, 0) - tokens)

    def end_training(self, stage: int, beside_s: float | None = None) -> None:
        """Count the training of this stage and all before as done, whatever was planned.

        Args:
            stage: Its index.
            beside_s: Seconds of a stage that trained which were not spent in steps.
        """
        for index in self.train_tokens:
            if index <= stage:
                self.train_tokens[index] = 0
        if beside_s is not None:
            self._beside[stage] = beside_s

    def add_scoring(self, row: int, task: str, examples: int, seconds: float) -> None:
        """Count examples answered, and the time they took."""
        self._answered[task][0] += examples
        self._answered[task][1] += seconds
        if (row, task) in self.cells:
            self.cells[row, task] = max(0, self.cells[row, task] - examples)

    def end_cell(self, row: int, task: str) -> None:
        """Count a cell as done, whatever was planned."""
        self.cells.pop((row, task), None)

    def add_measuring(self, row: int, seconds: float) -> None:
        """Count time in which the model answered capability sets; the row need not be done."""
        self._measured[row] += seconds

    def end_measuring(self, row: int) -> None:
        """Count the capability of this row and all before as measured."""
        self.measurements = {one for one in self.measurements if one > row}

    def seconds_left(self) -> float | None:
        """Give the time left in seconds without `uncounted`.

        None as long as there is training or scoring to do whose speed was not measured.
        """
        left = 0.0
        if tokens := sum(self.train_tokens.values()):
            if not self._trained[0]:
                return None
            left += tokens * self._trained[1] / self._trained[0]
            stages = sum(1 for count in self.train_tokens.values() if count)
            left += stages * sum(self._beside.values()) / max(len(self._beside), 1)
        if any(self.cells.values()):
            examples = sum(count for count, _ in self._answered.values())
            if not examples:
                return None
            mean = sum(seconds for _, seconds in self._answered.values()) / examples
            for (_, task), count in self.cells.items():
                known, seconds = self._answered.get(task, (0.0, 0.0))
                left += count * (seconds / known if known else mean)
        if self._measured:
            left += len(self.measurements) * sum(self._measured.values()) / len(self._measured)
        return left

    @property
    def uncounted(self) -> list[str]:
        """Name what is to do and not part of `seconds_left`, for it has not been measured."""
        return ["capability"] if self.measurements and not self._measured else []

    def rates(self) -> dict[str, Any]:
        """Give what was measured: [amount, seconds] of tokens trained on, examples answered, rows measured, stages."""
        answered = [sum(one[at] for one in self._answered.values()) for at in (0, 1)]
        return {
            "trained": list(self._trained),
            "answered": answered,
            "measured": [len(self._measured), sum(self._measured.values())],
            "beside": [len(self._beside), sum(self._beside.values())],
        }
