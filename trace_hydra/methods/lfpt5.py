"""LFPT5: a soft prompt that solves tasks and writes rows of earlier ones (Qin & Joty 2022, arXiv:2110.07298, eq. 2-4).

Paper -> code:  prompt P, 300 tokens, embeddings phi, model theta frozen -> table "default", one for all tasks
    eq. 2, -log p(Y | [P, X]), on the task's and on pseudo rows -> loss term "lm"
    generation token G of a task -> row k of table "generation", a virtual token behind P
    eq. 3, lambda_lm * -log p([X, Y] | [G, P]) -> loss term "generation", of each row's prompt behind its task's token
    pseudo samples (X~, Y~) of earlier domains before a new one -> `write_rows`; two a class of 16 -> fraction
    eq. 4, lambda_kl * KL(p(. | [P, X~], phi') || p(. | [P, X~], phi)) at the tokens of Y~, phi' the prompt where the
        stage begins -> loss term "kl", recorded once a stage (`distill.record_rows`)
Differs from the paper: X~ is sampled and then answered greedily (there one continuation holds X, a separator and Y, and
    is dropped without separator), so eq. 3 is over X alone; X~ starts with its task's instruction (instruction=false
    samples all of it); nucleus sampling (the authors' code: the 64 likeliest tokens). A task of any kind is a new
    domain: there is one prompt and no further one for a new task type. Terms are means over tokens, not sums; "kl" is
    over the `top_k` likeliest tokens and the rest as one (top_k: null is exact). Without any pseudo row a stage takes
    "kl" over its own rows, and says so. The authors' code scales the other losses by 1 - lambda_kl, the paper does not.
Differs from official TRACE: prompts of pseudo rows are the model's own (there the TEST prompts of all earlier tasks, so
    test inputs enter training; model/Replay/LFPT5.py:124-131); generation loss and KL term (there neither); the
    prompt's first values are random tokens of the model (there frequent tokens of T5).
Memory: two numbers a task between stages; no row is kept. Trained: prompt_length + tasks vectors. On the CPU while a
    stage trains: pseudo rows, 4 bytes per token of each row's draft, 6 * top_k + 4 per answer token of pseudo rows.
Compute: a second forward and backward pass per row, over prompt_length and up to draft_tokens tokens; per pseudo row
    and stage two generations (up to draft_tokens sampled, then the answer) and one forward pass. Stage t of equal tasks
    generates (t - 1) * fraction rows per own row: with 8 tasks of 5,000 rows 17,500 in all.
"""

import logging
from collections.abc import Mapping, Sequence
from json import dumps
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trace_hydra.context import StageContext, batch_of
from trace_hydra.data.encode import EncodedRow
from trace_hydra.data.task import Example
from trace_hydra.errors import ConfigError
from trace_hydra.methods.base import Method
from trace_hydra.methods.distill import SoftTargets, answer_loss, kd_from_topk, labels_per_row, record_rows, soften
from trace_hydra.methods.memory import kept_rows
from trace_hydra.models.generate import Decoding
from trace_hydra.models.prompts import virtual_tokens
from trace_hydra.plan import Phase
from trace_hydra.sizes import RunSize, StateSize

log = logging.getLogger(__name__)


