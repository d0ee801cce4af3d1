"""The offline items: what is in them, how each style is scored, and that a model's state reaches the scores."""

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from harness_subject import build, random_tiny, subject_of

from trace_hydra.capability import items, mini
from trace_hydra.capability.mini import KINDS, Mini, last_number, read_kind, token_f1
from trace_hydra.capability.subject import Likelihood
from trace_hydra.errors import CapabilityError
from trace_hydra.models.tuning import Prompt

CHOICES = ("knowledge", "reasoning", "physical")
GENERAL = ("knowledge", "math", "reasoning", "reading", "boolean", "physical")


@pytest.fixture(autouse=True)
def fresh_items():
    read_kind.cache_clear()
    yield
    read_kind.cache_clear()


def test_some_150_items_no_prompt_twice():
    counts = {kind: len(read_kind(kind)["items"]) for kind in KINDS}
    assert 150 <= sum(counts.values()) <= 170 and min(counts.values()) >= 16
    for kind in KINDS:
        found = read_kind(kind)["items"]
        assert len({item["prompt"] for item in found}) == len(found)
        assert len({item["category"] for item in found}) >= 3


@pytest.mark.parametrize("kind", CHOICES)
def test_each_place_is_right_equally_often(kind):
    found = read_kind(kind)["items"]
    places = Counter(item["answer"] for item in found)
    size = len(found[0]["choices"])
    assert {len(item["choices"]) for item in found} == {size} and size == (2 if kind == "physical" else 4)
    assert set(places) == set(range(size)) and set(places.values()) == {len(found) // size}


def test_yes_and_no_are_equally_often_right():
    """Each question stands behind a passage that says yes and another that says no."""
    for item in read_kind("boolean")["items"]:
        assert item["yes"] != item["no"] and item["prompt"].endswith("?")


def test_no_constant_guess_gets_far():
    """The most frequent answer in math is right in a tenth; no answer is a number of its question."""
    found = read_kind("math")["items"]
    assert max(Counter(item["answer"] for item in found).values()) <= 0.1 * len(found)
    for item in found:
        assert item["answer"] not in item["prompt"].replace(".", " ").replace("?", " ").split()


def test_reading_answers_stand_in_their_passages():
    found = read_kind("reading")["items"]
    for item in found:
        passage, question = item["prompt"].split("\nQuestion: ")
        assert item["answer"] in passage and item["answer"] not in question
    assert len({item["category"] for item in found}) == 4


def test_heads_give_no_answer_away():
    for kind in ("math", "reading", "boolean"):
        node = read_kind(kind)
        assert not [item["prompt"] for item in node["items"] if item["prompt"] in node["head"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["a", "a"]}, r"knowledge.json:1: 'choices' must differ"),
        ({"answer": 4}, r"knowledge.json:1: 'choices' must differ and 'answer' be the place"),
        ({"prompt": "The "}, r"knowledge.json:1: a text is empty or has blanks"),
        ({"extra": 1}, r"knowledge.json:1: an item of style 'choice' has the keys"),
        ({"id": "02"}, r"knowledge.json:2: id '02' occurs twice"),
    ],
)
def test_a_damaged_item_is_named(tmp_path, monkeypatch, change, message):
    node = json.loads((mini.OWN / "knowledge.json").read_text())
    node["items"][0].update(change)
    (tmp_path / "knowledge.json").write_text(json.dumps(node))
    monkeypatch.setattr(mini, "OWN", tmp_path)
    with pytest.raises(CapabilityError, match=message):
        Mini(kinds=["knowledge"], limit=None).identity()


def test_problems_and_identity():
    assert Mini(kinds=list(KINDS), limit=None).problems() == []
    assert Mini(kinds=["knowledge", "magic"], limit=0).problems() == [
        "limit of the mini set=0 must be null (all items) or a whole number of at least 1.",
        "kinds: 'magic' is none of knowledge, math, reasoning, reading, boolean, physical, instructions, safety.",
    ]
    assert "at least one kind" in Mini(kinds=[], limit=None).problems()[0]
    whole = Mini(kinds=["math"], limit=None).identity()
    assert whole == Mini(kinds=["math"], limit=20).identity() | {"kinds": ["math"]}
    assert whole["items"] != Mini(kinds=["math"], limit=19).identity()["items"]


