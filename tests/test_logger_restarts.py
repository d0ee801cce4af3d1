"""Runs that are killed and started again: W&B sees one run, each of its steps once."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT
from logger_doubles import factory, folders, impatient, killed_environment, stage_of, upload
from wandb_file import read
from wandb_server import serve

from trace_hydra.loggers import close_loggers, open_loggers
from trace_hydra.plan import RunInfo
from trace_hydra.wandb_pieces import pieces, run_id


def killed_run(run: RunInfo, *, steps: range, environment: dict[str, str]) -> None:
    """Log stage 1 and some of stage 2 in a process of its own, let wandb write its file, and die by SIGKILL."""
    code = f"""
        import os, sys, time
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from pathlib import Path
        from dataclasses import replace
        from doubles import two_tasks
        from logger_doubles import factory, stage_of
        from trace_hydra.loggers import csv_logger, log_metrics, open_loggers
        from trace_hydra.wandb_link import FLUSH_S
        loggers = open_loggers([factory(), csv_logger], two_tasks(Path({str(run.directory)!r})))
        stage_of(loggers, 1, range({steps.start}, {steps.stop - 1}))
        step = {steps.stop - 1}
        log_metrics(loggers, {{"train/loss": 1 / step, "progress/step": step, "progress/stage": 2}}, step)
        time.sleep(2.5 * FLUSH_S)
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(code)], env=environment, cwd=ROOT, capture_output=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.long
def test_a_killed_run_goes_on_as_the_same_wandb_run(run_info, no_account, tmp_path_factory, caplog):
    """Steps 1-4 before the kill, 1-6 after it (the store replays 1-3, 4 is trained again): each stands once.

    W&B's own steps: 0-2 losses 1-3, 3 the score, 4 loss 4; then 5 and 6 losses 5 and 6, 7 the score of stage 2.
    """
    home = tmp_path_factory.mktemp("home")
    killed_run(run_info, steps=range(1, 5), environment=killed_environment(home))
    with caplog.at_level("INFO"):
        loggers = open_loggers([factory()], run_info)
        stage_of(loggers, 1, range(1, 4))
        stage_of(loggers, 2, range(4, 7))
        close_and_wait(run_info, loggers)
    both = pieces(run_info.directory, run_id(run_info.directory))
    assert len(both) == 2 and f"wandb sync {both[0]} {both[1]}" in caplog.text
    last = read(both[1])
    assert last["run"].run_id == run_id(run_info.directory)
    assert [(row["_step"], row.get("progress/step")) for row in last["history"]] == [(5, 5), (6, 6), (7, None)]
    with serve() as server:
        upload(both, server.url)
        rows = server.history(last["run"].run_id)
        assert [(row["_step"], row.get("progress/step")) for row in rows] == [
            *((step, step + 1) for step in range(3)),
            *((3, None), (4, 4), (5, 5), (6, 6), (7, None)),
        ]
        assert [row["score/A"] for row in rows if "score/A" in row] == [10.0, 20.0]
        assert set(server.runs) == {last["run"].run_id}


def close_and_wait(run: RunInfo, loggers: list) -> None:
    """Close as a process that ends would: `finish` returns a moment before wandb's service has written everything."""
    close_loggers(loggers, exit_code=1)
    read(pieces_by_time(run)[-1])


def pieces_by_time(run: RunInfo) -> list[Path]:
    return sorted(folders(run), key=lambda path: path.stat().st_ctime)


def test_an_online_run_is_resumed_online(run_info, account):
    """What the first start logged is not sent again; the server's rows are one run."""
    with serve() as server:
        account.setenv("WANDB_BASE_URL", server.url)
        for stages in (1, 2):
            loggers = open_loggers([impatient()], run_info)
            for stage in range(1, stages + 1):
                stage_of(loggers, stage, range(3 * stage - 2, 3 * stage + 1))
            close_and_wait(run_info, loggers)
        rows = server.history(run_id(run_info.directory))
    assert [(row["_step"], row.get("progress/step")) for row in rows] == list(enumerate([1, 2, 3, None, 4, 5, 6, None]))


def test_what_follows_a_part_not_uploaded_waits_for_it(run_info, account, caplog):
    """Offline first; then the server is up, but an upload of the first part would come behind the second."""
    with serve() as server, caplog.at_level("INFO"):
        account.setenv("WANDB_BASE_URL", server.url)
        loggers = open_loggers([factory(mode="offline")], run_info)
        stage_of(loggers, 1, range(1, 3))
        close_and_wait(run_info, loggers)
        loggers = open_loggers([impatient()], run_info)
        stage_of(loggers, 2, range(3, 5))
        close_and_wait(run_info, loggers)
        assert "an earlier part of this run is not uploaded yet" in caplog.text and not server.runs
        upload(pieces(run_info.directory, run_id(run_info.directory)), server.url)
        loggers = open_loggers([impatient()], run_info)
        stage_of(loggers, 3, range(5, 7))
        close_loggers(loggers, exit_code=0)
        rows = server.history(run_id(run_info.directory))
    assert [row.get("progress/step") for row in rows] == [1, 2, None, 3, 4, None, 5, 6, None]
    assert [row["_step"] for row in rows] == list(range(9))


def test_ids(run_info, caplog):
    """One a directory, of letters and digits, in a file; one that W&B would refuse is not used."""
    first = run_id(run_info.directory)
    assert first == run_id(run_info.directory) == (run_info.directory / "wandb_id").read_text().strip()
    assert first.isalnum() and first.isascii()
    (run_info.directory / "wandb_id").write_text("a/b:c\n")
    assert run_id(run_info.directory).isalnum() and "holds no W&B id" in caplog.text


def test_an_id_of_the_environment_is_used(run_info, no_account):
    """As W&B's sweep agent sets it."""
    no_account.setenv("WANDB_RUN_ID", "agents-own")
    close_loggers(open_loggers([factory()], run_info), exit_code=0)
    assert read(folders(run_info)[0])["run"].run_id == "agents-own"


def test_a_cut_off_file_counts_as_far_as_it_goes(run_info, no_account):
    """Cut anywhere, the file gives rows 1..n in order; a start after that logs on from there."""
    loggers = open_loggers([factory()], run_info)
    stage_of(loggers, 1, range(1, 30))
    close_loggers(loggers, exit_code=0)
    (folder,) = folders(run_info)
    read(folder)
    (path,) = folder.glob("run-*.wandb")
    whole, counts = path.read_bytes(), set()
    from trace_hydra.wandb_pieces import earlier

    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        known = earlier(run_info.directory, run_id(run_info.directory))
        assert known.logged.get("train/loss", 0) == min(known.next_step, 29)
        counts.add(known.next_step)
    assert len(counts) > 20
