"""Closed answers: the options that a row's scored answer is one of.

A task declares them (`TaskSpec.options`): a list that all rows share, or `LETTERED`, where each prompt lists its own.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from trace_hydra.data.encode import Encoder
from trace_hydra.data.task import LETTERED, Task, TaskSpec
from trace_hydra.errors import DataError

GENERATE, LOG_LIKELIHOOD = "generate", "log_likelihood"
CLOSED_ANSWERS = (GENERATE, LOG_LIKELIHOOD)
"""Values of `protocol.closed_answers`."""
_LETTER = re.compile(r"^([A-Z])\. ", re.MULTILINE)
_SHOWN = 3


def closed_options(spec: TaskSpec, protocol: Mapping[str, Any]) -> tuple[str, ...] | str:
    """Tell what a task's answers are chosen from under a protocol; (): they are generated.

    Answers that hold reasoning (`spec.splitter`) are always generated: no option follows the prompt there.
    """
    chosen = protocol.get("closed_answers") == LOG_LIKELIHOOD and spec.splitter is None
    return spec.options if chosen else ()


def options_of(prompt: str, declared: tuple[str, ...] | str) -> tuple[str, ...]:
    """List the options of a row, in order.

    Args:
        prompt: Its text; if it lists several (demonstrations before the question), the last list counts.
        declared: By the task.
    """
    if declared != LETTERED:
        return tuple(declared)
    run: list[str] = []
    for letter in _LETTER.findall(prompt):
        if letter == "A":
            run = []
        if letter == chr(ord("A") + len(run)):
            run.append(letter)
    return tuple(run)


def option_problems(
    task: Task, declared: tuple[str, ...] | str, encoder: Encoder, max_new_tokens: int
) -> Iterator[str]:
    """Say which test rows cannot be answered by one of their options, the first of each kind.

    Args:
        task: Its test rows are looked at.
        declared: What its answers are chosen from; () for a task that is generated.
        encoder: Of the run.
        max_new_tokens: Limit of the task's answers.
    """
    if not declared:
        return
    listed = [options_of(row.prompt, declared) for row in task.test]
    for options in dict.fromkeys(listed):
        try:
            longest = max(map(len, encoder.options(options)), default=0)
        except DataError as error:
            yield f"{task.name}: {error}"
            continue
        if longest > max_new_tokens:
            yield (
                f"{task.name}: an option of {', '.join(options)} has {longest} tokens, its answers at most "
                f"{max_new_tokens}. Raise data.tasks.{task.name}.max_new_tokens, or protocol.decoding.max_new_tokens "
                "where it is set."
            )
    few = [row.id for row, options in zip(task.test, listed, strict=True) if len(options) < 2]
    if few:
        named = ", ".join(few[:_SHOWN]) + " ..." * (len(few) > _SHOWN)
        yield (
            f"{task.name}: the prompts of {len(few)} test rows ({named}) list no lines 'A. ...', 'B. ...' to choose "
            f"from. Set protocol.closed_answers=generate, or data.tasks.{task.name}.options."
        )
        return
    first = task.spec.metric == "first_character"
    answers = [row.answer.strip()[:1] if first else row.answer.strip() for row in task.test]
    rows = zip(task.test, answers, listed, strict=True)
    others = [(row.id, answer, options) for row, answer, options in rows if answer not in map(str.strip, options)]
    if others:
        row_id, answer, options = others[0]
        yield (
            f"{task.name}: the answers of {len(others)} test rows are none of their options; {row_id}'s "
            f"{answer[:40]!r} is none of {', '.join(options)}. Set protocol.closed_answers=generate, or "
            f"data.tasks.{task.name}.options."
        )
