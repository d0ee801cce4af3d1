"""Weights for others: merged without touching the model, written as a folder, and taken away again."""

import os
from pathlib import Path

import pytest
import torch
from engine_doubles import asked, ids_of, tiny, with_adapters
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trace_hydra.engines.base import State
from trace_hydra.engines.handover import Folders, active_adapters, plain_weights, write_model
from trace_hydra.engines.hf import HF
from trace_hydra.errors import EngineError, StoreError
from trace_hydra.store.entries import Store


def test_plain_weights_of_a_model_without_adapters():
    model, _ = tiny()
    assert {name: id(weight) for name, weight in plain_weights(model)}.keys() == model.state_dict().keys()


def test_adapters_are_merged_by_the_formula_and_the_model_stays():
    """W + alpha / r * B A of both active adapters, by hand; alpha 8, r 4."""
    start, _ = tiny()
    model = with_adapters(tiny()[0], ("default", "second"))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = dict(plain_weights(model))
    assert found.keys() == start.state_dict().keys() and active_adapters(model) == ["default", "second"]
    layer = "model.layers.1.self_attn.v_proj"
    wanted = start.state_dict()[f"{layer}.weight"].clone()
    for name in ("default", "second"):
        part = f"base_model.model.{layer}.lora_"
        wanted += 2.0 * before[f"{part}B.{name}.weight"] @ before[f"{part}A.{name}.weight"]
    torch.testing.assert_close(found[f"{layer}.weight"], wanted)
    assert torch.equal(found["lm_head.weight"], start.state_dict()["lm_head.weight"])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_adapters_that_are_off_are_left_out():
    start, _ = tiny()
    model = with_adapters(tiny()[0])
    with model.disable_adapter():
        assert active_adapters(model) == []
        found = dict(plain_weights(model))
    assert all(torch.equal(found[name], weight) for name, weight in start.state_dict().items())


def test_other_adapters_are_refused():
    model = get_peft_model(tiny()[0], LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"q_proj .*no plain LoRA"):
        dict(plain_weights(model))


@pytest.mark.parametrize("adapters", [False, True])
def test_a_written_model_answers_alike(tmp_path, adapters):
    model, tokenizer = tiny()
    model = with_adapters(model) if adapters else model
    config = model.config.to_dict()
    write_model(model, tokenizer, tmp_path)
    assert model.config.to_dict() == config
    again, own = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ids_of(own) == ids_of(tokenizer)
    assert [one.text for one in asked(HF(), again, own)] == [one.text for one in asked(HF(), model, tokenizer)]


def test_a_folder_is_written_once_for_a_state(tmp_path):
    model, tokenizer = tiny()
    folders, made = Folders(str(tmp_path), keep=False), []

    def place(state: State | None) -> Path:
        made.append(folders.model(state, model, tokenizer))
        assert (made[-1] / "model.safetensors").is_file() and len(list((tmp_path / "drafts").iterdir())) == 1
        return made[-1]

    first = place(State("a"))
    assert place(State("a")) == first
    assert len({place(State("b")), place(None), place(None), first}) == 4
    folders.close()
    assert list((tmp_path / "drafts").iterdir()) == [] and not (tmp_path / "served").exists()


def test_weights_that_change_in_a_state_are_written_again(tmp_path):
    model, tokenizer = tiny()
    folders = Folders(str(tmp_path), keep=False)
    first = folders.model(State("a"), model, tokenizer)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    second = folders.model(State("a"), model, tokenizer)
    assert second != first
    again = AutoModelForCausalLM.from_pretrained(second)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_kept_folders_are_found_again(tmp_path):
    model, tokenizer = tiny()
    places = []
    for _ in range(2):
        folders = Folders(str(tmp_path), keep=True)
        places.append(folders.model(State("a"), model, tokenizer))
        folders.close()
    assert places[0] == places[1] and places[0].parent.name == "served" and places[0].is_dir()
    assert list((tmp_path / "drafts").iterdir()) == []


def test_what_a_killed_process_leaves_is_swept(tmp_path):
    """The store removes drafts of dead processes; this one's stays."""
    model, tokenizer = tiny()
    path = Folders(str(tmp_path), keep=False).model(State("a"), model, tokenizer)
    Store(tmp_path)
    assert path.is_dir()
    left = path.rename(str(path).replace(f".{os.getpid()}.", ".999999999."))
    Store(tmp_path)
    assert not left.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    model, tokenizer = tiny()
    (tmp_path / "drafts").write_text("a file in its place")
    with pytest.raises(StoreError, match=r"engine.folder=.*cannot be written"):
        Folders(str(tmp_path), keep=False).model(State("a"), model, tokenizer)
