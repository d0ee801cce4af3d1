"""Options as continuations: by hand, as one at a time, and as greedy decoding where that says one of them."""

from math import log
from typing import Any
from unittest.mock import patch

import pytest
import torch
from doubles import Letters
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3Config

from trace_hydra.models import choose as module
from trace_hydra.models.choose import choose, likeliest
from trace_hydra.models.generate import Decoding, generate
from trace_hydra.models.slots import attends_to_all

SMALL: dict[str, Any] = dict(
    vocab_size=30, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=2, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EAGER: dict[str, Any] = {**SMALL, "attn_implementation": "eager"}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama, eager": LlamaConfig(**EAGER),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "gemma3, windows": Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=4),
}
HEAD = [5 + at % 7 for at in range(20)]
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [3, 4], [20, 21, 22, 23], [24] * 9]
LETTERS = [(10,), (11,), (12,)]
SHARED = [(10, 11, 12), (10, 11, 13), (10, 14), (15,), (16, 17, 18, 19)]
ENDED = [(10, 2), (10, 11, 2), (12, 2)]
OPTIONS = [SHARED, LETTERS, ENDED, [(7, 7), (7, 8)], LETTERS, [(9,), (3, 3, 3, 3)]]


def built(config, std: float = 0.3):
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)
    generator = torch.Generator().manual_seed(5)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=std, generator=generator)
    return model.eval()


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return built(CONFIGS[request.param])


def one_at_a_time(model, prompt, option) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *option]])).logits[0].float().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + at, token]) for at, token in enumerate(option))


def test_by_hand():
    """A model whose next token depends on the newest alone: each row of the table is what follows that token."""
    table = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.125, 0.125], [0.7, 0.1, 0.1, 0.1], [0.2, 0.2, 0.2, 0.4]])
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    ).eval()  # fmt: skip
    for weight in model.model.layers.parameters():
        weight.data.zero_()  # the layer adds nothing
    model.model.embed_tokens.weight.data = 1000 * torch.eye(4)
    model.lm_head.weight.data = table.log().T / 2  # the norm makes a one of 1000 at one of four places to 2
    found = choose(model, [[3, 0], [1]], [[(3,), (1, 2), (1, 0, 2)], [(0,), (2, 0), (1,)]], batch_tokens=100)
    wanted = [
        [log(0.4), log(0.2 * 0.125), log(0.2 * 0.5 * 0.3)],
        [log(0.5), log(0.125 * 0.7), log(0.25)],
    ]
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert [likeliest(one) for one in found] == [0, 0]


@pytest.mark.parametrize("head", [[], HEAD], ids=["alone", "shared head"])
@pytest.mark.parametrize("batch_tokens", [1, 60, 4000])
def test_all_options_of_a_prompt_together_are_as_one_at_a_time(model, head, batch_tokens):
    """Options of one and several tokens, some beginning alike, in models that take a mask of ours and others."""
    prompts = [head + prompt for prompt in PROMPTS]
    found = choose(model, prompts, OPTIONS, batch_tokens=batch_tokens)
    for prompt, options, values in zip(prompts, OPTIONS, found, strict=True):
        wanted = [one_at_a_time(model, prompt, option) for option in options]
        assert values == pytest.approx(wanted, abs=2e-4)
        assert likeliest(values) == likeliest(wanted)
    assert len({likeliest(values) for values in found}) > 1


def test_of_equal_options_the_first_is_taken():
    assert likeliest([-2.0, -1.0, -1.0]) == 1 and likeliest([-1.0]) == 0


def test_a_prompt_is_read_once_and_its_options_behind_it():
    """Six rows of 9 tokens at most; SHARED adds (10), (10, 11), (16), (16, 17) and (16, 17, 18)."""
    model, seen = built(CONFIGS["llama"]), []
    assert attends_to_all(model)
    original = model.forward

    def watch(*arguments, **keywords):
        seen.append((tuple(keywords["input_ids"].shape), keywords.get("attention_mask") is not None))
        return original(*arguments, **keywords)

    with patch.object(model, "forward", watch):
        choose(model, PROMPTS, OPTIONS, batch_tokens=4000)
        choose(model, PROMPTS, [LETTERS] * 6, batch_tokens=4000)
        choose(model, [HEAD + prompt for prompt in PROMPTS], [LETTERS] * 6, batch_tokens=4000)
    assert seen == [((6, 12), True), ((6, 9), False), ((1, 20), False), ((6, 9), True)]


def test_greedy_decoding_that_says_an_option_of_one_token_agrees(model):
    """The most likely of all tokens is the most likely option; weights so large that answers differ."""
    prompts = [[3 + (at * 7 + place * place) % 27 for place in range(2 + at % 5)] for at in range(60)]
    options = [(token,) for token in range(3, 30, 2)]
    texts = generate(model, Letters(), prompts, max_new_tokens=1, decoding=Decoding(False, 1.0, 1.0), batch_tokens=2000)
    said = [Letters().decode(option) for option in options]
    chosen = [likeliest(values) for values in choose(model, prompts, [options] * 60, batch_tokens=2000)]
    agreed = [(one.text, said[at]) for one, at in zip(texts, chosen, strict=True) if one.text in said]
    assert len(agreed) > 10 and len(set(agreed)) > 3
    assert all(text == choice for text, choice in agreed)


def test_heard_of_once_and_nothing_is_moved(model):
    """The model's mode is as before, each prompt is told once with its tokens, whatever rows its options take."""
    heard: list[tuple[int, int]] = []
    model.train()
    state = torch.get_rng_state()
    choose(model, PROMPTS, OPTIONS, batch_tokens=30, on_batch=lambda *numbers: heard.append(numbers))
    assert model.training and torch.equal(torch.get_rng_state(), state)
    model.eval()
    assert [sum(part) for part in zip(*heard, strict=True)] == [6, sum(map(len, PROMPTS))]


def test_processes_share_the_prompts(monkeypatch):
    """Two processes, one after the other: each is given every other prompt, and both get all values."""
    model, parts = built(CONFIGS["llama"]), []

    def shared_out(order, work):
        parts.extend([order[0::2], order[1::2]])
        return work(order[0::2]) | work(order[1::2])

    alone = choose(model, PROMPTS, OPTIONS, batch_tokens=4000)
    monkeypatch.setattr(module.ranks, "size", lambda: 2)
    monkeypatch.setattr(module.ranks, "rank", lambda: 0)
    monkeypatch.setattr(module.ranks, "shared_out", shared_out)
    found = module.choose_shared(model, PROMPTS, OPTIONS, batch_tokens=4000)
    assert sorted(map(len, parts)) == [3, 3]
    for one, other in zip(found, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
