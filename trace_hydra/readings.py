"""What training measures on the device, brought to the host in one piece when somebody asks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor

_SHOWN_ROWS = 8
_AT_MOST = 50
"""Steps between two readings, if nobody asks."""


@dataclass
class _Step:
    """One optimizer step."""

    where: str
    rows: Sequence[str]
    names: list[str] = field(default_factory=list)
    """What was measured, in order."""
    shares: list[float | None] = field(default_factory=list)
    """A loss term's share in the mean; None for what only has to be finite."""
    values: list[float] = field(default_factory=list)
    """Of the first `names`; the others are still on the device."""
    waiting: list[Tensor] = field(default_factory=list)
    """Scalars of the last `names`."""

    def problem(self) -> str:
        """Say which value is not finite; "" if all are."""
        for name, share, value in zip(self.names, self.shares, self.values, strict=True):
            if not isfinite(value):
                what = name if share is None else f"loss term '{name}'"
                more = f", and {len(self.rows) - _SHOWN_ROWS} more" if len(self.rows) > _SHOWN_ROWS else ""
                return f"{self.where}: {what} is {value}, rows {', '.join(self.rows[:_SHOWN_ROWS])}{more}"
        return ""


class Readings:
    """Loss terms and norms of gradients of the steps since the last reading.

    Args:
        seen: Largest magnitude of each term before, in a phase that is taken up again.
    """

    def __init__(self, seen: Mapping[str, float] | None = None):
        self.seen: dict[str, float] = dict(seen or {})
        """Largest magnitude of each term in this phase, as far as read."""
        self.means: dict[str, float] = {}
        """Mean of each term over the steps of the last reading; a micro-batch counts by its share of the labels."""
        self._steps: list[_Step] = []

    @property
    def due(self) -> bool:
        """Whether it is time to read, should nobody ask."""
        return len(self._steps) >= _AT_MOST

    def begin(self, where: str, rows: Sequence[str]) -> None:
        """Begin a step."""
        self._steps.append(_Step(where, rows))

    def add(self, terms: Mapping[str, Tensor], share: float) -> None:
        """Note the loss terms of a micro-batch."""
        for name, value in terms.items():
            self._note(name, share, value)

    def pool(self, average: Callable[[list[Tensor]], None]) -> None:
        """Replace the loss terms of the step under way, not yet read, by their means over the processes that share it.

        Args:
            average: Replaces tensors by their means.
        """
        step = self._steps[-1]
        totals: dict[str, Tensor] = {}
        for name, share, value in zip(step.names, step.shares, step.waiting, strict=True):
            totals[name] = totals.get(name, torch.zeros_like(value)) + (share or 0.0) * value
        means = torch.stack(list(totals.values()))
        average([means])
        step.names, step.shares, step.waiting = list(totals), [1.0] * len(totals), list(means.unbind())

    def watch(self, what: str, value: Tensor) -> None:
        """Note something that must be finite."""
        self._note(what, None, value)

    def problem(self) -> str:
        """Read the step under way; say what in it is not finite, "" if all is."""
        _fetch(self._steps[-1:])
        return self._steps[-1].problem()

    def drop(self) -> None:
        """Forget the step under way."""
        self._steps.pop()

    def read(self) -> str:
        """Read all steps since the last reading into `means` and `seen`; say what first was not finite."""
        steps, self._steps = self._steps, []
        _fetch(steps)
        if problem := next(filter(None, (step.problem() for step in steps)), ""):
            return problem
        sums: dict[str, float] = {}
        shares: dict[str, float] = {}
        for step in steps:
            for name, share, value in zip(step.names, step.shares, step.values, strict=True):
                if share is not None:
                    sums[name] = sums.get(name, 0.0) + share * value
                    shares[name] = shares.get(name, 0.0) + share
                    self.seen[name] = max(self.seen.get(name, 0.0), abs(value))
        if steps:
            self.means = {name: total / shares[name] for name, total in sums.items() if shares[name]}
        return ""

    def _note(self, name: str, share: float | None, value: Tensor) -> None:
        step = self._steps[-1]
        step.names.append(name)
        step.shares.append(share)
        step.waiting.append(value.detach().float())


def _fetch(steps: Sequence[_Step]) -> None:
    """Bring scalars to the host, all at once."""
    waiting = [value for step in steps for value in step.waiting]
    if not waiting:
        return
    fetched = iter(torch.stack([value.to(waiting[0].device) for value in waiting]).tolist())
    for step in steps:
        step.values += [next(fetched) for _ in step.waiting]
        step.waiting.clear()
