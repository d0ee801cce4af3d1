"""What pages are made of: hostile text, answers that were forgotten, curves, settings, warnings, figures."""

import json
import math
import re
import struct
from pathlib import Path

import pytest
import yaml
from page_reading import Page, text
from report_doubles import TASKS, write_run

from trace_hydra.report.curves import Curves, read_curves
from trace_hydra.report.examples import ANSWERS, most_forgotten
from trace_hydra.report.facts import data_warnings, read_settings
from trace_hydra.report.heat import change_rows, heat, heat_change
from trace_hydra.report.hostile import plain, shown
from trace_hydra.report.page import run_page
from trace_hydra.report.text import render

HOSTILE = {
    "script": "</script><script>alert(1)</script>",
    "image": "<img src=x onerror=alert(1)>",
    "attribute": "\" onmouseover='alert(1)' x=\"",
    "template": "{{ 7*7 }}{% for x in y %}",
    "reversed": "abc\u202egnp.exe\u2066\u200f",
    "controls": "\x00\x1b[31m\x07\x85\u2028",
    "surrogate": "a\ud800b\udfffc",
    "comment": "--><!--<![CDATA[",
    "entity": "&lt;&#x202e;&amp;",
    "long": "x" * 1_000_000,
    "lines": "\n" * 50_000,
    "accents": "a" + "\u0301" * 5000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_answers_are_shown_as_text(kind, tmp_path):
    """The tags of the page are those of one with harmless answers, and what is invisible is spelled out."""
    tags = []
    for name, answer in (("calm", "fine"), ("wild", HOSTILE[kind])):
        results = write_run(tmp_path / name, answer=answer, tasks=TASKS[:2], loss=0.5, rows=8)
        html = run_page(results, tmp_path / name)
        html.encode("utf-8")  # no half of a surrogate pair is left
        page = Page(html)
        skipped = ("p", "span")  # "1,000 more characters are not shown", "(empty)"
        found = [one for one in page.elements if one.tag not in skipped]
        tags.append([(one.tag, set(one.attrib) & {"src", "onerror", "onmouseover"}) for one in found])
    assert tags[0] == tags[1]
    assert len(html) < 400_000
    bad = [one for one in html if not (one.isprintable() or one in "\n\t\u00ad\u200c\u200d")]
    assert bad == []
    if kind == "long":
        assert "999,400 more characters are not shown." in page.text
    if kind == "reversed":
        assert "abc⟦U+202E⟧gnp.exe⟦U+2066⟧⟦U+200F⟧" in page.text
    if kind == "template":
        assert HOSTILE[kind] in page.text


def test_hostile_names_are_shown_as_text(tmp_path):
    """Results that somebody edited: names everywhere, in figures too."""
    name = "</script><img src=x onerror=alert(1)>\u202e\ud800"
    results = write_run(tmp_path / "run", method=name, tasks=("A", "B"))
    text = json.dumps(results).replace('"tiny"', json.dumps(name)).replace('"accuracy"', json.dumps(name))
    html = run_page(json.loads(text), tmp_path / "run")
    page = Page(html)
    assert not page.all("img") and len(page.all("script")) == 1
    assert "\u202e" not in html and "</script><img src=x onerror=alert(1)>⟦U+202E⟧⟦U+D800⟧" in page.text


def test_text_is_cut_and_made_visible():
    assert shown("abc", 2) == type(shown("", 0))("ab", 1)
    assert shown("a\tb\nc\u200dd", 99).text == "a\tb\nc\u200dd"
    assert plain("a\nb" + "c" * 300, 5) == "a⏎bcc…"


def test_the_answers_that_lost_most_are_shown(tmp_path):
    """A lost 50 points since its own stage, B 25, C is the last; of A's rows 0 and 2 fell by 100, 1 rose, 3 stayed."""
    own = {"A": [100, 0, 100, 100], "B": [100, 100, 100, 0], "C": [0, 0, 0, 0]}
    last = {"A": [0, 50, 0, 100], "B": [100, 60, 40, 0], "C": [0, 0, 0, 0]}
    for name, row, scores in [(t, i, own[t]) for i, t in enumerate("ABC", 1)] + [(t, 3, last[t]) for t in "AB"]:
        path = tmp_path / "predictions" / str(row) / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"id": f"r{n}", "prediction": f"{row}-{n}", "reference": "R", "scores": {"score": s}}
                for n, s in enumerate(scores)]  # fmt: skip
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    (tmp_path / "test_rows").mkdir()
    (tmp_path / "test_rows" / "A.jsonl").write_text(
        json.dumps({"id": "r2", "prompt": "p" * 700 + "end", "answer": "R"})
    )
    matrix = [[None] * 3, [75, None, None], [75, 75, None], [37.5, 50, 0]]
    found, note = most_forgotten({"tasks": list("ABC"), "matrix": matrix}, tmp_path)
    assert [(one.task, one.change, one.fell, one.rows) for one in found] == [("A", -37.5, 2, 4), ("B", -25, 2, 4)]
    assert note == ""
    first, second = found[0].answers
    assert (first.id, first.before.text, first.after.text, first.score_before, first.score_after) == (
        "r0",
        "1-0",
        "3-0",
        100,
        0,
    )
    assert (
        first.prompt is None and second.prompt and second.prompt.left_out == 103 and second.prompt.text.endswith("end")
    )
    assert found[0].note == "Only 2 of its answers score less than they did."
    assert [one.id for one in found[1].answers] == ["r2", "r1"]


