"""What loggers write: CSV and TensorBoard that go on, disks that are full, folders that go."""

import csv
import shutil
import subprocess
import sys
import textwrap
import time

import pytest
from conftest import ROOT
from logger_doubles import factory, killed_environment, play, stage_of

from trace_hydra.csv_file import CsvFile
from trace_hydra.loggers import close_loggers, csv_logger, log_metrics, open_loggers, tensorboard_logger
from trace_hydra.plan import RunInfo


def rows_of(run: RunInfo) -> list[dict[str, str]]:
    with (run.directory / "csv" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_goes_on(run_info):
    """The second start logs stage 1 again and adds a metric: the old rows stay, once, with an empty new column."""
    loggers = open_loggers([csv_logger], run_info)
    stage_of(loggers, 1, range(1, 4))
    before = rows_of(run_info)
    loggers = open_loggers([csv_logger], run_info)
    stage_of(loggers, 1, range(1, 4))
    assert rows_of(run_info) == before
    stage_of(loggers, 2, range(4, 6))
    log_metrics(loggers, {"op": 50.0}, 2)
    after = rows_of(run_info)
    assert [{key: value for key, value in row.items() if key != "op"} for row in after[:4]] == before
    assert [row["progress/step"] for row in after] == ["1.0", "2.0", "3.0", "", "4.0", "5.0", "", ""]
    assert after[-1]["op"] == "50.0"


def test_csv_drops_a_line_that_a_kill_cut_off(run_info):
    (logger,) = open_loggers([csv_logger], run_info)
    stage_of([logger], 1, range(1, 4))
    path = run_info.directory / "csv" / "metrics.csv"
    path.write_bytes(path.read_bytes() + b"0.25,4.0")
    loggers = open_loggers([csv_logger], run_info)
    stage_of(loggers, 1, range(1, 5))
    assert [row["progress/step"] for row in rows_of(run_info)] == ["1.0", "2.0", "3.0", "", "4.0"]


def test_csv_on_a_full_disk_keeps_whole_lines(run_info, caplog):
    """A file may hold 400 bytes: what fits is there in whole lines, one warning, and the caller never hears of it."""
    code = f"""
        import resource, sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from pathlib import Path
        from doubles import two_tasks
        from logger_doubles import stage_of
        from trace_hydra.loggers import csv_logger, open_loggers
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
        loggers = open_loggers([csv_logger], two_tasks(Path({str(run_info.directory)!r})))
        stage_of(loggers, 1, range(1, 100))
        print("went on")
    """
    done = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(code)],
        env=killed_environment(run_info.directory),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "went on\n", done.stderr
    assert done.stderr.count("cannot log") == 1
    text = (run_info.directory / "csv" / "metrics.csv").read_text()
    assert text.endswith("\n") and len(text) <= 400
    steps = [float(row["progress/step"]) for row in rows_of(run_info)]
    assert steps == [float(step) for step in range(1, len(steps) + 1)] and len(steps) > 5


def test_tensorboard_adds_a_file(run_info):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for stage in (1, 2):
        loggers = open_loggers([tensorboard_logger], run_info)
        log_metrics(loggers, {"score/A": 10.0 * stage, "progress/stage": stage}, stage)
        close_loggers(loggers, exit_code=0)
    events = accumulator.EventAccumulator(str(run_info.directory / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("score/A")] == [(1, 10.0), (2, 20.0)]


def test_csv_file_has_the_interface_of_a_logger(tmp_path):
    logger = CsvFile(tmp_path / "metrics.csv")
    logger.log_hyperparams({"a": 1})
    logger.finalize("success")
    assert (logger.name, logger.version) == ("csv", "") and not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_a_deleted_run_directory_ends_nothing(run_info, no_account, caplog):
    loggers = open_loggers([factory(), csv_logger, tensorboard_logger], run_info)
    stage_of(loggers, 1, range(1, 3))
    for _ in range(100):  # TensorBoard's thread may write a file while the folder goes
        shutil.rmtree(run_info.directory, ignore_errors=True)
        if not run_info.directory.exists():
            break
        time.sleep(0.01)
    assert not run_info.directory.exists()
    stage_of(loggers, 2, range(3, 5))
    play(run_info, loggers)
    close_loggers(loggers, exit_code=0)
    assert caplog.text.count("cannot log") <= 3


@pytest.mark.long
def test_wandb_on_a_full_disk_ends_nothing(run_info, tmp_path):
    """Files may hold 20 kB, for wandb's service too, which inherits the limit."""
    code = f"""
        import resource, sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from pathlib import Path
        from doubles import two_tasks
        from logger_doubles import factory, stage_of
        from trace_hydra.loggers import close_loggers, open_loggers
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        loggers = open_loggers([factory()], two_tasks(Path({str(run_info.directory)!r})))
        stage_of(loggers, 1, range(1, 2000))
        close_loggers(loggers, exit_code=0)
        print("went on")
    """
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(code)],
        env=killed_environment(home),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.stdout, done.returncode) == ("went on\n", 0), done.stderr
