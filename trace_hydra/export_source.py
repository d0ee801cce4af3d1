"""A run directory as the source of an export: its configuration, its stages, and the model at any of them.

Rows are not needed: keys come from results.json (or the store's note of a run that is under way), weights from the
store, the start model from where the configuration says.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError, safe_load

from trace_hydra import build, entry, guard, inputs, keys
from trace_hydra.build import Parts
from trace_hydra.context import TrainTask
from trace_hydra.data.encode import Encoder
from trace_hydra.data.task import TaskData
from trace_hydra.errors import ConfigError, StoreError, problem_list
from trace_hydra.interrupt import Interrupts
from trace_hydra.live import Live, undisturbed
from trace_hydra.plan import RunInfo, Stage
from trace_hydra.prepare import Prepared
from trace_hydra.store.entries import Entry, Store
from trace_hydra.store.survey import survey

_COMPARED = ("version", "model", "tuning", "method")
"""Of a stage's inputs: what must be now as it was then for its weights to fit."""


@dataclass(frozen=True)
class Served:
    """A model in the state in which it answers."""

    model: Any
    prefix: list[int]
    """Ids of the soft prompt before every row."""
    entry: Entry | None
    """Of the stage; None for the start model."""


@dataclass(frozen=True)
class Source:
    """A run whose stages are stored."""

    directory: Path
    config: DictConfig
    parts: Parts
    results: dict[str, Any] | None
    """results.json; None while the run is under way."""
    store: Store
    tokenizer: Any
    stages: tuple[Stage, ...]

    def row_of(self, stage: int | str | None) -> int:
        """Turn what was asked for into a row of the matrix: a number from 0, the beginning of a key, None: the last.

        Raises:
            StoreError: If the run has no such stage.
        """
        if stage is None:
            return len(self.stages)
        if isinstance(stage, int):
            found = [stage] if 0 <= stage <= len(self.stages) else []
        else:
            found = [one.index for one in self.stages if one.key.startswith(stage.removeprefix("stages/"))]
        if len(found) != 1:
            known = ", ".join(f"{one.index} ({one.task}, {one.key})" for one in self.stages)
            raise StoreError(f"stage {stage} of {self.directory}: it has 0 (the start model), {known}.")
        return found[0]

    @contextmanager
    def serving(self, row: int) -> Iterator[Served]:
        """Load the model at a row; its state lasts for the block.

        Raises:
            StoreError: If the stage is not stored with its weights, trained nothing, or began from something else.
        """
        if row == 0:
            yield Served(self.parts.model.load(), [], None)
            return
        stored = self._stored(self.stages[row - 1])
        live = self._live()
        ctx = live.restored(row)
        views = live.prepared.views.values()
        with undisturbed(ctx):
            _, prefixes = next(serving := live.method.serve(ctx, [view.instruction or view.name for view in views]))
            yield Served(ctx.model, list(prefixes[0]), stored)
            serving.close()  # type: ignore[attr-defined]

    def _stored(self, stage: Stage) -> Entry | None:
        found = self.store.find("stages", stage.key)
        if found is None:
            return None  # `restored` says so
        if not found.facts["effort"]["trainable_params"]:
            raise StoreError(
                f"stage {stage.index} ({stage.task}) trained nothing: its model is the start model. Export that with "
                "--stage 0."
            )
        now, _ = inputs.stage_inputs(self.config, self.parts, TaskData({}), {}, {})
        then = found.manifest["inputs"]["run"]
        if other := [key for key in _COMPARED if now[key] != then.get(key)]:
            raise StoreError(
                f"stage {stage.index} ({stage.task}), {found.name}, had another {', '.join(other)} than is here now "
                f"({then.get(other[0])}; now {now[other[0]]}). If the start model lies elsewhere: model.path=FOLDER"
            )
        return found

    def _live(self) -> Live:
        """Put together what `Live` needs of a prepared run; rows and cells are left out."""
        config, parts = self.config, self.parts
        decoding = config.protocol.decoding
        views = {
            name: TrainTask(
                name, (), spec.instruction, decoding.max_new_tokens or spec.max_new_tokens, spec.stop, spec.language
            )
            for name, spec in parts.specs.items()
        }
        run = RunInfo(
            name=self.directory.name,
            directory=self.directory,
            **{node: keys.name_of(config, node) for node in entry.NAMED_NODES},
            tasks=tuple(parts.specs),
            seed=config.seed.train,
            protocol=config.protocol.name,
            fingerprint="",
            config={},
            stages=self.stages,
            cells=(),
            answers={},
            measured=(),
            disclosures={},
        )
        encoder = Encoder.of(self.tokenizer, config.protocol)
        prepared = Prepared(run, {}, views, TaskData({}), self.tokenizer, encoder, {}, {})
        return Live(config, parts, prepared, self.store, Interrupts())


