"""General ability through lm-evaluation-harness, on rows of our own; proof on real ones: test_harness_cli.py."""

import hashlib
import json
import logging
import os
import random

import numpy as np
import pytest
import torch
from conftest import ROOT
from harness_subject import SETS, build, random_tiny, subject_of

from trace_hydra.capability.harness import Harness
from trace_hydra.capability.harness_model import harness_model
from trace_hydra.errors import CapabilityError
from trace_hydra.models.tuning import Prompt

pytest.importorskip("lm_eval", reason="needs pip install 'trace-hydra[general]'")

BOOLQ = [
    {"passage": "The moon has no air.", "question": "is there air on the moon", "answer": False},
    {"passage": "A kettle boils water.", "question": "can a kettle boil water", "answer": True},
    {"passage": "Snow is frozen water.", "question": "is snow made of water", "answer": True},
]
PIQA = [{"goal": "dry a cup", "sol1": "wipe it with a towel", "sol2": "fill it with tea", "label": 0}]
GSM8K = [{"question": "Two bags hold 3 pears each. How many pears?", "answer": "2 * 3 = 6\n#### 6"}]


@pytest.fixture
def rows(tmp_path):
    folder = tmp_path / "ability"
    folder.mkdir()
    for name, made in {"boolq": BOOLQ, "piqa": PIQA, "gsm8k_test": GSM8K}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


@pytest.fixture(scope="module")
def subject():
    return random_tiny(ROOT)


def harness(root, *names: str, **changes):
    settings = {"prompt": "raw", "limit": None, "max_new_tokens": 6, **changes}
    sets = settings.pop("sets", {name: SETS[name] for name in names})
    return Harness(sets=sets, root=None if root is None else str(root), **settings)


def nats(model, tokenizer, context: str, continuation: str, prefix=()) -> float:
    """Log-likelihood of a continuation, position by position."""
    before, after = [*prefix, *tokenizer.encode(context)], tokenizer.encode(continuation)
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *after]])).logits[0].log_softmax(-1)  # (length, vocab)
    return sum(logits[len(before) - 1 + place, token].item() for place, token in enumerate(after))


def test_boolq_by_hand(rows, subject):
    """Prompts written out from the harness's template; the likelier of " no" and " yes" is the answer."""
    records = harness(rows, "boolq").measure(subject)
    assert [record["id"] for record in records] == ["0", "1", "2"]
    for record, row in zip(records, BOOLQ, strict=True):
        context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        expected = [nats(subject.ctx.model, subject.tokenizer, context, word) for word in (" no", " yes")]
        assert record["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
        answer = "yes" if expected[1] > expected[0] else "no"
        assert record["output"] == answer
        assert record["score"] == 100.0 * (answer == ("yes" if row["answer"] else "no"))
        assert record["prompt"] == context
        assert record["prompt_hash"] == hashlib.sha256(context.encode()).hexdigest()[:16]
        assert (record["area"], record["set"], record["category"]) == ("general", "boolq", "boolq")
        assert record["measure"] == "accuracy"
    assert len({record["score"] for record in records}) == 2  # some right, some wrong: the score says something


def test_answers_are_cut_scored_and_limited(rows, subject, monkeypatch):
    """The answer ends before "Q:"; flexible-extract takes its last number, strict-match wants a sentence."""
    from trace_hydra.models.generate import Generated

    asked = {}

    def answer(prompts, limit, *, ids, stop):
        asked.update(limit=limit, stop=stop, prompt=prompts[0])
        return [Generated(" 2 and 3 make 6\n\nQ: 7", 1, 1, True)]

    monkeypatch.setattr(subject, "generate", answer)
    (record,) = harness(rows, "gsm8k", max_new_tokens=None).measure(subject)
    assert (record["output"], record["extracted"], record["score"]) == (" 2 and 3 make 6\n\n", "6", 100.0)
    assert (record["measure"], record["reference"]) == ("exact match (flexible-extract)", "6")
    assert asked["limit"] == 256 and asked["stop"] == ("Q:", "</s>", "<|im_end|>", "<|end|>")
    assert asked["prompt"].count("\n\nQ: ") == 8 and asked["prompt"].endswith(f"Q: {GSM8K[0]['question']}\nA:")
    strict = {"gsm8k": {"shots": 2, "measure": "exact_match, strict-match"}}
    (record,) = harness(rows, sets=strict).measure(subject)
    assert (record["score"], record["extracted"]) == (0.0, "[invalid]")
    assert asked["limit"] == 6 and asked["prompt"].count("\n\nQ: ") == 2


def test_limits_are_per_task_and_per_set(rows, subject):
    assert len(harness(rows, "boolq", "piqa", limit=2).measure(subject)) == 3
    sets = {"boolq": {**SETS["boolq"], "limit": 1}, "piqa": SETS["piqa"]}
    assert [record["set"] for record in harness(rows, sets=sets, limit=2).measure(subject)] == ["boolq", "piqa"]


def test_chat_template(rows):
    """One user turn and the head of the answer; without a template there is nothing to fill."""
    subject = random_tiny(ROOT)
    chat = harness(rows, "boolq", prompt="chat", limit=1)
    with pytest.raises(CapabilityError, match="no chat template"):
        chat.measure(subject)
    subject.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]"
        "{% endif %}"
    )
    (record,) = chat.measure(subject)
    whole = f"[user]{record['prompt']}[assistant]"
    assert record["prompt_hash"] == hashlib.sha256(whole.encode()).hexdigest()[:16]
    expected = [nats(subject.ctx.model, subject.tokenizer, whole, word) for word in ("no", "yes")]
    assert record["log_likelihoods"] == pytest.approx(expected, abs=1e-3)


