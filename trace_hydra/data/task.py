"""What a task is: its rows and the facts about it that other code needs (arXiv:2310.06762, Table 4 and Table 32).

Nothing else in the package branches on a task's name; a new task brings its own `TaskSpec` through `data.tasks`.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from trace_hydra.data.reasoning import SPLITTERS, final_answer
from trace_hydra.errors import ConfigError
from trace_hydra.names import NAME, name_fault

SPLITS = ("train", "eval", "test")
TASK_NAME = NAME
"""A task's name is part of paths."""
LETTERED = "lettered"
"""Options that each prompt lists in lines of its own, "A. ...", "B. ..."; the answer is the letter."""
METRICS = ("accuracy", "first_character", "rouge_l", "edit_similarity", "sari")


@dataclass(frozen=True)
class Example:
    """One row of a task."""

    id: str
    """Names the row in predictions and audits, `<split>-<number of the row in its file, from 0>`."""
    prompt: str
    """The whole input, instruction included."""
    answer: str
    """The reference output."""
    rationale: str = ""
    """Reasoning that leads to the answer; empty where the data has none."""


@dataclass(frozen=True)
class TaskSpec:
    """The facts about a task that its rows do not carry."""

    name: str
    metric: str
    """The metric that enters OP, one of `METRICS`."""
    max_new_tokens: int
    """Answer limit in generated tokens under a protocol that sets none itself."""
    instruction: str = ""
    """The head that all prompts of the task share; kept when a prompt is cut. Empty: taken from the rows."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer; generation stops there and the answer is cut before them."""
    language: str = "en"
    """BCP 47 code of the answers, or "py"."""
    splitter: str | None = None
    """How a final answer is taken out of a prediction that holds reasoning, one of `SPLITTERS`; None: it holds none."""
    letters: str = ""
    """With a splitter, the options of a task whose final answers are single letters, such as "ABC"."""
    options: tuple[str, ...] | str = ()
    """The closed set that the scored answer is one of, or `LETTERED`; (): any text. See `protocol.closed_answers`."""

    def __post_init__(self):
        if not TASK_NAME.fullmatch(self.name):
            raise ConfigError(f"data.tasks: {self.name[:100]!a} is no task name: {name_fault(self.name)}.")
        if self.metric not in METRICS:
            raise ConfigError(f"data.tasks.{self.name}.metric={self.metric!r} is none of {', '.join(METRICS)}.")
        if self.max_new_tokens < 1:
            raise ConfigError(f"data.tasks.{self.name}.max_new_tokens={self.max_new_tokens} must be at least 1.")
        if self.splitter is not None and self.splitter not in SPLITTERS:
            raise ConfigError(
                f"data.tasks.{self.name}.splitter={self.splitter!r} is none of {', '.join(SPLITTERS)}, or null."
            )
        if fault := _options_fault(self.metric, self.options):
            raise ConfigError(f"data.tasks.{self.name}.options={self.options!r} {fault}.")


@dataclass(frozen=True)
class Task:
    """A task with the rows of its three splits, in the order of their files."""

    spec: TaskSpec
    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def name(self) -> str:
        """The task's name."""
        return self.spec.name

    # Worked out once: the jobs of a sweep share tasks of thousands of rows.
    @cached_property
    def instruction(self) -> str:
        """The head of every prompt: the declared one, else what the prompts of train share up to a line's end."""
        return shared_instruction(self.spec.instruction, [example.prompt for example in self.train])

    @cached_property
    def train_hash(self) -> str:
        """Hash of the train rows: 16 hex digits."""
        return rows_hash(self.train)

    @cached_property
    def test_hash(self) -> str:
        """Hash of prompts and answers of the test rows, without rationales: 16 hex digits."""
        return rows_hash(replace(example, rationale="") for example in self.test)

    @cached_property
    def prompts_hash(self) -> str:
        """Hash of the test prompts: 16 hex digits."""
        return texts_hash(example.prompt for example in self.test)


@dataclass(frozen=True)
class TaskData:
    """What a data source gives: the tasks asked for, and alignment rows for replay (LIMA) where it has them."""

    tasks: dict[str, Task]
    alignment: tuple[Example, ...] = ()


def final_prediction(text: str, spec: TaskSpec) -> str:
    """Take the final answer out of what a model wrote, if the task's answers hold reasoning."""
    return text if spec.splitter is None else final_answer(text, spec.letters, spec.splitter)


