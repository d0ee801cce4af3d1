"""Learning to Prompt: a pool of prompts, chosen for each row by keys (Wang et al. 2022, arXiv:2112.08654, eq. 1-5).

Paper -> code:  prompt pool P = {P_1 .. P_M}, eq. 1 -> table "pool", pool_size x prompt_length vectors
    x_p = [P_s1; ..; P_sN; x_e], eq. 2 -> `prefixes`, the chosen prompts before the row, best first
    keys k_m, eq. 3; K_x = argmin sum of gamma(q(x), k_si), eq. 4, gamma the cosine distance -> `select`, top_k
    q(x), a feature of the frozen start model -> query="hidden": last hidden state of the prompt's last token, without
        soft prompts; "embedding": mean of the prompt's token embeddings
    eq. 5: min L(g(..), y) + lambda sum_{K_x} gamma(q(x), k_si) -> `losses`, terms lm and keys; lambda -> strength
Differs from the paper: the model generates text, so there is no classifier and no average over prompt positions; a
    causal model has no [CLS], the last token has seen the whole prompt; no penalty on prompts that earlier tasks used
    (an option there). All rows choose from one pool, so no task identity is needed.
Differs from official TRACE: keys are trained (there the means of the first prompts, fixed; model/Dynamic_network/
    L2P.py); the query sees the prompt only (there answer and padding too); prompts are chosen and prepended in
    generation (there never: infer_single loads the pool and does not use it).
Memory: 4 bytes per vector entry of pool and keys, pool_size x (prompt_length + 1) x width, trained like an adapter.
    Compute: query="hidden" adds one forward pass over the prompt per training row and per answer; top_k x prompt_length
    more tokens in each row.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_hydra.context import StageContext, TrainTask
from trace_hydra.data.encode import IGNORED
from trace_hydra.errors import ConfigError
from trace_hydra.methods.base import Method
from trace_hydra.models.forward import last_hidden_states
from trace_hydra.models.prompts import virtual_tokens, with_prefix
from trace_hydra.sizes import RunSize, StateSize


class L2P(Method):
    """Train a pool of prompts and the keys that choose among them.

    Args:
        pool_size: M, prompts of the pool, at least 1.
        prompt_length: L_p, virtual tokens of a prompt, at least 1.
        top_k: N, prompts chosen for a row, from 1 to pool_size.
        strength: lambda, weight of the distance between query and chosen keys, at least 0.
        query: "hidden" or "embedding", what keys are compared with.
        query_rows: Rows of a forward pass of query="hidden" before an answer; changes memory and speed only.
    """

    tunings = ("prompt",)
    tuning_reason = "it trains a pool of soft prompts and leaves the model frozen"
    terms = ("lm", "keys")
    picks_by_prompt = True
    published = MappingProxyType({"prompt": "L2P"})

    def __init__(
        self,
        *,
        pool_size: int,
        prompt_length: int,
        top_k: int,
        strength: float,
        query: Literal["hidden", "embedding"],
        query_rows: int,
    ):
        for key, value in (("pool_size", pool_size), ("prompt_length", prompt_length), ("query_rows", query_rows)):
            if value < 1:
                raise ConfigError(f"method.{key}={value} must be at least 1.")
        if not 1 <= top_k <= pool_size:
            raise ConfigError(f"method.top_k={top_k} must be from 1 to method.pool_size={pool_size}.")
        if strength < 0:
            raise ConfigError(f"method.strength={strength} must be at least 0; it pulls keys to their queries.")
        if query not in ("hidden", "embedding"):
            raise ConfigError(f"method.query={query!r} must be 'hidden' or 'embedding'.")
        self.pool_size, self.prompt_length, self.top_k = pool_size, prompt_length, top_k
        self.strength, self.query, self.query_rows = strength, query, query_rows

    def prefix_length(self, tuning: int, stages: int) -> int:
        """The chosen prompts."""
        return self.prompt_length * self.top_k

    def setup(self, ctx: StageContext) -> None:
        """Replace the tuning's one prompt by the pool and its keys."""
        tokens = virtual_tokens(ctx.model)
        tokens.clear()
        tokens.add("pool", ctx.tuning.first_values(tokens, self.pool_size * self.prompt_length))  # type: ignore[attr-defined]
        width = tokens.weight.shape[1]
        tokens.others["pool_keys"] = torch.nn.Parameter(
            torch.empty(self.pool_size, width).uniform_(-1, 1).to(ctx.device)
        )
        ctx.model.to(ctx.device)  # type: ignore[arg-type]
        ctx.prefix = ()

    def losses(self, ctx: StageContext, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The task's loss behind the chosen prompts, and the distance of their keys."""
        prompts = batch["attention_mask"] * (batch["labels"] == IGNORED)  # (batch, seq), 1 at prompt tokens
        queries = self.queries(ctx, batch["input_ids"], prompts)
        chosen, similarity = self.select(ctx, queries)
        distance = (1 - similarity).sum(1).mean()
        return {
            "lm": ctx.lm_loss(with_prefix(dict(batch), self.prefixes(ctx, chosen))),
            "keys": self.strength * distance,
        }

    def answer(self, ctx: StageContext, prompts: Sequence[str], task: TrainTask) -> list[str]:
        """Answer each prompt behind the prompts that its query chooses."""
        prefixes = self.chosen_prefixes(ctx, prompts, task.instruction)
        return ctx.generate(
            prompts, task.max_new_tokens, instruction=task.instruction, stop=task.stop, prefixes=prefixes
        )

    def serve(
        self, ctx: StageContext, prompts: Sequence[str]
    ) -> Iterator[tuple[Sequence[int], Sequence[Sequence[int]]]]:
        """Put the prompts that its query chooses before each prompt."""
        yield range(len(prompts)), self.chosen_prefixes(ctx, prompts, "")

    def chosen_prefixes(self, ctx: StageContext, prompts: Sequence[str], instruction: str) -> list[list[int]]:
        """Choose for each prompt, cut as the protocol cuts it: top_k * prompt_length ids."""
        ids, _ = ctx.encoder.prompts(prompts, instruction)
        prefixes: list[list[int]] = []
        with torch.no_grad(), ctx.autocast():
            for start in range(0, len(ids), self.query_rows):
                rows = ids[start : start + self.query_rows]
                padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
                mask = torch.zeros_like(padded)
                for row, one in enumerate(rows):
                    padded[row, : len(one)], mask[row, : len(one)] = torch.tensor(one), 1
                device = virtual_tokens(ctx.model).weight.device
                chosen, _ = self.select(ctx, self.queries(ctx, padded.to(device), mask.to(device)))
                prefixes += self.prefixes(ctx, chosen).tolist()
        return prefixes

    def state_size(self, size: RunSize) -> StateSize:
        """Nothing is kept; pool and keys train."""
        return StateSize(trained=float(self.pool_size * (self.prompt_length + 1) * size.width))

    def queries(self, ctx: StageContext, ids: Tensor, mask: Tensor) -> Tensor:
        """Features of prompts that are padded on the right, (batch, seq) to (batch, width), fp32, without gradient."""
        with torch.no_grad():
            if self.query == "embedding":
                embedded = virtual_tokens(ctx.model).embedding(ids).float()
                return (embedded * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
            was_training = ctx.model.training
            ctx.model.eval()
            hidden = last_hidden_states(ctx.model, ids, mask)
            ctx.model.train(was_training)
            return hidden[torch.arange(len(ids), device=ids.device), mask.sum(1).clamp(min=1) - 1].float()

    def select(self, ctx: StageContext, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Find the top_k nearest keys of each query (eq. 4).

        Returns:
            Prompt numbers and their cosine similarities, both (batch, top_k), best first; gradients reach the keys.
        """
        keys = virtual_tokens(ctx.model).others["pool_keys"]
        similarity = F.cosine_similarity(queries.unsqueeze(1), keys.float().unsqueeze(0), dim=-1)  # (batch, pool)
        best, chosen = similarity.topk(self.top_k, dim=1)
        return chosen, best

    def prefixes(self, ctx: StageContext, chosen: Tensor) -> Tensor:
        """Ids of the chosen prompts, (batch, top_k) to (batch, top_k * prompt_length)."""
        first = virtual_tokens(ctx.model).ids("pool")[0]
        within = torch.arange(self.prompt_length, device=chosen.device)
        return (first + chosen.unsqueeze(-1) * self.prompt_length + within).flatten(1)
