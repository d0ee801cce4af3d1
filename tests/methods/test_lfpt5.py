"""LFPT5 by hand: whose words pseudo rows are, the three losses and their weights, what trains, what a cut run needs."""

import copy
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from lfpt5_run import TASKS, watched

from trace_hydra import train
from trace_hydra.data.task import Example
from trace_hydra.methods.distill import batch_of
from trace_hydra.models.generate import Generated
from trace_hydra.models.prompts import virtual_tokens
from trace_hydra.sizes import RunSize


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run with everything that the tests below look at, left as it ended."""
    begun, checked = {}, []

    def at_begin(method, ctx):
        begun[ctx.stage.index] = SimpleNamespace(
            pseudo=list(method.pseudo),
            drafts=dict(method.drafts),
            targets=dict(method.targets),
            model=copy.deepcopy(ctx.model).eval(),
        )

    def at_loss(method, ctx, batch, terms):
        checked.append(
            SimpleNamespace(
                stage=ctx.stage.index,
                model=copy.deepcopy(ctx.model).eval(),
                batch=batch,
                terms={name: term.item() for name, term in terms.items()},
            )
        )

    overrides = ["method.top_k=null", "budget.default_epochs=2"]
    run = watched(tmp_path_factory.mktemp("lfpt5"), overrides, at_begin, at_loss)
    run.begun, run.checked = begun, checked
    return run


def rewritten(run, number=0):
    """What the method writes of a task from the model as it is, with the same draws every time."""
    run.ctx.enter(run.ctx.stage, run.ctx.task)
    return run.method.write_rows(run.ctx, number)


def log_probs(model, ids):
    """Next-token log-probabilities of one unpadded row: (length, vocab), float64."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


# pseudo rows


def test_pseudo_rows_join_the_task_and_are_no_rows_of_the_data(run):
    """Half of 6 rows is 3 of each earlier task: 0, 3 and 6; each begins with its task's instruction."""
    data = {row.prompt for task in run.data.tasks.values() for row in (*task.train, *task.eval, *task.test)}
    assert [len(run.begun[stage].pseudo) for stage in (1, 2, 3)] == [0, 3, 6]
    for stage in (1, 2, 3):
        made = run.begun[stage].pseudo
        assert run.made_prompts[stage] == {row.prompt for row in made} and not run.made_prompts[stage] & data
        assert run.trained_prompts[stage] == {row.prompt for row in run.data.tasks[TASKS[stage - 1]].train}
        names = [name for name in TASKS[: stage - 1] for _ in range(3)]
        assert [row.id.rsplit("-", 1)[0] for row in made] == [f"pseudo-{name}" for name in names]
        for row, name in zip(made, names, strict=True):
            head = run.views[name].instruction
            assert head and row.prompt.startswith(head) and len(row.prompt) > len(head) and row.answer
    first = {row.prompt for row in run.begun[2].pseudo}
    assert not first & {row.prompt for row in run.begun[3].pseudo}  # another prompt and another draw wrote these


def test_answers_are_the_previous_prompts_greedy_ones(run):
    """Token by token with the model where stage 2 begins: the likeliest token, up to the longest trained answer."""
    limit = max(len(row.answer.encode()) for row in run.data.tasks["FOMC"].train) + 1
    assert run.method.answer_tokens[0] == limit
    for row in run.begun[2].pseudo:
        (ids,), _ = run.ctx.encoder.prompts([row.prompt], run.views["FOMC"].instruction)
        ids, new = [*run.ctx.prefix, *ids], []
        while len(new) < limit and (not new or new[-1] != run.ctx.encoder.end_id):
            new.append(int(log_probs(run.begun[2].model, [*ids, *new])[-1].argmax()))
        assert row.answer == run.ctx.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_pseudo_rows_come_from_prompt_and_generation_token(run):
    """The same draws write the same rows; another prompt, or another token of this task, writes others.

    Another task's token writes the same.
    """
    tables = virtual_tokens(run.ctx.model).tables
    assert tables["default"].shape == (4, 32) and tables["generation"].shape == (3, 32)
    before = rewritten(run)
    assert before and rewritten(run) == before
    for name, row, same in (("default", 0, False), ("generation", 0, False), ("generation", 1, True)):
        kept = tables[name].detach().clone()
        with torch.no_grad():
            tables[name][row] += 5 * torch.randn(32, generator=torch.Generator().manual_seed(1))
        assert (rewritten(run) == before) is same, name
        with torch.no_grad():
            tables[name].copy_(kept)
    assert rewritten(run) == before


