"""General ability through lm-evaluation-harness: MMLU, GSM8K, BBH, TyDiQA, BoolQ, PIQA (arXiv:2310.06762, section 4.2).

The harness brings prompts, demonstrations, answer extraction and metrics; the model in memory, batched generation and
log-likelihoods are ours. Rows come from its data sets on the hub, or from JSON-lines files of a folder through the task
files in `tasks/`.

Differs from the paper: that used OpenCompass, whose prompts and extraction are others (docs of the protocol); scores
compare before and after, not with its table.
No answers are cached: the harness's response cache knows requests, not models.
"""

import importlib.metadata
import importlib.util
import logging
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trace_hydra.capability.base import CapabilitySet, Record
from trace_hydra.capability.harness_model import harness_model
from trace_hydra.capability.harness_sets import (
    OWN_TASKS,
    SOURCES,
    Source,
    file_hash,
    harness_tasks,
    hub_problems,
    local_problems,
    setting_problems,
)
from trace_hydra.capability.subject import Subject
from trace_hydra.errors import CapabilityError, problem_list

log = logging.getLogger(__name__)

INSTALL = "pip install 'trace-hydra[general]'"
SEED = 1234
"""The harness's own, for drawing demonstrations where they are not the first n."""
NAMES = {"acc": "accuracy", "acc_norm": "accuracy (by length)", "exact_match": "exact match", "f1": "F1"}


class Harness(CapabilitySet):
    """Some or all of the six sets.

    Args:
        sets: Name -> `shots` (demonstrations), `measure` (the harness's metric, with its filter behind a comma) and, if
            wanted, `limit` (replaces the common one) and `categories` (a list of subjects, subtasks or languages).
        root: Folder with the rows; None: the hub's data sets.
        prompt: "raw", or "chat" for the tokenizer's chat template with demonstrations as turns.
        limit: Items of each task (subject, subtask, language) at most; None: all.
        max_new_tokens: Caps the answers of every task; None: the tasks' own limits.
    """

    macro = True

    def __init__(
        self,
        *,
        sets: Mapping[str, Mapping[str, Any]],
        root: str | None,
        prompt: str,
        limit: int | None,
        max_new_tokens: int | None,
    ):
        self.sets = {str(name): {**settings} for name, settings in sets.items()}
        for settings in self.sets.values():
            if settings.get("categories") is not None:
                settings["categories"] = [str(one) for one in settings["categories"]]
        self.root = None if root is None else str(root)
        self.prompt = prompt
        self.limit = limit
        self.max_new_tokens = max_new_tokens

    def problems(self) -> list[str]:
        """List what is known to be wrong before anything is loaded."""
        found = [problem for name, settings in self.sets.items() for problem in setting_problems(name, settings)]
        if not self.sets:
            found.append(f"capability: sets is empty; choose from {', '.join(SOURCES)}.")
        if self.prompt not in ("raw", "chat"):
            found.append(f"capability: prompt={self.prompt!r} is neither raw nor chat.")
        for key in ("limit", "max_new_tokens"):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < 1):
                found.append(f"capability: {key}={value!r} of general ability must be at least 1, or null.")
        if importlib.util.find_spec("lm_eval") is None:
            return [*found, f"capability: general ability needs the package lm-eval: {INSTALL}."]
        if self.root is not None and not Path(self.root).expanduser().is_dir():
            return [*found, f"paths.ability={self.root} is not a folder. Set it to the rows, or to null for the hub."]
        if found:
            return found
        for name, settings in self.sets.items():
            found += hub_problems(name, settings) if self.root is None else local_problems(name, settings, self.root)
        return found

    def warnings(self, model: Any) -> list[str]:
        """Say that answers may not fit the model's positions."""
        length = getattr(model, "context_length", None)
        if isinstance(length, int) and length < 2048:
            return [f"general ability: model={model.name} has {length} positions; prompts of five shots will be cut."]
        return []

    def identity(self) -> dict[str, Any]:
        """Say what decides outputs and scores."""
        files = {file for name in self.sets if name in SOURCES for file in SOURCES[name].local_files}
        root = None if self.root is None else Path(self.root).expanduser()
        return {
            "version": self.version,
            "lm_eval": _version("lm-eval"),
            "sets": self.sets,
            "rows": "hub" if root is None else {file: file_hash(root / file) for file in sorted(files)},
            "prompt": self.prompt,
            "limit": self.limit,
            "max_new_tokens": self.max_new_tokens,
        }

    def measure(self, subject: Subject) -> list[Record]:
        """Let the model answer every item, set by set.

        Raises:
            CapabilityError: If a setting is wrong, data cannot be read, or the model is too short for an item.
        """
        if found := self.problems():
            raise CapabilityError(problem_list(found))
        if self.prompt == "chat" and not subject.tokenizer.chat_template:
            raise CapabilityError("capability: prompt=chat of general ability, but the model has no chat template.")
        with _quiet():
            model = harness_model(subject, self.max_new_tokens)
            records = [record for name in self.sets for record in self._measure_set(name, model)]
        if model.cut:
            log.warning(
                "general ability: %d prompts were cut at their start, by up to %d tokens, to fit the model's %d.",
                len(model.cut),
                max(model.cut.values()),
                subject.max_length,
            )
        return records

    def _measure_set(self, name: str, model: Any) -> list[Record]:
        from lm_eval.evaluator import evaluate

        source, settings, start = SOURCES[name], self.sets[name], time.perf_counter()
        tasks = self._tasks(name)
        for task in tasks.values():
            task.set_config(key="num_fewshot", value=settings["shots"])
            task.set_fewshot_seed(seed=SEED)
        # Not simple_evaluate: it seeds the process's random generators and looks up the machine's packages.
        results: Any = evaluate(
            lm=model,
            task_dict={"tasks": tasks},
            limit=self.limit if settings.get("limit") is None else settings["limit"],
            cache_requests=False,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=self.prompt == "chat",
            fewshot_as_multiturn=self.prompt == "chat",
        )
        metric, _, chosen = settings["measure"].partition(", ")
        records = [
            {
                "area": "general",
                "set": name,
                "category": source.category(task) if source.group_by else name,
                "id": str(sample["doc_id"]),
                "measure": f"{NAMES[metric]}{f' ({chosen})' if chosen else ''}",
                "score": 100.0 * float(sample[metric]),
                **_for_reader(sample, tasks[task], model.cut),
            }
            for task in tasks
            for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
            if sample["filter"] == (chosen or "none")
        ]
        log.info("general ability: %s, %d items in %.0f s", name, len(records), time.perf_counter() - start)
        return records

    def _tasks(self, name: str) -> dict[str, Any]:
        """Load the set's tasks, one a category, in the order of their names."""
        from lm_eval.tasks import TaskManager

        source, folder = SOURCES[name], harness_tasks()
        theirs = [folder / source.folder] if folder else []
        manager = TaskManager(
            include_defaults=False,  # reading all of its 14,000 task files takes long
            include_path=[*theirs, *([] if self.root is None else [OWN_TASKS])],
            metadata={} if self.root is None else {"ability": str(Path(self.root).expanduser().absolute())},
        )
        wanted = set(self.sets[name].get("categories") or source.categories())
        names = sorted(_task_names(source, manager.all_subtasks, wanted))
        try:
            loaded = manager.load(names if self.root is None else [f"local_{name}"])["tasks"]
        except Exception as error:
            where = f"{source.hub} of the hub" if self.root is None else self.root
            raise CapabilityError(
                f"capability set {name} cannot be read from {where}: {type(error).__name__}: {error}. Set "
                "paths.ability to a folder with the rows, or make the hub reachable."
            ) from error
        return {one: loaded[one] for one in names}


