"""The published numbers of the package: that they are whole, fit together, and are those of the reference."""

import csv
import itertools
import json
import re
from importlib.resources import files

import pytest

from trace_hydra import published
from trace_hydra.errors import DataError
from trace_hydra.metrics.continual import summary
from trace_hydra.published.conditions import ORDERS
from trace_hydra.published.listing import SETS, change_of, mean_of, mean_of_tasks
from trace_hydra.published.read import entries_of, read_paper
from trace_hydra.published.records import FORMULAS, PARTS

ROWS = {
    "TRACE": 43, "SEEKR": 54, "Any-SSR": 6, "TreeLoRA": 6, "MoRAM": 3, "OSF (adaptive SVD)": 5, "Muon-OGD": 7,
    "HFT": 14, "GORP": 1, "OPR": 3, "SLoRA (third-party run)": 3, "independent reproduction (second-hand)": 1,
}  # fmt: skip
DOUBTS = [doubt for paper in published.papers() for doubt in paper.doubts]


def numbers_of(matrix) -> dict:
    return summary(matrix.scores())


def test_no_source_and_no_row_is_lost():
    """Those that were carried over from the reference; new ones need nothing here."""
    found = {paper.paper: len(paper.rows) for paper in published.papers()}
    assert {name: min(found.get(name, 0), count) for name, count in ROWS.items()} == ROWS
    assert len(published.entries()) == sum(found.values())
    assert len(published.matrices()) == 17 and len(published.subsets()) == 111
    assert sum(cell is not None for one in published.matrices() for row in one.cells for cell in row) == 612


@pytest.mark.parametrize("entry", published.entries(), ids=lambda entry: f"{entry.where} {entry.model} {entry.method}")
def test_a_row_is_within_range_and_says_how_it_was_made(entry):
    assert entry.op is not None or entry.bwt is not None
    assert entry.group in published.groups() and entry.family and set(entry.conditions) <= set(PARTS)
    needed = {"data", "order", "epochs", "learning_rate", "batch", "prompt", "prompt_tokens", "decoding", "scoring"}
    assert needed <= set(entry.conditions)
    assert entry.bwt is None or "formula" in entry.conditions
    assert entry.bwt_signed is None or entry.bwt_signed in (entry.bwt, -(entry.bwt or 0))
    for source, epochs in entry.conditions["epochs"].statements:
        assert epochs == "none" or len(epochs.split(",")) in (1, 8), source
    assert entry.matrix is None or entry.matrix in {one.table for one in published.matrices()}


