"""What each method does, shown on the tiny model with numbers made by hand."""

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import compose_config, run_tiny

from trace_hydra import build
from trace_hydra.data.task import Example
from trace_hydra.methods.memory import ExampleMemory, kept_rows

ORDER = "task_order=[FOMC,NumGLUE-cm,20Minuten]"


def rows(count: int, name: str = "train") -> list[Example]:
    return [Example(f"{name}-{number}", f"prompt {number}", str(number)) for number in range(count)]


@pytest.mark.parametrize(
    ("count", "fraction", "kept"), [(500, 0.1, 50), (6, 0.1, 1), (7, 0.5, 4), (3, 1.0, 3), (1, 0.01, 1)]
)
def test_kept_rows_are_the_share_rounded_up(count, fraction, kept):
    assert kept_rows(count, fraction) == kept


def test_memory_is_a_seeded_sample_and_not_the_head():
    """10 of 100 rows: two seeds differ, and over 50 seeds the first row is kept about 5 times, not always."""
    memory = ExampleMemory()
    firsts = 0
    for seed in range(50):
        memory.keep("a", rows(100), 0.1, Random(seed))
        firsts += "train-0" in {row.id for row in memory.examples()}
        assert len(memory) == 10 and len(set(memory.examples())) == 10
    assert 0 < firsts < 15


def test_replay_mixes_or_follows():
    """Three stages of 6 rows, half of each kept: mixed sees 6, 9, 12 rows; after has a second phase of 3, then 6."""
    seen = {}
    for when in ("mixed", "after"):
        config = compose_config(
            ["model=tiny", "method=replay", f"method.when={when}", "method.fraction=0.5", "method.alignment=false"]
        )
        method = build.validate(config).method

        ctx: Any = SimpleNamespace(rng=Random(0), alignment=(), epochs_of=lambda task: 2)
        sizes = []
        for name in ("a", "b", "c"):
            ctx.task = SimpleNamespace(name=name, train=tuple(rows(6, name)))
            sizes.append([(phase.name, len(phase.examples), phase.epochs) for phase in method.phases(ctx)])
            method.end_stage(ctx)
        seen[when] = sizes
    assert seen["mixed"] == [[("task", 6, 2)], [("task", 9, 2)], [("task", 12, 2)]]
    assert seen["after"] == [[("task", 6, 2)], [("task", 6, 2), ("replay", 3, 1)], [("task", 6, 2), ("replay", 6, 1)]]


def test_replay_takes_alignment_rows_from_the_first_stage(tmp_path):
    """Official: after task 1 the replay phase holds LIMA only (training/replay.py)."""
    run = run_tiny(tmp_path, ["method=replay", "method.when=after", ORDER])
    alignment = {row.prompt for row in run.data.alignment}
    assert alignment and alignment <= run.trained_prompts[1]


def test_replay_plan_counts_what_is_trained(tmp_path):
    """6 rows a task, 1 of 6 kept (10 % rounded up), 24 alignment rows: 30, 31, 32 rows a pass."""
    run = run_tiny(tmp_path, ["method=replay", ORDER])
    alignment = len(run.data.alignment)
    assert [stage["rows"] for stage in run.results["stages"]] == [6 + alignment, 7 + alignment, 8 + alignment]


def test_single_task_starts_every_stage_from_the_start_weights(tmp_path):
    """The last task alone gives the same weights as the last stage of three, seeded alike by its stage number."""
    run = run_tiny(tmp_path, ["method=single_task", ORDER])
    other = run_tiny(tmp_path / "b", ["method=single_task", "task_order=[NumGLUE-cm,FOMC,20Minuten]"])
    assert all(torch.equal(weight, other.weights_after[name]) for name, weight in run.weights_after.items())
    assert run.results["bwt"] == 0.0 and run.results["carried"] == {"2,FOMC": 1, "3,FOMC": 1, "3,NumGLUE-cm": 2}
    assert run.results["disclosures"]["sees_task_id"] is True


def test_multitask_has_one_row_and_no_bwt(tmp_path):
    run = run_tiny(tmp_path, ["method=multitask", ORDER])
    matrix = run.results["matrix"]
    assert [value is None for row in matrix[1:3] for value in row] == [True] * 6 and None not in matrix[3]
    assert run.results["op"] == pytest.approx(sum(matrix[3]) / 3)
    assert run.results["bwt"] is None and "R[1,FOMC]" in run.results["missing"]["bwt"]
    assert run.trained_prompts.keys() == {3}


def test_multitask_repeats_each_task_by_its_epochs(tmp_path):
    run = run_tiny(tmp_path, ["method=multitask", ORDER, "+budget.epochs.FOMC=3"])
    (phase,) = run.method.phases(run.ctx)
    counts = {name: sum(row in set(task.train) for row in phase.examples) for name, task in run.data.tasks.items()}
    assert counts == {"FOMC": 18, "NumGLUE-cm": 6, "20Minuten": 6} and phase.epochs == 1