def test_a_soft_prompt_stands_before_the_context(rows):
    """Four virtual tokens: likelihoods are those behind their ids, and four positions are taken."""
    source = build(ROOT, "tiny", context_length=2048)
    torch.manual_seed(0)
    tuned, plain = subject_of(source, Prompt(length=4, init="normal")), subject_of(source)
    assert plain.max_length - tuned.max_length == 4
    for weight in tuned.ctx.model.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(weight.numel()))
    (record,) = harness(rows, "boolq", limit=1).measure(tuned)
    model, tokenizer, prefix = tuned.ctx.model, tuned.tokenizer, tuned.ctx.prefix
    expected = [nats(model, tokenizer, record["prompt"], word, prefix) for word in (" no", " yes")]
    bare = [nats(model, tokenizer, record["prompt"], word) for word in (" no", " yes")]
    assert len(prefix) == 4 and record["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
    assert record["log_likelihoods"] != pytest.approx(bare, abs=1e-2)


def test_new_weights_give_new_answers(rows):
    """Nothing is remembered from the stage before."""
    subject = random_tiny(ROOT)
    first = harness(rows, "piqa").measure(subject)
    with torch.no_grad():
        subject.ctx.model.get_parameter("lm_head.weight").mul_(0.5)
    (second,) = harness(rows, "piqa").measure(subject)
    assert second["log_likelihoods"] != pytest.approx(first[0]["log_likelihoods"], abs=1e-2)


def test_long_prompts_are_cut_at_their_start_and_told(rows, caplog):
    """400 positions: " yes" is 4 bytes, so 396 tokens of a context of 1023 stay."""
    (rows / "boolq.jsonl").write_text(json.dumps({**BOOLQ[0], "passage": "x" * 978}) + "\n")
    subject = random_tiny(ROOT, context_length=400)
    with caplog.at_level(logging.WARNING, logger="trace_hydra"):
        (record,) = harness(rows, "boolq").measure(subject)
    length = len(record["prompt"].encode())
    assert record["prompt_cut"] == length - (400 - len(" yes"))
    assert f"1 prompts were cut at their start, by up to {record['prompt_cut']} tokens" in caplog.text
    kept = record["prompt"][-(400 - len(" yes")) :]
    assert record["log_likelihoods"][1] == pytest.approx(
        nats(subject.ctx.model, subject.tokenizer, kept, " yes"), abs=1e-3
    )


def test_an_answer_longer_than_the_model_is_an_error(rows):
    with pytest.raises(CapabilityError, match="256 new tokens leave no room for a prompt; the model has 200"):
        harness(rows, "gsm8k", max_new_tokens=None).measure(random_tiny(ROOT, context_length=200))


def test_sampling_is_refused(subject):
    with pytest.raises(CapabilityError, match="greedy"):
        harness_model(subject, None)._settings({"do_sample": True, "temperature": 1.0, "until": []})


def test_nothing_else_changes(rows, subject, tmp_path, monkeypatch):
    """Random states, environment, loggers and progress bars are as before; no file appears."""
    import lm_eval.api.task
    from datasets.utils import are_progress_bars_disabled

    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("TMPDIR", str(place))
    torch.rand(1)

    def state():
        return (
            random.getstate(),
            str(np.random.get_state()),
            torch.get_rng_state().tolist(),
            dict(os.environ),
            logging.getLogger("lm_eval").level,
            logging.getLogger().level,
            lm_eval.api.task.tqdm,
            are_progress_bars_disabled(),
            torch.is_grad_enabled(),
        )

    before = state()
    harness(rows, "boolq", "gsm8k", "piqa").measure(subject)
    assert state() == before
    assert list(place.iterdir()) == []


def test_rows_alike_but_for_the_last_token_take_one_pass(subject):
    """Four options of one token behind 5: 6 tokens in all, and the numbers of four separate passes."""
    context, options = [10, 20, 30, 40, 50], [[60], [61], [62], [63]]
    before = subject.tokens
    together = subject.log_likelihoods(["p"] * 4, [(context, option) for option in options])
    assert subject.tokens - before == 6
    apart = [subject.log_likelihoods(["p"], [(context, option)])[0] for option in options]
    assert [one.total for one in together] == pytest.approx([one.total for one in apart], abs=1e-5)
    assert len({round(one.total, 3) for one in together}) == 4
    unequal = subject.log_likelihoods(["p", "q"], [([10, 20], [30, 40]), ([10, 20, 30], [40])])
    whole, last = (one.total for one in unequal)
    assert whole == pytest.approx(subject.log_likelihoods(["r"], [([10, 20], [30])])[0].total + last, abs=1e-4)


def test_identity_follows_rows_and_settings(rows):
    one = harness(rows, "boolq").identity()
    assert harness(rows, "boolq").identity() == one
    assert str(rows) not in json.dumps(one) and one["lm_eval"].startswith("0.4")
    others = [
        harness(rows, "boolq", limit=1).identity(),
        harness(rows, "boolq", "piqa").identity(),
        harness(rows, sets={"boolq": {"shots": 1, "measure": "acc"}}).identity(),
        harness(None, "boolq").identity(),
    ]
    (rows / "boolq.jsonl").write_text(json.dumps(BOOLQ[0]) + "\n")
    others.append(harness(rows, "boolq").identity())
    assert len({json.dumps(each) for each in [one, *others]}) == 6


def test_yaml_gives_plain_settings(rows):
    """A node of conf/capability arrives as OmegaConf's containers; what is stored is JSON."""
    from hydra.utils import instantiate

    node = {"_target_": "trace_hydra.capability.harness.Harness", "root": str(rows), "prompt": "raw", "limit": None}
    sets = {"mmlu": {**SETS["mmlu"], "categories": ["anatomy"]}, "boolq": {**SETS["boolq"], "limit": None}}
    made = instantiate({**node, "max_new_tokens": None, "sets": sets})
    assert json.loads(json.dumps(made.identity()["sets"])) == sets
    (found,) = made.problems()
    assert "mmlu_dev.jsonl, mmlu_test.jsonl" in found
