"""The same test rows after every stage, answers below each other."""

import json

import pytest
from doubles import Recorder, two_tasks
from logger_doubles import factory, folders
from wandb_file import read

from trace_hydra.callbacks.samples import COLUMNS, AnswerSamples, chosen
from trace_hydra.loggers import close_loggers, open_loggers
from trace_hydra.metrics.continual import ScoreMatrix


def test_rows_are_spread_evenly():
    """3 of 10: 0, 10/3, 20/3 rounded down."""
    assert chosen(10, 3) == [0, 3, 6] and chosen(2, 3) == [0, 1] and chosen(5, 1) == [0]
    assert chosen(0, 3) == [] and chosen(5, 0) == [] and chosen(5, -1) == []


def records(answer: str, count: int, score: float) -> list[dict]:
    return [
        {"id": f"r{place}", "prediction": f"{answer}{place}", "reference": "gold", "scores": {"score": score}}
        for place in range(count)
    ]


def replay(run, loggers, **changes) -> None:
    """Rows 0 to 2 of the plan; answers say after which row they were given."""
    one = AnswerSamples(**{"rows": 2, "characters": 20, **changes})
    one.on_run_start(run, loggers)
    for row in range(3):
        if row:
            one.on_stage_start(run.stages[row - 1])
        for at, task, count in run.cells:
            if at == row:
                prompts = [f"prompt {place} of {task}" for place in range(count)]
                one.on_answers(row, task, prompts, records(f"after{row}-", count, 10.0 * row))
        one.on_row_scored(row, ScoreMatrix(run.tasks))


def tables(run) -> list[tuple[int, dict]]:
    (folder,) = folders(run)
    rows = [row for row in read(folder)["history"] if "samples/answers/path" in row]
    return [
        (row["progress/stage"], json.loads((folder / "files" / row["samples/answers/path"]).read_text()))
        for row in rows
    ]


def test_an_answer_is_seen_over_the_stages(tmp_path, no_account):
    """Cells of the plan: row 0 A (10 rows) and B (20), row 1 A, row 2 A and B; 2 rows of each task."""
    run = two_tasks(tmp_path)
    loggers = open_loggers([factory()], run)
    replay(run, loggers)
    close_loggers(loggers, exit_code=0)
    found = tables(run)
    assert [(stage, len(table["data"])) for stage, table in found] == [(0, 4), (1, 6), (2, 10)]
    last = found[-1][1]
    assert tuple(last["columns"]) == COLUMNS
    assert last["data"][:3] == [
        ["A", "r0", "before", 0.0, "after0-0", "gold", "prompt 0 of A"],
        ["A", "r0", "1 A", 10.0, "after1-0", "gold", "prompt 0 of A"],
        ["A", "r0", "2 B", 20.0, "after2-0", "gold", "prompt 0 of A"],
    ]
    assert [line[:3] for line in last["data"][6:]] == [
        *([["B", "r0", "before"], ["B", "r0", "2 B"]]),
        *([["B", "r10", "before"], ["B", "r10", "2 B"]]),
    ]


def test_a_run_that_goes_on_logs_each_row_once(tmp_path, no_account):
    run = two_tasks(tmp_path)
    for _ in range(2):
        loggers = open_loggers([factory()], run)
        replay(run, loggers)
        close_loggers(loggers, exit_code=0)
    logged = [
        row["progress/stage"]
        for folder in folders(run)
        for row in read(folder)["history"]
        if "samples/answers/path" in row
    ]
    assert logged == [0, 1, 2]


def test_rows_heard_again_after_memory_ran_out_stand_once(tmp_path, no_account):
    run, one = two_tasks(tmp_path), AnswerSamples(rows=1, characters=20)
    loggers = open_loggers([factory()], run)
    one.on_run_start(run, loggers)
    for attempt in range(2):
        one.on_answers(0, "A", ["p"], records(f"{attempt}-", 1, 0.0))
        one.on_stage_start(run.stages[0])
        if attempt == 0:
            one.on_answers(2, "A", ["p"], records("lost-", 1, 0.0))
    one.on_answers(1, "A", ["p"], records("new-", 1, 50.0))
    one.on_row_scored(1, ScoreMatrix(run.tasks))
    close_loggers(loggers, exit_code=0)
    ((_, table),) = tables(run)
    assert [(line[2], line[4]) for line in table["data"]] == [("before", "1-0"), ("1 A", "new-0")]


@pytest.mark.parametrize(
    "hostile", ["=cmd|' /C calc'!A1", "<script>alert(1)</script>", "\x1b[31m\x00", "\ud800 half", "x" * 99]
)
def test_hostile_answers_are_stored_as_text(hostile, tmp_path, no_account):
    """They stay as they are, but for halves of surrogate pairs, which no file can hold, and what is too long."""
    run, one = two_tasks(tmp_path), AnswerSamples(rows=1, characters=40)
    loggers = open_loggers([factory()], run)
    one.on_run_start(run, loggers)
    one.on_answers(0, "A", [hostile], [{**records("", 1, 0.0)[0], "prediction": hostile}])
    one.on_row_scored(0, ScoreMatrix(run.tasks))
    close_loggers(loggers, exit_code=0)
    ((_, table),) = tables(run)
    expected = hostile.replace("\ud800", "?") if len(hostile) < 40 else "x" * 40 + " …"
    assert table["data"][0][4] == table["data"][0][6] == expected


def test_other_loggers_get_no_table_and_no_rows_no_table(tmp_path, no_account):
    recorder = Recorder()
    run = two_tasks(tmp_path)
    replay(run, [recorder])
    assert recorder.entries == []
    loggers = open_loggers([factory()], run)
    replay(run, loggers, rows=0)
    close_loggers(loggers, exit_code=0)
    assert tables(run) == []
