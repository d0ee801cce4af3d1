"""Soft prompts as token ids behind the vocabulary, so that padding, batching and generation need not know of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trace_hydra.data.encode import IGNORED
from trace_hydra.errors import MethodError


class VirtualTokens(nn.Module):
    """An input embedding whose ids from `first` on are trained vectors (Lester et al. 2021, arXiv:2104.08691).

    The output layer is left alone: no virtual token can be generated.

    Args:
        embedding: The model's own input embedding; its ids keep their vectors.
    """

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding = embedding
        self.first: int = embedding.num_embeddings  # type: ignore[assignment]
        """The first virtual id."""
        self.tables = nn.ParameterDict()
        """Name -> (length, width), fp32, in the order of their ids."""
        self.maps = nn.ModuleDict()
        """Name -> module that maps a table to its vectors (a reparametrisation); absent: the table itself."""
        self.others = nn.ParameterDict()
        """Trained with the tables but no embeddings, such as the keys of a pool."""

    @property
    def weight(self) -> Tensor:
        """The model's own vectors, (vocabulary, width)."""
        return self.embedding.weight  # type: ignore[return-value]

    @property
    def num_embeddings(self) -> int:
        """Ids of the model's own vocabulary."""
        return self.first

    def add(self, name: str, values: Tensor) -> list[int]:
        """Add a table of vectors, (length, width), trainable, and return its ids."""
        self.tables[name] = nn.Parameter(values.detach().float().clone().to(self.weight.device))
        return self.ids(name)

    def ids(self, name: str) -> list[int]:
        """List the ids of a table.

        Raises:
            MethodError: If there is no table of that name.
        """
        start = self.first
        for other, table in self.tables.items():
            if other == name:
                return list(range(start, start + len(table)))
            start += len(table)
        raise MethodError(f"no soft prompt named '{name}'; there are: {', '.join(self.tables) or 'none'}.")

    def clear(self) -> None:
        """Drop all tables, maps and other weights."""
        self.tables, self.maps, self.others = nn.ParameterDict(), nn.ModuleDict(), nn.ParameterDict()

    def vectors(self, name: str) -> Tensor:
        """The vectors of a table as the model sees them, (length, width)."""
        return self.maps[name](self.tables[name]) if name in self.maps else self.tables[name]

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw vectors of the model's own vocabulary, (count, width), fp32: the usual first values of a prompt."""
        chosen = torch.randint(self.first, (count,), generator=generator)
        return self.embedding(chosen.to(self.weight.device)).detach().float()

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids of both kinds: (batch, seq) to (batch, seq, width)."""
        virtual = ids >= self.first
        embedded = self.embedding(ids.masked_fill(virtual, 0))
        if not len(self.tables):
            return embedded
        rows = torch.cat([self.vectors(name) for name in self.tables]).to(embedded.dtype)
        return torch.where(virtual.unsqueeze(-1), rows[(ids - self.first).clamp(min=0)], embedded)


def install(model: Any) -> VirtualTokens:
    """Put virtual tokens around a model's input embedding."""
    tokens = VirtualTokens(model.get_input_embeddings())
    model.set_input_embeddings(tokens)
    return tokens


def virtual_tokens(model: Any) -> VirtualTokens:
    """Find a model's virtual tokens.

    Raises:
        MethodError: If it has none.
    """
    tokens = model.get_input_embeddings()
    if not isinstance(tokens, VirtualTokens):
        raise MethodError("the model has no soft prompts. Use tuning=prompt.")
    return tokens


def with_prefix(batch: dict[str, Any], prefix: Tensor) -> dict[str, Any]:
    """Put ids, (batch, length) or (length,), before every row of a training batch; they carry no label."""
    ids = batch["input_ids"]
    prefix = prefix.to(ids.device).expand(len(ids), -1)
    return {
        **batch,
        "input_ids": torch.cat([prefix, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(prefix), batch["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(prefix, IGNORED), batch["labels"]], 1),
    }


def all_ids(tokens: VirtualTokens, names: Sequence[str]) -> list[int]:
    """Join the ids of several tables, in the order of the names."""
    return [one for name in names for one in tokens.ids(name)]