@pytest.mark.parametrize("answer", ["```\n## No heading\n````` x", "<script>alert(1)</script>", "\u202eabc\x1b[0m"])
def test_report_md_quotes_forgotten_answers(answer, tmp_path):
    """Between fences that the answer cannot close, so nothing of it is Markdown or HTML."""
    results = write_run(tmp_path, answer=answer, tasks=("A", "B"), loss=0.9, rows=8)
    said = render(results, tmp_path)
    assert "## What was forgotten most\n\n### A: " in said and "\u202e" not in said and "\x1b" not in said
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", said, flags=re.M | re.S)
    assert "No heading" not in outside and "<script>" not in outside and "abc" not in outside
    assert "At the end:" in outside and "## Make it again" in outside


def test_report_md_has_warnings_and_the_command_line(tmp_path):
    results = write_run(tmp_path, tasks=("A", "B"), overrides=["method=plain", "seed=3"])
    results["truncated"] = {"A": {"train": 7}}
    said = render(results, tmp_path)
    assert "- A: 7 train rows are longer than the protocol's limits and were cut." in said
    assert "```text\npython -m trace_hydra method=plain seed=3\n```" in said
    (tmp_path / ".hydra" / "overrides.yaml").unlink()
    assert "Not known: " in render(results, tmp_path)


def test_at_most_five_answers_of_three_tasks_are_shown(tmp_path):
    results = write_run(tmp_path, rows=40, loss=0.1)
    found, note = most_forgotten(results, tmp_path)
    assert len(found) == 3 and all(len(one.answers) <= ANSWERS for one in found) and len(found[0].answers) == ANSWERS
    assert [one.change for one in found] == sorted(one.change for one in found)
    assert "more lost points" in note


def test_answers_that_cannot_be_read_are_said_so(tmp_path):
    results = write_run(tmp_path, loss=0.1)
    worst = most_forgotten(results, tmp_path)[0][0]
    path = tmp_path / "predictions" / "8" / f"{worst.task}.jsonl"
    path.write_text('{"id": "test-0", "prediction": "x", "reference": "y", "scores": {"score": true}}\n')
    found = most_forgotten(results, tmp_path)[0][0]
    assert (
        found.task == worst.task and not found.answers and found.note.startswith(f"No answers: {path}:1: scores.score")
    )


def test_curves_come_from_the_csv_file(tmp_path):
    write_run(tmp_path, tasks=("A", "B"))
    curves = read_curves(tmp_path)
    assert isinstance(curves, Curves)
    assert curves.steps == list(range(1, 21)) and curves.stages == [1] * 10 + [2] * 10
    assert list(curves.terms) == ["loss", "extra", "lm"] and curves.terms["lm"][3] == 0.5
    assert curves.averaged == 1 and not curves.tokens and not curves.memory


def test_curves_of_long_runs_are_averaged_within_stages(tmp_path):
    """1,000 points of one stage and 10 of another: 3 make one; the last of a stage has what is left."""
    (tmp_path / "csv").mkdir()
    rows = [f"{1 + (n > 1000)},{n},{n},{100 * n},{n},{n / 100}" for n in range(1, 1011)]
    head = "progress/stage,progress/step,step,progress/tokens,train/loss,train/host_memory_gb"
    (tmp_path / "csv" / "metrics.csv").write_text("\n".join([head, *rows, "2,1011,10"]))  # a kill cut the last line
    curves = read_curves(tmp_path)
    assert isinstance(curves, Curves)
    assert curves.averaged == 3 and len(curves.steps) == 334 + 4
    assert curves.terms == {"loss": curves.terms["loss"]} and curves.terms["loss"][0] == 2.0
    assert curves.steps[333] == 1000 and curves.terms["loss"][333] == 1000 and curves.steps[-1] == 1010
    assert curves.tokens[0] == 300 and curves.memory == {1: (10.0, "host"), 2: (10.1, "host")}


