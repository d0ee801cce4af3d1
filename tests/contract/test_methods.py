"""What every method must do, run over every file of conf/method."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALLER, compose_config, run_tiny, some
from omegaconf import OmegaConf

from trace_hydra import build
from trace_hydra.capability.subject import Subject
from trace_hydra.methods.base import Method
from trace_hydra.models.tuning import Frozen
from trace_hydra.targets import locate

METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
TASKS = ["FOMC", "NumGLUE-cm", "20Minuten"]


def settings(name: str) -> list[str]:
    return [f"method={name}", f"task_order=[{','.join(TASKS)}]", *SMALLER.get(name, ())]


def method_of(config) -> Method:
    return build.validate(config).method


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One tiny run of three stages per method, made when first asked for."""
    cache = {}

    def get(name: str):
        if name not in cache:
            cache[name] = run_tiny(tmp_path_factory.mktemp(name), settings(name))
        return cache[name]

    return get


@pytest.mark.parametrize("name", METHODS)
def test_three_stages_finish_with_finite_terms(name, runs):
    run = runs(name)
    assert run.results["complete"] and len(run.results["matrix"]) == 4
    assert all(value is not None and 0 <= value <= 100 for value in run.results["matrix"][3])
    for stage, terms in run.terms.items():
        assert set(run.method.terms) <= set(terms), f"stage {stage}"
        for term in run.method.terms:
            assert np.isfinite(terms[term]) and (stage == 1 or terms[term] != 0)


@pytest.mark.parametrize("name", METHODS)
def test_trainable_weights_are_those_of_the_tuning(name, runs):
    run = runs(name)
    frozen_model = isinstance(run.parts.tuning, Frozen)
    for names in run.trainable.values():
        assert bool(names) != frozen_model
        if run.parts.tuning.name == "lora":
            assert all("lora_" in one for one in names)


@pytest.mark.parametrize("name", METHODS)
def test_frozen_weights_are_bit_identical(name, runs):
    run = runs(name)
    before = run.weights_before  # a method may add weights later; those count as changed
    changed = {
        one for one, weight in run.weights_after.items() if one not in before or not torch.equal(weight, before[one])
    }
    ever_trainable = {one for names in run.trainable.values() for one in names}
    assert run.method.merges or changed <= ever_trainable
    assert bool(changed) == bool(ever_trainable)


@pytest.mark.parametrize("name", METHODS)
def test_no_test_row_and_no_undeclared_row_is_trained_on(name, runs):
    """Each stage trains on rows of its own task, of what the method kept from earlier ones, or of the alignment set."""
    run = runs(name)
    train = {task: {row.prompt for row in run.data.tasks[task].train} for task in TASKS}
    test = {row.prompt for task in TASKS for row in (*run.data.tasks[task].test, *run.data.tasks[task].eval)}
    alignment = {row.prompt for row in run.data.alignment}
    for stage, prompts in run.trained_prompts.items():
        assert not prompts & test
        seen = TASKS if run.method.sees_all_tasks else TASKS[:stage]
        assert prompts <= set().union(*(train[task] for task in seen)) | alignment
    # who trains on rows of earlier tasks has kept them, and says how many
    earlier = [prompts & train[task] for stage, prompts in run.trained_prompts.items() for task in TASKS[: stage - 1]]
    if not run.method.sees_all_tasks and any(earlier):
        assert run.method.num_stored_examples() >= len(set().union(*earlier))
    for made in run.made_prompts.values():
        assert not made & test and (run.method.makes_rows or not made)


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_same_seed_same_result(name, runs, tmp_path):
    again = run_tiny(tmp_path, settings(name))
    first = runs(name)
    assert again.results["matrix"] == first.results["matrix"]
    assert all(torch.equal(again.weights_after[one], weight) for one, weight in first.weights_after.items())


@pytest.mark.parametrize("name", METHODS)
def test_scoring_moves_no_training_randomness(name, runs, tmp_path):
    """Weights do not depend on which cells are scored, dropout included."""
    less = run_tiny(tmp_path, [*settings(name), "evaluation=diagonal_last"])
    first = runs(name)
    assert all(torch.equal(less.weights_after[one], weight) for one, weight in first.weights_after.items())


@pytest.mark.parametrize("name", METHODS)
def test_state_survives_the_disk(name, runs):
    """state_dict holds tensors and JSON values only, and a fresh method that loads it answers alike."""
    run = runs(name)
    state = run.method.state_dict()
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    plain = json.loads(json.dumps({key: value for key, value in state.items() if key not in tensors}))
    fresh = method_of(run.config)
    fresh.load_state_dict({**plain, **tensors})
    assert json.dumps(fresh.state_dict(), default=lambda one: one.tolist(), sort_keys=True) == json.dumps(
        state, default=lambda one: one.tolist(), sort_keys=True
    )
    prompts = [row.prompt for row in run.data.tasks[TASKS[0]].test]
    view = run.views[TASKS[0]]
    assert fresh.answer(run.ctx, prompts, view) == run.method.answer(run.ctx, prompts, view)


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_cut_after_any_stage_continues_to_the_same_matrix(name, stage, runs, tmp_path):
    """From weights and the method's state alone; also the weights of the last stage are the same, bit for bit."""
    whole = runs(name)
    rest = run_tiny(tmp_path, settings(name), cut=(stage, whole.snapshots[stage]))
    # answers that a row carries over from a task's own stage are made before the cut
    first = stage - 1 if whole.method.cells == "diagonal" else 0
    for row in range(stage, len(TASKS) + 1):
        assert rest.results["matrix"][row][first:] == whole.results["matrix"][row][first:]
    assert rest.weights_after.keys() == whole.weights_after.keys()
    assert all(torch.equal(weight, whole.weights_after[one]) for one, weight in rest.weights_after.items())


