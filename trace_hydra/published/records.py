"""What is known of a published number: records of `papers/*.yaml`, and rows with their conditions."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trace_hydra.metrics.continual import ScoreMatrix

PARTS = {
    "data": "data variant",
    "order": "task order",
    "epochs": "epochs",
    "learning_rate": "learning rate",
    "batch": "batch size",
    "memory": "kept rows",
    "variant": "variant of the method",
    "demonstrations": "demonstrations",
    "prompt": "prompt",
    "prompt_tokens": "prompt limit (tokens)",
    "decoding": "decoding",
    "scoring": "metrics",
    "splitter": "splitter of answers",
    "formula": "BWT formula",
}
"""What a protocol consists of, as far as anyone states it: key in the files -> how it is called."""
FORMULAS = {
    "trace": "sum over T - 1",
    "div_t": "sum over T",
    "clipped_div_t": "losses only, sum over T",
    "forgetting": "sum over T - 1, sign turned",
}
"""Formulas of BWT by name -> what they do with the changes of the tasks since their own stage."""
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Condition:
    """What is stated about one part of a protocol: a value by each source that states one."""

    statements: tuple[tuple[str, str], ...] = ()
    """(source, value); the source is "" where the paper simply says so. Empty: nobody states it."""

    @property
    def value(self) -> str | None:
        """The first stated value, None for unknown."""
        return self.statements[0][1] if self.statements else None

    def __str__(self) -> str:
        """Write values with their sources."""
        return "; ".join(f"{value} ({source})" if source else value for source, value in self.statements) or UNKNOWN


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Doubt(_Record):
    """What is known to be wrong or uncertain."""

    where: str
    what: str
    rows: Literal["all"] | None = None
    """Said of every row of the paper."""
    tables: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    epochs: tuple[str, ...] = ()
    """With these, said of the rows that have one of each given."""
    abilities: tuple[str, ...] = ()
    """"<model> <method>" of rows of general ability it is said of."""
    matrices: tuple[int, ...] = ()
    op: tuple[float, float] | None = None
    bwt: tuple[float, float] | None = None
    """As printed, and from the cells of the matrix."""


class Ability(_Record):
    """General ability of one model state, 0-100."""

    paper: str = ""
    table: str = UNKNOWN
    model: str
    method: str
    family: str = ""
    """What `Method.published` calls it; `method` where that is empty."""
    scores: Mapping[str, float] = {}
    mean: float | None = None
    delta: float | None = None
    """As printed, against the paper's start model (`method` "base")."""
    note: str = ""


class Judged(_Record):
    """Percent of prompts on which a judge preferred the trained model, neither, or its start model."""

    paper: str = ""
    table: str = UNKNOWN
    model: str
    area: Literal["instruction", "safety"]
    method: str
    win: float = Field(ge=0, le=100)
    tie: float = Field(ge=0, le=100)
    lose: float = Field(ge=0, le=100)
    note: str = ""


class TaskScores(_Record):
    """Scores by task."""

    paper: str = ""
    table: str = UNKNOWN
    model: str
    method: str
    family: str = ""
    data: Any = UNKNOWN
    epochs: int | None = None
    """Of every task."""
    scale: int = Field(default=1, ge=1, le=100)
    """What a full score is."""
    when: str = "final"
    scores: Mapping[str, float]
    mean: float | None = None
    """As printed, in `scale`."""
    total: float | None = None
    """OP of the same run in another table, 0-100."""
    note: str = ""

    def points(self) -> dict[str, float]:
        """Scores 0-100."""
        return {task: score * 100 / self.scale for task, score in self.scores.items()}


class Row(_Record):
    """One line under `rows`, without its conditions."""

    group: str
    table: str = ""
    model: str
    method: str
    family: str = ""
    op: float | None = Field(default=None, ge=0, le=100)
    op_std: float | None = Field(default=None, ge=0)
    bwt: float | None = Field(default=None, ge=-100, le=100)
    bwt_std: float | None = Field(default=None, ge=0)
    sign: Literal["negative", "positive", "doubtful", ""] = ""
    copied_from: str = ""
    matrix: int | None = None
    note: str = ""


