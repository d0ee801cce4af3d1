"""RCL: final answers are found in every layout, and what is trained on is what is asked for."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import compose_config, run_tiny

from trace_hydra import build
from trace_hydra.data.reasoning import final_answer, holds_reasoning, option_letters
from trace_hydra.data.task import TRACE_TASKS, Example
from trace_hydra.errors import ConfigError, DataError
from trace_hydra.methods.rcl import ReasoningAugmented
from trace_hydra.prepare import prepare

ORDER = "task_order=[FOMC,NumGLUE-cm,20Minuten]"
SUMMARY = "Therefore, the summary of the meeting transcripts is:\n"

# text, options of a task with letters, final answer by ours, by SEEKR's rules (re_eval.py:21-39)
CASES = [
    ("It tightens.\nAnswer:B", "ABC", "B", "B"),
    ("It tightens.\nAnswer: B. hawkish", "ABC", "B", "B"),
    ("It tightens.\nAnswer: The answer is B", "ABC", "B", "T"),
    ("It tightens.\nAnswer:hawkish", "ABC", "hawkish", "h"),
    ("It tightens.\nAnswer:E", "ABC", "E", "E"),
    ("It tightens.\nAnswer：B", "ABC", "B", "B"),
    ("B", "ABC", "B", "B"),
    ("B. hawkish", "ABC", "B", "B"),
    ("Because of B", "ABC", "Because of B", "B"),
    ("The stance is C.", "ABC", "The stance is C.", "T"),
    ("", "ABC", "", " "),
    ("Answer:C", "ABC", "C", "A"),
    ("Reasoning: it is calm.\nAnswer:C", "ABC", "C", "C"),
    ("one\nAnswer:A\nText: more\nAnswer:B", "ABC", "A", "A"),
    ("作者反对。\n回答：B", "ABC", "B", "B"),
    ("作者反对。\n回答:B", "ABC", "B", "B"),
    ("作者反对。\n答案：C。", "ABC", "C", "C"),
    ("回答：A", "ABC", "A", "回"),
    ("20 / 2 = 10.\nAnswer:10", "", "10", "10"),
    ("20 / 2 = 10.\n\nAnswer: 10\n", "", "10", "10"),
    ("20 / 2 = 10.", "", "20 / 2 = 10.", "20 / 2 = 10."),
    ("Why.\nAnswer:", "", "", " "),
    ("return dst \nReasoning:It copies.", "", "return dst", "return dst"),
    ("return dst", "", "return dst", "return dst"),
    ("x = 1 \nReasoning:a\nAnswer:2", "", "x = 1", "x = 1"),
    ("Reasoning: no answer", "", "", "Reasoning: no answer"),
    (f"They met. {SUMMARY}The council met.\n", "", "The council met.", f"They met. {SUMMARY}The council met."),
    ("Kurz.\nAnswer:Der Rat sagt：Ja.\nEr geht.\n", "", "Der Rat sagt：Ja.\nEr geht.", "Der Rat sagt:Ja.\nEr geht."),
    ("\nReasoning:It copies.", "", "", " "),
]


@pytest.mark.parametrize(("text", "letters", "ours", "seekr"), CASES)
def test_final_answer(text, letters, ours, seekr):
    assert final_answer(text, letters) == ours
    assert final_answer(text, letters, "re_eval") == seekr


def test_letters_are_read_off_the_answers():
    assert option_letters(["B", "A", "B", " C\n"]) == "ABC"
    assert [option_letters(one) for one in (["A", "10"], ["A", "AB"], ["a"], [])] == ["", "", "", ""]


# How the release's train answers are put together (protocol reference, 2.3): separator, which side is the answer.
LAYOUTS = {task: ("\nAnswer:", 1) for task in TRACE_TASKS} | {
    "C-STANCE": ("\n回答：", 1),
    "MeetingBank": (SUMMARY, 1),
    "Py150": ("\nReasoning:", 0),
}


@pytest.mark.parametrize("task", LAYOUTS)
def test_official_train_answers_split_into_the_gold(task, shared_data):
    """All 60 rows of each task; SEEKR's rules leave MeetingBank's reasoning in all of its 60 summaries."""
    rows = json.loads((shared_data / "trace_reasoning" / task / "train.json").read_text(encoding="utf-8"))
    separator, side = LAYOUTS[task]
    gold = [row["answer"].split(separator)[side].strip() for row in rows]
    letters = {"C-STANCE": "ABC", "FOMC": "ABC", "ScienceQA": "ABCD"}.get(task, "")
    assert option_letters(gold) == letters and len(rows) == 60
    assert all(holds_reasoning(row["answer"]) for row in rows)
    share = sum(final_answer(row["answer"], letters) == one for row, one in zip(rows, gold, strict=True)) / 60
    seekr = sum(final_answer(row["answer"], letters, "re_eval") == one for row, one in zip(rows, gold, strict=True))
    seekr /= 60
    assert share == 1.0
    assert seekr == (0.0 if task == "MeetingBank" else 1.0)


@pytest.mark.parametrize("task", LAYOUTS)
def test_official_test_answers_are_left_alone(task, shared_data):
    """A model that answers as the test rows do is scored on just that."""
    rows = json.loads((shared_data / "trace_reasoning" / task / "test.json").read_text(encoding="utf-8"))
    letters = {"C-STANCE": "ABC", "FOMC": "ABC", "ScienceQA": "ABCD"}.get(task, "")
    assert [final_answer(row["answer"], letters) for row in rows] == [row["answer"].strip() for row in rows]


def method_with(*overrides: str) -> Any:
    return build.validate(compose_config(["model=tiny", "method=rcl", *overrides])).method


def test_mini_rows_are_built_and_split_back():
    """Rationale, mark, answer; ScienceQA keeps the letter alone; tasks without rationales stay as they are."""
    parts = build.validate(compose_config(["model=tiny", "method=rcl", "data.rows.train=12"]))
    data = parts.data.load(list(TRACE_TASKS), seed=0)
    method: Any = parts.method
    for name, task in data.tasks.items():
        view: Any = SimpleNamespace(name=name, train=task.train, language=task.spec.language)
        letters = {"C-STANCE": "ABC", "FOMC": "ABC", "ScienceQA": "ABCD"}.get(name, "")
        for row, built in zip(task.train, method.rows(view), strict=True):
            assert (built.id, built.prompt) == (row.id, row.prompt)
            if name in ("MeetingBank", "Py150", "20Minuten"):
                assert built == row
                continue
            gold = row.answer[0] if letters else row.answer
            mark = "\n回答：" if name == "C-STANCE" else "\nAnswer:"
            assert built.answer == f"{row.rationale}{mark}{gold}"
            for splitter in ("ours", "re_eval"):
                assert final_answer(built.answer, letters, splitter) == gold


def test_rationale_counts_before_marks():
    """Per row: a rationale is built; reasoning in the answer is kept; neither is plain."""
    rows = (Example("0", "p\nQ:", "1", "one"), Example("1", "p\nQ:", "two\nAnswer:2"), Example("2", "p\nQ:", "3"))
    view: Any = SimpleNamespace(train=rows, language="en")
    answers = [row.answer for row in method_with().rows(view)]
    assert answers == ["one\nAnswer:1", "two\nAnswer:2", "3"]


def test_required_refuses_bare_rows():
    rows = (Example("0", "p", "1", "one"), Example("1", "p", "two\nAnswer:2"), Example("2", "p", "3"))
    task: Any = SimpleNamespace(name="mine", train=rows, options=())
    assert method_with().row_problems(task) == []
    (problem,) = method_with("method.rationales=required").row_problems(task)
    assert problem.startswith("mine: 1 of 3 train rows") and "(the first: 2)" in problem


def test_answers_with_reasoning_are_not_chosen_among_options():
    """FOMC's rows of data=mini have rationales; without them the plain answer is trained, and could be chosen."""
    plain, reasoned = Example("0", "p", "A"), Example("1", "p", "B", "because")
    view: Any = SimpleNamespace(name="mine", train=(plain,), options=("A", "B"))
    assert method_with().row_problems(view) == []
    view.train = (plain, reasoned)
    (problem,) = method_with().row_problems(view)
    assert problem.startswith("mine: ") and "train row 1" in problem and "protocol.closed_answers=generate" in problem
    overrides = ["debug=smoke", "method=rcl", "task_order=[FOMC]", "protocol.closed_answers=log_likelihood"]
    config = compose_config(overrides)
    with pytest.raises(DataError, match=r"method=rcl: FOMC: .*protocol\.closed_answers"):
        prepare(config, build.validate(config), Path("nowhere"))


