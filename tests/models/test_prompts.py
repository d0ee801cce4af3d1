"""Soft prompts as ids behind the vocabulary: the same numbers as prompts given as embeddings."""

import pytest
import torch
from doubles import Letters
from transformers import LlamaConfig, LlamaForCausalLM

from trace_hydra.data.encode import IGNORED
from trace_hydra.errors import ConfigError, MethodError
from trace_hydra.models.forward import label_logits, last_hidden_states
from trace_hydra.models.generate import Decoding, generate
from trace_hydra.models.prompts import all_ids, install, virtual_tokens, with_prefix
from trace_hydra.models.tuning import Prompt

WIDTH, VOCABULARY = 32, 30


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, eos_token_id=2, pad_token_id=2, bos_token_id=1,
            tie_word_embeddings=request.param, initializer_range=0.6,  # large, so that other inputs give other answers
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


def prompted(model, count=5):
    tokens = install(model)
    tokens.add("a", torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(0)))
    return tokens


def test_ids_behind_the_vocabulary_are_the_same_as_embeddings(model):
    """Reference: the model's own forward on inputs_embeds, prompt vectors joined to token vectors."""
    ids = torch.tensor([[1, 7, 9, 4]])
    plain = model(input_ids=ids).logits
    embedded = model.get_input_embeddings()(ids)
    tokens = prompted(model)
    assert torch.equal(model(input_ids=ids).logits, plain)
    joined = torch.cat([tokens.tables["a"].unsqueeze(0), embedded], 1)
    wanted = model(inputs_embeds=joined).logits
    found = model(input_ids=torch.cat([torch.tensor([tokens.ids("a")]), ids], 1)).logits
    assert torch.equal(found, wanted) and found.shape[-1] == VOCABULARY
    assert not torch.allclose(found[:, -1], plain[:, -1], atol=1e-3)


def test_prompts_reach_generation_in_a_padded_batch(model):
    """Reference: greedy decoding step by step, without cache, padding or ids, on inputs_embeds of one row."""
    tokens = prompted(model)
    rows = [[1, 7], [1, 9, 4, 4, 5, 6, 7], [8]]

    def greedy(row, count=6):
        embedded = torch.cat([tokens.tables["a"].unsqueeze(0), tokens.embedding(torch.tensor([row]))], 1)
        new = []
        for _ in range(count):
            new.append(int(model(inputs_embeds=embedded).logits[0, -1].argmax()))
            embedded = torch.cat([embedded, tokens.embedding(torch.tensor([[new[-1]]]))], 1)
        return Letters().decode(new[: new.index(2)] if 2 in new else new)

    with torch.no_grad():
        wanted = [greedy(row) for row in rows]
    settings = {"max_new_tokens": 6, "decoding": Decoding(False, 1.0, 1.0), "batch_tokens": 1000}
    found = generate(model, Letters(), [[*tokens.ids("a"), *row] for row in rows], **settings)
    without = generate(model, Letters(), rows, **settings)
    assert [one.text for one in found] == wanted
    assert [one.text for one in without] != wanted


def test_a_prefix_carries_no_label_and_leaves_the_rest(model):
    tokens = prompted(model)
    batch = {
        "input_ids": torch.tensor([[1, 7, 9, 4], [1, 5, 2, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "labels": torch.tensor([[IGNORED, IGNORED, 9, 4], [IGNORED, 5, 2, IGNORED]]),
    }
    longer = with_prefix(batch, torch.tensor(tokens.ids("a")))
    assert longer["input_ids"].shape == (2, 9) and bool((longer["attention_mask"][:, :5] == 1).all())
    _, labels = label_logits(model, longer)
    assert labels.tolist() == [9, 4, 5, 2]
    other = with_prefix(batch, torch.tensor([[30, 31], [33, 30]]))
    assert other["input_ids"][:, :2].tolist() == [[30, 31], [33, 30]]


def test_gradients_reach_the_tables_alone(model):
    model.requires_grad_(False)
    tokens = prompted(model)
    ids = torch.tensor([[*tokens.ids("a")[:3], 1, 7]])
    model(input_ids=ids).logits.sum().backward()
    gradient = tokens.tables["a"].grad
    assert bool((gradient[:3] != 0).any(1).all()) and bool((gradient[3:] == 0).all())
    assert all(weight.grad is None for name, weight in model.named_parameters() if ".tables." not in name)


def test_tables_keep_their_ids_when_others_come(model):
    tokens = prompted(model, 3)
    first = tokens.ids("a")
    assert tokens.add("b", torch.zeros(2, WIDTH)) == [33, 34] and tokens.ids("a") == first == [30, 31, 32]
    assert all_ids(tokens, ["b", "a"]) == [33, 34, 30, 31, 32]
    with pytest.raises(MethodError, match="no soft prompt named 'c'; there are: a, b"):
        tokens.ids("c")


def test_the_tuning_draws_vectors_of_the_vocabulary(model):
    own = model.get_input_embeddings().weight.detach().clone()
    tuning = Prompt(length=4, init="vocabulary")
    made = tuning.apply(model)
    table = virtual_tokens(made).tables["default"]
    assert all(bool((own == row).all(1).any()) for row in table)
    assert tuning.prefix(made) == [30, 31, 32, 33]
    trainable = [name for name, weight in made.named_parameters() if weight.requires_grad]
    assert trainable == ["model.embed_tokens.tables.default"]


def test_wrong_values_and_missing_prompts_are_refused(model):
    with pytest.raises(ConfigError, match=r"tuning\.length=0"):
        Prompt(length=0, init="vocabulary")
    with pytest.raises(ConfigError, match=r"tuning\.init='zeros'"):
        Prompt(length=1, init="zeros")
    with pytest.raises(MethodError, match="tuning=prompt"):
        virtual_tokens(model)


def test_last_hidden_states_are_what_the_output_layer_sees(model):
    """Reference: transformers' own output_hidden_states, whose last entry is after the final norm."""
    ids = torch.tensor([[1, 7, 9, 4]])
    wanted = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(last_hidden_states(model, ids, torch.ones_like(ids)), wanted)
