"""Each hostile configuration is refused with its key path, and nothing of it runs."""

import copy
import importlib
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
from conftest import ROOT, compose_config
from hostile import write_pickle
from omegaconf import OmegaConf
from payloads import PAYLOADS, SEQFT, Payload

from trace_hydra import build
from trace_hydra.capability.__main__ import _check_targets
from trace_hydra.errors import ConfigError
from trace_hydra.targets import kind_at, target_problems, trust_problems


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture
def pickled(tmp_path, canary):
    return write_pickle(tmp_path, canary)


@cache
def composed(options: tuple[str, ...]):
    return compose_config(["model=tiny", *options])


def filled(node: Any, canary, pickled) -> Any:
    if isinstance(node, dict):
        return {key: filled(value, canary, pickled) for key, value in node.items()}
    if isinstance(node, list):
        return [filled(value, canary, pickled) for value in node]
    return node.replace("CANARY", str(canary)).replace("PICKLE", str(pickled)) if isinstance(node, str) else node


def hostile(payload: Payload, canary, pickled):
    config = copy.deepcopy(composed(payload.options))
    OmegaConf.set_struct(config, False)
    if "hidden" in str(payload.node):
        OmegaConf.update(config, "task_order.hidden", 1, force_add=True)
        node = str(payload.node).replace("hidden", "callbacks.hidden")
        OmegaConf.update(config, "callbacks", {"hidden": {"a": {"_target_": "os.system"}}}, force_add=True)
    else:
        node = filled(payload.node, canary, pickled)
    parent, _, key = payload.place.rpartition(".")
    (OmegaConf.select(config, parent) if parent else config)[key] = node
    return config


def naive(node: Any) -> Any:
    """What a program without an allowlist does with a configuration."""
    if isinstance(node, list):
        return [naive(one) for one in node]
    if not isinstance(node, dict):
        return node
    if node.get("_target_") == "trace_hydra.targets.instantiate":  # takes the node itself
        from trace_hydra.targets import instantiate

        return instantiate(node["node"])
    built = {key: naive(value) for key, value in node.items()}
    if "_target_" not in built:
        return built
    parts = built.pop("_target_").split(".")
    length = next(n for n in range(len(parts) - 1, 0, -1) if _is_module(".".join(parts[:n])))
    called: Any = importlib.import_module(".".join(parts[:length]))
    for part in parts[length:]:
        called = getattr(called, part)
    return called(*built.pop("_args_", []), **built)


def _is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def test_the_corpus_is_large_and_without_repeats():
    texts = {repr((one.place, one.node, one.options)) for one in PAYLOADS.values()}
    assert len(texts) == len(PAYLOADS) >= 60


@pytest.mark.parametrize("name", [name for name, one in PAYLOADS.items() if one.live])
def test_without_an_allowlist_it_would_run(name, canary, pickled):
    """Otherwise the absence of the canary would prove nothing."""
    with suppress(Exception):  # some do their harm and then fail
        naive(filled(PAYLOADS[name].node, canary, pickled))
    assert canary.exists() or canary.is_symlink()


@pytest.mark.parametrize("name", PAYLOADS)
def test_it_is_refused_with_its_key_and_does_not_run(name, canary, pickled, monkeypatch):
    monkeypatch.setenv("HOSTILE_TARGET", "os.system")
    payload = PAYLOADS[name]
    with pytest.raises(ConfigError) as refusal:
        build.validate(hostile(payload, canary, pickled))
    says = payload.says or payload.place
    lines = [line.strip(" -") for line in str(refusal.value).splitlines()]
    assert any(line.startswith((f"{says}._", f"{says}.'_")) for line in lines), lines
    assert not canary.exists() and not canary.is_symlink()


def test_a_refused_name_is_not_imported(tmp_path, monkeypatch, canary):
    """Importing runs a module, so the name is judged before."""
    (tmp_path / "hostile_module.py").write_text(f"open({str(canary)!r}, 'w')\nclass X: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for target in ("hostile_module.X", "trace_hydra.methods.seqft.hostile_module.X", "torch.optim.hostile_module.X"):
        for place in ("method", "optim.optimizer", "callbacks.x", "trainer.logger"):
            assert target_problems(place, {"_target_": target})
    assert not canary.exists()
    assert target_problems("method", {"_target_": "hostile_module.X"}, ["hostile_module."]) == []
    assert canary.exists()  # by leave of the user


@pytest.mark.parametrize(
    "entry", ["", ".", "o", "os", "os..", ".os.", " os.", "os. ", "о.", "a b.", "x.*", 7, None, "os.\n"]
)
def test_trust_that_names_too_much_is_refused(entry):
    assert trust_problems([entry]) and "trust.targets" in trust_problems([entry])[0]


def test_trust_ends_at_a_dot_or_names_one_thing(tmp_path, monkeypatch):
    for package in ("dotted_methods", "dotted_methods_evil"):
        (tmp_path / f"{package}.py").write_text(
            f"import os, subprocess\nfrom {SEQFT.rpartition('.')[0]} import SeqFT as Parent\n"
            "class X(Parent): pass\nclass Y(Parent): pass\n"
        )
    monkeypatch.syspath_prepend(tmp_path)

    def refused(target, *trusted):
        assert trust_problems(trusted) == []
        return bool(target_problems("method", {"_target_": target}, trusted))

    assert not refused("dotted_methods.X", "dotted_methods.")
    assert not refused("dotted_methods.Parent", "dotted_methods.")  # ours, and of the right kind
    assert refused("dotted_methods_evil.X", "dotted_methods.")
    assert not refused("dotted_methods.X", "dotted_methods.X") and refused("dotted_methods.Y", "dotted_methods.X")
    for target in ("os.system", "subprocess.Popen", "X.__init__.__globals__"):
        assert refused(f"dotted_methods.{target}", "dotted_methods.")


def test_every_option_of_conf_is_allowed_where_it_stands():
    """As test_conf.py shows with each composed; here: no place is left out of the table."""
    assert kind_at("method") and kind_at("callbacks.x") and kind_at("capability.sets.a.judge.model")
    for key in (
        "callbacks",
        "callbacks.a.b",
        "trainer.logger",
        "capability.sets.a.b",
        "optim",
        "judge.cache",
        "x.method",
    ):
        assert kind_at(key) is None
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    assert {"method", "model", "tuning", "data", "trainer", "callbacks", "logger", "judge"} <= groups


@pytest.mark.parametrize(
    "name", ["system", "lightning's own instantiation", "pickle", "our instantiation", "Cyrillic o"]
)
@pytest.mark.parametrize("place", ["x", "x.judge", "x.kinds[0]"])
def test_stored_sets_go_through_the_same_check(name, place, canary, pickled):
    node = filled(PAYLOADS[name].node, canary, pickled)
    mini = {"_target_": "trace_hydra.capability.mini.Mini", "kinds": ["math"], "limit": None}
    stored = {"x": node, "x.judge": {**mini, "judge": node}, "x.kinds[0]": {**mini, "kinds": [node]}}[place]
    with pytest.raises(ConfigError, match=r"capability\.sets\.x") as refusal:
        _check_targets({"x": stored}, [], [])
    assert f"capability.sets.{place}._target_" in str(refusal.value) and not canary.exists()
