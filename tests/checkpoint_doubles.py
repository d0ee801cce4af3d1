"""Tiny random checkpoints of every architecture of conf/model, and the options that load them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.auto import AutoModelForCausalLM

CONF = ROOT / "conf" / "model"
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<|finetune_right_pad_id|>")
KINDS = {
    "llama": LlamaConfig,
    "vicuna": LlamaConfig,
    "smollm2": LlamaConfig,
    "smollm3": SmolLM3Config,
    "mistral": MistralConfig,
    "qwen25": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
}
PRETRAINED = sorted(file.stem for file in CONF.glob("*.yaml") if "models.load.Pretrained" in file.read_text())


def config_class(option: str) -> type:
    return next(kind for prefix, kind in KINDS.items() if option.startswith(prefix))


def build(option: str, **changes):
    """Build what `model=<option>` with overrides builds."""
    config = OmegaConf.load(CONF / f"{option}.yaml")
    return instantiate(OmegaConf.merge(config, changes), _convert_="all")


def byte_tokenizer(**settings) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*SPECIALS, *letters, "ĠĠ"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | settings
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def save_checkpoint(folder: Path, kind: type, **settings) -> Path:
    sizes = {
        "vocab_size": len(SPECIALS) + 257,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(kind(**sizes | settings)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[type, Path]:
    return {kind: save_checkpoint(tmp_path_factory.mktemp(kind.__name__), kind) for kind in set(KINDS.values())}


@pytest.fixture
def llama(checkpoints, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(checkpoints[LlamaConfig], tmp_path / "llama"))


def edit_json(file: Path, **changes):
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | changes))
