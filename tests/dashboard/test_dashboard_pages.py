"""The workspace and the report, as W&B's own package writes them."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, run_tiny
from logger_doubles import folders
from test_collect import write_run
from wandb_file import read

pytest.importorskip("wandb_workspaces", reason="needs the extra dashboard")

from trace_hydra.colours import colour_of
from trace_hydra.dashboard import facts, pages
from trace_hydra.wandb_labels import order_label, orders

TRACE = ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")


@pytest.fixture(scope="module")
def made():
    return pages.build(facts.from_conf())


def panels_of(page) -> list[dict]:
    """Every panel, in the order in which it is shown."""
    found: list[dict] = []

    def walk(node):
        if isinstance(node, dict):
            if "viewType" in node:
                found.append(node)
            else:
                for value in node.values():
                    walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(page["spec"])
    return found


def charts(page, name: str) -> dict[str, dict]:
    return {one["config"]["chartTitle"]: one["config"] for one in panels_of(page) if one["viewType"] == name}


def test_a_line_a_task_over_stages_with_mean_and_band(made):
    for page in (made["workspace"], made["report"]):
        lines = charts(page, "Run History Line Plot")
        assert [title for title in lines if title in TRACE] == list(TRACE)
        for task in TRACE:
            one = lines[task]
            assert (one["metrics"], one["xAxis"]) == ([f"score/{task}"], "progress/stage")
            assert (one["yAxisMin"], one["yAxisMax"]) == (0.0, 100.0)
        assert all((one["groupAgg"], one["groupArea"]) == ("mean", "stderr") for one in lines.values())
        assert lines["Loss"]["xAxis"] == "progress/tokens"
        assert [one["groupArea"] for one in charts(page, "Bar Chart").values()] == ["stderr"] * 3


def test_runs_are_grouped_and_coloured_by_method(made):
    """The key of a group's colour is W&B's own: the set of runs, then the path of the group."""
    (runs,) = made["workspace"]["spec"]["section"]["runSets"]
    keys = ["method_name.value", "order_name.value", "comparable.value"]
    assert [(one["section"], one["name"]) for one in runs["grouping"]] == [("config", key) for key in keys]
    colours = made["workspace"]["spec"]["section"]["customRunColors"]
    from urllib.parse import unquote

    named = {tuple(re.findall(r'"value":"([^"]*)"', unquote(key))): colour for key, colour in colours.items()}
    assert named[("ewc",)] == named[("ewc", "trace")] == colour_of("ewc") == "#e69f00"
    assert set(orders()) == {order for _, *rest in named for order in rest} >= {"trace", "reversed"}
    for grid in made["report"]["spec"]["blocks"]:
        if grid["type"] == "panel-grid":
            (runs,) = grid["metadata"]["runSets"]
            colours = grid["metadata"]["customRunColors"]
            assert colours[f"{runs['id']}-config:method_name.value:ewc"] == "#e69f00"


def test_every_metric_of_the_pages_is_logged_by_a_run(made, tmp_path, no_account):
    """A run with capability sets, offline: what a chart, table or picture asks for stands in its history or summary."""
    quiet = ["callbacks.progress=null", "callbacks.matrix.show=false", "callbacks.capability.show=false"]
    measured = ["capability=smoke", "capability.when=every_stage"]
    run = run_tiny(tmp_path, ["logger=wandb", "logger.wandb.mode=offline", "callbacks=default", *measured, *quiet])
    (folder,) = folders(run)
    found = read(folder)
    rows = [*found["history"], found["summary"]]
    logged = {key.rsplit("/", 1)[0] if key.endswith(("/path", "/_type")) else key for row in rows for key in row}
    on_a_device = {"train/device_memory_gb"}
    areas = {f"capability/delta_{area}" for area in ("general", "if", "safety")}
    wanted, patterns = set(), set()
    for one in [*panels_of(made["workspace"]), *panels_of(made["report"])]:
        config = one["config"]
        wanted |= {*config.get("metrics", ()), *config.get("mediaKeys", ())}
        wanted |= {config[axis] for axis in ("xAxis",) if one["viewType"] == "Run History Line Plot"}
        patterns |= {config["metricRegex"]} if config.get("metricRegex") else set()
    tasks = {f"score/{task}" for task in TRACE}
    assert tasks <= wanted and wanted - tasks - on_a_device - areas <= logged
    assert len(areas & logged) >= 1 and {f"score/{task}" for task in run.results["tasks"]} <= logged
    assert len(patterns) == 3 and all(any(re.search(one, name) for name in logged) for one in patterns)
    assert {"samples/answers", "matrix/table", "capability/worst_drops"} <= _tables(made)
    for key in ("method_name", "order_name", "comparable"):
        assert found["config"][key]
    assert {"op", "bwt", "forgetting"} <= set(found["summary"])


def test_expressions_are_plain_and_tell_sets_from_areas(made):
    """W&B reads them with Go's regexp, which has no lookaround."""
    lines = charts(made["workspace"], "Run History Line Plot")
    patterns = {title: one["metricRegex"] for title, one in lines.items() if one.get("metricRegex")}
    assert len(patterns) == 3 and not any("(?" in one for one in patterns.values())
    score, change = patterns["Each set, score"], patterns["Each set, change"]
    for name in ("mmlu", "deltas", "drop", "self-instruct"):
        assert re.search(score, f"capability/{name}")
        assert re.search(change, f"capability/{name}/delta")
    for name in ("delta_general", "delta_if_ci_low", "mmlu/delta", "mmlu/win"):
        assert not re.search(score, f"capability/{name}")


