"""The official layout of TRACE: the four variants of the release, or any folder in that layout.

Settings are checked by `problems`, not by the constructor, so that a run reports all of them at once.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_hydra.data.release import (
    HOW_TO_GET,
    VARIANT_FOLDERS,
    WITHOUT_EVAL,
    release_warnings,
    variant_folder,
    variants_in,
)
from trace_hydra.data.rows import FileRows, read_split
from trace_hydra.data.select import select
from trace_hydra.data.task import SPLITS, TASK_NAME, Example, Task, TaskData, task_spec
from trace_hydra.errors import ConfigError, DataError, problem_list

_log = logging.getLogger(__name__)
_MOST_PROBLEMS = 20


class TraceData:
    """Reads `<root>/<Task>/{train,eval,test}.json` (`data.rows`) and chooses rows (`data.select`)."""

    def __init__(
        self,
        *,
        name: str,
        root: str | None,
        variant: str | None,
        limit: Mapping[str, int | None],
        max_prompt_chars: Mapping[str, int | None],
        dedupe: bool,
        drop_leaked: bool,
        strict: bool,
        alignment: str | None,
        tasks: Mapping[str, Mapping[str, Any]] | None,
    ):
        """Keep the settings; `conf/data/trace.yaml` explains each. Nothing is read yet.

        Raises:
            ConfigError: If a setting that should be a mapping is none.
        """
        self.name = name
        self.root = root
        self.variant = variant
        self.limit = _mapping("limit", limit)
        self.max_prompt_chars = _mapping("max_prompt_chars", max_prompt_chars)
        self.dedupe = dedupe
        self.drop_leaked = drop_leaked
        self.strict = strict
        self.alignment = alignment
        self.tasks = {task: _mapping(f"tasks.{task}", facts) for task, facts in _mapping("tasks", tasks).items()}
        self.files: dict[str, dict[str, dict[str, Any]]] = {}
        """task -> split -> `FileRows.info` of what the last `load` read, "dropped" with the rows not chosen."""
        self._read: dict[tuple[str, str], tuple[tuple[int, int] | None, FileRows]] = {}

    @property
    def sampled(self) -> bool:
        """Whether rows depend on the seed that `load` is given."""
        return any(size is not None for size in self.limit.values())

    def problems(self, tasks: Sequence[str]) -> list[str]:
        """List what stands in the way of `load`: settings, folders, files, rows. All files of `tasks` are read.

        At most 20 are written out, taken in turn from each file, so that one bad file does not hide the others.
        """
        names = list(dict.fromkeys(tasks))
        groups = [self._setting_problems(), *(self._spec_problems(task) for task in names)]
        if not names:
            groups.append(["no task was asked for; task_order.tasks is empty."])
        if self.root is None:
            groups.append([f"data={self.name} needs a folder, paths.data is null. {HOW_TO_GET}"])
        elif not self._root.is_dir():
            kind = "is no folder" if self._root.exists() else "does not exist"
            groups.append([f"paths.data={self.root} {kind}. {HOW_TO_GET}"])
        else:
            groups += self._folder_problems([task for task in names if TASK_NAME.fullmatch(task)])
        return _in_turn(groups, _MOST_PROBLEMS)

    def load(self, tasks: Sequence[str], *, seed: int) -> TaskData:
        """Read the tasks and choose their rows.

        Args:
            tasks: Names of tasks; the order has no influence on any task's rows.
            seed: Seeds the samples that `limit` asks for.

        Raises:
            DataError: With all that `problems` lists.
        """
        if problems := self.problems(tasks):
            raise DataError(problem_list(problems))
        self.files = {}
        loaded = {}
        for task in dict.fromkeys(tasks):
            rows = self._chosen(task, SPLITS, seed)
            loaded[task] = Task(task_spec(task, self.tasks), train=rows["train"], eval=rows["eval"], test=rows["test"])
        alignment = self._chosen(str(self.alignment), ("train",), seed)["train"] if self._has_alignment() else ()
        self._warn_of_other_files()
        self._read.clear()
        return TaskData(tasks=loaded, alignment=alignment)

    @property
    def _root(self) -> Path:
        return Path(str(self.root)).expanduser()

    @property
    def _folder(self) -> Path:
        """The folder that holds the task folders."""
        return variant_folder(self._root, self.variant)

    def _has_alignment(self) -> bool:
        name = str(self.alignment or "")
        return TASK_NAME.fullmatch(name) is not None and (self._folder / name).is_dir()

    def _setting_problems(self) -> list[str]:
        found = []
        if self.variant is not None and self.variant not in VARIANT_FOLDERS:
            found.append(f"data.variant={self.variant!r} is none of {', '.join(VARIANT_FOLDERS)}, null.")
        for key, values in (("limit", self.limit), ("max_prompt_chars", self.max_prompt_chars)):
            for split, value in values.items():
                if split not in SPLITS:
                    found.append(f"data.{key}.{split} is unknown; known: {', '.join(SPLITS)}.")
                elif value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                    found.append(
                        f"data.{key}.{split}={value!r} must be a whole number, at least 1, or null for no limit."
                    )
        for key in ("dedupe", "drop_leaked", "strict"):
            if not isinstance(getattr(self, key), bool):
                found.append(f"data.{key}={getattr(self, key)!r} must be true or false.")
        if self.alignment is not None and not TASK_NAME.fullmatch(str(self.alignment)):
            found.append(f"data.alignment={self.alignment!r} is no folder name; use letters, digits, '_', '.', '-'.")
        return found

    def _spec_problems(self, task: str) -> list[str]:
        try:
            task_spec(task, self.tasks)
        except ConfigError as error:
            return [str(error)]
        except TypeError as error:  # max_new_tokens: "12", say
            return [f"data.tasks.{task}: a value of a wrong type ({error})."]
        return []

    def _folder_problems(self, names: list[str]) -> list[list[str]]:
        """List what is wrong below the root, a group for each file."""
        there = [task for task in names if (self._folder / task).is_dir()]
        if names and not there:
            archives = variants_in(self._root)
            folders = ", ".join(VARIANT_FOLDERS[variant] for variant in archives)
            hint = f"It holds {folders}: choose data={archives[0]}." if archives else HOW_TO_GET
            return [[f"paths.data={self.root} has none of the task folders {', '.join(names)}. {hint}"]]
        where = "Set paths.data to the folder that holds all task folders, or leave the task out of task_order.tasks."
        groups = [[f"{self._folder} has no folder {task}. {where}"] for task in names if task not in there]
        for task in there:
            files = [self._file(task, split) for split in SPLITS]
            groups += [self._file_problems(file) for file in files]
            if not any(file.fatal for file in files):
                groups.append(self._emptied(task))
        if self._has_alignment():
            groups.append(self._file_problems(self._file(str(self.alignment), "train")))
        return groups

    def _file_problems(self, file: FileRows) -> list[str]:
        return [*(file.problems if self.strict else ()), *([file.fatal] if file.fatal else [])]

    def _emptied(self, task: str) -> list[str]:
        """Say which splits have no row left to use; an empty eval is allowed."""
        if self._setting_problems():
            return []
        chosen, _ = self._select(task, SPLITS, seed=0)
        return [
            f"{task}/{split}.json has no row left with data.strict={self.strict}, data.drop_leaked={self.drop_leaked}, "
            f"data.max_prompt_chars.{split}={self.max_prompt_chars.get(split)}."
            for split in ("train", "test")
            if not chosen[split]
        ]

    def _chosen(self, task: str, splits: Sequence[str], seed: int) -> dict[str, tuple[Example, ...]]:
        """Choose a folder's rows, note its files for the audit, and log what a reader of the scores should know."""
        chosen, dropped = self._select(task, splits, seed)
        self.files[task] = {}
        for split in splits:
            file = self._file(task, split)
            if not file.sha256:  # an eval.json that may be absent, and is
                continue
            info = self.files[task][split] = file.info()
            info["dropped"].update(dropped[split])
            if info["dropped"]:
                counts = ", ".join(f"{count} ({reason})" for reason, count in info["dropped"].items())
                level = logging.WARNING if file.dropped else logging.INFO
                _log.log(level, "%s/%s.json: of %d rows not used: %s", task, split, file.rows, counts)
        return chosen

    def _warn_of_other_files(self) -> None:
        """Log once if the files are not those of the variant; scores on them compare with no published ones."""
        found = [text for task, files in self.files.items() for text in release_warnings(self.variant, task, files)]
        if found:
            _log.warning(
                "%d files are not those of %s; the first: %s All: python -m trace_hydra.audit %s --variant %s",
                *(len(found), self.variant, found[0], self.root, self.variant),
            )

    def _select(self, task: str, splits: Sequence[str], seed: int):
        return select(
            {split: self._file(task, split).examples for split in splits},
            task=task,
            seed=seed,
            limit=self.limit,
            max_prompt_chars=self.max_prompt_chars,
            dedupe=self.dedupe,
            drop_leaked=self.drop_leaked,
        )

    def _file(self, task: str, split: str) -> FileRows:
        """Read a file, once until `load` is done unless it changes: `problems` and `load` share the work."""
        try:
            stat = (self._folder / task / f"{split}.json").stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
        except OSError:
            stamp = None
        if (task, split) not in self._read or self._read[task, split][0] != stamp:
            self._read[task, split] = (stamp, read_split(self._root, self._folder, task, split))
        file = self._read[task, split][1]
        return FileRows() if file.missing and split == "eval" and self.variant in WITHOUT_EVAL else file


def _mapping(key: str, value: Any) -> dict:
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"data.{key}={value!r} must be a mapping, as in conf/data/trace.yaml.")
    return dict(value or {})


def _in_turn(groups: Sequence[Sequence[str]], most: int) -> list[str]:
    """Join groups of problems: all in order if there are at most `most`, else the first of each group, and so on."""
    total = sum(len(group) for group in groups)
    if total <= most:
        return [problem for group in groups for problem in group]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*groups))
    shown = list(itertools.islice((problem for problem in turns if problem is not None), most))
    return [*shown, f"... and {total - most} more."]
