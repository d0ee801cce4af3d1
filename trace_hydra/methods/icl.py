"""In-context learning with a frozen model (Wang et al. 2023, arXiv:2310.06762, section 4.1; inference/ICL.py).

Paper -> code:  6 demonstrations -> demonstrations, drawn once per task from its TRAIN rows when its stage ends
    prompt: instruction, the sentence that announces examples, demonstrations (prompt without instruction, answer, a
    blank line), query without instruction; a demonstration longer than half its share of the prompt limit is not taken;
    at most `max_per_label` a label where answers are single letters, different answers elsewhere
    answer: cut where the model starts a further example (section 4.2 of inference/ICL.py's markers, made general)
Differs from official TRACE: demonstrations come from train (there from the test set that is scored, ICL.py:366-373);
    MeetingBank gets demonstrations where they fit (there never); Py150 gets no instruction of its own; one rule cuts
    answers (there one marker a task).
Memory: the text of the demonstrations. Compute: prompts of up to max_prompt_tokens, no training.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from trace_hydra.context import StageContext, TrainTask
from trace_hydra.data.task import Example
from trace_hydra.errors import ConfigError
from trace_hydra.methods.base import Method
from trace_hydra.methods.memory import rows_size
from trace_hydra.plan import Phase
from trace_hydra.sizes import RunSize, StateSize

log = logging.getLogger(__name__)


class InContext(Method):
    """Answer with demonstrations in the prompt.

    Args:
        demonstrations: How many, at least 0.
        max_prompt_tokens: Limit of a prompt with its demonstrations.
        max_per_label: Most demonstrations with the same answer where answers are single letters.
        announcement: Sentence between the instruction and the demonstrations.
    """

    tunings = ("frozen",)
    tuning_reason = "in-context learning trains nothing"
    terms = ()
    cells = "diagonal"
    sees_task_id = True
    stages_apart = True
    published = MappingProxyType({"frozen": "ICL"})

    def __init__(self, *, demonstrations: int, max_prompt_tokens: int, max_per_label: int, announcement: str):
        if demonstrations < 0:
            raise ConfigError(f"method.demonstrations={demonstrations} must be at least 0.")
        for key, value in (("max_prompt_tokens", max_prompt_tokens), ("max_per_label", max_per_label)):
            if value < 1:
                raise ConfigError(f"method.{key}={value} must be at least 1.")
        self.demonstrations = demonstrations
        self.max_prompt_tokens = max_prompt_tokens
        self.max_per_label = max_per_label
        self.announcement = announcement
        self.chosen: dict[str, list[Example]] = {}

    def phases(self, ctx: StageContext) -> Sequence[Phase]:
        """No training."""
        return []

    def rows_per_pass(self, rows: Sequence[int], stage: int, alignment: int) -> int:
        """No training."""
        return 0

    def end_stage(self, ctx: StageContext) -> None:
        """Draw the task's demonstrations."""
        self.chosen[ctx.task.name] = self._draw(ctx)

    def answer(self, ctx: StageContext, prompts: Sequence[str], task: TrainTask) -> list[str]:
        """Answer with the task's demonstrations; without any (before its stage) with the plain prompt."""
        shown = self.chosen.get(task.name, [])
        limit = self._limit(ctx, task)
        if not shown:
            return ctx.generate(prompts, task.max_new_tokens, instruction=task.instruction, stop=task.stop)
        head = task.instruction + self.announcement
        for example in shown:
            head += f"{_body(example.prompt, task)}{example.answer}\n\n"
        texts = [head + _body(prompt, task) for prompt in prompts]
        # The head, demonstrations included, is what must not be cut; the query's end stays in any case.
        answers = ctx.generate(texts, task.max_new_tokens, instruction=head, stop=task.stop, max_prompt_tokens=limit)
        return [_cut(answer, task, shown) for answer in answers]

    def num_stored_examples(self) -> int:
        """The demonstrations."""
        return sum(map(len, self.chosen.values()))

    def state_size(self, size: RunSize) -> StateSize:
        """The demonstrations of a stage, if all of them fit the prompt."""
        last = min(self.demonstrations, size.rows[-1])
        return StateSize(stored=rows_size(size, [*[0] * (size.stages - 1), last]))

    def state_dict(self) -> dict[str, Any]:
        """The demonstrations."""
        return {task: [asdict(example) for example in examples] for task, examples in self.chosen.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the demonstrations back."""
        self.chosen = {task: [Example(**row) for row in rows] for task, rows in state.items()}

    def _draw(self, ctx: StageContext) -> list[Example]:
        task = ctx.task
        budget = self._limit(ctx, task)
        order = list(task.train)
        ctx.rng.shuffle(order)
        letters = all(len(example.answer.strip()) == 1 for example in order)
        seen: Counter[str] = Counter()
        chosen: list[Example] = []
        for example in order:
            if len(chosen) == self.demonstrations:
                break
            (ids,) = ctx.encoder.text_ids([_body(example.prompt, task) + example.answer])
            share = budget / (2 * max(self.demonstrations - len(chosen), 1))
            if len(ids) > share or seen[example.answer] >= (self.max_per_label if letters else 1):
                continue
            chosen.append(example)
            seen[example.answer] += 1
            budget -= len(ids)
        if len(chosen) < self.demonstrations:
            log.warning(
                "%s: %d of %d demonstrations fit method.max_prompt_tokens=%d and method.max_per_label=%d.",
                task.name,
                len(chosen),
                self.demonstrations,
                self.max_prompt_tokens,
                self.max_per_label,
            )
        return chosen

    def _limit(self, ctx: StageContext, task: TrainTask) -> int:
        """Tokens of a prompt: what the yaml says, or what the model's positions leave beside the answer."""
        positions = getattr(ctx.model.config, "max_position_embeddings", None)
        return (
            min(self.max_prompt_tokens, int(positions) - task.max_new_tokens) if positions else self.max_prompt_tokens
        )


def _body(prompt: str, task: TrainTask) -> str:
    return prompt.removeprefix(task.instruction)


def _cut(answer: str, task: TrainTask, shown: Sequence[Example]) -> str:
    """Cut an answer where it goes on with another example: a blank line, unless the demonstrations hold some.

    Answers that are single letters keep one character, the first that is not white space.
    """
    text = answer.lstrip()
    if all(len(example.answer.strip()) == 1 for example in shown):
        return text[:1]
    if not any("\n\n" in example.answer.strip() for example in shown):
        text = text.split("\n\n")[0]
    return text
