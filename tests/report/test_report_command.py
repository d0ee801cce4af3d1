"""`python -m trace_hydra.report`: what it writes for which set of runs, and what it says of those it cannot use."""

import csv
import json

import pytest
from report_doubles import PROTOCOL, TASKS, capability, write_run
from test_figures import HOSTILE

from trace_hydra.report.__main__ import main
from trace_hydra.statistics import of_run, read_scores

SHORT = TASKS[:2]


def changed(folder, **changes) -> None:
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, **changes}))


def test_a_sweep_gives_a_report_figures_and_tables(tmp_path, capsys):
    sweep = tmp_path / "sweep"
    for method in ("a", "b", "c"):
        for seed in (0, 1):
            write_run(sweep / f"{method}{seed}", method=method, seed=seed, tasks=SHORT, capability=capability())
    out = tmp_path / "out"
    assert main([str(sweep), "--out", str(out), "--figures", "svg", "--tables", "csv", "latex", "md"]) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"report.html", "report.md", "figures", "tables"}
    names = {path.name for path in (out / "figures").iterdir()}
    assert {"op_against_bwt.svg", "differences_op.svg", "spread_bwt.svg", "critical_difference.svg"} <= names
    for kind in ("heat_map", "heat_map_intervals", "lines_over_stages", "capability_bars", "training_curves"):
        assert f"01_a0_{kind}.svg" in names
    assert len([name for name in names if name.startswith("matrix_difference")]) == 3
    tables = {path.name for path in (out / "tables").iterdir()}
    assert {f"table_1{ending}.{kind}" for ending in ("", "_intervals") for kind in ("csv", "tex", "md")} <= tables
    assert {"table_2.csv", "rounds_a_trace.csv", "rounds_c_trace_intervals.tex"} <= tables
    assert "no table: Figure 3 needs" in printed and str(out / "report.html") in printed
    rows = list(csv.DictReader((out / "tables" / "table_1.csv").open(encoding="utf-8")))
    assert [row["method"] for row in rows] == ["a", "b", "c"]
    assert "Smallest true difference in OP" in (out / "report.md").read_text()


def test_one_run_gives_its_own_report_where_it_lies(tmp_path, capsys):
    run = tmp_path / "run"
    results = write_run(run, tasks=SHORT, row0=False, curves=False)
    assert main([str(run), "--figures", "svg"]) == 0
    printed = capsys.readouterr().out
    assert f"{results['op']:.2f}" in (run / "report.md").read_text()
    assert (run / "figures" / "01_run_heat_map.svg").is_file() and not (run / "tables").exists()
    for said in ("row 0 was not scored", "no capability set was measured", "no training curves: No logger"):
        assert said in printed
    assert main([str(run)]) == 0, "what the report wrote is no run"


def test_an_empty_folder_and_a_missing_one_are_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert f"no run in or below {tmp_path}" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert f"{tmp_path / 'nowhere'} is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 0}, "an older version (schema 0, this version reads 1)"),
        ({"schema": 9}, "another version (schema 9"),
        ({"matrix": [[1.0]]}, "a score matrix of 2 tasks has 3 rows"),
        ({"matrix": [["x", 1], [1, 1], [1, 1]]}, "must be a finite number"),
        ({"stages": [{"task": "A"}]}, "stage 1 lacks its task, rows or epochs"),
        ({"capability": {"sets": {"q": {"area": "general"}}}}, "capability.sets.q lacks after, before, delta"),
        ({"capability": {"sets": []}}, "capability.sets is no mapping"),
        ({"complete": False}, "is incomplete"),
        ({"op": None, "non_finite": ["op"]}, "not finite: op"),
    ],
)
def test_runs_that_cannot_count_are_left_out_with_the_reason(tmp_path, capsys, changes, reason):
    write_run(tmp_path / "good", tasks=SHORT)
    write_run(tmp_path / "bad", seed=1, tasks=SHORT)
    changed(tmp_path / "bad", **changes)
    assert main([str(tmp_path), "--tables", "csv"]) == 0
    printed = capsys.readouterr().out
    assert f"left out: {tmp_path / 'bad'}" in printed and reason in printed
    rows = list(csv.DictReader((tmp_path / "tables" / "table_1.csv").open(encoding="utf-8")))
    own = json.loads((tmp_path / "good" / "results.json").read_text())
    assert [float(row["tiny OP"]) for row in rows] == [pytest.approx(own["op"])]


@pytest.mark.parametrize("text", ["{", "[]", "", '{"tasks": 3}'])
def test_a_damaged_file_alone_ends_with_a_message(tmp_path, capsys, text):
    (tmp_path / "results.json").write_text(text)
    assert main([str(tmp_path)]) == 2
    assert "trace_hydra.report: " in capsys.readouterr().err


def test_an_older_run_alone_is_shown_as_far_as_it_goes(tmp_path, capsys):
    write_run(tmp_path / "run", tasks=SHORT)
    changed(tmp_path / "run", schema=0)
    assert main([str(tmp_path / "run")]) == 0
    assert "an older version" in capsys.readouterr().out and (tmp_path / "run" / "report.html").is_file()


