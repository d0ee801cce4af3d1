"""trainer=deepspeed: what is refused, what DeepSpeed is told, and, where it is installed, runs of two processes."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, compose_config
from processes import codes, said, start

from trace_hydra import build, zero
from trace_hydra.strategies import Zero, build_trainer

CPU = ["model=tiny", "trainer=deepspeed", "trainer.precision=32-true", "trainer.accelerator=cpu", "capability=none"]
OWN = {
    "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
    "steps_per_print": None,
}  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)


@pytest.fixture
def installed(launched, monkeypatch):
    monkeypatch.setattr(zero, "find_spec", lambda name: ModuleSpec(name, None))


def found(*overrides: str) -> str:
    return "\n".join(build.problems_of(compose_config([*CPU, *overrides])))


def test_the_preset_is_taken(installed):
    assert found() == ""
    assert found("trainer.precision=bf16-mixed", "tuning=lora", "method=lwf") == ""


def test_without_the_package_it_says_how_to_install_it(launched, monkeypatch):
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    assert found() == f"trainer.strategy=deepspeed needs the package deepspeed: {zero.INSTALL}."
    assert "no such argument" not in found("trainer=ddp")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.deepspeed.zero_optimization.stage=2"], "zero_optimization.stage=2 must be 3"),
        (["+trainer.deepspeed.bf16.enabled=true"], "trainer.deepspeed.bf16: not taken"),
        (["+trainer.deepspeed.gradient_clipping=2"], "trainer.deepspeed.gradient_clipping: not taken"),
        (
            ["+trainer.deepspeed.zero_optimization.zero_quantized_gradients=true"],
            "zero_quantized_gradients=True: not supported",
        ),
        (["trainer.precision=bf16-true"], "trainer.precision=bf16-true with trainer.strategy=deepspeed"),
        (["trainer.precision=16-mixed"], "trainer.precision=16-mixed with trainer.strategy=deepspeed"),
        (["model.dtype=bfloat16", "tuning=lora"], "model.dtype=bfloat16 with trainer.strategy=deepspeed"),
        (["optim.optimizer._target_=torch.optim.Adafactor"], "it must treat every number of a weight alone"),
        (["on_oom=halve"], "on_oom=halve with trainer.strategy=deepspeed"),
        (["method=ewc"], "method=ewc with trainer.strategy=deepspeed"),
        (["trainer=auto", "+trainer.strategy=deepspeed"], "zero_optimization.stage=None must be 3"),
        (["+trainer.deepseed=1"], "deepseed"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_would_change_a_step_is_refused(overrides, said, installed):
    assert said in found(*overrides)


def test_one_process_without_a_launcher_is_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert "trainer.strategy=deepspeed needs a process for each device" in found()


class Told:
    """Stands for DeepSpeed where only what it is told matters."""

    def __init__(self):
        self.configs: list[dict] = []
        self.zero = SimpleNamespace(Init=lambda module, config_dict_or_path, dtype: self.note(config_dict_or_path))

    def note(self, config):
        self.configs.append(config)

    def init_distributed(self, dist_init_required):
        assert dist_init_required is False  # the run's own group is used

    def initialize(self, *, config, **_):
        self.note(config)
        return SimpleNamespace(optimizer=SimpleNamespace(fp32_partitioned_groups_flat=[])), None, None, None


def test_deepspeed_is_told_what_the_file_says_and_nothing_else(installed, monkeypatch):
    """Clipping is the run's; a micro-batch's share is in its loss, so DeepSpeed must not scale by their number."""
    shipped = yaml.safe_load((ROOT / "conf" / "trainer" / "deepspeed.yaml").read_text())["deepspeed"]
    monkeypatch.setitem(sys.modules, "deepspeed", told := Told())
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    strategy = build_trainer(build.validate(compose_config(CPU)).trainer).strategy
    assert isinstance(strategy, Zero) and strategy.config == shipped
    model = torch.nn.Linear(2, 2)
    config = zero.engine_config(strategy.config, 1.0)
    zero.Engine(model, torch.optim.AdamW(model.parameters()), config, torch.device("cpu"))
    assert told.configs == [{**shipped, **OWN}] * 2
    assert shipped["zero_optimization"]["stage"] == 3
    assert zero.engine_config(shipped, None) == {**shipped, **OWN, "gradient_clipping": 0.0}


def test_a_part_of_a_state_is_padded_with_zeros(monkeypatch):
    """Ten numbers over four processes make parts of three; the last has one number."""
    weight = SimpleNamespace(ds_tensor=torch.empty(3))
    parts = []
    for rank in range(4):
        monkeypatch.setattr(zero.ranks, "rank", lambda rank=rank: rank)
        parts.append(zero._part(torch.arange(10.0).view(2, 5), weight).tolist())
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 0, 0]]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_steps_of_two_processes_are_those_of_one(tmp_path):
    """Shares of micro-batches, clipping, a weight out of reach, a dropped step, a state that is taken up again."""
    processes = start([str(Path(__file__).with_name("zero_steps.py")), str(tmp_path)], tmp_path)
    assert codes(processes) == [0, 0], said(tmp_path)
    for rank in range(2):
        split, plain = torch.load(tmp_path / f"steps{rank}.pt")
        assert (plain["norms"] > 0.05).all()  # each step is clipped
        torch.testing.assert_close(split, plain, rtol=1e-5, atol=1e-6)
