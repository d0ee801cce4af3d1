"""What a method sees of the run: the model, this stage's train rows, and nothing of other tasks or test splits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from trace_hydra import ranks
from trace_hydra.data.batches import bucketed_steps, collate, to_device
from trace_hydra.data.encode import EncodedRow, Encoder
from trace_hydra.data.task import Example
from trace_hydra.engines.base import Engine
from trace_hydra.engines.hf import HF
from trace_hydra.errors import MethodError
from trace_hydra.models import forward
from trace_hydra.models.choose import Chosen, choose_shared, likeliest
from trace_hydra.models.generate import Decoding, Generated
from trace_hydra.models.tuning import Tuning
from trace_hydra.plan import Stage


@dataclass(frozen=True)
class TrainTask:
    """A task as a method sees it: facts and train rows, no eval and no test split."""

    name: str
    train: tuple[Example, ...]
    instruction: str
    """The head that all prompts share; empty if there is none."""
    max_new_tokens: int
    """Answer limit under the protocol."""
    stop: tuple[str, ...]
    """Strings that end an answer under the protocol."""
    language: str
    options: tuple[str, ...] | str = ()
    """What its answers are chosen from under the protocol, see `data.options`; (): they are generated."""


@dataclass
class StageContext:
    """Hands a method what a hook may use. One object lives through the run; `stage` and `task` move on."""

    model: nn.Module
    """A method's `setup` may replace it."""
    tokenizer: Any
    encoder: Encoder
    tuning: Tuning
    device: torch.device
    decoding: Decoding
    batch_tokens: int
    """Padded tokens of one generation batch."""
    instructions: Mapping[str, str]
    """Task name -> the head that its prompts share, in training order."""
    alignment: tuple[Example, ...]
    """Alignment rows of the data (LIMA), or none."""
    epochs_of: Callable[[str], int]
    """Passes over a task, by name."""
    generation_seed: int
    data_seed: int
    autocast: Callable[[], Any]
    """Context manager of the trainer's precision, for forward passes outside a fit."""
    total_stages: int
    """What `num_stages` tells to methods that may know."""
    sees_num_stages: bool = True
    makes_rows: bool = True
    all_tasks: Mapping[str, TrainTask] | None = None
    """Filled only for methods that declare `sees_all_tasks`."""
    prefix: Sequence[int] = ()
    """Ids of soft prompts that stand before every row, in training and generation; methods may set it."""
    stage: Stage = field(init=False)
    task: TrainTask = field(init=False)
    rng: Random = field(init=False)
    """From `seed.data` and the stage; the same however the run got here."""
    generated: list[Generated] = field(default_factory=list)
    """What `generate` made since the list was last cleared; evaluation reads token counts from it."""
    on_generated: Callable[[int, int], None] | None = None
    options: Callable[[str], tuple[str, ...]] | None = None
    """While closed answers are asked for: prompt -> its options, of which `generate` then gives the likeliest."""
    training: bool = False
    """Whether a stage is being trained, from `begin_stage` to `end_stage`."""
    engine: Engine = field(default_factory=HF)
    """Generates."""

    @property
    def num_stages(self) -> int:
        """Stages of the run.

        Raises:
            MethodError: If the method does not declare `sees_num_stages`: its stages would be shared with runs of other
                lengths.
        """
        if not self.sees_num_stages:
            raise MethodError(
                "the method reads ctx.num_stages without declaring it; set the class attribute sees_num_stages = True."
            )
        return self.total_stages

    def enter(self, stage: Stage, task: TrainTask) -> None:
        """Move to a stage."""
        self.stage, self.task = stage, task
        self.rng = Random(f"{self.data_seed}-{stage.draw}-{task.name}")

    def heads(self) -> tuple[str, ...]:
        """List the instructions of the tasks so far; later ones may not change how a row is cut."""
        if self.stage.apart:
            return (self.task.instruction,)
        known = tuple(self.instructions.values())
        return known if self.all_tasks is not None else known[: max(1, self.stage.index)]

    def trainable(self) -> dict[str, nn.Parameter]:
        """List the parameters that train now, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def encode(self, examples: Sequence[Example]) -> list[EncodedRow]:
        """Encode rows for training, each with its task's instruction and behind the soft prompt."""
        rows = encode_rows(self.encoder, examples, self.heads())
        return [row.behind(self.prefix) for row in rows] if self.prefix else rows

    def batches(self, examples: Sequence[Example], batch_size: int) -> Iterator[dict[str, Any]]:
        """Yield training batches of rows on the device, shuffled by `rng`, bucketed by length, every row once."""
        rows = self.encode(examples)
        for step in bucketed_steps([len(row.ids) for row in rows], batch_size, str(self.rng.random())):
            yield batch_of([rows[index] for index in step], self.device)

    def lm_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Average nats per answer token; see `models.forward.lm_loss`."""
        return forward.lm_loss(self.model, dict(batch))

    def label_logits(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits and labels at answer positions; see `models.forward.label_logits`."""
        return forward.label_logits(self.model, dict(batch))

    def total(self, tensor: Tensor) -> Tensor:
        """Add up over the processes that share a step what each has seen of it; with one process the tensor itself."""
        return ranks.total(tensor)

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        *,
        instruction: str = "",
        stop: Sequence[str] = (),
        max_prompt_tokens: int | None = None,
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> list[str]:
        """Answer prompts as the protocol decodes, in order; while `options` is set, with the likeliest option.

        Args:
            prompts: Whole prompts; an empty one is answered too.
            max_new_tokens: Limit of an answer.
            instruction: The head to keep if a prompt must be cut.
            stop: Strings that end an answer; the text may hold the string and a little more.
            max_prompt_tokens: Replaces the protocol's limit.
            prefixes: Ids of soft prompts before each prompt, instead of `prefix` before all.

        Raises:
            MethodError: While a stage trains, if the method does not declare `makes_rows`: decoding is then no part of
                what its stages are known by.
        """
        if self.training and not self.makes_rows:
            raise MethodError(
                "the method generates while it trains without declaring it; set the class attribute makes_rows = True."
            )
        ids, _ = self.encoder.prompts(prompts, instruction, max_prompt_tokens)
        heads = prefixes if prefixes is not None else [self.prefix] * len(ids)
        ids = [[*head, *one] for head, one in zip(heads, ids, strict=True)]
        if self.options is not None:
            chosen = self._choose(ids, [self.options(prompt) for prompt in prompts])
            self.generated += chosen
            return [one.text for one in chosen]
        with self.autocast():
            answers = self.engine.generate(
                self.model,
                self.tokenizer,
                ids,
                max_new_tokens=max_new_tokens,
                decoding=self.decoding,
                stop=stop,
                batch_tokens=self.batch_tokens,
                seed=self.generation_seed,
                on_batch=self.on_generated,
            )
        self.generated += answers
        return [answer.text for answer in answers]

    def _choose(self, ids: Sequence[Sequence[int]], options: Sequence[tuple[str, ...]]) -> list[Chosen]:
        """Answer prompts with the likeliest of their options; of options alike the first."""
        encoded = {one: self.encoder.options(one) for one in set(options)}
        with self.autocast():
            values = choose_shared(
                self.model,
                ids,
                [encoded[one] for one in options],
                batch_tokens=self.batch_tokens,
                on_batch=self.on_generated,
            )
        return [
            Chosen(texts[likeliest(nats)], len(prompt), 0, True, dict(zip(texts, nats, strict=True)))
            for prompt, texts, nats in zip(ids, options, values, strict=True)
        ]


def batch_of(rows: Sequence[EncodedRow], device: torch.device | str) -> dict[str, Any]:
    """Pad encoded rows to a batch on a device."""
    return to_device(collate(rows), device)


def encode_rows(encoder: Encoder, examples: Sequence[Example], instructions: Sequence[str]) -> list[EncodedRow]:
    """Encode rows that may come from several tasks; each keeps the longest instruction its prompt starts with."""
    heads = sorted(set(instructions), key=len, reverse=True)
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        head = next((head for head in heads if head and example.prompt.startswith(head)), "")
        groups.setdefault(head, []).append(index)
    rows: dict[int, EncodedRow] = {}
    for head, indices in groups.items():
        rows.update(zip(indices, encoder.pairs([examples[index] for index in indices], head), strict=True))
    return [rows[index] for index in range(len(examples))]
