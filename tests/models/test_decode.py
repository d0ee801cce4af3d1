"""Rows that come and go: the answers of transformers' `generate`, whatever else is under way, and less work."""

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from doubles import Letters
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config

from trace_hydra.models import attention, decode, generate
from trace_hydra.models.decode import sampler, shared_head
from trace_hydra.models.generate import Decoding
from trace_hydra.models.precision import cast_once
from trace_hydra.models.slots import attends_to_all

SMALL: dict[str, Any] = dict(
    vocab_size=30, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=2, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
}
GREEDY, SAMPLED = Decoding(False, 1.0, 1.0), Decoding(True, 1.5, 0.9)
HEAD = [5 + at % 7 for at in range(20)]
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [3, 4], [20, 21, 22, 23], [24] * 9, [25, 26], [27, 3, 28]]


def built(config):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


@pytest.fixture(scope="module", params=[*CONFIGS, "llama, attention for CPUs"])
def model(request):
    name, *ours = request.param.split(", ")
    made = built(CONFIGS[name])
    if ours:
        attention.use_for_cpu(made)
    return made


def texts(model, prompts=PROMPTS, **changes):
    settings = {"max_new_tokens": 12, "decoding": GREEDY, "batch_tokens": 1000, **changes}
    return [one.text for one in generate.generate(model, Letters(), prompts, **settings)]


@pytest.mark.parametrize("head", [[], HEAD], ids=["alone", "shared head"])
def test_greedy_answers_are_those_of_transformers(model, head):
    """With one slot, three, or eight: 12 new tokens behind at most 9 (29) prompt tokens."""
    prompts = [head + one for one in PROMPTS]
    with patch.object(generate, "attends_to_all", lambda model: False):
        expected = texts(model, prompts)
    assert len(set(expected)) > 3
    for batch_tokens in (1, 3 * (len(head) + 9 + 12), 1000):
        assert texts(model, prompts, batch_tokens=batch_tokens) == expected


def test_sampled_answers_do_not_depend_on_what_else_is_answered(model):
    alone = [texts(model, decoding=SAMPLED, seed=1, batch_tokens=1)]
    assert alone[0] == texts(model, decoding=SAMPLED, seed=1) != texts(model, decoding=SAMPLED, seed=2)
    assert texts(model, PROMPTS[:3], decoding=SAMPLED, seed=1) == alone[0][:3]


def test_a_slot_that_is_free_takes_the_next_prompt():
    """Two slots and answers of 1, 1, 1 and 8 tokens: 8 steps behind the first reading, not 8 + 1 for two batches.

    The longest prompt answers longest; each of the others ends with its first token, and the next is read in its place.
    """
    model = built(CONFIGS["llama"])
    prompts, passes = [[7] * 9, [8] * 4, [9] * 3, [10] * 2], []

    def choose(logits, numbers):
        return torch.tensor([int(number) for number in numbers])  # 2 ends an answer

    original = model.forward

    def watch(*arguments, **keywords):
        passes.append(tuple(keywords["input_ids"].shape))
        return original(*arguments, **keywords)

    tokens = {0: [float(one) for one in range(10, 18)]}  # none twice: nothing is drafted
    plan = decode.Plan(8, frozenset([2]), choose, lambda index: tokens.get(index, [2.0] * 8), lambda new: False)
    with torch.inference_mode(), patch.object(model, "forward", watch):
        found = dict(decode.decode(model, prompts, plan, 2 * (9 + 8)))
    assert found == {0: [*range(10, 18)], 1: [2], 2: [2], 3: [2]}
    assert passes == [(2, 9), (1, 3), (1, 2), *[(1, 1)] * 7]  # a slot that is free for good is not read


def test_a_shared_head_is_read_once():
    model, seen = built(CONFIGS["llama"]), []
    original = model.forward

    def watch(*arguments, **keywords):
        seen.append(keywords["input_ids"].numel())
        return original(*arguments, **keywords)

    with patch.object(model, "forward", watch):
        texts(model, [HEAD + one for one in PROMPTS], max_new_tokens=1)
    assert seen == [20, 8 * 9]  # the head, and eight rows behind it padded to nine tokens


