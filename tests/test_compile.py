"""trainer.compile: the same training within rounding, few compilations, and clear words where it cannot be."""

import shutil
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from conftest import compose_config, run_tiny

from trace_hydra import build
from trace_hydra.errors import ConfigError
from trace_hydra.models import compiled
from trace_hydra.resume import StageCheckpoints

ONE = [
    "task_order=[FOMC]", "budget.batch_size=4", "budget.micro_batch_size=2", "data.rows.train=16",
    "protocol.max_prompt_tokens=600",
]  # fmt: skip
COMPILED = ["trainer.compile=true"]
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler on the PATH"
)


def problems(*overrides: str) -> str:
    return "\n".join(build.problems_of(compose_config(["model=tiny", "data=mini", "logger=none", *overrides])))


def apart(one, other) -> float:
    return max(float((weight - other.weights_after[name]).abs().max()) for name, weight in one.weights_after.items())


def moved(run) -> float:
    return max(float((weight - run.weights_before[name]).abs().max()) for name, weight in run.weights_after.items())


@contextmanager
def counted():
    """How many graphs were compiled inside."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize(("method", "graphs"), [("seqft", 6), ("lora", 10)])
def test_training_is_the_same_within_rounding_and_compiles_little(tmp_path, method, graphs):
    """fp32: sums in another order. AdamW divides by a gradient's size, so that rounding of small ones shows: up to 0.01
    of what weights move.
    """
    shapes, settings = set(), [f"method={method}"]
    call = compiled._Call.__call__

    def watch(self, hidden, *rest, **keywords):
        shapes.add((tuple(hidden.shape), self._layer.training))
        return call(self, hidden, *rest, **keywords)

    eager = run_tiny(tmp_path / "eager", [*ONE, *settings])
    with counted() as counters, patch.object(compiled._Call, "__call__", watch):
        run = run_tiny(tmp_path / "compiled", [*ONE, *settings, *COMPILED])
        stats = dict(counters["stats"])
    assert len({shape for shape, trains in shapes if trains}) >= 4  # widths and heights of micro-batches
    # A trial; a layer's code before and behind attention, for single rows and for more; and that again behind a frozen
    # embedding, whose output has no gradient.
    assert 2 <= stats["unique_graphs"] <= graphs
    assert run.terms[1]["lm"] == pytest.approx(eager.terms[1]["lm"], rel=1e-4)  # of all steps
    assert 0 < apart(eager, run) < 0.01 * moved(eager)
    assert run.results["stages"] != [] and run.weights_after.keys() == eager.weights_after.keys()


@needs_compiler
@pytest.mark.long
def test_bf16_autocast_and_lora(tmp_path):
    settings = [*ONE, "method=lora", "trainer.precision=bf16-mixed"]
    eager = run_tiny(tmp_path / "eager", settings)
    with counted() as counters:
        run = run_tiny(tmp_path / "compiled", [*settings, *COMPILED])
        assert 2 <= counters["stats"]["unique_graphs"] <= 9
    assert run.terms[1]["lm"] == pytest.approx(eager.terms[1]["lm"], rel=1e-2)


@needs_compiler
@pytest.mark.slow
def test_a_method_that_watches_layers_still_sees_them(tmp_path):
    """migu hooks linear layers from stage 2 on, when the layers were compiled before."""
    settings = ["task_order=[FOMC,NumGLUE-cm]", "method=migu"]
    eager = run_tiny(tmp_path / "eager", settings)
    with counted():
        run = run_tiny(tmp_path / "compiled", [*settings, *COMPILED])
    assert apart(eager, run) < 0.01 * moved(eager)


class Killed(BaseException):
    """Nothing catches it."""


@needs_compiler
@pytest.mark.long
def test_a_killed_run_goes_on(tmp_path):
    settings = [*ONE, *COMPILED, "checkpoint.every_steps=1", "budget.default_epochs=2", "budget.epochs={}"]
    save, saved = StageCheckpoints.save, []

    def save_and_die(self, lightning):
        save(self, lightning)
        saved.append(1)
        if len(saved) == 3:
            raise Killed

    with counted():
        whole = run_tiny(tmp_path / "whole", settings)
    with counted(), patch.object(StageCheckpoints, "save", save_and_die), pytest.raises(Killed):
        run_tiny(tmp_path / "killed", settings)
    with counted():  # as in a new process: everything is compiled again
        again = run_tiny(tmp_path / "killed", settings)
    assert apart(whole, again) < 1e-3 * moved(whole)


def test_what_does_not_train_is_not_compiled(monkeypatch):
    """Answers have a cache and no gradients; a layer with a hook is left alone."""
    ran = []
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: lambda *given, **named: ran.append(1) or function(*given)
    )
    layer = torch.nn.Linear(2, 2)
    layer._compiled_call_impl = compiled._Call(layer)
    given = torch.ones(1, 2)
    layer(given)
    with torch.no_grad():
        layer(given)
    layer.eval()(given)
    assert ran == [1]
    heard = []
    handle = layer.train().register_forward_hook(lambda *_: heard.append(1))
    layer(given)
    handle.remove()
    assert ran == [1] and heard == [1]
    layer(given)
    assert ran == [1, 1]


def test_no_compiler_is_named(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert "trainer.compile=true needs a C++ compiler, and there is no g++ or clang++" in problems(*COMPILED)
    monkeypatch.setenv("CXX", "my-compiler")
    assert "there is no my-compiler" in problems(*COMPILED)
    assert "compiler" not in problems("trainer.compile=false")


def test_other_values_are_named():
    assert "trainer.compile='often' must be true or false" in problems("trainer.compile=often")


def test_recomputed_activations_are_refused():
    """torch.compile leaves such layers as they are, without a word."""
    asked = problems("model.gradient_checkpointing=true", *COMPILED)
    assert "trainer.compile=true with model.gradient_checkpointing=true" in asked


def test_split_weights_are_refused():
    assert "trainer.compile=true with trainer.strategy=fsdp" in problems("trainer=fsdp", *COMPILED)


def test_a_compiler_that_fails_is_named(monkeypatch):
    def fail(function, **_):
        def call(*given):
            raise RuntimeError("\n  Python.h: No such file\nmore")

        return call

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(ConfigError, match=r"does not work here: Python\.h: No such file\. Install a C\+\+ compiler"):
        compiled.compile_layers(torch.nn.Linear(2, 2), torch.device("cpu"))
