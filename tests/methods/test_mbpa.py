"""MbPA++: retrieval, the steps of eq. 2 by hand, and weights that come back bit for bit."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import compose_config, run_tiny

from trace_hydra import build
from trace_hydra.data.batches import collate
from trace_hydra.errors import ConfigError
from trace_hydra.methods.mbpa import LocalAdaptation, nearest

ORDER = "task_order=[FOMC,NumGLUE-cm,20Minuten]"
GOOD: dict[str, Any] = {
    "write": 1.0,
    "replay_rate": 0.5,
    "neighbours": 4,
    "steps": 2,
    "learning_rate": 0.05,
    "strength": 0.1,
    "tokens_per_forward": 400,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    values = [f"method.{key}={value}" for key, value in GOOD.items()]
    return run_tiny(tmp_path_factory.mktemp("mbpa"), ["method=mbpa", ORDER, *values])


@pytest.fixture
def watched(run, monkeypatch):
    """Call `answer` and see the weights at the moment each prompt is generated for."""
    seen = []

    def generate(prompts, limit, **_):
        seen.append((list(prompts), {name: weight.detach().clone() for name, weight in run.ctx.trainable().items()}))
        return ["x"] * len(prompts)

    monkeypatch.setattr(run.ctx, "generate", generate)
    return seen


def copy_of(run):
    return {name: weight.detach().clone() for name, weight in run.ctx.model.state_dict().items()}


def same(one, other):
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


def loss_of(run, examples):
    """Eq. 2's first term: the mean over rows of a row's mean negative log-likelihood, a forward pass a row."""
    total = torch.zeros(())
    for row in run.ctx.encode(examples):
        batch = collate([row])
        logits = run.ctx.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        total = total + F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:]) / len(examples)
    return total


def neighbours_of(run, prompt, task):
    """Brute force over all memory rows, in Python floats."""
    method = run.method
    (query,) = method.key(run.ctx, [prompt], run.views[task].instruction).tolist()
    rows = []
    for name, examples in method.memory.by_task.items():
        for example, key in zip(examples, method.keys[name].tolist(), strict=True):
            rows.append((sum((a - b) ** 2 for a, b in zip(query, key, strict=True)) ** 0.5, len(rows), example))
    return [example for _, _, example in sorted(rows)[: method.neighbours]]


def test_nearest_is_euclidean():
    """By angle, 2 would come first: (10, 0) points where the query does."""
    keys = torch.tensor([[0.0, 3.0], [1.0, 1.0], [10.0, 0.0], [1.0, -1.0], [1.5, 0.0]])
    assert nearest(keys, torch.tensor([1.0, 0.0]), 3) == [4, 1, 3]
    assert nearest(keys, torch.tensor([1.0, 0.0]), 9) == [4, 1, 3, 0, 2]
    generator = torch.Generator().manual_seed(0)
    keys, query = torch.randn(200, 16, generator=generator), torch.randn(16, generator=generator)
    distances = [float(torch.dist(key, query)) for key in keys]
    assert nearest(keys, query, 32) == sorted(range(200), key=distances.__getitem__)[:32]


def test_keys_are_mean_start_embeddings(run):
    """Byte tokens: the ids of a prompt are its bytes' ids. The model's own embeddings have moved on since."""
    start = run.weights_before["model.embed_tokens.weight"]
    assert torch.equal(run.method.embedding, start)
    assert not torch.equal(run.weights_after["model.embed_tokens.weight"], start)
    ids = run.ctx.tokenizer("Zug?", add_special_tokens=False)["input_ids"]
    (key,) = run.method.key(run.ctx, ["Zug?"], "")
    assert torch.allclose(key, start[[*run.ctx.encoder.prefix, *ids]].mean(0))
    assert {task: tuple(keys.shape) for task, keys in run.method.keys.items()} == dict.fromkeys(run.views, (6, 32))


def test_a_train_prompt_is_its_own_nearest_neighbour(run):
    for task, view in run.views.items():
        for example in run.data.tasks[task].train:
            assert neighbours_of(run, example.prompt, task)[0].prompt == example.prompt
        assert view.name == task


def test_two_steps_by_hand_and_every_row_has_its_own(run, watched):
    """W1 = W - a g(W); W2 = W1 - a (g(W1) + 2 lambda (W1 - W)), g the gradient of the neighbours' mean loss."""
    task, ctx = "FOMC", run.ctx
    prompts = [row.prompt for row in run.data.tasks[task].test]
    before = copy_of(run)
    assert run.method.answer(ctx, prompts, run.views[task]) == ["x"] * len(prompts)
    assert [asked for asked, _ in watched] == [[prompt] for prompt in prompts] and len(prompts) == 3
    assert same(copy_of(run), before)
    ctx.model.eval()
    weights = ctx.trainable()
    for prompt, (_, adapted) in zip(prompts, watched, strict=True):
        examples = neighbours_of(run, prompt, task)
        start = loss_of(run, examples).item()
        for step in range(2):
            found = torch.autograd.grad(loss_of(run, examples), list(weights.values()))
            with torch.no_grad():
                for (name, weight), gradient in zip(weights.items(), found, strict=True):
                    pull = 2 * 0.1 * (weight - before[name]) if step else 0.0
                    weight -= 0.05 * (gradient + pull)
        assert all(torch.allclose(adapted[name], weight, atol=1e-6) for name, weight in weights.items())
        assert not same(adapted, before)
        assert loss_of(run, examples).item() < start
        ctx.model.load_state_dict(before)
    assert not same(watched[0][1], watched[1][1])


