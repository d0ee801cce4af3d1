"""What decides an entry of the store: everything that can change trained weights, or answers, and nothing else.

The hash of these inputs is the entry's key, and they stand in its manifest. `WITHOUT_EFFECT` lists the leaves of the
configuration that are in no key; a test flips every leaf and holds it against the list.
"""

import hashlib
import inspect
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from omegaconf import DictConfig, OmegaConf

from trace_hydra import __version__, keys, ranks
from trace_hydra.build import Parts
from trace_hydra.context import TrainTask
from trace_hydra.data.encode import Encoder
from trace_hydra.data.task import TaskData, rows_hash
from trace_hydra.methods.base import Method
from trace_hydra.strategies import build_trainer
from trace_hydra.targets import locate

TRAINING_VERSION = 5
"""Raised when a change outside `methods/` alters what a stage's weights become."""
ANSWERS_VERSION = 4
"""Raised when a change outside `methods/` alters what a model answers."""

WITHOUT_EFFECT = (
    # where things lie, what is shown, who may be imported
    "paths.*", "logger.*", "callbacks.*", "trust.*", "hydra.*", "cost", "store.*", "checkpoint.*", "sweep.*", "on_oom",
    "progress",
    # how parts are called, and what is only known about them
    "*.name", "model.published", "model.parameters", "model.context_length",
    # where weights and rows are read from: weights, tokenizer and rows themselves are hashed
    "model.path", "model.revision", "model.cache_dir", "model.trust_remote_code", "model.architecture*",
    "data.*", "task_order.*", "trainer.accelerator",
    # how a step is shared out; the number of processes is hashed where more than rounding depends on it
    "trainer.strategy", "trainer.devices", "trainer.num_nodes", "trainer.deepspeed*",
    # choices among which `optim.optimizer.lr` takes one, and that is hashed
    "budget.lr_full", "budget.lr_adapter", "budget.lr_prompt",
    # which cells are scored, how predictions become scores, what is measured beside them
    "evaluation.cells", "evaluation.row0", "evaluation.next_task", "evaluation.bootstrap_samples",
    "protocol.scoring", "protocol.splitter", "capability.*", "judge.*",
    # how an engine is reached, how fast it is, where it reads weights
    *(f"engine.{key}" for key in ("api_key_env", "timeout_s", "retries", "backoff_s", "concurrency", "folder", "keep")),
    "engine.gpu_memory_utilization", "engine.sleep",
)  # fmt: skip
"""Patterns of leaves that change neither weights nor answers, or do it through what is hashed in their stead."""
WHERE_DRAWN = ("seed.generation",)
"""Leaves that count only where something is sampled, or a method answers in its own way."""
OWN_CODE = ("trace_hydra.", "torch.", "lightning.")
"""Packages whose code is known by a version; of other code the source is hashed."""
_NOTED = ("torch", "lightning", "transformers", "peft", "datasets", "hydra-core", "wandb", "rapidfuzz", "deepspeed")
"""Packages that numbers may depend on, as far as they are installed."""


