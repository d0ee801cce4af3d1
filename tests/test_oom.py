"""Memory runs out: an error with the numbers, or smaller micro-batches from that stage on, as if they had been set."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, compose_config, run_tiny

from trace_hydra import memory
from trace_hydra.errors import MethodError
from trace_hydra.live import Live
from trace_hydra.memory import OutOfMemory, smaller
from trace_hydra.methods.base import Method
from trace_hydra.models.tiny import Tiny
from trace_hydra.run import run

LIMIT = SimpleNamespace(rows=4, stage=1, where="losses", error=torch.OutOfMemoryError)
"""Rows of a micro-batch that fit, from which stage on, which hook runs out, and how that is told."""
CPU = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."
TOLD = {
    torch.OutOfMemoryError: "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines of advice.",
    RuntimeError: CPU,
    MemoryError: "",
}


class Hungry(Method):
    """Plain fine-tuning that needs more memory than there is, as `LIMIT` says."""

    def _eat(self, ctx, where, rows):
        if where == LIMIT.where and ctx.stage.index >= LIMIT.stage and rows > LIMIT.rows:
            raise LIMIT.error(TOLD[LIMIT.error])

    def begin_stage(self, ctx):
        self._eat(ctx, "begin_stage", 9)

    def losses(self, ctx, batch):
        self._eat(ctx, "losses", len(batch["input_ids"]))
        return super().losses(ctx, batch)

    def end_stage(self, ctx):
        self._eat(ctx, "end_stage", 9)

    def answer(self, ctx, prompts, task):
        self._eat(ctx, "answer", 9)
        return super().answer(ctx, prompts, task)


SETTINGS = [
    "method=seqft", "method._target_=test_oom.Hungry", "trust.targets=[test_oom.]", "budget.batch_size=4",
    "task_order=[FOMC,NumGLUE-cm,20Minuten]", "budget.epochs={}", "budget.default_epochs=2", "evaluation=diagonal_last",
]  # fmt: skip
FOUR, TWO = ([*SETTINGS, f"budget.micro_batch_size={rows}"] for rows in (4, 2))


@pytest.fixture(autouse=True)
def limit():
    before = vars(LIMIT).copy()
    yield
    vars(LIMIT).update(before)


def keys(run):
    return [stage["key"] for stage in run.results["stages"]]


def sizes(run):
    return [stage["micro_batch_size"] for stage in run.results["stages"]]


@pytest.mark.parametrize("error", TOLD, ids=lambda error: error.__name__)
def test_stop_names_stage_sizes_and_what_to_set(error, tmp_path):
    """20Minuten's rows are cut at 128 + 16 tokens; stage 2 comes first, with shorter ones."""
    vars(LIMIT).update(rows=2, stage=2, error=error)
    with pytest.raises(OutOfMemory) as caught:
        run_tiny(tmp_path, FOUR)
    message = str(caught.value)
    told = (TOLD[error].splitlines() or ["MemoryError"])[0].rstrip(".")
    for part in ("stage 2 (NumGLUE-cm), phase 'task', step 1", "a micro-batch of 4 rows", "the last of 4 x ", told,
                 "budget.micro_batch_size=2", "the step stays 4 rows", "on_oom=halve"):  # fmt: skip
        assert part in message
    assert "advice" not in message and (caught.value.stage, caught.value.size) == (2, 4)
    assert len(list((tmp_path / "store" / "stages").iterdir())) == 1  # the same command goes on from there


@pytest.mark.parametrize("error", TOLD, ids=lambda error: error.__name__)
def test_halving_in_the_first_stage_gives_the_bytes_of_smaller_micro_batches(error, tmp_path, caplog):
    vars(LIMIT).update(rows=2, error=error)
    halved = run_tiny(tmp_path / "halved", [*FOUR, "on_oom=halve"])
    small = run_tiny(tmp_path / "small", TWO)
    assert sizes(halved) == sizes(small) == [2, 2, 2] and keys(halved) == keys(small)
    assert halved.results["matrix"] == small.results["matrix"]
    for key in keys(small):
        one, other = (folder / "store" / "stages" / key / "weights.safetensors"
                      for folder in (tmp_path / "halved", tmp_path / "small"))  # fmt: skip
        assert one.read_bytes() == other.read_bytes()
    assert "From stage 1 on, the micro-batch is 2 rows" in caplog.text


