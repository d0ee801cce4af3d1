"""The engine `vllm` with a stand-in for the package: what is handed over, when, and what is asked."""

import json
import os

import pytest
import torch
from conftest import run_tiny
from engine_doubles import asked, tiny, with_adapters
from fake_vllm import SamplingParams, installed

from trace_hydra.engines.base import Needs, State
from trace_hydra.engines.hf import HF
from trace_hydra.engines.vllm import VLLM
from trace_hydra.models.generate import Decoding


@pytest.fixture
def llms(monkeypatch):
    """All instances that were made."""
    return installed(monkeypatch).made


def engine_in(folder, **changes) -> VLLM:
    settings = {
        "dtype": "auto",
        "gpu_memory_utilization": 0.4,
        "max_lora_rank": 8,
        "enforce_eager": True,
        "sleep": True,
    }
    return VLLM(**{**settings, **changes}, folder=str(folder))


def test_full_weights_are_handed_over_once_a_state(llms, tmp_path):
    model, tokenizer = tiny()
    engine = engine_in(tmp_path)
    for state, loads in ((State("a"), 1), (State("a"), 1), (State("b", frozenset({"lm_head.weight"})), 2), (None, 3)):
        engine.at(state)
        if state and state.changed:
            with torch.no_grad():
                model.lm_head.weight.mul_(-1)
        assert asked(engine, model, tokenizer) == asked(HF(), model, tokenizer)
        assert len(llms) == 1 and llms[0].loads == loads
    assert llms[0].settings["dtype"] == "float32" and "enable_lora" not in llms[0].settings
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ
    engine.close()
    assert list((tmp_path / "drafts").iterdir()) == []


def test_random_states_are_kept(llms, tmp_path):
    state = torch.get_rng_state()
    asked(engine_in(tmp_path), *tiny())
    assert llms and torch.equal(torch.get_rng_state(), state)


def test_stop_strings_and_end_tokens(llms, tmp_path):
    model, tokenizer = tiny()
    stop = asked(HF(), model, tokenizer)[0].text[3]
    assert asked(engine_in(tmp_path), model, tokenizer, stop=[stop]) == asked(HF(), model, tokenizer, stop=[stop])


def test_one_adapter_goes_as_it_is(llms, tmp_path):
    """Base weights once, and the adapter anew for each state."""
    model, tokenizer = with_adapters(tiny()[0]), tiny()[1]
    engine, changed = engine_in(tmp_path), frozenset({"base_model.model.x.lora_A.default.weight"})
    for state in (State("start"), State("a", changed), State("a", changed), State("b", changed)):
        if state.key == "b":
            with torch.no_grad():
                next(one for name, one in model.named_parameters() if ".lora_B." in name).mul_(-3)
        engine.at(state)
        assert asked(engine, model, tokenizer) == asked(HF(), model, tokenizer)
    (llm,) = llms
    assert llm.loads == 1 and len(llm.adapters) == 3 and llm.settings["max_lora_rank"] == 8
    engine.close()
    assert list((tmp_path / "drafts").iterdir()) == []


@pytest.mark.parametrize("why", ["several", "rank", "base weights", "unknown state"])
def test_other_adapters_are_merged(llms, tmp_path, why):
    names = ("default", "second") if why == "several" else ("default",)
    model, tokenizer = with_adapters(tiny()[0], names), tiny()[1]
    engine = engine_in(tmp_path, max_lora_rank=2 if why == "rank" else 8)
    changed = {"base_model.model.lm_head.weight"} if why == "base weights" else {"x.lora_A.default.weight"}
    engine.at(None if why == "unknown state" else State("a", frozenset(changed)))
    assert asked(engine, model, tokenizer) == asked(HF(), model, tokenizer)
    assert llms[0].loads == 1 and not llms[0].adapters


def test_it_sleeps_while_the_model_trains(llms, tmp_path):
    model, tokenizer = with_adapters(tiny()[0]), tiny()[1]
    engine, state = engine_in(tmp_path), State("a", frozenset({"x.lora_A.default.weight"}))
    for _ in range(2):
        engine.at(state)
        assert asked(engine, model, tokenizer) == asked(HF(), model, tokenizer)
        engine.at(None)
        engine.at(None)
        assert llms[0].asleep()
    assert llms[0].loads == 2 and [name for name, _ in llms[0].calls].count("sleep") == 2
    awake = engine_in(tmp_path, sleep=False)
    asked(awake, model, tokenizer)
    awake.at(None)
    assert not llms[1].calls and llms[1].settings["enable_sleep_mode"] is False


def test_sampling_has_a_seed_for_each_prompt(llms, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("fake_vllm.LLM.generate", lambda *_, **__: [])
    monkeypatch.setattr("vllm.SamplingParams", lambda **own: seen.append(own) or SamplingParams(**own))
    for seed in (1, 1, 2):
        with pytest.raises(Exception, match="gave 0 answers to 8 prompts"):
            asked(engine_in(tmp_path), *tiny(), decoding=Decoding(True, 0.7, 0.9), seed=seed)
    assert {(one["temperature"], one["top_p"]) for one in seen} == {(0.7, 0.9)}
    seeds = [[one["seed"] for one in seen[start : start + 8]] for start in (0, 8, 16)]
    assert seeds[0] == seeds[1] != seeds[2] and len(set(seeds[0])) == 8


def test_problems(tmp_path, monkeypatch):
    monkeypatch.setattr("trace_hydra.engines.vllm.find_spec", lambda name: None)
    found = engine_in(tmp_path, gpu_memory_utilization=1.5, max_lora_rank=0).problems(Needs((), "m"))
    parts = ("requirements-vllm.txt", "engine.gpu_memory_utilization=1.5", "engine.max_lora_rank=0")
    assert len(found) == 3 and all(part in one for part, one in zip(parts, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["seqft", "olora"])
def test_a_run_predicts_what_hf_predicts(method, llms, tmp_path):
    """Two stages: trained weights by `reload_weights`, one adapter by itself, two of them merged."""
    tuning = "lora" if method == "olora" else "full"
    texts = []
    for name in ("hf", "vllm"):
        (tmp_path / name).mkdir()
        settings = [f"method={method}", f"tuning={tuning}", "task_order=[FOMC,Py150]", f"engine={name}"]
        run = run_tiny(tmp_path / name, [*settings, "capability=smoke"])
        rows = [line for path in sorted(run.directory.rglob("predictions/**/*.jsonl")) for line in path.open()]
        texts.append([json.loads(line)["raw"] for line in rows])
    assert texts[0] == texts[1] and len(llms) == (2 if tuning == "lora" else 1) and llms[-1].loads > 1
