"""What happens to the command line before Hydra reads it: project root, resolvers, overrides Hydra cannot read.

Nothing here loads torch; `--cfg job` stays fast.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from trace_hydra.errors import ConfigError
from trace_hydra.keys import name_of, run_key
from trace_hydra.names import LONGEST_PART, safe_name

_PACKAGE = Path(__file__).resolve().parent
# `seed=0,1`: Hydra 1.3 refuses numbers as options of a group, so they are quoted before it reads them.
_NUMBERED = re.compile(r"seed=(\d+(?:,\d+)*)")
NAMED_NODES = ("model", "method", "tuning", "data", "task_order")
"""Parts of the configuration whose names make the run directory's."""
_MULTIRUN = ("-m", "--multirun")
# `task_order=[A,B]` (or several lists, for a sweep): Hydra would look for option files A.yaml and B.yaml.
_ORDER_LIST = re.compile(r"task_order=(\[.*\])")
_typed: list[str] = []
"""The command line of this process."""


def project_root() -> Path:
    """Find the folder that holds `conf/`: the checkout, or the copy inside an installed wheel."""
    checkout = _PACKAGE.parent
    return checkout if (checkout / "conf" / "config.yaml").is_file() else _PACKAGE / "_data"


def remember(arguments: Sequence[str]) -> None:
    """Keep the command line as it was typed, for messages that say how to go on."""
    _typed[:] = arguments


def typed() -> list[str]:
    """Give the command line of this process as it was typed; nothing where a launcher started it."""
    return list(_typed)


def rewrite_overrides(arguments: Sequence[str]) -> list[str]:
    """Rewrite what Hydra refuses: `seed=0,1`, `task_order=[A,B]`, and `-m` between overrides."""
    flags = [argument for argument in arguments if argument in _MULTIRUN]
    rewritten = []
    for argument in arguments:
        if argument in flags:
            continue
        if match := _NUMBERED.fullmatch(argument):
            argument = "seed=" + ",".join(f"'{number}'" for number in match[1].split(","))
        elif match := _ORDER_LIST.fullmatch(argument):
            rewritten.append("task_order.name=custom")
            argument = f"task_order.tasks={match[1]}"
        rewritten.append(argument)
    return [*flags[:1], *rewritten]


def run_directory_name(config: DictConfig, known: Mapping[str, Any] | None = None) -> str:
    """Name a run's folder from what it does; the last part is the run key, a hash of the whole configuration.

    Args:
        config: The run's.
        known: As for `keys.run_key`.

    Raises:
        ConfigError: If the names of the parts cannot be a folder's.
    """
    parts = [safe_name(name_of(config, node), f"{node}.name") for node in NAMED_NODES]
    name = "-".join([*parts, f"seed{config.seed.train}", run_key(config, known)])
    if len(name) > LONGEST_PART:
        raise ConfigError(
            f"the names of {', '.join(NAMED_NODES)} make a folder of {len(name)} characters, more than {LONGEST_PART}. "
            "Shorten one of them, such as model.name."
        )
    return name


def gpus() -> list[str]:
    """Name the NVIDIA GPUs that this process may use, without loading torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))


def processes_that_fit() -> int:
    """Say how many runs have room side by side on this machine: one a GPU, otherwise one for two usable cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return len(gpus()) or max(cores // 2, 1)


def register_resolvers() -> None:
    """Register `trace_hydra.root`, `trace_hydra.processes` and `run_dir`; calling it again changes nothing."""
    OmegaConf.register_new_resolver("trace_hydra.root", lambda: str(project_root()), replace=True)
    OmegaConf.register_new_resolver("trace_hydra.processes", processes_that_fit, replace=True)
    OmegaConf.register_new_resolver("run_dir", lambda *, _root_: run_directory_name(_root_), replace=True)
