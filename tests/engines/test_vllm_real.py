"""The engine `vllm` with vLLM itself, where it is installed: in an environment of its own, on a CPU too."""

import json
from importlib.util import find_spec

import pytest
import torch
from conftest import run_tiny
from engine_doubles import asked, tiny, with_adapters
from test_vllm_engine import engine_in

from trace_hydra.engines.base import State
from trace_hydra.engines.hf import HF
from trace_hydra.models.generate import Decoding

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM, in an environment of its own"),
]
WIDTH = {"hidden_size": 64}
"""vLLM's kernels take no heads of 16."""


@pytest.fixture
def engine(tmp_path, monkeypatch):
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
        monkeypatch.setenv(name, value)
    made = engine_in(tmp_path, sleep=False, gpu_memory_utilization=0.1)
    yield made
    made.close()


def alike(found, wanted) -> int:
    return sum(one == other for one, other in zip(found, wanted, strict=True))


def test_weights_as_they_change(engine):
    """Float32, greedy, eight prompts: all but at most one near tie; new weights reach it, prefixes are forgotten."""
    model, tokenizer = tiny(**WIDTH)
    for key, factor in (("a", 1.0), ("b", -1.0), ("c", 0.5)):
        with torch.no_grad():
            model.lm_head.weight.mul_(factor)
        engine.at(State(key, frozenset({"lm_head.weight"})))
        wanted = asked(HF(), model, tokenizer)
        assert alike(asked(engine, model, tokenizer), wanted) >= 7
    stop = wanted[0].text[3]
    assert alike(asked(engine, model, tokenizer, stop=[stop]), asked(HF(), model, tokenizer, stop=[stop])) >= 7
    sampled = {"decoding": Decoding(True, 1.0, 0.9)}
    first, again, other = (asked(engine, model, tokenizer, **sampled, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_adapters_by_request_and_merged(engine):
    model, tokenizer = with_adapters(tiny(**WIDTH)[0]), tiny(**WIDTH)[1]
    wanted = asked(HF(), model, tokenizer)
    engine.at(State("a", frozenset({"x.lora_A.default.weight"})))
    assert alike(asked(engine, model, tokenizer), wanted) >= 7 and engine._lora is not None
    engine.at(None)
    assert alike(asked(engine, model, tokenizer), wanted) >= 7


@pytest.mark.parametrize("method", ["seqft", "olora"])
def test_a_run_predicts_what_hf_predicts(method, tmp_path, monkeypatch):
    """Two stages; of the answers at most a tenth may differ."""
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
        monkeypatch.setenv(name, value)
    tuning, texts = "lora" if method == "olora" else "full", []
    for name in ("hf", "vllm"):
        (tmp_path / name).mkdir()
        own = ["engine.sleep=false", "engine.gpu_memory_utilization=0.1"] if name == "vllm" else []
        settings = [f"method={method}", f"tuning={tuning}", "task_order=[FOMC,Py150]", "model.hidden_size=64"]
        run = run_tiny(tmp_path / name, [*settings, f"engine={name}", *own])
        rows = [line for path in sorted(run.directory.rglob("predictions/**/*.jsonl")) for line in path.open()]
        texts.append([json.loads(line)["raw"] for line in rows])
    assert alike(*texts) >= 0.9 * len(texts[0])
