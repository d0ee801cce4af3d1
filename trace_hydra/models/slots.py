"""A key-value cache whose rows come and go, for models whose every layer attends to all positions.

Each row lives in a slot. All rows share one clock: the newest token of every row is in the last column that is in use,
so a step writes one column, and a row of n tokens holds the n columns before it. What is left of them is masked.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from trace_hydra.models import attention

_SPARE = 64
"""Columns allocated beyond what is needed."""
_SLACK = 1.25
"""Columns in use for each that the longest row has, before all are moved."""


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (slots, heads, columns, size), in memory that seldom moves."""

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.length = 0
        """Columns in use."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shape and type of the first keys and values."""
        rows, heads = key_states.shape[:2]
        self.keys = key_states.new_empty(rows, heads, 0, key_states.shape[-1])
        self.values = value_states.new_empty(rows, heads, 0, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add columns behind those in use; returns all in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.reserve(self.length)
        self.keys[:, :, start : self.length] = key_states  # type: ignore[index]
        self.values[:, :, start : self.length] = value_states  # type: ignore[index]
        return self.columns()

    def columns(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the columns in use."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]  # type: ignore[index]

    def reserve(self, columns: int) -> None:
        """Make room for so many columns."""
        have = self.keys.shape[2]  # type: ignore[union-attr]
        if columns > have:
            self.keys, self.values = (
                nn.functional.pad(one, (0, 0, 0, columns + _SPARE - have))  # type: ignore[arg-type]
                for one in (self.keys, self.values)
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a query attends to, and the first of them."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1


class Slots:
    """The rows under way.

    Args:
        layers: Of the model.
        count: Slots.
    """

    def __init__(self, layers: int, count: int):
        self.cache = Cache(layers=[_SlotLayer() for _ in range(layers)])
        self.lengths = [0] * count
        """Tokens of the row in each slot; 0: the slot is free."""

    @property
    def columns(self) -> int:
        """Columns in use."""
        return self._layers[0].length

    def admit(self, slots: Sequence[int], prefilled: Cache, lengths: Sequence[int]) -> None:
        """Put rows into free slots.

        Args:
            slots: One for each row of `prefilled`.
            prefilled: Their keys and values, each row's in its first columns.
            lengths: How many those are.
        """
        for slot, length in zip(slots, lengths, strict=True):
            self.lengths[slot] = length
        end = max(self.lengths)
        if end <= self.columns <= _SLACK * end:
            end = self.columns  # moving costs more than a few masked columns
        if not self._layers[0].is_initialized:
            for layer, filled in zip(self._layers, prefilled.layers, strict=True):
                keys, values = _states(filled)
                layer.keys = keys.new_zeros(len(self.lengths), keys.shape[1], 0, keys.shape[3])
                layer.values = values.new_zeros(len(self.lengths), values.shape[1], 0, values.shape[3])
                layer.is_initialized = True
        self._move_clock(end)
        for layer, filled in zip(self._layers, prefilled.layers, strict=True):
            for own, given in zip((layer.keys, layer.values), _states(filled), strict=True):
                for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
                    own[slot, :, end - length : end] = given[row, :, :length]  # type: ignore[index]

    def release(self, slot: int) -> None:
        """End the row of a slot."""
        self.lengths[slot] = 0

    def mask(self, device: torch.device) -> Tensor:
        """Say which columns the next token of each row sees, its own included: (slots, 1, 1, columns + 1), bool."""
        first = torch.tensor([self.columns - length for length in self.lengths], device=device)
        return (torch.arange(self.columns + 1, device=device) >= first[:, None])[:, None, None]

    def positions(self, device: torch.device) -> Tensor:
        """Positions of the next tokens: (slots, 1)."""
        return torch.tensor(self.lengths, device=device)[:, None]

    def step(self) -> None:
        """Count the token that each row has got."""
        self.lengths = [length + 1 if length else 0 for length in self.lengths]

    @property
    def _layers(self) -> list[_SlotLayer]:
        return self.cache.layers  # type: ignore[return-value]

    def _move_clock(self, end: int) -> None:
        """Move the newest column of all rows to `end - 1`."""
        shift = end - self.columns
        for layer in self._layers:
            if shift < 0:
                moved = [one[:, :, -shift : layer.length].clone() for one in (layer.keys, layer.values)]  # type: ignore
                for own, columns in zip((layer.keys, layer.values), moved, strict=True):
                    own[:, :, :end] = columns  # type: ignore[index]
            elif shift:
                old = [one.clone() for one in layer.columns()]
                layer.reserve(end)
                for own, columns in zip((layer.keys, layer.values), old, strict=True):
                    own[:, :, shift:end] = columns  # type: ignore[index]
            layer.length = end


def _states(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.columns() if isinstance(layer, _SlotLayer) else (layer.keys, layer.values)


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
