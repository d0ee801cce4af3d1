"""What reaches Hydra from the command line and from files, in a process of its own."""

import os
import pickle
from typing import Any

import pytest
from hostile import Hostile, command
from omegaconf import OmegaConf

from trace_hydra.guard import _hydra_problems, consent_problems

SMOKE = ("debug=smoke", "logger=none", "callbacks=none", "capability=none", "task_order=[FOMC]")


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


def refused(tmp_path, canary, *arguments, **environment) -> str:
    """Run the command; it must end with 2 in one message and make neither canary nor results."""
    done = command(*arguments, f"paths.runs={tmp_path / 'runs'}", **environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert not canary.exists() and not list(tmp_path.rglob("results.json"))
    return done.stderr


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["+callbacks.x={_target_: os.system, command: 'touch CANARY'}"], "callbacks.x._target_=os.system"),
        (["+trainer.callbacks=[{_target_: os.system, command: 'touch CANARY'}]"], "trainer.callbacks[0]._target_"),
        (["method._target_=${oc.env:HOSTILE_TARGET}"], "method._target_=os.system"),
        (["+hydra.callbacks.x={_target_: os.system, command: 'touch CANARY'}"], "hydra.callbacks.x._target_"),
        (["+hydra.callbacks.x={_target_: lightning.pytorch.cli.instantiate_class, args: 'touch CANARY', "
          "init: {class_path: os.system}}"], "hydra.callbacks.x._target_"),
        (["-m", "seed=1,2", "+hydra.callbacks.x={_target_: os.mkdir, path: CANARY}"], "hydra.callbacks.x._target_"),
        (["hydra.launcher._target_=os.system"], "hydra.launcher._target_"),
        (["hydra.sweeper._target_=trace_hydra.run.run", "-m"], "hydra.sweeper._target_"),
        (["hydra.job_logging.handlers.file={class: logging.handlers.WatchedFileHandler, filename: CANARY}"],
         "hydra.job_logging.handlers.file.class"),
        (["hydra.job.name=../../x"], "hydra.job.name"),
        (["hydra.output_subdir=../../canary"], "hydra.output_subdir"),
        (["trust.targets=[o]", "+callbacks.x={_target_: os.system, command: 'touch CANARY'}"], "trust.targets"),
        (["method.name=../../x"], "method.name"),
        (["model.name=/etc/x"], "model.name"),
        (["--config-path", "/tmp"], "--config-path"),
    ],
)  # fmt: skip
def test_hostile_overrides_are_refused(tmp_path, canary, overrides, key):
    given = [one.replace("CANARY", str(canary)) for one in overrides]
    assert key in refused(tmp_path, canary, *SMOKE, *given, HOSTILE_TARGET="os.system")


@pytest.mark.parametrize("flag", ["--experimental-rerun", "--exp"])
def test_a_rerun_from_a_pickle_is_refused(tmp_path, canary, flag):
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(Hostile(canary)))
    assert "pickle" in refused(tmp_path, canary, flag, tmp_path / "config.pickle")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("x: !!python/object/apply:os.mkdir [CANARY]\n", "python/object/apply:os.mkdir"),
        ("x: !!python/object/new:os.system ['touch CANARY']\n", "python/object/new:os.system"),
        ("x: !!python/name:os.system\n", "python/name:os.system"),
        ("callbacks: {x: {_target_: os.mkdir, path: CANARY}}\n", "callbacks.x._target_=os.mkdir"),
        ("trust: {targets: [os.]}\ncallbacks: {x: {_target_: os.mkdir, path: CANARY}}\n", "trust.targets[0]=os."),
        ("model: {trust_remote_code: true, path: /some/model, name: some}\n", "model.trust_remote_code=True"),
        ("hydra: {callbacks: {x: {_target_: os.mkdir, path: CANARY}}}\n", "hydra.callbacks.x._target_"),
        ("hydra: {job_logging: {filters: {x: {(): os.mkdir, path: CANARY}}}}\n", "hydra.job_logging.filters.x.()"),
        ("hydra: {job: {env_set: {WANDB_API_KEY: abcdef}}}\n", "hydra.job.env_set.WANDB_API_KEY"),
    ],
)
def test_hostile_files_of_a_folder_of_configurations_are_refused(tmp_path, canary, text, key):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    file = tmp_path / "conf" / "experiment" / "hostile.yaml"
    file.write_text("# @package _global_\n" + text.replace("CANARY", str(canary)))
    smoke = SMOKE if "remote" not in key else ("model=vicuna7b",)
    assert key in refused(tmp_path, canary, "--config-dir", tmp_path / "conf", *smoke, "experiment=hostile")


