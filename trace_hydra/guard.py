"""What is refused before Hydra acts: pickles, Hydra's own objects outside an allowlist, secrets, trust from a file.

Hydra builds its callbacks and log handlers, and writes the configuration to disk, before it calls any code of ours.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trace_hydra import entry, schema
from trace_hydra.credentials import argument_problems, secret_problems
from trace_hydra.errors import ConfigError, problem_list
from trace_hydra.names import safe_name

_HOMES = {
    "hydra.callbacks": ("hydra.experimental.callbacks.", "trace_hydra.callbacks."),
    "hydra.launcher": ("hydra._internal.core_plugins.", "hydra_plugins."),
    "hydra.sweeper": ("hydra._internal.core_plugins.", "hydra_plugins."),
}
"""Node -> where what it builds must come from. Hydra itself holds launchers and sweepers to it, callbacks to nothing
but a list of what it knows to be harmful."""
_LOG_CLASSES = {"logging.Formatter", "colorlog.ColoredFormatter", "logging.StreamHandler", "logging.FileHandler"}
_LOG_NODES = ("hydra.job_logging", "hydra.hydra_logging")
_CONSENT = re.compile(r"trust\.targets|(.+\.)?trust_remote_code")


def check_command_line(arguments: Sequence[str]) -> None:
    """Refuse a command line that should not reach Hydra.

    Args:
        arguments: As Hydra will read them.

    Raises:
        ConfigError: With all that is wrong, without any secret's value.
        HydraException: What Hydra itself says when the configuration cannot be composed.
    """
    if found := argument_problems(arguments):
        raise ConfigError(problem_list(found))
    options = get_args_parser().parse_args(list(arguments))
    if options.experimental_rerun is not None:
        raise ConfigError(
            "--experimental-rerun reads a pickle, which can run any code. The overrides of a run stand in its "
            ".hydra/overrides.yaml; run them again."
        )
    if options.config_path is not None:
        raise ConfigError("--config-path would replace all of conf/. Add a folder of yours with --config-dir.")
    if options.shell_completion or options.help or options.hydra_help:
        return
    if options.config_dir is not None and not os.path.isdir(options.config_dir):
        return  # Hydra says so
    raw: Any = OmegaConf.to_container(_compose(options), resolve=False)
    hydra = raw.pop("hydra")
    found = [*secret_problems(raw), *secret_problems(hydra, "hydra"), *_hydra_problems(hydra)]
    if found:
        raise ConfigError(problem_list(found))


def check_consent(config: DictConfig, overrides: Sequence[str]) -> None:
    """Hold a run to `consent_problems`.

    Raises:
        ConfigError: Naming keys and values.
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException:
        return  # no run comes of it; `build.validate` says why
    if found := consent_problems(plain, overrides):
        raise ConfigError(problem_list(found))


def consent_problems(node: Any, overrides: Sequence[str], path: str = "") -> list[str]:
    """Say which trust no command line gave: a configuration file from elsewhere could trust itself.

    Args:
        node: Plain and resolved.
        overrides: Of the command line, `key=value`.
        path: Of the node.
    """
    given = {one.lstrip("+").partition("=")[0]: one for one in overrides}
    found = []
    for leaf, value in _leaves(node, path):
        if "trust" not in leaf:
            continue
        key = re.sub(r"^capability\.sets\.[^.]+\.judge\b", "judge", re.sub(r"\[\d+\]$", "", leaf))
        if value in (None, False) or not _CONSENT.fullmatch(key):
            continue
        parent, _, name = key.rpartition(".")
        if key in given or name in given.get(parent, ""):
            continue
        shown, of = (f"[{value}]" if leaf.endswith("]") else str(value).lower()), ""
        if name == "trust_remote_code" and isinstance(parts := _at(node, leaf.rpartition(".")[0], path), Mapping):
            of = f" for {parts.get('name')} ({parts.get('path')})"
        found.append(
            f"{leaf}={value} stands in a file{of}; code of others runs only if the command line says so. If you trust "
            f"it, add '{key}={shown}'."
        )
    return found


def _compose(options: Any) -> DictConfig:
    """Compose as Hydra's `run` and `multirun` do; swept values are left out, each job is checked for itself."""
    version.setbase("1.3")
    GlobalHydra.instance().clear()
    schema.register()
    entry.register_resolvers()
    search_path = create_config_search_path(str(entry.project_root() / "conf"))
    if options.config_dir is not None:
        folder = os.path.abspath(options.config_dir)
        search_path.prepend("command-line", f"file://{folder}", anchor=SearchPathQuery(provider="schema", path=None))
    hydra = Hydra.create_main_hydra2(task_name="trace_hydra", config_search_path=search_path)
    try:
        return hydra.compose_config(
            options.config_name or "config",
            options.overrides,
            run_mode=RunMode.MULTIRUN,
            with_log_configuration=False,
            validate_sweep_overrides=False,
        )
    finally:
        GlobalHydra.instance().clear()


def _at(node: Any, leaf: str, path: str) -> Any:
    for key in leaf.removeprefix(path).strip(".").split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{path}[{index}]")
    else:
        yield path, node


def _hydra_problems(hydra: Mapping[str, Any]) -> Iterator[str]:
    """Check what Hydra would build or name files by, in its own node."""
    for path, value in _leaves(hydra, "hydra"):
        node, key = ".".join(path.split(".")[:2]), path.rpartition(".")[2]
        homes = _HOMES.get(node, ())
        if key == "_target_" and not (isinstance(value, str) and value.startswith(homes)):
            yield f"{path}={value!a}: not allowed; {node} takes {' or '.join(homes) or 'no _target_'}."
        elif node in _LOG_NODES and key in ("class", "()") and value not in _LOG_CLASSES:
            yield f"{path}={value!a}: not allowed; logging takes {', '.join(sorted(_LOG_CLASSES))}."
    for key in ("job.name", "output_subdir"):
        parent, _, name = key.rpartition(".")
        value = (hydra.get(parent) or {} if parent else hydra).get(name)
        if value is not None and value != ".hydra" and "${" not in str(value):
            try:
                safe_name(str(value), f"hydra.{key}")
            except ConfigError as error:
                yield str(error)
