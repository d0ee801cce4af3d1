"""`logger.wandb.artifacts`: files of a finished run, on request."""

from dataclasses import replace

import pytest
from logger_doubles import factory, folders, upload
from wandb_file import read, records
from wandb_server import serve

from trace_hydra.errors import ConfigError
from trace_hydra.loggers import close_loggers, open_loggers


@pytest.fixture
def finished(run_info, tmp_path):
    """A run directory and a store with its last stage."""
    for name in ("results.json", "report.md", ".hydra/config.yaml"):
        path = run_info.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n")
    (run_info.directory / "secret.txt").write_text("not asked for\n")
    stage = tmp_path / "store" / "stages" / run_info.stages[-1].key
    stage.mkdir(parents=True)
    for name in ("weights.safetensors", "state.json", "manifest.json"):
        (stage / name).write_bytes(b"w" * 10)
    return replace(run_info, config={**run_info.config, "paths": {"store": str(tmp_path / "store")}})


def artifacts_of(run) -> dict[str, dict[str, int]]:
    """Kind -> file -> bytes of what the run's file asks to upload."""
    (folder,) = folders(run)
    read(folder)  # waits until it is whole
    (path,) = folder.glob("run-*.wandb")
    found = [record.request.log_artifact.artifact if record.WhichOneof("record_type") == "request" else record.artifact
             for record in records(path) if record.WhichOneof("record_type") in ("artifact", "request")]  # fmt: skip
    return {one.type: {entry.path: entry.size for entry in one.manifest.contents} for one in found if one.type}


def logged(run, artifacts, exit_code=0) -> dict[str, dict[str, int]]:
    loggers = open_loggers([factory(artifacts=artifacts)], run)
    close_loggers(loggers, exit_code=exit_code)
    return artifacts_of(run)


def test_nothing_unless_asked_for(finished, no_account):
    loggers = open_loggers([factory()], finished)
    close_loggers(loggers, exit_code=0)
    assert artifacts_of(finished) == {}


def test_results_and_weights(finished, no_account):
    """Lengths: "results.json" 12 characters and a line end; weights 10 bytes."""
    found = logged(finished, ["results", "weights"])
    assert found == {
        "results": {"results.json": 13, "report.md": 10, "config.yaml": 19},
        "weights": {"weights.safetensors": 10, "state.json": 10, "manifest.json": 10},
    }


def test_a_run_that_failed_has_none(finished, no_account):
    assert logged(finished, ["results", "weights"], exit_code=1) == {}


def test_weights_that_the_store_dropped_are_said(finished, no_account, tmp_path, caplog):
    (tmp_path / "store" / "stages" / finished.stages[-1].key / "weights.safetensors").unlink()
    with caplog.at_level("WARNING"):
        assert set(logged(finished, ["weights", "results"])) == {"results"}
    assert "store.keep=all, last or adapters" in caplog.text


def test_an_unknown_kind_is_refused(finished, no_account):
    with pytest.raises(ConfigError, match="there are results, weights"):
        open_loggers([factory(artifacts=["results", "model"])], finished)


def test_a_server_gets_them(finished, account):
    """Online: files are there when the run ends. Offline: when it is uploaded."""
    with serve() as server:
        account.setenv("WANDB_BASE_URL", server.url)
        close_loggers(open_loggers([factory(artifacts=["results"])], finished), exit_code=0)
        assert "CreateArtifact" in " ".join(server.requests)


def test_an_upload_takes_them_along(finished, no_account):
    close_loggers(open_loggers([factory(artifacts=["results"])], finished), exit_code=0)
    with serve() as server:
        upload(folders(finished), server.url)
        assert "CreateArtifact" in " ".join(server.requests)
