"""A real run with all loggers at once: CSV and TensorBoard users get the numbers that W&B gets."""

import csv
import json

import pytest
from conftest import run_tiny
from logger_doubles import folders
from wandb_file import read

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    quiet = ["callbacks.progress=null", "callbacks.matrix.show=false", "callbacks.capability.show=false"]
    loggers = ["logger=[wandb,csv,tensorboard]", "logger.wandb.mode=offline", "callbacks=default"]
    return run_tiny(directory, [*loggers, *quiet, "capability=smoke", "capability.when=every_stage", "method=ewc"])


@pytest.fixture(scope="module")
def wandb_numbers(run):
    """Metric -> its values in order, as floats; what W&B itself adds is left out."""
    (folder,) = folders(run)
    found = read(folder)
    numbers: dict[str, list[float]] = {}
    for row in found["history"]:
        for name, value in row.items():
            if (
                not name.startswith("_")
                and isinstance(value, int | float)
                and not name.startswith(("matrix/", "samples/"))
            ):
                numbers.setdefault(name, []).append(float(value))
    tables = ("/_type", "/path", "/sha256", "/size", "/ncols", "/nrows")
    for name, value in found["summary"].items():
        if name not in numbers and isinstance(value, int | float) and not name.startswith(("_", "matrix/", "samples/")):
            numbers[name] = [float(value)]
    return {name: values for name, values in numbers.items() if not name.endswith(tables)}


def test_csv_has_every_number(run, wandb_numbers):
    with (run.directory / "csv" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {name: [float(row[name]) for row in rows if row[name]] for name in rows[0] if name != "step"}
    axes = ("progress/",)
    for name, values in wandb_numbers.items():
        if not name.startswith(axes) or name in ("progress/op", "progress/bwt"):
            assert found[name] == pytest.approx(values), name
    assert set(wandb_numbers) <= set(found)
    assert len(wandb_numbers) > 25


def test_tensorboard_has_every_number(run, wandb_numbers):
    events = accumulator.EventAccumulator(str(run.directory / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert set(wandb_numbers) <= set(events.Tags()["scalars"])
    for name in ("op", "train/loss", "train/loss/ewc", "score/FOMC", "method/state_mb", "progress/op"):
        assert [event.value for event in events.Scalars(name)] == pytest.approx(wandb_numbers[name], rel=1e-6)


def test_final_numbers_are_those_of_the_results(run, wandb_numbers):
    results = json.loads((run.directory / "results.json").read_text())
    for name in ("op", "bwt", "forgetting"):
        assert wandb_numbers[name] == [results[name]]


def test_losses_stand_against_the_tokens_of_the_run(run):
    """Each stage ends where results.json says that so many tokens were trained on; on the way they only grow."""
    (folder,) = folders(run)
    found = read(folder)
    assert found["metrics"]["train/*"] == "progress/tokens"
    rows = [row for row in found["history"] if "train/loss" in row]
    tokens = [row["progress/tokens"] for row in rows]
    assert tokens == sorted(set(tokens)) and len(tokens) > len(run.results["tasks"])
    ends = {row["progress/stage"]: row["progress/tokens"] for row in rows}
    trained = run.results["tokens"]["train"]
    assert list(ends.values()) == [sum(trained[: stage + 1]) for stage in range(len(trained))]
    assert all(row["train/host_memory_gb"] > 0 for row in rows)
    memory = [row["train/host_memory_gb"] for row in rows]
    assert memory == sorted(memory), "a peak never falls"
