"""4-bit base weights: what is refused where, and what transformers is asked for."""

import importlib.machinery

import pytest
import torch
from conftest import compose_config

from trace_hydra import build
from trace_hydra.models import quantization


def problems(*overrides: str) -> str:
    return "\n".join(build.problems_of(compose_config(["model=llama2_7b_chat", "logger=none", *overrides])))


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))


def test_missing_package_and_wrong_kind_are_named(monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    assert "pip install 'trace-hydra[qlora]'" in problems("model.quantization=nf4", "tuning=lora")
    assert "model.quantization='int3' is none of null, nf4" in problems("model.quantization=int3", "tuning=lora")


def test_no_gpu_is_named(installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU" in problems("model.quantization=nf4", "tuning=lora")


def test_weights_of_four_bits_do_not_train(installed):
    assert "4-bit weights cannot train" in problems("model.quantization=nf4", "tuning=full")
    assert "use bf16-mixed" in problems("model.quantization=nf4", "tuning=lora", "trainer.precision=bf16-true")


def test_transformers_is_asked_for_nf4_with_quantized_constants(monkeypatch):
    from transformers import BitsAndBytesConfig

    assert quantization.quantization_arguments(None, "float32") == {}
    # transformers asks for bitsandbytes' version before it takes the settings
    monkeypatch.setattr(BitsAndBytesConfig, "post_init", lambda self: None)
    settings = quantization.quantization_arguments("nf4", "bfloat16")["quantization_config"]
    assert settings.load_in_4bit and settings.bnb_4bit_quant_type == "nf4" and settings.bnb_4bit_use_double_quant
    assert settings.bnb_4bit_compute_dtype == torch.bfloat16
