"""W&B servers that fail in every way, runs that are killed and started again, disks that are full, folders that go.

Servers are real sockets on the loopback device. Nothing here asserts on seconds, but each call into a logger is bounded
by the limits of its configuration; without them a test would hang for two minutes and more.
"""

import csv
import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import test_loggers
from conftest import ROOT
from test_loggers import factory, folders
from wandb_file import read
from wandb_server import ERRORS, HEALTHY, REFUSES_KEY, SILENT, serve

from trace_hydra import wandb_link
from trace_hydra.csv_file import CsvFile
from trace_hydra.loggers import close_loggers, csv_logger, log_metrics, open_loggers, plain_config, tensorboard_logger
from trace_hydra.plan import RunInfo
from trace_hydra.wandb_pieces import pieces, run_id, sync_command

KEY = "a" * 40
run_info, no_account = test_loggers.run_info, test_loggers.no_account


@pytest.fixture
def account(no_account):
    """A key, and little patience."""
    no_account.setenv("WANDB_API_KEY", KEY)
    no_account.setattr(wandb_link, "PATIENCE_S", 1.5)
    return no_account


def impatient(**changes):
    return factory(**{"init_timeout_s": 1.0, "finish_timeout_s": 20.0, **changes})


@contextmanager
def refused():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{free.getsockname()[1]}"  # bound but not listening


@contextmanager
def black_hole():
    """Accepts connections and never says a word, not even HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def served(*behaviour: str):
    with serve(*behaviour) as server:
        yield server.url


DEAD = {
    "refuses": (refused, "refused"),
    "is a black hole": (black_hole, "did not answer within 3 s"),
    "answers 500": (lambda: served(ERRORS), "500"),
    "answers 401": (lambda: served(REFUSES_KEY), "401"),
    "has no address": (lambda: nullcontext("http://does-not-exist.invalid"), "does-not-exist"),
    "answers, but takes no run": (lambda: served(HEALTHY, "UpsertBucket"), "Timed out initializing run"),
}


def stage_of(loggers: list, stage: int, steps: range) -> None:
    """Log what a stage logs: losses by step, then a score, with values that say where they belong."""
    for step in steps:
        log_metrics(loggers, {"train/loss": 1 / step, "progress/step": step, "progress/stage": stage}, step)
    log_metrics(loggers, {"score/A": 10.0 * stage, "progress/stage": stage}, stage)


@pytest.mark.parametrize("how", DEAD)
def test_without_a_server_the_run_is_offline_and_complete(how, run_info, account, caplog, capfd):
    """One folder with every row, the reason and the command that uploads it; nothing on stdout or stderr."""
    start, reason = DEAD[how]
    with start() as url, caplog.at_level("INFO"):
        account.setenv("WANDB_BASE_URL", url)
        loggers = open_loggers([impatient()], run_info)
        stage_of(loggers, 1, range(1, 4))
        close_loggers(loggers, exit_code=0)
    (folder,) = folders(run_info)
    assert folder.name.startswith("offline-run-")
    (why,) = [line for line in caplog.messages if line.startswith("W&B: offline (")]
    assert reason in why
    assert f"wandb sync {folder}\n" in caplog.text + "\n"
    assert [row.get("train/loss") for row in read(folder)["history"]] == [1, 1 / 2, 1 / 3, None]
    assert capfd.readouterr() == ("", "")


def test_a_healthy_server_gets_everything(run_info, account, caplog):
    with serve() as server, caplog.at_level("INFO"):
        account.setenv("WANDB_BASE_URL", server.url)
        loggers = open_loggers([impatient()], run_info)
        stage_of(loggers, 1, range(1, 4))
        close_loggers(loggers, exit_code=0)
        rows = server.history(run_id(run_info.directory))
    assert [row.get("progress/step") for row in rows] == [1, 2, 3, None]
    assert "wandb sync" not in caplog.text


@pytest.mark.parametrize("how", ["silent", "errors", "closed"])
def test_a_server_lost_during_the_run_costs_no_row(how, run_info, account, caplog, capfd):
    """The part on disk is whole and ends with the exit code; after its upload each of W&B's steps is there once."""
    with serve() as server, caplog.at_level("INFO"):
        account.setenv("WANDB_BASE_URL", server.url)
        loggers = open_loggers([impatient()], run_info)
        stage_of(loggers, 1, range(1, 4))
        if how == "closed":
            server.close()
        else:
            server.behaviour = {"silent": SILENT, "errors": ERRORS}[how]
        stage_of(loggers, 2, range(4, 7))
        close_loggers(loggers, exit_code=3)
    (folder,) = folders(run_info)
    assert folder.name.startswith("run-") and "W&B did not finish" in caplog.text
    assert f"wandb sync --include-online {folder}" in caplog.text
    found = read(folder)
    assert [row.get("progress/step") for row in found["history"]] == [1, 2, 3, None, 4, 5, 6, None]
    assert found["exit_code"] == 3
    assert capfd.readouterr() == ("", "")
    with serve() as again:
        upload(found=[folder], url=again.url)
        steps = {row["_step"]: row.get("progress/step") for row in again.history(found["run"].run_id)}
    assert steps == dict(enumerate([1, 2, 3, None, 4, 5, 6, None]))


