"""Examples kept from earlier tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import ceil
from random import Random
from typing import Any

from trace_hydra.data.task import Example
from trace_hydra.methods.base import Method
from trace_hydra.sizes import RunSize


class ExampleMemory:
    """A seeded sample of each past task's train rows."""

    def __init__(self):
        self.by_task: dict[str, list[Example]] = {}

    def keep(self, task: str, examples: Sequence[Example], fraction: float, rng: Random) -> None:
        """Keep a random share of a task's rows, at least one; replaces what was kept of that task."""
        self.by_task[task] = rng.sample(list(examples), kept_rows(len(examples), fraction))

    def examples(self) -> list[Example]:
        """All kept rows, tasks in the order they came."""
        return [example for kept in self.by_task.values() for example in kept]

    def __len__(self) -> int:
        return sum(map(len, self.by_task.values()))

    def state_dict(self) -> dict[str, Any]:
        """Give the kept rows as JSON values."""
        return {task: [asdict(example) for example in kept] for task, kept in self.by_task.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.by_task = {task: [Example(**row) for row in kept] for task, kept in state.items()}


class RowKeeper(Method):
    """A method whose only state is rows of past tasks, in `memory`."""

    def __init__(self):
        self.memory = ExampleMemory()

    def num_stored_examples(self) -> int:
        """The rows in the memory."""
        return len(self.memory)

    def state_dict(self) -> dict[str, Any]:
        """The kept rows."""
        return {"memory": self.memory.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the kept rows back."""
        self.memory.load_state_dict(state["memory"])


def rows_size(size: RunSize, kept: Sequence[float]) -> float:
    """Bytes of kept rows in a method's state, from how many rows of each task are kept."""
    names = 24 * sum(count > 0 for count in kept)  # a task's name, its brackets
    return names + sum(count * each for count, each in zip(kept, size.row_bytes, strict=True))


def kept_rows(num_rows: int, fraction: float) -> int:
    """How many of a task's rows a share keeps: rounded up, so never none."""
    return min(num_rows, max(1, ceil(num_rows * fraction - 1e-9)))