def stage_inputs(
    config: DictConfig | Mapping[str, Any],
    parts: Parts,
    data: TaskData,
    views: Mapping[str, TrainTask],
    epochs: Mapping[str, int],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Say what decides the stages' weights: what all stages share, and what each adds, in order."""
    method = parts.method
    plain = resolved(config)
    shared = {
        "version": TRAINING_VERSION,
        **_model(plain, parts),
        "tuning": _node(plain["tuning"]),
        "method": {**_node(plain["method"]), "version": method.version},
        "optim": _node(plain["optim"]),
        "batch_size": plain["budget"]["batch_size"],
        "trainer": _trainer(plain, parts),
        "encoding": _encoding(plain),
        "seed": {key: plain["seed"][key] for key in ("train", "data")},
        "on_nonfinite": plain["on_nonfinite"],
        "alignment": rows_hash(data.alignment) if data.alignment else None,
    }
    if ranks.size() > 1 and _draws(parts):
        shared["processes"] = ranks.size()
    if method.makes_rows:  # it generates while it trains
        shared["generation"] = {**_generation(plain), "engine": engine_identity(plain, parts)}
    if method.sees_num_stages or method.sees_all_tasks:
        shared["num_stages"] = len(data.tasks)
    stages = [
        {
            "task": name,
            "rows": task.train_hash,
            "epochs": epochs[name],
            "instruction": views[name].instruction,
            "language": views[name].language,
            **({"max_new_tokens": views[name].max_new_tokens, "stop": views[name].stop} if method.makes_rows else {}),
        }
        for name, task in data.tasks.items()
    ]
    if method.sees_all_tasks:
        shared["all_tasks"] = stages
    return shared, stages


def start_inputs(config: DictConfig | Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """Say what decides how the model answers before training; as little as there is, for many runs share it."""
    plain = resolved(config)
    found: dict[str, Any] = {"version": TRAINING_VERSION, **_model(plain, parts), "trainer": _trainer(plain, parts)}
    kind, base = type(parts.method), Method
    if parts.tuning.adds or kind.setup is not base.setup or kind.answer is not base.answer:
        found["tuning"] = _node(plain["tuning"])
        found["method"] = {**_node(plain["method"]), "version": parts.method.version}
        found["seed"] = {key: plain["seed"][key] for key in ("train", "data")}
        if parts.method.sees_num_stages:
            found["num_stages"] = len(parts.specs)
    return found


def answers_inputs(
    plain: Mapping[str, Any],
    parts: Parts,
    encoder: Encoder,
    view: TrainTask,
    prompts: str,
    state: str,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Say what decides the answers to a task's test prompts.

    Args:
        plain: The run's configuration, resolved.
        parts: Its parts.
        encoder: Turns prompts into ids.
        view: The task.
        prompts: Hash of the prompts of its test rows.
        state: Key of the model's state.
        versions: Package -> version; those that generate count.
    """
    draws = plain["protocol"]["decoding"]["do_sample"] or type(parts.method).answer is not Method.answer
    return {
        "version": ANSWERS_VERSION,
        "state": state,
        "task": view.name,
        "prompts": prompts,
        "instruction": view.instruction,
        "max_new_tokens": view.max_new_tokens,
        "stop": list(view.stop),
        **({"options": view.options} if view.options else {}),
        "encoding": _encoding(plain),
        "template": encoder.template,
        "generation": {**_generation(plain), "seed": plain["seed"]["generation"] if draws else None},
        "versions": {name: versions.get(name) for name in ("torch", "transformers", "peft")},
        "engine": engine_identity(plain, parts),
    }


def resolved(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Turn a configuration into plain values; one that is plain already stays as it is."""
    plain: Any = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    return plain


def engine_identity(config: DictConfig | Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """Say what of the engine decides answers; of one from elsewhere also its source."""
    target = str((config.get("engine") or {}).get("_target_") or OWN_CODE[0])
    source = {} if target.startswith(OWN_CODE) else {"source": _source(target)}
    return {**parts.engine.identity(), **source}


@cache
def without_effect(leaf: str) -> bool:
    """Tell whether a leaf of the configuration, as a dotted path, is in no key."""
    return any(fnmatchcase(leaf, pattern) for pattern in WITHOUT_EFFECT)


def _model(plain: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    node = {key: value for key, value in _node(plain["model"]).items() if not without_effect(f"model.{key}")}
    return {"model": {**node, **parts.model.identity()}}


def _draws(parts: Parts) -> bool:
    """Whether passes draw random numbers; each process draws for the rows that it sees."""
    dropped = getattr(parts.model, "dropout", lambda: False)()
    return parts.method.draws_in_losses or dropped or bool(getattr(parts.tuning, "dropout", 0.0))


def _trainer(plain: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    node = {key: value for key, value in _node(plain["trainer"]).items() if not without_effect(f"trainer.{key}")}
    return {**node, "device": build_trainer(parts.trainer).strategy.root_device.type}


def _encoding(plain: Mapping[str, Any]) -> dict[str, Any]:
    apart = ("name", "scoring", "splitter", "decoding", "closed_answers")
    return {key: value for key, value in plain["protocol"].items() if key not in apart}


def _generation(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "decoding": plain["protocol"]["decoding"],
        "batch_tokens": plain["evaluation"]["batch_tokens"],
        "seed": plain["seed"]["generation"],
    }


def _node(node: Mapping[str, Any]) -> dict[str, Any]:
    """Take a node without its name, with the source of what it builds if that has no version of ours."""
    found = {key: value for key, value in node.items() if key != "name"}
    sources = {target: _source(target) for target in sorted(_targets(node)) if not target.startswith(OWN_CODE)}
    return {**found, **({"source": sources} if sources else {})}


def _targets(node: Any) -> set[str]:
    if isinstance(node, Mapping):
        own = {node["_target_"]} if isinstance(node.get("_target_"), str) else set()
        return own.union(*(_targets(value) for value in node.values()))
    return set().union(*map(_targets, node)) if isinstance(node, list) else set()


def _source(target: str) -> str:
    """Hash the files that define a class and its bases, as far as they are not ours."""
    found = locate(target)
    classes = inspect.getmro(found) if inspect.isclass(found) else (found,)
    files = {
        inspect.getsourcefile(one)
        for one in classes
        if one.__module__ != "builtins" and not one.__module__.startswith((*OWN_CODE, "abc", "typing"))
    }
    digest = hashlib.sha256()
    for path in sorted(file for file in files if file):
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Look up the versions of the packages that numbers may depend on."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found = {"trace_hydra": __version__}
    for package in _NOTED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def key_of(inputs: Mapping[str, Any]) -> str:
    """Hash inputs to a key of the store."""
    return keys.digest(inputs)
