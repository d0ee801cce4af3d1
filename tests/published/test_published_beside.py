"""Runs beside published rows: which rows, which parts differ, which numbers may be held against each other."""

import pytest

from trace_hydra import published
from trace_hydra.published.conditions import ORDERS
from trace_hydra.published.records import Condition

ROWS = {"C-STANCE": 2000, "FOMC": 496, "MeetingBank": 692, "Py150": 2000, "ScienceQA": 2000, "NumGLUE-cm": 81,
        "NumGLUE-ds": 325, "20Minuten": 200}  # fmt: skip
SCRIPTS = dict(zip(ORDERS["1"], (5, 3, 7, 5, 3, 5, 5, 7), strict=True))
OFFICIAL = {
    "data.variant": "trace5000", "data.limit.train": None, "data.limit.test": None, "data.dedupe": False,
    "budget.batch_size": 128, "budget.lr_full": 1e-5, "optim.optimizer.lr": "${budget.lr_full}",
    "protocol.prompt": "raw", "protocol.max_prompt_tokens": 1024, "protocol.closed_answers": "generate",
    "protocol.decoding.do_sample": True, "protocol.decoding.temperature": 0.1, "protocol.decoding.top_p": 1.0,
    "protocol.splitter": "ours",
}  # fmt: skip


def run(
    order="1",
    *,
    model: str | None = "LLaMA-2-7B-Chat",
    method: str | None = "SeqFT",
    epochs=SCRIPTS,
    rows=ROWS,
    **changes,
):
    """A finished run as `beside` needs it, by default of TRACE's own protocol."""
    tasks = list(ORDERS[order])
    return {
        "name": "ours", "model": "llama2_7b_chat", "method": "seqft", "tuning": "full", "data": "trace5000",
        "tasks": tasks, "protocol": {"name": "official", "fingerprint": "aa", "scoring": "official"},
        "published": {"model": model, "method": method},
        "op": 50.0, "bwt": -8.0, "bwt_over_t": -7.0, "bwt_clipped": -7.5, "forgetting": 9.0,
        "stages": [{"task": task, "epochs": epochs[task], "steps": 10} for task in tasks],
        "cells": [{"row": 8, "task": task, "n": rows[task], "score": 50.0} for task in tasks],
    } | changes  # fmt: skip


def row(found, group, method=None):
    (one,) = [one for one in found if one.entry.group == group and method in (None, one.entry.method)][:1]
    return one


def statuses(one) -> dict:
    return {part.name: part.status for part in one.parts}


def test_a_run_under_traces_protocol_is_comparable_with_table_1():
    """Epochs and batch size, which TRACE's sources state differently, are unclear, and nothing differs."""
    first = published.beside(run(), OFFICIAL)[0]
    assert first.comparable and first.entry.where == "TRACE Table 1" and first.entry.group == "trace-5000-o1"
    assert first.verdict == "comparable; unclear: epochs, batch size"
    assert set(statuses(first).values()) == {"same", "unclear"}
    assert (first.op.theirs, first.op.ours, first.op.difference) == (48.7, 50.0, pytest.approx(1.3))
    assert (first.bwt.theirs, first.bwt.ours, first.bwt.difference) == (-8.3, -8.0, pytest.approx(0.3))


@pytest.mark.parametrize(
    ("key", "value", "part", "said"),
    [
        ("protocol.decoding.do_sample", False, "decoding", "sampled at T 0.1 / ours greedy"),
        ("protocol.decoding.temperature", 0.7, "decoding", "ours sampled at T 0.7"),
        ("protocol.closed_answers", "log_likelihood", "decoding", "closed answers by log-likelihood"),
        ("protocol.prompt", "chat", "prompt", "raw / ours chat"),
        ("protocol.max_prompt_tokens", 2048, "prompt limit (tokens)", "1024 (scripts) / ours 2048"),
        ("budget.batch_size", 8, "batch size", "128 (paper); 256 (scripts) / ours 8"),
        ("budget.lr_full", 1e-4, "learning rate", "1e-5 / ours 0.0001"),
        ("data.limit.train", 100, "data variant", "5000 / ours 5000, but data.limit.train=100"),
        ("data.variant", "trace1000", "data variant", "5000 / ours 1000"),
        ("data.dedupe", True, "data variant", "data.dedupe=True"),
    ],
)
def test_each_part_that_differs_is_said(key, value, part, said):
    one = row(published.beside(run(), OFFICIAL | {key: value}), "trace-5000-o1")
    assert [own.name for own in one.parts_with("differs")] == [part] and not one.comparable
    assert said in str(one.parts_with("differs")[0]) and one.verdict.startswith(f"side by side only; differ: {part}")


