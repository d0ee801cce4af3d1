"""Keys and passwords are in no file and no output, and not taken where they would be stored."""

import json
from pathlib import Path

import pytest
from conftest import compose_config
from hostile import chat_server, command
from omegaconf import OmegaConf

from trace_hydra import build
from trace_hydra.credentials import argument_problems, secret_problems, variable_fault
from trace_hydra.data.task import TRACE_TASKS
from trace_hydra.errors import ConfigError

PLANTED = {
    "OPENAI_API_KEY": "sk-plantedPLANTEDplanted0001",
    "JUDGE_KEY": "planted-judge-key-without-a-known-look",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_plantedPLANTEDplanted0002",
    "TRACE_SECRET_TOKEN": "planted-trace-secret-0003",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/secret/0004",
    "DB_PASSWORD": "planted-password-0005",
}


def leaks(text: bytes) -> list[str]:
    return [name for name, value in PLANTED.items() if value.encode() in text]


@pytest.fixture
def hhh(tmp_path) -> Path:
    """Two prompts to judge, in TRACE's layout."""
    for name in ("self-instruct", "LIMA"):
        folder = tmp_path / "hhh" / "helpful" / name
        folder.mkdir(parents=True)
        (folder / "test.json").write_text(json.dumps([{"prompt": f"Say {name}.", "answer": ""}]))
    return tmp_path / "hhh"


def smoke(tmp_path, hhh, url: str) -> list[str]:
    return [
        "debug=smoke",
        "logger=[wandb,csv]",
        "capability=instruction",
        "task_order=[FOMC]",
        "evaluation=diagonal_last",
        "judge=openai",
        "judge.model=some-judge",
        f"judge.base_url={url}",
        "judge.api_key_env=JUDGE_KEY",
        "judge.retries=0",
        "capability.sets.helpful.max_new_tokens=4",
        "capability.sets.helpful.same_answer=ask",
        "capability.sets.checks.limit=1",
        "capability.sets.checks.max_new_tokens=4",
        f"paths.hhh={hhh}",
        f"paths.runs={tmp_path}/runs",
        f"paths.store={tmp_path}/store",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_planted_secrets_are_in_no_file_and_no_output(tmp_path, hhh, fails):
    """The judge gets its key, and says it back in verdicts and errors; W&B runs offline with one of its own."""
    key, chat = PLANTED["JUDGE_KEY"], chat_server()

    def script(number, body):
        if fails and number > 0:
            return chat.failure(401, f"the key {key} was revoked")
        return chat.completion(f"[[A]] I saw {key}.")

    home = tmp_path / "home"
    home.mkdir()
    with chat.serving(script) as server:
        done = command(*smoke(tmp_path, hhh, server.url), HOME=str(home), **PLANTED)
    assert done.returncode == 0, done.stderr
    assert set(server.keys) == {f"Bearer {key}"} and len(server.keys) > 1
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"results.json", "config.yaml", "overrides.yaml", "metrics.csv"} <= names
    assert any(path.suffix == ".wandb" for path in files) and any("store" in path.parts for path in files)
    assert [(path, found) for path in files if (found := leaks(path.read_bytes()))] == []
    assert leaks(done.stdout.encode() + done.stderr.encode()) == []


def test_leaks_finds_what_is_planted():
    assert leaks(b"x" + PLANTED["HF_TOKEN"].encode()) == ["HF_TOKEN"] and leaks(b"x") == []


GIVEN = [
    (["judge=openai", f"judge.api_key_env={PLANTED['OPENAI_API_KEY']}"], "judge.api_key_env"),
    (["judge=openai", "judge.api_key_env=aB3dE5fG7hI9jK1lM3nO5pQ7"], "judge.api_key_env"),
    (["judge=openai", f"judge.api_key_env={PLANTED['WANDB_API_KEY']}"], "judge.api_key_env"),
    (["judge=openai", "+judge.api_key=aB3dE5fG7hI9"], "judge.api_key"),
    (["judge=openai", "judge.base_url=http://user:planted-pass@127.0.0.1:9/v1"], "judge.base_url"),
    (["judge=openai", "judge.base_url=https://planted-token@127.0.0.1:9/v1"], "judge.base_url"),
    (["judge=openai", "judge.base_url=http://127.0.0.1:9/v1?api_key=planted-query"], "judge.base_url"),
    ([f"model.name={PLANTED['TRACE_SECRET_TOKEN']}"], "model.name"),
    (["+logger.wandb.settings.api_key=planted-wandb"], "logger.wandb.settings.api_key"),
    (["logger.wandb.settings={api_key: planted-wandb}"], "logger.wandb.settings"),
    ([f"logger.wandb.tags=[x,{PLANTED['HF_TOKEN']}]"], "logger.wandb.tags"),
    (["model.path=https://user:planted-pass@hub.example/x"], "model.path"),
    (["-m", f"judge.api_key_env={PLANTED['OPENAI_API_KEY']},sk-anotherPLANTEDplanted99"], "judge.api_key_env"),
    (["+hydra.job.env_set.HF_TOKEN=planted-hub"], "hydra.job.env_set.HF_TOKEN"),
    ([PLANTED["OPENAI_API_KEY"]], "an argument of the command line"),
]


