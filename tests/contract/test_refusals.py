"""What a method cannot do is refused before any row, tokenizer or model is loaded, with the key and its value."""

import pytest
from conftest import ROOT, compose_config, method_node, run_tiny
from omegaconf import OmegaConf

from trace_hydra import build
from trace_hydra.errors import DataError
from trace_hydra.models.tiny import Tiny

METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))


def numbers(name: str) -> list[str]:
    node = OmegaConf.to_container(method_node(name))
    return [str(key) for key, value in node.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in METHODS for key in numbers(name)])
def test_no_number_of_a_method_may_be_negative(name, key):
    """Shares, counts, weights, temperatures, thresholds: none means anything below 0."""
    problems = build.problems_of(compose_config(["model=tiny", f"method={name}", f"method.{key}=-1"]))
    assert any(f"method.{key}=-1" in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=replay", "method.fraction=0"], "method.fraction=0"),
        (["method=der", "method.buffer_size=0"], "method.buffer_size=0"),
        (["method=gem", "method.memory_rows=0"], "method.memory_rows=0"),
        (["method=agem", "method.memory_rows=0"], "method.memory_rows=0"),
        (["method=seekr", "method.fraction=0"], "method.fraction=0"),
        (["method=mbpa", "method.write=0"], "method.write=0"),
        (["method=lwf", "method.temperature=0"], "method.temperature=0"),
        (["method=l2p", "method.top_k=11"], "method.top_k=11"),
        (["method=ogd", "tuning=full"], "tuning=full"),
        (["method=olora", "tuning=full"], "tuning=full"),
        (["method=hft", "tuning=lora"], "tuning=lora"),
        (["method=pp", "tuning=lora"], "tuning=lora"),
        (["method=icl", "tuning=full"], "tuning=full"),
        (["method=seqft", "tuning=frozen"], "tuning=frozen"),
        (["method=gpm", "tuning=prompt"], "tuning=prompt"),
        (["method=gem", "trainer.devices=2"], "trainer.devices=2"),
        (["method=ewc", "method.strength=much"], "method.strength"),
        (["method=ewc", "method.strength=null"], "method.strength"),
    ],
)
def test_known_mistakes_name_the_key(overrides, message):
    problems = build.problems_of(compose_config(["model=tiny", *overrides]))
    assert any(message in problem for problem in problems), problems


def test_missing_rationales_are_found_before_the_model_loads(tmp_path, monkeypatch):
    """Half of mini's tasks have none; the message names a task, how many rows and the key."""
    monkeypatch.setattr(Tiny, "load", lambda self: pytest.fail("the model was loaded"))
    with pytest.raises(DataError, match=r"20Minuten: 6 of 6 train rows .* method\.rationales=auto"):
        run_tiny(tmp_path, ["method=rcl", "method.rationales=required", "task_order=[FOMC,20Minuten]"])
