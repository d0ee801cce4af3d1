"""W&B without a server, CSV and TensorBoard."""

import csv
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import compose_config
from lightning.fabric.utilities.rank_zero import rank_zero_only
from logger_doubles import SCORES, factory, folders, play
from wandb_file import read

from trace_hydra.errors import ConfigError
from trace_hydra.loggers import (
    close_loggers,
    csv_logger,
    log_metrics,
    open_loggers,
    plain_config,
    tensorboard_logger,
    wandb_logger,
)
from trace_hydra.targets import instantiate


def test_offline_run_read_back_holds_the_results(run_info, no_account, caplog):
    """Every number of results.json's matrix and summary stands in the W&B run; so do config, group and tags."""
    before = dict(os.environ)
    with caplog.at_level("INFO"):
        loggers = open_loggers([factory(tags=["mine"])], run_info)
        log_metrics(loggers, {"train/loss": 1.25, "progress/step": 7, "progress/stage": 1}, 7)
        results = play(run_info, loggers)
        close_loggers(loggers, exit_code=0)
    assert dict(os.environ) == before
    (folder,) = folders(run_info)
    assert "no API key" in caplog.text and f"wandb sync {folder}" in caplog.text
    found = read(folder)
    run = found["run"]
    assert (run.display_name, run.run_group, run.job_type) == (run_info.name, "plain-trace-tiny", "train")
    assert list(run.tags) == ["plain", "tiny", "0123456789ab", "mine"] and run.project == "trace_hydra"
    assert found["config"]["budget"] == {"epochs": {"My_Task": 2}}
    assert found["config"]["protocol_fingerprint"] == "0123456789ab"
    assert (found["config"]["method_name"], found["config"]["model_name"]) == ("plain", "tiny")
    assert found["config"]["order_name"].startswith("trace-"), "A and B are not what conf/task_order/trace.yaml lists"
    for key, low, high in (("op", 50.0, 70.5), ("bwt", -30.0, -10.0), ("fwt", 1.0, 4.0), ("forgetting", 10.0, 30.0)):
        assert found["summary"][key] == results[key]
        assert (found["summary"][f"{key}_ci_low"], found["summary"][f"{key}_ci_high"]) == (low, high)
    logged = {
        (row["progress/stage"], key.removeprefix("score/")): value
        for row in found["history"]
        for key, value in row.items()
        if key.startswith("score/")
    }
    assert logged == SCORES
    train = [row for row in found["history"] if "train/loss" in row]
    assert [(row["train/loss"], row["progress/step"]) for row in train] == [(1.25, 7)]
    assert not any("trainer/global_step" in row for row in found["history"])
    assert found["exit_code"] == 0


def test_matrix_reaches_wandb_as_table_and_picture(run_info, no_account):
    """Three rows are logged, so three tables and three heat maps of 720 x 540 pixels lie in the run's media."""
    from PIL import Image

    loggers = open_loggers([factory()], run_info)
    play(run_info, loggers)
    close_loggers(loggers, exit_code=0)
    (folder,) = folders(run_info)
    rows = [row for row in read(folder)["history"] if "matrix/table/path" in row]
    assert [row["progress/stage"] for row in rows] == [0, 1, 2]
    pictures = [folder / "files" / row["matrix/heat_map/path"] for row in rows]
    assert [Image.open(picture).size for picture in pictures] == [(720, 540)] * 3
    table = json.loads((folder / "files" / rows[-1]["matrix/table/path"]).read_text())
    assert table["columns"] == ["row", "A", "B"]
    assert table["data"] == [["before", 1.5, 2.5], ["1 A", 60.0, 5.0], ["2 B", 40.25, 80.0]]


def test_curves_have_their_own_axes(run_info, no_account):
    loggers = open_loggers([factory()], run_info)
    close_loggers(loggers, exit_code=0)
    (folder,) = folders(run_info)
    axes = read(folder)["metrics"]
    assert axes["train/*"] == "progress/tokens"
    over_stages = ("score/*", "matrix/*", "samples/*", "capability/*", "progress/op", "progress/bwt")
    assert {axes[name] for name in over_stages} == {"progress/stage"}


def test_two_runs_of_a_process_are_two_wandb_runs(run_info, no_account, tmp_path):
    """The second opens while the first is still open, as after a job of a sweep that was not closed."""
    runs = [replace(run_info, directory=tmp_path / name) for name in "ab"]
    opened = [open_loggers([factory()], run) for run in runs]
    for number, loggers in enumerate(opened):
        log_metrics(loggers, {"score/A": float(number)}, 1)
    for number, loggers in enumerate(opened):
        close_loggers(loggers, exit_code=number)
    found = [read(folder) for run in runs for folder in folders(run)]
    assert [(one["history"][0]["score/A"], one["exit_code"]) for one in found] == [(0.0, 0), (1.0, 1)]
    assert len({one["run"].run_id for one in found}) == 2


