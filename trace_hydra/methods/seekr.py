"""SEEKR: replay that also distils the attention of chosen heads (He et al. 2024, arXiv:2411.06171).

Definitions are those of the authors' code, training/seekr.py of jinghan1he/SEEKR, cited by function. Summaries of the
paper name the same parts (KL, Taylor expansion, cumulative change, budgets); its own equations were not at hand.

Paper -> code:  loss of replayed rows (train_one_task) -> (1 - logits_weight) CE + logits_weight KL(old || new)
        + attention_weight L_attn
    L_attn, KL(old || new) of attention, mean over queries, heads, layers and rows -> methods/attention.py,
        `attention_distance`
    task sensitivity, squared gradient of the loss by attention weights, a layer's heads summing to 1 (attn_grad_hook)
        -> `measure`;  forgettability, squared change of attention over a task (get_replay_attn_diff) -> `end_stage`
    importance, their product summed over tasks (main) -> importance;  budgets: `layers` with the largest sums, in them
        `heads` with the largest values (select_layer_head) -> `choose_heads`;  query budget -> queries
Differs from the paper: a seeded sample is kept (there the first rows); kept rows join the new task's in every pass,
    each row weighing alike (there an optimizer step of their own, about once a pass); KL of logits (there soft
    cross-entropy, the same gradient); a row with fewer tokens than `queries` gives all of them (there drawn with
    repeats); means leave padding out.
Differs from official TRACE: no code there. Its replay: methods/replay.py.
Memory: per kept row, fp16 on the CPU: 2 bytes x (heads x queries x length + answer tokens x vocabulary); for Llama-2,
    128 heads, 100 queries, 1,024 tokens: 26 MB and 64 KB an answer token. While a task trains, attention of all heads
    from before it, fp32: 4 bytes x layers x a layer's heads x queries x length per row.
Compute: attention is computed eagerly all through the run (set in `setup`; other kernels give no weights), so memory
    grows with length squared; a forward and backward per kept row a pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_hydra.context import StageContext
from trace_hydra.data.batches import collate
from trace_hydra.data.task import Example
from trace_hydra.errors import ConfigError, MethodError
from trace_hydra.methods.attention import Head, attention_distance, choose_heads, forward, measure, seen_by
from trace_hydra.methods.base import Method
from trace_hydra.methods.memory import kept_rows, rows_size
from trace_hydra.plan import Phase
from trace_hydra.sizes import RunSize, StateSize


@dataclass
class Kept:
    """A replayed row and what the model did with it when its task's stage ended."""

    example: Example
    """Its id is `<task>/<id of the row>`, by which a batch's rows are told apart."""
    queries: list[int]
    """Positions whose attention is distilled, in order."""
    heads: list[Head]
    attention: Tensor
    """(heads, queries, length), fp16, CPU."""
    logits: Tensor
    """At answer positions, (labels, vocab), fp16, CPU; (0,) if they are not distilled."""


