"""Names that become paths stay where they belong, and nothing is written through a link."""

import json
import os
from typing import Any

import pytest
from conftest import compose_config
from omegaconf import OmegaConf

from trace_hydra import build, entry
from trace_hydra.capability.__main__ import compare_again
from trace_hydra.capability.board import pairs_file, records_file
from trace_hydra.data.task import TaskSpec
from trace_hydra.errors import ConfigError, StoreError
from trace_hydra.files import write_bytes, write_json
from trace_hydra.names import inside, safe_name
from trace_hydra.report import results as report
from trace_hydra.score import rescore
from trace_hydra.scoreboard import predictions_file

HOSTILE = {
    "empty": "",
    "parent": "..",
    "up": "../x",
    "further up": "../../../../etc/x",
    "absolute": "/etc/passwd",
    "drive": "C:\\x",
    "backslash": "..\\x",
    "NUL": "a\0b",
    "line": "a\nb",
    "line end": "FOMC\n",
    "tab": "a\tb",
    "escape": "\x1b[2J",
    "slash": "a/b",
    "hidden": ".ssh",
    "option": "-rf",
    "home": "~",
    "variable": "$HOME",
    "two dots": "a..b",
    "final dot": "a.",
    "space": "a b",
    "300": "a" * 300,
    "101": "a" * 101,
    "Cyrillic": "F\u041eMC",
    "full width slash": "a\uff0fb",
    "division slash": "a\u2215b",
    "combining": "e\u0301",
    "right to left": "a\u202egpj",
    "zero width": "FOMC\u200b",
    "Arabic digit": "a\u0661",
    "surrogate": "a\ud800",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_unsafe_names_are_refused_with_key_value_and_reason(name):
    with pytest.raises(ConfigError, match=r"^some\.key=.* is no safe name: .*; use at most 100 ") as refusal:
        safe_name(HOSTILE[name], "some.key")
    assert str(refusal.value).isascii() and str(refusal.value).isprintable()
    with pytest.raises(ConfigError, match="is no task name"):
        TaskSpec(HOSTILE[name], "accuracy", 4)


def test_a_look_alike_is_named():
    with pytest.raises(ConfigError, match="CYRILLIC CAPITAL LETTER O"):
        safe_name("F\u041eMC", "task_order.tasks")


@pytest.mark.parametrize(
    "name", ["a", "C-STANCE", "20Minuten", "NumGLUE-cm", "qwen2.5_0.5b", "a_", "a-", "0", "a" * 100]
)
def test_ordinary_names_are_safe(name):
    assert safe_name(name, "x") == name


@pytest.mark.parametrize("part", ["", ".", "..", "a/b", "/etc", "a\\b", "a\0b", "a" * 256, "\u00e9" * 128, "a\ud800"])
def test_a_part_that_is_no_name_is_refused(tmp_path, part):
    with pytest.raises(StoreError):
        inside(tmp_path, part)
    with pytest.raises(StoreError):
        inside(tmp_path, "predictions", part)


def test_links_may_not_lead_out(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "real").mkdir(parents=True)
    outside.mkdir()
    (root / "out").symlink_to(outside)
    (root / "file").symlink_to(outside / "not_there")
    (root / "loop").symlink_to(root / "loop")
    (root / "in").symlink_to(root / "real")
    (tmp_path / "link").symlink_to(root)
    for parts in (("out",), ("out", "x"), ("file",), ("loop", "x")):
        with pytest.raises(StoreError):
            inside(root, *parts)
    assert inside(root, "in", "x") == root / "in" / "x"
    assert (
        inside(tmp_path / "link", "new", "x") == tmp_path / "link" / "new" / "x"
    )  # where runs lie is the user's choice
    assert inside(tmp_path / "not_there", "x") == tmp_path / "not_there" / "x"


@pytest.mark.parametrize("key", ["model.name", "method.name", "tuning.name", "data.name", "task_order.name"])
@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a\0b", "a" * 300, "r\u0435play"])
def test_names_of_the_run_directory(key, name):
    config = compose_config(["model=tiny"])
    OmegaConf.update(config, key, name)
    assert any(problem.startswith(f"{key}=") and "no safe name" in problem for problem in build.problems_of(config))
    with pytest.raises(ConfigError, match=r"\.name="):
        entry.run_directory_name(config)


def test_names_that_are_too_long_together():
    config = compose_config(["model=tiny"])
    for key in ("model", "method", "tuning"):
        OmegaConf.update(config, f"{key}.name", "a" * 90)
    with pytest.raises(ConfigError, match=r"make a folder of \d+ characters, more than 255"):
        entry.run_directory_name(config)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a\0b", "a" * 300, "F\u041eMC"])
def test_names_of_tasks_and_capability_sets(name):
    config = compose_config(["model=tiny", "capability=mini"])
    OmegaConf.set_struct(config, False)
    config.data.tasks[name] = {"metric": "accuracy", "max_new_tokens": 4}
    config.capability.sets[name] = {"_target_": "trace_hydra.capability.mini.Mini", "kinds": ["math"], "limit": None}
    config.task_order.tasks = [name]
    problems = build.problems_of(config)
    for start in ("a name in data.tasks=", "a name in capability.sets=", "task_order.tasks: data.tasks:"):
        assert any(problem.startswith(start) for problem in problems), problems


@pytest.mark.parametrize("folder", [*report.WRITTEN_FOLDERS, "wandb"])
def test_a_folder_of_the_run_that_is_a_link_ends_it_before_anything_is_written(tmp_path, folder):
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    run.mkdir()
    (outside / "kept").write_text("mine")
    (run / "results.json").write_text("{}")
    (run / folder).symlink_to(outside)
    with pytest.raises(StoreError, match=rf"{folder} is a link"):
        report.clear(run)
    assert [path.name for path in outside.iterdir()] == ["kept"] and (run / "results.json").exists()


def test_links_deeper_in_a_run_directory_are_not_written_through(tmp_path):
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    for folder in ("predictions", "capability"):
        (run / folder).mkdir(parents=True)
        (run / folder / "1").symlink_to(outside)
    for place in (predictions_file, records_file, pairs_file):
        with pytest.raises(StoreError, match="Remove the link"):
            place(run, 1, "FOMC")
        assert place(run, 2, "FOMC").is_relative_to(run)


def test_a_file_that_is_a_link_is_replaced_and_not_followed(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "results.json"
    file.symlink_to(mine)
    (tmp_path / "run" / f".results.json.{os.getpid()}").symlink_to(mine)  # the name that is written first
    write_json({"a": 1}, file)
    assert mine.read_text() == "mine" and not file.is_symlink() and json.loads(file.read_text()) == {"a": 1}
    write_bytes(b"x", file)
    assert file.read_bytes() == b"x" and len(list(file.parent.iterdir())) == 1


def test_clearing_a_run_removes_links_and_not_what_they_lead_to(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "kept").write_text("mine")
    (tmp_path / "run" / "predictions").mkdir(parents=True)
    (tmp_path / "run" / "predictions" / "0").symlink_to(mine)
    (tmp_path / "run" / "results.json").symlink_to(mine / "kept")
    report.clear(tmp_path / "run")
    assert (mine / "kept").read_text() == "mine" and list((tmp_path / "run").iterdir()) == []


def stored(tmp_path, **changes):
    sets = {"mini": {"_target_": "trace_hydra.capability.mini.Mini", "kinds": ["math"], "limit": None}}
    capability = {"config": {"sets": sets}, "stages": {}, "failed": {}, "bootstrap": {"samples": 2, "seed": 0}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(json.dumps({"capability": {**capability, **changes}}))
    return tmp_path / "run"


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"sets": {"../../x": {"_target_": "trace_hydra.capability.mini.Mini"}}}},
        {"config": {"sets": {"/etc/x": {"_target_": "trace_hydra.capability.mini.Mini"}}}},
        {"config": {"sets": []}},
        {"config": {"sets": {"mini": "os.system"}}},
        {"config": []},
        {"stages": {"../..": {}}},
        {"stages": {"-1": {}}},
        {"stages": ["1"]},
        {"failed": {"../../x/y": "why"}},
        {"failed": {"1/../../x": "why"}},
        {"bootstrap": None},
    ],
)
def test_a_stored_capability_node_cannot_lead_out(tmp_path, changes):
    run = stored(tmp_path, **changes)
    with pytest.raises(StoreError, match=r"results\.json"):
        compare_again(run)
    assert {path.name for path in tmp_path.rglob("*")} == {"run", "results.json"}


