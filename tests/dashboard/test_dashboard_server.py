"""`python -m trace_hydra.dashboard` against a server that keeps pages, and that fails as real ones do.

The pages are small stand-ins, so that these tests need no wandb-workspaces.
"""

import base64
import json
import socket
import sys

import pytest
from logger_doubles import KEY
from view_server import EMPTY, ERRORS, FOREIGN, NO_PROJECT, SILENT, TRUNCATED, serve_views

from trace_hydra.dashboard import __main__ as command
from trace_hydra.dashboard import pages

ARGUMENTS = ["--entity", "lab", "--project", "trace"]
PAGES = {
    "format": 1,
    "workspace": {"name": "nw-abc-v", "title": "T", "description": "", "spec": {"section": {"runSets": [{"id": "r"}]}}},
    "report": {
        "name": "def",
        "title": "T: a/b",
        "description": "d",
        "spec": {"blocks": [{"metadata": {"runSets": [{"id": "s", "name": "Läufe"}]}}, {"text": "t"}]},
    },
}


@pytest.fixture
def small(account, monkeypatch):
    monkeypatch.setattr(pages, "build", lambda facts: PAGES)
    return account


def call(account, url, *more):
    account.setenv("WANDB_BASE_URL", url)
    return command.main([*ARGUMENTS, "--timeout", "5", *more])


def test_pages_are_written_and_written_again(small, capsys):
    """Two pages, not four: the second call finds those of the first by their names. Each run set is the project's."""
    with serve_views() as views:
        assert call(small, views.url) == 0
        first = capsys.readouterr()
        assert call(small, views.url) == 0
        assert capsys.readouterr() == first
        one, two = views.stored.values()
        assert (one["type"], one["name"], two["type"], two["name"]) == ("project-view", "nw-abc-v", "runs", "def")
        project = {"id": "4711", "name": "trace", "entityName": "lab"}
        assert json.loads(one["spec"]) == {"section": {"runSets": [{"id": "r", "project": project}]}}
        (grid, text) = json.loads(two["spec"])["blocks"]
        assert grid == {"metadata": {"runSets": [{"id": "s", "name": "Läufe", "project": project}]}}
        assert text == {"text": "t"}
        assert "project" not in json.dumps(PAGES), "the pages on disk name no project"
        home = f"{views.url}/lab/trace"
        assert first.out == f"workspace: {home}?nw=abc\nreport: {home}/reports/T-a-b--Vmlldzo1\n"
        operations = [operation for operation, _ in views.asked]
        assert operations == ["Project", "Views", "UpsertView", "Views", "UpsertView"] * 2
        assert {base64.b64decode(one.removeprefix("Basic ")).decode() for one in views.authorizations} == {f"api:{KEY}"}
        assert first.err == ""


FAULTS = {
    "key is refused": (401, "", "wandb login --relogin"),
    "no right to write": (403, "UpsertView", "The account may not do this"),
    "nothing at this address": (404, "", "WANDB_BASE_URL"),
    "no such project": (NO_PROJECT, "", "no project lab/trace"),
    "too many requests": (429, "Views", "too many requests"),
    "server is broken": (500, "UpsertView", "try again later"),
    "gateway is broken": (502, "", "try again later"),
    "never answers": (SILENT, "Views", "did not answer within 5 s"),
    "half an answer": (TRUNCATED, "", "gave half an answer"),
    "something else answers": (FOREIGN, "", "not W&B's"),
    "refuses in GraphQL": (ERRORS, "UpsertView", "could not parse spec"),
    "leaves out the project": (EMPTY, "Project", "gave half an answer"),
    "leaves out the views": (EMPTY, "Views", "gave half an answer"),
    "leaves out what was written": (EMPTY, "UpsertView", "gave half an answer"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_failing_server_is_one_message(name, small, capsys):
    """Exit status 1 and one line that says what, where and what to do; no key, no traceback, no control character."""
    fault, at, expected = FAULTS[name]
    with serve_views(fault, at) as views:
        assert call(small, views.url) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith("trace_hydra.dashboard: ") and printed.err.count("\n") == 1
        assert expected in printed.err and views.url in printed.err
        assert KEY not in printed.err + printed.out and "Traceback" not in printed.err
        assert "\x1b" not in printed.err
        assert isinstance(fault, str) or fault == 429 or f"answered {fault}." in printed.err  # wandb waits at a 429


def test_a_server_that_is_down(small, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound but not listening
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert call(small, url) == 1
    printed = capsys.readouterr().err
    assert url in printed and printed.count("\n") == 1 and KEY not in printed


def test_without_a_key_nobody_is_asked(small, no_account, capsys):
    no_account.delenv("WANDB_API_KEY")
    no_account.setattr("builtins.input", lambda *_: pytest.fail("asked for a key"))
    with serve_views() as views:
        assert call(small, views.url) == 1
        assert views.asked == []
    assert "no API key is configured" in capsys.readouterr().err


def test_a_key_of_the_wrong_form_is_not_shown(small, capsys):
    small.setenv("WANDB_API_KEY", "my secret!")
    with serve_views() as views:
        assert call(small, views.url) == 1
        assert views.asked == []
    printed = capsys.readouterr().err
    assert "my secret!" not in printed and printed.count("\n") == 1


def test_wandb_switched_off(small, capsys):
    small.setenv("WANDB_MODE", "offline")
    with serve_views() as views:
        assert call(small, views.url) == 1
        assert views.asked == []
    assert "say offline" in capsys.readouterr().err


def test_offline_asks_nobody_and_writes_the_spec(small, tmp_path, capsys):
    file = tmp_path / "new" / "spec.json"
    with serve_views() as views:
        small.setenv("WANDB_BASE_URL", views.url)
        assert command.main(["--offline", "--spec", str(file)]) == 0
        assert json.loads(file.read_text(encoding="utf-8")) == PAGES
        assert capsys.readouterr().out == f"spec: {file}\n"
        assert command.main(["--offline"]) == 0
        assert json.loads(capsys.readouterr().out) == PAGES
        assert views.asked == []


def test_a_spec_that_cannot_be_written(small, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command.main(["--offline", "--spec", str(tmp_path / "file" / "spec.json")]) == 1
    assert "spec.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--entity", "lab"],
        ["--entity", "lab/else", "--project", "trace"],
        ["--entity", "lab", "--project", "trace\n"],
        [*ARGUMENTS, "--timeout", "0"],
        [*ARGUMENTS, "--timeout", "nan"],
        [*ARGUMENTS, "--timeout", "soon"],
    ],
)
def test_wrong_arguments(arguments, small, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2 and "usage:" in capsys.readouterr().err


def test_a_missing_package_is_named(account, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    assert command.main(["--offline"]) == 1
    assert "trace-hydra[dashboard]" in capsys.readouterr().err


@pytest.mark.parametrize("content", [{}, {"broken": True}])
def test_folders_without_a_finished_run(content, small, tmp_path, capsys):
    if content:
        (tmp_path / "run" / ".hydra").mkdir(parents=True)
        (tmp_path / "run" / "results.json").write_text(json.dumps(content))
    assert command.main(["--offline", "--runs", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert "no finished run below it" in printed and ("results.json lacks" in printed) == bool(content)