def test_a_term_that_a_stage_lacks_is_no_number_there(tmp_path):
    (tmp_path / "csv").mkdir()
    head = "progress/stage,progress/step,train/loss,train/loss/ewc,train/loss/lm"
    (tmp_path / "csv" / "metrics.csv").write_text(f"{head}\n1,1,2.0,,2.0\n2,2,3.0,1.0,2.0\n2,3,nan,nan,nan\n")
    curves = read_curves(tmp_path)
    assert isinstance(curves, Curves) and curves.steps == [1, 2]
    assert math.isnan(curves.terms["ewc"][0]) and curves.terms["ewc"][1] == 1.0


def wandb_file(path: Path, rows: list[dict]) -> None:
    """Write what W&B keeps of a run: protobuf records in LevelDB's log format, each in one chunk of its own."""
    from wandb.proto import wandb_internal_pb2

    content = b":W&B\x00\x00\x00"[:7]
    for row in rows:
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]  # protobuf makes it at import
        for place, (name, value) in enumerate(row.items()):
            item = record.history.item.add()
            if place % 2:
                item.nested_key.append(name)
            else:
                item.key = name
            item.value_json = json.dumps(value)
        data = record.SerializeToString()
        content += struct.pack("<IHB", 0, len(data), 1) + data
    path.parent.mkdir(parents=True)
    path.write_bytes(content)


def test_curves_come_from_wandb_where_there_is_no_csv(tmp_path):
    """Two starts of a run: the second one logged step 2 again, and a table, which is no number."""

    def row(step, loss):
        return {"train/loss": loss, "progress/step": step, "progress/stage": 1, "matrix/table": {"_type": "table"}}

    first, second = tmp_path / "wandb" / "run-20260102_1-a", tmp_path / "wandb" / "offline-run-20260103_1-a"
    wandb_file(second / "run-a.wandb", [row(2, 0.25), row(3, 1e-3)])
    wandb_file(first / "run-a.wandb", [row(1, 1.0), row(2, 0.5), {"score/A": 50.0, "progress/stage": 1}])
    curves = read_curves(tmp_path)
    assert isinstance(curves, Curves)
    assert (curves.source, curves.steps, curves.terms) == ("wandb", [1, 2, 3], {"loss": [1.0, 0.25, 0.001]})


def test_no_curves_have_a_reason(tmp_path):
    assert "No logger left the losses" in str(read_curves(tmp_path))
    (tmp_path / "csv" / "metrics.csv").mkdir(parents=True)
    assert "No logger" in str(read_curves(tmp_path))


