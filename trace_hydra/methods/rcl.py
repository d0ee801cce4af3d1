"""Reasoning-augmented continual learning (Wang et al. 2023, arXiv:2310.06762, section 5, Tables 3 and 33).

Paper -> code:  records with rationales -> rows that hold reasoning and answer are trained on as they are (the Reasoning
        variant of the data); rows with a `rationale` become rationale, answer_mark, answer; others stay plain
    loss on rationale and answer -> `Method.losses`;  score of the final answer -> `answer`, data/reasoning.py
    prompt that asks for reasoning (Table 33) -> as the Reasoning variant has it; cue for rows with a `rationale`
Differs from the paper: all rows of the data, not 500 a task; rationales are the data's own, none is written by GPT-4.
    A task whose answers are a letter and a text (ScienceQA) is answered with the letter, as in the Reasoning variant.
Differs from official TRACE: no code there, no splitter either. splitter=re_eval is the one behind published numbers; it
    leaves MeetingBank's reasoning in the summary.
Memory: none. Compute: answers are as much longer, in training and generation, as their reasoning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from trace_hydra.context import StageContext, TrainTask
from trace_hydra.data.reasoning import (
    SPLITTERS,
    answer_comes_first,
    final_answer,
    holds_reasoning,
    option_letters,
)
from trace_hydra.data.task import Example
from trace_hydra.errors import ConfigError
from trace_hydra.methods.base import Method
from trace_hydra.plan import Phase


@dataclass(frozen=True)
class Layout:
    """What a task's train rows say about its answers."""

    reasons: bool
    """Whether any row holds or is given reasoning."""
    built: bool
    """Whether rows are put together from a rationale and an answer."""
    answer_first: bool
    """Whether the reasoning stands behind the answer, in all rows."""
    letters: str
    """Options of a task with single letters as final answers; empty for other tasks."""
    num_tokens: int
    """Tokens of the longest trained answer with its end token, after the encoder's limit."""


