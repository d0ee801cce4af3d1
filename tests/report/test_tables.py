"""Tables in the paper's layout: numbers of the statistics, reasons for what is missing, names as text."""

import csv
import io
import json
import re
from typing import Any

import pytest
from report_doubles import PROTOCOL, TASKS, capability, write_run
from test_figures import HOSTILE

from trace_hydra.collect import collect
from trace_hydra.report import paper
from trace_hydra.report.groups import Group, Member, group_runs
from trace_hydra.report.tables import Row, Section, Table, Value, csv_text, latex_text, markdown_text
from trace_hydra.statistics import across_runs, read_scores

SHORT = TASKS[:3]


def groups_of(folder) -> list[Group]:
    return group_runs([Member(run, folder / run.folder) for run in collect(folder).runs])


def lines(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.to_csv())))


def small(cells, **changes) -> Table:
    own = {"name": "t", "caption": "c", "labels": ["method"], "columns": [f"n{n}" for n in range(len(cells))]}
    return Table(**{**own, "sections": [Section("", [Row(["m"], cells)])], **changes})


def body(table: Table) -> list[str]:
    """Give the cells of the last line of the Markdown table."""
    line = [line for line in table.to_markdown().splitlines() if line.startswith("|")][-1]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_numbers_are_rounded_once_when_they_are_written():
    """2.345 is a little below 2.345 in binary; 0.05 rounds to even at 1 decimal only if it was not rounded before."""
    table = small([Value(48.6501), Value(-8.3499), Value(-0.001, sign=True), Value(2.0, sign=True)])
    assert body(table)[1:] == ["48.7", "-8.3", "0.0", "+2.0"]
    assert [lines(table)[0][f"n{n}"] for n in range(4)] == ["48.6501", "-8.3499", "-0.001", "2.0"]
    assert r"48.7 & $-$8.3 & 0.0 & +2.0 \\" in table.to_latex()


def test_intervals_stand_beside_their_number():
    table = small([Value(50.0, 45.04, 55.06), Value(-3.0, None, None, "one run")], intervals=True)
    assert body(table)[1:] == [r"50.0 \[45.0, 55.1\]", "-3.0 1)"] and "1) one run" in table.to_markdown()
    assert r"50.0 {\scriptsize {[}45.0, 55.1{]}} & $-$3.0\textsuperscript{1} \\" in table.to_latex()
    row = lines(table)[0]
    assert (row["n0 low"], row["n0 high"], row["n1 low"]) == ("45.04", "55.06", "")
    assert row["notes"] == "n1: one run"


