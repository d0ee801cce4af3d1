"""Rows to ids: labels by construction, truncation, batches."""

from itertools import product
from random import Random

import numpy as np
import pytest
from conftest import compose_config

from trace_hydra.data.batches import PASS, TrainBatches, bucketed_steps, collate, deal
from trace_hydra.data.encode import IGNORED, EncodedRow, Encoder
from trace_hydra.data.task import TRACE_TASKS, Example, shared_instruction
from trace_hydra.errors import ConfigError
from trace_hydra.models.tiny import Tiny

HEAD = "Solve.\n"


@pytest.fixture(scope="module")
def tokenizer():
    from trace_hydra.targets import instantiate

    config = compose_config(["model=tiny"])
    from omegaconf import OmegaConf

    source = instantiate(OmegaConf.to_container(config.model, resolve=True))  # type: ignore[arg-type]
    assert isinstance(source, Tiny)
    return source.load_tokenizer()


def encoder(tokenizer, **changes) -> Encoder:
    settings = {
        "prompt": "raw",
        "truncation": "middle",
        "special_tokens": "text",
        "max_prompt_tokens": 40,
        "max_answer_tokens": 8,
    }
    return Encoder(tokenizer, **{**settings, **changes})


def row(prompt: str, answer: str) -> Example:
    return Example("train-0", prompt, answer)


@pytest.mark.parametrize("task", TRACE_TASKS)
def test_labels_are_exactly_answer_and_end(tokenizer, task):
    """The byte tokenizer has one token a byte, so lengths are known: what carries loss decodes to the answer alone."""
    prompt, answer = TRACE_TASKS[task].instruction + "frage? 问\n", "Antwort 答\nB"
    made = encoder(tokenizer, max_prompt_tokens=500, max_answer_tokens=50).pairs([row(prompt, answer)], "")[0]
    batch = collate([made])
    labels = batch["labels"][0]
    kept = labels[labels != IGNORED].tolist()
    assert kept[-1] == tokenizer.eos_token_id and tokenizer.decode(kept[:-1]) == answer
    assert len(kept) == len(answer.encode()) + 1
    assert (labels[: made.num_prompt] == IGNORED).all()
    assert not made.truncated


def test_pad_equal_to_end_does_not_hide_the_end(tokenizer):
    """Two rows of different length: the shorter one's end token is a label, its padding is not."""
    rows = encoder(tokenizer).pairs([row("p", "a"), row("prompt", "answer")], "")
    batch = collate(rows)
    assert batch["labels"][0].tolist().count(tokenizer.eos_token_id) == 1
    assert batch["attention_mask"].sum(1).tolist() == [len(one.ids) for one in rows]
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_middle_truncation_keeps_instruction_and_end(tokenizer):
    """40 tokens for a prompt of 7 + 100 + 4 bytes: instruction (7), then the last 33 (begin tokens counted)."""
    prompt = HEAD + "x" * 100 + "\nA: "
    made = encoder(tokenizer)
    ids, cut = made.prompts([prompt], HEAD)
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert cut == 1 and len(ids[0]) == 40
    assert text.startswith(HEAD) and text.endswith("xx\nA: ")
    pair = made.pairs([row(prompt, "yes")], HEAD)[0]
    assert pair.truncated and pair.ids[: pair.num_prompt].tolist() == ids[0]
    assert pair.ids[-1] == tokenizer.eos_token_id


def test_a_long_instruction_leaves_room_for_the_end(tokenizer):
    prompt = "i" * 200 + "\nquestion"
    ids, _ = encoder(tokenizer).prompts([prompt], "i" * 200 + "\n")
    assert len(ids[0]) == 40 and tokenizer.decode(ids[0]).endswith("question")


def test_a_30000_token_prompt_fits(tokenizer):
    ids, cut = encoder(tokenizer).prompts([HEAD + "y" * 30_000 + "end"], HEAD)
    assert cut == 1 and len(ids[0]) == 40 and tokenizer.decode(ids[0]).endswith("end")


def test_a_cut_answer_still_ends(tokenizer):
    made = encoder(tokenizer).pairs([row("p", "0123456789")], "")[0]
    assert made.truncated and tokenizer.decode(made.ids[made.num_prompt : -1]) == "01234567"
    assert made.ids[-1] == tokenizer.eos_token_id


