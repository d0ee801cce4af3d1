"""Closed sets of answers: what tasks declare, what prompts list, how options become tokens."""

import json
import re

import pytest
from conftest import compose_config

from trace_hydra.data.encode import Encoder
from trace_hydra.data.options import closed_options, option_problems, options_of
from trace_hydra.data.task import LETTERED, TRACE_TASKS, Example, Task, TaskSpec, task_spec
from trace_hydra.errors import ConfigError, DataError
from trace_hydra.models.tiny import Tiny

QUESTION = "Question:\nIs it?\n\nChoices:\nA. yes\nB. no, A. is wrong\nC. both\n\nAnswer:"


@pytest.fixture(scope="module")
def tokenizer():
    node = compose_config(["model=tiny"]).model
    return Tiny(**{key: value for key, value in node.items() if not key.startswith("_")}).load_tokenizer()


def encoder(tokenizer, max_answer_tokens: int = 8) -> Encoder:
    return Encoder(
        tokenizer,
        prompt="raw",
        truncation="middle",
        special_tokens="text",
        max_prompt_tokens=100,
        max_answer_tokens=max_answer_tokens,
    )


def task_of(prompt: str, answer: str, **facts) -> Task:
    rows = (Example("test-0", prompt, answer),)
    return Task(TaskSpec("Mine", **{"metric": "accuracy", "max_new_tokens": 4, **facts}), rows, rows, rows)


@pytest.mark.parametrize(
    ("prompt", "letters"),
    [
        (QUESTION, "ABC"),
        (f"{QUESTION}A\n\nQuestion:\nAnother?\n\nChoices:\nA. 1\nB. 2\n\nAnswer:", "AB"),  # behind a demonstration
        ("A. one\nC. three\nB. two", "AB"),
        ("B. two\nA. one", "A"),
        ("A.one\nB)two", ""),
        ("", ""),
    ],
)
def test_letters_that_a_prompt_lists(prompt, letters):
    assert "".join(options_of(prompt, LETTERED)) == letters
    assert options_of(prompt, ("x", "y")) == ("x", "y")


def test_which_tasks_are_closed():
    chosen = {name: closed_options(spec, {"closed_answers": "log_likelihood"}) for name, spec in TRACE_TASKS.items()}
    letters = ("A", "B", "C")
    assert {name: options for name, options in chosen.items() if options} == {
        "C-STANCE": letters, "FOMC": letters, "ScienceQA": LETTERED
    }  # fmt: skip
    assert not any(closed_options(spec, {"closed_answers": "generate"}) for spec in TRACE_TASKS.values())
    assert not any(closed_options(spec, {}) for spec in TRACE_TASKS.values())  # a protocol of before
    reasoned = task_spec("FOMC", {"FOMC": {"splitter": "ours", "letters": "ABC"}})
    assert closed_options(reasoned, {"closed_answers": "log_likelihood"}) == ()


def test_a_task_declares_options_of_its_own():
    own = {"Mine": {"metric": "accuracy", "options": ["yes", "no"]}, "FOMC": {"options": None}}
    assert task_spec("Mine", own).options == ("yes", "no") and task_spec("FOMC", own).options == ()


@pytest.mark.parametrize(
    ("metric", "options", "said"),
    [
        ("accuracy", ["yes"], "at least two"),
        ("accuracy", ["yes", "yes "], "none twice"),
        ("accuracy", ["yes", " "], "none empty"),
        ("accuracy", [True, False], "YAML reads yes and no otherwise"),
        ("accuracy", "letters", "lettered"),
        ("first_character", ["A", "BC"], "one character"),
    ],
)
def test_options_that_cannot_be(metric, options, said):
    with pytest.raises(ConfigError, match=rf"data\.tasks\.Mine\.options=.*{said}"):
        task_spec("Mine", {"Mine": {"metric": metric, "options": options}})


def test_options_are_encoded_as_answers_are(tokenizer):
    """A byte a token; the end token only where an option begins another, there behind all."""
    made = encoder(tokenizer)
    ids = {text: tuple(made.text_ids([text])[0]) for text in ("A", "AB", "C", "no", "态")}
    assert made.options(["A", "C", "no", "态"]) == [ids["A"], ids["C"], ids["no"], ids["态"]]
    end = tokenizer.eos_token_id
    assert made.options(["A", "AB", "C"]) == [(*ids["A"], end), (*ids["AB"], end), (*ids["C"], end)]
    (row,) = made.pairs([Example("train-0", "p", "AB")], "")
    assert made.options(["A", "AB"])[1] == tuple(row.ids[row.num_prompt :])  # what training has behind the prompt


@pytest.mark.parametrize("options", [["A", ""], ["A", "123456789"]])
def test_options_without_tokens_or_with_too_many(tokenizer, options):
    with pytest.raises(DataError, match=r"protocol\.max_answer_tokens=8"):
        encoder(tokenizer).options(options)


def test_options_that_a_tokenizer_does_not_tell_apart():
    """A tokenizer that knows neither: both are its unknown token."""

    def unknown(texts, **_):
        return {"input_ids": [[0] for _ in texts] if isinstance(texts, list) else [0]}

    with pytest.raises(DataError, match="tokens of their own"):
        encoder(unknown).options(["甲", "乙"])


@pytest.mark.parametrize(
    ("prompt", "answer", "facts", "said"),
    [
        ("Which?", "A", {"options": LETTERED}, r"1 test rows \(test-0\) list no lines"),
        (QUESTION, "D", {"options": LETTERED}, "test-0's 'D' is none of A, B, C"),
        (QUESTION, "B\nBecause.", {"options": LETTERED}, "test-0's 'B.nBecause"),
        ("p", "yes", {"options": ("yes", "never")}, "has 5 tokens, its answers at most 4"),
        ("p", "yes", {"options": ("yes", "never ever")}, "max_answer_tokens=8"),
    ],
)
def test_rows_that_cannot_be_answered_so_are_named(tokenizer, prompt, answer, facts, said):
    task = task_of(prompt, answer, **facts)
    (found,) = option_problems(task, task.spec.options, encoder(tokenizer), 4)
    assert found.startswith("Mine: ") and re.search(said, found), found


def test_rows_that_can(tokenizer):
    for task in (
        task_of(QUESTION, " B\n", options=LETTERED),
        task_of(QUESTION, "B\nBecause.", options=LETTERED, metric="first_character"),
        task_of("p", "anything"),
    ):
        assert list(option_problems(task, task.spec.options, encoder(tokenizer), 4)) == []


def test_real_rows(shared_data, tokenizer):
    """All test rows of the samples have their answer among their options."""
    for name, spec in TRACE_TASKS.items():
        rows = json.loads((shared_data / "trace" / name / "test.json").read_text())
        test = tuple(Example(f"test-{at}", row["prompt"], row["answer"]) for at, row in enumerate(rows))
        task = Task(spec, test, test, test)
        assert list(option_problems(task, spec.options, encoder(tokenizer), spec.max_new_tokens)) == []
        if spec.options == LETTERED:
            assert len({options_of(row.prompt, LETTERED) for row in test}) > 1
