"""Fixtures that many tests share."""

import functools
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of third-party sample rows beside the checkout; tests that need it are skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("third-party sample data (../shared/data) is not beside this checkout")
    return folder


MODELS = Path(os.environ.get("TRACE_HYDRA_STORE", Path.home() / ".cache" / "trace_hydra")) / "models"
"""Base models that were converted once; all that tests share with the user's store."""


def make_store(folder: Path) -> Path:
    MODELS.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "models").symlink_to(MODELS)
    return folder


def pytest_configure(config):
    """Fixtures of wider scope than a test share a store of the session."""
    config.session_store = tempfile.mkdtemp(prefix="trace_hydra-tests-")
    os.environ["TRACE_HYDRA_STORE"] = str(make_store(Path(config.session_store) / "store"))


def pytest_unconfigure(config):
    shutil.rmtree(config.session_store, ignore_errors=True)


@pytest.fixture(autouse=True)
def own_store(tmp_path_factory, monkeypatch):
    """Each test has a store of its own."""
    store = make_store(tmp_path_factory.mktemp("tests") / "store")
    monkeypatch.setenv("TRACE_HYDRA_STORE", str(store))
    return store


@pytest.fixture
def run_info(tmp_path):
    """A run of two tasks whose every cell is to be scored."""
    from dataclasses import replace

    from doubles import two_tasks
    from logger_doubles import SCORES

    config = {"budget": {"epochs": {"My.Task": 2}}, "method": {"name": "plain"}}
    return replace(two_tasks(tmp_path), config=config, cells=tuple((row, task, 2) for row, task in SCORES))


