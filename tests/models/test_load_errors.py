"""Loading models: checkpoints that are incomplete, unsuitable or damaged."""

import os

import checkpoint_doubles
import pytest
from checkpoint_doubles import build, edit_json, save_checkpoint
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from trace_hydra.errors import ConfigError

checkpoints, llama = checkpoint_doubles.checkpoints, checkpoint_doubles.llama


def break_nothing(folder):
    pass


def remove(name):
    return lambda folder: (folder / name).unlink()


def shard_missing(folder):
    edit_json(folder / "model.safetensors.index.json", weight_map={"a": "model.safetensors", "b": "m2.safetensors"})


def adapter_only(folder):
    (folder / "config.json").unlink()
    edit_json(folder / "adapter_config.json", r=8)


def remote_code(folder):
    edit_json(folder / "config.json", model_type="foreign", auto_map={"AutoModelForCausalLM": "modeling_x.X"})


def quantized(folder):
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"})


@pytest.mark.parametrize(
    ("damage", "changes", "message"),
    [
        (break_nothing, {"dtype": "float16"}, "model.dtype='float16' is none of float32, bfloat16"),
        (break_nothing, {"attn_implementation": "flash"}, "model.attn_implementation='flash' is none of"),
        (break_nothing, {"path": None}, "model.path is empty"),
        (break_nothing, {"path": "./absent"}, "model.path=absent does not exist"),
        (break_nothing, {"path": "not an id"}, "'not an id' is neither an existing folder nor a Hub id"),
        (remove("config.json"), {}, "has no config.json"),
        (remove("model.safetensors"), {}, "has no weights"),
        (remove("tokenizer.json"), {}, "has no tokenizer"),
        (shard_missing, {}, "names m2.safetensors, which is missing"),
        (adapter_only, {}, "It holds a PEFT adapter"),
        (remote_code, {}, "set model.trust_remote_code=true"),
        (quantized, {}, "is quantized .gptq."),
    ],
)
def test_problems_known_before_loading(llama, damage, changes, message):
    damage(llama)
    source = build("llama2_7b_chat", **{"path": str(llama)} | changes)
    assert len(source.problems()) == 1
    with pytest.raises(ConfigError, match=message):
        source.load()


def test_remote_code_allowed_or_not_needed_is_no_problem(llama):
    edit_json(llama / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert build("llama2_7b_chat", path=str(llama)).problems() == []  # transformers knows Llama itself
    edit_json(llama / "config.json", model_type="foreign")
    assert build("llama2_7b_chat", path=str(llama), trust_remote_code=True).problems() == []


def without_one_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncated(folder):
    os.truncate(folder / "model.safetensors", 1000)


def small_vocabulary(folder):
    save_checkpoint(folder, LlamaConfig, vocab_size=200)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_one_weight, "lacks 1 of the weights of LlamaForCausalLM, model.layers.1.mlp.up_proj.weight"),
        (truncated, "could not load .*llama: .*Set model.path"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "could not load .*llama"),
        (lambda folder: (folder / "config.json").write_text("{"), "is no JSON"),
        (small_vocabulary, "beyond the model's vocabulary of 200"),
    ],
    ids=["missing weight", "truncated weights", "torn tokenizer", "torn config", "small vocabulary"],
)
def test_damaged_checkpoints_are_clean_errors(llama, damage, message):
    damage(llama)
    with pytest.raises(ConfigError, match=message):
        build("llama2_7b_chat", path=str(llama)).load()
