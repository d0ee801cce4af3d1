"""Every sweep template and experiment preset, executed in its smoke form."""

import json
import os
from typing import Any

import pytest
from conftest import ROOT, compose_config, run_tiny
from fake_slurm import FakeSlurm
from omegaconf import OmegaConf
from zygote import run_module

TEMPLATES = sorted(path.stem for path in (ROOT / "multirun_templates" / "sweep").glob("*.yaml"))
LONG = {"slurm": pytest.mark.long}
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
SMOKE = [
    "debug=smoke",
    "callbacks=none",
    "logger=none",
    "task_order.tasks=[FOMC]",
]
ROWS = ("data.rows.train=2", "data.rows.test=2")
"""Of the generated tasks."""


def sweep(tmp_path, *arguments, rows=ROWS):
    tasks = [] if any("task_order" in argument for argument in arguments) else ["task_order.tasks=[FOMC]"]
    given = [*SMOKE, *rows, *tasks, f"paths.runs={tmp_path}", *arguments]
    return run_module("trace_hydra", *given, env={**os.environ, "WANDB_MODE": "offline"})


def jobs(tmp_path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/results.json"))]


@pytest.fixture(scope="module")
def needs(tmp_path_factory):
    """What the templates that name data of their own need to run small."""
    rows = [{"prompt": f"Question {number}?\nAnswer:", "answer": "A"} for number in range(12)]
    folder = tmp_path_factory.mktemp("rows") / "FOMC"
    folder.mkdir()
    for split in ("train", "eval", "test"):
        (folder / f"{split}.json").write_text(json.dumps(rows))
    small = ["model=tiny", "trainer=cpu", "trainer.precision=32-true", "budget=smoke"]
    files = ["data=trace", f"paths.data={folder.parent}", "data.limit.test=2", "data.limit.train=2,4,6"]
    return {
        "paper_table": {"arguments": [*small, "data=smoke"], "rows": ROWS},
        "samples_epochs": {"arguments": [*small, *files, "budget.default_epochs=1,2,3,4"], "rows": ()},
    }


@pytest.mark.slow
@pytest.mark.parametrize("template", [pytest.param(one, marks=LONG.get(one, ())) for one in TEMPLATES])
def test_every_template_runs(template, tmp_path, needs, request, monkeypatch):
    """As many finished runs as the template names jobs, each in its own directory."""
    raw: Any = OmegaConf.load(ROOT / "multirun_templates" / "sweep" / f"{template}.yaml")
    expected = 1
    for values in raw.hydra.sweeper.params.values():
        expected *= len(str(values).split(","))
    own = needs.get(template, {"arguments": [], "rows": ROWS})
    if "submitit_slurm" in str(raw.get("defaults")):
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
        slurm = FakeSlurm(tmp_path / "slurm")
        request.addfinalizer(slurm.shut_down)
        for name, value in slurm.environment().items():
            monkeypatch.setenv(name, value)
    done = sweep(tmp_path, f"sweep={template}", *own["arguments"], rows=own["rows"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(jobs(tmp_path)) == expected


def test_the_command_line_replaces_a_templates_values(tmp_path):
    done = sweep(tmp_path, "sweep=seeds", "seed=3,4")
    assert done.returncode == 0 and [job["seed"]["train"] for job in jobs(tmp_path)] == [3, 4]


def test_orders_can_be_swept_as_lists(tmp_path):
    done = sweep(tmp_path, "-m", "task_order=[FOMC,Py150],[Py150,FOMC]")
    assert done.returncode == 0, done.stderr
    assert sorted(job["tasks"] for job in jobs(tmp_path)) == [["FOMC", "Py150"], ["Py150", "FOMC"]]


def test_a_failed_job_does_not_end_the_sweep(tmp_path):
    """The first seed's job fails (a loss that is no number), the second finishes; exit status 1."""
    done = sweep(tmp_path, "-m", "optim.optimizer.lr=1e30,1e-3", "data.rows.train=8")
    assert done.returncode == 1 and len(jobs(tmp_path)) == 1
    assert "optim.optimizer.lr" in done.stderr


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_in_its_smoke_form(experiment, tmp_path):
    """The preset's method, protocol and optimizer settings with the tiny model, generated rows, a small budget."""
    overrides = [
        f"experiment={experiment}", "model=tiny", "data=smoke", "budget=smoke", "trainer=cpu",
        "budget.batch_size=2", "budget.micro_batch_size=1",
        "trainer.precision=32-true",
        "task_order=[FOMC,NumGLUE-cm]", "protocol.max_prompt_tokens=128", "protocol.max_answer_tokens=16",
        "protocol.decoding.max_new_tokens=4",
    ]  # fmt: skip
    run = run_tiny(tmp_path, overrides)
    assert run.results["complete"] and run.results["protocol"]["name"] in ("official", "seekr", "greedy")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_as_it_stands(experiment):
    """TRACE's presets: batch 128, seed 1234, the scripts' epochs, learning rate 1e-5 (adapters 1e-4)."""
    config = compose_config([f"experiment={experiment}"])
    family, method, *model = experiment.split("_", 2)
    if family != "trace":
        assert config.method.name == family and config.model.name == "_".join([method, *model])
        return
    assert config.method.name == method and config.model.name == model[0]
    assert config.data.variant == ("trace_reasoning" if method == "rcl" else "trace5000")
    assert config.seed.train == config.seed.data == 1234 and config.protocol.prompt == "raw"
    assert config.task_order.tasks[0] == "C-STANCE"
    if method != "icl":
        assert config.budget.batch_size == 128 and config.optim.carry
        assert [config.budget.epochs[task] for task in config.task_order.tasks] == [5, 3, 7, 5, 3, 5, 5, 7]
        assert config.optim.optimizer.lr == (1e-4 if method == "lora" else 1e-5)


def test_the_papers_methods_have_presets_for_its_five_models():
    models = ("llama2_7b_chat", "llama2_13b_chat", "vicuna7b", "vicuna13b", "baichuan2_7b_chat")
    wanted = {f"trace_{method}_{model}" for method in ("seqft", "lora", "replay", "icl", "rcl") for model in models}
    assert wanted <= set(EXPERIMENTS)