def test_official_truncation_cuts_the_joined_pair_from_the_start(tokenizer):
    """data_collator.py:31-59: limit 48 = 40 + 8 over prompt + answer; end token only where room is left."""
    made = encoder(tokenizer, truncation="left")
    full = made.pairs([row("p" * 60, "answer")], HEAD)[0]
    assert len(full.ids) == 48 and tokenizer.decode(full.ids) == "p" * 42 + "answer"
    assert full.truncated and tokenizer.decode(full.ids[full.num_prompt :]) == "answer"
    short = made.pairs([row("p" * 10, "answer")], HEAD)[0]
    assert short.ids[-1] == tokenizer.eos_token_id and not short.truncated
    ids, _ = made.prompts(["p" * 60 + "end"], HEAD)
    assert len(ids[0]) == 40 and tokenizer.decode(ids[0]).endswith("ppend")


def test_a_literal_special_token_is_text_or_token_as_the_protocol_says(tokenizer):
    end = tokenizer.eos_token
    as_text = encoder(tokenizer, max_prompt_tokens=100).text_ids([f"a{end}b"])[0]
    parsed = encoder(tokenizer, max_prompt_tokens=100, special_tokens="parse").text_ids([f"a{end}b"])[0]
    assert tokenizer.eos_token_id not in as_text and tokenizer.decode(as_text) == f"a{end}b"
    assert tokenizer.eos_token_id in parsed


def test_chat_without_a_template_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"protocol\.prompt=chat"):
        encoder(tokenizer, prompt="chat")


def test_chat_frames_the_prompt_and_cuts_only_the_prompt(tokenizer):
    import copy

    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}|bot:"
    made = encoder(chat, prompt="chat")
    ids, cut = made.prompts([HEAD + "z" * 100], HEAD)
    assert cut == 1 and len(ids[0]) == 40
    text = chat.decode(ids[0])
    assert text.startswith("<user>" + HEAD) and text.endswith("zz|bot:")


def test_no_room_for_the_template_is_refused(tokenizer):
    import copy

    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{{ 'x' * 100 }}{{ messages[0]['content'] }}"
    with pytest.raises(ConfigError, match=r"protocol\.max_prompt_tokens=40"):
        encoder(chat, prompt="chat")


def test_steps_hold_every_row_once_and_similar_lengths():
    """64 rows of lengths 1..64 in steps of 8: each step spans 8 lengths, useful tokens >= 92 % (performance goal)."""
    lengths = list(range(1, 65))
    steps = bucketed_steps(lengths, 8, "s-0")
    assert sorted(index for step in steps for index in step) == list(range(64))
    assert steps != bucketed_steps(lengths, 8, "s-1") and steps == bucketed_steps(lengths, 8, "s-0")
    useful = sum(lengths) / sum(max(lengths[index] for index in step) * len(step) for step in steps)
    assert useful >= 0.89  # by hand: 2080 / (8 * (8 + 16 + ... + 64)) = 2080 / 2304 = 0.903


def test_micro_batches_do_not_change_what_a_step_holds(tokenizer):
    rows = encoder(tokenizer).pairs([Example(str(i), "p" * (i % 9 + 1), "a") for i in range(10)], "")
    whole = [step_ids(step) for step in TrainBatches(rows, batch_size=4, micro_batch_size=4, seed="s")]
    for size in (1, 2, 3):
        parts = TrainBatches(rows, batch_size=4, micro_batch_size=size, seed="s")
        assert [step_ids(step) for step in parts] == whole and len(parts) == 3
    shared = [
        TrainBatches(rows, batch_size=4, micro_batch_size=4, seed="s", rank=rank, world_size=2) for rank in (0, 1)
    ]
    assert [sorted(step_ids(one) + step_ids(other)) for one, other in zip(*shared, strict=True)] == whole


def test_tokens_before_where_an_iteration_begins(tokenizer):
    """What was counted on the way is what is counted at once, in each epoch, by each of two processes."""
    rows = encoder(tokenizer).pairs([Example(str(i), "p" * (i % 9 + 1), "a") for i in range(10)], "")
    sizes = {"batch_size": 4, "micro_batch_size": 2, "seed": "s"}
    for rank in (0, 1):
        walked, batches = 0, TrainBatches(rows, **sizes, rank=rank, world_size=2)
        assert batches.tokens_before() == 0
        for epoch in range(2):
            for step, micro in enumerate(batches, start=1):
                walked += micro[0]["step_tokens"]
                again = TrainBatches(rows, **sizes, rank=rank, world_size=2)
                again.start_at(epoch, step)
                assert again.tokens_before() == walked
        assert walked == 2 * sum(len(row.ids) for row in rows)


