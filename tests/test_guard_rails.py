"""What keeps runs fast, counted instead of timed: padding, logits, waits for the device, answers."""

import json
from collections import Counter
from unittest.mock import patch

import pytest
from conftest import compose_config, run_tiny
from torch.utils._python_dispatch import TorchDispatchMode

from trace_hydra import context, readings
from trace_hydra.data.batches import TrainBatches
from trace_hydra.data.encode import Encoder
from trace_hydra.data.mini import KINDS
from trace_hydra.stage import StageModule
from trace_hydra.targets import instantiate

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"}
"""Operators whose result a program needs on the host: on a GPU each waits for the device."""
TASKS = list(KINDS)


def useful(rows, batch_size: int, micro: int) -> float:
    """Tokens of a pass over tokens with padding."""
    batches = TrainBatches(rows, batch_size=batch_size, micro_batch_size=micro, seed="0")
    dealt = [one for step in batches for one in step]
    return sum(one["num_tokens"] for one in dealt) / sum(one["input_ids"].numel() for one in dealt)


@pytest.mark.parametrize("task", TASKS)
def test_at_most_8_percent_is_padding_in_generated_rows(task):
    """The goal for every task; 512 rows in steps of 16, as bytes (the tiny tokenizer)."""
    config = compose_config(["model=tiny", "data.rows.train=512", f"task_order=[{task}]"])
    encoder = Encoder.of(instantiate(config.model).load_tokenizer(), config.protocol)
    task_data = instantiate(config.data).load([task], seed=0).tasks[task]
    assert useful(encoder.pairs(task_data.train, task_data.instruction), 16, 16) >= 0.92


@pytest.mark.parametrize("task", TASKS)
def test_at_most_8_percent_is_padding_in_rows_of_the_release(task, shared_data):
    """200 rows, bytes as tokens. Steps of 16 leave twelve lengths to sort by, so they go in two micro-batches each."""
    rows = json.loads((shared_data / "trace" / task / "train.json").read_text())
    config = compose_config(["model=tiny", "data=trace", f"paths.data={shared_data / 'trace'}", f"task_order=[{task}]"])
    encoder = Encoder.of(instantiate(config.model).load_tokenizer(), config.protocol)
    task_data = instantiate(config.data).load([task], seed=0).tasks[task]
    assert len(task_data.train) == len(rows) == 200
    assert useful(encoder.pairs(task_data.train, task_data.instruction), 16, 8) >= 0.92


def test_logits_are_computed_where_labels_are(tmp_path):
    """Rows that go through the output layer in training are the labels of the rows trained on, no more."""
    seen, losses = Counter(), StageModule._loss

    def watch(module, batch):
        seen["labels"] += int((batch["labels"] != -100).sum())
        layer = module.model.get_output_embeddings()
        handle = layer.register_forward_hook(lambda _, given, out: seen.update(rows=out[..., 0].numel()))
        try:
            return losses(module, batch)
        finally:
            handle.remove()

    with patch.object(StageModule, "_loss", watch):
        run_tiny(tmp_path, ["task_order=[FOMC,ScienceQA]"])
    assert seen["rows"] == seen["labels"] > 0


class Waits(TorchDispatchMode):
    """Counts operators that wait."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in WAITS:
            self.count[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("every", "readings_"), [(1, 6), (3, 2)])
def test_plain_training_waits_once_a_log(every, readings_, tmp_path):
    """6 steps of 4 rows in micro-batches of 2, clipped; a log every step, or every third."""
    waits, fetches, fetch = Waits(), [], readings._fetch
    start, end = StageModule.on_train_start, StageModule.on_train_end

    def watch_start(module):
        start(module)
        waits.__enter__()

    def watch_end(module):
        waits.__exit__(None, None, None)
        end(module)

    def watch_fetch(steps):
        fetches.append(sum(len(step.waiting) for step in steps))
        fetch(steps)

    callback = f"{{_target_: trace_hydra.callbacks.throughput.ThroughputCallback, every_n_steps: {every}}}"
    with (
        patch.object(StageModule, "on_train_start", watch_start),
        patch.object(StageModule, "on_train_end", watch_end),
        patch.object(readings, "_fetch", watch_fetch),
    ):
        run_tiny(
            tmp_path,
            [
                "task_order=[FOMC]", "data.rows.train=24", "budget.batch_size=4", "budget.micro_batch_size=2",
                "optim.clip_norm=1", f"+callbacks.throughput={callback}",
            ],
        )  # fmt: skip
    assert waits.count == {}
    assert len([count for count in fetches if count]) == readings_


def test_answers_are_given_once_for_each_cell_and_row(tmp_path):
    """3 tasks of 3 rows: row 0 three cells, then 2, 3, 3 (each task once before its stage): 11 cells, 33 answers.

    The same run again, and a longer one that begins alike, generate only what is new.
    """
    asked, generate = Counter(), context.StageContext.generate

    def watch(ctx, prompts, *arguments, **keywords):
        asked.update((ctx.stage.key, prompt) for prompt in prompts)
        return generate(ctx, prompts, *arguments, **keywords)

    with patch.object(context.StageContext, "generate", watch):
        run = run_tiny(tmp_path, ["task_order=[FOMC,NumGLUE-cm,Py150]"])
        assert len(run.results["cells"]) == 11 and sum(asked.values()) == 33
        run_tiny(tmp_path, ["task_order=[FOMC,NumGLUE-cm,Py150]"])
        assert sum(asked.values()) == 33
        run_tiny(tmp_path, ["task_order=[FOMC,NumGLUE-cm,Py150,ScienceQA]"])
    assert set(asked.values()) == {1}
