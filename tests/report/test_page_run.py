"""report.html of one run: the numbers of results.json, and why those are missing that are."""

import base64
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest
from page_reading import Page, text, value
from report_doubles import TASKS, capability, write_run

from trace_hydra import files
from trace_hydra.report import page as page_module
from trace_hydra.report import results as results_module
from trace_hydra.report.page import page_of_run, run_page
from trace_hydra.report.results import clear, write_results
from trace_hydra.statistics import ItemDeltas, read_scores


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that has everything: folder, results, page."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    results = write_run(folder, capability=capability(failed=True), rows=20)
    return folder, results, Page(run_page(results, folder))


def shown(number: float, digits: int = 2, sign: bool = False) -> str:
    return f"{number:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def test_the_verdict_is_that_of_results_json(whole):
    _, results, page = whole
    for key in ("op", "bwt", "forgetting"):
        card = page.one("li", data_key=key)
        big = card.find("p[@class='big']")
        assert big is not None and value(big) == results[key]
        assert text(big) == shown(results[key], sign=key == "bwt")
    for area in ("general", "instruction", "safety"):
        card = page.one("li", data_key=f"delta_{area}")
        delta = results["capability"][area]
        assert shown(delta["delta"], sign=True) in text(card)
        assert f"{shown(delta['interval'][0], sign=True)} to {shown(delta['interval'][1], sign=True)}" in text(card)
    assert "start model 45.00, now 41.50" in text(page.one("li", data_key="delta_general"))


def test_bars_and_table_of_abilities_have_the_same_intervals(whole, monkeypatch):
    folder, results, _ = whole
    drawn = {}
    deltas = {
        name: ItemDeltas(one["area"], False, ("a", "b", "c"), np.array([-100.0, 0.0, -100.0]), np.full(3, 1 / 3))
        for name, one in results["capability"]["sets"].items()
    }
    scores = dataclasses.replace(read_scores(folder, results), sets=deltas)
    monkeypatch.setattr(page_module.run_view, "scores_of", lambda *_: scores)
    monkeypatch.setattr(page_module, "drawn", lambda kind, *given, **_: drawn.update({kind: given}))
    rows = Page(run_page(results, folder)).cells("sets")
    ends = drawn["capability_bars"][1]
    for row in rows:
        low, high = (shown(end, sign=True) for end in ends[text(row["set"])])
        assert text(row["95 % interval"]) == f"{low} to {high}"
    assert rows


def test_the_change_against_the_start_model_has_an_interval(whole):
    """OP's: mean of the last row - mean of row 0."""
    _, results, page = whole
    change = sum(results["matrix"][-1]) / 8 - sum(results["matrix"][0]) / 8
    said = text(page.one("li", data_key="op"))
    found = re.search(r"against the start model: (\S+) \[(\S+) to (\S+)\]", said)
    assert found and found[1] == shown(change, sign=True)
    low, high = (float(found[place].replace("−", "-")) for place in (2, 3))
    assert low < change < high


def test_the_matrix_is_that_of_results_json(whole):
    _, results, page = whole
    rows = page.rows("matrix")
    assert [[value(cell) for cell in row[1:]] for row in rows] == results["matrix"]
    for row, expected in zip(rows, results["matrix"], strict=True):
        for cell, number in zip(row[1:], expected, strict=True):
            assert text(cell) == (shown(number) if number is not None else "–not scored")
    assert text(rows[0][0]) == "before" and text(rows[3][0]) == "3 MeetingBank"
    own = [[("own" in cell.attrib["class"].split()) for cell in row[1:]] for row in rows]
    assert own == [[row == column + 1 for column in range(8)] for row in range(9)]


def test_the_table_of_tasks_has_start_own_stage_and_end(whole):
    _, results, page = whole
    matrix = results["matrix"]
    for column, row in enumerate(page.rows("tasks")):
        start, own, last = matrix[0][column], matrix[column + 1][column], matrix[8][column]
        assert text(row[0]) == TASKS[column]
        assert [value(row[place]) for place in (1, 2, 3)] == [start, own, last]
        assert value(row[5]) == last - own and value(row[6]) == last - start