@pytest.mark.parametrize("name", METHODS)
def test_one_string_a_prompt_and_nothing_moves(name, runs):
    """Empty and long prompts are answered too; weights, random states and default dtype stay as they are."""
    run = runs(name)
    before = (random.getstate(), torch.get_rng_state(), torch.get_default_dtype())
    weights = {one: weight.clone() for one, weight in run.ctx.model.state_dict().items()}
    answers = run.method.answer(run.ctx, ["", "x", "word " * 2000], run.views[TASKS[1]])
    assert len(answers) == 3 and all(isinstance(answer, str) for answer in answers)
    assert random.getstate() == before[0] and torch.get_default_dtype() == before[2]
    if not run.method.grad_at_test:
        assert torch.equal(torch.get_rng_state(), before[1])
    assert all(torch.equal(weight, weights[one]) for one, weight in run.ctx.model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_prompts_of_no_task_are_served(name, runs):
    """For the capability sets: every prompt once, text and likelihoods of each, and the model as before afterwards."""
    run = runs(name)
    prompts = ["Say something.", "", "2 + 2 ="]
    subject = Subject(run.ctx, run.method)
    before = torch.get_rng_state()
    weights = {one: weight.clone() for one, weight in run.ctx.model.state_dict().items()}
    served = [index for indices, _ in run.method.serve(run.ctx, prompts) for index in indices]
    assert sorted(served) == [0, 1, 2]
    assert len(subject.generate(prompts, 2)) == 3
    ids = run.ctx.encoder.text_ids([" four"] * 3)
    likely = subject.log_likelihoods(prompts, [([1, 2], one) for one in ids])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weight, weights[one]) for one, weight in run.ctx.model.state_dict().items())
    assert all(np.isfinite(one.total) and one.total < 0 for one in likely)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-mixed", "float32"), pytest.param("bf16-true", "bfloat16", marks=pytest.mark.long)],
)
@pytest.mark.parametrize("name", some(METHODS, 2))
def test_bfloat16_works(name, precision, dtype, tmp_path):
    """bf16-mixed is the default on real weights; bf16 weights are what fits a 13B model."""
    run = run_tiny(tmp_path, [*settings(name), f"trainer.precision={precision}", f"model.dtype={dtype}"])
    assert run.results["complete"]
    assert all(run.terms[stage][term] != 0 for stage in run.terms if stage > 1 for term in run.method.terms)


@pytest.mark.parametrize("name", METHODS)
def test_unknown_keyword_is_refused(name):
    config = compose_config(["model=tiny", f"method={name}", "+method.no_such_key=1"])
    assert any("no_such_key" in problem for problem in build.problems_of(config))


@pytest.mark.parametrize("name", METHODS)
def test_nothing_that_changes_the_science_has_a_default_in_code(name):
    """Every keyword of a method's constructor stands in its yaml and has no default."""
    import inspect

    config = compose_config([f"method={name}"])
    signature = inspect.signature(locate(config.method._target_))
    for keyword in signature.parameters.values():
        if keyword.kind is inspect.Parameter.KEYWORD_ONLY:
            assert keyword.default is inspect.Parameter.empty and keyword.name in config.method
        assert keyword.kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", METHODS)
def test_module_docstring_is_a_contract_with_the_literature(name):
    target = OmegaConf.to_container(compose_config([f"method={name}"]).method)["_target_"]  # type: ignore[index, call-overload]
    source = (ROOT / Path(*target.split(".")[:-1]).with_suffix(".py")).read_text(encoding="utf-8")
    head = source.split('"""')[1]
    assert "arXiv:" in head and "->" in head and "Differs from official TRACE" in head and "Memory" in head


@pytest.mark.parametrize(("tuning", "part"), [("lora", "lora_"), ("prompt", "embed_tokens.")])
@pytest.mark.parametrize("name", some(METHODS, 2))
def test_other_tunings_work_with_every_method_that_allows_them(name, tuning, part, tmp_path):
    """Only adapters or prompts train and the model itself stays; or the tuning is refused before anything loads."""
    config = compose_config([f"method={name}", "model=tiny"])
    method = locate(config.method._target_)
    if method.tunings is not None and tuning not in method.tunings:
        problems = build.problems_of(compose_config([f"method={name}", "model=tiny", f"tuning={tuning}"]))
        assert any(f"tuning={tuning}" in problem and "Use tuning=" in problem for problem in problems)
        assert method.tuning_reason
        return
    run = run_tiny(tmp_path, [*settings(name), f"tuning={tuning}"])
    assert run.results["complete"] and all(part in one for names in run.trainable.values() for one in names)
    base = {one: weight for one, weight in run.weights_before.items() if part not in one}
    assert base and (
        run.method.merges or all(torch.equal(run.weights_after[one], weight) for one, weight in base.items())
    )
