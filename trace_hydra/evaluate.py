"""Cells of the score matrix: prompts in, predictions and scores out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trace_hydra.context import StageContext, TrainTask
from trace_hydra.data.task import Task, final_prediction
from trace_hydra.errors import MethodError
from trace_hydra.methods.base import Method
from trace_hydra.metrics.score import TaskScore, score_task
from trace_hydra.metrics.text import cut_at


@dataclass(frozen=True)
class CellResult:
    """One scored cell."""

    score: TaskScore
    records: list[dict[str, Any]]
    """A JSON object a test row, as written to predictions/<row>/<task>.jsonl."""
    tokens: int
    """Prompt and generated tokens."""


def cells_to_score(cells: str, tasks: Sequence[str], *, row0: bool, next_task: bool, own: str) -> list[tuple[int, str]]:
    """List the cells (row, task) a run scores, in order.

    Args:
        cells: "seen", "all" or "diagonal_last".
        tasks: Training order.
        row0: Score every task before training.
        next_task: Score each task once more right before its stage (R[i-1, i], for FWT).
        own: The method's `cells`; "diagonal" leaves what is carried down out, "last" everything before the last row.
    """
    last = len(tasks)
    chosen = [(0, task) for task in tasks] if row0 else []
    for row in range(1, last + 1):
        for column, task in enumerate(tasks, start=1):
            seen = column <= row
            wanted = {"seen": seen, "all": True, "diagonal_last": column == row or row == last}[cells]
            wanted = wanted or (next_task and column == row + 1)
            if own == "diagonal":
                wanted = column == row
            elif own == "last":
                wanted = row == last and seen
            if wanted:
                chosen.append((row, task))
    return chosen


def score_cell(method: Method, ctx: StageContext, task: Task, view: TrainTask, *, protocol: Any) -> CellResult:
    """Answer a task's test rows with the model as it is and score them.

    Training's random state is as before afterwards.

    Raises:
        MethodError: If the method gives another number of answers than prompts, or something else than strings.
    """
    prompts = [example.prompt for example in task.test]
    ctx.model.to(ctx.device)  # type: ignore[arg-type]
    was_training = ctx.model.training
    ctx.model.eval()
    ctx.generated.clear()
    devices = [ctx.device] if ctx.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        raw = method.answer(ctx, prompts, view)
    ctx.model.train(was_training)
    if len(raw) != len(prompts) or not all(isinstance(text, str) for text in raw):
        raise MethodError(
            f"{type(method).__name__}.answer gave {len(raw)} answers to {len(prompts)} prompts of {task.name}; it must "
            "give one string a prompt."
        )
    predictions = [final_prediction(cut_at(text, view.stop), task.spec) for text in raw]
    score = score_task(
        task=task.name,
        metric=task.spec.metric,
        scoring=protocol.scoring,
        protocol=protocol.name,
        prompts=prompts,
        answers=[example.answer for example in task.test],
        predictions=predictions,
        instruction=view.instruction,
    )
    made = ctx.generated if len(ctx.generated) == len(prompts) else [None] * len(prompts)
    records = [
        {
            "id": example.id,
            "prompt_sha256": hashlib.sha256(example.prompt.encode("utf-8", "surrogatepass")).hexdigest(),
            "raw": text,
            "prediction": prediction,
            "reference": example.answer,
            "scores": scores,
            "new_tokens": generated.num_new if generated else None,
            "stopped": generated.stopped if generated else None,
            # What the model wrote, where the method took its answer out of it.
            **({"generated": generated.text} if generated and generated.text != text else {}),
        }
        for example, text, prediction, scores, generated in zip(
            task.test, raw, predictions, score.rows, made, strict=True
        )
    ]
    return CellResult(score, records, sum(one.num_prompt + one.num_new for one in ctx.generated))
