"""Progressive Prompts: earlier prompts stay, stand behind the newer ones, and are there when answers are made."""

from unittest.mock import patch

import pytest
import torch
from conftest import run_tiny

from trace_hydra import build
from trace_hydra.errors import ConfigError
from trace_hydra.methods.pp import ProgressivePrompts, ResidualMLP
from trace_hydra.models import generate
from trace_hydra.models.prompts import virtual_tokens
from trace_hydra.train import state_mb

TASKS = ["FOMC", "NumGLUE-cm", "20Minuten"]
ORDER = f"task_order=[{','.join(TASKS)}]"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    kept = {}
    end = ProgressivePrompts.end_stage

    def watch(self, ctx):
        tokens = virtual_tokens(ctx.model)
        name = f"task_{ctx.stage.index}"
        kept[f"folded {ctx.stage.index}"] = tokens.vectors(name).detach().clone()
        kept[f"prefix {ctx.stage.index}"] = list(ctx.prefix)
        end(self, ctx)
        kept[ctx.stage.index] = {one: table.detach().clone() for one, table in tokens.tables.items()}

    with patch.object(ProgressivePrompts, "end_stage", watch):
        made = run_tiny(tmp_path_factory.mktemp("pp"), ["method=pp", ORDER, "method.prompt_length=3"])
    made.kept = kept
    return made


def test_one_prompt_a_task_and_earlier_ones_do_not_move(run):
    for stage in (1, 2, 3):
        assert list(run.kept[stage]) == [f"task_{number}" for number in range(1, stage + 1)]
    for stage in (2, 3):
        for name, table in run.kept[stage - 1].items():
            assert torch.equal(run.kept[stage][name], table)
    assert [names and {name.split(".")[3] for name in names} for names in run.trainable.values()] == [
        {"task_1"}, {"task_2"}, {"task_3"}
    ]  # fmt: skip


def test_the_newest_prompt_stands_first(run):
    """[P_3, P_2, P_1] with ids in the order in which tables came: 6-8, 3-5, 0-2 behind the vocabulary."""
    first = virtual_tokens(run.ctx.model).first
    places = [[one - first for one in run.kept[f"prefix {stage}"]] for stage in (1, 2, 3)]
    assert places == [[0, 1, 2], [3, 4, 5, 0, 1, 2], [6, 7, 8, 3, 4, 5, 0, 1, 2]]


def test_the_mlp_is_folded_and_thrown_away(run):
    for stage in (1, 2, 3):
        assert torch.equal(run.kept[stage][f"task_{stage}"], run.kept[f"folded {stage}"])
    assert not len(virtual_tokens(run.ctx.model).maps)


def test_the_residual_map_by_hand():
    """P + LayerNorm(W2 relu(W1 P + b1) + b2) with weights of 1: a constant row is normalised to 0, so P comes back."""
    block = ResidualMLP(4, 2)
    values = {name: torch.full_like(value, float("weight" in name)) for name, value in block.state_dict().items()}
    block.load_state_dict(values)
    table = torch.arange(8.0).view(2, 4)
    assert torch.equal(block(table), table)
    block.load_state_dict({**values, "layers.2.bias": torch.tensor([0.0, 0.0, 2.0, 2.0])})  # deviations -1 -1 1 1
    assert torch.allclose(block(table), table + torch.tensor([-1.0, -1.0, 1.0, 1.0]), atol=1e-4)


def prefixes(run, task, method=None):
    """Ids behind the vocabulary in what the model is given to answer a prompt of a task."""
    with patch.object(generate, "decode", wraps=generate.decode) as call:
        (method or run.method).answer(run.ctx, ["some prompt"], run.views[task])
    first = virtual_tokens(run.ctx.model).first
    ((_, (prompt,), *_), _) = call.call_args
    return [one - first for one in prompt if one >= first]


def test_a_row_is_answered_behind_the_prompts_up_to_its_task(run):
    assert prefixes(run, "FOMC") == [0, 1, 2]
    assert prefixes(run, "NumGLUE-cm") == [3, 4, 5, 0, 1, 2]
    assert prefixes(run, "20Minuten") == [6, 7, 8, 3, 4, 5, 0, 1, 2]


def test_without_task_identity_every_row_gets_all(run):
    blind = ProgressivePrompts(prompt_length=3, bottleneck=800, task_id=False)
    blind.load_state_dict(run.method.state_dict())
    assert not blind.sees_task_id and blind.cells == "all"
    assert prefixes(run, "FOMC", blind) == [6, 7, 8, 3, 4, 5, 0, 1, 2]


def test_row_0_is_the_models_own(run):
    fresh = ProgressivePrompts(prompt_length=3, bottleneck=800, task_id=True)
    assert prefixes(run, "FOMC", fresh) == []


def test_answers_of_a_task_never_change_after_its_stage(run):
    """So only the diagonal is scored, and it is disclosed that answers use the task's identity."""
    matrix = run.results["matrix"]
    assert matrix[3][0] == matrix[1][0] and matrix[3][1] == matrix[2][1] and run.results["bwt"] == 0
    assert run.results["disclosures"]["sees_task_id"] is True


def test_a_fresh_model_gets_the_prompts_of_the_state(run):
    parts = build.validate(run.config)
    model, before = parts.tuning.apply(parts.model.load()), run.ctx.model
    fresh = ProgressivePrompts(prompt_length=3, bottleneck=800, task_id=True)
    prompts = [example.prompt for example in run.views["20Minuten"].train]
    wanted = run.method.answer(run.ctx, prompts, run.views["20Minuten"])
    run.ctx.model = model
    try:
        fresh.setup(run.ctx)
        fresh.load_state_dict(run.method.state_dict())
        assert fresh.answer(run.ctx, prompts, run.views["20Minuten"]) == wanted
    finally:
        run.ctx.model = before


def test_stored_bytes_are_one_prompt_a_task(run):
    """3 tasks x 3 vectors x 32 numbers x 4 bytes, and the tasks' names as JSON."""
    tensors = {key: value for key, value in run.method.state_dict().items() if key != "tasks"}
    assert state_mb(tensors) == pytest.approx(3 * 3 * 32 * 4 / 1e6)


@pytest.mark.parametrize(("key", "value"), [("prompt_length", 0), ("bottleneck", -1)])
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"method.{key}={value}"):
        ProgressivePrompts(**{"prompt_length": 3, "bottleneck": 8, "task_id": True, key: value})
