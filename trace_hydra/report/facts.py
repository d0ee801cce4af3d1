"""What surrounds the numbers of a run: warnings about its data, settings, the command that makes it again."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trace_hydra.credentials import argument_problems, secret_problems
from trace_hydra.entry import project_root
from trace_hydra.errors import StoreError
from trace_hydra.metrics.records import read_json

_HIDDEN = "(secret)"


@dataclass(frozen=True)
class Setting:
    """A leaf of the resolved configuration."""

    path: str
    value: str
    default: str | None = None
    """What the protocol's file has, for a leaf of `protocol` that differs from it."""
    given: bool = False
    """Whether an override of the command line is its."""


@dataclass(frozen=True)
class Settings:
    """The configuration of a run."""

    leaves: list[Setting] = field(default_factory=list)
    command: str | None = None
    """The command line that makes the run again."""
    note: str = ""
    """What of it is not known, and why."""

    @property
    def changed(self) -> list[Setting]:
        """Give the leaves that differ from their protocol's file."""
        return [leaf for leaf in self.leaves if leaf.default is not None]


def data_warnings(results: Mapping[str, Any], directory: Path) -> list[str]:
    """Say what of audit.json and of the cut rows a reader of the scores should know."""
    path = directory / "audit.json"
    try:
        audit = read_json(path, StoreError)
    except StoreError as error:
        return [f"The audit of the data cannot be shown: {error}"]
    found = []
    for task in results["tasks"]:
        own = audit.get(task) if isinstance(audit, Mapping) else None
        if not isinstance(own, Mapping):
            found.append(f"{task}: {path.name} does not have it.")
            continue
        found += [f"{task}: {text}" for text in own.get("warnings") or ()]
        found += [f"{task}: {text}" for text in _audited(own)]
    for task, splits in (results.get("truncated") or {}).items():
        cut = [f"{count:,} {split} rows" for split, count in splits.items() if count]
        if cut:
            found.append(f"{task}: {' and '.join(cut)} are longer than the protocol's limits and were cut.")
    return found


def _audited(own: Mapping[str, Any]) -> Iterator[str]:
    rows = own.get("rows") or {}
    for name, other in (("test_in_train", "train"), ("test_in_eval", "eval")):
        leak = (own.get("overlap") or {}).get(name) or {}
        if leak.get("rows"):
            yield (
                f"{leak['rows']:,} of {rows.get('test', 0):,} test rows have a prompt that is among the {other} rows, "
                f"{leak.get('same_answer', 0):,} with the same answer."
            )
    if (own.get("eval_equals_test") or {}).get("rows"):
        yield "eval and test are the same rows."
    said = {
        "empty_answers": "rows have an empty answer",
        "empty_bodies": "rows have nothing but the instruction as prompt",
        "conflicting_prompts": "prompts are there with more than one answer",
    }
    for key, text in said.items():
        counts = {split: count for split, count in (own.get(key) or {}).items() if count}
        if counts:
            yield f"{', '.join(f'{count:,} {split}' for split, count in counts.items())} {text}."


def read_settings(directory: Path) -> Settings:
    """Read the configuration and the command line of a run from its folder .hydra."""
    config, problem = _yaml(directory / ".hydra" / "config.yaml")
    if not isinstance(config, Mapping):
        return Settings(note=problem or "The configuration is no mapping.")
    overrides, fault = _yaml(directory / ".hydra" / "overrides.yaml")
    if not isinstance(overrides, list):
        fault = fault or "overrides.yaml holds no list."
    given = [str(one) for one in overrides] if isinstance(overrides, list) else []
    keys = [one.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".") for one in given]
    defaults = dict(_leaves("protocol", _protocol(config.get("protocol"))))
    leaves = [
        Setting(path, text, _default(path, text, defaults), any(f"{path}.".startswith(f"{key}.") for key in keys))
        for path, value in _leaves("", config)
        for text in [_HIDDEN if secret_problems({path.rpartition(".")[2]: value}) else _text(value)]
    ]
    command = None
    if not fault:
        command = shlex.join(["python", "-m", "trace_hydra", *map(_without_secret, given)])
    return Settings(leaves, command, fault)


def choices(settings: Settings) -> dict[str, str]:
    """Give what the parts of the configuration are called, by group: `model: smollm2`."""
    return {
        leaf.path.removesuffix(".name"): leaf.value
        for leaf in settings.leaves
        if leaf.path.count(".") == 1 and leaf.path.endswith(".name")
    }


def _default(path: str, text: str, defaults: Mapping[str, Any]) -> str | None:
    if path not in defaults or (default := _text(defaults[path])) == text:
        return None
    return default


def _protocol(node: Any) -> Mapping[str, Any]:
    """Read the file of the protocol that a run names, with those it builds on; {} where it is not one of ours."""
    name = node.get("name") if isinstance(node, Mapping) else None
    if not isinstance(name, str) or not name.isidentifier():
        return {}
    content, _ = _yaml(project_root() / "conf" / "protocol" / f"{name}.yaml")
    if not isinstance(content, dict):
        return {}
    merged: dict[str, Any] = {}
    for base in content.pop("defaults", []):
        merged |= _protocol({"name": base}) if base != "_self_" else content
    return {**merged, **content}


def _yaml(path: Path) -> tuple[Any, str]:
    """Read a file; None, and why, where it cannot be."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # both safe; the first is ten times faster
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=loader), ""
    except FileNotFoundError:
        return None, f"{path} is not there."
    except (OSError, ValueError, yaml.YAMLError) as error:
        return None, f"{path} cannot be read: {error}"


def _leaves(path: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), value)
    else:
        yield path, node


def _text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_text, value)) or "[]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _without_secret(override: str) -> str:
    return f"{override.partition('=')[0]}={_HIDDEN}" if argument_problems([override]) else override
