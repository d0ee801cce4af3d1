"""What the teacher is asked and which of its replies are taken, without a teacher."""

import json
from dataclasses import replace
from typing import Any

import pytest

from trace_hydra import rationales
from trace_hydra.capability.teacher import Recipe, conversation, judged, ready, recipe_of
from trace_hydra.data.reasoning import final_answer
from trace_hydra.data.task import TRACE_TASKS, Example
from trace_hydra.errors import CapabilityError, DataError

# How the plain prompts of the release end (protocol reference, 2.1) and what stands between instruction and body.
TAILS = {
    "C-STANCE": ("", "\n态度："),
    "FOMC": ("", "\nStance:"),
    "MeetingBank": ("", "\nSummary:"),
    "Py150": ("", ""),
    "ScienceQA": ("\n", "\nAnswer:"),
    "NumGLUE-cm": ("", "\nAnswer:"),
    "NumGLUE-ds": ("", "\nAnswer:"),
    "20Minuten": ("\n", "\nSimplification:"),
}
GOLD = {"C-STANCE": "A", "FOMC": "C", "ScienceQA": "B", "NumGLUE-cm": "21", "NumGLUE-ds": "44"}


def recipe(task: str, letters: str = "") -> Recipe:
    spec = TRACE_TASKS[task]
    made = recipe_of(task, spec.metric, None, "built-in")
    made = made.with_instructions(spec.instruction, rationales._reasoning_instructions()[task])
    return replace(made, letters=letters)


