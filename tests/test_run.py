"""The command line end to end: what a run leaves, and what it says when it cannot run."""

import json
import os

import pytest
from conftest import ROOT, compose_config
from zygote import run_module

from trace_hydra import build

SMOKE = ["debug=smoke", "logger=csv", "task_order=[FOMC,Py150]"]


def offline() -> dict[str, str]:
    """The environment as it is now: the store is each test's own."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


def command(*arguments, module="trace_hydra", cwd=ROOT, **keywords):
    return run_module(module, *arguments, cwd=cwd, env={**offline(), "PYTHONPATH": str(ROOT), **keywords})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run of two tasks from a foreign folder; its output and its directory."""
    folder = tmp_path_factory.mktemp("runs")
    done = command(*SMOKE, f"paths.runs={folder}", cwd=folder)
    assert done.returncode == 0, done.stderr
    (directory,) = [path for path in folder.iterdir() if path.is_dir()]
    return done.stdout, directory


def test_a_run_shows_plan_matrix_summary_and_paths(finished):
    out, directory = finished
    for part in ("stage", "tokens", "FOMC", "Py150", "before", "OP", "BWT", "FWT", "forgetting", "95 %"):
        assert part in out
    for name in ("results.json", "report.md", "report.html", "matrix.png"):
        assert str(directory / name) in out and (directory / name).stat().st_size > 0
    assert out.index("tokens") < out.index("before")  # the plan comes first


def test_a_run_leaves_answers_rows_audit_and_configuration(finished):
    _, directory = finished
    results = json.loads((directory / "results.json").read_text())
    assert results["tasks"] == ["FOMC", "Py150"] and len(results["matrix"]) == 3 and results["complete"]
    assert {path.name for path in directory.iterdir()} >= {
        ".hydra", "audit.json", "predictions", "test_rows", "trace_hydra.log", "csv",
    }  # fmt: skip
    for row, tasks in {0: {"FOMC", "Py150"}, 1: {"FOMC", "Py150"}, 2: {"FOMC", "Py150"}}.items():
        assert {path.stem for path in (directory / "predictions" / str(row)).iterdir()} == tasks
    lines = [json.loads(line) for line in (directory / "predictions" / "2" / "FOMC.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"test-{number}" for number in range(4)]
    mean = sum(line["scores"]["score"] for line in lines) / len(lines)
    assert mean == pytest.approx(results["matrix"][2][0])
    assert json.loads((directory / "audit.json").read_text())
    assert directory.name.startswith("tiny-seqft-full-smoke-custom-seed42-")


def test_a_run_scores_again_without_a_model(finished):
    """Under its own protocol the matrix is the same to the last digit; under official it is another one."""
    _, directory = finished
    results = json.loads((directory / "results.json").read_text())
    same = json.loads(command(directory, module="trace_hydra.score").stdout)
    assert same["matrix"] == results["matrix"] and same["op"] == results["op"]
    official = command(directory, "protocol=official", module="trace_hydra.score")
    assert official.returncode == 0 and json.loads(official.stdout)["scoring"] == "official"
    assert (directory / "rescored" / "official.json").is_file()


def test_a_run_again_gives_the_same_numbers_in_the_same_place(finished):
    _, directory = finished
    before = json.loads((directory / "results.json").read_text())
    assert command(*SMOKE, f"paths.runs={directory.parent}").returncode == 0
    after = json.loads((directory / "results.json").read_text())
    assert [path for path in directory.parent.iterdir() if path.is_dir()] == [directory]
    assert after["matrix"] == before["matrix"] and after["op"] == before["op"]
    assert [stage["key"] for stage in after["stages"]] == [stage["key"] for stage in before["stages"]]


def test_official_protocol_end_to_end(tmp_path):
    """Sampling, left truncation, official metrics; two runs agree because sampling is seeded."""
    rows = []
    for folder in ("a", "b"):
        done = command(*SMOKE, "protocol=official", f"paths.runs={tmp_path / folder}")
        assert done.returncode == 0, done.stderr
        (path,) = (tmp_path / folder).rglob("results.json")
        rows.append(json.loads(path.read_text()))
    assert rows[0]["matrix"] == rows[1]["matrix"]
    assert rows[0]["protocol"]["name"] == "official" and rows[0]["protocol"]["scoring"] == "official"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["data=trace"], ["data=trace", "TRACE-Benchmark.zip", "data=trace5000"]),
        (["data=trace", "paths.data=no/such/folder"], ["paths.data=no/such/folder", "does not exist"]),
        (["task_order=[FOMC,FOMC]"], ["FOMC twice"]),
        (["task_order=[FOMC,Pie150]"], ["'Pie150' is unknown", "Py150"]),
        (["task_order=[]"], ["task_order.tasks is empty"]),
        (["protocol.prompt=chat"], ["protocol.prompt=chat", "chat template"]),
        (["model=llama2_7b_chat", "model.path=/no/such/model"], ["model.path=/no/such/model"]),
        (["data.rows.train=0"], ["data.rows.train=0"]),
        (["tuning=lora", "tuning.r=0"], ["tuning.r=0"]),
    ],
)
def test_bad_input_is_one_clear_message(tmp_path, arguments, parts):
    done = command("debug=smoke", "logger=none", f"paths.runs={tmp_path}", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_unwritable_run_directory(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = command("debug=smoke", f"paths.runs={tmp_path / 'file' / 'runs'}")
    assert done.returncode == 2 and "paths.runs" in done.stderr and "Traceback" not in done.stderr


def test_bad_rows_are_named_before_the_model_is_loaded(tmp_path):
    """A model that does not exist and rows that are wrong: both are told at once, with file and row."""
    task = tmp_path / "data" / "FOMC"
    task.mkdir(parents=True)
    (task / "train.json").write_text('[{"prompt": "p", "answer": "A"}, {"prompt": "q"}]')
    (task / "eval.json").write_text("[]")
    (task / "test.json").write_bytes(b'\xef\xbb\xbf[{"prompt": "p", "answer": "A"}]')
    done = command(
        "debug=smoke", "data=trace", f"paths.data={tmp_path / 'data'}", "task_order=[FOMC]", "model=vicuna7b",
        "model.path=/no/such/model", f"paths.runs={tmp_path / 'runs'}",
    )  # fmt: skip
    assert done.returncode == 2
    for part in (
        "FOMC/train.json row 2",
        "'answer'",
        "FOMC/eval.json is an empty list",
        "byte order mark",
        "/no/such/model",
    ):
        assert part in done.stderr


def test_non_finite_loss_ends_the_run(tmp_path):
    done = command(*SMOKE, "optim.optimizer.lr=1e30", f"paths.runs={tmp_path}")
    assert done.returncode == 2 and "optim.optimizer.lr" in done.stderr and "stage" in done.stderr
    assert not list(tmp_path.rglob("results.json"))


def test_mini_data_with_a_large_model_says_how_to_get_the_release(tmp_path):
    """Any checkpoint folder stands for the model: the notice comes with every model but the two embedded ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build.validate(compose_config(["model=tiny"])).model.load_tokenizer()
    folder = tmp_path / "checkpoint"
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    done = command(
        "debug=smoke", "model=vicuna7b", f"model.path={folder}", "model.pad_token=null", "method=replay",
        "task_order=[FOMC]", f"paths.runs={tmp_path / 'runs'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "TRACE-Benchmark.zip" in done.stdout and "data=trace5000" in done.stdout
