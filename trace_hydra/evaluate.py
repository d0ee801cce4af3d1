"""Cells of the score matrix: prompts in, predictions and scores out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import torch

from trace_hydra.context import StageContext, TrainTask
from trace_hydra.data.options import options_of
from trace_hydra.data.task import Task, final_prediction
from trace_hydra.errors import MethodError
from trace_hydra.methods.base import Method
from trace_hydra.metrics.score import TaskScore, score_task
from trace_hydra.metrics.text import cut_at
from trace_hydra.models.choose import Chosen
from trace_hydra.models.generate import Generated


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


def answer_prompts(
    method: Method, ctx: StageContext, prompts: Sequence[str], view: TrainTask
) -> tuple[list[dict[str, Any]], int]:
    """Let the model answer as it is.

    Training's random state is as before afterwards, and answers do not depend on what was answered before.

    Returns:
        A JSON object a prompt (raw: the method's answer; new_tokens, stopped, and generated where the method took its
        answer out of a longer text; log_likelihoods where it was chosen), and the number of prompt and generated
        tokens.

    Raises:
        MethodError: If the method gives another number of answers than prompts, or something else than strings, or
            generates what the protocol has chosen among options.
    """
    ctx.model.to(ctx.device)  # type: ignore[arg-type]
    was_training, rng = ctx.model.training, ctx.rng
    ctx.model.eval()
    ctx.generated.clear()
    devices = [ctx.device] if ctx.device.type == "cuda" else []
    ctx.rng = Random(f"{ctx.generation_seed}-{view.name}-answers")
    ctx.options = partial(options_of, declared=view.options) if view.options else None
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(ctx.rng.getrandbits(32))
            raw = method.answer(ctx, prompts, view)
    finally:
        ctx.rng, ctx.options = rng, None
        ctx.model.train(was_training)
    if len(raw) != len(prompts) or not all(isinstance(text, str) for text in raw):
        raise MethodError(
            f"{type(method).__name__}.answer gave {len(raw)} answers to {len(prompts)} prompts of {view.name}; it must "
            "give one string a prompt."
        )
    if view.options and not (len(ctx.generated) == len(prompts) and all(map(_is_chosen, ctx.generated))):
        raise MethodError(
            f"{type(method).__name__}.answer does not ask ctx.generate once a prompt; the answers to {view.name} "
            "cannot be chosen among its options. Set protocol.closed_answers=generate."
        )
    made = ctx.generated if len(ctx.generated) == len(prompts) else [None] * len(prompts)
    answers = [
        {
            "raw": text,
            "new_tokens": generated.num_new if generated else None,
            "stopped": generated.stopped if generated else None,
            # What the model wrote, where the method took its answer out of it.
            **({"generated": generated.text} if generated and generated.text != text else {}),
            **({"log_likelihoods": generated.log_likelihoods} if isinstance(generated, Chosen) else {}),
        }
        for text, generated in zip(raw, made, strict=True)
    ]
    return answers, sum(one.num_prompt + one.num_new for one in ctx.generated)


def _is_chosen(answer: Generated) -> bool:
    return isinstance(answer, Chosen)


def score_answers(
    answers: Sequence[dict[str, Any]], tokens: int, task: Task, view: TrainTask, protocol: Any
) -> CellResult:
    """Score the answers to a task's test rows."""
    prompts = [example.prompt for example in task.test]
    predictions = [final_prediction(cut_at(one["raw"], view.stop), task.spec) for one in answers]
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
    records = [
        {
            "id": example.id,
            "prompt_sha256": hashlib.sha256(example.prompt.encode("utf-8", "surrogatepass")).hexdigest(),
            "raw": one["raw"],
            "prediction": prediction,
            "reference": example.answer,
            "scores": scores,
            **{key: value for key, value in one.items() if key != "raw"},
        }
        for example, one, prediction, scores in zip(task.test, answers, predictions, score.rows, strict=True)
    ]
    return CellResult(score, records, tokens)
