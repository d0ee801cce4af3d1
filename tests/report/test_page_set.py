"""The page of several runs: groups, differences, and what must not be mixed."""

import json

import pytest
from page_reading import Page, text, value
from report_doubles import PROTOCOL, TASKS, capability, write_run

from trace_hydra.collect import collect
from trace_hydra.report.groups import Member, fields, group_runs
from trace_hydra.report.page import report_page
from trace_hydra.statistics import Comparison, Difference, across_runs, compare, read_scores

REVERSED = TASKS[::-1]


def page_of(folder) -> Page:
    found = collect(folder)
    members = [Member(run, folder / run.folder) for run in found.runs]
    return Page(report_page(members, found.left_out, title="A sweep", where=folder))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two methods x two orders x two seeds, a third method with one seed."""
    folder = tmp_path_factory.mktemp("sweep")
    for order, tasks in (("trace", TASKS), ("reversed", REVERSED)):
        for seed in (0, 1):
            for method, loss in (("steady", 0.01), ("leaky", 0.09)):
                write_run(folder / f"{method}-{order}-{seed}", method=method, seed=seed, tasks=tasks, order=order,
                          loss=loss, rows=20, capability=capability())  # fmt: skip
    write_run(folder / "single", method="single", seed=0, rows=20)
    (folder / "broken").mkdir()
    (folder / "broken" / "results.json").write_text("{")
    return folder, page_of(folder)


def test_groups_stand_side_by_side_with_their_statistics(sweep):
    folder, page = sweep
    rows = {text(row["group"]): row for row in page.cells("methods")}
    assert list(rows) == ["leaky", "single", "steady"]
    own = [read_scores(path) for path in sorted(folder.glob("steady-*"))]
    for key, label in (("op", "OP"), ("bwt", "BWT"), ("forgetting", "Forgetting")):
        expected = across_runs(own, key)
        assert value(rows["steady"][label]) == pytest.approx(expected.value)
        sign = "+" if key == "bwt" else ""
        low, high = (f"{end:{sign}.2f}".replace("-", "−") for end in (expected.low, expected.high))
        assert f"[{low} to {high}]" in text(rows["steady"][label])
    assert value(rows["steady"]["runs"]) == 4 and text(rows["steady"]["seeds"]) == "0, 1"
    assert value(rows["steady"]["ΔRG"]) == -3.5
    assert value(rows["single"]["ΔRG"]) is None and "not measured" in text(rows["single"]["ΔRG"])


def test_differences_are_those_of_the_statistics(sweep):
    folder, page = sweep
    groups = {
        name: [read_scores(path) for path in sorted(folder.glob(f"{name}*"))] for name in ("leaky", "single", "steady")
    }
    expected = compare(groups, "bwt").differences
    rows = page.cells("pairs-1-bwt")
    assert len(rows) == 3
    for row, one in zip(rows, expected, strict=True):
        assert text(row["groups"]) == f"{one.one} − {one.other}"
        assert value(row["difference"]) == pytest.approx(one.difference)
        assert value(row["p, Holm"]) == pytest.approx(one.p_adjusted)
        assert value(row["pairs"]) == one.pairs and value(row["test rows"]) == one.rows
    assert "Smallest true difference in OP that is found 4 times out of 5" in page.text


def test_what_does_not_count_is_listed_with_its_reason(sweep):
    _, page = sweep
    assert [text(row[0]) for row in page.rows("left-out-table")] == ["broken"]
    assert "results.json cannot be read" in text(page.rows("left-out-table")[0][1])
    assert "1 folder left out" in text(page.one("p", **{"class": "lead"}))


def test_every_run_is_listed_with_its_own_numbers(sweep):
    folder, page = sweep
    rows = {text(row["run"]): row for row in page.cells("runs")}
    assert len(rows) == 9
    for name, row in rows.items():
        results = json.loads((folder / name / "results.json").read_text())
        assert value(row["OP"]) == results["op"] and value(row["BWT"]) == results["bwt"]
        assert value(row["seed"]) == results["seed"]["train"]


def test_matrices_are_averaged_within_an_order_only(sweep):
    """leaky and steady in two orders, single in one: five mean matrices, three differences to leaky."""
    folder, page = sweep
    assert "One seed only: single." in page.text
    labels = [text(one).removeprefix("Matrix of ") for one in page.all("summary") if text(one).startswith("Matrix of")]
    assert sorted(labels) == [
        *("leaky, order reversed", "leaky, order trace", "single, order trace"),
        *("steady, order reversed", "steady, order trace"),
    ]
    place = 1 + labels.index("leaky, order reversed")
    own = [json.loads((folder / f"leaky-reversed-{seed}" / "results.json").read_text())["matrix"] for seed in (0, 1)]
    assert value(page.rows(f"matrix-1-{place}")[8][1]) == (own[0][8][0] + own[1][8][0]) / 2
    assert len([one for one in page.all("table") if one.get("id", "").startswith("change-")]) == 3


def test_matrix_differences_are_means_minus_means(tmp_path):
    matrices = {}
    for method, loss in (("a", 0.02), ("b", 0.08)):
        for seed in (0, 1):
            found = write_run(tmp_path / f"{method}{seed}", method=method, seed=seed, loss=loss, tasks=TASKS[:3])
            matrices.setdefault(method, []).append(found["matrix"])
    page = page_of(tmp_path)
    for column in range(3):
        means = [sum(matrix[3][column] for matrix in matrices[method]) / 2 for method in "ab"]
        assert value(page.rows("matrix-1-1")[3][column + 1]) == pytest.approx(means[0])
        assert value(page.rows("change-1-2")[3][column + 1]) == pytest.approx(means[1] - means[0])


def test_protocols_are_never_mixed(tmp_path):
    """Equal but for the fingerprint: two groups, two fields, no difference between them."""
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", seed=seed)
        write_run(tmp_path / f"b{seed}", seed=seed, protocol={**PROTOCOL, "fingerprint": "ffffffffffff"})
    page = page_of(tmp_path)
    assert "2 protocols (fingerprints) are mixed here" in page.text
    labels = [text(row["group"]) for row in page.cells("methods")]
    assert labels == ["plain [0123456789ab]", "plain [ffffffffffff]"]
    assert not page.all("table", id="pairs-1-op") and "nothing to compare it with" in page.text


def test_runs_without_answers_are_averaged_from_their_results(tmp_path):
    import shutil

    means = [write_run(tmp_path / f"a{seed}", seed=seed)["op"] for seed in (0, 1)]
    write_run(tmp_path / "b", method="other")
    shutil.rmtree(tmp_path / "a0" / "predictions")
    page = page_of(tmp_path)
    row = next(row for row in page.cells("methods") if text(row["group"]) == "plain")
    assert value(row["OP"]) == pytest.approx(sum(means) / 2)
    assert "Answers of 1 run could not be read" in page.text
    assert "OP is not compared: fewer than two groups have readable answers" in page.text


def test_a_run_without_row_0_is_named(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", seed=seed, row0=False)
    assert "Without row 0, so that nothing is known of the start model: a0, a1." in page_of(tmp_path).text


def test_no_run_at_all_says_so(tmp_path):
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead" / "error.txt").write_text("ConfigError: wrong\nmore")
    page = page_of(tmp_path)
    assert text(page.one("p", **{"class": "lead"})) == "No finished run was found."
    assert "no results.json: ConfigError: wrong" in page.text and not page.all("svg")


def test_one_run_alone_is_shown_as_a_run(tmp_path):
    results = write_run(tmp_path / "only")
    page = page_of(tmp_path)
    assert text(page.one("h1")) == "only" and value(page.rows("matrix")[1][1]) == results["matrix"][1][0]


def test_a_run_that_is_not_whole_is_shown_alone_and_left_out_of_a_set(tmp_path):
    results = write_run(tmp_path / "half")
    results["complete"] = False
    (tmp_path / "half" / "results.json").write_text(json.dumps(results))
    found = collect(tmp_path)
    partial = [Member(run, tmp_path / run.folder) for run in found.partial]
    html = report_page([], found.left_out, title="x", where=tmp_path, partial=partial)
    assert "Incomplete: not every planned cell" in Page(html).text
    write_run(tmp_path / "whole", seed=1)
    write_run(tmp_path / "other", seed=2)
    page = page_of(tmp_path)
    assert [text(row[0]) for row in page.rows("runs")] == ["other", "whole"]
    assert "is incomplete" in text(page.rows("left-out-table")[0][1])


def test_runs_with_a_page_of_their_own_are_linked_to_it(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "runs" / f"a b#{seed}", seed=seed)
    (tmp_path / "runs" / "a b#1" / "report.html").write_text("")
    found = collect(tmp_path)
    members = [Member(run, tmp_path / run.folder) for run in found.runs]
    page = Page(report_page(members, [], title="x", where=tmp_path / "out"))
    links = [row[0].find("a") for row in page.rows("runs")]
    assert links[0] is None and links[1] is not None and links[1].attrib["href"] == "../runs/a%20b%231/report.html"


def test_labels_tell_groups_apart(tmp_path):
    for seed in (0, 1):
        for data in ("mini", "trace500"):
            write_run(tmp_path / f"{data}{seed}", seed=seed, data=data)
        write_run(tmp_path / f"changed{seed}", seed=seed, config={"scoring": "official"})
    found = collect(tmp_path)
    groups = group_runs([Member(run, tmp_path / run.folder) for run in found.runs])
    assert len({group.label for group in groups}) == 3
    assert {group.label.split()[1] for group in groups} == {"mini", "trace500"}
    assert len(fields(groups)) == 2
    assert any("protocol.scoring=official" in group.label for group in groups)


def test_a_hundred_runs_make_a_page_of_bounded_size(tmp_path):
    """Fewer than 10 MB and 20,000 nodes, and no figure a run."""
    for method in range(5):
        for seed in range(20):
            write_run(tmp_path / f"m{method}-{seed}", method=f"m{method}", seed=seed, rows=4, curves=False,
                      loss=0.01 * method, capability=capability())  # fmt: skip
    found = collect(tmp_path)
    html = report_page(
        [Member(run, tmp_path / run.folder) for run in found.runs], found.left_out, title="x", where=tmp_path
    )
    page = Page(html)
    assert len(page.rows("runs")) == 100
    assert len(html.encode()) < 2_000_000 and len(list(page.elements)) < 20_000 and len(page.all("svg")) <= 6


def test_of_many_pairs_those_with_the_best_group_are_drawn():
    from trace_hydra.report.set_page import _chosen
    from trace_hydra.statistics import Estimate

    names = [f"m{n}" for n in range(9)]
    pairs = [
        Difference(a, b, "op", 1.0, -2.0, 4.0, 0.5, 0.5, 0.3, 8, 2, "")
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    ]
    means = {name: {"op": Estimate(float(n % 5), None, None, "")} for n, name in enumerate(names)}
    kept = _chosen(Comparison("op", tuple(pairs), ""), means).differences
    assert {one.one for one in kept} == {"m4"} and len(kept) == 8
    turned = next(one for one in kept if one.other == "m0")
    assert (turned.difference, turned.low, turned.high, turned.effect, turned.p) == (-1.0, -4.0, 2.0, -0.3, 0.5)


def test_published_rows_stand_beside_runs_of_the_same_model(tmp_path):
    from trace_hydra import published

    entry = next(one for one in published.entries() if one.op is not None and one.bwt_signed is not None)
    for seed in (0, 1):
        results = write_run(tmp_path / f"a{seed}", seed=seed)
        results["published"] = {"model": entry.model, "method": entry.family}
        (tmp_path / f"a{seed}" / "results.json").write_text(json.dumps(results))
    page = page_of(tmp_path)
    rows = page.rows("beside-1")
    assert any(entry.where == text(row[0]) and value(row[4]) == entry.op for row in rows)
    assert "How the protocols differ" in page.text and "were not made here" in page.text


def test_without_a_published_name_the_reason_is_said(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", seed=seed)
    assert "model=tiny has no name in published tables" in page_of(tmp_path).text
