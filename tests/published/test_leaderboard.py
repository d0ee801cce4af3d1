"""`python -m trace_hydra.leaderboard`: rows by group, runs beside them, the formats, wrong names and folders."""

import csv
import io
import json
import subprocess
import sys

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from trace_hydra import leaderboard, published
from trace_hydra.published.conditions import ORDERS


def write_run(folder, *, seed=0, op=50.0, printed=("LLaMA-2-7B-Chat", "SeqFT"), **changes):
    """A finished run of all eight tasks, as small as the command needs it."""
    tasks = list(ORDERS["1"])
    matrix = [[None] * 8, *([[50.0] * 8] * 8)]
    results = {
        "schema": 1, "name": folder.name, "model": "llama2_7b_chat", "method": "seqft", "tuning": "full",
        "data": "trace5000", "task_order": "trace", "seed": {"train": seed, "data": 0, "generation": 0},
        "protocol": {"name": "greedy", "fingerprint": "aa", "scoring": "corrected"}, "tasks": tasks, "matrix": matrix,
        "op": op, "bwt": -1.0, "bwt_over_t": -0.875, "bwt_clipped": -0.9, "fwt": None, "forgetting": 1.0,
        "capability": {}, "wall_clock_s": 1.0, "complete": True, "non_finite": [],
        "stages": [{"task": task, "key": f"{seed}-{task}", "epochs": 5, "steps": 1} for task in tasks],
        "cells": [{"row": 8, "task": task, "metric": "accuracy", "n": 4, "score": 50.0} for task in tasks],
        "published": dict(zip(("model", "method"), printed, strict=True)),
    } | changes  # fmt: skip
    config = {
        "protocol": {"prompt": "raw", "decoding": {"do_sample": False}},
        "data": {"variant": "trace5000"},
        "budget": {"batch_size": 128, "lr_full": 1e-5},
        "optim": {"optimizer": {"lr": "${budget.lr_full}"}},
    }
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def shown(capsys, *arguments) -> str:
    assert leaderboard.main([str(one) for one in arguments]) == 0
    return capsys.readouterr().out


def rows(capsys, *arguments) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(shown(capsys, *arguments, "--format", "csv"))))


def test_without_runs_every_row_stands_in_its_group(capsys):
    found = rows(capsys)
    assert len(found) == len(published.entries()) and {row["group"] for row in found} == set(published.groups())
    table_1 = next(row for row in found if (row["model"], row["method"]) == ("LLaMA-2-7B-Chat", "SeqFT"))
    assert (table_1["op"], table_1["bwt_signed"], table_1["conditions_data"]) == ("48.7", "-8.3", "5000")


def test_one_table_a_group_with_its_conditions_below(capsys):
    text = shown(capsys, "--model", "LLaMA-2-7B-Chat", "--method", "SeqFT", "--format", "md")
    assert text.count("## ") == len({entry.group for entry in published.entries("LLaMA-2-7B-Chat", "SeqFT")})
    assert "## trace-5000-o1: " in text and "## osf-muon: " in text
    assert "- decoding: sampled at T 0.1" in text and "| TRACE Table 1 | LLaMA-2-7B-Chat | SeqFT |" in text
    first = next(line for line in text.splitlines() if line.startswith("| TRACE Table 3 | LLaMA-2-7B-Chat | SeqFT |"))
    assert "| 48.7 | -8.3 |" in first  # printed as 8.3


def test_a_run_stands_beside_the_rows_of_its_model_and_method(tmp_path, capsys):
    write_run(tmp_path / "a", seed=0, op=40.0)
    write_run(tmp_path / "b", seed=1, op=60.0)
    (group,) = json.loads(shown(capsys, tmp_path, "--format", "json"))["runs"]
    assert group["folders"] == ["a", "b"] and group["why_none"] is None
    table_1 = next(row for row in group["rows"] if row["group"] == "trace-5000-o1" and row["table"] == "1")
    assert table_1["ours"]["op"]["ours"] == 50.0 and table_1["ours"]["op"]["runs"] == 2
    parts = {part["name"]: (part["theirs"], part["ours"], part["status"]) for part in table_1["parts"]}
    assert parts["decoding"] == ("sampled at T 0.1", "greedy", "differs")
    assert parts["learning rate"][2] == "same" and not table_1["comparable"]
    text = shown(capsys, tmp_path)
    assert "side by side only; differ: data variant" in text and "decoding: sampled at T 0.1 / ours greedy" in text
    assert "no Δ OP: other test rows" in text
    table = rows(capsys, tmp_path)
    assert len(table) == len(group["rows"]) and "seed 0, 1" in table[0]["ours"]