def test_stored_remote_code_needs_the_command_line_again(tmp_path):
    judge = {
        "_target_": "trace_hydra.capability.local_judge.LocalChat",
        "model": {"path": "/x", "trust_remote_code": True},
    }
    sets = {"helpful": {"_target_": "trace_hydra.capability.judge.Judged", "judge": judge}}
    with pytest.raises(ConfigError, match=r"add 'judge\.model\.trust_remote_code=true'"):
        compare_again(stored(tmp_path, config={"sets": sets}))


def test_rescoring_does_not_write_through_a_link(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    (run / "test_rows").mkdir(parents=True)
    (run / "rescored").symlink_to(outside)
    results = {"tasks": ["FOMC"], "matrix": [[None], [None]], "row0": None, "protocol": {"name": "greedy"}, "seed": 0}
    specs = {"FOMC": {"metric": "accuracy", "instruction": "", "stop": []}}
    (run / "results.json").write_text(json.dumps({**results, "task_specs": specs}))
    (run / "test_rows" / "FOMC.jsonl").write_text(json.dumps({"id": "test-0", "prompt": "x", "answer": "A"}) + "\n")
    with pytest.raises(StoreError, match="Remove the link"):
        rescore(run)
    assert list(outside.iterdir()) == []


def test_rows_are_read_from_a_linked_root_but_not_out_of_it(tmp_path):
    """Where paths.data leads is the user's choice; a release that was unpacked must not point at other files."""
    from trace_hydra.data.trace import TraceData

    (tmp_path / "elsewhere" / "FOMC").mkdir(parents=True)
    for split in ("train", "eval", "test"):
        (tmp_path / "elsewhere" / "FOMC" / f"{split}.json").write_text(json.dumps([{"prompt": split, "answer": "A"}]))
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "FOMC").symlink_to(tmp_path / "elsewhere" / "FOMC")

    def source(folder):
        config = compose_config(["data=trace", f"paths.data={tmp_path / folder}"]).data
        settings: Any = OmegaConf.to_container(config, resolve=True)
        return TraceData(**{key: value for key, value in settings.items() if key != "_target_"})

    assert source("linked").problems(["FOMC"]) == []
    assert len(source("linked").load(["FOMC"], seed=0).tasks["FOMC"].train) == 1
    assert all("is a link out of" in problem for problem in source("data").problems(["FOMC"]))
    assert any("no task name" in problem or "is unknown" in problem for problem in source("linked").problems(["../x"]))
