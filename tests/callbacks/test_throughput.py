"""Means and speeds by hand, and the steps of a real Trainer."""

from types import SimpleNamespace

import pytest
import torch
from doubles import Clock, Recorder, two_tasks
from lightning.pytorch import LightningModule, Trainer

from trace_hydra.callbacks.throughput import ThroughputCallback
from trace_hydra.plan import Effort
from trace_hydra.readings import Readings


@pytest.fixture
def run_info(tmp_path):
    return two_tasks(tmp_path)


@pytest.fixture
def recorder():
    return Recorder()


class Module:
    """Measures what it is told."""

    def __init__(self):
        self.readings, self.reads, self.tokens_seen = Readings(), 0, 0

    def step(self, tokens, **terms):
        self.last_tokens = tokens
        self.tokens_seen += 2 * tokens  # of two processes
        self.readings.begin("step", [])
        self.readings.add({name: torch.tensor(value) for name, value in terms.items()}, 1.0)

    def read(self):
        self.reads += 1
        assert not self.readings.read()


def test_means_over_steps_and_tokens_over_time(run_info, recorder):
    """Two steps, one log, one reading. lm 2 and 4: mean 3; ewc 0.5 and 0.5: 0.5; loss 3.5.

    30 + 50 tokens on each of 2 devices in 4 s: 40 tokens/s.
    """
    clock = Clock()
    callback = ThroughputCallback(every_n_steps=2, clock=clock)
    callback.on_run_start(run_info, [recorder])
    callback.on_stage_start(run_info.stages[0])
    trainer = SimpleNamespace(global_step=0, world_size=2)
    callback.on_train_start(trainer, None)
    module = Module()
    for lm, tokens in ((2.0, 30), (4.0, 50)):
        clock.now += 2.0
        module.step(tokens, lm=lm, ewc=0.5)
        callback.on_train_batch_end(trainer, module, None, None, 0)
    callback.on_train_end(trainer, module)
    expected = {
        "train/loss": 3.5,
        "train/loss/lm": 3.0,
        "train/loss/ewc": 0.5,
        "train/tokens_per_s": 40.0,
        "progress/step": 2,
        "progress/tokens": 160,
        "progress/stage": 1,
    }
    ((metrics, step),) = recorder.entries
    assert metrics.pop("train/host_memory_gb") > 0
    assert metrics == pytest.approx(expected) and step == 2 and module.reads == 1


class Toy(LightningModule):
    """Loss = the batch's only number; one parameter."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.readings = Readings()
        self.tokens_seen = 0

    def training_step(self, batch, index):
        self.last_tokens = batch.numel()
        self.tokens_seen += 5
        self.readings.begin("step", [])
        self.readings.add({"lm": batch.sum()}, 1.0)
        return (self.weight * batch).sum()

    def read(self):
        self.readings.read()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
def test_steps_go_on_over_phases_of_a_real_trainer(run_info, recorder, tmp_path):
    """Losses 1, 2, 3; a log every 2 steps and at the end.

    First phase: mean of 1 and 2 = 1.5 at step 2, then 3 at step 3. Second phase goes on: 1.5 at step 5, 3 at step 6.
    """
    callback = ThroughputCallback(every_n_steps=2)
    callback.on_run_start(run_info, [recorder])
    for stage in run_info.stages:
        callback.on_stage_start(stage)
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        rows = [torch.tensor([float(value)]) for value in range(1, 4)]
        trainer.fit(Toy(), torch.utils.data.DataLoader(rows, batch_size=None))  # type: ignore[arg-type]
        callback.on_stage_end(stage, Effort(15, trainer.global_step, 1.0, 1, 0.0, 0))
    losses = [entry for entry, _ in recorder.entries if "train/loss" in entry]
    seen = [(entry["progress/step"], entry["progress/stage"], entry["train/loss"]) for entry in losses]
    assert seen == [(2, 1, 1.5), (3, 1, 3.0), (5, 2, 1.5), (6, 2, 3.0)]
    assert [entry["progress/tokens"] for entry in losses] == [10, 15, 25, 30]  # 5 a step, 15 a stage


def test_tokens_go_on_behind_a_stage_from_the_store(run_info, recorder):
    """Stage 1 was not trained here and cost 100 tokens, stage 2 is taken up 30 tokens in: its next 50 end at 180."""
    callback = ThroughputCallback(every_n_steps=1)
    callback.on_run_start(run_info, [recorder])
    callback.on_stage_start(run_info.stages[0])
    callback.on_stage_end(run_info.stages[0], Effort(100, 2, 1.0, 1, 0.0, 0))
    callback.on_stage_start(run_info.stages[1])
    module = Module()
    module.tokens_seen = 30
    callback.on_train_start(SimpleNamespace(global_step=1, world_size=2), module)
    module.step(25, lm=1.0)
    callback.on_train_batch_end(SimpleNamespace(world_size=2), module, None, None, 0)
    assert recorder.entries[-1][0]["progress/tokens"] == 180 and recorder.entries[-1][0]["progress/step"] == 4