def test_wandb_says_nothing_itself(run_info, no_account, capfd):
    loggers = open_loggers([factory()], run_info)
    play(run_info, loggers)
    close_loggers(loggers, exit_code=0)
    assert capfd.readouterr() == ("", "")


def test_environment_decides_the_mode(run_info, no_account):
    no_account.setenv("WANDB_MODE", "disabled")
    assert open_loggers([factory()], run_info) == []
    assert folders(run_info) == []


def test_online_without_a_key_goes_offline_instead_of_asking(run_info, no_account, caplog):
    no_account.setattr("builtins.input", lambda *_: pytest.fail("asked for a key"))
    with caplog.at_level("INFO"):
        loggers = open_loggers([factory(mode="online")], run_info)
        close_loggers(loggers, exit_code=0)
    assert "offline (no API key" in caplog.text and len(folders(run_info)) == 1


def test_a_wandb_that_cannot_start_at_all_is_left_out(run_info, no_account, caplog):
    import wandb

    def fail(**_):
        raise RuntimeError("no service")

    no_account.setattr(wandb, "init", fail)
    assert open_loggers([factory()], run_info) == []
    assert "no service" in caplog.text


def test_a_missing_wandb_is_left_out(run_info, no_account, caplog):
    no_account.setitem(sys.modules, "wandb", None)
    assert open_loggers([factory()], run_info) == []
    assert "without W&B" in caplog.text


def test_a_finish_that_fails_still_names_the_sync_command(run_info, no_account, caplog):
    loggers = open_loggers([factory()], run_info)
    experiment = loggers[0].experiment  # type: ignore[attr-defined]
    finish = experiment.finish

    def fail(exit_code):
        finish(exit_code=exit_code)
        raise TimeoutError("Timed out finishing run.")

    no_account.setattr(experiment, "finish", fail)
    with caplog.at_level("INFO"):
        close_loggers(loggers, exit_code=0)
    assert "Timed out" in caplog.text and "wandb sync" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"), [({"mode": "on"}, "mode='on'"), ({"settings": {"slient": True}}, "slient")]
)
def test_wrong_settings_are_refused(run_info, changes, message):
    with pytest.raises(ConfigError, match=message):
        open_loggers([factory(**changes)], run_info)


def test_other_ranks_open_no_wandb_run(run_info, no_account):
    no_account.setattr(rank_zero_only, "rank", 1)
    assert open_loggers([factory()], run_info) == []
    assert folders(run_info) == []


def test_long_tags_and_groups_are_cut_to_what_wandb_takes(run_info, no_account):
    """64 characters a tag and 128 a group; with longer ones `wandb.init` refuses to start."""
    loggers = open_loggers([factory(tags=["t" * 100], group="g" * 200)], run_info)
    close_loggers(loggers, exit_code=0)
    run = read(folders(run_info)[0])["run"]
    assert run.tags[-1] == "t" * 64 and run.run_group == "g" * 128


def test_csv_holds_the_results(run_info):
    loggers = open_loggers([csv_logger], run_info)
    results = play(run_info, loggers)
    close_loggers(loggers, exit_code=0)
    with (run_info.directory / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["score/A"] for row in rows if row["score/A"]] == ["1.5", "60.0", "40.25"]
    assert float(rows[-1]["op"]) == results["op"] and float(rows[-1]["bwt_ci_low"]) == -30.0


def test_tensorboard_holds_the_results(run_info):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loggers = open_loggers([tensorboard_logger], run_info)
    results = play(run_info, loggers)
    close_loggers(loggers, exit_code=0)
    events = accumulator.EventAccumulator(str(run_info.directory / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("score/A")] == [(0, 1.5), (1, 60.0), (2, 40.25)]
    assert events.Scalars("op")[0].value == pytest.approx(results["op"])


def test_tensorboard_that_is_missing_names_the_extra(run_info, monkeypatch):
    import lightning.fabric.loggers.tensorboard as module

    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(module, name, False)
    with pytest.raises(ConfigError, match=r"trace-hydra\[tensorboard\]"):
        open_loggers([tensorboard_logger], run_info)


def test_several_loggers_compose():
    assert list(compose_config(["logger=[wandb,csv,tensorboard]"]).logger) == ["wandb", "csv", "tensorboard"]
    assert not compose_config(["logger=none"]).logger
    assert wandb_logger is instantiate(compose_config([]).logger.wandb).func


def test_plain_config():
    given = {"a.b": [1, (2.5, None)], "c": {"d": Path("x")}}
    assert plain_config(given) == {"a_b": [1, [2.5, None]], "c": {"d": "x"}}