class LFPT5(Method):
    """Train one soft prompt on each task and on rows it writes of the earlier ones.

    Args:
        prompt_length: Virtual tokens of the prompt, at least 1; tuning.length follows it.
        lambda_lm: Weight of the generation loss, above 0.
        lambda_kl: Weight of the distance to the previous prompt's answers; 0: no such term (Table 7 of the paper).
        fraction: Pseudo rows of an earlier task as a share of its train rows, in (0, 1]; rounded up, some may drop out.
        draft_tokens: Most tokens of a prompt that are learned and generated, at least 2; of a longer one both ends.
        instruction: Whether a generated prompt starts with the head that its task's prompts share.
        temperature: Of sampled prompts, above 0.
        top_p: Probability mass that prompts are sampled from, in (0, 1].
        generate_rows: Rows generated at once; another number draws other rows.
        top_k: Tokens kept of each recorded distribution, at least 1; None keeps the whole vocabulary.
    """

    tunings = ("prompt",)
    tuning_reason = "it trains one soft prompt that solves tasks and generates their rows"
    makes_rows = True
    sees_num_stages = True
    published = MappingProxyType({"prompt": "LFPT5"})

    def __init__(
        self,
        *,
        prompt_length: int,
        lambda_lm: float,
        lambda_kl: float,
        fraction: float,
        draft_tokens: int,
        instruction: bool,
        temperature: float,
        top_p: float,
        generate_rows: int,
        top_k: int | None,
    ):
        for key, value, right, allowed in (
            ("prompt_length", prompt_length, prompt_length >= 1, "at least 1; it is the prompt's virtual tokens"),
            ("lambda_lm", lambda_lm, lambda_lm > 0, "above 0; it is the weight of the generation loss"),
            ("lambda_kl", lambda_kl, lambda_kl >= 0, "at least 0; it is the weight of the KL term"),
            ("fraction", fraction, 0 < fraction <= 1, "in (0, 1]; it is pseudo rows per row of an earlier task"),
            ("draft_tokens", draft_tokens, draft_tokens >= 2, "at least 2; it is the limit of a generated prompt"),
            ("temperature", temperature, temperature > 0, "above 0; it divides the logits prompts are sampled from"),
            ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]; it is the probability mass prompts are sampled from"),
            ("generate_rows", generate_rows, generate_rows >= 1, "at least 1; it is rows generated at once"),
            ("top_k", top_k, top_k is None or top_k >= 1, "at least 1, or null for the whole vocabulary"),
        ):
            if not right:
                raise ConfigError(f"method.{key}={value} must be {allowed}.")
        self.prompt_length, self.top_k = prompt_length, top_k
        self.lambda_lm, self.lambda_kl = lambda_lm, lambda_kl
        self.fraction, self.draft_tokens, self.instruction = fraction, draft_tokens, instruction
        self.sampling, self.greedy = Decoding(True, temperature, top_p), Decoding(False, 1.0, 1.0)
        self.generate_rows = generate_rows
        self.terms = ("lm", "generation", "kl") if lambda_kl else ("lm", "generation")
        self.rows: list[int] = []
        """Train rows of each task so far."""
        self.answer_tokens: list[int] = []
        """Tokens of the longest trained answer of each task so far, end token included."""
        self.pseudo: list[Example] = []
        """What the model wrote for this stage; ids begin with "pseudo-"."""
        self.drafts: dict[str, EncodedRow] = {}
        """Row id -> its prompt to be generated, behind the soft prompt and its task's generation token."""
        self.targets: dict[str, SoftTargets] = {}
        """Row id -> how the previous prompt answers it; of pseudo rows."""

    def setup(self, ctx: StageContext) -> None:
        """Add the generation tokens of all tasks; their first values are random tokens of the model.

        Raises:
            ConfigError: If tuning.length was set to something else than the method's length.
        """
        if len(ctx.prefix) != self.prompt_length:
            raise ConfigError(
                f"tuning.length={len(ctx.prefix)} and method.prompt_length={self.prompt_length} differ; leave "
                "tuning.length out, it follows the method."
            )
        tokens = virtual_tokens(ctx.model)
        generator = torch.Generator().manual_seed(ctx.rng.getrandbits(32))
        tokens.add("generation", tokens.sample(ctx.num_stages, generator))

    def begin_stage(self, ctx: StageContext) -> None:
        """Write rows of each earlier task with the prompt as the last stage left it, and record its answers to them."""
        self.pseudo, self.targets = [], {}
        self.drafts = self._drafts(ctx, len(self.rows), ctx.task.train)
        for number in range(len(self.rows)):
            made = self.write_rows(ctx, number)
            if not made:
                log.warning(
                    f"stage {ctx.stage.index} ({ctx.task.name}): no pseudo row of {list(ctx.instructions)[number]} is "
                    "left, all generated prompts or answers were empty; the task is not replayed."
                )
            self.pseudo += made
            self.drafts |= self._drafts(ctx, number, made)
        if self.rows and self.lambda_kl:
            if not self.pseudo:
                log.warning(f"stage {ctx.stage.index} ({ctx.task.name}): no pseudo rows; kl is over the task's own.")
            rows = ctx.encode(self.pseudo or ctx.task.train)
            recorded = record_rows(ctx, rows, lambda logits: soften(logits, 1.0, self.top_k).to("cpu"))
            self.targets = {row.example_id: targets for row, targets in zip(rows, recorded, strict=True)}

    def phases(self, ctx: StageContext) -> Sequence[Phase]:
        """The task's rows with the pseudo rows."""
        return [Phase("task", [*ctx.task.train, *self.pseudo], ctx.epochs_of(ctx.task.name))]

    def rows_per_pass(self, rows: Sequence[int], stage: int, alignment: int) -> int:
        """The task's rows and the pseudo rows asked for; each is also learned as a draft and each pseudo row made."""
        return rows[stage - 1] + sum(kept_rows(count, self.fraction) for count in rows[: stage - 1])

    def losses(self, ctx: StageContext, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Eq. 2, and weighted eq. 3 and 4; means over answer, draft and taught answer tokens of the batch."""
        logits, labels = ctx.label_logits(batch)  # (num_labels, vocab)
        drafts = batch_of([self.drafts[row] for row in batch["example_ids"]], batch["input_ids"].device)
        terms = {"lm": answer_loss(logits, labels), "generation": self.lambda_lm * ctx.lm_loss(drafts)}
        if self.lambda_kl:
            terms["kl"] = self.lambda_kl * self._distance(logits, batch)
        return terms

    def end_stage(self, ctx: StageContext) -> None:
        """Note how many rows the task has and how long its answers are; drop the stage's rows and records."""
        answers = ctx.encoder.text_ids([row.answer for row in ctx.task.train])
        self.rows.append(len(ctx.task.train))
        self.answer_tokens.append(min(max(map(len, answers)), ctx.encoder.max_answer_tokens) + 1)
        self.pseudo, self.drafts, self.targets = [], {}, {}

    def state_size(self, size: RunSize) -> StateSize:
        """JSON of two numbers a task; generation tokens train too; drafts and records of the last, largest stage."""
        state = {"rows": list(size.rows), "answer_tokens": [round(tokens) for tokens in size.answer_tokens]}
        made = [kept_rows(count, self.fraction) for count in size.rows[:-1]]
        drafts = 4 * (size.rows[-1] + sum(made)) * (self.prompt_length + self.draft_tokens + 2)
        answers = sum(count * tokens for count, tokens in zip(made, size.answer_tokens, strict=False))
        record = answers * (6 * self.top_k + 4 if self.top_k else 2 * size.vocabulary) * bool(self.lambda_kl)
        trained = size.num_trainable + size.stages * size.width
        return StateSize(stored=len(dumps(state)), host=drafts + record, trained=trained)

    def state_dict(self) -> dict[str, Any]:
        """What is known of the tasks so far; prompt and generation tokens are weights of the model."""
        return {"rows": list(self.rows), "answer_tokens": list(self.answer_tokens)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.rows, self.answer_tokens = list(state["rows"]), list(state["answer_tokens"])

    def write_rows(self, ctx: StageContext, number: int) -> list[Example]:
        """Generate rows of an earlier task: prompts by sampling, then their answers, both by the model as it is now.

        Args:
            ctx: Its `rng` moves on by one draw; no other randomness is touched.
            number: Of the task in training order, from 0.

        Returns:
            At most `fraction` of the task's rows; without empty prompts or answers and without repeated prompts.
        """
        name = list(ctx.instructions)[number]
        head = ctx.instructions[name] if self.instruction else ""
        (head_ids,) = ctx.encoder.text_ids([head])
        start = [*ctx.prefix, virtual_tokens(ctx.model).ids("generation")[number], *head_ids]
        count = kept_rows(self.rows[number], self.fraction)
        room = max(self.draft_tokens - len(head_ids), self.draft_tokens // 2)  # of a long draft both ends are learned
        written = self._generate(ctx, [start] * count, room, self.sampling, ctx.rng.getrandbits(32))
        prompts = list(dict.fromkeys(head + text for text in written if text.strip()))
        asked, _ = ctx.encoder.prompts(prompts, head)
        answers = self._generate(
            ctx, [[*ctx.prefix, *ids] for ids in asked], self.answer_tokens[number], self.greedy, 0
        )
        pairs = enumerate(zip(prompts, answers, strict=True))
        return [Example(f"pseudo-{name}-{place}", *pair) for place, pair in pairs if pair[1].strip()]

    def _generate(
        self, ctx: StageContext, ids: Sequence[Sequence[int]], limit: int, decoding: Decoding, seed: int
    ) -> list[str]:
        """Generate with the method's own settings alone: how the run decodes and scores must not change weights."""
        size = self.generate_rows * (max(map(len, ids), default=0) + limit)
        with ctx.autocast():
            made = ctx.engine.generate(
                ctx.model, ctx.tokenizer, ids, max_new_tokens=limit, decoding=decoding, batch_tokens=size, seed=seed
            )
        return [one.text for one in made]

    def _drafts(self, ctx: StageContext, number: int, examples: Sequence[Example]) -> dict[str, EncodedRow]:
        """Encode prompts of a task as what its generation token shall bring forth."""
        start = [*ctx.prefix, virtual_tokens(ctx.model).ids("generation")[number]]
        texts = ctx.encoder.text_ids([example.prompt for example in examples])
        drafts = {}
        for example, ids in zip(examples, texts, strict=True):
            if cut := len(ids) > self.draft_tokens:
                tail = self.draft_tokens // 2
                ids = [*ids[: self.draft_tokens - tail], *ids[-tail:]]
            whole = np.asarray([*start, *ids, ctx.encoder.end_id], dtype=np.int32)
            drafts[example.id] = EncodedRow(whole, len(start), cut, example.id)
        return drafts

    def _distance(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """KL(previous prompt || current), mean over answer tokens of the rows that have a record; 0 without any."""
        parts = zip(batch["example_ids"], logits.split(labels_per_row(dict(batch))), strict=True)
        taught = [(part, self.targets[row]) for row, part in parts if row in self.targets]
        if not taught:
            return logits.new_zeros((), dtype=torch.float32)
        teacher = SoftTargets.join([targets for _, targets in taught]).to(logits.device)
        return kd_from_topk(torch.cat([part for part, _ in taught]), teacher, 1.0)