@pytest.fixture
def no_account(tmp_path_factory, monkeypatch):
    """A home without a key, wandb as freshly started; both again afterwards."""
    import wandb

    home = tmp_path_factory.mktemp("home")
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    for name, value in (("HOME", home), ("NETRC", home / "netrc"), ("WANDB_CONFIG_DIR", home), ("WANDB_DIR", home)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(home)
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


@pytest.fixture
def account(no_account):
    """A key, and little patience."""
    from logger_doubles import KEY

    from trace_hydra import wandb_link

    no_account.setenv("WANDB_API_KEY", KEY)
    no_account.setattr(wandb_link, "PATIENCE_S", 1.5)
    return no_account


def compose_config(overrides: list[str]):
    """Compose like the command line does, without running anything.

    Tests differ in folders more often than in anything else, so what is composed is kept without them.
    """
    from omegaconf import OmegaConf

    kept, folders = [], {}
    for override in overrides:
        name, _, value = override.partition("=")
        if name in ("paths.runs", "paths.store") and re.fullmatch(r"[\w./-]+", value):
            folders[name] = value
        else:
            kept.append(override)
    config = pickle.loads(_composed(tuple(kept)))
    for name, value in folders.items():
        OmegaConf.update(config, name, value)
    return config


@functools.cache
def _composed(overrides: tuple[str, ...]) -> bytes:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from trace_hydra import entry, schema

    GlobalHydra.instance().clear()
    schema.register()
    entry.register_resolvers()
    search = f"hydra.searchpath=[file://{ROOT}/multirun_templates]"
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        return pickle.dumps(
            compose(config_name="config", overrides=[search, *entry.rewrite_overrides(list(overrides))])
        )


@functools.cache
def method_node(name: str):
    """Compose a method's part of the configuration, once a process: tests are collected by it."""
    return compose_config([f"method={name}"]).method


TINY = [
    "debug=smoke",
    "logger=none",
    "callbacks=none",
    "evaluation.bootstrap_samples=10",
    "capability=none",
]


def some(names: Iterable[str], every: int) -> list:
    """Parameters of which every so-manieth is run by `make test`, and the others with the tests marked `long`."""
    return [pytest.param(name, marks=() if at % every == 0 else pytest.mark.long) for at, name in enumerate(names)]


SMALLER = {
    "mbpa": ["method.steps=2", "method.neighbours=3"],
    "lfpt5": ["method.draft_tokens=16", "method.prompt_length=20"],
}
"""Settings of methods that take long by default, for tests whose point is not their size."""


@pytest.fixture(scope="session", autouse=True)
def found_once():
    """Lightning looks through all installed packages for callbacks, for each Trainer; here once."""
    from unittest.mock import patch

    from lightning.fabric.utilities.registry import _load_external_callbacks

    name = "lightning.pytorch.trainer.connectors.callback_connector._load_external_callbacks"
    with patch(name, functools.cache(_load_external_callbacks)):
        yield


@pytest.fixture(scope="session", autouse=True)
def unsynced():
    """No wait for the disk in this process: that outlasts a crash of the machine, and no test crashes it."""
    from unittest.mock import patch

    with patch("os.fsync"):
        yield


def run_tiny(directory: Path, overrides: list[str], cut=None):
    """Run the main path in this process on the tiny model and watch what happens inside.

    Args:
        directory: For run directories.
        overrides: Of the command line.
        cut: (stage, snapshot) of another run: stages up to that one are not trained; a freshly loaded model takes the
            weights that it has by name, a fresh method its state, and training goes on.

    Returns:
        A namespace: results, run directory, config, parts, method, ctx, data, views, terms by stage (largest
        magnitude), trainable names by stage, prompts trained on by stage (those of rows with an id that begins with
        "pseudo-" apart, in made_prompts), weights before the first and after the last stage, and after each stage a
        snapshot: weights, the method's tensors, its other state as JSON; and the learning rate at each stage's end.
    """
    import json
    from types import SimpleNamespace
    from unittest.mock import patch

    from trace_hydra import run
    from trace_hydra.live import Live
    from trace_hydra.plan import Effort
    from trace_hydra.report import page, results
    from trace_hydra.stage import StageModule

    rows = [] if "data=trace" in overrides else ["data.rows.train=6", "data.rows.test=3"]
    config = compose_config([*TINY, *rows, f"paths.runs={directory}", f"paths.store={directory / 'store'}", *overrides])
    seen = SimpleNamespace(
        config=config,
        terms={},
        trainable={},
        trained_prompts={},
        made_prompts={},
        weights_before=None,
        snapshots={},
        rates={},
        directory=directory / "run",
    )
    load, train_stage, begin = Live._begin, Live._train, StageModule.on_train_start

    def watch_begin(live):
        load(live)
        seen.parts, seen.method, seen.ctx = live.parts, live.method, live._ctx
        seen.data, seen.views = live.prepared.data, live.prepared.views
        if seen.weights_before is None:
            seen.weights_before = {name: weight.clone() for name, weight in seen.ctx.model.state_dict().items()}

    def watch_start(module):
        stage = module.ctx.stage.index
        seen.trainable.setdefault(stage, set()).update(module.ctx.trainable())
        trained, made = seen.trained_prompts.setdefault(stage, set()), seen.made_prompts.setdefault(stage, set())
        for row in module.phase.examples:
            (made if row.id.startswith("pseudo-") else trained).add(row.prompt)
        seen.modules = [*getattr(seen, "modules", []), module]
        begin(module)

    def watch_stage(live, stage):
        seen.modules = []
        if cut and stage.index <= cut[0]:
            if stage.index == cut[0]:
                live._begin()
                _restore(live._ctx.model, live.method, cut[1])
                live._changed, live.row = set(live._ctx.model.state_dict()), stage.index
            return Effort(0, 0, 0.0, 0, 0.0, 0)
        effort = train_stage(live, stage)
        ctx, method = live._ctx, live.method
        seen.ctx, seen.method = ctx, method
        seen.snapshots[ctx.stage.index] = _snapshot(ctx.model, method)
        for module in seen.modules:
            seen.rates[ctx.stage.index] = module.optimizers().param_groups[0]["lr"]
            seen.terms.setdefault(ctx.stage.index, {}).update(module.readings.seen)
        if not seen.modules:
            seen.trainable.setdefault(ctx.stage.index, set()).update(ctx.trainable())
        return effort

    seen.directory.mkdir(parents=True, exist_ok=True)
    with (
        patch.object(Live, "_begin", watch_begin),
        patch.object(Live, "_train", watch_stage),
        patch.object(StageModule, "on_train_start", watch_start),
        patch.object(run, "show_plan"),
        patch.object(page, "drawn", return_value=None),  # figures of report.html, half a second a run
        patch.object(results, "heat_map_png", return_value=b"not drawn"),  # likewise
    ):
        seen.op = run.run(config, seen.directory)
    seen.results = json.loads((seen.directory / "results.json").read_text())
    if hasattr(seen, "ctx"):  # not where the store had everything
        seen.weights_after = {name: weight.clone() for name, weight in seen.ctx.model.state_dict().items()}
    return seen


def _snapshot(model, method):
    import json

    import torch

    state = method.state_dict()
    tensors = {key: value.clone() for key, value in state.items() if isinstance(value, torch.Tensor)}
    plain = json.dumps({key: value for key, value in state.items() if key not in tensors})
    return {name: weight.clone() for name, weight in model.state_dict().items()}, tensors, plain


def _restore(model, method, snapshot):
    import json

    weights, tensors, plain = snapshot
    present = {name: weight for name, weight in weights.items() if name in model.state_dict()}
    model.load_state_dict(present, strict=False)
    method.load_state_dict({**json.loads(plain), **{key: value.clone() for key, value in tensors.items()}})
