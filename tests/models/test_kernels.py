"""model.kernels: what is refused where, and what Liger is asked for. Liger itself needs a GPU: a stand-in here."""

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import compose_config, run_tiny
from test_keys import keys_of

from trace_hydra import build, launch
from trace_hydra.errors import ConfigError
from trace_hydra.models import kernels

LIGER = "model.kernels=liger"


def problems(*overrides: str) -> str:
    return "\n".join(build.problems_of(compose_config(["model=tiny", "data=mini", "logger=none", *overrides])))


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))


@pytest.fixture
def liger(monkeypatch):
    """A package of that name that knows Llama, notes what it is asked for, and is allowed anywhere."""
    asked: list[dict[str, Any]] = []
    found: Any = ModuleType("liger_kernel.transformers.monkey_patch")
    found.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None, "qwen2": None}
    found._apply_liger_kernel_to_instance = lambda **given: asked.append(given)
    above: Any = ModuleType("liger_kernel.transformers")
    above.monkey_patch = found
    for name, module in (
        ("liger_kernel", ModuleType("liger_kernel")),
        (above.__name__, above),
        (found.__name__, found),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(launch, "kernel_problems", lambda *_: [])
    return asked


def test_missing_package_and_unknown_kernels_are_named(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert "pip install 'trace-hydra[liger]'" in problems(LIGER)
    assert "model.kernels='triton' is none of torch, liger" in problems("model.kernels=triton")
    assert "kernels" not in problems("model.kernels=torch")


def test_no_gpu_is_named(installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "model.kernels=liger needs a GPU, and there is none" in problems(LIGER, "trainer=auto")


def test_a_gpu_that_is_not_used_is_named(installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "needs a GPU, and trainer.accelerator=cpu uses none" in problems(LIGER, "trainer=cpu")


def test_an_architecture_that_liger_lacks_is_named(liger):
    from transformers import AutoModelForCausalLM, GPT2Config

    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match=r"model\.kernels=liger: Liger has none.*'gpt2'.*It knows llama, qwen2"):
        kernels.use_kernels(model, "liger")
    assert not liger


def test_a_run_asks_liger_for_layers_and_never_for_losses(liger, tmp_path):
    """Once, of the model as loaded, before an adapter is put around it."""
    from transformers import LlamaForCausalLM

    run_tiny(tmp_path, ["task_order=[FOMC]", "method=lora", LIGER])
    (asked,) = liger
    assert type(asked.pop("model")) is LlamaForCausalLM
    assert asked == {
        "rope": True, "rms_norm": True, "swiglu": True, "geglu": True,
        "cross_entropy": False, "fused_linear_cross_entropy": False,
    }  # fmt: skip


def test_torch_asks_nobody(liger, tmp_path):
    run_tiny(tmp_path, ["task_order=[FOMC]", "model.kernels=torch"])
    assert not liger


def test_kernels_are_in_the_keys(liger, tmp_path):
    base = ["debug=smoke", "task_order=[FOMC]", "logger=none", "callbacks=none", "capability=none"]
    plain, other = (
        keys_of(compose_config([*base, f"paths.runs={tmp_path}", f"model.kernels={kind}"]), tmp_path)
        for kind in ("torch", "liger")
    )
    assert not plain & other
