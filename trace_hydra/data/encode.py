"""Rows as token ids, and token ids as batches.

Labels are made by construction: prompt ids and answer ids are tokenised apart and joined, so the loss covers exactly
the answer and its end token. Nothing is derived from the pad token, which is often the end token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from typing import Any

import numpy as np

from trace_hydra.data.task import Example
from trace_hydra.errors import ConfigError

IGNORED = -100  # label of a position without loss, as in torch's cross entropy


@dataclass(frozen=True)
class EncodedRow:
    """One training row."""

    ids: np.ndarray
    """Prompt, answer and end token, (length,), int32."""
    num_prompt: int
    """How many of `ids` are prompt; the rest carries the loss."""
    truncated: bool
    """Whether anything of prompt or answer was cut."""
    example_id: str

    def behind(self, prefix: Sequence[int]) -> "EncodedRow":
        """The row with ids before it that carry no loss."""
        ids = np.concatenate([np.asarray(prefix, dtype=np.int32), self.ids])
        return replace(self, ids=ids, num_prompt=self.num_prompt + len(prefix))


class Encoder:
    """Turns prompts and answers into ids as the protocol says.

    Args:
        tokenizer: A Hugging Face tokenizer with an end token.
        prompt: "raw" or "chat" (the tokenizer's chat template, one user turn).
        truncation: "middle" keeps the instruction and the end of the prompt; "left" is TRACE's (data_collator.py): the
            joined pair is cut from the start at max_prompt_tokens + max_answer_tokens, end and begin tokens only where
            room is left.
        special_tokens: "text" reads a literal `<s>` in a row as text, "parse" as the special token.
        max_prompt_tokens: Limit of a prompt, begin token and template included.
        max_answer_tokens: Limit of an answer without its end token.

    Raises:
        ConfigError: If `prompt` is "chat" and the tokenizer has no chat template, or the limit is shorter than it.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        prompt: str,
        truncation: str,
        special_tokens: str,
        max_prompt_tokens: int,
        max_answer_tokens: int,
    ):
        self.tokenizer = tokenizer
        self.truncation = truncation
        self.max_prompt_tokens = max_prompt_tokens
        self.max_answer_tokens = max_answer_tokens
        self._split_special = special_tokens == "text"
        self.template = ""
        self.prefix, self.suffix = self._begin_ids(), []
        if prompt == "chat":
            self.prefix, self.suffix = self._chat_frame()
        if truncation == "middle" and max_prompt_tokens <= len(self.prefix) + len(self.suffix):
            raise ConfigError(
                f"protocol.max_prompt_tokens={max_prompt_tokens} leaves no room: begin token and chat template alone "
                f"take {len(self.prefix) + len(self.suffix)} tokens."
            )

    @classmethod
    def of(cls, tokenizer: Any, protocol: Any) -> "Encoder":
        """Build the encoder that a protocol node describes."""
        keys = ("prompt", "truncation", "special_tokens", "max_prompt_tokens", "max_answer_tokens")
        return cls(tokenizer, **{key: protocol[key] for key in keys})

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise texts without adding anything."""
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=self._split_special)[
            "input_ids"
        ]

    def prompts(
        self, prompts: Sequence[str], instruction: str, limit: int | None = None
    ) -> tuple[list[list[int]], int]:
        """Encode prompts for generation.

        Args:
            prompts: Whole prompts.
            instruction: The head to keep when a prompt is cut.
            limit: Replaces max_prompt_tokens.

        Returns:
            Ids per prompt, never empty, and how many prompts were cut.
        """
        limit = limit or self.max_prompt_tokens
        encoded, num_cut = [], 0
        for prompt, ids in zip(prompts, self.text_ids(prompts), strict=True):
            if self.truncation == "left":
                joined = [*self.prefix, *ids, *self.suffix] if len(ids) < limit else ids[-limit:]
                cut = len(ids) > limit
                encoded.append(joined[-limit:])
            else:
                body, cut = self._cut_middle(prompt, ids, instruction, limit - len(self.prefix) - len(self.suffix))
                encoded.append([*self.prefix, *body, *self.suffix])
            num_cut += cut
        return [ids or [self.end_id] for ids in encoded], num_cut

    def pairs(self, examples: Sequence[Example], instruction: str) -> list[EncodedRow]:
        """Encode rows for training; each ends in the end token (but see `truncation="left"`)."""
        answers = self.text_ids([example.answer for example in examples])
        prompts = self.text_ids([example.prompt for example in examples])
        rows = []
        for example, prompt, answer in zip(examples, prompts, answers, strict=True):
            if self.truncation == "left":
                rows.append(self._pair_left(example, prompt, answer))
                continue
            room = self.max_prompt_tokens - len(self.prefix) - len(self.suffix)
            body, cut = self._cut_middle(example.prompt, prompt, instruction, room)
            head = [*self.prefix, *body, *self.suffix]
            kept = answer[: self.max_answer_tokens]
            ids = np.asarray([*head, *kept, self.end_id], dtype=np.int32)
            rows.append(EncodedRow(ids, len(head), cut or len(kept) < len(answer), example.id))
        return rows

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        return self.tokenizer.eos_token_id

    def _pair_left(self, example: Example, prompt: list[int], answer: list[int]) -> EncodedRow:
        limit = self.max_prompt_tokens + self.max_answer_tokens
        num_answer = len(answer)
        ids = [*prompt, *self.suffix, *answer]
        truncated = len(ids) > limit
        ids = ids[-limit:]
        if len(ids) < limit:
            ids, num_answer = [*ids, self.end_id], num_answer + 1
        if len(ids) + len(self.prefix) <= limit:
            ids = [*self.prefix, *ids]
        num_prompt = max(len(ids) - num_answer, 1)  # the first token has no position that could predict it
        return EncodedRow(np.asarray(ids, dtype=np.int32), num_prompt, truncated, example.id)

    def _cut_middle(self, prompt: str, ids: list[int], instruction: str, room: int) -> tuple[list[int], bool]:
        """Fit a prompt into `room` tokens: the instruction (at most half of them) and the end stay."""
        if len(ids) <= room:
            return ids, False
        head: list[int] = []
        if instruction and prompt.startswith(instruction):
            # Tokenised apart, so that the cut falls exactly behind the instruction.
            head, ids = self.text_ids([instruction, prompt[len(instruction) :]])
            head = head[: max(room // 2, room - len(ids))]
        return [*head, *ids[max(0, len(ids) + len(head) - room) :]], True

    def _begin_ids(self) -> list[int]:
        """Find what the tokenizer puts before a text, usually its begin token or nothing."""
        plain = self.tokenizer("x", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("x")["input_ids"]
        return list(full[: full.index(plain[0])]) if plain and plain[0] in full else []

    def _chat_frame(self) -> tuple[list[int], list[int]]:
        """Split the chat template of one user turn into what stands before and behind the prompt."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(
                "protocol.prompt=chat needs a chat template, and this model's tokenizer has none. "
                "Use protocol.prompt=raw (TRACE's own), or a chat model."
            )
        marker = "\u2063prompt\u2063"
        turn = [{"role": "user", "content": marker}]
        text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        self.template = text
        if text.count(marker) != 1:
            raise ConfigError("protocol.prompt=chat: the model's chat template does not show the user's turn once.")
        before, after = text.split(marker)
        frame = self.tokenizer([before, after], add_special_tokens=False)["input_ids"]
        return list(frame[0]), list(frame[1])


