"""What a teacher is asked so that it writes rationales, and what makes its rationale good enough to train on.

RCL (Wang et al. 2023, arXiv:2310.06762, section 5) had rationales written by GPT-4 from a cue and three demonstrations
a task and checked against the gold answer. Prompts and demonstrations here are ours.

Two rules, by the task's metric:

    "answer"  accuracy, first_character. The teacher does not see the gold answer. It reasons and answers, and what
              `data.reasoning.final_answer` takes out of its reply must equal the gold answer.
    "given"   rouge_l, edit_similarity, sari. Texts that no second writer would repeat, so the teacher sees the gold
              answer and writes the reasoning that leads to it. A reply that is cut off, gives another answer, says that
              it was given one, or repeats a long one word for word is rejected.

Under both the row is put together from the teacher's reasoning and the gold answer, and must split back into it.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trace_hydra.data.reasoning import (
    ANSWER_FIRST,
    MARKS,
    SUMMARY_MARK,
    final_answer,
    holds_reasoning,
    option_letters,
)
from trace_hydra.data.task import Example
from trace_hydra.errors import CapabilityError, DataError

PROMPT_VERSION = 1
"""Raised when what the teacher reads changes; part of what decides whether stored rationales still fit."""
CHECKS = ("answer", "given")
NUM_DEMONSTRATIONS = 3
NUM_ORDERS = math.factorial(NUM_DEMONSTRATIONS)
CUE_LINE = "Give your reasoning first, and then the answer.\nReasoning:"
"""Ends the prompts of a task that is not TRACE's."""

_CHECK_OF = {"accuracy": "answer", "first_character": "answer"}
_LAST_MARK = "\nAnswer:"
_LONG_ANSWER = 80  # characters; a rationale may well quote a shorter answer, a line of code for one
_SPEAKS_OF_GIFT = re.compile(
    r"\b(given|provided|correct|reference|gold|expected)\s+(final\s+)?(answer|summary|solution|simplification)\b", re.I
)
_MARKS = re.compile(rf"\n(?:{'|'.join(MARKS)})[:：]|{re.escape(ANSWER_FIRST)}|{re.escape(SUMMARY_MARK)}")
_ECHO = re.compile(r"(?:Reasoning|推理)[:：]\s*")


@dataclass(frozen=True)
class Demonstration:
    """A row with the reasoning that a teacher should write."""

    prompt: str
    rationale: str
    answer: str


@dataclass(frozen=True)
class Recipe:
    """How a task's rows are shown to the teacher and stored."""

    task: str
    cue: str
    """What the teacher should do with a row, without the form of its reply."""
    demonstrations: tuple[Demonstration, ...]
    check: str
    """One of `CHECKS`."""
    old_instruction: str = ""
    """Head of the prompts that the data has."""
    new_instruction: str = ""
    """Head of the prompts that are written; empty: the prompt's own stays."""
    line: str = CUE_LINE
    """Last line of written prompts; takes the place of one that ends in a colon. Empty: prompts end as they do."""
    mark: str = _LAST_MARK
    """Between rationale and answer; with `answer_first` between answer and rationale."""
    answer_first: bool = False
    letters: str = ""
    """Options of a task whose answers are single letters, such as "ABC"."""

    def identity(self) -> dict[str, Any]:
        """What decides the conversations and verdicts, as JSON values."""
        return {
            "version": PROMPT_VERSION,
            **{name: value for name, value in vars(self).items() if name != "demonstrations"},
            "demonstrations": [vars(one) for one in self.demonstrations],
        }

    def with_instructions(self, old: str, new: str) -> "Recipe":
        """Say which head of the prompts another one takes the place of."""
        return replace(self, old_instruction=old, new_instruction=new)

    def convert(self, prompt: str) -> str:
        """Turn a prompt into one that asks for reasoning; one that does already comes out as it went in.

        Raises:
            DataError: If it begins with neither instruction, so that two would stand in it.
        """
        body = prompt
        if self.new_instruction:
            for head in (self.new_instruction, self.old_instruction):
                if prompt.startswith(head):
                    body = prompt.removeprefix(head).lstrip("\n")
                    break
            else:
                raise DataError(
                    f"{self.task}: a prompt begins with {prompt[:60]!r}, not with the task's instruction "
                    f"{self.old_instruction!r}. Give the rows another task name (with --metric and --demonstrations)."
                )
        if self.line and not body.endswith("\n" + self.line):
            above, newline, last = body.rpartition("\n")
            body = f"{above if newline and last.rstrip().endswith((':', '：')) else body}\n{self.line}"
        return self.new_instruction + body

    def gold(self, answer: str) -> str:
        """Take the answer alone out of a row's answer, which may hold a letter and a text, or reasoning."""
        if holds_reasoning(answer):
            return final_answer(answer, self.letters)
        return _first_line(answer) if self.letters else answer.strip()

    def joined(self, rationale: str, gold: str) -> str:
        """Put a stored answer together."""
        return f"{gold}{self.mark}{rationale}" if self.answer_first else f"{rationale}{self.mark}{gold}"