def test_all_of_a_prompt_is_sampled_without_instruction(run, monkeypatch):
    monkeypatch.setattr(run.method, "instruction", False)
    made = rewritten(run)
    assert made and not any(row.prompt.startswith(run.views["FOMC"].instruction) for row in made)


def test_writing_moves_nothing(run):
    """Neither global randomness nor mode, gradients, weights or the record of generated answers."""
    state, count = torch.get_rng_state(), len(run.ctx.generated)
    weights = {name: weight.clone() for name, weight in run.ctx.model.state_dict().items()}
    for mode in (True, False):
        run.ctx.model.train(mode)
        rewritten(run)
        assert run.ctx.model.training is mode
    assert torch.equal(torch.get_rng_state(), state) and len(run.ctx.generated) == count
    assert all(torch.equal(weight, weights[name]) for name, weight in run.ctx.model.state_dict().items())


def test_how_the_run_decodes_and_scores_changes_no_weight(run, tmp_path):
    overrides = [
        "protocol.decoding.max_new_tokens=2",
        "protocol.decoding.do_sample=true",
        "evaluation.batch_tokens=300",
    ]
    other = watched(tmp_path, ["method.top_k=null", "budget.default_epochs=2", *overrides])
    assert other.made_prompts == run.made_prompts
    for name, weight in run.weights_after.items():  # the record's passes are dealt out by batch_tokens: rounding
        assert torch.allclose(other.weights_after[name], weight, atol=1e-4), name


def written(texts):
    """Stand in for `generate`: gives prepared texts, in the order asked for."""
    left = list(texts)

    def generate(model, tokenizer, prompts, **settings):
        return [Generated(left.pop(0), len(ids), 1, True) for ids in prompts]

    return generate


def test_empty_and_repeated_ones_drop_out(run):
    """Three prompts: one twice, one blank; so one is asked. Then two that differ, one of them without an answer."""
    head = run.views["FOMC"].instruction
    with patch.object(run.ctx.engine, "generate", written(["a", "a", " \n", "B"])):
        assert rewritten(run) == [Example("pseudo-FOMC-0", f"{head}a", "B")]
    with patch.object(run.ctx.engine, "generate", written(["a", "b", "b", " ", "C"])):
        assert rewritten(run) == [Example("pseudo-FOMC-1", f"{head}b", "C")]
    with patch.object(run.ctx.engine, "generate", written(["", "", ""])):
        assert rewritten(run) == []


# losses


def test_generation_loss_by_an_independent_log_likelihood(run):
    """-log p(prompt, end | P, G) of each row alone, in float64, then 0.1 times the mean over all tokens of the batch.

    A prompt of more than 40 tokens (the tiny model reads bytes) is learned as its first and last 20.
    """
    table = virtual_tokens(run.ctx.model)
    first = table.ids("generation")[0]
    assert run.ctx.prefix == list(range(table.first, table.first + 4)) and first == table.first + 4
    seen = set()
    for one in run.checked:
        prompts = {row.id: (row.prompt, one.stage - 1) for row in run.data.tasks[TASKS[one.stage - 1]].train}
        for row in run.begun[one.stage].pseudo:
            prompts[row.id] = (row.prompt, TASKS.index(row.id.split("-", 1)[1].rsplit("-", 1)[0]))
        values = []
        for name in one.batch["example_ids"]:
            prompt, number = prompts[name]
            (tokens,) = run.ctx.encoder.text_ids([prompt])
            if len(tokens) > 40:
                tokens = [*tokens[:20], *tokens[-20:]]
            start, tokens = [*run.ctx.prefix, first + number], [*tokens, run.ctx.encoder.end_id]
            scores = log_probs(one.model, [*start, *tokens])
            values += [-scores[len(start) - 1 + place, token].item() for place, token in enumerate(tokens)]
            seen.add((one.stage, number, len(tokens) == 41))
        assert one.terms["generation"] == pytest.approx(0.1 * sum(values) / len(values), rel=1e-4)
    assert {(stage, number) for stage, number, _ in seen} == {(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)}
    assert (3, 2, True) in seen