def _tables(made) -> set[str]:
    text = json.dumps([one for one in panels_of(made["report"]) if one["viewType"] == "Weave"])
    return {name for name in ("samples/answers", "matrix/table", "capability/worst_drops") if f'"{name}"' in text}


def test_the_same_pages_in_every_process(tmp_path):
    """No random id, no time, no order of a set: two processes with other hash seeds write the same bytes."""
    for seed in "12":
        subprocess.run(
            [sys.executable, "-m", "trace_hydra.dashboard", "--offline", "--spec", str(tmp_path / seed)],
            cwd=ROOT,
            check=True,
            capture_output=True,
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin", "HOME": str(tmp_path)},
        )
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    ids = [one["__id__"] for one in panels_of(json.loads((tmp_path / "1").read_text())["report"])]
    assert len(ids) == len(set(ids)) > 20


def test_runs_give_groups_colours_and_a_table(tmp_path):
    """OP 40 and 60 by seed: mean 50, s = 14.142, t = 12.706 at one degree: 12.706 * 14.142 / sqrt(2) = 127.06."""
    for seed, op in ((0, 40.0), (1, 60.0)):
        write_run(tmp_path / f"a{seed}", op=op, seed=seed)
        (tmp_path / f"a{seed}" / "wandb_id").write_text(f"id{seed}\n")
    write_run(tmp_path / "b", method="ewc", op=30.0, fwt=None)
    (tmp_path / "dead" / ".hydra").mkdir(parents=True)
    known = facts.from_runs([tmp_path])
    order = order_label("custom", ("FOMC", "Py150"))
    assert known.tasks == ("FOMC", "Py150") and known.methods == ("ewc", "seqft") and known.orders == (order,)
    assert known.run_colours == {"id0": "#0072b2", "id1": "#0072b2"} and known.left_out == 1
    ewc, seqft = known.table[1:]
    place = known.table[0].index("OP")
    assert (seqft[place], ewc[place]) == ("50.00 ± 127.06", "30.00")
    made = pages.build(known)
    colours = made["workspace"]["spec"]["section"]["customRunColors"]
    assert colours["id0"] == "#0072b2" and len([key for key in colours if order in key]) == 4
    (table,) = [one["content"] for one in made["report"]["spec"]["blocks"] if "Student" in one.get("content", "")]
    assert r"| 50.00 ± 127.06 |" in table and "1 run directories are not in it" in table
    assert [line.count("|") for line in table.splitlines()[:4]] == [len(known.table[0]) + 1] * 4


def test_orders_that_share_a_name_are_kept_apart(tmp_path):
    """`task_order=[A,B]` is always named "custom": what was trained first decides too."""
    write_run(tmp_path / "a", tasks=("FOMC", "Py150"))
    write_run(tmp_path / "b", tasks=("Py150", "FOMC"))
    assert len(facts.from_runs([tmp_path]).orders) == 2
    assert order_label("trace", TRACE) == "trace" and order_label("trace", TRACE[:2]) != "trace"


def test_hostile_names_are_shown_as_they_are(tmp_path):
    """No HTML, no link, no further column, no line of its own."""
    write_run(tmp_path / "a", method="<img src=x onerror=alert(1)>|[x](javascript:1)\n# h\x1b[31m")
    made = pages.build(facts.from_runs([tmp_path]))
    (table,) = [one["content"] for one in made["report"]["spec"]["blocks"] if "Student" in one.get("content", "")]
    _, _, line, *_ = table.splitlines()
    assert r"\<img src=x onerror=alert\(1\)\>\|\[x\]\(javascript:1\)�\# h�\[31m" in line


def test_runs_of_two_folders_count_once(tmp_path):
    write_run(tmp_path / "one" / "a")
    write_run(tmp_path / "two" / "a")
    known = facts.from_runs([tmp_path / "one", tmp_path / "two"])
    assert known.table[1][known.table[0].index("runs")] == "1"