class SelectiveAttention(Method):
    """Replay with attention and logits distilled.

    Args:
        fraction: Share of each task's train rows that is kept, in (0, 1].
        logits_weight: Of the distilled logits; the replayed rows' own loss has the rest. In [0, 1).
        attention_weight: Of the distilled attention, above 0.
        layers: Most layers with distilled heads, at least 1.
        heads: Most distilled heads in all, at least 1.
        queries: Most positions of a row whose attention is distilled, at least 1; null: all.
    """

    published = MappingProxyType({"full": "SEEKR"})

    def __init__(
        self,
        *,
        fraction: float,
        logits_weight: float,
        attention_weight: float,
        layers: int,
        heads: int,
        queries: int | None,
    ):
        if not 0 < fraction <= 1:
            raise ConfigError(
                f"method.fraction={fraction} must be in (0, 1]; it is the share of each earlier task kept."
            )
        if not 0 <= logits_weight < 1:
            raise ConfigError(
                f"method.logits_weight={logits_weight} must be in [0, 1); it is the distilled logits' share."
            )
        if attention_weight <= 0:
            raise ConfigError(
                f"method.attention_weight={attention_weight} must be above 0; without it this is method=replay."
            )
        for key, value in (("layers", layers), ("heads", heads), ("queries", queries)):
            if value is not None and value < 1:
                raise ConfigError(f"method.{key}={value} must be at least 1; it is a budget of distilled attention.")
        self.fraction, self.logits_weight, self.attention_weight = fraction, logits_weight, attention_weight
        self.layers, self.heads, self.queries = layers, heads, queries
        self.terms = ("lm", "seekr_replay", *(("seekr_logits",) if logits_weight else ()), "seekr_attention")
        self.memory: dict[str, Kept] = {}
        self.importance = torch.zeros(0)
        """Of each head, summed over tasks, (layers, heads), fp32, CPU."""
        self._chosen: list[tuple[Example, list[int], Tensor]] = []
        """This stage's rows to keep: example, queries, attention before training (layers, heads, queries, length)."""

    def setup(self, ctx: StageContext) -> None:
        """Have attention computed so that its weights can be seen.

        Raises:
            MethodError: If the model cannot.
        """
        try:
            ctx.model.set_attn_implementation("eager")  # type: ignore[operator]
        except (AttributeError, ImportError, ValueError) as error:
            raise MethodError(
                f"this model's attention cannot be switched to eager, which gives weights: {error}"
            ) from error

    def begin_stage(self, ctx: StageContext) -> None:
        """Choose the rows to keep and note their attention before training."""
        self._chosen = []
        was_training = ctx.model.training
        ctx.model.eval()
        for example in ctx.rng.sample(list(ctx.task.train), kept_rows(len(ctx.task.train), self.fraction)):
            length = int(_batch(ctx, example)["attention_mask"].sum())
            queries = sorted(ctx.rng.sample(range(length), min(self.queries or length, length)))
            with torch.no_grad():
                _, _, attention = forward(ctx, _batch(ctx, example))
            seen = torch.stack([layer[0, :, queries] for layer in attention])
            self._chosen.append((example, queries, seen.float().cpu()))
        ctx.model.train(was_training)

    def phases(self, ctx: StageContext) -> Sequence[Phase]:
        """The task's rows and the kept ones."""
        rows = [*ctx.task.train, *(kept.example for kept in self.memory.values())]
        return [Phase("task", rows, ctx.epochs_of(ctx.task.name))]

    def rows_per_pass(self, rows: Sequence[int], stage: int, alignment: int) -> int:
        """The task's rows and the kept share of earlier tasks."""
        return rows[stage - 1] + sum(kept_rows(count, self.fraction) for count in rows[: stage - 1])

    def losses(self, ctx: StageContext, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy of new rows, and what is distilled from kept ones, by their shares of the batch."""
        kept = {index: self.memory[name] for index, name in enumerate(batch["example_ids"]) if name in self.memory}
        new = [index for index in range(len(batch["example_ids"])) if index not in kept]
        terms = dict.fromkeys(self.terms, torch.zeros((), device=ctx.device))
        share = len(kept) / (len(kept) + len(new))
        if new:
            terms["lm"] = ctx.lm_loss(_rows(batch, new)) * (1 - share)
        if kept:
            found = self._replayed(ctx, _rows(batch, list(kept)), list(kept.values()))
            terms.update({name: term * share for name, term in found.items()})
        return terms

    def end_stage(self, ctx: StageContext) -> None:
        """Measure the heads on this stage's rows, choose the important ones, keep the rows with their attention."""
        sensitivity = forgettability = torch.zeros(())
        after: list[tuple[Tensor, Tensor]] = []
        for example, queries, before in self._chosen:
            logits, attention, gradients = measure(ctx, _batch(ctx, example))
            seen = attention[:, :, queries]
            sensitivity = sensitivity + gradients / len(self._chosen)
            forgettability = forgettability + (seen - before).square().mean((2, 3)) / len(self._chosen)
            after.append((seen, logits))
        sensitivity = sensitivity / sensitivity.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        product = sensitivity * forgettability
        self.importance = self.importance + product if self.importance.numel() else product
        heads = choose_heads(self.importance, self.layers, self.heads)
        for (example, queries, _), (seen, logits) in zip(self._chosen, after, strict=True):
            name = f"{ctx.task.name}/{example.id}"
            attention = torch.stack([seen[layer, head] for layer, head in heads]).half()
            logits = logits.half() if self.logits_weight else torch.zeros(0, dtype=torch.float16)
            self.memory[name] = Kept(replace(example, id=name), queries, heads, attention, logits)
        self._chosen = []

    def state_size(self, size: RunSize) -> StateSize:
        """Kept rows with attention and logits, fp16; on the device eager attention, fp32 and its 16 bit copy."""
        heads = min(self.heads, min(self.layers, size.layers) * size.heads)
        kept = [kept_rows(rows, self.fraction) for rows in size.rows]
        stored, before = 4.0 * size.layers * size.heads, [0.0]
        for rows, tokens, labels in zip(kept, size.row_tokens, size.answer_tokens, strict=True):
            seen = min(self.queries or tokens, tokens) * tokens
            stored += rows * (2 * heads * seen + 8 * heads + 2 * size.vocabulary * labels * (self.logits_weight > 0))
            stored += rows * (5 * min(self.queries or tokens, tokens) + 60)
            before.append(4 * rows * size.layers * size.heads * seen)
        return StateSize(
            stored=stored + rows_size(size, kept),
            device=6 * size.layers * size.heads * size.micro_batch * size.longest_row**2,
            host=max(before),
        )

    def num_stored_examples(self) -> int:
        """The rows kept for replay."""
        return len(self.memory)

    def state_dict(self) -> dict[str, Any]:
        """Importance, rows, their heads and positions, attention and logits."""
        rows = {
            name: {"example": asdict(kept.example), "queries": kept.queries, "heads": [list(one) for one in kept.heads]}
            for name, kept in self.memory.items()
        }
        tensors = {f"attention.{name}": kept.attention for name, kept in self.memory.items()}
        tensors |= {f"logits.{name}": kept.logits for name, kept in self.memory.items()}
        return {"importance": self.importance, "rows": rows, **tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.importance = state["importance"]
        self.memory = {
            name: Kept(
                Example(**row["example"]),
                list(row["queries"]),
                [(layer, head) for layer, head in row["heads"]],
                state[f"attention.{name}"],
                state[f"logits.{name}"],
            )
            for name, row in state["rows"].items()
        }

    def _replayed(self, ctx: StageContext, batch: dict[str, Any], kept: Sequence[Kept]) -> dict[str, Tensor]:
        with seen_by(ctx.model) as outputs:
            logits, labels = ctx.label_logits(batch)
        terms = {"seekr_replay": (1 - self.logits_weight) * F.cross_entropy(logits.float(), labels)}
        if self.logits_weight:
            # fp32 first: autocast on the CPU joins no fp16
            old = torch.cat([one.logits.to(logits.device).float() for one in kept]).softmax(-1)
            distance = F.kl_div(logits.float().log_softmax(-1), old, reduction="batchmean")
            terms["seekr_logits"] = self.logits_weight * distance
        distances = []
        for row, one in enumerate(kept):
            length = one.attention.shape[-1]
            new = torch.stack([outputs[0][layer][row, head][one.queries, :length] for layer, head in one.heads])
            distances.append(attention_distance(new, one.attention.to(new.device), one.heads))
        terms["seekr_attention"] = self.attention_weight * torch.stack(distances).mean()
        return terms


def _batch(ctx: StageContext, example: Example) -> dict[str, Any]:
    return _rows(collate(ctx.encode([example])), [0], ctx.device)


def _rows(batch: Mapping[str, Any], rows: Sequence[int], device: torch.device | None = None) -> dict[str, Any]:
    """Take rows of a batch, without padding that all of them share."""
    longest = int(batch["attention_mask"][list(rows)].sum(1).max())
    names = ("input_ids", "attention_mask", "labels")
    return {name: batch[name][list(rows), :longest].to(device or batch[name].device) for name in names}