def test_other_orders_and_settings_are_not_averaged(tmp_path, capsys):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, tasks=list(ORDERS["2"]))
    write_run(tmp_path / "c", seed=2, protocol={"name": "greedy", "fingerprint": "bb", "scoring": "corrected"})
    found = json.loads(shown(capsys, tmp_path, "--format", "json"))["runs"]
    assert sorted(one["folders"] for one in found) == [["a"], ["b"], ["c"]]


def test_a_run_beside_nothing_says_why(tmp_path, capsys):
    write_run(tmp_path / "a", printed=(None, "SeqFT"))
    assert "nothing beside it: model=llama2_7b_chat has no name in published tables" in shown(capsys, tmp_path)
    (group,) = json.loads(shown(capsys, tmp_path, "--format", "json"))["runs"]
    assert group["rows"] == [] and "model.published" in group["why_none"]
    assert leaderboard.main([str(tmp_path), "--format", "csv"]) == 0
    assert "nothing beside it" in capsys.readouterr().err
    assert "no row of group gorp with its model and method" in shown(
        capsys, tmp_path, "--model", "LLaMA-2-7B-Chat", "--method", "SeqFT", "--group", "gorp"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "LLaMA-3"], "--model LLaMA-3 is in no published row; there is Baichuan2-7B-Chat, Gemma-2B,"),
        (["--method", "seqft"], "--method seqft is in no published row; there is AdaLoRA, Any-SSR,"),
        (["--group", "trace"], "--group trace is in no published row; there is anyssr-5000-o1,"),
        (["/no/such/folder"], "/no/such/folder is no folder"),
    ],
)
def test_wrong_names_list_what_there_is(capsys, arguments, message):
    assert leaderboard.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_folders_without_a_finished_run_are_refused(tmp_path, capsys):
    assert leaderboard.main([str(tmp_path)]) == 2
    assert f"no finished run below {tmp_path}" in capsys.readouterr().err
    write_run(tmp_path / "a", complete=False)
    assert leaderboard.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "left out: " in error and "is incomplete: not every planned cell was scored" in error


def test_a_run_that_is_named_twice_counts_once(tmp_path, capsys):
    write_run(tmp_path / "a")
    found = json.loads(shown(capsys, tmp_path, tmp_path / "a", "--format", "json"))["runs"]
    assert [one["folders"] for one in found] == [["a"]]


def test_older_results_without_numbers_are_shown_with_what_they_have(tmp_path, capsys):
    """No `published`, no matrix, no BWT over T, no epochs: nothing is made up."""
    stages = [{"task": task, "key": task} for task in ORDERS["1"]]
    folder = write_run(tmp_path / "a", bwt_over_t=None, stages=stages)
    results = json.loads((folder / "results.json").read_text())
    del results["published"], results["matrix"], results["bwt_over_t"]
    (folder / "results.json").write_text(json.dumps(results))
    names = ("--model", "Qwen2.5-7B-Instruct", "--method", "SeqFT")
    (group,) = json.loads(shown(capsys, tmp_path, *names, "--format", "json"))["runs"]
    assert group["rows"][0]["ours"]["bwt"]["ours"] is None
    assert group["rows"][0]["ours"]["bwt"]["note"] == "ours is missing: cells were not scored"
    parts = {part["name"]: part for part in group["rows"][0]["parts"]}
    assert parts["model"]["ours"] == "unknown: llama2_7b_chat has no name in published tables"
    assert parts["epochs"]["status"] == "unknown"
    assert rows(capsys, tmp_path, "--show", "tasks")[-1]["FOMC"] == "–"
    assert "OP –, BWT –" in shown(capsys, tmp_path, "--show", "matrices", "--format", "md").split("ours: a")[1]


