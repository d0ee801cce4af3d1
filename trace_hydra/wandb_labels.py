"""How a run is known to W&B: its id, and the names in its configuration by which tables and dashboards group runs."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import yaml

from trace_hydra import entry
from trace_hydra.collect import comparable, settings_of
from trace_hydra.keys import digest
from trace_hydra.plan import RunInfo

ID_FILE = "wandb_id"
ID = re.compile(r"[\w-]{1,64}", re.ASCII)
"""What an id is, for `fullmatch`."""


def known_id(directory: Path) -> str | None:
    """Give the W&B id that a run directory has, None if it never was a W&B run."""
    try:
        found = (directory / ID_FILE).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return found if ID.fullmatch(found) else None


def labels(run: RunInfo) -> dict[str, str]:
    """Name a run's parts; runs with equal `method_name`, `order_name` and `comparable` differ in seeds alone."""
    return {
        "method_name": run.method,
        "order_name": order_label(run.task_order, run.tasks),
        "comparable": comparable(
            run.model, run.tuning, run.data, run.protocol, run.fingerprint, settings_of(run.directory)
        ),
        "model_name": run.model,
        "tuning_name": run.tuning,
        "data_name": run.data,
        "protocol_name": run.protocol,
        "protocol_fingerprint": run.fingerprint,
    }


def order_label(name: str, tasks: Sequence[str]) -> str:
    """Name a task order: as conf/task_order does, and with a hash of the tasks if they are other ones than there."""
    return name if tuple(tasks) == orders().get(name) else f"{name}-{digest(list(tasks), 4)}"


@cache
def orders() -> dict[str, tuple[str, ...]]:
    """Read the fixed orders of conf/task_order: name -> tasks."""
    found = {}
    for path in sorted((entry.project_root() / "conf" / "task_order").glob("*.yaml")):
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(node.get("tasks"), list) and not node.get("shuffle"):
            found[path.stem] = tuple(node["tasks"])
    return found
