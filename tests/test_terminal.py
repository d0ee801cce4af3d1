"""What a terminal can show, and what must not reach it."""

import io
import logging
import re
import sys

import pytest
from rich.table import Table

from trace_hydra import shown, terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM", "COLUMNS", terminal.SWEEP_LINE):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("plain ä 中 ·", "plain ä 中 ·"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\rb\x9bc\x00", "a\\rb\\x9bc\\x00"),
        ("\u202egnp\u200b", "\\u202egnp\\u200b"),
        ("two\nlines\u2028", "two\\nlines\\u2028"),
        ("\ud800", "\\ud800"),
    ],
)
def test_control_characters_become_escapes(given, written):
    assert terminal.plain(given) == written


def test_breaks_can_be_kept():
    assert terminal.plain("a\nb\x1b\t", keep="\n") == "a\nb\\x1b\\t"


@pytest.mark.parametrize(
    ("given", "live", "term", "mode"),
    [
        ("auto", True, "xterm", "bar"),
        ("auto", True, "dumb", "lines"),
        ("auto", False, "xterm", "lines"),
        ("bar", False, "xterm", "lines"),
        ("bar", True, "dumb", "lines"),
        ("lines", True, "xterm", "lines"),
        ("quiet", True, "xterm", "quiet"),
    ],
)
def test_mode(given, live, term, mode, environment):
    environment.setenv("TERM", term)
    assert terminal.mode_of(given, Terminal() if live else io.StringIO()) == mode


def test_a_job_beside_others_leaves_the_terminal_to_the_sweeps_line(environment):
    """Another process than the one that draws is quiet on a terminal, where nothing else was asked for."""
    environment.setenv(terminal.SWEEP_LINE, "1")
    modes = [terminal.mode_of(*one) for one in (("auto", Terminal()), ("bar", Terminal()), ("auto", io.StringIO()))]
    assert modes == ["quiet", "bar", "lines"]


@pytest.mark.parametrize(
    ("variables", "live", "coloured"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "0"}, False, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_colours(variables, live, coloured, environment):
    for name, value in variables.items():
        environment.setenv(name, value)
    assert terminal.colours(Terminal() if live else io.StringIO()) is coloured


def test_parts_go_by_rank():
    """Widths of 14, 10 and 5 columns: all parts, without that of rank 2, the first alone and cut."""
    parts = [(0, "[place]"), (2, " abc"), (1, " x")]
    assert [terminal.fitting(parts, width, gap="") for width in (14, 10, 5)] == ["[place] abc x", "[place] x", "[pla…"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (130, "2:10"), (3725, "1:02:05"), (200_000, "2 d 7 h")]
)
def test_clock_time(seconds, text):
    assert terminal.clock_time(seconds) == text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_text_can_be_written_in_any_encoding(encoding):
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding)
    terminal.soften(stream)
    stream.write("a · b … 中 \ud800")
    stream.flush()
    text = written.getvalue().decode(encoding)
    assert text.endswith("\\ud800") and ("中" in text or "\\u4e2d" in text)
    assert text.startswith({"ascii": "a - b ...", "latin-1": "a · b ..."}.get(encoding, "a · b …"))


def test_logs_hold_no_control_characters_and_the_terminal_only_what_weighs(tmp_path):
    shown_to, log = io.StringIO(), logging.getLogger()
    handlers = [logging.StreamHandler(shown_to), logging.FileHandler(tmp_path / "log")]
    log.handlers, before, level = handlers, log.handlers, log.level
    log.setLevel(logging.INFO)
    try:
        with terminal.plain_logs(logging.WARNING):
            log.info("hello %s", "a\x1b[2J")
            log.warning("beware %s", "b\x1b[2J")
        log.info("again")
    finally:
        log.handlers = before
        log.setLevel(level)
        handlers[1].close()
    assert shown_to.getvalue() == "beware b\\x1b[2J\nagain\n"
    assert (tmp_path / "log").read_text() == "hello a\\x1b[2J\nbeware b\\x1b[2J\nagain\n"


@pytest.fixture
def table():
    table = Table(title="a plan", title_justify="left")
    for column in ("job", "stages", "train tokens", "answers"):
        table.add_column(column, no_wrap=column != "job", justify="left" if column == "job" else "right")
    table.add_row("method=one seed=0", "8", "1,234,567", "89,012")
    table.add_row("method=another seed=0", "16", "7,654,321", "")
    return table


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_a_table_fits_and_loses_no_number(width, table, environment, monkeypatch):
    environment.setenv("COLUMNS", str(width))
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    shown.print_table(table)
    text = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert all(number in text for number in ("1,234,567", "7,654,321", "89,012", "16"))
    assert max(map(len, text.splitlines())) <= width


def test_a_table_that_is_piped_has_room(table, capsys, environment):
    environment.setenv("COLUMNS", "30")
    shown.print_table(table)
    assert "method=another seed=0" in capsys.readouterr().out
