"""W&B servers that fail in every way, and a service that dies.

Servers are real sockets on the loopback device. Nothing here asserts on seconds, but each call into a logger is bounded
by the limits of its configuration; without them a test would hang for two minutes and more.
"""

import json
import socket
import threading
from contextlib import contextmanager, nullcontext

import pytest
from logger_doubles import KEY, factory, folders, impatient, play, stage_of, upload
from wandb_file import read
from wandb_server import ERRORS, HEALTHY, REFUSES_KEY, SILENT, serve

from trace_hydra import wandb_link
from trace_hydra.loggers import close_loggers, open_loggers, plain_config
from trace_hydra.wandb_pieces import run_id


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


def shortest(cases, *kept):
    """Run the others with the long tests: each waits some seconds."""
    return [one if one in kept else pytest.param(one, marks=pytest.mark.long) for one in cases]


@pytest.mark.parametrize("how", shortest(DEAD, "refuses", "is a black hole"))
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


@pytest.mark.parametrize("how", shortest(["silent", "errors", "closed"], "silent"))
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


@pytest.mark.parametrize("how", shortest(["closed", "silent"], "silent"))
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
            play(run_info, loggers)
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