CUES = ["method.cue.default='Give your reasoning.\nReasoning:'", "method.cue.zh='推理：'"]


def test_training_and_answering_ask_alike(tmp_path):
    """With a cue: the last line of the prompt becomes it, in both; tasks without rationales keep their prompt."""
    run = run_tiny(tmp_path, ["method=rcl", ORDER, "+" + CUES[0], "+" + CUES[1]])
    asked = []
    run.ctx.generate = lambda prompts, limit, **_: asked.extend(prompts) or ["why\nAnswer:B"] * len(prompts)
    cue = "Give your reasoning.\nReasoning:"
    for task in ("FOMC", "20Minuten"):
        view = run.views[task]
        asked.clear()
        run.method.answer(run.ctx, [row.prompt for row in view.train], view)
        assert asked == [row.prompt for row in run.method.rows(view)]
        ends = [prompt.endswith(cue) for prompt in asked]
        assert all(ends) if task == "FOMC" else not any(ends)
    (first, *_) = run.views["FOMC"].train
    assert first.prompt.endswith("\nStance:")
    assert run.method.rows(run.views["FOMC"])[0].prompt == first.prompt.removesuffix("Stance:") + cue


def test_answer_is_split_and_gets_room(tmp_path):
    """The longest trained answer and an end token fit, whatever the task's own limit; no stop string cuts reasoning."""
    run = run_tiny(tmp_path, ["method=rcl", ORDER, "protocol.max_answer_tokens=300", "method.max_new_tokens=1000"])
    called = []
    run.ctx.generate = lambda prompts, limit, **given: called.append((limit, given["stop"])) or ["a\nb\nAnswer:7\n"]
    view = run.views["NumGLUE-cm"]
    assert run.method.answer(run.ctx, ["x"], view) == ["7"]
    longest = max(len(f"{row.rationale}\nAnswer:{row.answer}".encode()) for row in view.train)  # tokens are bytes
    assert called == [(longest + 1, ())] and longest > view.max_new_tokens and view.stop == ("\n",)
    assert run.method.answer(run.ctx, ["x"], run.views["20Minuten"]) == ["a\nb\nAnswer:7\n"]  # nothing to split
    assert called[1] == (run.views["20Minuten"].max_new_tokens, run.views["20Minuten"].stop)