def test_other_tables_have_rows_of_ours_below(tmp_path, capsys):
    sets = {
        name: {"area": "general", "before": 40.0, "after": 30.0, "delta": -10.0, "n": 3}
        for name in ("mmlu", "gsm8k", "bbh", "tydiqa", "boolq", "piqa")
    }
    sets["conversations"] = {
        "area": "instruction",
        "before": None,
        "after": None,
        "win": 10.0,
        "tie": 20.0,
        "lose": 70.0,
    }
    write_run(tmp_path / "a", capability={"sets": sets, "general": {"delta": -10.0}})
    found = rows(capsys, tmp_path, "--show", "abilities")
    assert [(row["model"], row["mean"]) for row in found[-2:]] == [
        ("llama2_7b_chat", "40.00"),
        ("llama2_7b_chat", "30.00"),
    ]
    assert {row["model"] for row in found[:-2]} == {"LLaMA-2-7B-Chat"} and found[-1]["Δ of the cells"] == "-10.00"
    table_2 = next(row for row in found if row["method"] == "SeqFT" and row["row"] == "TRACE Table 2")
    assert (table_2["GSM8K"], table_2["Δ printed"], table_2["Δ of the cells"]) == ("3.49", "-2.58", "-2.58")
    found = rows(capsys, tmp_path, "--show", "judged")
    assert (found[-1]["win %"], found[-1]["lose %"], found[-1]["area"]) == ("10.00", "70.00", "instruction")
    found = rows(capsys, tmp_path, "--show", "tasks")
    assert found[-1]["FOMC"] == "50.00" and found[-1]["epochs"] == "5,5,5,5,5,5,5,5"
    assert (
        next(row for row in found if row["data"] == "1000" and row["epochs"].startswith("10 "))["mean printed"]
        == "42.60"
    )


def test_matrices_are_shown_by_round(tmp_path, capsys):
    """TRACE's Table 8: FOMC .735 after its stage, .609 at the end; OP .5955 after two stages."""
    write_run(tmp_path / "a")
    text = shown(capsys, tmp_path, "--method", "SeqFT", "--show", "matrices", "--format", "md")
    table_8 = text[text.index("## TRACE Table 8:") : text.index("## TRACE Table 26:")]
    assert "| FOMC |  | 73.50 |" in table_8 and "| OP | 50.00 | 59.55 |" in table_8
    assert "- from the cells: OP 48.71, BWT -8.26, -7.22 over T" in table_8
    assert "- printed, 0-1: OP 0.487, BWT -0.083" in table_8
    assert "## ours: a" in text and "from the cells: OP 50.00, BWT 0.00" in text


@pytest.mark.parametrize("show", leaderboard.SHOWS)
@pytest.mark.parametrize("form", leaderboard.FORMATS)
def test_every_table_comes_in_every_format(capsys, show, form):
    text = shown(capsys, "--show", show, "--format", form)
    if form == "json":
        assert json.loads(text)
    elif form == "csv":
        assert len(list(csv.reader(io.StringIO(text)))) > 10
    assert "TRACE" in text


def test_a_table_of_markdown_has_as_many_cells_in_every_line(capsys):
    for block in shown(capsys, "--format", "md").split("## ")[1:]:
        lines = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1


def test_hostile_names_do_no_harm(tmp_path, capsys):
    """Names of a results.json that somebody sent: no control code, markup or formula reaches the reader."""
    write_run(tmp_path / "a", printed=(None, None), name="n", method="=cmd|'x'!A1", tuning="\x1b[31m<b>|[bold]x")
    for form in leaderboard.FORMATS:
        leaderboard.main([str(tmp_path), "--format", form])
        captured = capsys.readouterr()
        assert "\x1b" not in captured.out + captured.err
    text = shown(capsys, tmp_path, "--format", "md")
    assert "<b>" not in text and "&lt;b>\\|\\[bold\\]x" in text
    body = rows(capsys, tmp_path, "--show", "tasks")
    assert body[-1]["method"] == "'=cmd|'x'!A1"


def test_the_command_runs_without_torch():
    code = (
        "import sys; from trace_hydra.leaderboard import main; main(['--show', 'doubts']); "
        "assert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "Known typos and doubts" in done.stdout
