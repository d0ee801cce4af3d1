"""Engines in the configuration: each preset, what is refused before anything is loaded, and what is in keys."""

from typing import Any
from unittest.mock import patch

import pytest
from chat_server import serving
from conftest import ROOT, TINY, compose_config, run_tiny
from omegaconf import OmegaConf
from test_openai_engine import echo

from trace_hydra import build, inputs
from trace_hydra.engines.base import EVERYTHING, Engine, State
from trace_hydra.engines.continuous import Continuous
from trace_hydra.engines.hf import HF
from trace_hydra.errors import ConfigError

RUN = [*TINY, "task_order=[FOMC,Py150]", "data.rows.train=4", "data.rows.test=2"]
ENGINES = ("hf", "continuous", "openai", "vllm")


@pytest.fixture
def server(monkeypatch):
    """A server that is there, and a vLLM that seems to be."""
    from trace_hydra.engines import vllm

    monkeypatch.setattr(vllm, "find_spec", lambda name: object())
    with serving(echo) as running:
        yield running


def config_of(name: str, url: str, tmp_path, *more: str):
    address = [f"engine.base_url={url}"] if name == "openai" else []
    return compose_config([*RUN, f"engine={name}", *address, f"paths.runs={tmp_path}", *more])


@pytest.mark.parametrize("name", ENGINES)
def test_every_preset_builds_an_engine(name, server, tmp_path):
    engine = build.validate(config_of(name, server.url, tmp_path)).engine
    assert isinstance(engine, Engine) and engine.name == name == engine.identity()["name"]


REFUSED = {
    "pp": ["tuning=prompt"], "l2p": ["tuning=prompt"], "mbpa": [], "anyssr": ["tuning=lora"],
    "lfpt5": ["tuning=prompt"], "seqft": ["tuning=prompt"],
}  # fmt: skip
SERVED = {"seqft": [], "olora": ["tuning=lora"], "icl": ["tuning=frozen"], "ewc": ["tuning=lora"], "rcl": []}


@pytest.mark.parametrize("name", ["openai", "vllm"])
@pytest.mark.parametrize("method", REFUSED)
def test_what_needs_the_model_itself_is_refused(name, method, server, tmp_path):
    with pytest.raises(ConfigError, match=rf"engine={name} cannot serve method={method}, .*Use engine=hf"):
        build.validate(config_of(name, server.url, tmp_path, f"method={method}", *REFUSED[method]))


@pytest.mark.parametrize("method", [*REFUSED, *SERVED])
def test_engines_on_the_model_itself_serve_everything(method, server, tmp_path):
    for name in ("hf", "continuous"):
        own = {**REFUSED, **SERVED}[method]
        assert (
            build.validate(config_of(name, server.url, tmp_path, f"method={method}", *own)).engine.serves == EVERYTHING
        )


CLOSED = "protocol.closed_answers=log_likelihood"


@pytest.mark.parametrize("name", ENGINES)
def test_closed_answers_need_the_model_itself(name, server, tmp_path):
    """Refused for FOMC by engines that generate elsewhere; Py150 is generated anyway."""
    build.validate(config_of(name, server.url, tmp_path, CLOSED, "task_order=[Py150,NumGLUE-cm]"))
    config = config_of(name, server.url, tmp_path, CLOSED)
    if name in ("openai", "vllm"):
        said = rf"engine={name} cannot serve method=seqft, .*protocol.closed_answers=log_likelihood.*engine=hf"
        with pytest.raises(ConfigError, match=said):
            build.validate(config)
    else:
        build.validate(config)


@pytest.mark.parametrize("method", SERVED)
def test_what_can_be_handed_over_is_served(method, server, tmp_path):
    for name in ("openai", "vllm"):
        build.validate(config_of(name, server.url, tmp_path, f"method={method}", *SERVED[method]))


def test_a_fixed_model_is_for_methods_that_train_nothing(server, tmp_path):
    build.validate(config_of("openai", server.url, tmp_path, "engine.model=theirs", "method=icl", "tuning=frozen"))
    with pytest.raises(ConfigError, match=r"engine.model=theirs .*method=seqft trains"):
        build.validate(config_of("openai", server.url, tmp_path, "engine.model=theirs"))


def test_a_missing_package_is_named_with_its_requirements(tmp_path, monkeypatch):
    monkeypatch.setattr("trace_hydra.engines.vllm.find_spec", lambda name: None)
    assert "vllm>=" in (ROOT / "requirements-vllm.txt").read_text()
    with pytest.raises(ConfigError, match=r"pip install -r requirements-vllm.txt"):
        build.validate(config_of("vllm", "", tmp_path))


