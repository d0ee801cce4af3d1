"""Rows as token ids.

Labels are made by construction: prompt ids and answer ids are tokenised apart and joined, so the loss covers exactly
the answer and its end token. Nothing is derived from the pad token, which is often the end token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from trace_hydra.data.task import Example
from trace_hydra.data.tokens import Cache, Rows, packed, tokenizer_digest, tokens_key, unpacked, worth_keeping
from trace_hydra.errors import ConfigError, DataError

IGNORED = -100  # label of a position without loss, as in torch's cross entropy
_CHUNK = 1000  # texts tokenised at a time where only their number of tokens is wanted


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

    @property
    def num_labels(self) -> int:
        """Tokens that carry the loss."""
        return len(self.ids) - self.num_prompt

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
        self.cache: Cache | None = None
        """Keeps what many rows became; None: nothing is kept."""
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

    def options(self, options: Sequence[str]) -> list[tuple[int, ...]]:
        """Encode the texts that an answer is one of, as training encodes answers: apart from the prompt.

        The end token is behind them only where one option's tokens begin another's: the shorter would else never be the
        less likely. Everywhere else training put it behind all options alike, so it tells none from another, and
        without it the choice is that of greedy decoding wherever that says an option of one token.

        Raises:
            DataError: If an option has no tokens, more than max_answer_tokens, or those of another.
        """
        ids = [tuple(one) for one in self.text_ids(options)]
        if not all(0 < len(one) <= self.max_answer_tokens for one in ids) or len(set(ids)) < len(ids):
            raise DataError(
                f"the options {', '.join(map(repr, options))} must each have tokens of their own, at most "
                f"protocol.max_answer_tokens={self.max_answer_tokens}; they are {', '.join(map(str, ids))}."
            )
        begins = any(one != other and other[: len(one)] == one for one in ids for other in ids)
        return [(*one, self.end_id) for one in ids] if begins else ids

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
        settings = {"instruction": instruction, "limit": limit}
        ids, _, cut = self._kept("prompts", prompts, settings, lambda: self._prompts(prompts, instruction, limit))
        return [one.tolist() if isinstance(one, np.ndarray) else one for one in ids], sum(cut)

    def _prompts(self, prompts: Sequence[str], instruction: str, limit: int) -> Rows:
        encoded, was_cut = [], []
        for prompt, ids in zip(prompts, self.text_ids(prompts), strict=True):
            if self.truncation == "left":
                joined = [*self.prefix, *ids, *self.suffix] if len(ids) < limit else ids[-limit:]
                cut = len(ids) > limit
                encoded.append(joined[-limit:])
            else:
                body, cut = self._cut_middle(prompt, ids, instruction, limit - len(self.prefix) - len(self.suffix))
                encoded.append([*self.prefix, *body, *self.suffix])
            was_cut.append(cut)
        made = [ids or [self.end_id] for ids in encoded]
        return made, [len(ids) for ids in made], was_cut

    def pairs(self, examples: Sequence[Example], instruction: str) -> list[EncodedRow]:
        """Encode rows for training; each ends in the end token (but see `truncation="left"`)."""
        texts = [text for example in examples for text in (example.prompt, example.answer)]
        rows = self._kept("pairs", texts, {"instruction": instruction}, lambda: self._pairs(examples, instruction))
        return [
            EncodedRow(np.asarray(ids, dtype=np.int32), num_prompt, cut, example.id)
            for example, ids, num_prompt, cut in zip(examples, *rows, strict=True)
        ]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of texts, nothing added or cut."""

        def count() -> Rows:
            starts = range(0, len(texts), _CHUNK)
            found = [len(ids) for start in starts for ids in self.text_ids(texts[start : start + _CHUNK])]
            return [[]] * len(found), found, [False] * len(found)

        return self._kept("lengths", texts, {}, count)[1]

    def _kept(self, kind: str, texts: Sequence[str], settings: Mapping[str, Any], make: Callable[[], Rows]) -> Rows:
        """Take from the cache what was made of these texts before, else make it; of few texts always."""
        if self.cache is None or not worth_keeping(texts) or self._tokenizer_digest is None:
            return make()
        own = ("prefix", "suffix", "truncation", "max_prompt_tokens", "max_answer_tokens", "_split_special")
        settings = {**settings, **{name: getattr(self, name) for name in own}}
        key = tokens_key(kind, texts, self._tokenizer_digest, settings)
        if (found := self.cache.load(key)) is not None:
            return unpacked(found)
        rows = make()
        self.cache.save(key, packed(rows))
        return rows

    @cached_property
    def _tokenizer_digest(self) -> str | None:
        return tokenizer_digest(self.tokenizer)

    def _pairs(self, examples: Sequence[Example], instruction: str) -> Rows:
        answers = self.text_ids([example.answer for example in examples])
        prompts = self.text_ids([example.prompt for example in examples])
        rows = []
        for example, prompt, answer in zip(examples, prompts, answers, strict=True):
            if self.truncation == "left":
                rows.append(self._pair_left(prompt, answer))
                continue
            room = self.max_prompt_tokens - len(self.prefix) - len(self.suffix)
            body, cut = self._cut_middle(example.prompt, prompt, instruction, room)
            head = [*self.prefix, *body, *self.suffix]
            kept = answer[: self.max_answer_tokens]
            rows.append(([*head, *kept, self.end_id], len(head), cut or len(kept) < len(answer)))
        ids, num_prompt, was_cut = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
        return ids, num_prompt, was_cut

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        return self.tokenizer.eos_token_id

    def _pair_left(self, prompt: list[int], answer: list[int]) -> tuple[list[int], int, bool]:
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
        return ids, num_prompt, truncated

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