def shared_instruction(declared: str, prompts: Sequence[str]) -> str:
    """Find the head that all prompts start with.

    Returns `declared` if every prompt starts with it. Otherwise the longest common prefix, cut after its last newline
    (and empty without one, so that a shared first word is not taken for an instruction). A single prompt tells
    nothing: empty.
    """
    if declared and all(prompt.startswith(declared) for prompt in prompts):
        return declared
    if len(set(prompts)) < 2:
        return ""
    first, last = min(prompts), max(prompts)  # what these two share, all share
    length = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return first[: first.rfind("\n", 0, length) + 1]


def rows_hash(examples: Iterable[Example]) -> str:
    """Hash prompts and answers in order: 16 hex digits that change with any row, its text or its place."""
    return texts_hash(text for one in examples for text in (one.prompt, one.answer, one.rationale))


def texts_hash(texts: Iterable[str]) -> str:
    """Hash texts in order, each with its length before it: 16 hex digits."""
    digest = hashlib.sha256()
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.hexdigest()[:16]


def _options_fault(metric: str, options: Any) -> str | None:
    if options in ((), LETTERED):
        return None
    if not isinstance(options, tuple) or not all(isinstance(one, str) for one in options):
        return f"must be a list of texts (in quotes: YAML reads yes and no otherwise), or {LETTERED}"
    if len(options) < 2 or len({one.strip() for one in options} - {""}) < len(options):
        return "must be at least two texts, none empty, none twice"
    if metric == "first_character" and any(len(one) > 1 for one in options):
        return "holds longer texts than the one character that metric=first_character scores"
    return None


_CHOICE_ZH = "判断以下文本对指定对象的态度，选择一项：A.支持，B.反对，C.中立。输出A，B或者C。\n"
_STANCE_EN = (
    "What is the monetary policy stance for the following text? A. dovish, B. hawkish, C. neutral. "
    "Choose one from A, B and C.\n"
)
_MATH = "Solve the following math problem.\n"

# Order 1 of the paper. Instructions: Table 32; metrics: Table 4. The answer limits are ours: above the longest answer
# of the release for short answers, near its median for long ones (protocol=official uses 512 for all, as TRACE does).
TRACE_TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec("C-STANCE", "accuracy", 4, _CHOICE_ZH, language="zh", options=("A", "B", "C")),
        TaskSpec("FOMC", "accuracy", 4, _STANCE_EN, options=("A", "B", "C")),
        TaskSpec("MeetingBank", "rouge_l", 160, "Write a summary of the following meeting transcripts.\n"),
        TaskSpec("Py150", "edit_similarity", 64, "", stop=("<EOL>", "\n"), language="py"),
        TaskSpec(
            "ScienceQA",
            "first_character",
            256,
            "Choose an answer for the following question and give your reasons.\n",
            options=LETTERED,
        ),
        TaskSpec("NumGLUE-cm", "accuracy", 12, _MATH, stop=("\n",)),
        TaskSpec("NumGLUE-ds", "accuracy", 12, _MATH, stop=("\n",)),
        TaskSpec(
            "20Minuten",
            "sari",
            160,
            "Provide a simplified version of the following paragraph in German.\n",
            language="de",
        ),
    )
}


def task_spec(name: str, overrides: dict[str, dict] | None = None) -> TaskSpec:
    """Look a task's facts up: `data.tasks.<name>` from the configuration over TRACE's own.

    Raises:
        ConfigError: If neither knows the task, or a field is unknown or wrong.
    """
    given = dict((overrides or {}).get(name) or {})
    base = TRACE_TASKS.get(name)
    if base is None and "metric" not in given:
        raise ConfigError(
            f"task {name!r} is unknown. TRACE's tasks: {', '.join(TRACE_TASKS)}. A task of your own needs "
            f"data.tasks.{name}.metric (one of {', '.join(METRICS)}) and data.tasks.{name}.max_new_tokens."
        )
    known = {"metric", "max_new_tokens", "instruction", "stop", "language", "splitter", "letters", "options"}
    if unknown := sorted(set(given) - known):
        raise ConfigError(f"data.tasks.{name} has unknown keys {unknown}; known: {sorted(known)}.")
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    if not isinstance(given.get("options", ""), str):
        given["options"] = tuple(given["options"] or ())
    fields = {key: getattr(base, key) for key in known} if base else {"max_new_tokens": 64}
    return TaskSpec(name=name, **{**fields, **given})