@pytest.mark.parametrize(("order", "last"), [("NumGLUE-cm,FOMC", "FOMC"), ("FOMC,NumGLUE-cm", "NumGLUE-cm")])
def test_icl_shows_train_rows_and_never_the_query(order, last, tmp_path):
    """At most two a label for letters, different answers elsewhere, none from test (as the official code does).

    A stage keeps nothing of the others: the last one's demonstrations are what is left.
    """
    run = run_tiny(tmp_path, ["method=icl", f"task_order=[{order}]", "data.rows.train=30"])
    ((task, shown),) = run.method.chosen.items()
    assert task == last and 0 < len(shown) <= 6
    assert set(shown) <= set(run.data.tasks[task].train)
    answers = [row.answer for row in shown]
    assert max(map(answers.count, answers)) <= (2 if task == "FOMC" else 1)
    assert task != "FOMC" or len(shown) == 6


def test_icl_prompt_layout(tmp_path):
    """Instruction, announcement, demonstrations (body, answer, blank line), query (section 2.4 of inference/ICL.py)."""
    settings = ["method.demonstrations=2", "method.max_prompt_tokens=2000"]
    run = run_tiny(tmp_path, ["method=icl", "task_order=[NumGLUE-cm,FOMC]", *settings])
    asked = []
    run.ctx.generate = lambda prompts, limit, **_: asked.extend(prompts) or ["A\n\nText: more"] * len(prompts)
    view, test = run.views["FOMC"], run.data.tasks["FOMC"].test
    answers = run.method.answer(run.ctx, [row.prompt for row in test], view)
    one, two = run.method.chosen["FOMC"]

    def body(row):
        return row.prompt.removeprefix(view.instruction)

    head = view.instruction + run.config.method.announcement
    assert asked[0] == f"{head}{body(one)}{one.answer}\n\n{body(two)}{two.answer}\n\n{body(test[0])}"
    assert answers == ["A"] * len(test)


def test_icl_before_a_tasks_stage_is_zero_shot(tmp_path):
    """Row 0 has no demonstrations, so it equals the untouched model's row 0."""
    icl = run_tiny(tmp_path / "a", ["method=icl", ORDER])
    plain = run_tiny(tmp_path / "b", ["method=seqft", ORDER])
    assert icl.results["matrix"][0] == plain.results["matrix"][0]


def test_lora_trains_one_adapter_with_traces_values(tmp_path):
    """r 8, alpha 32, dropout 0.1, q and v (training/main.py:286-295): scale 4, 4 matrices a layer."""
    run = run_tiny(tmp_path, ["method=lora", ORDER])
    config = run.ctx.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 32, 0.1)
    assert set(config.target_modules) == {"q_proj", "v_proj"} and list(run.ctx.model.peft_config) == ["default"]
    assert len(run.trainable[1]) == 2 * 2 * run.ctx.model.config.num_hidden_layers
    assert run.trainable[1] == run.trainable[2] == run.trainable[3]


def test_what_a_method_costs_is_in_the_results(tmp_path):
    """Replay keeps 1 row of 6 a task (10 % rounded up): 1, 2, 3 rows; all weights train; seqft keeps nothing."""
    replay = run_tiny(tmp_path / "a", ["method=replay", "method.alignment=false", ORDER])
    efforts = [stage["effort"] for stage in replay.results["stages"]]
    assert [effort["stored_examples"] for effort in efforts] == [1, 2, 3]
    weights = sum(weight.numel() for weight in replay.ctx.model.parameters())
    assert all(effort["trainable_params"] == weights and effort["seconds"] > 0 for effort in efforts)
    assert 0 < efforts[0]["state_mb"] < efforts[2]["state_mb"] < 0.01
    assert all(
        effort["step_ratio"] == effort["seconds"] / effort["steps"] / effort["plain_step_s"] > 0 for effort in efforts
    )
    assert [effort["steps"] for effort in efforts] == [stage["steps"] for stage in replay.results["stages"]]
    plain = run_tiny(tmp_path / "b", ["method=seqft", ORDER])
    assert [stage["effort"]["state_mb"] for stage in plain.results["stages"]] == [0, 0, 0]


def test_single_task_keeps_the_start_weights_in_memory_alone(tmp_path):
    """`setup` copies them anew in every process, so no stage stores them."""
    run = run_tiny(tmp_path, ["method=single_task", ORDER])
    assert run.results["stages"][0]["effort"]["state_mb"] == 0
    assert sum(weight.numel() for weight in run.method.start.values()) == sum(
        weight.numel() for weight in run.ctx.model.parameters()
    )