def test_the_pull_is_felt(run, watched, monkeypatch):
    """With a = 0.05 and lambda = 10, 2 a lambda = 1: each step starts over from W, so two steps are one."""
    monkeypatch.setattr(run.method, "strength", 10.0)
    prompt = [run.data.tasks["FOMC"].test[0].prompt]
    run.method.answer(run.ctx, prompt, run.views["FOMC"])
    far = watched[-1][1]
    base = dict(run.ctx.trainable())
    (examples,) = [neighbours_of(run, prompt[0], "FOMC")]
    run.ctx.model.eval()
    first = torch.autograd.grad(loss_of(run, examples), list(base.values()))
    before = copy_of(run)
    with torch.no_grad():
        for weight, gradient in zip(base.values(), first, strict=True):
            weight -= 0.05 * gradient
    second = torch.autograd.grad(loss_of(run, examples), list(base.values()))
    run.ctx.model.load_state_dict(before)
    for (name, weight), gradient in zip(base.items(), second, strict=True):
        assert torch.allclose(far[name], weight - 0.05 * gradient, atol=1e-6)


def test_a_rows_weights_do_not_depend_on_other_rows_or_on_batches(run, watched, monkeypatch):
    prompts = [row.prompt for row in run.data.tasks["NumGLUE-cm"].test]
    run.method.answer(run.ctx, prompts, run.views["NumGLUE-cm"])
    together = watched[-1][1]
    run.method.answer(run.ctx, prompts[-1:], run.views["NumGLUE-cm"])
    assert same(together, watched[-1][1])
    for tokens in (1, 100_000):
        monkeypatch.setattr(run.method, "tokens_per_forward", tokens)
        run.method.answer(run.ctx, prompts[-1:], run.views["NumGLUE-cm"])
        assert all(torch.allclose(together[name], weight, atol=1e-6) for name, weight in watched[-1][1].items())


