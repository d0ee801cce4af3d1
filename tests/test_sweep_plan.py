"""The plan of a sweep: the same keys as the runs have, and nothing read or counted twice."""

from pathlib import Path

import pytest
from conftest import TINY, compose_config

from trace_hydra import build, sweep
from trace_hydra.data.encode import Encoder
from trace_hydra.data.mini import MiniData
from trace_hydra.inputs import resolved
from trace_hydra.models.tiny import Tiny
from trace_hydra.prepare import prepare

SMALL = [*TINY, "data.rows.train=4", "data.rows.test=2", "task_order=[FOMC,Py150]"]


def job(folder: Path, number: int, overrides: list[str], *, plain: bool = True) -> sweep.Job:
    config = compose_config([*SMALL, f"paths.store={folder}/store", *overrides])
    return sweep.Job(number, tuple(overrides), folder / str(number), resolved(config) if plain else config)


JOBS = [
    ["method=seqft"], ["method=ewc", "tuning=lora", "seed=1"], ["method=replay", "seed.data=5"],
    ["method=icl", "tuning=frozen"],
    ["method=seqft", "protocol=official", "protocol.max_prompt_tokens=128", "seed.generation=3"],
    ["method=olora", "tuning=frozen", "+budget.epochs.FOMC=2"], ["trainer.precision=bf16-mixed", "evaluation=all"],
    ["method=lfpt5", "data.seed=7"], ["budget.micro_batch_size=1", "optim.optimizer.lr=0.5"],
]  # fmt: skip


def test_keys_of_a_plan_are_those_of_the_run(tmp_path):
    """Planned together, from plain values or from what was composed: fingerprint aside, all that `prepare` says."""
    wanted = {}
    for number, overrides in enumerate(JOBS):
        config = job(tmp_path, number, overrides, plain=False).config
        try:
            run = prepare(config, build.validate(config), tmp_path / str(number)).run  # type: ignore[arg-type]
        except build.ConfigError as error:
            wanted[number] = str(error)
            continue
        wanted[number] = ([stage.key for stage in run.stages], list(run.answers.values()))
    for plain in (True, False):
        plans = sweep.plan_jobs([job(tmp_path, number, one, plain=plain) for number, one in enumerate(JOBS)])
        found = {
            one.number: one.problem or ([piece.key for piece in one.stages], [piece.key for piece in one.cells])
            for one in plans
        }
        assert found == wanted
    assert sum(isinstance(one, tuple) for one in wanted.values()) >= 6


def test_two_hundred_jobs_read_rows_and_tokenise_once(tmp_path, monkeypatch):
    """20 jobs or 200: rows are made once, the tokenizer is loaded once, and each text is tokenised once."""
    calls: dict[str, int] = {}

    def counted(owner, name):
        inner = getattr(owner, name)

        def count(*args, **given):
            calls[name] = calls.get(name, 0) + 1
            return inner(*args, **given)

        monkeypatch.setattr(owner, name, count)

    for owner, name in (
        (MiniData, "load"),
        (Tiny, "load_tokenizer"),
        (Encoder, "text_ids"),
        (Tiny, "identity"),
    ):
        counted(owner, name)
    base = resolved(job(tmp_path, 0, ["method=seqft"]).config)
    found = []
    for count in (20, 200):
        calls.clear()
        jobs = [
            sweep.Job(number, (), tmp_path / str(number), {**base, "seed": dict.fromkeys(base["seed"], number)})
            for number in range(count)
        ]
        plans = sweep.plan_jobs(jobs)
        assert all(len(plan.stages) == 2 and plan.to_run for plan in plans)
        assert len({plan.stages[0].key for plan in plans}) == count
        found.append(dict(calls))
    assert found[0] == found[1]
    assert found[0]["load"] == found[0]["load_tokenizer"] == found[0]["identity"] == 1


def test_a_configuration_that_cannot_be_resolved_is_a_problem_of_its_job(tmp_path):
    bad = job(tmp_path, 0, ["seed.train=${nowhere}"], plain=False)
    missing = sweep.Job(1, (), tmp_path / "1", {**resolved(job(tmp_path, 1, []).config), "on_oom": "???"})
    plans = sweep.plan_jobs([bad, missing, job(tmp_path, 2, [])])
    assert "nowhere" in str(plans[0].problem) and "on_oom" in str(plans[1].problem) and plans[2].to_run


@pytest.mark.parametrize("given", [(), ("trust.targets=[mine.]",)])
def test_trust_is_asked_of_the_command_line(given, tmp_path):
    plain = dict(job(tmp_path, 0, []).config)
    plan = sweep.plan_jobs([sweep.Job(0, given, tmp_path / "0", {**plain, "trust": {"targets": ["mine."]}})])[0]
    assert ("trust.targets" in str(plan.problem)) == (not given)