def test_halving_later_keeps_the_stages_before(tmp_path, monkeypatch):
    """Stage 1 is trained once, with 4 rows; from stage 2 on, keys and report say 2. A second start trains nothing."""
    vars(LIMIT).update(rows=2, stage=2)
    trained, publish = [], Live._publish
    watch = lambda live, stage, effort: (trained.append((stage.index, stage.micro_batch)), publish(live, stage, effort))  # noqa: E731
    monkeypatch.setattr(Live, "_publish", watch)
    ran = run_tiny(tmp_path, [*FOUR, "on_oom=halve"])
    assert trained == [(1, 0), (2, 2), (3, 2)] and sizes(ran) == [4, 2, 2]
    assert "Rows of a micro-batch: FOMC 4, NumGLUE-cm 2, 20Minuten 2." in (ran.directory / "report.md").read_text()
    stored = {path.name for path in (tmp_path / "store" / "stages").iterdir()}
    assert stored == set(keys(ran)) and ran.results["complete"]
    again = run_tiny(tmp_path, [*FOUR, "on_oom=halve"])
    assert keys(again) == keys(ran) and again.results["matrix"] == ran.results["matrix"] and len(trained) == 3


def test_halving_goes_on_down_to_one_row_and_then_stops(tmp_path, caplog):
    LIMIT.rows = 1
    ran = run_tiny(tmp_path / "one", [*FOUR, "on_oom=halve"])
    assert sizes(ran) == [1, 1, 1] and caplog.text.count("memory ran out") == 2
    LIMIT.rows = 0
    with pytest.raises(
        OutOfMemory, match=r"micro-batch of 1 rows.*The micro-batch is one row.*protocol\.max_prompt_tokens"
    ):
        run_tiny(tmp_path / "none", [*FOUR, "on_oom=halve"])


@pytest.mark.parametrize(
    ("settings", "loads"), [([*FOUR, "on_oom=halve"], 2), (["method=single_task", *FOUR[3:]], 3)], ids=["oom", "apart"]
)
def test_a_model_is_gone_before_the_next_is_loaded(settings, loads, tmp_path, monkeypatch):
    """One model at a time; with callbacks, which must not hold it either. `single_task` loads one for each stage."""
    LIMIT.rows = 2
    loaded, gone, load = [], [], Tiny.load

    def watch(model):
        gone.append([one() is None for one in loaded])
        found = load(model)
        loaded.append(weakref.ref(found.get_input_embeddings().weight))
        return found

    monkeypatch.setattr(Tiny, "load", watch)
    small = [one for one in TINY if not one.startswith("callbacks")] + ["data.rows.train=6", "data.rows.test=3"]
    places = [f"paths.runs={tmp_path}", f"paths.store={tmp_path / 'store'}"]
    (tmp_path / "run").mkdir()
    run(compose_config([*small, *places, *settings]), tmp_path / "run")
    assert gone == [[True] * number for number in range(loads)]


@pytest.mark.parametrize(
    ("where", "parts"),
    [
        ("begin_stage", ["stage 2 (NumGLUE-cm), before training", "debug=cost"]),
        ("end_stage", ["stage 2 (NumGLUE-cm), after the last step", "tuning=lora"]),
        ("answer", ["row 2, NumGLUE-cm, answering", "Lower evaluation.batch_tokens="]),
    ],
)
def test_memory_that_runs_out_elsewhere_is_named_and_not_halved(where, parts, tmp_path):
    """A smaller micro-batch would not help there."""
    vars(LIMIT).update(where=where, stage=2)
    with pytest.raises(MethodError) as caught:
        run_tiny(tmp_path, [*FOUR, "on_oom=halve"])
    assert not isinstance(caught.value, OutOfMemory)
    for part in (*parts, "memory ran out", "Tried to allocate 2.00 GiB"):
        assert part in str(caught.value)


def test_other_errors_pass_through(tmp_path, monkeypatch):
    monkeypatch.setitem(TOLD, RuntimeError, "mat1 and mat2 shapes cannot be multiplied")
    vars(LIMIT).update(rows=2, error=RuntimeError)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_tiny(tmp_path, [*FOUR, "on_oom=halve"])


@pytest.mark.parametrize(
    "text", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x", CPU]
)
def test_what_libraries_say_of_memory_is_known(text):
    assert memory.is_out_of_memory(RuntimeError(text)) and not memory.is_out_of_memory(ValueError("memory"))


@pytest.mark.parametrize(
    ("batch", "size", "expected"),
    [(8, 8, 4), (8, 2, 1), (6, 6, 3), (6, 3, 1), (12, 12, 6), (12, 6, 3), (9, 9, 3), (4, 1, 1)],
)
def test_halves_divide_the_batch(batch, size, expected):
    """The largest divisor of the batch that is at most half."""
    assert smaller(batch, size) == expected