class TrainBatches:
    """Batches of one phase, bucketed by length, another seeded order in every epoch.

    An optimizer step takes `batch_size` rows of similar length; they are dealt out in micro-batches. The order depends
    on the seed and the epoch alone, not on how large a micro-batch is.

    Args:
        rows: Encoded rows, at least one.
        batch_size: Rows of an optimizer step.
        micro_batch_size: Rows of a forward pass.
        seed: Any string; the epoch is added to it.
    """

    def __init__(self, rows: Sequence[EncodedRow], *, batch_size: int, micro_batch_size: int, seed: str):
        self.rows = rows
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.epoch = 0
        """The epoch whose order the next pass takes; every pass that begins moves it on."""
        self._skip = 0

    def __len__(self) -> int:
        full, rest = divmod(len(self.rows), self.batch_size)
        per_step = -(-self.batch_size // self.micro_batch_size)
        return full * per_step + -(-rest // self.micro_batch_size)

    def start_at(self, epoch: int, batch: int) -> None:
        """Let the next iteration begin behind `batch` micro-batches of an epoch."""
        more, self._skip = divmod(batch, len(self))
        self.epoch = epoch + more

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A generator: Lightning asks for an iterator once more than it trains, and that one must not move the epoch on.
        seed, skip = f"{self.seed}-{self.epoch}", self._skip
        self.epoch, self._skip = self.epoch + 1, 0
        yield from islice(self._batches(seed), skip, None)

    def _batches(self, seed: str) -> Iterator[dict[str, Any]]:
        for step in bucketed_steps([len(row.ids) for row in self.rows], self.batch_size, seed):
            for start in range(0, len(step), self.micro_batch_size):
                chosen = [self.rows[index] for index in step[start : start + self.micro_batch_size]]
                batch = collate(chosen)
                # Lightning divides by the number of micro-batches of a full step; this makes the step the mean of its
                # micro-batches weighted by rows, in a last, smaller step too.
                num_micro = -(-self.batch_size // self.micro_batch_size)
                batch["weight"] = len(chosen) / len(step) * num_micro
                yield batch


def bucketed_steps(lengths: Sequence[int], batch_size: int, seed: str) -> list[list[int]]:
    """Deal row indices into steps of rows with similar lengths, in a seeded order of rows and steps.

    Rows are shuffled, cut into pools of 32 steps, sorted by length within a pool and dealt out; then the steps are
    shuffled. The step with fewer than `batch_size` rows, if any, comes last.
    """
    rng = Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    num_full = len(order) // batch_size * batch_size
    rest = order[num_full:]
    steps: list[list[int]] = []
    pool_size = 32 * batch_size
    for start in range(0, num_full, pool_size):
        pool = sorted(order[start : min(start + pool_size, num_full)], key=lambda index: lengths[index])
        steps += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
    rng.shuffle(steps)
    return [*steps, sorted(rest, key=lambda index: lengths[index])] if rest else steps


def collate(rows: Sequence[EncodedRow]) -> dict[str, Any]:
    """Pad rows on the right: input_ids, attention_mask, labels, each (batch, longest), int64; and example_ids.

    The pad id is 0: masked and without loss, so its value never matters.
    """
    import torch

    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for index, row in enumerate(rows):
        length = len(row.ids)
        ids[index, :length] = torch.from_numpy(row.ids.astype(np.int64))
        mask[index, :length] = 1
        labels[index, row.num_prompt : length] = ids[index, row.num_prompt : length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "example_ids": [row.example_id for row in rows]}