@pytest.mark.parametrize(("overrides", "key"), GIVEN)
def test_secrets_given_as_values_are_refused_unseen(monkeypatch, overrides, key):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    found = argument_problems(overrides)
    assert len(found) == 1 and found[0].startswith(f"{key} ") and "environment variable" in found[0]
    for override in overrides[-1:]:
        value = override.partition("=")[2] or override
        assert value not in found[0] and "planted" not in found[0].lower() and "aB3d" not in found[0]


def test_the_command_line_refuses_them_before_anything_is_written(tmp_path):
    for overrides, key in (GIVEN[0], GIVEN[4], GIVEN[12]):
        done = command("debug=smoke", *overrides, f"paths.runs={tmp_path}/runs", **PLANTED)
        assert done.returncode == 2 and key in done.stderr and "Traceback" not in done.stderr
        assert "planted" not in (done.stdout + done.stderr).lower()
    assert not (tmp_path / "runs").exists()


def test_a_secret_in_a_file_of_configurations_is_refused(tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    text = "# @package _global_\njudge: {base_url: 'http://u:planted-pass@127.0.0.1:9/v1'}\n"
    (tmp_path / "conf" / "experiment" / "x.yaml").write_text(text)
    done = command("--config-dir", tmp_path / "conf", "judge=openai", "experiment=x", f"paths.runs={tmp_path}/runs")
    assert done.returncode == 2 and "judge.base_url is an address with a user" in done.stderr
    assert "planted" not in done.stdout + done.stderr and not (tmp_path / "runs").exists()


def test_a_secret_behind_an_interpolation_is_refused(monkeypatch):
    """Hydra stores the interpolation, but W&B and results.json would get the value."""
    monkeypatch.setenv("TRACE_SECRET_TOKEN", PLANTED["TRACE_SECRET_TOKEN"])
    monkeypatch.setenv("SOME_URL", "http://u:planted-pass@127.0.0.1/v1")
    config = compose_config(["model=tiny", "judge=openai", "capability=instruction"])
    config.judge.model = "${oc.env:TRACE_SECRET_TOKEN}"
    config.judge.base_url = "${oc.env:SOME_URL}"
    with pytest.raises(ConfigError) as refusal:
        build.validate(config)
    said = str(refusal.value)
    assert "judge.model holds the value of the environment variable TRACE_SECRET_TOKEN" in said
    assert "capability.sets.helpful.judge.base_url is an address with" in said and "planted" not in said


@pytest.mark.parametrize("module", ["trace_hydra.rationales", "trace_hydra.capability"])
@pytest.mark.parametrize("secret", ["sk-plantedPLANTEDplanted0001", "http://u:planted-pass@127.0.0.1:9/v1"])
def test_other_command_lines_refuse_them_too(tmp_path, module, secret):
    (tmp_path / "data" / "FOMC").mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"prompt": f"{TRACE_TASKS['FOMC'].instruction}{split}", "answer": "A"}]
        (tmp_path / "data" / "FOMC" / f"{split}.json").write_text(json.dumps(rows))
    option = "base_url" if "://" in secret else "api_key_env"
    arguments = {
        "trace_hydra.rationales": [
            *("--data", tmp_path / "data", "--task", "FOMC", "--out", tmp_path / "out", "--model", "m"),
            *(f"--{option.replace('_', '-')}", secret),
        ],
        "trace_hydra.capability": [tmp_path, "judge=openai", f"judge.{option}={secret}"],
    }[module]
    done = command(*arguments, module=module)
    assert done.returncode == 2 and option.replace("_", "") in done.stderr.replace("_", "").replace("-", "")
    assert "planted" not in (done.stdout + done.stderr).lower() and "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"planted" in path.read_bytes().lower()]


def test_ordinary_configurations_hold_no_secret(monkeypatch):
    """Every default of conf passes while secrets are set; so do a revision, a path and short stand-ins."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SSH_KEY", "/home/me/.ssh/id_ed25519")
    monkeypatch.setenv("EMPTY_TOKEN", "EMPTY")
    for overrides in ([], ["judge=openai", "capability=all"], ["judge=local"], ["model=vicuna7b", "logger=wandb"]):
        plain = OmegaConf.to_container(compose_config(overrides), resolve=True)
        assert secret_problems(plain) == []
    assert (
        argument_problems(["model.revision=0123456789abcdef0123456789abcdef01234560", "data.root=/home/me/.ssh"]) == []
    )
    assert (
        argument_problems(["judge.api_key_env=null", "judge.base_url=http://127.0.0.1:8000/v1", "-m", "seed=1,2"]) == []
    )
    assert argument_problems(["judge.api_key_env=${oc.env:NAME}", "paths.data=s3://bucket/a@b"]) == []


def test_a_variable_with_small_letters_counts_if_it_is_set(monkeypatch):
    assert "there is none" in str(variable_fault("my_key"))
    monkeypatch.setenv("my_key", "x")
    assert variable_fault("my_key") is None and variable_fault("MY_KEY") is None and variable_fault(None) is None
    assert "looks like a key" in str(variable_fault("a key")) and "looks like a key" in str(variable_fault(7))
