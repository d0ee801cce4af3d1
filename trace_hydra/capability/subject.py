"""The model under test as a capability set sees it: greedy text and log-likelihoods of given tokens, in batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from trace_hydra import ranks
from trace_hydra.context import StageContext
from trace_hydra.data.encode import IGNORED, Encoder
from trace_hydra.methods.base import Method
from trace_hydra.models.forward import label_logits
from trace_hydra.models.generate import Decoding, Generated, length_batches
from trace_hydra.models.precision import cast_once

GREEDY = Decoding(False, 1.0, 1.0)


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is."""

    total: float
    """Log-likelihood of all its tokens, nats."""
    is_greedy: bool
    """Whether each token is the likeliest one behind those before it."""
    num_tokens: int


class StartModel(Method):
    """Stands for the method that is yet to train the model: no part in answers, but the room for its soft prompts."""

    def __init__(self, method: Method):
        self._method = method

    def prefix_length(self, tuning: int, stages: int) -> int:
        """As the method that will train it."""
        return self._method.prefix_length(tuning, stages)


class Subject:
    """A model as a method leaves it, asked about prompts of no task.

    A method that keeps prompts or adapters apart chooses among them by the prompt (`Method.serve`), here as in
    `answer`; what it needs a task's rows for (demonstrations, retrieval) takes no part.

    Args:
        ctx: Its model is on its device, in eval mode.
        method: What trained it, or `StartModel`.
    """

    def __init__(self, ctx: StageContext, method: Method):
        self.ctx, self.method = ctx, method
        self.tokens = 0
        """Prompt, continuation and generated tokens so far."""

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.ctx.tokenizer

    @property
    def max_length(self) -> int:
        """Positions for prompt and continuation together: the model's without those that soft prompts may take.

        The start model leaves the same room, so that both see the same text.
        """
        config = self.ctx.model.config  # type: ignore[union-attr]
        taken = self.method.prefix_length(self.ctx.tuning.prefix_length, self.ctx.total_stages)
        return int(config.get_text_config().max_position_embeddings) - taken  # type: ignore[operator]

    def encoder(self, prompt: str) -> Encoder:
        """Build an encoder like the run's, for prompts as they are ("raw") or in the chat template ("chat")."""
        own = self.ctx.encoder
        return Encoder(
            self.tokenizer,
            prompt=prompt,
            truncation=own.truncation,
            special_tokens="text",
            max_prompt_tokens=own.max_prompt_tokens,
            max_answer_tokens=own.max_answer_tokens,
        )

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        *,
        ids: Sequence[Sequence[int]] | None = None,
        prompt: str = "raw",
        stop: Sequence[str] = (),
        decoding: Decoding = GREEDY,
    ) -> list[Generated]:
        """Answer prompts, in order.

        Args:
            prompts: Texts; a method may choose by them.
            max_new_tokens: Limit of an answer.
            ids: The tokens to use, where the caller encodes itself; None: `encoder(prompt)` encodes.
            prompt: "raw" or "chat".
            stop: Strings that end an answer; the text may hold the string and a little more.
            decoding: Greedy unless said otherwise.
        """
        encoded = list(ids) if ids is not None else self.encoder(prompt).prompts(prompts, "")[0]
        answers: dict[int, Generated] = {}
        for indices, prefixes in self.method.serve(self.ctx, prompts):
            rows = [[*prefix, *encoded[index]] for index, prefix in zip(indices, prefixes, strict=True)]
            with self.ctx.autocast():
                made = self.ctx.engine.generate(
                    self.ctx.model,
                    self.tokenizer,
                    rows,
                    max_new_tokens=max_new_tokens,
                    decoding=decoding,
                    stop=stop,
                    batch_tokens=self.ctx.batch_tokens,
                    seed=self.ctx.generation_seed,
                )
            answers.update(zip(indices, made, strict=True))
        self.tokens += sum(one.num_prompt + one.num_new for one in answers.values())
        return [answers[index] for index in range(len(prompts))]

    def log_likelihoods(
        self, prompts: Sequence[str], rows: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[Likelihood]:
        """Score given continuations, in order.

        Args:
            prompts: The contexts as text; a method may choose by them.
            rows: Context ids and continuation ids of each, neither empty, not longer than `max_length` together.
        """
        found: dict[int, Likelihood] = {}
        for indices, prefixes in self.method.serve(self.ctx, prompts):
            group = [
                ([*prefix, *rows[index][0]], rows[index][1]) for index, prefix in zip(indices, prefixes, strict=True)
            ]
            alike: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
            for at, (context, continuation) in enumerate(group):
                alike.setdefault((tuple(context), tuple(continuation[:-1])), []).append(at)
            shared = list(alike.values())  # what differs in the last token only takes one pass: A, B, C, D
            lengths = [len(group[at][0]) + len(group[at][1]) for at, *_ in shared]
            batches = length_batches(lengths, 0, self.ctx.batch_tokens)

            def score(numbers: Sequence[int], batches=batches, group=group, shared=shared) -> dict[int, Likelihood]:
                own: dict[int, Likelihood] = {}
                with torch.inference_mode(), self.ctx.autocast(), cast_once(self.ctx.model):
                    for batch in (batches[number] for number in numbers):
                        scored = self._score([[group[at] for at in shared[row]] for row in batch])
                        members = [at for row in batch for at in shared[row]]
                        own.update(zip(members, scored, strict=True))
                return own

            found.update((indices[at], one) for at, one in ranks.shared_out(range(len(batches)), score).items())
            self.tokens += sum(lengths)
        return [found[index] for index in range(len(prompts))]

    def _score(self, shared: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]]) -> list[Likelihood]:
        """Score one batch, padded on the right; the rows of one entry differ in the last token at most."""
        rows = [alike[0] for alike in shared]
        longest = max(len(context) + len(continuation) for context, continuation in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, (context, continuation) in enumerate(rows):
            length = len(context) + len(continuation)
            ids[row, :length] = torch.tensor([*context, *continuation])
            mask[row, :length] = 1
            labels[row, len(context) : length] = torch.tensor(continuation)
        device = self.ctx.device
        batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
        found = []
        logits, _ = label_logits(self.ctx.model, batch)  # (num_labels, vocab)
        for alike, part in zip(shared, logits.split([len(row[1]) for row in rows]), strict=True):
            best = part.argmax(-1)
            for _, continuation in alike:
                targets = torch.tensor(continuation, device=part.device)
                nats = -F.cross_entropy(part.float(), targets, reduction="none").cpu()
                found.append(Likelihood(float(nats.sum()), bool((best == targets).all()), len(targets)))
        return found
