"""How long a sweep still takes, from what its jobs have measured. No torch here."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

_KINDS = ("trained", "answered", "measured")


@dataclass(frozen=True)
class Work:
    """What a job still has to do, and what it has measured."""

    group: tuple[str, ...]
    """Names of model, tuning and method."""
    left_s: float | None = None
    """By its own account; None if it has none."""
    pieces: tuple[int, ...] = ()
    """Stages and cells that the store lacked, as places in the sweep's list."""
    measured: int = 0
    """Rows at which capability is to be measured."""
    rates: Mapping[str, Any] = field(default_factory=dict)
    """Kind -> [amount, seconds] that it has measured itself."""
    beside_s: float | None = None
    """Of a finished job: seconds that are in none of its rates."""


@dataclass(frozen=True)
class Left:
    """An estimate."""

    seconds: float | None
    """None if something is to do whose speed nobody measured."""
    note: str = ""
    """Why there is no number."""
    uncounted: tuple[str, ...] = ()
    """What is to do and not part of the number, for nobody measured it."""


def time_left(
    ended: Iterable[Work], running: Sequence[Work], waiting: Sequence[Work], pieces: Sequence[tuple[str, int]],
    slots: int | None,
) -> Left:  # fmt: skip
    """Estimate when the last job ends, each waiting one starting where one ends.

    What several jobs need is counted once, with the first; what was in the store when the sweep was planned is in no
    job's pieces. Speeds are those of jobs of the same group, else of the same model and tuning.

    Args:
        ended: Jobs that are over; only what they measured counts.
        running: Jobs under way.
        waiting: Jobs in the order in which they start.
        pieces: (kind, amount) of what `Work.pieces` names.
        slots: Jobs at once; None: as many as run now.
    """
    speeds = _Speeds([*ended, *running])
    claimed: set[int] = set()
    ends: list[float] = []
    for job in running:
        left = job.left_s if job.left_s is not None else speeds.cost(job, pieces, claimed)
        claimed |= set(job.pieces)
        if left is None:
            return Left(None, speeds.missing)
        ends.append(left)
    ends += [0.0] * ((slots or max(len(running), 1)) - len(ends))
    heapq.heapify(ends)
    last = max(ends, default=0.0)
    for job in waiting:
        cost = speeds.cost(job, pieces, claimed)
        claimed |= set(job.pieces)
        if cost is None:
            return Left(None, speeds.missing)
        end = heapq.heappop(ends) + cost
        last = max(last, end)
        heapq.heappush(ends, end)
    return Left(last, uncounted=tuple(sorted(speeds.uncounted)))


class _Speeds:
    """Seconds an amount of each kind takes, by group of jobs."""

    def __init__(self, jobs: Sequence[Work]):
        self.missing, self.uncounted = "", set[str]()
        self._sums: dict[tuple[tuple[str, ...], str], list[float]] = {}
        self._beside: dict[tuple[str, ...], list[float]] = {}
        for job in jobs:
            for group in (job.group, job.group[:2]):
                for kind, found in job.rates.items():
                    amount, seconds = _pair(found)
                    total = self._sums.setdefault((group, kind), [0.0, 0.0])
                    total[0], total[1] = total[0] + amount, total[1] + seconds
                if job.beside_s is not None:
                    self._beside.setdefault(group, []).append(job.beside_s)

    def cost(self, job: Work, pieces: Sequence[tuple[str, int]], claimed: set[int]) -> float | None:
        """Seconds of a job's own work without what is claimed; None if a speed is not known."""
        amounts: dict[str, float] = dict.fromkeys(_KINDS, 0.0)
        amounts["measured"] = job.measured
        for place in job.pieces:
            if place not in claimed and place < len(pieces):
                kind, amount = pieces[place]
                amounts[kind] = amounts.get(kind, 0.0) + amount
        cost = self._typical(job.group)
        for kind, amount in amounts.items():
            speed = self._speed(job.group, kind) if amount else 0.0
            if speed is None and kind == "measured":
                self.uncounted.add("capability")
                continue
            if speed is None:
                self.missing = f"no job of {' '.join(job.group[:2])} has {kind} anything yet"
                return None
            cost += amount * speed
        return cost

    def _speed(self, group: tuple[str, ...], kind: str) -> float | None:
        for known in (group, group[:2]):
            amount, seconds = self._sums.get((known, kind), (0.0, 0.0))
            if amount:
                return seconds / amount
        return None

    def _typical(self, group: tuple[str, ...]) -> float:
        """What finished jobs took for everything else: starting, loading, reports."""
        found = self._beside.get(group) or self._beside.get(group[:2]) or [0.0]
        return median(found)


def beside(gone_s: float, rates: Mapping[str, Any]) -> float:
    """Seconds of a finished job that none of its rates holds."""
    return max(0.0, gone_s - sum(_pair(rates.get(kind))[1] for kind in _KINDS))


def _pair(found: Any) -> tuple[float, float]:
    try:
        amount, seconds = (float(one) for one in found)
    except (TypeError, ValueError):
        return 0.0, 0.0
    return (amount, seconds) if amount > 0 and seconds >= 0 else (0.0, 0.0)
