"""The configuration: every file composes, every target binds, what is wrong is refused in one message."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, compose_config
from omegaconf import OmegaConf
from zygote import run_module

from trace_hydra import build, entry
from trace_hydra.keys import run_key
from trace_hydra.launch import with_lightning_trainer
from trace_hydra.targets import find_targets, target_problems

CONF = ROOT / "conf"
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("hydra", "local"))
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
EXPECTED_GROUPS = {
    "model",
    "tuning",
    "optim",
    "method",
    "task_order",
    "seed",
    "data",
    "protocol",
    "budget",
    "evaluation",
    "capability",
    "trainer",
    "callbacks",
    "logger",
    "experiment",
    "debug",
}


def command(*arguments: str, **keywords) -> subprocess.CompletedProcess:
    return run_module("trace_hydra", *arguments, **keywords)


def test_all_groups_are_there():
    assert set(GROUPS) >= EXPECTED_GROUPS and (CONF / "hydra" / "launcher").is_dir()


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: value)
def test_every_option_composes_and_every_target_binds(group, option):
    config = compose_config([f"{group}='{option}'" if group == "seed" else f"{group}={option}"])
    plain = with_lightning_trainer(OmegaConf.to_container(config, resolve=True))
    assert [problem for path, node in find_targets(plain) for problem in target_problems(path, node)] == []


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml")))
def test_launchers_compose(option):
    done = command(f"hydra/launcher={option}", "--cfg", "hydra", "-p", "hydra.launcher")
    assert done.returncode == 0 and "Warning" not in done.stderr
    assert "_target_: hydra_plugins.trace_hydra_launchers." in done.stdout


@pytest.mark.parametrize(("key", "value"), [("timeout_mim", "5"), ("timeout_min", "soon")])
def test_a_launchers_settings_are_checked(key, value):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    done = command("hydra/launcher=submitit_slurm", f"hydra.launcher.{key}={value}", "--cfg", "hydra")
    assert done.returncode == 2 and key in done.stderr and "Traceback" not in done.stderr


def test_defaults_are_the_embedded_run():
    config = compose_config([])
    chosen = [
        build.OmegaConf.select(config, f"{key}.name") for key in ("model", "data", "method", "task_order", "protocol")
    ]
    assert chosen == ["smollm2", "mini", "seqft", "trace", "greedy"] and config.seed.train == 42


def test_cfg_job_loads_no_torch():
    """The configuration is printed without importing torch: a broken torch on the path does not matter."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['trace_hydra', '--cfg', 'job'];"
        "from trace_hydra.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "model:" in done.stdout


@pytest.mark.parametrize("arguments", [["--cfg", "job", "--resolve"], ["--info", "defaults-tree"], ["--help"]])
def test_hydras_own_flags_work(arguments):
    assert command(*arguments).returncode == 0


def test_tab_completion_lists_methods():
    """What the shell asks after `trace_hydra method=<TAB>`; Hydra completes the installed command, not `python -m`."""
    line = "trace_hydra method="
    done = command("-sc", "query=bash", env={**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))})
    assert "method=replay" in done.stdout and "method=seqft" in done.stdout


def test_model_card_usage_composes():
    """The line of the README: `python -m trace_hydra model=vicuna7b method=replay`."""
    config = compose_config(["model=vicuna7b", "method=replay"])
    assert (config.model.path, config.method.fraction) == ("lmsys/vicuna-7b-v1.5", 0.1)


def test_switches_chain_and_the_command_line_wins():
    assert compose_config(["method=lora"]).optim.name == "adapter"
    config = compose_config(["method=lora", "tuning=full"])
    assert (config.tuning.name, config.optim.name) == ("full", "full")
    assert compose_config(["method=replay", "tuning=lora"]).optim.optimizer.lr == 1e-3  # budget.lr_adapter of mini


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["seed=0"], ["seed='0'"]),
        (["seed=0,1"], ["seed='0','1'"]),
        (["task_order=[A,B]"], ["task_order.name=custom", "task_order.tasks=[A,B]"]),
        (["task_order=[A,B],[B,A]"], ["task_order.name=custom", "task_order.tasks=[A,B],[B,A]"]),
        (["task_order=reversed", "seed.train=3"], ["task_order=reversed", "seed.train=3"]),
    ],
)
def test_overrides_that_hydra_cannot_read_are_rewritten(given, expected):
    assert entry.rewrite_overrides(given) == expected


def test_seed_moves_all_three():
    assert OmegaConf.to_container(compose_config(["seed.train=7"]).seed, resolve=True) == {
        "train": 7,
        "data": 7,
        "generation": 7,
    }


def test_wrong_option_lists_the_choices():
    done = command("method=repaly")
    assert done.returncode == 2
    assert "repaly" in done.stderr and "replay" in done.stderr and "Traceback" not in done.stderr