class Group(_Record):
    """Rows that were made alike and may be compared, of one model."""

    name: str = ""
    paper: str = ""
    about: str
    sign: Literal["negative", "positive", "doubtful"] = "negative"
    """What the printed BWT means: negative or positive numbers are forgetting."""
    sign_note: str = ""
    conditions: Mapping[str, Any]


class Paper(_Record):
    """A source and all it printed."""

    paper: str
    arxiv: str = ""
    year: int | None = None
    venue: str = ""
    code: str = ""
    table: str = UNKNOWN
    """Of rows that name none."""
    runs: int | None = None
    """That every number is the mean of."""
    models: Mapping[str, Mapping[str, str]] = {}
    """What a model is taken to be: its name there -> {source: its name here}."""
    remarks: tuple[str, ...] = ()
    doubts: tuple[Doubt, ...] = ()
    groups: Mapping[str, Group] = {}
    rows: tuple[Any, ...] = ()
    abilities: tuple[Ability, ...] = ()
    judged: tuple[Judged, ...] = ()
    task_scores: tuple[TaskScores, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One published result, with all that is known about how it was made."""

    paper: Paper
    group: str
    table: str
    model: str
    method: str
    family: str
    """What `Method.published` of the same method says."""
    op: float | None
    op_std: float | None
    bwt: float | None
    """As printed."""
    bwt_std: float | None
    bwt_signed: float | None
    """With negative as forgetting; None where what the sign means, or the row, is in doubt."""
    sign_note: str
    conditions: Mapping[str, Condition]
    copied_from: str
    """Whose number it repeats; "" for the paper's own."""
    matrix: int | None
    """Number of the table in `matrices()` that it is computed from."""
    note: str
    doubts: tuple[str, ...]
    printed: Mapping[str, str] = field(default_factory=dict)
    """op, op_std, bwt, bwt_std with the digits that were printed."""

    @property
    def where(self) -> str:
        """Paper and table."""
        return self.paper.paper if self.table == UNKNOWN else f"{self.paper.paper} {table_name(self.table)}"


@dataclass(frozen=True)
class Matrix:
    """A table of scores by task and stage of TRACE's appendix."""

    table: int
    model: str
    method: str
    data: str
    order: str
    tasks: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]
    """0-1 as printed: cells[i][t] is the score on tasks[i] after stage t + 1."""
    op: float
    bwt: float
    """As printed, 0-1."""

    def last(self) -> TaskScores:
        """Give the scores after the last stage, whose mean is OP."""
        return self._column("final", [row[-1] for row in self.cells], self.op)

    def diagonal(self) -> TaskScores:
        """Give the score of each task after its own stage."""
        return self._column("after each task's stage", [row[stage] for stage, row in enumerate(self.cells)], None)

    def _column(self, when: str, cells: list[float | None], mean: float | None) -> TaskScores:
        scores = {task: cell for task, cell in zip(self.tasks, cells, strict=True) if cell is not None}
        return TaskScores(
            paper="TRACE", table=str(self.table), model=self.model, method=self.method, data=self.data, when=when,
            scores=scores, mean=mean,
        )  # fmt: skip

    def scores(self) -> ScoreMatrix:
        """Give the rows that results.json has, 0-100: by stage, then task; nothing before training is known."""
        size = len(self.tasks)
        rows = [[_points(self.cells[task][stage]) for task in range(size)] for stage in range(size)]
        return ScoreMatrix(self.tasks, [[None] * size, *rows])


def table_name(table: str) -> str:
    """Write the number of a table."""
    return f"Table{'s' if '-' in table else ''} {table}" if re.match(r"\d", table) else table


def condition(node: Any) -> Condition:
    """Read a condition: a value, {source: value, ...}, or `unknown`."""
    if isinstance(node, Mapping):
        return Condition(tuple((str(source), str(value)) for source, value in node.items()))
    return Condition() if node in (None, "", UNKNOWN) else Condition((("", str(node)),))


def _points(value: float | None) -> float | None:
    return None if value is None else round(value * 100, 6)
