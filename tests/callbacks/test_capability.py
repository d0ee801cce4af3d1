"""Deltas of the start model in the loggers: numbers for all, tables of pairs for W&B."""

import json

import pytest
from doubles import Recorder, two_tasks
from logger_doubles import factory, folders
from wandb_file import read

from trace_hydra.callbacks.capability import CapabilityDelta
from trace_hydra.loggers import close_loggers, open_loggers

SET = {"area": "general", "measure": "accuracy", "n": 2, "unscored": 0, "before": 60.0, "after": 50.0, "delta": -10.0}
JUDGED = {**SET, "area": "safety", "before": None, "after": None, "delta": -50.0, "win": 0.0, "tie": 50.0, "lose": 50.0}
INTERVAL = {"interval": [-12.0, -8.0], "differs": True}
DELTAS = {
    "general": {"delta": -10.0, **INTERVAL, "measure": "score", "sets": ["mmlu"], "n": 2},
    "safety": {"delta": -50.0, **INTERVAL, "measure": "judge", "sets": ["cona"], "n": 2},
    "sets": {"mmlu": {**SET, **INTERVAL}, "cona": {**JUDGED, **INTERVAL}},
}


def pair(name, number, delta, **more):
    return {"set": name, "category": "c", "id": str(number), "prompt": "p" * 50, "delta": delta, **more}


PAIRS = [
    pair("mmlu", 0, -5.0, before=5.0, after=0.0),
    pair("mmlu", 1, -100.0, before=100.0, after=0.0),
    pair("mmlu", 2, 20.0, before=0.0, after=20.0),
    pair("cona", 0, None, outcome="unparsed", verdicts=["none", "tie"], explanations=["a", "b"]),
]


def callback(**changes):
    return CapabilityDelta(**{"show": True, "worst": 1, "judged": 5, "characters": 20, **changes})


def test_numbers_of_a_stage_and_of_the_run(tmp_path, capsys):
    recorder, one = Recorder(), callback()
    one.on_run_start(two_tasks(tmp_path), [recorder])
    one.on_capability(2, DELTAS, PAIRS)
    one.on_run_end({})
    (stage, step), (summary, _) = recorder.entries
    assert step == 2 and stage["progress/stage"] == 2.0
    assert stage["capability/mmlu"] == 50.0 and stage["capability/mmlu/delta"] == -10.0
    assert stage["capability/cona/lose"] == 50.0 and "capability/cona" not in stage
    assert stage["capability/delta_safety"] == -50.0 and stage["capability/delta_general_ci_low"] == -12.0
    expected = {"delta_general": -10.0, "delta_safety": -50.0}
    assert summary == {
        f"{name}{end}": value
        for name, mean in expected.items()
        for end, value in (("", mean), ("_ci_low", -12.0), ("_ci_high", -8.0))
    }
    text = capsys.readouterr().out
    assert "general ability" in text and "60.0 -> 50.0" in text and "win 0 tie 50 lose 50 %" in text


def test_a_run_without_sets_logs_nothing(tmp_path, capsys):
    recorder, one = Recorder(), callback()
    one.on_run_start(two_tasks(tmp_path), [recorder])
    one.on_run_end({})
    assert recorder.entries == [] and capsys.readouterr().out == ""


@pytest.mark.usefixtures("no_account")
def test_worst_drops_and_judged_pairs_reach_wandb(tmp_path):
    """One of two drops, the larger; texts cut to 20 characters; the unparsed pair among the judged."""
    info = two_tasks(tmp_path)
    loggers, one = open_loggers([factory()], info), callback(show=False)
    one.on_run_start(info, loggers)
    one.on_capability(2, DELTAS, PAIRS)
    close_loggers(loggers, exit_code=0)
    (folder,) = folders(info)
    history = read(folder)["history"]
    tables = {}
    for name in ("worst_drops", "judged"):
        (row,) = [row for row in history if f"capability/{name}/path" in row]
        assert row["progress/stage"] == 2
        tables[name] = json.loads((folder / "files" / row[f"capability/{name}/path"]).read_text())
    drops = [dict(zip(tables["worst_drops"]["columns"], row, strict=True)) for row in tables["worst_drops"]["data"]]
    assert [(row["id"], row["delta"], row["prompt"]) for row in drops] == [("1", -100.0, "p" * 20)]
    (judged,) = [dict(zip(tables["judged"]["columns"], row, strict=True)) for row in tables["judged"]["data"]]
    assert judged["outcome"] == "unparsed" and judged["set"] == "cona"