def test_all_problems_come_in_one_message_before_anything_loads():
    """A wrong option, a wrong key, a wrong type and a task named twice: one message, exit code 2, no run directory."""
    done = command(
        "model=tiny",
        "method=replay",
        "method.fractoin=1",
        "budget.batch_size=many",
        "trainer=gpux",
        "task_order=[FOMC,FOMC,Nope]",
        "paths.runs=never_made",
    )
    assert done.returncode == 2
    for part in ("fractoin", "budget.batch_size", "gpux", "FOMC twice", "Nope"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr and not Path(ROOT / "never_made").exists()


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["method=replay", "method.fraction=1.4"], "method.fraction=1.4 must be in (0, 1]"),
        (["method=replay", "method.fraction=lots"], "method.fraction=lots"),
        (["method=replay", "method.when=sometimes"], "method.when=sometimes"),
        (["+method.typo=1"], "no such argument"),
        (["protocol.truncation=right"], "protocol.truncation=right"),
        (["evaluation.cells=some"], "evaluation.cells=some"),
        (["+budget.epochs.FOMX=2"], "budget.epochs.FOMX"),
        (["method=icl", "tuning=full"], "trains nothing"),
        (["method=seqft", "tuning=frozen"], "nothing to train"),
        (["trainer.devices=4"], "trainer.devices=4"),
        (["trainer.precison=16"], "precison"),
        (["+trainer.precison=16"], "precison"),
        (["optim.optimizer._target_=torch.optim.Adamw"], "Adamw"),
        (["optim.optimizer.lr=fast"], "lr"),
        (["protocol.decoding.do_sample=true", "protocol.decoding.temperature=0"], "temperature"),
    ],
)
def test_wrong_values_are_named_with_their_key(overrides, part):
    from trace_hydra.diagnose import diagnose

    try:
        problems = build.problems_of(compose_config(["model=tiny", *overrides]))
    except Exception:  # noqa: BLE001 - whatever Hydra raises, the diagnosis must name it
        problems = diagnose(["model=tiny", *overrides])
    assert any(part in problem for problem in problems), problems


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "trace_hydra.entry.os.system",
        "torch.load",
        "torch.optim.sys.exit",
        "lightning.pytorch.Trainer.fit.__globals__",
        "pickle.loads",
        "trace_hydra.build.importlib.import_module",
        "trace_hydra.entry.sys.exit",
        "",
    ],
)
@pytest.mark.parametrize("place", ["method", "callbacks.extra", "trainer.profiler", "data.nested.deep"])
def test_targets_outside_the_allowlist_are_refused_and_not_called(target, place):
    config = compose_config(["model=tiny"])
    OmegaConf.set_struct(config, False)
    OmegaConf.update(config, place, {"_target_": target, "_partial_": True}, force_add=True)
    problems = build.problems_of(config)
    assert any(problem.startswith(place) for problem in problems), problems


def test_a_trusted_package_may_be_named(tmp_path, monkeypatch):
    (tmp_path / "my_trusted.py").write_text(
        "from trace_hydra.methods.base import Method\nclass Mine(Method):\n    pass\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = compose_config(["model=tiny", "trust.targets=[my_trusted.]", "method._target_=my_trusted.Mine"])
    assert build.problems_of(config) == []
    config = compose_config(["model=tiny", "method._target_=my_trusted.Mine"])
    assert any("not allowed" in problem for problem in build.problems_of(config))


def test_a_callback_is_taken_out_by_null_and_must_be_a_node():
    whole, without = (build.validate(compose_config(["model=tiny", *one])) for one in ([], ["callbacks.matrix=null"]))
    assert len(without.callbacks) == len(whole.callbacks) - 1
    for node in ("callbacks.matrix=7", "logger.csv=true"):
        key, _, value = node.partition("=")
        (problem,) = build.problems_of(compose_config(["model=tiny", "logger=csv", node]))
        assert problem.startswith(f"{key}={value.title()} has no _target_")


def test_run_key_ignores_paths_and_nothing_else(tmp_path):
    base = run_key(compose_config(["model=tiny"]))
    assert run_key(compose_config(["model=tiny", f"paths.store={tmp_path}", "logger=csv"])) == base
    assert run_key(compose_config(["model=tiny", "seed.train=43"])) != base
    assert run_key(compose_config(["model=tiny", "optim.carry=true"])) != base


def test_random_order_is_a_seeded_permutation():
    orders = [
        build.training_order(compose_config(["task_order=random", f"seed.train={seed}"])) for seed in (1, 1, 2, 3)
    ]
    assert orders[0] == orders[1] and len({json.dumps(order) for order in orders}) == 3
    assert sorted(orders[0]) == sorted(build.TRACE_TASKS)


def test_epochs_follow_the_task_not_the_position():
    """NumGLUE-cm has 5 epochs in the scripts' schedule at position 6 of order 1 and at position 1 of order 2."""
    from trace_hydra.prepare import epochs_of

    budget = compose_config(["budget=scripts", "task_order=trace_order2"]).budget
    assert [epochs_of(budget, task) for task in ("NumGLUE-cm", "ScienceQA", "MeetingBank", "Own")] == [5, 3, 7, 5]
