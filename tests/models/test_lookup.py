"""Drafts: several tokens in a pass where a text repeats itself, and the answers of one token a pass."""

from random import Random
from typing import Any
from unittest.mock import patch

import pytest
import torch
from doubles import Letters
from transformers import LlamaConfig, LlamaForCausalLM

from trace_hydra.models import attention, decode, generate
from trace_hydra.models.generate import Decoding
from trace_hydra.models.lookup import LONGEST, Lookup, best_width, pass_cost

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [3, 4] * 6, [20, 21, 22, 23], [24] * 9, [25, 26], [27, 3, 28]]
HEAD = [5 + at % 7 for at in range(20)]
GREEDY = Decoding(False, 1.0, 1.0)


def built(seed=0, ours=True, **changes):
    sizes = dict(
        vocab_size=30, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
    if ours:
        attention.use_for_cpu(model)
    return model


def follower(following):
    """A model whose next token depends on the last one alone: layers add nothing, the output layer looks it up."""
    model: Any = built()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(30, 32))
        model.lm_head.weight.zero_()
        for token, then in following.items():
            model.lm_head.weight[then, token] = 1.0
    return model


def answers(model, prompts, limit, drafts=True, batch_tokens=10_000, choose=decode.greedy, numbers=lambda index: []):
    """New tokens of each prompt, and the shapes of the passes behind the prompts' own."""
    passes, original = [], model.forward

    def watch(*arguments, **keywords):
        if keywords.get("attention_mask") is not None and keywords["past_key_values"].get_seq_length():
            passes.append(tuple(keywords["input_ids"].shape))
        return original(*arguments, **keywords)

    plan = decode.Plan(limit, frozenset([2]), choose, numbers, lambda new: False)
    width = best_width if drafts else lambda chances, cost: 0
    with torch.inference_mode(), patch.object(model, "forward", watch), patch.object(decode, "best_width", width):
        found = dict(decode.decode(model, prompts, plan, batch_tokens))
    return [found[at] for at in range(len(prompts))], passes


LOOP = {5: 6, 6: 7, 7: 8, 8: 9, 9: 5, 10: 11, 11: 10}


@pytest.mark.parametrize("limit", [100, 101, 117, 130])
def test_a_loop_takes_few_passes(limit):
    """Five tokens round and round: found behind the eighth, then read some tokens, some dozens, at a time."""
    (found,), passes = answers(follower(LOOP), [[4, 5]], limit)
    assert found == [5 + (1 + at) % 5 for at in range(limit)]
    assert len(passes) <= 14 and sum(width for _, width in passes) < 2 * limit


def test_rows_in_loops_of_their_own_end_at_the_limit():
    found, passes = answers(follower(LOOP), [[5], [10, 11, 10, 11, 10]], 41)
    assert found == [[5 + (1 + at) % 5 for at in range(41)], [11 - at % 2 for at in range(41)]]
    assert len(passes) < 20


def test_an_end_token_in_the_middle_of_a_draft_ends_the_answer():
    """The prompt holds 4 5 <end> 9 9 9; behind 4 the draft is 5 <end> 9 9 9; nothing follows the end."""
    model = follower({3: 4, 4: 5, 5: 2, 2: 9, 9: 9})
    (found,), passes = answers(model, [[4, 5, 2, 9, 9, 9, 3]], 50)
    assert found == [4, 5, 2]
    assert len(passes) == 1 and passes[0][1] > 3


def test_a_stop_string_in_the_middle_of_a_draft_ends_the_answer():
    """Tokens 5 to 9 are e to i: `ef` first appears with the sixth token of f g h i e f."""
    model = follower(LOOP)
    settings = {"max_new_tokens": 60, "decoding": GREEDY, "batch_tokens": 1000}
    (made,) = generate.generate(model, Letters(), [[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5]], stop=["ef"], **settings)
    assert (made.text, made.num_new, made.stopped) == ("fghief", 6, True)


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "sdpa"])
@pytest.mark.parametrize("head", [[], HEAD], ids=["alone", "shared head"])
@pytest.mark.parametrize("seed", range(4))
def test_answers_are_those_of_one_token_a_pass(seed, head, ours):
    """With one slot, some, all; fewer passes. Small random models repeat themselves."""
    model = built(seed, ours)
    prompts = [head + one for one in PROMPTS]
    plain, steps = answers(model, prompts, 60, drafts=False)
    for batch_tokens in (1, 3 * (len(head) + 12 + 60), 10_000):
        drafted, passes = answers(model, prompts, 60, batch_tokens=batch_tokens)
        assert drafted == plain
    assert len(passes) < len(steps)