def test_weights_come_back_after_an_error(run, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    before, training = copy_of(run), run.ctx.model.training
    monkeypatch.setattr(run.ctx, "generate", fail)
    with pytest.raises(RuntimeError):
        run.method.answer(run.ctx, ["x"], run.views["FOMC"])
    assert same(copy_of(run), before) and run.ctx.model.training == training


def test_loss_on_neighbours_falls_with_every_step(run, watched, monkeypatch):
    """On one prompt, 0 to 6 steps."""
    prompt = run.data.tasks["20Minuten"].test[0].prompt
    examples, before, losses = neighbours_of(run, prompt, "20Minuten"), copy_of(run), []
    for steps in range(7):
        monkeypatch.setattr(run.method, "steps", steps)
        run.method.answer(run.ctx, [prompt], run.views["20Minuten"])
        with torch.no_grad():
            for name, weight in run.ctx.trainable().items():
                weight.copy_(watched[-1][1][name])
            losses.append(float(loss_of(run, examples)))
        run.ctx.model.load_state_dict(before)
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_adaptation_draws_no_random_number(tmp_path):
    """Adapters have dropout; in eval mode it draws nothing, and the mode is as before afterwards."""
    run = run_tiny(tmp_path, ["method=mbpa", ORDER, "tuning=lora", "method.steps=1"])
    assert run.ctx.model.peft_config["default"].lora_dropout > 0
    run.ctx.model.train()
    before = torch.get_rng_state()
    run.method.answer(run.ctx, ["x"], run.views["FOMC"])
    assert torch.equal(torch.get_rng_state(), before) and run.ctx.model.training


def test_replay_is_sparse_and_of_earlier_tasks(run):
    """Rate 0.5 of 6 new rows: 3 a pass, from stage 2 on."""
    assert [stage["rows"] for stage in run.results["stages"]] == [6, 9, 9]
    for stage, task in enumerate(run.views, start=1):
        own = {row.prompt for row in run.data.tasks[task].train}
        earlier = {row.prompt for name in list(run.views)[: stage - 1] for row in run.data.tasks[name].train}
        replayed = run.trained_prompts[stage] - own
        assert replayed <= earlier and len(replayed) == (3 if stage > 1 else 0)


def test_at_least_one_row_is_replayed_at_the_papers_rate():
    """1 % of 500 rows is 5, of 6 rows 1; never more than is stored; none at rate 0."""
    method = LocalAdaptation(**{**GOOD, "replay_rate": 0.01, "write": 0.1})
    assert [method.rows_per_pass([500, 500], stage, 0) for stage in (1, 2)] == [500, 505]
    assert [method.rows_per_pass([6, 6], stage, 0) for stage in (1, 2)] == [6, 7]
    assert LocalAdaptation(**{**GOOD, "replay_rate": 1.0, "write": 0.1}).rows_per_pass([30, 50], 2, 0) == 53
    assert LocalAdaptation(**{**GOOD, "replay_rate": 0.0}).rows_per_pass([30, 50], 2, 0) == 50


def test_nothing_stored_or_no_steps_is_the_plain_model(run, watched, monkeypatch):
    view, prompts = run.views["FOMC"], ["a", "b"]
    empty = LocalAdaptation(**GOOD)
    assert empty.answer(run.ctx, prompts, view) == ["x", "x"]
    monkeypatch.setattr(run.method, "steps", 0)
    run.method.answer(run.ctx, prompts, view)
    assert [asked for asked, _ in watched] == [prompts, prompts]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("write", 0.0),
        ("write", 2.0),
        ("replay_rate", -0.1),
        ("replay_rate", 1.5),
        ("neighbours", 0),
        ("steps", -1),
        ("learning_rate", 0.0),
        ("strength", -1.0),
        ("tokens_per_forward", 0),
    ],
)
def test_bad_values_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"method.{key}={value}"):
        LocalAdaptation(**{**GOOD, key: value})


def test_yaml_holds_the_papers_values():
    method: Any = build.validate(compose_config(["model=tiny", "method=mbpa"])).method
    assert (method.neighbours, method.steps, method.strength, method.replay_rate) == (32, 30, 0.001, 0.01)
    assert method.grad_at_test
