"""Loading models: every architecture of conf/model from a tiny random checkpoint of its kind."""

import json
import subprocess
import sys

import checkpoint_doubles
import pytest
import torch
from checkpoint_doubles import CONF, PRETRAINED, build, byte_tokenizer, config_class, edit_json
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.models.auto import AutoModelForCausalLM

from trace_hydra.errors import ConfigError
from trace_hydra.models.checkpoint import has_chat_template

checkpoints, llama = checkpoint_doubles.checkpoints, checkpoint_doubles.llama
TEXTS = ("判断以下文本。\nA.支持", "Größe: „Straße“ – ß", "def f(x):\n\treturn  x[0] # 12.5\n\n\n", " 🤗 don 't", "")


@pytest.mark.parametrize("option", PRETRAINED)
def test_every_architecture_loads_and_generates(option, checkpoints):
    source = build(option, path=str(checkpoints[config_class(option)]))
    assert source.problems() == []
    tokenizer, model = source.load_tokenizer(), source.load()
    ids = tokenizer("x = 12", return_tensors="pt", add_special_tokens=False).input_ids
    # The same weights through plain transformers, so that nothing is silently random or converted.
    plain = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    out = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (1, ids.shape[1] + 3)
    assert model.dtype == torch.float32 and not model.training


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_each_option_is_named_after_its_file(file):
    assert build(file.stem, **({"cache_dir": None} if file.stem == "smollm2" else {})).name == file.stem


def test_modules_import_no_torch():
    """A configuration is checked without the seconds that torch and transformers take to import."""
    names = ("load", "smollm2", "tiny", "baichuan", "checkpoint")
    code = f"import sys; {'; '.join(f'import trace_hydra.models.{name}' for name in names)}; "
    code += "sys.exit(int('torch' in sys.modules or 'transformers' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=CONF.parents[1]).returncode == 0


def test_sampling_settings_are_dropped_and_all_end_tokens_kept(llama):
    """Chat checkpoints ship do_sample, temperature and top_p; only the ids survive, with the tokenizer's end token."""
    edit_json(llama / "generation_config.json", do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[4, 5])
    generation = build("llama2_7b_chat", path=str(llama)).load().generation_config
    changed = {key for key, value in generation.to_diff_dict().items() if value is not None}
    assert changed <= {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
    assert generation.eos_token_id == [4, 5, 2]  # </s> is 2
    assert generation.pad_token_id == 0  # pad_token: unk


def test_loading_leaves_the_random_state_alone(llama):
    before = torch.random.get_rng_state()
    build("llama2_7b_chat", path=str(llama)).load()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dtype_and_gradient_checkpointing(llama):
    """Gradients with recomputed activations are those without."""
    model = build("llama2_7b_chat", path=str(llama), dtype="bfloat16").load()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    gradients = []
    for recompute in (False, True):
        model = build("llama2_7b_chat", path=str(llama), gradient_checkpointing=recompute).load().train()
        assert model.is_gradient_checkpointing is recompute
        ids = torch.arange(5, 15)[None]
        model(ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*gradients)


def test_tokenizer_file_is_taken_as_it_is(llama):
    """SmolLM2 names GPT2Tokenizer, which transformers would rebuild without the split of numbers into digits.

    With the split, the blanks before "7" stay together: "  " is one token (id 261), then "7".
    """
    edit_json(llama / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    tokenizer = build("smollm2_360m", path=str(llama)).load_tokenizer()
    ids = tokenizer("  7", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["ĠĠ", "7"]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_cleaning_up_of_spaces_is_switched_off(llama):
    harmful = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    edit_json(llama / "tokenizer_config.json", **{"clean_up_tokenization_spaces": True, harmful: True})
    tokenizer = build("llama2_7b_chat", path=str(llama)).load_tokenizer()
    assert tokenizer.decode(tokenizer("a , b 's .", add_special_tokens=False).input_ids) == "a , b 's ."


def test_folder_with_sentencepiece_and_pickled_weights_only(llama):
    """The layout of Vicuna v1.5: tokenizer.model without tokenizer.json, pytorch_model.bin without safetensors."""
    import sentencepiece

    weights = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(weights, llama / "pytorch_model.bin")
    (llama / "tokenizer.json").unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the stance of a text is one of three: dovish, hawkish, neutral."] * 20),
        model_prefix=str(llama / "tokenizer"),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (llama / "tokenizer.vocab").unlink()
    (llama / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False}))
    source = build("vicuna7b", path=str(llama))
    tokenizer = source.load_tokenizer()
    original = sentencepiece.SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
    text = "the hawkish text: 三 ß"
    assert tokenizer(text, add_special_tokens=False).input_ids == original.encode(text)
    assert tokenizer.pad_token == "<unk>"
    with pytest.raises(ConfigError, match="beyond the model's vocabulary of 262"):
        source.load()
    assert torch.equal(source._read_model().lm_head.weight, weights["lm_head.weight"])


def test_special_token_without_embedding_is_tolerated(llama, caplog):
    """Gemma 3 1B: 262,144 rows, and a tokenizer shared with larger models whose image token has id 262,144."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(llama)
    build("gemma3_1b_it", path=str(llama)).load()
    assert "no embedding for <image>" in caplog.text


@pytest.mark.parametrize(
    ("settings", "pad_token", "expected"),
    [
        ({}, None, "<pad>"),
        ({}, "unk", "<unk>"),
        ({}, "eos", "</s>"),
        ({"pad_token": None}, "<|finetune_right_pad_id|>", "<|finetune_right_pad_id|>"),
        ({"pad_token": None}, None, "model.pad_token=null, but .* Set model.pad_token to eos, unk"),
        ({}, "<nowhere>", "model.pad_token='<nowhere>': the tokenizer of model=llama2_7b_chat has no such token"),
        ({"unk_token": None}, "unk", "model.pad_token='unk': .* no such token"),
        ({"eos_token": None}, "unk", "has no end token"),
    ],
)
def test_pad_and_end_token(llama, settings, pad_token, expected):
    saved = byte_tokenizer(**settings)
    saved.save_pretrained(llama)
    source = build("llama2_7b_chat", path=str(llama), pad_token=pad_token)
    if " " in expected:
        with pytest.raises(ConfigError, match=expected):
            source.load_tokenizer()
        return
    tokenizer = source.load_tokenizer()
    assert tokenizer.pad_token == expected
    assert len(tokenizer) == len(saved)


def test_chat_template_is_found_in_each_place(llama):
    assert not has_chat_template(llama)
    edit_json(llama / "tokenizer_config.json", chat_template="{{ messages }}")
    assert has_chat_template(llama)
    (llama / "tokenizer_config.json").unlink()
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    assert has_chat_template(llama)


def test_identity_follows_the_files_not_the_folder(llama, checkpoints):
    here, there = (build("llama2_7b_chat", path=str(path)) for path in (llama, checkpoints[LlamaConfig]))
    assert here.identity() == there.identity()
    weights = load_file(llama / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    assert here.identity() != there.identity()