def test_an_incomplete_run_is_drawn_and_never_averaged(tmp_path, capsys):
    run = tmp_path / "run"
    write_run(run, tasks=SHORT)
    changed(run, complete=False)
    assert main([str(run), "--figures", "svg", "--tables", "csv"]) == 0
    assert (run / "figures" / "01_run_heat_map.svg").is_file() and not (run / "tables").exists()
    assert "is incomplete" in capsys.readouterr().out


def test_protocols_are_never_averaged_and_it_is_said(tmp_path, capsys):
    write_run(tmp_path / "a", tasks=SHORT)
    write_run(tmp_path / "b", seed=1, tasks=SHORT, protocol={**PROTOCOL, "fingerprint": "ff"})
    assert main([str(tmp_path), "--figures", "svg"]) == 0
    assert "2 sets of runs differ in model, data, test rows or protocol" in capsys.readouterr().out
    assert not list((tmp_path / "figures").glob("differences*"))


def test_a_run_that_is_there_twice_counts_once(tmp_path, capsys):
    for folder in ("one", "two"):
        write_run(tmp_path / folder / "run", tasks=SHORT)
    assert main([str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "out")]) == 0
    assert f"the same run as {tmp_path / 'one' / 'run'}" in capsys.readouterr().out


def test_runs_of_two_folders_stand_in_one_report(tmp_path):
    for method in ("a", "b"):
        write_run(tmp_path / method / "run", method=method, tasks=SHORT)
    out = tmp_path / "out"
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out), "--tables", "csv"]) == 0
    rows = list(csv.DictReader((out / "tables" / "table_1.csv").open(encoding="utf-8")))
    values = [of_run(read_scores(tmp_path / method / "run"), "op").value for method in ("a", "b")]
    assert [float(row["tiny OP"]) for row in rows] == values


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_hostile_names_make_safe_files(tmp_path, capsys):
    for number, name in enumerate((*HOSTILE, "../../escape", "CON")):
        run = tmp_path / "runs" / f"r{number}"
        write_run(run, method=f"m{number}", tasks=SHORT, curves=False)
        changed(run, name=name, method=name, task_order=name, data=name)
    out = tmp_path / "out"
    assert main([str(tmp_path / "runs"), "--out", str(out), "--figures", "svg", "--tables"]) == 0
    found = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(tmp_path / "runs")]
    assert found and all(path.is_relative_to(out) and path.name.isascii() for path in found)
    assert max(len(path.name) for path in found) < 200
    assert not {one for one in capsys.readouterr().out if not one.isprintable() and one != "\n"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    write_run(tmp_path / "run", tasks=SHORT)
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "file")]) == 2
    assert "file/report.html" in capsys.readouterr().err


def test_a_figure_that_fails_does_not_take_the_others_along(tmp_path, capsys, monkeypatch):
    from trace_hydra.report import figures

    write_run(tmp_path / "run", tasks=SHORT)
    monkeypatch.setattr(figures, "heat_map", lambda *_: 1 / 0)
    assert main([str(tmp_path / "run"), "--figures", "png"]) == 1
    assert "could not be drawn: ZeroDivisionError" in capsys.readouterr().out
    assert (tmp_path / "run" / "figures" / "01_run_lines_over_stages.png").is_file()


def test_an_unknown_format_is_refused_with_those_there_are(capsys):
    with pytest.raises(SystemExit) as ended:
        main([".", "--figures", "gif"])
    assert ended.value.code == 2 and "svg" in capsys.readouterr().err


def test_published_points_of_the_same_model_stand_in_the_figures_as_what_they_are(tmp_path):
    """TRACE's Tables 23-25: 500 rows, 1 epoch: 23.7; Table 1: SeqFT has OP 48.7, BWT -8.3."""
    for number, epochs in enumerate((1, 3)):
        run = tmp_path / "runs" / f"r{number}"
        results = write_run(run, tasks=SHORT)
        stages = [{**stage, "rows": 500, "epochs": epochs, "key": str(number)} for stage in results["stages"]]
        changed(run, stages=stages, published={"model": "LLaMA-2-7B-Chat", "method": "SeqFT"})
        config = run / ".hydra" / "config.yaml"
        config.write_text(config.read_text() + f"budget: {{epochs: {epochs}}}\n")
    out = tmp_path / "out"
    assert main([str(tmp_path / "runs"), "--out", str(out), "--figures", "svg", "--tables", "csv"]) == 0
    samples = (out / "figures" / "samples_epochs.svg").read_text(encoding="utf-8")
    assert ">23.7<" in samples and ">500 rows a task, plain<" in samples and "SeqFT, TRACE Table" in samples
    plane = (out / "figures" / "op_against_bwt.svg").read_text(encoding="utf-8")
    assert "published: TRACE, LLaMA-2-7B-Chat, trace-5000-o1" in plane and ">SeqFT<" in plane
    rows = list(csv.DictReader((out / "tables" / "figure_3.csv").open(encoding="utf-8")))
    assert [(row["rows a task"], row["epochs"]) for row in rows] == [("500", "1"), ("500", "3")]
