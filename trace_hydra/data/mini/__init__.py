"""Eight generated tasks in TRACE's form, small enough to train on a laptop; nothing is downloaded.

Names, prompts and metrics are TRACE's (arXiv:2310.06762); the rows are our own, so scores compare only with each other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from trace_hydra.data.mini import cstance, fomc, meetingbank, minuten, numglue_cm, numglue_ds, py150, scienceqa
from trace_hydra.data.mini.alignment import ROWS as ALIGNMENT
from trace_hydra.data.mini.base import Kind, make_rows
from trace_hydra.data.release import HOW_TO_GET
from trace_hydra.data.task import SPLITS, Task, TaskData, task_spec
from trace_hydra.errors import ConfigError, problem_list

KINDS: dict[str, Kind] = {
    module.KIND.name: module.KIND
    for module in (cstance, fomc, meetingbank, py150, scienceqa, numglue_cm, numglue_ds, minuten)
}


class MiniData:
    """The data source of `data=mini`."""

    variant = "mini"
    notice = (
        "data=mini holds small generated tasks, made to see that everything works; their scores compare with nothing "
        f"published. {HOW_TO_GET}"
    )

    def __init__(self, *, rows: Mapping[str, int], tasks: Mapping[str, Mapping[str, Any]], seed: int | None = None):
        """Keep the settings (conf/data/mini.yaml).

        Args:
            rows: Number of rows per task for each of train, eval and test.
            tasks: Facts about tasks that differ from TRACE's, such as shorter answer limits.
            seed: What the rows are generated from; null: the run's seed.data.
        """
        self.seed = seed
        self.rows = dict(rows)
        self.tasks = {task: dict(facts) for task, facts in tasks.items()}

    @property
    def sampled(self) -> bool:
        """Whether rows depend on the seed that `load` is given."""
        return self.seed is None

    def problems(self, tasks: Sequence[str]) -> list[str]:
        """List what stands in the way of `load`, one full message each; empty if nothing does."""
        found = [
            f"task {task!r} is unknown to data=mini. It has: {', '.join(KINDS)}." for task in tasks if task not in KINDS
        ]
        found += [
            f"data.rows.{split}={self.rows[split]!r} is no split; the splits are {', '.join(SPLITS)}."
            for split in self.rows
            if split not in SPLITS
        ]
        for split in SPLITS:
            count = self.rows.get(split)
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                found.append(f"data.rows.{split}={count!r} must be a whole number of rows, at least 1.")
                continue
            for task in tasks:
                if task in KINDS and count > (limit := KINDS[task].limit(split)):
                    cure = f"Set data.rows.{split} to at most {limit}" if limit else "Leave it out of task_order"
                    found.append(
                        f"data.rows.{split}={count} is more than {task} can give without repeating itself "
                        f"({limit} rows{'' if limit else '; it reads the source files of the Python in use'}). {cure}."
                    )
        return found

    def load(self, tasks: Sequence[str], *, seed: int) -> TaskData:
        """Generate the rows of `tasks`; the same seed gives the same bytes, whatever other tasks are asked for.

        Raises:
            ConfigError: With all that `problems` lists.
        """
        if found := self.problems(tasks):
            raise ConfigError(problem_list(found))
        own = seed if self.seed is None else self.seed
        made = {
            task: Task(
                task_spec(task, self.tasks),
                *(make_rows(KINDS[task], split, self.rows[split], own) for split in SPLITS),
            )
            for task in tasks
        }
        return TaskData(made, ALIGNMENT)