def test_a_missing_number_is_a_dash_with_the_reason_below_once():
    table = small([Value(None, why="needs at least 2 tasks"), Value(None, why="needs at least 2 tasks"), ""])
    assert body(table)[1:] == ["— 1)", "— 1)", ""]
    assert table.to_markdown().count("needs at least 2 tasks") == 1
    assert r"---\textsuperscript{1} & ---\textsuperscript{1} &  \\" in table.to_latex()
    assert lines(table)[0]["n0"] == "" and "n0: needs at least 2 tasks" in lines(table)[0]["notes"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_text_in_every_format(name):
    table = small(
        [Value(1.0), name], labels=[name], columns=[name, "b"], caption=name, notes=[name], spans=[(name, 2)],
        sections=[Section(name, [Row([name], [Value(None, why=name), name])])],
    )  # fmt: skip
    rows = list(csv.reader(io.StringIO(table.to_csv())))
    assert {len(row) for row in rows} == {1 + 1 + 6 + 1}
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    pipes = [line for line in table.to_markdown().splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in pipes} == {4} and "<script" not in table.to_markdown()
    latex = table.to_latex()
    ends = [line for line in latex.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in ends} == {2}
    assert not re.findall(r"(?<!\\)[#%]", latex.replace("% needs", ""))
    for form in (table.to_csv(), table.to_markdown(), latex):
        assert not {one for one in form if ord(one) < 32 and one != "\n"} and "\u202e" not in form


@pytest.mark.parametrize(
    ("text", "markdown", "latex"),
    [
        ("a_b*c", r"a\_b\*c", r"a\_b{*}c"),
        ("x|y", r"x\|y", r"x\textbar{}y"),
        ("50 % & $1", r"50 % &amp; \$1", r"50 \% \& \$1"),
        ("[1] {a}", r"\[1\] {a}", r"{[}1{]} \{a\}"),
        (r"\input{x}", r"\\input{x}", r"\textbackslash{}input\{x\}"),
        ("a--b~^", r"a--b\~^", r"a-{}-b\textasciitilde{}\textasciicircum{}"),
        ("ΔR^G → 1", "ΔR^G → 1", r"$\Delta$R\textasciicircum{}G $\rightarrow$ 1"),
        ("http://x.y", "http&#58;//x.y", "http://x.y"),
    ],
)
def test_special_characters_by_hand(text, markdown, latex):
    assert markdown_text(text) == markdown and latex_text(text) == latex


@pytest.mark.parametrize(
    ("text", "cell"),
    [("=1+1", "'=1+1"), ("-2.5", "-2.5"), ("+3", "+3"), ("-cmd", "'-cmd"), ("@a", "'@a"), ("plain", "plain")],
)
def test_no_cell_is_a_formula(text, cell):
    assert csv_text(text) == cell


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two methods x two seeds under one protocol, a third under another."""
    folder = tmp_path_factory.mktemp("tables")
    for method in ("steady", "leaky"):
        for seed in (0, 1):
            write_run(folder / f"{method}{seed}", method=method, seed=seed, tasks=SHORT, capability=capability())
    write_run(
        folder / "other", method="steady", tasks=SHORT, protocol={**PROTOCOL, "name": "official", "fingerprint": "ff"}
    )
    return folder


def test_table_1_has_the_statistics_of_each_group_and_mixes_no_protocols(sweep):
    table = paper.table_1(groups_of(sweep), ["a note"])
    rows = lines(table)
    assert [(row["section"], row["method"]) for row in rows] == [
        ("data mini, protocol greedy [0123456789ab]", "leaky"),
        ("data mini, protocol greedy [0123456789ab]", "steady"),
        ("data mini, protocol official [ff]", "steady"),
    ]
    scores = [read_scores(sweep / f"leaky{seed}") for seed in (0, 1)]
    for key, head in (("op", "tiny OP"), ("bwt", "tiny BWT")):
        expected = across_runs(scores, key)
        found = [rows[0][f"{head}{end}"] for end in ("", " low", " high")]
        assert list(map(float, found)) == [expected.value, expected.low, expected.high]
    alone = json.loads((sweep / "other" / "results.json").read_text())
    assert float(rows[2]["tiny OP"]) == pytest.approx(alone["op"])
    assert "mean of 2 runs, seeds 0, 1" in table.to_markdown() and "a note" in table.to_latex()
    assert r"\multicolumn{2}{c}{tiny}" in table.to_latex() and r"\cmidrule(lr){2-3}" in table.to_latex()


def test_fingerprints_that_differ_are_rows_of_their_own(tmp_path):
    for seed, fingerprint in ((0, "aa"), (1, "bb")):
        write_run(tmp_path / f"r{seed}", seed=seed, tasks=SHORT, protocol={**PROTOCOL, "fingerprint": fingerprint})
    assert [row["method"] for row in lines(paper.table_1(groups_of(tmp_path)))] == ["plain (aa)", "plain (bb)"]


def test_a_model_without_the_method_is_a_dash(tmp_path):
    write_run(tmp_path / "a", method="a", tasks=SHORT)
    results = write_run(tmp_path / "b", method="b", tasks=SHORT)
    (tmp_path / "b" / "results.json").write_text(json.dumps({**results, "model": "large"}))
    text = paper.table_1(groups_of(tmp_path)).to_markdown()
    assert text.count("— 1)") == 4 and "1) no run of this method on this model" in text


def test_one_task_has_no_bwt_and_says_why(tmp_path):
    write_run(tmp_path / "a", tasks=SHORT[:1])
    row = lines(paper.table_1(groups_of(tmp_path)))[0]
    assert row["tiny BWT"] == "" and "needs at least 2 tasks" in row["notes"]


def test_table_2_has_the_start_model_each_method_and_the_changes(sweep):
    table = paper.table_2([group for group in groups_of(sweep) if "greedy" in group.label])
    assert isinstance(table, Table)
    rows = {row["method"]: row for row in lines(table)}
    assert list(rows) == ["start model", "leaky", "leaky, change", "steady", "steady, change"]
    assert (rows["start model"]["quiz"], rows["leaky"]["quiz"]) == ("45.0", "41.5")
    assert float(rows["leaky, change"]["quiz"]) == pytest.approx(-3.5)
    assert float(rows["leaky"]["ΔR^G"]) == pytest.approx(-3.5) and float(rows["leaky"]["ΔR^S"]) == pytest.approx(-12)


def test_table_2_needs_capability_sets_and_averages_only_the_same_ones(tmp_path):
    write_run(tmp_path / "a", tasks=SHORT)
    assert "no run measured capability sets" in str(paper.table_2(groups_of(tmp_path)))
    for seed, fingerprint in ((1, "one"), (2, "two")):
        own = {**capability(), "fingerprint": fingerprint}
        write_run(tmp_path / f"b{seed}", method="b", seed=seed, tasks=SHORT, capability=own)
    table = paper.table_2(groups_of(tmp_path))
    assert isinstance(table, Table)
    assert [row["quiz"] for row in lines(table)] == [""] and "different capability sets" in table.to_markdown()


def test_rounds_have_tasks_in_rows_and_the_matrix_of_the_mean(sweep):
    group = next(group for group in groups_of(sweep) if group.method == "leaky")
    (table,) = paper.rounds(group)
    mean: Any = group.matrix()
    rows = {row["task"]: row for row in lines(table)}
    assert list(rows) == [*SHORT, "OP of the tasks so far", "BWT"]
    for column, task in enumerate(SHORT):
        for row in range(4):
            cell = rows[task][str(row)]
            assert float(cell) == pytest.approx(mean[row][column]) if mean[row][column] is not None else not cell
    assert "3: " not in rows[SHORT[0]]["notes"] and "the task's own round comes later" in rows[SHORT[2]]["notes"]
    op = rows["OP of the tasks so far"]
    assert float(op["2"]) == pytest.approx((mean[2][0] + mean[2][1]) / 2) and op["0"] == ""
    scores = [read_scores(sweep / f"leaky{seed}") for seed in (0, 1)]
    assert float(rows["BWT"]["3"]) == across_runs(scores, "bwt").value


def test_rounds_of_several_orders_are_tables_of_their_own(tmp_path):
    write_run(tmp_path / "a", tasks=SHORT)
    write_run(tmp_path / "b", tasks=SHORT[::-1], order="reversed")
    (group,) = groups_of(tmp_path)
    assert [[row.labels[0] for row in table.sections[0].rows[:3]] for table in paper.rounds(group)] == [
        list(SHORT), list(SHORT[::-1])
    ]  # fmt: skip


def test_rounds_without_answers_have_no_intervals_and_say_why(tmp_path):
    results = write_run(tmp_path / "a", tasks=SHORT)
    (tmp_path / "a" / "predictions" / "3" / f"{SHORT[0]}.jsonl").unlink()
    (table,) = paper.rounds(groups_of(tmp_path)[0])
    first = lines(table)[0]
    assert float(first["3"]) == results["matrix"][3][0] and first["3 low"] == "" and "no interval" in first["notes"]


def test_figure_3s_table_has_a_row_for_each_number_of_rows_and_epochs(tmp_path):
    for number, (rows, epochs) in enumerate(((5, 1), (5, 3), (9, 1))):
        results = write_run(tmp_path / f"r{number}", tasks=SHORT, overrides=[], config={})
        for stage in results["stages"]:
            stage |= {"rows": rows, "epochs": epochs, "key": f"{number}"}
        (tmp_path / f"r{number}" / "results.json").write_text(json.dumps(results))
        config = tmp_path / f"r{number}" / ".hydra" / "config.yaml"
        config.write_text(config.read_text() + f"budget: {{rows: {rows}, epochs: {epochs}}}\n")
    table = paper.samples_epochs(groups_of(tmp_path))
    assert isinstance(table, Table)
    rows = lines(table)
    assert [(row["rows a task"], row["epochs"]) for row in rows] == [("5", "1"), ("5", "3"), ("9", "1")]
    assert float(rows[0][SHORT[0]]) == pytest.approx(results["matrix"][-1][0])
    assert float(rows[0]["mean (OP)"]) == pytest.approx(results["op"])
    one = paper.samples_epochs(groups_of(tmp_path)[:1])
    assert isinstance(one, str) and "needs runs with 2 or more" in one
