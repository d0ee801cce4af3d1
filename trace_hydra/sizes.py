"""Sizes of a run that is planned but not loaded, and what a method would hold in it: plain records without torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

RESIDENT_BYTES = 8e9
"""What a method reads at every step stays on the device up to this size; more is kept on the CPU and brought over one
tensor at a time (`methods/resident.py`)."""


@dataclass(frozen=True)
class RunSize:
    """What a method's memory depends on."""

    weights: Mapping[str, tuple[int, ...]]
    """Shapes of all weights by name, adapters included, in the model's order."""
    trainable: frozenset[str]
    """Names of those that train under the run's tuning."""
    linear: frozenset[str]
    """Names of the weights of linear layers that train, (out_features, in_features)."""
    rows: Sequence[int]
    """Train rows of each task, in training order."""
    row_bytes: Sequence[float]
    """Average bytes of a train row of each task as a method's state holds it: all its fields as JSON."""
    row_tokens: Sequence[float]
    """Average tokens of an encoded train row, of each task."""
    answer_tokens: Sequence[float]
    """Average labelled tokens of a train row, of each task."""
    width: int
    """Of the hidden states."""
    layers: int
    heads: int
    """Query heads of a layer."""
    vocabulary: int
    micro_batch: int
    """Rows of one forward pass."""
    alignment: int
    """Alignment rows of the data."""
    longest_row: int = 0
    """Tokens of the longest encoded train row."""
    weight_bytes: int = 4
    """Of one number of a weight that trains."""
    activation_bytes: float = 0
    """Kept on the device from the forward pass of one micro-batch to its backward pass, at most."""

    @property
    def num_trainable(self) -> int:
        """Weights that train."""
        return sum(prod(self.weights[name]) for name in self.trainable)

    @property
    def largest_trainable(self) -> int:
        """Numbers of the largest weight that trains."""
        return max((prod(self.weights[name]) for name in self.trainable), default=0)

    @property
    def stages(self) -> int:
        """Tasks of the run."""
        return len(self.rows)

    @property
    def mean_row_bytes(self) -> float:
        """Average of `row_bytes` over all rows."""
        return self._mean(self.row_bytes)

    @property
    def mean_answer_tokens(self) -> float:
        """Average of `answer_tokens` over all rows."""
        return self._mean(self.answer_tokens)

    def _mean(self, values: Sequence[float]) -> float:
        weighted = sum(value * rows for value, rows in zip(values, self.rows, strict=True))
        return weighted / max(1, sum(self.rows))


@dataclass(frozen=True)
class StateSize:
    """What a method holds beyond weights, gradients and optimizer, in bytes, at the largest over the run."""

    stored: float = 0
    """Kept between stages and returned by `state_dict` after the last one; on the CPU unless the method says
    otherwise."""
    device: float = 0
    """Held on the device while a stage trains: copies of what is stored, teachers, bases."""
    host: float = 0
    """Held on the CPU while a stage trains, beside what is stored."""
    trained: float | None = None
    """Weights that train at once, where the method trains fewer than the tuning would; None: all of them."""