def test_rows_are_told_apart():
    """No row stands there twice."""
    keys = [
        (one.where, one.model, one.method, one.group, str(one.conditions["data"]), str(one.conditions["epochs"]))
        for one in published.entries()
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("matrix", published.matrices(), ids=lambda matrix: f"table {matrix.table}")
def test_op_and_bwt_follow_from_the_cells_but_for_known_typos(matrix):
    """Half a unit of the third decimal; where it is more, a doubt has the printed value and that of the cells."""
    size = len(matrix.tasks)
    assert matrix.tasks == ORDERS[matrix.order]
    for task, row in enumerate(matrix.cells):
        assert len(row) == size and all(cell is None for cell in row[:task])
        assert all(cell is not None and 0 <= cell <= 1 for cell in row[task:])
    found = numbers_of(matrix)
    listed = [doubt for doubt in DOUBTS if matrix.table in doubt.matrices]
    for key in ("op", "bwt"):
        printed, value = getattr(matrix, key), found[key] / 100
        typos = [getattr(doubt, key) for doubt in listed if getattr(doubt, key) is not None]
        if abs(printed - value) <= 0.0005 + 1e-9:
            assert not typos
        else:
            assert len(typos) == 1 and typos[0][0] == printed
            assert typos[0][1] == pytest.approx(value, abs=6e-5)
    assert found["forgetting"] is not None and found["fwt"] is None  # nothing was scored before training


def test_rows_that_name_a_matrix_are_its_numbers():
    tables = {matrix.table: matrix for matrix in published.matrices()}
    rows = [entry for entry in published.entries() if entry.matrix is not None]
    assert {entry.matrix for entry in rows} == set(tables)
    for entry in rows:
        matrix = tables[entry.matrix or 0]
        assert (entry.model, entry.method) == (matrix.model, matrix.method)
        assert entry.conditions["data"].value == matrix.data and entry.conditions["order"].value == matrix.order
        assert entry.op == pytest.approx(matrix.op * 100, abs=1e-9)
        assert entry.bwt_signed == pytest.approx(matrix.bwt * 100, abs=0.051)


def test_changes_of_general_ability_follow_from_the_cells_but_for_known_typos():
    """TRACE's Table 2, two decimals each of twelve cells."""
    rows = [one for one in published.abilities() if one.paper == "TRACE" and one.table == "2"]
    bases = {one.model: one for one in rows if one.method == "base"}
    assert len(rows) == 20 and len(bases) == 5
    wrong = []
    for one in rows:
        assert set(one.scores) == set(SETS) and all(0 <= score <= 100 for score in one.scores.values())
        change = change_of(one, bases[one.model])
        assert (one.delta is None) == (change is None) == (one.method == "base")
        if one.delta is not None and change is not None and abs(one.delta - change) > 0.0151:
            wrong.append(f"{one.model} {one.method}")
    assert sorted(wrong) == sorted(name for doubt in DOUBTS for name in doubt.abilities)


def test_table_2_is_the_mean_of_tables_28_to_31():
    suites = {"mmlu": "MMLU", "bbh": "BBH", "tydiqa-goldp": "TyDiQA"}
    columns = {"base": "base", "LoraSeqFT": "LoraSeqFT", "SeqFT": "SeqFT", "Replay": "Replay"}
    printed = {one.method: one.scores for one in published.abilities("LLaMA-2-13B-Chat") if one.table == "2"}
    for suite, name in suites.items():
        own = [row for row in published.subsets() if row["suite"] == suite and row["metric"] != "EM"]
        assert len(own) == {"mmlu": 57, "bbh": 27, "tydiqa-goldp": 11}[suite]
        for column, method in columns.items():
            mean = sum(float(row[column]) for row in own) / len(own)
            assert mean == pytest.approx(printed[method][name], abs=0.0101)


def test_means_by_task_are_those_printed_but_for_known_doubts():
    wrong = set()
    for one in published.task_scores():
        mean = mean_of_tasks(one)
        assert set(one.scores) <= set(ORDERS["1"]) and all(0 <= score <= 100 for score in one.points().values())
        target = one.total if one.total is not None else None if one.mean is None else one.mean * 100 / one.scale
        if mean is not None and target is not None and abs(mean - target) > 0.1001:
            wrong.add((one.table, one.method, one.epochs))
    table_27 = {("27", name, None) for name in ("ICL", "Single-task FT", "Multi-task", "Multi-task + reasoning")}
    assert wrong - {("27", "O-LoRA", None)} == table_27 | {("23-25", "SeqFT", 3)}


def test_shares_of_the_judge_add_up():
    sums = {
        (one.table, one.method): one.win + one.tie + one.lose
        for one in published.judged()
        if one.win + one.tie + one.lose != 100
    }
    assert sums == {("5", "Replay"): 101, ("Figure 2a", "LoraSeqFT"): 101, ("Figure 2a", "SeqFT"): 101}


GOOD = "{group: g, model: M, method: A, op: 50.0, bwt: -1.0}"
PAPER = """
paper: New
groups:
  g: {about: all, conditions: {data: 5000, order: 1, formula: trace}}
rows:
  - %s
"""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{group: h, model: M, method: A, op: 50.0}", "papers/new.yaml row 1: group 'h' is none of g"),
        ("{group: g, model: M, method: A}", "row 1 has neither op nor bwt"),
        ("{group: g, model: M, method: A, op: 500}", "row 1: op: Input should be less than or equal to 100"),
        ("{group: g, model: M, method: A, op: fifty}", "row 1: op: "),
        ("{group: g, model: M, method: A, op: nan}", "row 1: op: "),
        ("{group: g, method: A, op: 50}", "row 1: model: Field required"),
        ("{group: g, model: M, method: A, op: 50, bwd: -1}", "row 1: bwd: Extra inputs"),
        ("{group: g, model: M, method: A, op: 50, bwt: -1, formula: mine}", "formula mine is none of trace"),
        ("just text", "row 1 must be a mapping"),
    ],
)
def test_a_wrong_row_is_named(row, message):
    paper = read_paper(PAPER % row, "papers/new.yaml")
    with pytest.raises(DataError, match=re.escape(message)):
        entries_of(paper, paper.groups, "papers/new.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "papers/new.yaml is no YAML"),
        ("- 1", "must be a mapping that begins with"),
        ("arxiv: 1", "papers/new.yaml: paper: Field required"),
        ("paper: New\nyears: 2020", "papers/new.yaml: years: Extra inputs"),
        ("paper: New\npaper: Newer", "'paper' stands there twice"),
    ],
)
def test_a_wrong_file_is_named(text, message):
    with pytest.raises(DataError, match=re.escape(message)):
        read_paper(text, "papers/new.yaml")


