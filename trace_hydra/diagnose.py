"""What is said when a command line cannot run: one message with all that is wrong, and an exit code."""

import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trace_hydra import entry, ranks, schema
from trace_hydra.errors import problem_list
from trace_hydra.terminal import plain

_AFTER_RANK_0_S = 3.0
_BREAK = "\n"
# Flags of Hydra's own command line that take the next argument as their value.
_FLAGS_WITH_VALUE = {
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--package",
    "-p",
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--experimental-rerun",
}


def fail(message: str, code: int, *, anyone: bool = False) -> None:
    """Print one message without a traceback and exit.

    Args:
        message: What is wrong.
        code: The exit code.
        anyone: Whether other processes of the run than rank 0 print it too; they all find what is wrong with a command.
    """
    if anyone or ranks.is_first():
        print(f"trace_hydra: {plain(message, keep=_BREAK)}", file=sys.stderr, flush=True)
    else:
        time.sleep(_AFTER_RANK_0_S)  # a launcher ends the others as soon as one ends
    sys.exit(code)


def discard_empty(directory: Path, *also: str) -> None:
    """Take a run directory away that holds nothing but what Hydra put there, and files named `also`."""
    if {path.name for path in directory.iterdir()} <= {".hydra", "trace_hydra.log", *also}:
        shutil.rmtree(directory, ignore_errors=True)


def _run_began(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename) == Path(__file__).with_name("run.py") for frame in frames)


@contextmanager
def composition_errors(arguments: Sequence[str]) -> Iterator[None]:
    """Turn Hydra's first complaint about the command line into one message with all of them, and exit with 2.

    Hydra stops at the first override it cannot apply. HYDRA_FULL_ERROR makes it raise instead of exiting; the
    overrides are then composed one by one to find the others.
    """
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        if before == "1":
            raise
        fail(problem_list(diagnose(arguments) or [str(error)]), 2)
    except OSError as error:
        if before == "1" or _run_began(error):
            raise
        # Hydra makes the run directory before it calls us.
        fail(f"cannot write {error.filename}: {error.strerror}. Set paths.runs to a folder you can write to.", 2)
    finally:
        if before is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def diagnose(arguments: Sequence[str]) -> list[str]:
    """Compose override by override and collect each one's complaint.

    Choices of groups come first, because `method=x` decides whether `method.y=1` is a key. An override that fails is
    left out of the next attempts. What remains is then validated like a run.

    Returns:
        One message an override that cannot be applied; empty if each can be (then the first error stands).
    """
    overrides, folder = _split(arguments)
    problems: list[str] = []
    good: list[str] = []
    GlobalHydra.instance().clear()
    schema.register()
    entry.register_resolvers()
    with initialize_config_dir(config_dir=str(entry.project_root() / "conf"), version_base="1.3"):
        config = _attempt([], folder, problems)
        for override in sorted(overrides, key=lambda text: "." in text.split("=")[0]):
            found: list[str] = []
            composed = _attempt([*good, override], folder, found)
            if composed is None:
                problems += [f"{override}: {message}{_known_keys(override, config)}" for message in found]
            else:
                good.append(override)
                config = composed
    if config is not None and problems:
        from trace_hydra.build import problems_of

        problems += problems_of(config)
    return problems


def _known_keys(override: str, config: DictConfig | None) -> str:
    """List the keys beside the one that an override names, if that one is not there."""
    path = override.split("=")[0].lstrip("+~")
    parent, _, key = path.rpartition(".")
    node = OmegaConf.select(config, parent) if config is not None and parent else config
    if not isinstance(node, DictConfig) or key in node:
        return ""
    return f" There is no {path}; keys {'of ' + parent if parent else 'at the top'}: {', '.join(map(str, node))}."


def _attempt(overrides: list[str], folder: list[str], problems: list[str]) -> DictConfig | None:
    try:
        # A sweep's value (`a=1,2`) is tried with each of its choices.
        for single in _expand(overrides):
            config = compose(config_name="config", overrides=[*folder, *single])
        return config
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        cause = f" {_first_lines(error.__cause__)}" if isinstance(error.__cause__, Exception) else ""
        problems.append(_first_lines(error) + cause)
        return None


def _expand(overrides: list[str]) -> list[list[str]]:
    parsed = OverridesParser.create().parse_overrides(overrides)
    expanded: list[list[str]] = [[]]
    for text, override in zip(overrides, parsed, strict=True):
        choices = [text]
        if override.is_sweep_override():
            prefix = text.split("=", 1)[0]
            choices = [f"{prefix}={value}" for value in override.sweep_string_iterator()]
        if len(choices) == 1 or len(expanded) == 1:
            expanded = [[*before, choice] for before in expanded for choice in choices]
        else:  # one more sweep: its choices beside the first combination are enough to see each once
            expanded = [[*before, choices[0]] for before in expanded] + [[*expanded[0], one] for one in choices[1:]]
    return expanded


def _first_lines(error: Exception) -> str:
    """Keep what a user needs of Hydra's message: no search path, no object types, no advice on Hydra itself."""
    noise = r"(Config search path|provider=|Set the environment|full_key|object_type|reference_type|To append)"
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not re.match(noise, line))


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate overrides from Hydra's flags; `--config-dir` becomes an override of the search path."""
    overrides: list[str] = []
    search: list[str] = []
    skip: str | None = None
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if skip is not None:
            if skip in ("--config-dir", "-cd"):
                search.append(argument)
            skip = None
        elif argument.startswith("-"):
            if flag in ("--config-dir", "-cd") and value:
                search.append(value)
            skip = flag if flag in _FLAGS_WITH_VALUE and not value else None
        else:
            overrides.append(argument)
    root = entry.project_root()
    path = [f"file://{root}/multirun_templates", *(f"file://{Path(folder).resolve()}" for folder in search)]
    return overrides, ["hydra.searchpath=[" + ",".join(path) + "]"]
