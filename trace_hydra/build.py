"""Configuration to objects. `validate` finds every problem it can before data, tokenizer or model is loaded."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trace_hydra.capability.base import CapabilitySet
from trace_hydra.credentials import secret_problems
from trace_hydra.data.options import CLOSED_ANSWERS, closed_options
from trace_hydra.data.reasoning import SPLITTERS
from trace_hydra.data.task import TRACE_TASKS, TaskSpec, task_spec
from trace_hydra.engines.base import Engine
from trace_hydra.engines.needs import needs_of
from trace_hydra.entry import NAMED_NODES
from trace_hydra.errors import ConfigError, TraceHydraError, problem_list
from trace_hydra.keys import name_of
from trace_hydra.launch import device_problems, machine_problems, shard_problems, with_lightning_trainer
from trace_hydra.methods.base import Method
from trace_hydra.models.tuning import Tuning
from trace_hydra.names import safe_name
from trace_hydra.targets import find_targets, instantiate, target_problems, trust_problems
from trace_hydra.terminal import MODES

_CHOICES = {
    "protocol.scoring": ("official", "corrected"),
    "protocol.prompt": ("raw", "chat"),
    "protocol.truncation": ("middle", "left"),
    "protocol.special_tokens": ("text", "parse"),
    "protocol.splitter": SPLITTERS,
    "protocol.closed_answers": CLOSED_ANSWERS,
    "evaluation.cells": ("seen", "all", "diagonal_last"),
    "optim.schedule": ("constant", "linear", "cosine"),
    "progress": MODES,
}
_AT_LEAST_ONE = (
    "budget.batch_size",
    "budget.micro_batch_size",
    "protocol.max_prompt_tokens",
    "protocol.max_answer_tokens",
    "evaluation.batch_tokens",
    "evaluation.bootstrap_samples",
)


@dataclass(frozen=True)
class Parts:
    """The objects of a run, built but not loaded."""

    method: Method
    tuning: Tuning
    model: Any
    """Has `problems()`, `load_tokenizer()`, `load()`."""
    data: Any
    """Has `problems(tasks)`, `load(tasks, seed=...)`."""
    optimizer: Callable[..., Any]
    trainer: Callable[..., Any]
    callbacks: list[Any]
    loggers: list[Callable[..., Any]]
    specs: dict[str, TaskSpec]
    """Facts of the tasks, in training order."""
    capability: dict[str, CapabilitySet]
    """Sets that start model and trained model answer, by their key in `capability.sets`."""
    engine: Engine
    """Generates all answers."""


def validate(config: DictConfig, *, files: bool = True, plain: Mapping[str, Any] | None = None) -> Parts:
    """Build the parts of a run, or say everything that is wrong.

    Args:
        config: The run's.
        files: Whether weights, tokenizer and rows must be there; an estimate needs none.
        plain: The same configuration, resolved, if the caller has it.

    Raises:
        ConfigError: With all problems in one message.
    """
    problems: list[str] = []
    parts = _collect(config, problems, files, plain)
    if parts is not None and config.model.get("path") and (notice := getattr(parts.data, "notice", None)):
        print(notice)  # generated rows are for the embedded models; said even if the weights cannot be had
    if problems or parts is None:
        raise ConfigError(problem_list(problems))
    return parts


def problems_of(config: DictConfig) -> list[str]:
    """List what `validate` would complain about."""
    problems: list[str] = []
    _collect(config, problems)
    return problems


def training_order(config: DictConfig) -> list[str]:
    """List the tasks in training order; `task_order.shuffle` draws it from seed.data."""
    from random import Random

    tasks = [str(task) for task in config.task_order.tasks]
    if config.task_order.get("shuffle"):
        Random(f"{config.seed.data}-task_order").shuffle(tasks)
    return tasks


def _collect(config: DictConfig, problems: list[str], files: bool = True, plain: Any = None) -> Parts | None:
    try:
        if (plain is None or MISSING in str(plain)) and (missing := sorted(OmegaConf.missing_keys(config))):
            problems.append(f"no value for {', '.join(missing)}; set it on the command line.")
            return None
        plain = with_lightning_trainer(OmegaConf.to_container(config, resolve=True) if plain is None else plain)
    except OmegaConfBaseException as error:
        problems.append(f"an interpolation cannot be resolved: {str(error).splitlines()[0]}")
        return None
    if secrets := secret_problems(plain):  # alone: other messages show values
        problems += secrets
        return None
    problems += _name_problems(config)
    problems += _value_problems(config)
    specs = _task_specs(config, problems)
    trusted = list(config.trust.targets)
    bad = trust_problems(trusted)
    if not bad:
        bad = [problem for path, node in find_targets(plain) for problem in target_problems(path, node, trusted)]
    problems += bad
    if bad:
        return None
    parts = _build(config, plain, specs, problems)
    if parts is not None:
        problems += _fit_problems(config, parts, files)
    return parts


def _name_problems(config: DictConfig) -> Iterator[str]:
    """Problems of names that become folders and files: of the run directory's parts, tasks and capability sets."""
    named = [(f"{node}.name", OmegaConf.select(config, f"{node}.name")) for node in NAMED_NODES]
    named = [(key, value) for key, value in named if value is not None]
    for key in ("data.tasks", "capability.sets"):
        node = OmegaConf.select(config, key)
        if node is not None and not isinstance(node, DictConfig):
            yield f"{key}={node} must be a mapping."
        else:
            named += [(f"a name in {key}", name) for name in node or ()]
    for key, name in named:
        try:
            safe_name(str(name), key)
        except ConfigError as error:
            yield str(error)