def step_ids(step) -> list[str]:
    return sorted(name for micro in step for name in micro["example_ids"] if micro["weight"])


def test_weights_make_a_step_the_mean_over_its_labels(tokenizer):
    """Answers of 1, 2, 3 tokens and an end token: 2, 3, 4 of 9 labels, one row a micro-batch."""
    rows = encoder(tokenizer).pairs([Example(str(i), "p", "a" * i) for i in (1, 2, 3)], "")
    assert [row.num_labels for row in rows] == [2, 3, 4]
    (step,) = TrainBatches(rows, batch_size=4, micro_batch_size=1, seed="s")
    assert [micro["weight"] for micro in step] == pytest.approx([2 / 9, 3 / 9, 4 / 9])
    shared = [
        TrainBatches(rows, batch_size=4, micro_batch_size=1, seed="s", rank=rank, world_size=2) for rank in (0, 1)
    ]
    assert [[micro["weight"] for micro in step] for (step,) in shared] == [
        pytest.approx([4 / 9, 8 / 9]),  # averaged over two processes
        pytest.approx([6 / 9, 0]),  # as many passes as the other
    ]


def test_a_process_without_rows_of_its_own_takes_part_without_counting(tokenizer):
    rows = encoder(tokenizer).pairs([Example("0", "p", "a")], "")
    (step,) = TrainBatches(rows, batch_size=4, micro_batch_size=4, seed="s", rank=1, world_size=2)
    assert [micro["weight"] for micro in step] == [0.0]


def test_short_rows_fill_a_micro_batch_up_to_the_memory_of_long_ones():
    """Two rows of 10 tokens, 2 of them labels, may stand together: 20 padded tokens and 4 labels. Five passes are the
    fewest, and of those ways in five, this one pads least."""
    rows = [EncodedRow(np.arange(length), length - labels, False, str(length)) for length, labels in LENGTHS]
    dealt = deal(rows, tokens=20, labels=4, most=9)
    assert [[len(row.ids) for row in micro] for micro in dealt] == [[2, 2, 3, 4], [4, 5, 5], [8, 8], [10, 10], [30]]
    assert [len(micro) for micro in deal(rows[:3], tokens=20, labels=4, most=2)] == [2, 1]


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_cost_least_of_all_ways_to_cut_a_step(seed):
    """All 2^(n-1) ways are tried."""
    rng = Random(seed)
    lengths = sorted(rng.choice([10, 200, 700]) + rng.randrange(100) for _ in range(9))
    rows = [EncodedRow(np.arange(length), length - 1, False, "") for length in lengths]
    costs = []
    for cuts in product([False, True], repeat=8):
        ends = [at + 1 for at, cut in enumerate(cuts) if cut] + [9]
        ways = list(zip([0, *ends], ends, strict=False))
        if all((end - start) * lengths[end - 1] <= 2000 and end - start <= 5 for start, end in ways if end - start > 1):
            costs.append(sum((end - start) * lengths[end - 1] + PASS for start, end in ways))
    dealt = deal(rows, tokens=2000, labels=99, most=5)
    assert [len(row.ids) for micro in dealt for row in micro] == lengths
    assert sum(len(micro) * len(micro[-1].ids) + PASS for micro in dealt) == min(costs)


LENGTHS = [(2, 1), (2, 1), (3, 1), (4, 1), (4, 2), (5, 1), (5, 1), (8, 1), (8, 1), (10, 2), (10, 2), (30, 1)]


def test_every_epoch_has_its_own_order(tokenizer):
    rows = encoder(tokenizer).pairs([Example(str(i), "p", "a") for i in range(16)], "")
    batches = TrainBatches(rows, batch_size=2, micro_batch_size=2, seed="s")
    first, second = ([tuple(step[0]["example_ids"]) for step in batches] for _ in range(2))
    assert first != second and np.sort(np.ravel(first)).tolist() == np.sort(np.ravel(second)).tolist()


def test_instruction_is_the_declared_one_or_what_rows_share():
    assert shared_instruction("Head.\n", ["Head.\na", "Head.\nb"]) == "Head.\n"
    assert shared_instruction("Other\n", ["Do it.\nText: a", "Do it.\nText: b"]) == "Do it.\n"
    assert shared_instruction("", ["the cat", "the dog"]) == ""
    assert shared_instruction("", ["one prompt\nalone"]) == ""
