"""What was forgotten most: tasks whose score fell since their own stage, and the answers that lost most."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trace_hydra.errors import StoreError
from trace_hydra.metrics.records import json_rows
from trace_hydra.names import inside
from trace_hydra.report.hostile import Shown, shown

TASKS = 3
ANSWERS = 5
CHARACTERS = 600
"""Of each text that is shown."""


@dataclass(frozen=True)
class Answer:
    """A test row, answered right after the task's own stage and after the last one."""

    id: str
    prompt: Shown | None
    """None where test_rows does not have it."""
    reference: Shown
    before: Shown
    after: Shown
    score_before: float
    score_after: float


@dataclass(frozen=True)
class Forgotten:
    """A task that lost points since its own stage."""

    task: str
    stage: int
    before: float
    after: float
    fell: int = 0
    """Test rows that score less than they did."""
    rows: int = 0
    answers: list[Answer] = field(default_factory=list)
    note: str = ""
    """Why there are fewer answers than asked for."""

    @property
    def change(self) -> float:
        """Points, negative."""
        return self.after - self.before


def most_forgotten(results: Mapping[str, Any], directory: Path) -> tuple[list[Forgotten], str]:
    """Find the tasks that lost most since their own stage, with the answers that lost most.

    Returns:
        At most `TASKS`, the worst first; and what is to be said of the tasks that are not among them.
    """
    tasks, matrix = results["tasks"], results["matrix"]
    last = len(tasks)
    fallen, unknown = [], []
    for column, task in enumerate(tasks[:-1]):
        own, now = matrix[column + 1][column], matrix[last][column]
        if own is None or now is None:
            unknown.append(task)
        elif now < own:
            fallen.append(Forgotten(task, column + 1, own, now))
    fallen.sort(key=lambda one: (one.change, one.stage))
    notes = []
    if unknown:
        notes.append(f"Not known for {', '.join(unknown)}: a score of its own stage or of the last one is missing.")
    if last == 1:
        notes.append("There is one task; nothing is trained after it.")
    elif not fallen and len(unknown) < last - 1:
        notes.append("No task with both scores lost points since its own stage.")
    elif len(fallen) > TASKS:
        notes.append(f"{len(fallen) - TASKS} more lost points: {', '.join(one.task for one in fallen[TASKS:])}.")
    return [_with_answers(one, last, directory) for one in fallen[:TASKS]], " ".join(notes)


def _with_answers(found: Forgotten, last: int, directory: Path) -> Forgotten:
    try:
        before = dict(_answers(inside(directory, "predictions", str(found.stage), f"{found.task}.jsonl")))
        after = dict(_answers(inside(directory, "predictions", str(last), f"{found.task}.jsonl")))
    except StoreError as error:
        return Forgotten(found.task, found.stage, found.before, found.after, note=f"No answers: {error}")
    both = [name for name in before if name in after]
    losses = {name: before[name]["scores"]["score"] - after[name]["scores"]["score"] for name in both}
    fell = [name for name in both if losses[name] > 0]
    worst = sorted(fell, key=lambda name: -losses[name])[:ANSWERS]  # ties in the order of the file
    prompts = _prompts(inside(directory, "test_rows", f"{found.task}.jsonl"), set(worst))
    answers = [_answer(name, prompts.get(name), before[name], after[name]) for name in worst]
    note = f"Only {len(fell)} of its answers score less than they did." if len(fell) < ANSWERS else ""
    return Forgotten(found.task, found.stage, found.before, found.after, len(fell), len(both), answers, note)


def _answers(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for place, row in json_rows(path, StoreError):
        scores = row.get("scores") if isinstance(row, dict) else None
        score = scores.get("score") if isinstance(scores, dict) else None
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise StoreError(f"{place}: scores.score is no number.")
        if not all(isinstance(row.get(key), str) for key in ("id", "prediction", "reference")):
            raise StoreError(f"{place}: 'id', 'prediction' and 'reference' must be text.")
        yield row["id"], row


def _prompts(path: Path, wanted: set[str]) -> dict[str, Shown]:
    """Read the prompts of rows; {} where the file cannot be read."""
    try:
        rows = [row for _, row in json_rows(path, StoreError) if isinstance(row, dict) and row.get("id") in wanted]
    except StoreError:
        return {}
    return {row["id"]: _middle(row["prompt"]) for row in rows if isinstance(row.get("prompt"), str)}


def _middle(prompt: str) -> Shown:
    """Show the end of a long prompt, where the question stands in TRACE's tasks."""
    if len(prompt) <= CHARACTERS:
        return shown(prompt, CHARACTERS)
    return Shown(shown(prompt[-CHARACTERS:], CHARACTERS).text, len(prompt) - CHARACTERS)


def _answer(name: str, prompt: Shown | None, before: Mapping[str, Any], after: Mapping[str, Any]) -> Answer:
    return Answer(
        shown(name, 80).text,
        prompt,
        shown(before["reference"], CHARACTERS),
        shown(before["prediction"], CHARACTERS),
        shown(after["prediction"], CHARACTERS),
        float(before["scores"]["score"]),
        float(after["scores"]["score"]),
    )