@pytest.mark.parametrize("splitter", ["ours", "re_eval"])
def test_official_rows_train_as_they_are(splitter, shared_data, tmp_path):
    """Rows of the Reasoning variant, prompts included; Py150 keeps its limit and stops, for its answer comes first."""
    # The first of the two, which the second replaces, tells run_tiny that these rows are no mini rows.
    data = ["data=trace", "data=trace_reasoning", f"paths.data={shared_data / 'trace_reasoning'}", "data.limit.train=6"]
    tiny = [f"method.splitter={splitter}", "task_order=[C-STANCE,Py150]", "data.limit.test=2"]
    run = run_tiny(tmp_path, ["method=rcl", "method.rationales=required", *data, *tiny])
    assert run.results["complete"]
    called = []
    run.ctx.generate = lambda prompts, limit, **given: called.append((limit, given["stop"])) or ["x \nReasoning:y"]
    for view in run.views.values():
        assert run.method.rows(view) == list(view.train)
    assert run.method.answer(run.ctx, ["p"], run.views["Py150"]) == ["x"]
    assert called == [(run.views["Py150"].max_new_tokens, run.views["Py150"].stop)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rationales", "some"),
        ("splitter", "x"),
        ("max_new_tokens", 0),
        ("cue", {"zh": "x"}),
        ("answer_mark", {"en": "x"}),
    ]
    + [("answer_mark", {"default": mark}) for mark in ("\nThus:", "Answer:", " ")],
)
def test_bad_values_are_refused(key, value):
    good: dict[str, Any] = {
        "rationales": "auto",
        "answer_mark": {"default": "\nAnswer:"},
        "cue": None,
        "splitter": "re_eval",
        "max_new_tokens": 8,
    }
    ReasoningAugmented(**good)
    with pytest.raises(ConfigError, match=f"method.{key}"):
        ReasoningAugmented(**{**good, key: value})