def test_scoring_epochs_and_test_rows_come_from_the_results():
    changed = run(epochs=dict.fromkeys(ORDERS["1"], 2), rows={**ROWS, "FOMC": 20})
    changed["protocol"]["scoring"] = "corrected"
    one = row(published.beside(changed, OFFICIAL), "trace-5000-o1")
    differ = {part.name: part.ours for part in one.parts_with("differs")}
    assert differ == {
        "data variant": "5000, but FOMC tested on 20 of 496 rows",
        "epochs": "2 for every task",
        "metrics": "corrected",
    }
    assert one.op.difference is None and one.op.note == "other test rows" and one.op.ours == 50.0


def test_epochs_are_compared_by_task_where_orders_differ():
    """SEEKR's order 2: 10 epochs for NumGLUE-cm, NumGLUE-ds and FOMC, wherever they stand in ours."""
    tens = {task: 10 if task in ("NumGLUE-cm", "NumGLUE-ds", "FOMC") else 5 for task in ORDERS["1"]}
    one = row(published.beside(run("1", epochs=tens), OFFICIAL), "seekr-reasoning-o2")
    assert statuses(one)["epochs"] == "same" and statuses(one)["task order"] == "differs"
    one = row(published.beside(run("2", epochs=tens), OFFICIAL), "seekr-reasoning-o2")
    assert statuses(one)["epochs"] == "same" and statuses(one)["task order"] == "same"


def test_bwt_of_ours_is_given_by_the_rows_formula():
    """-7.5 where TreeLoRA clips, -7 where OPR divides by T, -8 where the sign was turned."""
    tree = published.beside(run(model="Gemma-2B", method="TreeLoRA"), OFFICIAL)[0]
    assert (tree.formula, tree.bwt.ours, tree.bwt.theirs, tree.bwt.printed) == ("clipped_div_t", -7.5, -8.5, "8.50")
    opr = published.beside(run(model="Qwen2.5-7B-Instruct"), OFFICIAL)[0]
    assert (opr.formula, opr.bwt.ours, opr.bwt.theirs) == ("div_t", -7.0, -13.93)
    assert opr.op.theirs is None and opr.op.difference is None and opr.op.note == "not published"
    slora = published.beside(run(model="Llama-3.1-8B-Instruct", method="SLoRA"), OFFICIAL | {"method.variant": "pre"})
    pre, post = row(slora, "slora-thirdparty", "SLoRA-pre"), row(slora, "slora-thirdparty", "SLoRA-post")
    assert (pre.formula, pre.bwt.ours, pre.bwt.theirs) == ("forgetting", -8.0, -3.59)
    assert statuses(pre)["variant of the method"] == "same" and statuses(post)["variant of the method"] == "differs"


def test_no_difference_where_sign_formula_or_tasks_are_not_known():
    hft = row(published.beside(run(), OFFICIAL), "hft")
    assert hft.bwt.difference is None and hft.bwt.note == "formula unknown, ours: sum over T - 1"
    assert hft.op.difference is None or statuses(hft)["data variant"] == "unclear"
    assert statuses(hft)["model"] == "unclear" and "LLaMA-2-7B-Chat (assumed)" in str(hft.parts[0])
    osf = row(published.beside(run(method="OSF"), OFFICIAL), "osf-muon", "OSF")
    assert osf.bwt.theirs is None and osf.bwt.printed == "7.1" and "sign in doubt" in osf.bwt.note
    fewer = run()
    fewer["tasks"] = fewer["tasks"][:3]
    fewer["stages"], fewer["cells"] = fewer["stages"][:3], []
    one = row(published.beside(fewer, OFFICIAL), "trace-5000-o1")
    assert one.op.difference is None and one.op.note == "other tasks" and not one.comparable


def test_a_copied_row_is_never_comparable():
    copied = [one for one in published.beside(run(), OFFICIAL) if one.entry.copied_from]
    assert len(copied) == 2 and all("repeats TRACE Table 3" in one.verdict and not one.comparable for one in copied)


def test_without_settings_parts_are_unknown_and_nothing_is_comparable():
    found = published.beside(run())
    assert found and not any(one.comparable for one in found)
    unknown = {part.name for part in row(found, "trace-5000-o1").parts_with("unknown")}
    assert unknown == {"data variant", "learning rate", "batch size", "prompt", "prompt limit (tokens)", "decoding"}
    assert "configuration (.hydra/config.yaml) is not there" in str(
        row(found, "trace-5000-o1").parts_with("unknown")[0]
    )