def _value_problems(config: DictConfig) -> Iterator[str]:
    for key, choices in _CHOICES.items():
        if (value := OmegaConf.select(config, key, default=choices[0])) not in choices:  # runs of before lack some
            yield f"{key}={value} is none of {', '.join(choices)}."
    for key in _AT_LEAST_ONE:
        if (value := OmegaConf.select(config, key)) < 1:
            yield f"{key}={value} must be at least 1."
    budget = config.budget
    for task, epochs in [*budget.epochs.items(), ("default_epochs", budget.default_epochs)]:
        key = "budget.default_epochs" if task == "default_epochs" else f"budget.epochs.{task}"
        if epochs < 1:
            yield f"{key}={epochs} must be at least 1; leave a task out of task_order to skip it."
    known = {*TRACE_TASKS, *(config.data.get("tasks") or {}), *config.task_order.tasks}
    for task in budget.epochs:
        if task not in known:
            yield f"budget.epochs.{task}: no such task. Known: {', '.join(sorted(map(str, known)))}."
    decoding = config.protocol.decoding
    if decoding.do_sample and decoding.temperature <= 0:
        yield f"protocol.decoding.temperature={decoding.temperature} must be above 0 when do_sample=true."
    if not 0 < decoding.top_p <= 1:
        yield f"protocol.decoding.top_p={decoding.top_p} must be in (0, 1]."
    if decoding.max_new_tokens is not None and decoding.max_new_tokens < 1:
        yield f"protocol.decoding.max_new_tokens={decoding.max_new_tokens} must be at least 1, or null."
    if not 0 <= config.optim.warmup_ratio <= 1:
        yield f"optim.warmup_ratio={config.optim.warmup_ratio} must be in [0, 1]."
    if config.optim.clip_norm is not None and config.optim.clip_norm <= 0:
        yield f"optim.clip_norm={config.optim.clip_norm} must be above 0, or null for no clipping."
    yield from device_problems(config)


def _task_specs(config: DictConfig, problems: list[str]) -> dict[str, TaskSpec]:
    tasks = config.task_order.tasks
    if not tasks:
        problems.append("task_order.tasks is empty; name at least one task, such as 'task_order=[FOMC,ScienceQA]'.")
    specs: dict[str, TaskSpec] = {}
    own = OmegaConf.to_container(config.data.get("tasks") or OmegaConf.create({}), resolve=True)
    for task in training_order(config):
        if task in specs:
            problems.append(f"task_order.tasks names {task} twice; a task is trained once.")
            continue
        try:
            specs[task] = task_spec(task, own)  # type: ignore[arg-type]
        except ConfigError as error:
            problems.append(f"task_order.tasks: {error}")
    return specs


def _build(config: DictConfig, plain: Any, specs: dict[str, TaskSpec], problems: list[str]) -> Parts | None:
    built: dict[str, Any] = {}
    single = {key: plain[key] for key in ("method", "tuning", "model", "data", "trainer")}
    single["optimizer"] = plain["optim"].get("optimizer")
    single["engine"] = plain.get("engine") or {"_target_": "trace_hydra.engines.hf.HF"}  # runs of before had no other
    for key, node in single.items():
        if not isinstance(node, Mapping) or "_target_" not in node:
            problems.append(f"{key} has no _target_; it names the class to build.")
            continue
        try:
            built[key] = instantiate(node)
        except TraceHydraError as error:
            problems.append(str(error))
    for group in ("callbacks", "logger"):
        nodes = (plain[group] or {}).items()
        built[group] = []
        for key, node in nodes:
            if node is None:  # taken out: callbacks.<key>=null
                continue
            if not isinstance(node, Mapping) or "_target_" not in node:
                problems.append(
                    f"{group}.{key}={node!r} has no _target_; it names the class to build. null leaves it out."
                )
                continue
            try:
                built[group].append(instantiate(node))
            except TraceHydraError as error:
                problems.append(f"{group}.{key}: {error}")
    sets = capability_sets(plain["capability"].get("sets") or {}, problems)
    if any(key not in built for key in single):
        return None
    return Parts(
        built["method"],
        built["tuning"],
        built["model"],
        built["data"],
        built["optimizer"],
        built["trainer"],
        built["callbacks"],
        built["logger"],
        specs,
        sets,
        built["engine"],
    )