def _task_names(source: Source, known: list[str], wanted: set[str]) -> list[str]:
    if not source.group_by:
        return [source.prefix]
    return [name for name in known if name.startswith(source.prefix) and source.category(name) in wanted]


def _for_reader(sample: Any, task: Any, cut: Mapping[str, int]) -> dict[str, Any]:
    """Say what was asked and answered; `prompt` leaves the demonstrations out, its hash does not."""
    made = {
        "prompt": task.doc_to_text(sample["doc"]),
        "prompt_hash": sample["prompt_hash"][:16],
        "prompt_cut": cut.get(sample["arguments"][0][0], 0),
    }
    if task.config.doc_to_choice is None:
        output, reference = sample["resps"][0][0], sample["target"]
        return made | {"output": output, "extracted": sample["filtered_resps"][0], "reference": reference}
    choices = task.doc_to_choice(sample["doc"])
    nats = [float(one[0][0]) for one in sample["resps"]]
    best = max(range(len(choices)), key=nats.__getitem__)
    return made | {"output": choices[best], "reference": choices[sample["target"]], "log_likelihoods": nats}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the harness's messages and progress bars; undo what importing it sets and what it draws."""
    from unittest.mock import patch

    environment, drawn = dict(os.environ), random.getstate()  # it makes up names for what has none
    import lm_eval.api.task
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    shown = not are_progress_bars_disabled()
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        with patch.object(lm_eval.api.task, "tqdm", lambda items, **_: items):
            yield
    finally:
        random.setstate(drawn)
        logger.setLevel(level)
        if shown:
            enable_progress_bars()