def test_trust_from_a_swept_file_is_refused_in_its_job(tmp_path, canary):
    """Hydra composes a sweep's jobs one by one, after the command line was checked."""
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / "conf" / "experiment" / f"{name}.yaml").write_text(
            "# @package _global_\ntrust: {targets: [os.]}\n"
            f"callbacks: {{x: {{_target_: os.mkdir, path: {canary}}}}}\n"
        )
    folder, place = (
        ("--config-dir", tmp_path / "conf"),
        (f"paths.runs={tmp_path}/runs", f"hydra.sweep.dir={tmp_path}/s"),
    )
    done = command("-m", *folder, *SMOKE, "experiment=a,b", *place)
    assert done.returncode != 0 and not canary.exists()
    assert "os.mkdir: not allowed" in done.stderr + done.stdout or "trust.targets[0]=os." in done.stderr + done.stdout


def test_what_hydra_itself_needs_is_allowed():
    """The nodes of a plain command, and those of the launchers in conf/hydra."""
    done = command("--cfg", "hydra")
    assert done.returncode == 0
    node: Any = OmegaConf.to_container(OmegaConf.create(done.stdout).hydra, resolve=False)
    assert list(_hydra_problems(node)) == []
    node["callbacks"] = {"x": {"_target_": "hydra.experimental.callbacks.LogJobReturnCallback"}}
    assert list(_hydra_problems(node)) == []
    node["callbacks"]["y"] = {"_target_": "hydra.utils.call"}
    assert [one.split("=")[0] for one in _hydra_problems(node)] == ["hydra.callbacks.y._target_"]


@pytest.mark.parametrize(
    ("overrides", "allowed"),
    [
        ([], False),
        (["model=evil"], False),
        (["judge.model.trust_remote_code=true"], False),
        (["model.trust_remote_code=true"], True),
        (["+model.trust_remote_code=true"], True),
        (["model={path: x, trust_remote_code: true}"], True),
    ],
)
def test_remote_code_needs_the_command_line(overrides, allowed):
    node = {"model": {"name": "some", "path": "owner/some", "trust_remote_code": True}}
    found = consent_problems(node, overrides)
    assert (found == []) == allowed
    assert allowed or ("some (owner/some)" in found[0] and "'model.trust_remote_code=true'" in found[0])


def test_consent_to_the_judges_model_counts_where_a_set_uses_it():
    node = {"sets": {"helpful": {"judge": {"model": {"trust_remote_code": True}}}}}
    stored = {"helpful": node["sets"]["helpful"]}
    assert consent_problems({"capability": node}, [])
    assert not consent_problems({"capability": node}, ["judge.model.trust_remote_code=true"])
    assert consent_problems(stored, [], "capability.sets")
    assert not consent_problems(stored, ["judge.model.trust_remote_code=true"], "capability.sets")


def test_environment_variables_are_not_copied_into_stored_configurations(tmp_path, canary):
    said = refused(tmp_path, canary, *SMOKE, "hydra.job.env_copy=[SOME_API_KEY]", SOME_API_KEY="planted-secret-value-1")
    assert (
        "hydra.job.env_set.SOME_API_KEY" in said
        and "planted-secret" not in said
        and os.environ.get("SOME_API_KEY") is None
    )