def test_cost_settings_and_commands_are_there(whole):
    folder, _, page = whole
    before, first, *_ = page.cells("cost")
    assert value(first["trained tokens"]) == 900 and value(first["tokens/s"]) == 200
    assert text(first["training time"]) == "4.5 s" and value(first["method's state"]) == 1.25
    assert "nothing is trained before stage 1" in text(before["rows"])
    commands = [text(one) for one in page.all("pre")]
    assert commands[0] == """python -m trace_hydra 'seed='"'"'0'"'"''"""
    assert commands[1] == f"python -m trace_hydra.score {folder} protocol=official"
    assert "8/mmlu: no file" in page.text


def test_the_sentence_says_what_was_run(whole):
    _, _, page = whole
    said = text(page.one("p", **{"class": "lead"}))
    assert said == (
        "Model tiny learned 8 tasks one after the other (data mini, order trace, seed 0) with method plain and tuning "
        "full, and was scored under protocol greedy [0123456789ab], scoring corrected."
    )


def test_nothing_is_loaded_from_elsewhere_and_only_our_script_runs(whole):
    folder, results, _ = whole
    html = run_page(results, folder)
    page = Page(html)
    policy = page.one("meta", http_equiv="Content-Security-Policy").attrib["content"]
    assert policy.startswith("default-src 'none';") and "unsafe-inline'; script" in policy
    for tag in ("script", "style"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", html, flags=re.S)
        assert content and html.count(f"<{tag}") == 1
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    for element in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert element.get(name, "#").startswith("#"), element.attrib
    assert not [name for one in page.elements for name in one.attrib if name.startswith("on")]
    assert "url(" not in html.replace("url(#", "")


def test_ids_are_there_once_and_labels_find_them(whole):
    _, _, page = whole
    ids = [one.attrib["id"] for one in page.elements if one.get("id")]
    assert len(ids) == len(set(ids))
    for one in page.elements:
        for name in one.get("aria-labelledby", "").split():
            assert name in ids
        if one.get("href", "").startswith("#"):
            assert one.attrib["href"][1:] in ids


def test_headings_go_down_one_level_at_a_time(whole):
    _, _, page = whole
    levels = [int(one.tag[1]) for one in page.elements if re.fullmatch("h[1-6]", one.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_every_table_says_what_its_heads_are_for(whole):
    _, _, page = whole
    assert page.one("html").attrib["lang"] == "en"
    for table in page.all("table"):
        assert len(table.findall("caption")) == 1
        assert all(one.get("scope") in ("col", "row") for one in table.iter("th"))
    for svg in page.all("svg"):
        assert svg.attrib["role"] == "img" and svg.attrib["aria-labelledby"]


def test_a_run_without_row_0_says_what_is_missing(tmp_path):
    results = write_run(tmp_path / "run", row0=False)
    page = Page(run_page(results, tmp_path / "run"))
    assert "Row 0 was not scored" in page.text
    assert "against the start model: not known, cells of row 0 or of the last row are missing" in page.text
    fwt = page.rows("more")[2]
    assert text(fwt[0]) == "FWT" and "not known: R[0,FOMC], R[0,MeetingBank]" in text(fwt[1]) and value(fwt[1]) is None
    assert value(page.rows("tasks")[0][1]) is None and "row 0 was not scored" in text(page.rows("tasks")[0][1])


def test_missing_cells_take_their_numbers_with_them(tmp_path):
    """Without R[8,FOMC] there is no OP and no BWT; nothing is put in their place."""
    from trace_hydra.metrics.continual import ScoreMatrix, summary

    folder = tmp_path / "run"
    results = write_run(folder)
    results["matrix"][8][1] = None
    results |= {**summary(ScoreMatrix(list(TASKS), results["matrix"])), "complete": False}
    results["cells"] = [one for one in results["cells"] if (one["row"], one["task"]) != (8, "FOMC")]
    page = Page(run_page(results, folder))
    assert "Incomplete: not every planned cell" in page.text
    for key in ("op", "bwt", "forgetting"):
        card = page.one("li", data_key=key)
        assert "not known: R[8,FOMC]" in text(card) and "95 %" not in text(card)
        assert not [one for one in card.iter() if "data-value" in one.attrib]
    assert "Not known for FOMC" in page.text


def test_one_task_has_nothing_to_forget(tmp_path):
    results = write_run(tmp_path / "run", tasks=("FOMC",))
    page = Page(run_page(results, tmp_path / "run"))
    assert "needs at least 2 tasks" in text(page.one("li", data_key="bwt"))
    assert "There is one task; nothing is trained after it." in page.text


@pytest.mark.parametrize(
    "damage",
    [
        {"confidence": "x", "capability": None, "stages": [1, "a"], "cells": None, "tokens": []},
        {"op": "high", "bwt": True, "protocol": None, "seed": [3], "missing": 4, "wall_clock_s": None},
        {"schema": 0, "name": None, "versions": None, "disclosures": None, "truncated": 3, "carried": None},
    ],
)
def test_damaged_or_older_results_are_shown_as_far_as_they_go(tmp_path, damage):
    results = write_run(tmp_path / "run")
    page = Page(run_page({**results, **damage}, tmp_path / "run"))
    assert [[value(cell) for cell in row[1:]] for row in page.rows("matrix")] == results["matrix"]
    assert "results.json" in text(page.one("ul", **{"class": "notices"}))
    for key, wrong in damage.items():
        if key in ("op", "bwt"):
            assert value(page.all("p", **{"class": "big"})[0]) is None
            assert f"{key} ({wrong})" in page.text


def test_files_that_are_gone_are_named(tmp_path):
    folder = tmp_path / "run"
    results = write_run(folder)
    for name in ("predictions", ".hydra", "csv", "test_rows"):
        shutil.rmtree(folder / name)
    (folder / "audit.json").unlink()
    page = Page(run_page(results, folder))
    for said in (
        "Answers could not be read",
        "The command line is not known",
        "No logger left the losses",
        "The audit of the data cannot be shown",
        "No answers:",
    ):
        assert said in page.text
    confidence = results["confidence"]["op"]
    assert f"95 %: {shown(confidence[0])} to {shown(confidence[1])}" in text(page.one("li", data_key="op"))


def test_results_are_not_lost_for_a_page(tmp_path, monkeypatch, caplog):
    """A fault of ours in the page: results.json is there, and report.html says what happened."""
    folder = tmp_path / "run"
    results = write_run(folder)
    (folder / "results.json").unlink()

    def fail(*_):
        raise KeyError("<b>odd</b>")

    monkeypatch.setattr(page_module.run_view, "verdicts", fail)
    write_results(results, folder)
    assert json.loads((folder / "results.json").read_text()) == results
    page = Page((folder / "report.html").read_text())
    assert "This report could not be drawn" in page.text and "KeyError: '<b>odd</b>'" in page.text
    assert f"python -m trace_hydra.report {folder}" in page.text
    assert "report.html of" in caplog.text


def test_a_figure_that_cannot_be_drawn_leaves_the_page(tmp_path, monkeypatch, caplog):
    results = write_run(tmp_path / "run")
    from trace_hydra.report import figures

    monkeypatch.setattr(figures, "lines_over_stages", lambda *_: 1 / 0)
    page = Page(run_page(results, tmp_path / "run"))
    assert "This figure could not be drawn; its numbers stand in the table." in page.text
    assert "ZeroDivisionError" in caplog.text and len(page.all("svg")) == 1


def test_the_page_is_written_before_results_json_and_cleared_with_it(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    results = write_run(folder)
    order, write = [], files.put_bytes
    monkeypatch.setattr(files, "put_bytes", lambda content, path: (order.append(path.name), write(content, path)))
    write_results(results, folder)
    assert order == ["matrix.png", "report.md", "report.html", "results.json"]
    assert (folder / "report.html").read_text() == page_of_run(results, folder)
    assert "report.html" in results_module.WRITTEN
    clear(folder)
    assert not (folder / "report.html").exists()


def test_the_same_run_gives_the_same_bytes(whole):
    folder, results, _ = whole
    assert run_page(results, folder) == run_page(copy.deepcopy(results), folder)


def test_numbers_are_rounded_once_and_have_a_real_minus():
    from trace_hydra.report.cells import between, figure, number, seconds

    assert figure(-0.004) == "0.00" and figure(0.004, sign=True) == "0.00"
    assert figure(-1234.5) == "−1,234.50" and figure(2.5, sign=True) == "+2.50"
    assert between([None, 3.0]) == "" and between((-1.0, 2.0), sign=True) == "−1.00 to +2.00"
    assert number(None).why and number(math.pi).value == math.pi
    assert [seconds(one).text for one in (3.21, 150.0, 7260.0)] == ["3.2 s", "2 min 30 s", "2 h 01 min"]
