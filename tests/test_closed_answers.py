"""Runs whose closed answers are chosen by log-likelihood: what is asked, of which weights, and what is written down."""

import json
from typing import Any

import pytest
import torch
from conftest import SMALLER, run_tiny

from trace_hydra import context
from trace_hydra.data.options import options_of
from trace_hydra.data.task import LETTERED
from trace_hydra.engines.hf import HF
from trace_hydra.errors import ConfigError, DataError, MethodError
from trace_hydra.evaluate import answer_prompts
from trace_hydra.methods.base import Method
from trace_hydra.score import rescore

CHOSEN = "protocol.closed_answers=log_likelihood"
LETTERS = ("A", "B", "C")


def records(run, row: int, task: str) -> list[dict]:
    lines = (run.directory / "predictions" / str(row) / f"{task}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two closed tasks, one of them with options in each prompt, and an open one."""
    order = "task_order=[FOMC,ScienceQA,NumGLUE-cm]"
    return run_tiny(tmp_path_factory.mktemp("mixed"), [CHOSEN, order, "data.rows.test=6"])


def test_every_cell_is_scored_and_closed_ones_say_an_option(mixed):
    assert mixed.results["complete"] and all(value is not None for value in mixed.results["matrix"][3])
    prompts = {task: [row.prompt for row in mixed.data.tasks[task].test] for task in mixed.data.tasks}
    for row in (0, 1, 2, 3):
        for task, declared in (("FOMC", LETTERS), ("ScienceQA", LETTERED)):
            if not (mixed.directory / "predictions" / str(row) / f"{task}.jsonl").is_file():
                continue
            for one, prompt in zip(records(mixed, row, task), prompts[task], strict=True):
                nats = one["log_likelihoods"]
                assert tuple(nats) == options_of(prompt, declared) and all(value < 0 for value in nats.values())
                assert one["raw"] == one["prediction"] == max(nats, key=nats.__getitem__)
                assert one["new_tokens"] == 0 and one["stopped"] is True
                assert one["scores"]["score"] == 100 * (one["raw"] == one["reference"].strip()[:1])
    assert {len(one["log_likelihoods"]) for one in records(mixed, 3, "ScienceQA")} != {3}


def test_open_answers_are_generated_as_before(mixed, tmp_path):
    """The bytes of NumGLUE-cm's predictions, and the weights, are those of a run that generates everything."""
    order = "task_order=[FOMC,ScienceQA,NumGLUE-cm]"
    plain = run_tiny(tmp_path, [order, "data.rows.test=6"])
    file = "predictions/3/NumGLUE-cm.jsonl"
    assert (plain.directory / file).read_bytes() == (mixed.directory / file).read_bytes()
    assert "log_likelihoods" not in records(plain, 3, "FOMC")[0]
    keys = [[stage["key"] for stage in run.results["stages"]] for run in (plain, mixed)]
    assert keys[0] == keys[1]
    assert plain.results["protocol"]["fingerprint"] != mixed.results["protocol"]["fingerprint"]
    assert "closed_answers" not in plain.results["disclosures"]


def test_a_report_says_what_was_chosen(mixed):
    said = mixed.results["disclosures"]["closed_answers"]
    assert said == "log-likelihood of the options of FOMC, ScienceQA"
    report = (mixed.directory / "report.md").read_text()
    assert f"- answers: {said}; those of other tasks are generated" in report
    assert report.count("log-likelihood") == 1


def test_chosen_answers_are_scored_again_as_they_are(mixed):
    again = rescore(mixed.directory, protocol="official")
    assert [row[0] for row in again["matrix"]] == [row[0] for row in mixed.results["matrix"]]


METHODS = {
    "seqft": [],
    "soft prompt": ["method=seqft", "tuning=prompt"],
    "olora": ["method=olora", "tuning=lora"],
    "anyssr": ["method=anyssr", "tuning=lora", "method.expansion=64"],
    "l2p": ["method=l2p", "tuning=prompt"],
    "pp": ["method=pp", "tuning=prompt"],
    "icl": ["method=icl", "tuning=frozen", "data.rows.train=30"],
    "mbpa": ["method=mbpa", *SMALLER["mbpa"]],
}


def logits_behind(model: Any, ids) -> torch.Tensor:
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        logits = model(torch.tensor([list(ids)])).logits[0, -1].clone()
    model.train(was_training)
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_methods_are_asked_what_they_would_have_generated_from(name, tmp_path, monkeypatch):
    """Call by call the same ids, soft prompts and demonstrations included, by the same weights.

    The model's next-token logits behind the first prompt of each call are the same, and give what was chosen.
    """
    asked: dict[str, list] = {"generate": [], "choose": []}
    generate, choose = HF.generate, context.choose_shared

    def watch_generate(self, model, tokenizer, prompts, **settings):
        asked["generate"].append(([list(one) for one in prompts], logits_behind(model, prompts[0])))
        return generate(self, model, tokenizer, prompts, **settings)

    def watch_choose(model, prompts, options, **settings):
        values = choose(model, prompts, options, **settings)
        logits = logits_behind(model, prompts[0])
        asked["choose"].append(([list(one) for one in prompts], logits))
        expected = logits.float().log_softmax(-1)[[one for (one,) in options[0]]]
        torch.testing.assert_close(torch.tensor(values[0]), expected, atol=2e-4, rtol=1e-4)
        return values

    monkeypatch.setattr(HF, "generate", watch_generate)
    monkeypatch.setattr(context, "choose_shared", watch_choose)
    settings = [*METHODS[name], "task_order=[ScienceQA,FOMC]", f"paths.store={tmp_path / 'shared'}"]
    run_tiny(tmp_path / "generated", settings)
    assert not asked["choose"]
    generated, asked["generate"] = asked["generate"], []
    chosen = run_tiny(tmp_path / "chosen", [*settings, CHOSEN])
    assert not asked["generate"] and len(asked["choose"]) == len(generated) > 3
    for (ids, logits), (others, other_logits) in zip(generated, asked["choose"], strict=True):
        assert ids == others
        torch.testing.assert_close(logits, other_logits)
    prompts = [row.prompt for row in chosen.data.tasks["ScienceQA"].test]
    for one, prompt in zip(records(chosen, 1, "ScienceQA"), prompts, strict=True):
        assert tuple(one["log_likelihoods"]) == options_of(prompt, LETTERED)


def test_a_method_that_generates_for_itself_is_refused(mixed):
    class Own(Method):
        """Goes past the context."""

        def answer(self, ctx, prompts, task):
            return ["A"] * len(prompts)

    prompts = [row.prompt for row in mixed.data.tasks["FOMC"].test]
    with pytest.raises(MethodError, match=r"Own\.answer .*FOMC.*protocol\.closed_answers=generate"):
        answer_prompts(Own(), mixed.ctx, prompts, mixed.views["FOMC"])
    assert mixed.ctx.options is None
    answers, _ = answer_prompts(Method(), mixed.ctx, prompts, mixed.views["FOMC"])
    assert [one["raw"] for one in answers] == [one["raw"] for one in records(mixed, 3, "FOMC")]


def rows_in(folder, answers) -> None:
    (folder / "Mine").mkdir(parents=True)
    for split, number in (("train", 6), ("eval", 2), ("test", 4)):
        rows = [{"prompt": f"Is {at} {split}?\n", "answer": answers[at % len(answers)]} for at in range(number)]
        (folder / "Mine" / f"{split}.json").write_text(json.dumps(rows))


MINE = [
    "+data.tasks.Mine={metric: accuracy, max_new_tokens: 12, options: ['yes', never, 'never ever']}",
    "protocol.decoding.max_new_tokens=null",
]


def test_a_task_of_ones_own_has_its_options(tmp_path):
    """Several tokens each, one beginning another: trained rows and a matrix."""
    rows_in(tmp_path / "data", ["yes", "never", "never ever"])
    data = ["data=trace", f"paths.data={tmp_path / 'data'}", "task_order=[Mine]", *MINE, CHOSEN]
    run = run_tiny(tmp_path, data)
    found = records(run, 1, "Mine")
    assert run.results["complete"] and all(one["raw"] in ("yes", "never", "never ever") for one in found)
    assert all(set(one["log_likelihoods"]) == {"yes", "never", "never ever"} for one in found)


def test_answers_that_are_no_option_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    rows_in(tmp_path / "data", ["yes", "sometimes"])
    monkeypatch.setattr("trace_hydra.live.Live._load", lambda live: pytest.fail("a model was loaded"))
    data = ["data=trace", f"paths.data={tmp_path / 'data'}", "task_order=[Mine]", *MINE]
    said = r"protocol\.closed_answers=log_likelihood: Mine: .* test-1's 'sometimes'"
    with pytest.raises(DataError, match=said):
        run_tiny(tmp_path, [*data, CHOSEN])


def test_another_word_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"protocol\.closed_answers=likely is none of generate, log_likelihood"):
        run_tiny(tmp_path, ["task_order=[FOMC]", "protocol.closed_answers=likely"])
