"""Checkpoints that bring a pickle, code, or another base along."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, compose_config
from hostile import Hostile
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM

from trace_hydra.errors import ConfigError
from trace_hydra.targets import instantiate


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A whole checkpoint of a tiny Llama."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    tokenizer = model_of("tiny").load_tokenizer()
    ends = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    return shutil.copytree(llama, tmp_path / "model")


def model_of(option: str, **changes):
    config = compose_config([f"model={option}"]).model
    return instantiate({**OmegaConf.to_container(config, resolve=True), **changes})  # type: ignore[dict-item]


def vicuna(folder: Path, **changes):
    return model_of("vicuna7b", path=str(folder), pad_token=None, **changes)


def write_json(file: Path, **changes) -> None:
    before = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**before, **changes}))


def test_the_checkpoint_itself_loads(folder):
    assert vicuna(folder).problems() == [] and vicuna(folder).load().num_parameters() > 0


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("option", ["vicuna7b", "baichuan2_7b_chat"])
def test_a_pickle_among_the_weights_does_not_run(folder, canary, zipped, option):
    """The other weights are right, so nothing but reading the file safely stands in the way."""
    weights = LlamaForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    if option.startswith("baichuan"):
        write_json(folder / "config.json", model_type="baichuan")
    file = folder / "pytorch_model.bin"
    torch.save({**weights, "extra": Hostile(canary)}, file, _use_new_zipfile_serialization=zipped)
    model = model_of(option, path=str(folder), pad_token=None)
    with pytest.raises(ConfigError, match=rf"model={option}: could not load .*model"):
        model.load()
    assert not canary.exists()
    torch.load(file, weights_only=False)
    assert canary.exists()  # it would have run


@pytest.mark.parametrize("name", ["model.pt", "last.ckpt", "consolidated.00.pth", "weights.pkl", "training_args.bin"])
def test_other_pickles_are_no_weights(folder, canary, name):
    (folder / "model.safetensors").unlink()
    torch.save(Hostile(canary), folder / name)
    assert "has no weights" in vicuna(folder).problems()[0] and str(folder) in vicuna(folder).problems()[0]
    with pytest.raises(ConfigError, match="has no weights"):
        vicuna(folder).load()
    assert not canary.exists()


def test_pickles_beside_safe_weights_are_left_alone(folder, canary):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save(Hostile(canary), folder / name)
    vicuna(folder).load()
    assert not canary.exists()


def test_an_adapter_that_names_another_base_is_refused(folder, llama, tmp_path):
    """transformers would load the named base instead of the folder's weights."""
    other = shutil.copytree(llama, tmp_path / "other")
    write_json(folder / "adapter_config.json", base_model_name_or_path=str(other), peft_type="LORA", r=1)
    with pytest.raises(ConfigError, match=rf"model\.path={folder} holds a PEFT adapter"):
        vicuna(folder).load()
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json\. It holds a PEFT adapter, not a model"):
        vicuna(folder).load()


def with_code(folder: Path, canary: Path, model_type: str) -> None:
    code = (
        f"open({str(canary)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (folder / "own.py").write_text(code)
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    write_json(folder / "config.json", auto_map=names, model_type=model_type)


def test_code_of_a_checkpoint_is_refused_by_name(folder, canary):
    with_code(folder, canary, "own")
    for act in ("load", "load_tokenizer", "skeleton"):
        with pytest.raises(ConfigError) as refusal:
            getattr(vicuna(folder), act)()
        said = str(refusal.value)
        assert ("model=vicuna7b" in said or f"model.path={folder}" in said) and "model.trust_remote_code=true" in said
    assert not canary.exists()


def test_code_of_a_checkpoint_is_not_run_where_it_is_not_needed(folder, canary):
    with_code(folder, canary, "llama")
    write_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    assert vicuna(folder).load() is not None and not canary.exists()
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(ConfigError):
        vicuna(folder).load_tokenizer()
    assert not canary.exists()


def test_code_of_a_checkpoint_runs_with_the_flag(folder, canary, tmp_path):
    """In a process of its own, because transformers copies the code into its cache and imports it."""
    with_code(folder, canary, "own")
    write_json(folder / "config.json", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"})
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}, {str(ROOT / 'tests' / 'security')!r}]\n"
        "from pathlib import Path\nfrom test_models_hostile import vicuna\n"
        f"print(type(vicuna(Path({str(folder)!r}), trust_remote_code=True).load()).__name__)\n"
    )
    environment = {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["Own"] and canary.exists(), done.stderr


def test_a_chat_template_cannot_reach_python(folder, canary):
    template = "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}".replace("CANARY", str(canary))
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = vicuna(folder).load_tokenizer()
    with pytest.raises(Exception, match=r"unsafe|undefined"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert not canary.exists()