def test_missing_cells_are_said():
    one = row(published.beside(run(bwt=None), OFFICIAL), "trace-5000-o1")
    assert (
        one.bwt.ours is None and one.bwt.difference is None and one.bwt.note == "ours is missing: cells were not scored"
    )


def test_runs_of_several_seeds_are_averaged():
    """40 and 60: mean 50, t(0.975, 1) = 12.706, s / sqrt(2) = 10."""
    one = published.beside([run(op=40.0), run(op=60.0)], OFFICIAL)[0]
    assert (one.op.ours, one.op.runs) == (50.0, 2) and one.op.margin == pytest.approx(127.06, abs=0.01)


def test_in_context_learning_is_compared_by_its_own_parts():
    frozen = run(method="ICL", epochs=dict.fromkeys(ORDERS["1"], 0), bwt=0.0)
    for stage in frozen["stages"]:
        stage["steps"] = 0
    settings = OFFICIAL | {"method.demonstrations": 6, "method.max_prompt_tokens": 3584}
    one = row(published.beside(frozen, settings), "trace-5000-icl")
    assert [str(part) for part in one.parts_with("differs")] == [
        "demonstrations: 6 from the test set / ours 6 from train rows"
    ]
    assert statuses(one)["task order"] == "same" and not one.comparable and one.bwt.printed == ""


def test_runs_without_a_published_name_stand_beside_nothing():
    own = run(model=None)
    assert published.beside(own, OFFICIAL) == []
    assert "model=llama2_7b_chat has no name" in published.why_none(own)
    assert "method=seqft with tuning=full has no name" in published.why_none(run(method=None))
    assert published.why_none(run(method="GORPS")).startswith("no published row of LLaMA-2-7B-Chat with GORPS; of that")
    older = run()
    del older["published"]
    chosen = published.beside(older, OFFICIAL, model="LLaMA-2-7B-Chat", method="SeqFT")
    assert chosen and not any(one.comparable for one in chosen)
    assert statuses(chosen[0])["model"] == "unknown"
    other = published.beside(run(model="Qwen2.5-7B-Instruct"), OFFICIAL, model="LLaMA-2-7B-Chat")
    assert {statuses(one)["model"] for one in other} == {"differs"}


def test_every_row_can_be_put_beside_a_run():
    """Also those whose every condition is unknown."""
    for entry in published.entries():
        found = published.beside(run(), OFFICIAL, model=entry.model, method=entry.method, group=entry.group)
        assert any(one.entry == entry for one in found)


@pytest.mark.parametrize(
    ("group", "formula", "expected"),
    [
        ("trace-5000-o1", "trace", -8.3),
        ("trace-5000-o1", "div_t", -8.3 * 7 / 8),
        ("trace-5000-o1", "forgetting", -8.3),
        ("trace-5000-o1", "clipped_div_t", None),
        ("opr", "trace", -13.93 * 8 / 7),
        ("treelora-500-o1", "clipped_div_t", -6.25),
        ("treelora-500-o1", "trace", None),
        ("hft", "trace", None),
        ("moram", "trace", None),
    ],
)
def test_bwt_is_expressed_by_another_formula_where_that_is_arithmetic(group, formula, expected):
    entry = next(entry for entry in published.entries(group=group) if entry.bwt is not None)
    found = published.bwt_by(entry, formula)
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_matrix_agrees_with_arithmetic_on_its_row():
    """Table 8: div_t from the cells -.0722, from the printed -8.3 times 7/8 -7.26."""
    from trace_hydra.metrics.continual import summary

    (matrix,) = [one for one in published.matrices() if one.table == 8]
    entry = next(entry for entry in published.entries() if entry.matrix == 8)
    assert published.bwt_by(entry, "div_t") == pytest.approx(summary(matrix.scores())["bwt_over_t"], abs=0.05)


def test_references_in_settings_are_followed_but_not_in_circles():
    settings = OFFICIAL | {"budget.lr_full": "${optim.optimizer.lr}"}
    one = row(published.beside(run(), settings), "trace-5000-o1")
    assert {part.name: part.ours for part in one.parts}["learning rate"].startswith("unknown: optim.optimizer.lr is ${")


def test_conditions_are_written_with_their_sources():
    assert str(Condition()) == "unknown" and str(Condition((("", "5"),))) == "5"
    assert str(Condition((("paper", "128"), ("scripts", "256")))) == "128 (paper); 256 (scripts)"
