"""Generation: the same answers in any batch, stop rules, and nothing moved."""

import pytest
import torch
from doubles import Letters
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from trace_hydra.models.generate import Decoding, generate, length_batches

GREEDY = Decoding(False, 1.0, 1.0)


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=30,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            eos_token_id=2,
            pad_token_id=2,
            bos_token_id=1,
        )
        made = LlamaForCausalLM(config).eval()
    made.generation_config = GenerationConfig(eos_token_id=[2])
    return made


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [3, 4], [20, 21, 22, 23]]


def texts(model, **changes):
    settings = {"max_new_tokens": 8, "decoding": GREEDY, "batch_tokens": 1000, **changes}
    return [one.text for one in generate(model, Letters(), PROMPTS, **settings)]


def test_order_is_kept_and_batching_changes_nothing(model):
    """One prompt a batch, two, or all: left padding and positions do not leak into greedy answers."""
    alone = texts(model, batch_tokens=1)
    assert alone == texts(model) == texts(model, batch_tokens=30)
    assert len(set(alone)) > 1


def test_greedy_equals_a_loop_by_hand(model):
    ids = torch.tensor([PROMPTS[2]])
    for _ in range(8):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    new = ids[0, 6:].tolist()
    new = new[: new.index(2)] if 2 in new else new
    assert texts(model)[2] == Letters().decode(new)


def test_stop_strings_end_an_answer(model):
    """Stop at the second character the model says: generation ends there and is marked as stopped."""
    full = texts(model)[0]
    stop = full[1]
    (made, *_) = generate(
        model, Letters(), PROMPTS[:1], max_new_tokens=8, decoding=GREEDY, batch_tokens=99, stop=[stop]
    )
    assert made.text == full[: full.index(stop) + 1] and made.stopped and made.num_new == len(made.text)


def test_the_limit_is_not_called_a_stop(model):
    made = generate(model, Letters(), PROMPTS, max_new_tokens=1, decoding=GREEDY, batch_tokens=99)
    assert all(one.num_new == 1 for one in made)
    assert [one.stopped for one in made] == [one.text == "" for one in made]


def test_sampling_is_seeded_and_moves_no_global_state(model):
    state = torch.get_rng_state()
    sampled = Decoding(True, 1.5, 1.0)
    first, again, other = (texts(model, decoding=sampled, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_model_settings_for_sampling_are_ignored(model):
    model.generation_config = GenerationConfig(
        eos_token_id=[2], do_sample=True, temperature=5.0, repetition_penalty=9.0
    )
    ours = texts(model)
    model.generation_config = GenerationConfig(eos_token_id=[2])
    assert ours == texts(model)


def test_mode_is_as_before(model):
    model.train()
    texts(model)
    assert model.training
    model.eval()


def test_batches_are_sorted_and_bounded():
    """Longest first; (longest + 4) * rows <= 20."""
    batches = length_batches([1, 6, 3, 2, 9], 4, 20)
    assert batches == [[4], [1, 2], [3, 0]]
    assert length_batches([50], 4, 20) == [[0]]