def test_the_next_run_of_the_process_starts_afresh(run_info, account, tmp_path):
    """After a lost server wandb's service was ended; a sweep's next job gets a new one."""
    from dataclasses import replace

    with serve() as server:
        account.setenv("WANDB_BASE_URL", server.url)
        loggers = open_loggers([impatient()], run_info)
        server.behaviour = SILENT
        close_loggers(loggers, exit_code=0)
    with serve() as server:
        account.setenv("WANDB_BASE_URL", server.url)
        other = replace(run_info, directory=tmp_path / "other")
        loggers = open_loggers([impatient()], other)
        stage_of(loggers, 1, range(1, 3))
        close_loggers(loggers, exit_code=0)
        assert len(server.history(run_id(other.directory))) == 3


def test_an_upload_that_wandb_gave_up_is_noticed(run_info, account, caplog):
    """wandb stops uploading for good after some refusals and then ends as if all was well; its own log says so."""
    with serve() as server, caplog.at_level("INFO"):
        account.setenv("WANDB_BASE_URL", server.url)
        loggers = open_loggers([impatient()], run_info)
        (folder,) = folders(run_info)
        with (folder / "logs" / "debug-internal.log").open("a") as file:
            file.write('{"level":"ERROR+4","msg":"filestream: fatal error: filestream: failed to upload: 401"}\n')
        close_loggers(loggers, exit_code=0)
    assert "refused data" in caplog.text and f"wandb sync --include-online {folder}" in caplog.text


# Restarts


def upload(found: list[Path], url: str) -> None:
    """Run the printed command."""
    command = sync_command(found)
    assert command is not None
    program, *arguments = shlex.split(command)
    environment = {
        "PATH": "/usr/bin:/bin",
        "WANDB_BASE_URL": url,
        "WANDB_API_KEY": KEY,
        "HOME": str(found[0]),
        "WANDB_ERROR_REPORTING": "false",
    }
    program = str(Path(sys.executable).with_name(program))
    subprocess.run([program, *arguments], env=environment, cwd=found[0], check=True, capture_output=True, timeout=60)