def test_drafts_do_not_depend_on_the_type_of_numbers():
    """Under autocast keys and values are kept in its type, a head's too."""
    model = built()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = answers(model, [HEAD + one for one in PROMPTS], 20)
        plain, _ = answers(model, [HEAD + one for one in PROMPTS], 20, drafts=False)
    assert [len(one) for one in found] == [len(one) for one in plain]
    assert sum(one == other for one, other in zip(found, plain, strict=True)) >= 6  # the others: rounding


@pytest.mark.parametrize("temperature", [0.02, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_sampled_answers_are_those_of_one_token_a_pass(seed, temperature):
    """The number that samples a token is the token's own; only how many a pass gives depends on drafts."""
    model = built(seed).double()
    drawn = [[Random(f"{seed}-{at}").random() for at in range(60)] for _ in PROMPTS]
    sampled: dict[str, Any] = {"choose": decode.sampler(temperature, 0.9), "numbers": drawn.__getitem__}
    plain, steps = answers(model, PROMPTS, 60, drafts=False, **sampled)
    for batch_tokens in (1, 250, 10_000):
        drafted, passes = answers(model, PROMPTS, 60, batch_tokens=batch_tokens, **sampled)
        assert drafted == plain
    greedy, _ = answers(model, PROMPTS, 60)
    assert plain != greedy
    assert len(passes) < len(steps) or temperature == 1.0  # hot, nothing repeats itself


def test_no_more_is_sampled_than_one_token_behind_the_right_draft():
    """A loop: what a pass chooses is what it appends, and every number is used once, in order."""
    asked: list[float] = []

    def choose(logits, numbers):
        asked.extend(numbers)
        return logits.argmax(-1)

    (found,), passes = answers(
        follower(LOOP), [[4, 5]], 50, choose=choose, numbers=lambda index: [at / 50 for at in range(50)]
    )
    assert found == [5 + (1 + at) % 5 for at in range(50)] and len(passes) < 14
    assert asked == [at / 50 for at in range(50)]


def test_looking_up_by_hand():
    """7 8 stood before 9 1. Of no draft, one right, one of two the rate is 1/2, 2/3, 2/4; 9 raises 2/3 to 5/6."""
    row = Lookup([7, 8, 9, 1, 2, 3, 7, 8])
    assert row.draft(3) == [9, 1, 2] and row.chance == 1 / 2
    row.add(9)
    assert row.draft(4) == [1, 2, 3, 7] and row.chance == pytest.approx(5 / 6)
    assert row.draft(9) == [1, 2, 3, 7, 8, 9, 1, 2, 3]
    row.add(5)
    assert row.draft(4) == [] and row.chance == 0
    row.add(3)
    assert row.draft(2) == [7, 8] and row.chance == 1 / 2
    assert Lookup([4] * 4).draft(5) == [4] * 5 and Lookup([4, 5]).draft(1) == []


def test_the_latest_place_is_looked_up():
    """And of more tokens sooner than of fewer."""
    assert Lookup([1, 2, 3, 8, 1, 2, 3, 9, 1, 2, 3]).draft(1) == [9]
    assert Lookup([1, 2, 3, 8, 5, 3, 9, 1, 2, 3]).draft(1) == [8]


def test_width_of_drafts_by_hand():
    """One row, chance 1 / 2, a pass that costs 3 tokens: rates are 1 / 4, 1.5 / 5, 1.75 / 6, ...: one token."""
    assert best_width([0.5], 3) == 1
    assert best_width([0.0, 0.0], 64) == 0 and best_width([], 64) == 0
    assert best_width([0.999], 64) == LONGEST
    assert best_width([0.99] + [0.0] * 15, 64) == 0  # fifteen rows would read for nothing
    assert best_width([0.99] * 16, 64) > 8
    assert pass_cost("cpu") < pass_cost("cuda")


def test_passes_over_prompts_by_hand():
    """A pass costs 10: 100 and 20, 19, 18 apart cost 110 + 70; together 410; 9 of 9 in one pass 91."""
    assert decode.groups([100, 20, 19, 18], 10) == [[0], [1, 2, 3]]
    assert decode.groups([9] * 9, 10) == [list(range(9))]
    assert decode.groups([30, 21], 10) == [[0, 1]] and decode.groups([30, 19], 10) == [[0], [1]]
    assert decode.groups([], 10) == []