def test_task_and_kl_loss_by_a_teacher_kept_in_memory(run):
    """A copy of the model where the stage begins, token by token in float64; KL at answers of pseudo rows alone."""
    largest = 0.0
    for one in run.checked:
        losses, distances = [], []
        for row, name in enumerate(one.batch["example_ids"]):
            length = int(one.batch["attention_mask"][row].sum())
            ids, labels = one.batch["input_ids"][row, :length].tolist(), one.batch["labels"][row, :length].tolist()
            assert ids[:4] == list(run.ctx.prefix)
            student, teacher = log_probs(one.model, ids), log_probs(run.begun[one.stage].model, ids)
            for place, label in enumerate(labels):
                if label != -100:
                    losses.append(-student[place - 1, label].item())
                    p, q = teacher[place - 1], student[place - 1]
                    distances += [(p.exp() * (p - q)).sum().item()] if name.startswith("pseudo-") else []
        assert one.terms["lm"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        expected = 0.04 * sum(distances) / len(distances) if distances else 0.0
        assert one.terms["kl"] == pytest.approx(expected, rel=0.02, abs=1e-6)
        assert bool(distances) == any(name.startswith("pseudo-") for name in one.batch["example_ids"])
        largest = max(largest, expected)
    assert largest > 1e-4  # a hundred times the tolerance


def test_kl_is_zero_while_the_prompt_is_the_previous_one(run):
    """No optimizer step has been taken in the first two micro-batches of a stage; only fp16 rounding is left."""
    for stage in (2, 3):
        values = [one.terms["kl"] for one in run.checked if one.stage == stage]
        assert max(map(abs, values[:2])) < 1e-6 and max(values[2:]) > 1e-5


# what trains, and what goes on


def test_only_the_two_tables_train_and_tokens_of_later_tasks_wait(run):
    """All else is bit-identical; before stage k the tokens of tasks k, k + 1, .. are as `setup` made them."""
    tables = {f"model.embed_tokens.tables.{name}" for name in ("default", "generation")}
    assert all(names == tables for names in run.trainable.values())
    before = {name.replace("embed_tokens.embedding", "embed_tokens"): one for name, one in run.weights_before.items()}
    for name, weight in run.weights_after.items():
        if name not in tables:
            assert torch.equal(weight, before[name.replace("embed_tokens.embedding", "embed_tokens")]), name
    values = [virtual_tokens(run.begun[stage].model).tables for stage in (1, 2, 3)]
    values.append(virtual_tokens(run.ctx.model).tables)
    for stage in (1, 2, 3):
        earlier, later = values[stage - 1], values[stage]
        assert not torch.equal(earlier["default"], later["default"])
        moved = (earlier["generation"] != later["generation"]).any(1).tolist()
        assert moved == [row < stage for row in range(3)]


def test_no_row_is_kept_and_sizes_are_as_planned(run):
    """Rows and longest answers only: 6 rows a task. The plan knows average answers, so a digit may be missing.

    Stage 3 holds the most: 6 pseudo rows' records and 12 drafts of at most 4 + 1 + 40 + 1 tokens, nearly all as long.
    """
    method = run.method
    state = method.state_dict()
    assert set(state) == {"rows", "answer_tokens"} and state["rows"] == [6, 6, 6]
    assert method.pseudo == [] and method.drafts == {} and method.targets == {} and method.num_stored_examples() == 0
    made = [[row for row in run.ctx.encode(run.begun[3].pseudo) if name in row.example_id] for name in TASKS[:2]]
    answers = [sum(len(row.ids) - row.num_prompt for row in rows) / len(rows) for rows in made]
    plain = {**dict.fromkeys(RunSize.__dataclass_fields__, 0), "weights": {"prompt": (4, 32)}, "trainable": {"prompt"}}
    size = RunSize(**{**plain, "rows": [6] * 3, "answer_tokens": [*answers, 9], "width": 32, "vocabulary": 259})
    found = method.state_size(size)
    assert found.stored == pytest.approx(1e6 * train.state_mb(state), rel=0.05)
    assert found.trained == sum(weight.numel() for weight in run.ctx.trainable().values()) == 7 * 32
    begun = run.begun[3]
    records = sum(one.log_probs.numel() * one.log_probs.element_size() for one in begun.targets.values())
    assert records and len(begun.drafts) == 12
    assert found.host == pytest.approx(records + sum(one.ids.nbytes for one in begun.drafts.values()), rel=0.1)
    method.top_k = 64  # 388 bytes a token, as test_lwf counts them
    record = sum(len(one.log_probs) for one in begun.targets.values()) * 388
    assert method.state_size(size).host == pytest.approx(found.host - records + record)
    method.top_k = None


def test_a_draft_carries_its_prompt_and_end_alone(run):
    """5 ids before it (4 of the prompt, 1 generation token) are no labels."""
    draft = run.begun[1].drafts["train-0"]
    batch = batch_of([draft], "cpu")
    assert draft.num_prompt == 5 and (batch["labels"][0, :5] == -100).all() and (batch["labels"][0, 5:] >= 0).all()
    assert batch["labels"][0, -1] == run.ctx.encoder.end_id