def killed_run(run: RunInfo, *, steps: range, environment: dict[str, str]) -> None:
    """Log stage 1 and some of stage 2 in a process of its own, let wandb write its file, and die by SIGKILL."""
    code = f"""
        import os, sys, time
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from pathlib import Path
        from dataclasses import replace
        from doubles import two_tasks
        from test_loggers import factory
        from test_logger_faults import stage_of, log_metrics
        from trace_hydra.loggers import open_loggers, csv_logger
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


def killed_environment(home: Path) -> dict[str, str]:
    """Of a process without an account; the fonts are those that this one found already."""
    import matplotlib

    places = {
        "HOME": home,
        "NETRC": home / "netrc",
        "WANDB_CONFIG_DIR": home,
        "MPLCONFIGDIR": matplotlib.get_cachedir(),
    }
    return {**{name: str(place) for name, place in places.items()}, "OMP_NUM_THREADS": "1"}


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


# CSV and TensorBoard


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
        from test_logger_faults import stage_of
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


# Folders that go, services that die


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_a_deleted_run_directory_ends_nothing(run_info, no_account, caplog):
    loggers = open_loggers([factory(), csv_logger, tensorboard_logger], run_info)
    stage_of(loggers, 1, range(1, 3))
    shutil.rmtree(run_info.directory)
    stage_of(loggers, 2, range(3, 5))
    test_loggers.play(run_info, loggers)
    close_loggers(loggers, exit_code=0)
    assert caplog.text.count("cannot log") <= 3


def test_a_wandb_service_that_dies_ends_nothing(run_info, no_account, caplog):
    """What was flushed stays, one warning, and the command that uploads it."""
    import time

    from wandb.sdk import wandb_setup

    loggers = open_loggers([factory()], run_info)
    stage_of(loggers, 1, range(1, 3))
    time.sleep(2.5 * wandb_link.FLUSH_S)
    wandb_setup.singleton()._connection._proc._process.kill()  # type: ignore[union-attr]
    with caplog.at_level("INFO"):
        stage_of(loggers, 2, range(3, 2000))
        close_loggers(loggers, exit_code=0)
    (folder,) = folders(run_info)
    assert "W&B did not finish" in caplog.text and f"wandb sync {folder}" in caplog.text


def test_wandb_on_a_full_disk_ends_nothing(run_info, tmp_path):
    """Files may hold 20 kB, for wandb's service too, which inherits the limit."""
    code = f"""
        import resource, sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from pathlib import Path
        from doubles import two_tasks
        from test_loggers import factory
        from test_logger_faults import stage_of
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


# Secrets


def test_no_secret_reaches_wandb(run_info, account):
    """Neither by its key nor, wherever it stands, by being a secret of the environment; what is no secret stays."""
    from dataclasses import replace

    config = {
        "logger": {"wandb": {"settings": {"api_key": "b" * 40}}},
        "judge": {"api_key_env": None, "max_tokens": 512},
        "note": f"with {KEY} in it",
    }
    plain = plain_config(config)
    assert plain["judge"] == {"api_key_env": None, "max_tokens": 512}
    with serve() as server:
        account.setenv("WANDB_BASE_URL", server.url)
        close_loggers(open_loggers([impatient()], replace(run_info, config=config)), exit_code=0)
        sent = json.dumps(server.runs[run_id(run_info.directory)])
    assert "max_tokens" in sent and KEY not in sent and "b" * 40 not in sent
    on_disk = b"".join(path.read_bytes() for path in run_info.directory.rglob("*") if path.is_file())
    assert KEY.encode() not in on_disk and b"b" * 40 not in on_disk


def test_nothing_waits_for_wandb_while_a_run_goes_on(run_info, account):
    """5000 rows go into a run whose server swallows everything; what they wait for is set free only afterwards."""
    with serve() as server:
        account.setenv("WANDB_BASE_URL", server.url)
        loggers = open_loggers([impatient()], run_info)
        server.behaviour = SILENT
        done = threading.Event()

        def train():
            stage_of(loggers, 1, range(1, 5000))
            done.set()

        threading.Thread(target=train, daemon=True).start()
        assert done.wait(60) and not server.closing.is_set()
        close_loggers(loggers, exit_code=0)
    (folder,) = folders(run_info)
    assert len(read(folder)["history"]) == 5000


def test_csv_file_has_the_interface_of_a_logger(tmp_path):
    logger = CsvFile(tmp_path / "metrics.csv")
    logger.log_hyperparams({"a": 1})
    logger.finalize("success")
    assert (logger.name, logger.version) == ("csv", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["closed", "silent"])
def test_tables_do_not_wait_for_a_lost_server(how, run_info, account, caplog):
    """wandb asks the server about each table, 20 s for each where it is lost; all three of a run are on disk.

    The part on disk names the rows of the curves and one file a table.
    """
    with serve() as server:
        account.setenv("WANDB_BASE_URL", server.url)
        loggers = open_loggers([impatient()], run_info)
        if how == "closed":
            server.close()
        else:
            server.behaviour = SILENT
        account.setattr(wandb_link, "_problem", lambda *_: "")  # as if it died after it was asked
        waiting = threading.Event()

        def train():
            test_loggers.play(run_info, loggers)
            waiting.set()

        threading.Thread(target=train, daemon=True).start()
        # `play` draws three pictures; three tables that wait take a minute.
        assert waiting.wait(45)
        account.setattr(wandb_link, "_problem", lambda *_: "gone")
        close_loggers(loggers, exit_code=0)
    (folder,) = folders(run_info)
    tables = [row for row in read(folder)["history"] if "matrix/table/path" in row]
    assert [row["progress/stage"] for row in tables] == [0, 1, 2]
    assert all((folder / "files" / row["matrix/table/path"]).is_file() for row in tables)
    assert "cannot log" not in caplog.text