def config(folder: Path, protocol: dict, overrides: list | str | None) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    node = {
        "protocol": protocol,
        "budget": {"epochs": {"A": 1}, "name": "mini"},
        "judge": {"api_key": "abcdefghijklmnop"},
    }
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(node))
    if overrides is not None:
        (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    return folder


def test_settings_that_differ_from_the_protocols_file_are_marked(tmp_path):
    """conf/protocol/greedy.yaml has truncation: middle and decoding.temperature: 1.0; seekr builds on official."""
    settings = read_settings(
        config(tmp_path / "a", {"name": "greedy", "truncation": "left", "scoring": "corrected"}, [])
    )
    assert [(one.path, one.value, one.default) for one in settings.changed] == [
        ("protocol.truncation", "left", "middle")
    ]
    node = {"name": "seekr", "splitter": "ours", "scoring": "official", "decoding": {"temperature": 0.2}}
    settings = read_settings(config(tmp_path / "b", node, []))
    changed = {one.path: one.default for one in settings.changed}
    assert changed == {"protocol.splitter": "re_eval", "protocol.decoding.temperature": "0.1"}
    settings = read_settings(config(tmp_path / "c", {"name": "../../etc/passwd", "scoring": "mine"}, []))
    assert settings.changed == []


def test_what_the_command_line_set_is_marked_and_quoted(tmp_path):
    overrides = ["budget=mini", "+x.y=a b", "protocol.scoring=official", "judge.api_key=sk-abcdefghijklmnopqrst"]
    settings = read_settings(config(tmp_path / "a", {"name": "greedy", "scoring": "official"}, overrides))
    given = {one.path for one in settings.leaves if one.given}
    assert given == {"budget.epochs.A", "budget.name", "protocol.scoring", "judge.api_key"}
    assert settings.command == (
        "python -m trace_hydra budget=mini '+x.y=a b' protocol.scoring=official 'judge.api_key=(secret)'"
    )
    assert {one.path: one.value for one in settings.leaves}["judge.api_key"] == "(secret)"


@pytest.mark.parametrize("overrides", [None, "text"])
def test_without_overrides_there_is_no_command(tmp_path, overrides):
    settings = read_settings(config(tmp_path / "a", {"name": "greedy"}, overrides))
    assert settings.command is None and "overrides.yaml" in settings.note and settings.leaves


def test_warnings_say_what_the_audit_counted(tmp_path):
    audit = {
        "A": {
            "rows": {"train": 10, "eval": 4, "test": 4},
            "overlap": {"test_in_train": {"rows": 3, "prompts": 2, "same_answer": 1}, "test_in_eval": {"rows": 0}},
            "eval_equals_test": {"rows": True, "file": None},
            "empty_answers": {"train": 2, "eval": 0, "test": 1},
            "conflicting_prompts": {"train": 1, "eval": 0, "test": 0},
            "empty_bodies": {"train": 0, "eval": 0, "test": 0},
            "warnings": ["A/train.json has 10 rows; trace1000 has 1000."],
        }
    }
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    results = {"tasks": ["A", "B"], "truncated": {"A": {"train": 7, "test": 0}}}
    assert data_warnings(results, tmp_path) == [
        "A: A/train.json has 10 rows; trace1000 has 1000.",
        "A: 3 of 4 test rows have a prompt that is among the train rows, 1 with the same answer.",
        "A: eval and test are the same rows.",
        "A: 2 train, 1 test rows have an empty answer.",
        "A: 1 train prompts are there with more than one answer.",
        "B: audit.json does not have it.",
        "A: 7 train rows are longer than the protocol's limits and were cut.",
    ]


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_colour_of_the_heat_maps_can_be_read_on():
    """WCAG 2.1 AA: at least 4.5."""
    for value in range(101):
        assert contrast(*heat(value)) >= 4.5
        assert contrast(*heat_change(value - 50, 50)) >= 4.5
    assert heat(-5) == heat(0) and heat(105) == heat(100)
    assert heat(0)[0] == "#440154" and heat(100)[0] == "#fde725" and heat_change(0, 0)[0] == "#ffffff"


def test_a_difference_of_matrices_is_cell_by_cell():
    rows = change_rows(["A", "B"], [[1, None], [30.5, 2], [4, 5]], [[None, 1], [10, 2], [5, 3]])
    assert [[one.cell.value for one in row.cells] for row in rows] == [[None, None], [20.5, 0], [-1, 2]]
    assert rows[1].cells[0].cell.text == "+20.5" and rows[1].cells[1].cell.text == "0.0"
    assert rows[1].cells[0].background == "#0072b2"  # the largest change has the full colour


def test_figures_share_no_ids_and_follow_the_theme(tmp_path):
    from trace_hydra.report import charts, figures

    results = write_run(tmp_path, tasks=("A", "B"))
    curves = read_curves(tmp_path)
    assert isinstance(curves, Curves)
    svgs = [charts.inline(figures.training_curves(curves, ["<A>&", "B"]), name, "Loss <&>", "d") for name in ("a", "b")]
    pages = [Page(f"<body>{svg}</body>") for svg in svgs]
    ids = [{one.attrib["id"] for one in page.elements if "id" in one.attrib} for page in pages]
    assert ids[0] and not ids[0] & ids[1]
    for page, own in zip(pages, ids, strict=True):
        used = {one.attrib["href"][1:] for one in page.elements if "href" in one.attrib}
        assert used <= own
        assert not page.all("style") and not page.all("metadata")
        assert text(page.one("title")) == "Loss <&>" and "1 <A>&" in page.text
    assert "currentColor" in svgs[0] and "#000000" not in svgs[0] and "#ffffff" not in svgs[0]
    assert results["tasks"] == ["A", "B"]
