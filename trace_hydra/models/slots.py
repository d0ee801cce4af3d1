"""A key-value cache whose rows come and go, for models whose every layer attends to all positions.

Each row lives in a slot, its tokens in the slot's first columns. The rows under way are those of the first slots, so a
pass reads and writes a view of the memory; what a row has not written yet, or writes again, its tokens do not see.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from trace_hydra.models import attention

_STEP = 64
"""Columns are read in multiples of it: oneDNN makes a kernel for each shape that it meets."""


@dataclass
class _Place:
    """Where a pass writes, and what it reads."""

    columns: int = 0
    """Columns that attention reads, from the first on."""
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    """(rows, 1)."""
    written: Tensor = field(default_factory=lambda: torch.empty(0))
    """Column of each token, (rows, tokens)."""


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (slots, heads, columns, size), in memory that never moves."""

    is_sliding = False

    def __init__(self, place: _Place):
        super().__init__()
        self.place = place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: `Slots.admit` makes the memory."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write a pass's tokens; returns what its rows may see."""
        place, found = self.place, []
        for own, states in ((self.keys, key_states), (self.values, value_states)):
            own[place.rows, :, place.written] = states.transpose(1, 2).to(own.dtype)  # type: ignore
            found.append(own[: len(states), :, : place.columns])  # type: ignore[index]
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a query attends to, and the first of them."""
        return self.place.columns, 0

    def get_seq_length(self) -> int:
        """Columns that were read last."""
        return self.place.columns

    def get_max_length(self) -> int:
        """No limit."""
        return -1


class Slots:
    """The rows under way.

    Args:
        layers: Of the model.
        count: Slots.
        columns: Tokens of the longest row, its last one included, which is never read.
        before: Tokens that stand before all rows and are kept elsewhere.
    """

    def __init__(self, layers: int, count: int, columns: int, before: int = 0):
        self._place = _Place()
        self.cache = Cache(layers=[_SlotLayer(self._place) for _ in range(layers)])
        self.count, self.columns, self.before = count, columns, before
        self.lengths: list[int] = []
        """Tokens that each row has in its slot."""

    def admit(self, prefilled: Cache, lengths: Sequence[int]) -> None:
        """Put rows into the next slots.

        Args:
            prefilled: Their keys and values, each row's in its first columns.
            lengths: How many those are.
        """
        start, end = len(self.lengths), len(self.lengths) + len(lengths)
        layers: list[Any] = prefilled.layers
        for layer, filled in zip(self._layers, layers, strict=True):
            if not layer.is_initialized:
                for name in ("keys", "values"):
                    one = as_attended(getattr(filled, name))
                    memory = one.new_zeros(self.count, one.shape[1], self.columns, one.shape[3])  # masked, never NaN
                    setattr(layer, name, memory)
                layer.is_initialized = True
            for own, given in ((layer.keys, filled.keys), (layer.values, filled.values)):
                own[start:end, :, : max(lengths)] = given[:, :, : max(lengths)]
        self.lengths += lengths

    def release(self, slot: int) -> None:
        """End a row; the last one moves into its slot."""
        length = self.lengths.pop()
        if slot == (last := len(self.lengths)):
            return
        self.lengths[slot] = length
        for layer in self._layers:
            for own in (layer.keys, layer.values):
                own[slot, :, :length] = own[last, :, :length]

    def begin(self, width: int, device: torch.device) -> dict[str, Any]:
        """Prepare a pass over the next tokens of every row; those that count, `advance` says afterwards.

        Args:
            width: Tokens of each row. Behind the ones a row has room for they are read for nothing.
            device: Of the model.

        Returns:
            Arguments of the model: mask (rows, 1, width, columns), positions (rows, width), cache.
        """
        positions = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(width, device=device)
        needed = min(max(self.lengths) + width, self.columns)
        place = self._place
        place.columns = min(-(-needed // _STEP) * _STEP, self.columns)
        place.rows = torch.arange(len(self.lengths), device=device)[:, None]
        place.written = positions.clamp(max=self.columns - 1)
        return {
            "attention_mask": (torch.arange(place.columns, device=device) <= positions[..., None])[:, None],
            "position_ids": positions + self.before,
            "past_key_values": self.cache,
            "use_cache": True,
        }

    def advance(self, slot: int, tokens: int) -> None:
        """Count the first tokens that a row got in a pass; what else was written is written over."""
        self.lengths[slot] += tokens

    @property
    def _layers(self) -> list[Any]:
        return self.cache.layers


def as_attended(states: Tensor) -> Tensor:
    """Cast keys or values to the type that autocast would cast them to in every pass."""
    kind = states.device.type
    return states.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else states


def attends_to_all(model: Any) -> bool:
    """Tell whether slots hold all that a model remembers: no sliding window, no recurrence, no layers that share."""
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", attention.NAME):  # others add a mask of booleans, or take none
        return False
    if not getattr(model, "_supports_attention_backend", False) or getattr(config, "num_kv_shared_layers", 0):
        return False  # the first: masks of four dimensions are taken as they are
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    layers = DynamicCache(config=config).layers
    return kinds == {"full_attention"} and all(type(layer) is DynamicLayer for layer in layers)