def with_letters(recipe: Recipe, answers: Sequence[str]) -> Recipe:
    """Note the options if all answers are, or begin with a line that is, a single letter."""
    firsts = (final_answer(one) if holds_reasoning(one) else _first_line(one) for one in answers)
    return replace(recipe, letters=option_letters(firsts))


def conversation(recipe: Recipe, prompt: str, gold: str, attempt: int) -> list[dict[str, str]]:
    """Write the messages that ask for one rationale.

    Args:
        recipe: From `ready`.
        prompt: Of the row, converted.
        gold: Shown under the rule "given" only.
        attempt: From 0. Each has the demonstrations in another order, `NUM_ORDERS` in all: an endpoint that decodes
            greedily whatever the temperature, as some do, would otherwise repeat the rejected reply word for word.
    """
    messages = [{"role": "system", "content": f"{recipe.cue}\n\n{_form(recipe)}"}]
    orders = list(itertools.permutations(recipe.demonstrations))
    for shown in orders[attempt % len(orders)]:
        reply = shown.rationale if recipe.check == "given" else f"{shown.rationale}{_asked_mark(recipe)}{shown.answer}"
        messages += [
            {"role": "user", "content": _question(recipe, shown.prompt, shown.answer)},
            {"role": "assistant", "content": reply},
        ]
    return [*messages, {"role": "user", "content": _question(recipe, prompt, gold)}]


def judged(recipe: Recipe, text: str, gold: str, *, cut_off: bool) -> tuple[str, str]:
    """Check a reply.

    Args:
        recipe: With `letters`, if the task has them.
        text: What the teacher wrote.
        gold: The answer alone (`Recipe.gold`).
        cut_off: Whether the reply reached its token limit.

    Returns:
        The rationale and "", or "" and why the reply is rejected.
    """
    text = _ECHO.sub("", text.strip(), count=1) if _ECHO.match(text.strip()) else text.strip()
    if not text:
        return "", "empty reply"
    if cut_off:
        return "", "cut off at the token limit"
    answered = holds_reasoning(text)
    if recipe.check == "answer" and not answered:
        return "", "no answer mark"
    if answered and final_answer(text, recipe.letters) != gold:
        return "", "wrong answer"
    rationale = _MARKS.split("\n" + text, maxsplit=1)[0].strip()
    if not rationale or rationale == gold:
        return "", "no reasoning"
    if recipe.check == "given" and _SPEAKS_OF_GIFT.search(rationale):
        return "", "speaks of the given answer"
    if recipe.check == "given" and len(gold) >= _LONG_ANSWER and gold in rationale:
        return "", "repeats the answer"
    if final_answer(recipe.joined(rationale, gold), recipe.letters) != gold:
        return "", "does not split back"
    return rationale, ""