def capability_sets(nodes: Mapping[str, Any], problems: list[str]) -> dict[str, CapabilitySet]:
    """Build the sets of `capability.sets`; a node without `_target_` that should be built (judge=none) is None."""
    built = {}
    for key, node in nodes.items():
        if node is None:  # taken out: capability.sets.<key>=null
            continue
        if not isinstance(node, Mapping) or "_target_" not in node:
            problems.append(f"capability.sets.{key} has no _target_; it names the class to build.")
            continue
        plain = {
            name: None if name == "judge" and not (isinstance(value, Mapping) and "_target_" in value) else value
            for name, value in node.items()
        }
        try:
            built[key] = instantiate(plain)
        except TraceHydraError as error:
            problems.append(f"capability.sets.{key}: {error}")
    return built


def measured_rows(config: DictConfig) -> list[int]:
    """List the rows behind which the capability sets are answered.

    Raises:
        ConfigError: If `capability.when` is neither a word that is known nor a list of stages.
    """
    when, last = config.capability.get("when", "end"), len(config.task_order.tasks)
    if when in ("end", "every_stage"):
        return [last] if when == "end" else list(range(1, last + 1))
    listed = list(when) if isinstance(when, Sequence) and not isinstance(when, str) else []
    if listed and all(isinstance(row, int) and 1 <= row <= last for row in listed):
        return sorted(set(listed))
    raise ConfigError(
        f"capability.when={when} must be end, every_stage, or a list of stages from 1 to {last}, such as [1,{last}]."
    )


def _fit_problems(config: DictConfig, parts: Parts, files: bool) -> Iterator[str]:
    """Problems of parts with each other and with the files they need."""
    method, tuning = parts.method, parts.tuning
    if not isinstance(method, Method):
        yield f"method._target_={config.method._target_} is no trace_hydra.methods.base.Method."
        return
    wanted = method.tunings
    if wanted is not None and tuning.name not in wanted:
        yield (
            f"method={name_of(config, 'method')} with tuning={tuning.name}: {method.tuning_reason or 'not possible'}. "
            f"Use tuning={' or '.join(wanted)}."
        )
    elif wanted is None and tuning.name == "frozen":
        yield (
            f"method={name_of(config, 'method')} trains, but tuning=frozen leaves nothing to train. "
            "Use tuning=full or tuning=lora."
        )
    yield from shard_problems(config, method)
    if quantized := getattr(parts.model, "quantization", None):
        if tuning.name == "full":
            yield f"model.quantization={quantized} with tuning=full: 4-bit weights cannot train. Use tuning=lora."
        if str(config.trainer.get("precision")) in ("bf16-true", "16-true"):
            yield f"model.quantization={quantized} with trainer.precision={config.trainer.precision}: use bf16-mixed."
    if files:
        yield from machine_problems(config)
        yield from parts.model.problems()
    yield from _length_problems(config, parts)
    if files and parts.specs:
        yield from parts.data.problems(list(parts.specs))
    if files:
        kinds = {"num_stages": len(parts.specs), "name": name_of(config, "method"), "prompt": config.protocol.prompt}
        kinds["chooses"] = any(closed_options(spec, config.protocol) for spec in parts.specs.values())
        yield from parts.engine.problems(needs_of(method, tuning, **kinds))
    yield from _capability_problems(config, parts, files)
    yield from _writable(Path(config.paths.runs))


def _capability_problems(config: DictConfig, parts: Parts, files: bool) -> Iterator[str]:
    try:
        measured_rows(config)
    except ConfigError as error:
        yield str(error)
    for key, one in parts.capability.items():
        if not isinstance(one, CapabilitySet):
            yield f"capability.sets.{key}: {type(one).__name__} is no trace_hydra.capability.base.CapabilitySet."
        elif files:
            yield from (f"capability.sets.{key}: {problem}" for problem in one.problems())


def _length_problems(config: DictConfig, parts: Parts) -> Iterator[str]:
    protocol, context = config.protocol, getattr(parts.model, "context_length", None)
    limits = [protocol.decoding.max_new_tokens or spec.max_new_tokens for spec in parts.specs.values()]
    prompts = parts.method.prefix_length(parts.tuning.prefix_length, len(parts.specs))
    longest = prompts + protocol.max_prompt_tokens + max([protocol.max_answer_tokens, *limits])
    if context and longest > context:
        yield (
            f"protocol.max_prompt_tokens={protocol.max_prompt_tokens}, the longest answer and {prompts} tokens of soft "
            f"prompts make {longest}; model={name_of(config, 'model')} has {context} positions. Lower "
            "protocol.max_prompt_tokens, protocol.max_answer_tokens or protocol.decoding.max_new_tokens."
        )


def _writable(folder: Path) -> Iterator[str]:
    import os

    existing = next((one for one in [folder, *folder.absolute().parents] if one.exists()), folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield f"paths.runs={folder}: cannot write in {existing}. Set paths.runs to a folder of yours."
