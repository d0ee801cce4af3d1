"""Two processes give what one gives: rows of each step, losses, weights, answers; and the same keys in the store."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from processes import SETTINGS, codes, said, start
from safetensors.torch import load_file

SEVERAL = str(Path(__file__).with_name("several.py"))
LORA = ["tuning=lora", "tuning.dropout=0.0"]
RUNS = {
    "seqft": ["trainer=ddp", "method=seqft", "optim.carry=true", "capability=smoke"],
    "ewc": ["trainer=ddp", "method=ewc", "protocol.closed_answers=log_likelihood"],
    "replay": ["trainer=ddp", "method=replay"],
    "olora": ["trainer=ddp", "method=olora", *LORA],
    "gem": ["trainer=ddp", "method=gem", *LORA],
    "l2p": ["trainer=ddp", "method=l2p"],  # each row trains the soft prompts it chooses
    "migu": ["trainer=ddp", "method=migu"],  # picks neurons by what all rows of a step do to them
    "sharded": ["trainer=fsdp", "method=seqft", "optim.carry=true"],
    "sharded_replay": ["trainer=fsdp", "method=replay"],
    "sharded_lwf": ["trainer=fsdp", "method=lwf", *LORA],
    "sharded_prompt": ["trainer=fsdp", "method=seqft", "tuning=prompt"],
    "zero": ["trainer=deepspeed", "method=seqft", "optim.carry=true"],
    "zero_replay": ["trainer=deepspeed", "method=replay"],
    "zero_lwf": ["trainer=deepspeed", "method=lwf", *LORA],
    "zero_recomputed": ["trainer=deepspeed", "method=seqft", "model.gradient_checkpointing=true"],
    "zero_rcl": ["trainer=deepspeed", "method=rcl"],
    "zero_wise": ["trainer=deepspeed", "method=wise"],
    "zero_multitask": ["trainer=deepspeed", "method=multitask"],
    "zero_prompt": ["trainer=deepspeed", "method=seqft", "tuning=prompt"],
}
WITH_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
ZERO = [name for name in RUNS if name.startswith("zero")]


SHORT = ["seqft", "ewc", "sharded"]
FLOAT = ["trainer.precision=32-true", "trainer.accelerator=cpu"]


def steps(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def entries(folder: Path, kind: str) -> dict[str, Path]:
    return {path.name: path for path in (folder / "store" / kind).iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        SHORT,
        pytest.param([name for name in RUNS if name not in (*SHORT, *ZERO)], marks=pytest.mark.long),
        # DeepSpeed keeps the groups of a process's first run, so each has processes of its own.
        pytest.param(ZERO[:1], marks=WITH_DEEPSPEED),
        *(pytest.param([name], marks=[WITH_DEEPSPEED, pytest.mark.long]) for name in ZERO[1:]),
    ],
)
def test_two_processes_are_as_one(names, tmp_path):
    """Every run by one process and by two, started once for all of them."""
    one, two = tmp_path / "one", tmp_path / "two"
    single = [
        f"{name}={';'.join([*SETTINGS, *(each for each in RUNS[name] if not each.startswith('trainer=')), *FLOAT])}"
        for name in names
    ]
    shared = [f"{name}={';'.join([*SETTINGS, *RUNS[name], *FLOAT])}" for name in names]
    one.mkdir()
    two.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = subprocess.Popen([sys.executable, SEVERAL, str(one), *single], env=environment)
    processes = start([SEVERAL, str(two), *shared], two)
    assert codes([*processes, alone], 500) == [0, 0, 0], said(two)
    for name in names:
        check_training(one / name, two / name)
        check_answers(one / name, two / name)


def check_training(one: Path, two: Path) -> None:
    assert [step["rows"] for step in steps(one)] == [step["rows"] for step in steps(two)]
    losses = [torch.tensor([step["loss"] for step in steps(folder)]) for folder in (one, two)]
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-4, atol=2e-5)
    stages = entries(one, "stages"), entries(two, "stages")
    assert stages[0].keys() == stages[1].keys() and len(stages[0]) == 2
    for key in stages[0]:
        for file in ("weights.safetensors", "state.safetensors"):
            first, second = (load_file(found[key] / file) for found in stages)
            assert first.keys() == second.keys()
            for tensor in first:
                torch.testing.assert_close(
                    first[tensor], second[tensor], rtol=1e-3, atol=2e-4, msg=lambda m, t=tensor: f"{t}: {m}"
                )


def read_records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_answers(one: Path, two: Path) -> None:
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    assert results[0]["matrix"] == results[1]["matrix"]
    assert results[0]["tokens"]["evaluate"] == results[1]["tokens"]["evaluate"]
    for path in sorted(one.glob("predictions/**/*.jsonl")):
        records = [read_records(folder / path.relative_to(one)) for folder in (one, two)]
        chosen, others = ([record.pop("log_likelihoods", {}) for record in part] for part in records)
        assert records[0] == records[1]
        for mine, theirs in zip(chosen, others, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)  # nats, in fp32 from weights that differ by rounding
    for path in sorted(one.glob("capability/**/*.jsonl")):
        assert len(path.read_text().splitlines()) == len((two / path.relative_to(one)).read_text().splitlines())