def test_short_prompts_are_read_apart_from_long_ones():
    """40 tokens and seven times one: 8 x 40 columns in one pass cost more than a pass."""
    model, seen = built(CONFIGS["llama"]), []
    original = model.forward

    def watch(*arguments, **keywords):
        seen.append(tuple(keywords["input_ids"].shape))
        return original(*arguments, **keywords)

    with patch.object(model, "forward", watch):
        texts(model, [[9] * 40] + [[8]] * 7, max_new_tokens=1)
    assert seen == [(1, 40), (7, 1)]


def test_a_head_that_is_kept_once_leaves_room_for_rows():
    """20 + 6 columns and 4 for answers: of 70 tokens, two rows with a head each; five where the head is kept apart."""
    seen = []

    def widest(model):
        original, passes = model.forward, []

        def watch(*arguments, **keywords):
            passes.append(len(keywords["input_ids"]))
            return original(*arguments, **keywords)

        with patch.object(model, "forward", watch):
            texts(model, [HEAD + one[:6] for one in PROMPTS], max_new_tokens=4, batch_tokens=70)
        seen.append(max(passes))

    model = built(CONFIGS["llama"])
    widest(model)
    attention.use_for_cpu(model)
    widest(model)
    assert seen == [2, 5]


def test_how_much_prompts_share():
    """At least 16 tokens, and one token of each prompt stays: its logits choose the first new token."""
    assert shared_head([[*HEAD, 1], [*HEAD, 2, 3]]) == 20
    assert shared_head([HEAD, HEAD]) == 19 and shared_head([HEAD, HEAD[:17]]) == 16
    assert shared_head([HEAD, HEAD[:16]]) == 0 and shared_head([HEAD]) == 0 and shared_head([]) == 0


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (0.47, 1), (0.471, 3), (0.823, 3), (0.824, 4), (0.999999, 4)])
def test_sampling_by_hand(number, token):
    """Chances 0.1, 0.4, 0.05, 0.3, 0.15 (tokens 0 to 4); top_p 0.75 keeps 1, 3 and, as 0.7 < 0.75, 4: of 0.85.

    Their ends are at 0.4 / 0.85 = 0.4706, 0.7 / 0.85 = 0.8235 and 1.
    """
    logits = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]]).log()
    assert sampler(1.0, 0.75)(logits, [number]).tolist() == [token]


def test_temperature_sharpens():
    """At 0.5 chances 0.2 and 0.8 become 0.04 and 0.64 of 0.68: the second takes what is below 16 / 17 = 0.941."""
    logits = torch.tensor([[0.2, 0.8]]).log()
    assert [sampler(0.5, 1.0)(logits, [number]).item() for number in (0.0, 0.94, 0.942)] == [1, 1, 0]


def test_models_with_windows_go_another_way():
    gemma = built(Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=4))
    assert not attends_to_all(gemma) and attends_to_all(built(CONFIGS["llama"]))
    ids = torch.tensor([[*PROMPTS[2]]])
    for _ in range(6):
        ids = torch.cat([ids, gemma(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    new = ids[0, 6:].tolist()
    new = new[: new.index(2)] if 2 in new else new
    assert texts(gemma, max_new_tokens=6)[2] == Letters().decode(new)


def test_weights_cast_once_give_the_same_bits_and_come_back(model):
    ids, weights = torch.tensor([PROMPTS[2]]), dict(model.named_parameters())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(ids).logits
        with cast_once(model):
            assert model.lm_head.weight.dtype == torch.bfloat16
            assert torch.equal(model(ids).logits, expected)
    after = dict(model.named_parameters())
    assert after.keys() == weights.keys() and all(after[name] is one for name, one in weights.items())
    with cast_once(model):
        assert model.lm_head.weight.dtype == torch.float32  # no autocast, no cast