def open_run(
    directory: Path, *, store: Path | None, settings: Sequence[str], trust: Sequence[str], scratch: Path
) -> Source:
    """Read a run directory and build the parts of its configuration, under the same allowlist as a run.

    Args:
        directory: Of the run, finished or not.
        store: None: the run's `paths.store`.
        settings: `key=value` for keys that change no number, such as model.path.
        trust: As `trust.targets`; what the run's own file trusts does not count.
        scratch: A folder that can be written.

    Raises:
        TraceHydraError: If a file of the run is missing or damaged, or the start model is not there.
    """
    config = _read_config(directory, settings, trust)
    with open_dict(config):
        config.paths.runs = str(scratch)
        config.callbacks, config.logger, config.capability = {}, {}, {"sets": {}, "when": "end"}
        config.trainer.accelerator, config.trainer.precision = "cpu", "32-true"  # nothing is trained
        config.trainer.compile, config.model.kernels = False, "torch"
        if store is not None:
            config.paths.store = str(store)
    parts = build.validate(config, files=False)
    if found := parts.model.problems():
        raise ConfigError(problem_list(found))
    opened = Store(Path(config.paths.store))
    results = _read_results(directory)
    stage_keys = [one["key"] for one in results["stages"]] if results else _noted_keys(directory, opened)
    if len(stage_keys) != len(parts.specs):
        raise StoreError(f"{directory}: {len(stage_keys)} stages are known of {len(parts.specs)} tasks.")
    apart = parts.method.stages_apart
    stages = [
        Stage(index, name, 0, 0, 0, 0, key, apart=apart)
        for index, (name, key) in enumerate(zip(parts.specs, stage_keys, strict=True), start=1)
    ]
    return Source(directory, config, parts, results, opened, parts.model.load_tokenizer(), tuple(stages))


def _read_config(directory: Path, settings: Sequence[str], trust: Sequence[str]) -> DictConfig:
    path = directory / ".hydra" / "config.yaml"
    entry.register_resolvers()
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; name the directory of a run.") from None
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise StoreError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(config, DictConfig) or not {"model", "method", "tuning", "trust", "paths"} <= set(config):
        raise StoreError(f"{path} is no configuration of a run.")
    with open_dict(config):
        config.trust.targets = list(trust)
        for setting in settings:
            key, sign, value = setting.partition("=")
            if not sign or not (inputs.without_effect(key) or key == "model.trust_remote_code"):
                raise ConfigError(f"{setting}: only what changes no number may be set, such as model.path=FOLDER.")
            OmegaConf.update(config, key, safe_load(value))
    guard.check_consent(config, [*settings, f"trust.targets={list(trust)}"])
    return config


def _read_results(directory: Path) -> dict[str, Any] | None:
    path = directory / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        missing = {"stages", "matrix", "tasks", "protocol"} - set(results)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{path} cannot be read: {error}.") from error
    if missing or not all(isinstance(one, dict) and isinstance(one.get("key"), str) for one in results["stages"]):
        raise StoreError(f"{path} is no result of a run.")
    return results


def _noted_keys(directory: Path, store: Store) -> list[str]:
    """Keys of the stages of a run that has not finished, as it noted them when it began."""
    noted = [note for note in survey(store.root).notes if Path(note.directory) == directory.resolve()]
    if not noted:
        raise StoreError(f"{directory} has no results.json, and {store.root} knows no such run. Let it finish first.")
    return [name.removeprefix("stages/") for name in noted[0].stages]