def test_a_row_keeps_its_digits_and_overrides_its_group():
    paper = read_paper(PAPER % GOOD.replace("}", ", op_std: 0.30, data: {assumed: 500}, sign: positive}"), "new.yaml")
    (entry,) = entries_of(paper, paper.groups, "new.yaml")
    assert entry.printed == {"op": "50.0", "bwt": "-1.0", "op_std": "0.30"} and entry.bwt_signed == 1.0
    assert str(entry.conditions["data"]) == "500 (assumed)" and entry.conditions["order"].value == "1"


def test_every_paper_file_is_packaged():
    """What the wheel takes is the folder: yaml, json and csv lie beside the modules."""
    folder = files("trace_hydra.published")
    assert {"matrices.json", "subsets.csv"} <= {one.name for one in folder.iterdir()}
    assert len([one for one in (folder / "papers").iterdir() if one.name.endswith(".yaml")]) == len(published.papers())


# What the reference says, cell by cell, where it is at hand. Rows that came later stand behind its own.


@pytest.fixture(scope="module")
def reference(shared_data):
    folder = shared_data.parent / "reference" / "published"
    if not folder.is_dir():  # it is not part of this project
        pytest.skip("the reference of published numbers is not beside this checkout")
    return folder


def read_csv(path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def number(text: str) -> float | None:
    return float(text) if text else None


def described(condition, *, none: str) -> str:
    """Write a condition as the reference does."""
    if condition.value is None:
        return "unknown"
    source, value = condition.statements[0]
    source = {"TRACE Table 3": "see TRACE Table 3"}.get(source, source)
    return none if value in ("any", "none") else f"{value} ({source})" if source else value


def test_results_are_those_of_the_reference(reference):
    rows = read_csv(reference / "published_results.csv")
    entries = published.entries()
    carried = [[entry for entry in entries if entry.paper.paper == name][:count] for name, count in ROWS.items()]
    for row, entry in zip(rows, itertools.chain.from_iterable(carried), strict=True):
        paper = entry.paper
        assert (row["paper"], row["model"], row["method"]) == (paper.paper, entry.model, entry.method)
        assert (row["table"], row["arxiv"], row["comparable_group"]) == (entry.table, paper.arxiv, entry.group)
        assert row["year"] == str(paper.year or "") and row["venue"] in (paper.venue, "unknown", "")
        for key in ("op", "op_std", "bwt", "bwt_std"):
            assert row[key] == entry.printed.get(key, "")
        assert number(row["bwt_signed"]) == entry.bwt_signed
        formula = entry.conditions["formula"].value or "unknown" if entry.bwt is not None else ""
        assert row["bwt_formula"] == formula
        assert row["data_variant"].replace("not stated", "unknown") == described(entry.conditions["data"], none="")
        assert row["order"] == described(entry.conditions["order"], none="")
        stated = re.findall(r"\d+(?:,\d+)+|\d+(?= (?:for|everywhere))", row["epochs"])
        own = [value for _, value in entry.conditions["epochs"].statements if value != "none"]
        if entry.group == "trace-5000-o1" and "Table 25" in row["epochs"] and len(own) == 2:
            stated.remove("5")  # said of SeqFT of LLaMA-2-7B-Chat only, in that row
        assert stated == own
        assert bool(row["copied_from"]) == bool(entry.copied_from)
        assert not row["note"] or entry.note or entry.matrix or paper.doubts or paper.remarks


def test_matrices_are_those_of_the_reference(reference):
    content = json.loads((reference / "trace_paper_matrices.json").read_text(encoding="utf-8"))
    for one, own in zip(content["tables"], published.matrices(), strict=True):
        assert (one["table"], one["model"], one["method"]) == (own.table, own.model, own.method)
        assert (one["data_variant"], str(one["order"]), one["tasks"]) == (own.data, own.order, list(own.tasks))
        assert one["matrix"] == [list(row) for row in own.cells]
        assert one["reported"] == {"op": own.op, "bwt": own.bwt}
        found = numbers_of(own)
        for key, name in (("op", "op"), ("bwt_trace", "bwt"), ("bwt_div_t", "bwt_over_t")):
            assert one["derived"][key] == pytest.approx(found[name] / 100, abs=5.1e-5)


def test_abilities_are_those_of_the_reference(reference):
    rows = read_csv(reference / "general_ability.csv")
    own = {(one.paper, one.table, one.model, one.method.replace(" + ", "+")): one for one in published.abilities()}
    bases = {key[:3]: one for key, one in own.items() if one.method == "base"}
    seen = set()
    for row in rows:
        key = (row["paper"], row["table"], row["model"], row["method"])
        one, score = own[key], float(row["score"])
        seen.add(key)
        if row["dataset"] in SETS:
            assert one.scores[row["dataset"]] == score
        elif row["kind"] == "as printed":
            assert getattr(one, row["dataset"]) == score
        elif row["dataset"] == "mean":
            assert mean_of(one) == pytest.approx(score, abs=0.0051)
        else:
            assert change_of(one, bases[key[:3]]) == pytest.approx(score, abs=0.0051)
    carried = [own[key] for key in seen]
    printed = sum(len(one.scores) + (one.mean is not None) + (one.delta is not None) for one in carried)
    assert printed == sum(row["dataset"] in SETS or row["kind"] == "as printed" for row in rows)


def test_other_tables_are_those_of_the_reference(reference):
    rows = read_csv(reference / "judge_win_tie_lose.csv")
    judged = {(one.paper, one.table, one.model, one.area, one.method): one for one in published.judged()}
    assert len(judged) == len(published.judged()) >= len(rows)
    for row in rows:
        one = judged[row["paper"], row["table"].removeprefix("Table "), row["model"], row["axis"], row["method"]]
        assert [float(row[share]) for share in ("win", "tie", "lose")] == [one.win, one.tie, one.lose]
    rows = read_csv(reference / "opencompass_subsets_llama2_13b.csv")
    assert [list(row.values()) for row in rows] == [list(row.values()) for row in published.subsets()]
    scores = [one for one in published.task_scores() if one.paper == "TRACE"]
    by_table = {table: [one for one in scores if one.table == table] for table in ("6", "27", "23-25")}
    for table, name, mean in (("6", "icl_per_task", "mean"), ("23-25", "samples_epochs", "mean_printed")):
        for row, one in zip(read_csv(reference / f"{name}.csv"), by_table[table], strict=True):
            assert {task: float(row[task]) for task in ORDERS["1"]} == one.scores
            assert float(row[mean]) == one.mean
            assert row.get("model", one.model) == one.model
            assert (row.get("samples_per_task", "5000"), row.get("epochs", "None")) == (one.data, str(one.epochs))
    for row, one in zip(read_csv(reference / "per_task_table27.csv"), by_table["27"], strict=True):
        assert {task: float(row[task]) for task in ORDERS["1"] if row[task]} == one.scores
        assert float(row["table3_x100"]) == one.total
        assert row["data_variant"].split(" ")[0].replace("not", "unknown") in str(one.data)


def test_formulas_have_words():
    stated = [entry.conditions["formula"] for entry in published.entries() if "formula" in entry.conditions]
    assert {name for condition in stated for _, name in condition.statements} == set(FORMULAS)