@pytest.mark.parametrize(
    ("text", "number"),
    [(" 3 + 4 = 7", "7"), ("1,200 in all", "1200"), ("07", "7"), ("none", None), ("9" * 30, None), ("3, 4", "4")],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_token_f1():
    """ "the bus driver" is right. "a fast bus driver": 2 of 3 and 2 of 2 words, 2 * 2 / (3 + 2) = 0.8."""
    assert token_f1("The bus driver.", "bus driver") == 1.0
    assert token_f1("a fast bus driver", "bus driver") == pytest.approx(0.8)
    assert token_f1("", "bus") == token_f1("train", "bus") == token_f1("the", "the") == 0.0


def test_spread_takes_evenly():
    assert items.spread("abcdefgh", 4) == ["a", "c", "e", "g"]
    assert items.spread("abc", None) == items.spread("abc", 9) == ["a", "b", "c"]


class Scripted:
    """Answers by prompt; a continuation's log-likelihood by (context, continuation). Tokens are letters."""

    max_length = 4000
    tokenizer = SimpleNamespace(chat_template=None)

    def __init__(self, answer: Any = None, total: Any = None):
        self.answer, self.total = answer, total

    def encoder(self, mode):
        assert mode == "raw"
        return SimpleNamespace(
            prefix=[],
            suffix=[],
            text_ids=lambda texts: [[ord(letter) for letter in text] for text in texts],
            prompts=lambda prompts, instruction, limit: ([[1] for _ in prompts], 0),
        )

    def generate(self, prompts, max_new_tokens, **_):
        return [SimpleNamespace(text=self.answer(prompt)) for prompt in prompts]

    def log_likelihoods(self, prompts, rows):
        texts = ["".join(map(chr, tail)) for _, tail in rows]
        return [Likelihood(self.total(*pair), False, len(pair[1])) for pair in zip(prompts, texts, strict=True)]


def scores(kind, **script):
    return [record["score"] for record in Mini(kinds=[kind], limit=None).measure(Scripted(**script))]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", CHOICES)
def test_choices_are_scored_by_their_words(kind):
    """A model that knows all gets 100; one that likes the shortest words gets no more than its luck; ties get 0."""
    right = {item["prompt"]: f" {item['choices'][item['answer']]}" for item in read_kind(kind)["items"]}
    assert set(scores(kind, total=lambda head, tail: -1.0 if right[head] == tail else -2.0)) == {100.0}
    assert set(scores(kind, total=lambda head, tail: -2.0 if right[head] == tail else -1.0)) == {0.0}
    assert set(scores(kind, total=lambda head, tail: -1.0)) == {0.0}


def test_a_liking_for_yes_cancels_out():
    """Log-odds 5 behind both passages score 0 (a tie); 5 and 4, right way round, 100; 4 and 5, 0."""
    says_yes = {item["yes"] for item in read_kind("boolean")["items"]}

    def odds(first, second):
        def total(head, tail):
            passage = head.split("\n\n")[-1]
            value = first if any(passage.startswith(one) for one in says_yes) else second
            return value if tail == " Yes," else 0.0

        return set(scores("boolean", total=total))

    assert odds(5.0, 5.0) == {0.0} and odds(5.0, 4.0) == {100.0} and odds(4.0, 5.0) == {0.0}


def test_only_the_first_line_of_an_answer_counts():
    answers = {item["prompt"]: item["answer"] for item in read_kind("math")["items"]}

    def asked(prompt):
        return next(answer for text, answer in answers.items() if prompt.endswith(text))

    assert set(scores("math", answer=lambda prompt: f" 1 + 1 = {asked(prompt)}\n\nQuestion: 99")) == {100.0}
    assert set(scores("math", answer=lambda prompt: f" I don't know\n{asked(prompt)}")) == {0.0}


def test_the_whole_set_on_a_model():
    """On random weights: each item once, in the same order and with the same score again, areas as they should be."""
    subject = random_tiny(ROOT, context_length=2048)
    part = Mini(kinds=list(KINDS), limit=2)
    records = part.measure(subject)
    assert [record["set"] for record in records] == [f"mini_{kind}" for kind in KINDS for _ in range(2)]
    assert len({(record["set"], record["category"], record["id"]) for record in records}) == len(records)
    areas = {record["set"].removeprefix("mini_"): record["area"] for record in records}
    assert areas == {**dict.fromkeys(GENERAL, "general"), "instructions": "instruction", "safety": "safety"}
    assert all(0 <= record["score"] <= 100 for record in records)
    assert part.measure(subject) == records
    assert [pair["delta"] for pair in part.compare(records, records)] == [0.0] * len(records)
    json.dumps(records, allow_nan=False)


def test_a_soft_prompt_reaches_the_scores():
    """The same weights behind other virtual tokens: log-odds, margins and whole generated answers are others."""
    tuning = Prompt(length=8, init="normal")
    subject = subject_of(build(ROOT, "tiny", context_length=2048), tuning)
    generator = torch.Generator().manual_seed(0)
    for weight in subject.ctx.model.parameters():  # as large as in `random_tiny`
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    part = Mini(kinds=["boolean", "instructions", "safety"], limit=4)
    before = part.measure(subject)
    (soft,) = [weight for weight in subject.ctx.model.parameters() if weight.requires_grad]
    with torch.no_grad():
        soft.normal_(generator=torch.Generator().manual_seed(1))
    after = part.measure(subject)

    def values(records):
        return [record.get("margin_nats", record.get("odds", record["output"])) for record in records]

    assert all(first != second for first, second in zip(values(before), values(after), strict=True))
    assert [one["score"] for one in before] != [one["score"] for one in after]


def test_raw_continuations_get_the_tokens_of_the_joined_text():
    """Text and continuation end up as the very bytes of the joined text, cut from the left if they do not fit."""
    subject = subject_of(build(ROOT, "tiny", context_length=64))
    seen = []
    subject.log_likelihoods = lambda prompts, rows: seen.extend(rows) or []  # type: ignore[method-assign]
    items.likelihoods(subject, ["The sky is", "x" * 100], [" blue", " end"], "raw")
    assert subject.tokenizer.decode([*seen[0][0], *seen[0][1]]) == "The sky is blue"
    assert subject.tokenizer.decode(seen[0][1]) == " blue"
    assert len(seen[1][0]) == 60 and subject.tokenizer.decode(seen[1][1]) == " end"