def recipe_of(task: str, metric: str, given: Any, place: str) -> Recipe:
    """Make a task's recipe of what `place` says about it over what is built in.

    Args:
        task: Its name.
        metric: Decides the rule.
        given: None; a list of three demonstrations; or an object with `demonstrations` and any of `cue`, `line`,
            `mark`, `answer_first`, `check`.
        place: File and key, for messages.

    Raises:
        CapabilityError: If demonstrations are missing or wrong.
    """
    facts = {"demonstrations": given} if isinstance(given, list) else given or {}
    known = ("demonstrations", "cue", "line", "mark", "answer_first", "check")
    if not isinstance(facts, Mapping) or (unknown := sorted(set(facts) - set(known))):
        said = f"has unknown keys {unknown}" if isinstance(facts, Mapping) else f"is {given!r:.60}"
        raise CapabilityError(f"{place} {said}; write a list of demonstrations, or an object with {', '.join(known)}.")
    facts = {**_built_in().get(task, {}), **facts}
    if "demonstrations" not in facts:
        raise CapabilityError(
            f"{task} has no built-in demonstrations. Write {NUM_DEMONSTRATIONS} into a file and name it with "
            f'--demonstrations: {{"{task}": [{{"prompt": ..., "rationale": ..., "answer": ...}}, ...]}}.'
        )
    wrong = [key for key in ("cue", "line", "mark", "check") if key in facts and not isinstance(facts[key], str)]
    if wrong or not isinstance(facts.get("answer_first", False), bool):
        key = wrong[0] if wrong else "answer_first"
        raise CapabilityError(f"{place}: {key}={facts[key]!r} has a wrong type.")
    check = facts.get("check", _CHECK_OF.get(metric, "given"))
    if check not in CHECKS:
        raise CapabilityError(f"{place}: check={check!r} is none of {', '.join(CHECKS)}.")
    recipe = Recipe(
        task=task,
        cue=facts.get("cue", "You solve the task that the user's message states. Say what decides its answer."),
        demonstrations=_demonstrations(facts["demonstrations"], place),
        check=check,
        **{key: facts[key] for key in ("line", "mark", "answer_first") if key in facts},
    )
    if final_answer(recipe.joined("why", "x")) != "x":
        raise CapabilityError(
            f"{place}: mark={recipe.mark!r} with answer_first={recipe.answer_first} cannot be found again; use "
            f"'\\nAnswer:' or '\\n回答：' before an answer, {ANSWER_FIRST!r} behind one."
        )
    return recipe


def _demonstrations(given: Any, place: str) -> tuple[Demonstration, ...]:
    rows = given if isinstance(given, list) else []
    keys = ("prompt", "rationale", "answer")
    good = [
        row
        for row in rows
        if isinstance(row, Mapping) and all(isinstance(row.get(key), str) and row[key].strip() for key in keys)
    ]
    if len(good) < len(rows):
        number = next(number for number, row in enumerate(rows, start=1) if row not in good)
        raise CapabilityError(f"{place}: demonstration {number} needs the texts {', '.join(keys)}, none of them empty.")
    if len(good) != NUM_DEMONSTRATIONS:
        raise CapabilityError(f"{place}: {len(good)} demonstrations; a task needs {NUM_DEMONSTRATIONS} of them.")
    return tuple(Demonstration(**{key: row[key] for key in keys}) for row in good)


def _built_in() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("demonstrations.json").read_text(encoding="utf-8"))


def ready(recipe: Recipe, answers: Sequence[str], test: Sequence[Example]) -> Recipe:
    """Fit a recipe to the data: options, demonstrations in the form of the rows.

    Raises:
        CapabilityError: If a demonstration is a test row or does not lead to its own answer.
    """
    recipe = with_letters(recipe, answers)
    test_prompts = {recipe.convert(row.prompt) for row in test}
    shown = []
    for number, one in enumerate(recipe.demonstrations, start=1):
        fitted = Demonstration(recipe.convert(one.prompt), one.rationale.strip(), recipe.gold(one.answer))
        if fitted.prompt in test_prompts:
            raise CapabilityError(f"{recipe.task}: demonstration {number} is a row of test.json; write another one.")
        text = fitted.rationale if recipe.check == "given" else recipe.joined(fitted.rationale, fitted.answer)
        if recipe.check == "answer" and recipe.answer_first:
            text = fitted.rationale + _LAST_MARK + fitted.answer
        if reason := judged(recipe, text, fitted.answer, cut_off=False)[1]:
            raise CapabilityError(f"{recipe.task}: demonstration {number} would be rejected itself ({reason}).")
        shown.append(fitted)
    return replace(recipe, demonstrations=tuple(shown))


def _asked_mark(recipe: Recipe) -> str:
    """The mark in the teacher's reply, which always has the answer last."""
    return _LAST_MARK if recipe.answer_first else recipe.mark


def _question(recipe: Recipe, prompt: str, gold: str) -> str:
    if recipe.check == "answer":
        return prompt
    return f"{prompt}\n\n[The answer to arrive at]\n{gold}\n\n[Write the reasoning only]"


def _form(recipe: Recipe) -> str:
    """Say what a reply should look like."""
    if recipe.check == "given":
        return (
            "The answer to arrive at stands below the task. Write only the reasoning that leads from the input to it, "
            "as if you had not seen it: no heading, no answer at the end, no word about having been told."
        )
    options = f", one of {', '.join(recipe.letters)}" if recipe.letters else ""
    shown = _asked_mark(recipe).strip("\n")
    return (
        f"Write the reasoning first. Then start a new line with `{shown}` and put the bare answer{options} right "
        "behind it, without bold type, period or anything after it."
    )


def _first_line(text: str) -> str:
    lines = text.strip().split("\n")
    return lines[0].strip()