@pytest.mark.parametrize("name", ENGINES)
def test_every_leaf_is_in_the_identity_or_without_effect(name, server, tmp_path):
    """The engine's leaves, one changed at a time; `build.validate` is left out, some values nobody can have."""
    from trace_hydra.targets import instantiate

    config = config_of(name, server.url, tmp_path)
    node: dict[str, Any] = OmegaConf.to_container(config.engine, resolve=True)  # type: ignore[assignment]
    known = instantiate(node).identity()
    for key, value in node.items():
        if key in ("_target_", "name"):
            continue
        other = not value if isinstance(value, bool) else value / 2 if isinstance(value, float) else f"{value}x"
        other = value + 1 if type(value) is int else other
        changed = instantiate({**node, key: other}).identity() != known
        assert changed != inputs.without_effect(f"engine.{key}"), key


def test_engines_share_no_answers_but_stages(tmp_path, server):
    from trace_hydra.prepare import prepare

    runs = []
    for name in ENGINES:
        config = config_of(name, server.url, tmp_path)
        runs.append(prepare(config, build.validate(config), tmp_path).run)
    assert len({run.stages[-1].key for run in runs}) == 1
    assert len({key for run in runs for key in run.answers.values()}) == len(ENGINES) * len(runs[0].answers)


def test_a_method_that_makes_rows_has_the_engine_in_its_stages(tmp_path, server):
    from trace_hydra.prepare import prepare

    stages = []
    for name in ("hf", "continuous"):
        config = config_of(name, server.url, tmp_path, "method=lfpt5", "tuning=prompt")
        stages.append(prepare(config, build.validate(config), tmp_path).run.stages[0].key)
    assert stages[0] != stages[1]


class Watching(HF):
    """Notes what it is told and asked."""

    def __init__(self):
        self.told: list = []

    def at(self, state):
        super().at(state)
        self.told.append("?" if state is None else (state.key, bool(state.changed)))

    def generate(self, *arguments, **keywords):
        self.told.append("asked")
        return super().generate(*arguments, **keywords)

    def close(self):
        self.told.append("closed")


def test_an_engine_is_told_the_state_before_it_is_asked(tmp_path, monkeypatch):
    """Before training with nothing changed, while training with nothing known, behind a stage with its key; and closed
    at the end."""
    engine = Watching()
    validate = build.validate

    def watched(config, **keywords):
        from dataclasses import replace

        return replace(validate(config, **keywords), engine=engine)

    monkeypatch.setattr(build, "validate", watched)
    run = run_tiny(tmp_path, ["method=seqft", "task_order=[FOMC,Py150]", "capability=smoke"])
    keys = [stage["key"] for stage in run.results["stages"]]
    told = [one for at, one in enumerate(engine.told) if at == 0 or one != engine.told[at - 1]]
    states = [one for one in told if isinstance(one, tuple)]
    assert {key: changed for key, changed in states if key in keys} == dict.fromkeys(keys, True)
    start = {key for key, changed in states if key not in keys}
    assert len(start) == 2 and not any(changed for key, changed in states if key in start)
    assert told[-1] == "closed" and told.count("?") == 2
    before = [told[at - 1] for at, one in enumerate(told) if one == "asked"]
    assert "?" not in before and before[-1] == (keys[-1], True)
    assert isinstance(engine.state, State)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["seqft", *(pytest.param(name, marks=pytest.mark.long) for name in ("anyssr", "pp"))]
)
def test_continuous_batching_predicts_what_hf_predicts(method, tmp_path):
    """Whole runs of a plain method, one that routes prompts and one of soft prompts."""
    matrices = []
    for name in ("hf", "continuous"):
        (tmp_path / name).mkdir()
        own = {**REFUSED, **SERVED}[method]
        run = run_tiny(tmp_path / name, [f"method={method}", "task_order=[FOMC,Py150]", f"engine={name}", *own])
        texts = {path.name: path.read_text() for path in sorted((run.directory / "predictions" / "2").iterdir())}
        matrices.append((run.results["matrix"], texts))
    assert matrices[0] == matrices[1]


@pytest.mark.long
def test_a_method_makes_its_rows_with_the_engine(tmp_path):
    """Sampled rows differ from those of `hf`; stage 2 trains on some, and the generator is as before."""
    from conftest import SMALLER

    with patch.object(Continuous, "generate", autospec=True, side_effect=Continuous.generate) as generate:
        run = run_tiny(
            tmp_path,
            ["method=lfpt5", "tuning=prompt", "task_order=[FOMC,Py150]", "engine=continuous", *SMALLER["lfpt5"]],
        )
    sampled = [call.kwargs["decoding"].do_sample for call in generate.call_args_list]
    assert any(sampled) and not all(sampled) and run.made_prompts[2]