def official(shared_data, task: str, split: str) -> list[dict[str, str]]:
    return json.loads((shared_data / "trace_reasoning" / task / f"{split}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("task", TRACE_TASKS)
def test_plain_prompts_become_the_releases(task, shared_data):
    """Each official reasoning prompt, taken back to the plain template, is converted into itself again.

    Train rows only: 20Minuten's test rows have one newline more. MeetingBank's doubled "Reasoning:" counts once.
    """
    made = recipe(task)
    gap, tail = TAILS[task]
    for row in official(shared_data, task, "train"):
        wanted = row["prompt"].replace("Reasoning:Reasoning:", "Reasoning:")
        body = wanted.removeprefix(made.new_instruction)
        if made.line:
            body = body.removesuffix("\n" + made.line)
        plain = made.old_instruction + gap + body + tail
        assert made.convert(plain) == wanted
        assert made.convert(row["prompt"]) == wanted


@pytest.mark.parametrize("task", TRACE_TASKS)
def test_stored_answers_have_the_releases_layout(task, shared_data):
    """Reasoning and gold of each official row, put together by us, are the row's answer, keys and mark included."""
    made = ready(recipe(task), [row["answer"] for row in official(shared_data, task, "train")], [])
    for row in official(shared_data, task, "train"):
        gold = made.gold(row["answer"])
        rationale = row["answer"].split(made.mark)[made.answer_first]
        # The release puts a blank before Py150's mark now and then.
        assert made.joined(rationale, gold) == row["answer"].replace(" \nReasoning:", "\nReasoning:").rstrip("\n")
        assert final_answer(made.joined(rationale, gold), made.letters) == gold


@pytest.mark.parametrize("task", TRACE_TASKS)
def test_official_rationales_are_accepted(task, shared_data):
    """What GPT-4 wrote for the release passes our check, all 60 rows of each task."""
    made = ready(recipe(task), [row["answer"] for row in official(shared_data, task, "train")], [])
    reasons = []
    for row in official(shared_data, task, "train"):
        gold = made.gold(row["answer"])
        rationale = row["answer"].split(made.mark)[made.answer_first]
        reply = rationale if made.check == "given" else row["answer"]
        reasons.append(judged(made, reply, gold, cut_off=False)[1])
    assert [reason for reason in reasons if reason] == []


def test_built_in_demonstrations_are_three_for_each_task():
    """They pass the check they demonstrate, have the tasks' templates, and the answers that their sums give."""
    for task, spec in TRACE_TASKS.items():
        letters = {"C-STANCE": "ABC", "FOMC": "ABC", "ScienceQA": "ABCD"}.get(task, "")
        plain = recipe(task)
        assert all(one.prompt.startswith(spec.instruction) for one in plain.demonstrations)
        assert all(one.prompt.endswith(TAILS[task][1] or " <EOL>") for one in plain.demonstrations)
        made = ready(plain, list(letters) or ["text"], [])
        assert len(made.demonstrations) == 3 and made.letters == letters
        assert GOLD.get(task) in (None, *(one.answer for one in made.demonstrations))
        if letters == "ABC":
            assert [one.answer for one in made.demonstrations] == ["A", "B", "C"]


def test_the_teacher_sees_the_answer_only_under_given():
    fomc = ready(recipe("FOMC"), ["A", "B", "C"], [])
    asked = conversation(fomc, "the row", "B", 0)
    assert [message["role"] for message in asked] == ["system", *["user", "assistant"] * 3, "user"]
    assert asked[-1]["content"] == "the row" and "one of A, B, C" in asked[0]["content"]
    assert asked[2]["content"].endswith("easier policy.\nAnswer:A")
    code = ready(recipe("Py150"), ["x = 1"], [])
    asked = conversation(code, "the row", "return secret", 0)
    assert "return secret" in asked[-1]["content"]
    assert "return secret" not in json.dumps(asked[:-1])
    assert asked[2]["content"] == code.demonstrations[0].rationale


def test_each_attempt_reads_differently():
    """Three demonstrations have six orders; cue and row stay in their places."""
    made = ready(recipe("FOMC"), ["A", "B", "C"], [])
    asked = [conversation(made, "the row", "B", attempt) for attempt in range(7)]
    assert len({json.dumps(one) for one in asked}) == 6 and asked[6] == asked[0]
    assert {(one[0]["content"], one[-1]["content"]) for one in asked} == {(asked[0][0]["content"], "the row")}
    answers = [[message["content"][-1] for message in one if message["role"] == "assistant"] for one in asked]
    assert answers[:2] == [["A", "B", "C"], ["A", "C", "B"]]


# task, gold, reply, rationale or reason
REPLIES = [
    ("FOMC", "B", "It tightens.\nAnswer:B", "It tightens."),
    ("FOMC", "B", "Reasoning: It tightens.\nAnswer: B. hawkish", "It tightens."),
    ("FOMC", "B", "It eases.\nAnswer:A", "!wrong answer"),
    ("FOMC", "B", "It tightens, so B.", "!no answer mark"),
    ("FOMC", "B", "Answer:B", "!no reasoning"),
    ("FOMC", "B", "  ", "!empty reply"),
    ("FOMC", "B", "It tightens.\nAnswer:A\nNo,\nAnswer:B", "!wrong answer"),
    ("C-STANCE", "C", "只是通知。\n回答：C", "只是通知。"),
    ("C-STANCE", "C", "只是通知。\n答案:C。", "只是通知。"),
    ("NumGLUE-cm", "44", "11*4 = 44\nAnswer: 44", "11*4 = 44"),
    ("NumGLUE-cm", "44", "11*4 = 44\nAnswer: 44 legs", "!wrong answer"),
    ("NumGLUE-cm", "44", "11*4 = 44\nAnswer:44.0", "!wrong answer"),
    ("Py150", "return x", "It has x, so it returns x.", "It has x, so it returns x."),
    ("Py150", "return x", "It has x.\nAnswer:return x", "It has x."),
    ("Py150", "return x", "It has x.\nAnswer:return y", "!wrong answer"),
    ("Py150", "return x", "return x", "!no reasoning"),
    ("MeetingBank", "A bill.", "The given summary names the bill.", "!speaks of the given answer"),
    ("MeetingBank", "A bill on " + "parks " * 20, "So: A bill on " + "parks " * 20 + "!", "!repeats the answer"),
    ("MeetingBank", "A bill.", "The clerk reads it.", "The clerk reads it."),
    ("20Minuten", "Es brannte.", "A fire is reported.", "A fire is reported."),
]


@pytest.mark.parametrize(("task", "gold", "reply", "wanted"), REPLIES)
def test_which_replies_are_taken(task, gold, reply, wanted):
    made = recipe(task, {"C-STANCE": "ABC", "FOMC": "ABC"}.get(task, ""))
    gold = gold.strip()
    expected = ("", wanted[1:]) if wanted.startswith("!") else (wanted, "")
    assert judged(made, reply, gold, cut_off=False) == expected
    assert judged(made, reply, gold, cut_off=True)[0] == ""


def test_an_answer_that_holds_a_mark_cannot_be_stored():
    """Behind the first mark the splitter would find another answer than the gold one."""
    made = recipe("20Minuten")
    assert judged(made, "Kurz gesagt.", "Er sagt:\nAnswer:Ja", cut_off=False) == ("", "does not split back")


def test_scienceqa_keeps_the_letter_alone():
    made = ready(recipe("ScienceQA"), ["A\nBecause.", "B\nSo."], [])
    assert (made.letters, made.gold("B\nSo."), made.gold("why\nAnswer:B")) == ("AB", "B", "B")


def test_a_foreign_instruction_is_refused():
    with pytest.raises(DataError, match=r"FOMC: a prompt begins with 'Is this dovish"):
        recipe("FOMC").convert("Is this dovish?\nText:\nx\nStance:")


def test_tasks_of_ones_own_get_a_cue_line_once():
    own = Recipe("mine", "Do it.", (), "answer")
    assert own.convert("Sum 1 and 2\nAnswer:") == "Sum 1 and 2\n" + own.line
    assert own.convert("Sum 1 and 2") == "Sum 1 and 2\n" + own.line
    assert own.convert(own.convert("Sum 1 and 2")) == own.convert("Sum 1 and 2")


ROW = {"prompt": "1 + 1\nAnswer:", "rationale": "It is 1 more than 1.", "answer": "2"}
BAD: list[tuple[Any, str]] = [
    (None, "mine has no built-in demonstrations"),
    ([ROW, ROW], "here: 2 demonstrations; a task needs 3"),
    ([ROW, ROW, {**ROW, "rationale": " "}], "demonstration 3 needs the texts"),
    ("three", "here is 'three'"),
    ({"demonstrations": [ROW] * 3, "marks": "x"}, r"unknown keys \['marks'\]"),
    ({"demonstrations": [ROW] * 3, "mark": "\nThus:"}, "mark='.nThus:' with answer_first=False"),
    ({"demonstrations": [ROW] * 3, "check": "maybe"}, "check='maybe' is none of"),
    ({"demonstrations": [ROW] * 3, "cue": 3}, "cue=3 has a wrong type"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_bad_demonstrations_are_refused(given, message):
    assert len(recipe_of("mine", "accuracy", [ROW] * 3, "here").demonstrations) == 3
    with pytest.raises(CapabilityError, match=message):
        recipe_of("mine", "accuracy", given, "here")


def test_demonstrations_must_not_be_test_rows():
    made = recipe_of("mine", "accuracy", [ROW] * 3, "here")
    test = [Example("test-0", ROW["prompt"], "2")]
    assert ready(made, ["2"], []).demonstrations[0].prompt.endswith("Reasoning:")
    with pytest.raises(CapabilityError, match=r"demonstration 1 is a row of test\.json"):
        ready(made, ["2"], test)