class ReasoningAugmented(Method):
    """Train on reasoning and answer, give the answer alone.

    Args:
        rationales: "auto" trains rows without reasoning on their plain answer, "required" refuses them.
        answer_mark: What stands between a rationale and its answer, by the task's language, "default" for others; one
            that `final_answer` knows.
        cue: What takes the place of a prompt's last line where rows are put together from a rationale, by language;
            null leaves prompts as they are. The same in training and when answering.
        splitter: "ours" or "re_eval", see data/reasoning.py.
        max_new_tokens: Most tokens of an answer with reasoning; a larger limit of the task counts instead.
    """

    sharded = True
    published = MappingProxyType({"full": "RCL"})

    def __init__(
        self,
        *,
        rationales: Literal["auto", "required"],
        answer_mark: Mapping[str, str],
        cue: Mapping[str, str] | None,
        splitter: Literal["ours", "re_eval"],
        max_new_tokens: int,
    ):
        if rationales not in ("auto", "required"):
            raise ConfigError(f"method.rationales={rationales!r} must be 'auto' or 'required'.")
        if splitter not in SPLITTERS:
            raise ConfigError(f"method.splitter={splitter!r} is none of {', '.join(SPLITTERS)}.")
        if max_new_tokens < 1:
            raise ConfigError(
                f"method.max_new_tokens={max_new_tokens} must be at least 1; it is the limit of reasoning and answer."
            )
        for key, texts in (("answer_mark", answer_mark), ("cue", cue)):
            if texts is not None and "default" not in texts:
                raise ConfigError(f"method.{key}={texts} needs a text for 'default'; it is for languages not named.")
        for language, mark in answer_mark.items():
            if final_answer(f"why{mark}x", splitter=splitter) != "x":
                raise ConfigError(
                    f"method.answer_mark.{language}={mark!r} is no mark that splitter={splitter} finds again; use a "
                    "newline, 'Answer', '回答' or '答案', and a colon."
                )
        self.rationales = rationales
        self.answer_mark = dict(answer_mark)
        self.cue = dict(cue) if cue is not None else None
        self.splitter = splitter
        self.max_new_tokens = max_new_tokens
        self._layouts: dict[str, Layout] = {}

    def row_problems(self, task: TrainTask) -> list[str]:
        """Name rows without reasoning if rationales=required, and answers with reasoning that cannot be chosen."""
        reasoned = [row.id for row in task.train if row.rationale or holds_reasoning(row.answer)]
        if task.options and reasoned:
            return [
                f"{task.name}: answers come with reasoning (as train row {reasoned[0]}), so they cannot be chosen "
                "among options. Set protocol.closed_answers=generate."
            ]
        bare = [row.id for row in task.train if not row.rationale and not holds_reasoning(row.answer)]
        if not bare or self.rationales != "required":
            return []
        return [
            f"{task.name}: {len(bare)} of {len(task.train)} train rows hold no reasoning and no rationale (the first: "
            f"{bare[0]}). Set method.rationales=auto to train them on their plain answer."
        ]

    def phases(self, ctx: StageContext) -> Sequence[Phase]:
        """The task's rows with their reasoning."""
        return [Phase("task", self.rows(ctx.task), ctx.epochs_of(ctx.task.name))]

    def rows(self, task: TrainTask) -> list[Example]:
        """Put a task's training rows together."""
        letters = _letters(task)
        built = any(row.rationale for row in task.train)
        return [self._row(row, task.language, built, letters) for row in task.train]

    def answer(self, ctx: StageContext, prompts: Sequence[str], task: TrainTask) -> list[str]:
        """Generate reasoning and answer, give the answer."""
        layout = self._layout(ctx, task)
        if not layout.reasons:
            return super().answer(ctx, prompts, task)
        asked = [self._prompt(prompt, task.language) for prompt in prompts] if layout.built else prompts
        limit, stop = task.max_new_tokens, task.stop
        if not layout.answer_first:  # a stop string may stand in the reasoning
            limit, stop = max(limit, min(layout.num_tokens, self.max_new_tokens)), ()
        texts = ctx.generate(asked, limit, instruction=task.instruction, stop=stop)
        return [final_answer(text, layout.letters, self.splitter) for text in texts]

    def _row(self, row: Example, language: str, built: bool, letters: str) -> Example:
        prompt = self._prompt(row.prompt, language) if built else row.prompt
        if not row.rationale:
            return replace(row, prompt=prompt)
        answer = _first_line(row.answer) if letters else row.answer
        return replace(row, prompt=prompt, answer=row.rationale.strip() + _by(self.answer_mark, language) + answer)

    def _prompt(self, prompt: str, language: str) -> str:
        """Replace a prompt's last line if it is a cue, that is ends in a colon; else put the cue below it."""
        if self.cue is None:
            return prompt
        head, line, last = prompt.rpartition("\n")
        text = head if line and last.endswith((":", "：")) else prompt
        return f"{text}\n{_by(self.cue, language)}"

    def _layout(self, ctx: StageContext, task: TrainTask) -> Layout:
        if task.name not in self._layouts:
            answers = [row.answer for row in self.rows(task)]
            longest = max(map(len, ctx.encoder.text_ids(answers)), default=0)
            self._layouts[task.name] = Layout(
                reasons=any(map(holds_reasoning, answers)),
                built=any(row.rationale for row in task.train),
                answer_first=bool(answers) and all(map(answer_comes_first, answers)),
                letters=_letters(task),
                num_tokens=min(longest, ctx.encoder.max_answer_tokens) + 1,
            )
        return self._layouts[task.name]


def _letters(task: TrainTask) -> str:
    finals = (
        final_answer(row.answer) if not row.rationale and holds_reasoning(row.answer) else _first_line(row.answer)
        for row in task.train
    )
    return option_letters(finals)


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0]


def _by(texts: Mapping[str, str], language: str) -> str:
    return texts.get(language, texts["default"])
