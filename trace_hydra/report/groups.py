"""Several runs put in order: groups that may be averaged, fields of groups that may be compared."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trace_hydra.collect import Run, summarise
from trace_hydra.errors import TraceHydraError
from trace_hydra.metrics.spread import mean_and_margin
from trace_hydra.report.hostile import plain
from trace_hydra.statistics import Estimate, RunScores, across_runs, read_scores

NAMES = ("model", "tuning", "data", "protocol", "fingerprint")


@dataclass(frozen=True, eq=False)
class Member:
    """One run of a report."""

    run: Run
    folder: Path
    """Its directory."""

    @cached_property
    def scores(self) -> RunScores | str:
        """Give the scores of all its answers, or why they cannot be read."""
        try:
            return read_scores(self.folder, self.run.results)
        except TraceHydraError as error:
            return str(error)


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in nothing but seed and order."""

    label: str
    """Its method, and what sets it apart from other groups of the report."""
    record: Mapping[str, Any]
    """`collect.summarise`."""
    members: list[Member] = field(default_factory=list)

    @property
    def method(self) -> str:
        """Name the method."""
        return self.record["method"]

    @property
    def field(self) -> tuple[str, ...]:
        """Give what must be equal for groups to be compared: model, data, protocol with its fingerprint, tasks."""
        tasks = sorted(self.members[0].run.results["tasks"])
        return (*(self.record[key] for key in ("model", "data", "protocol", "fingerprint")), *tasks)

    @cached_property
    def scores(self) -> list[RunScores] | str:
        """Give the scores of all members, or why they cannot be had."""
        found = [member.scores for member in self.members]
        wrong = [one for one in found if isinstance(one, str)]
        return wrong[0] if wrong else [one for one in found if not isinstance(one, str)]

    def estimate(self, number: str) -> Estimate:
        """Average a number over the runs, with its interval; from results.json alone where answers cannot be read."""
        scores = self.scores
        if not isinstance(scores, str):
            found = across_runs(scores, number)
            if found.value is not None or number not in self.record["numbers"]:
                return found
        own = [member.run.numbers().get(number) for member in self.members]
        known = [float(value) for value in own if value is not None]
        if len(known) < len(own) or not known:
            return Estimate(None, None, None, self._lacking(number, len(own) - len(known)))
        mean, margin = mean_and_margin(known)
        if mean is None or margin is None:
            return Estimate(mean, None, None, "one run whose answers could not be read")
        return Estimate(mean, mean - margin, mean + margin, "over runs only; answers could not be read")

    def matrix(self) -> list[list[float | None]] | str:
        """Average the matrices, or say why that makes no sense."""
        if len(orders := self.orders()) > 1:
            return f"its runs have {len(orders)} task orders, whose rows mean different stages"
        return mean_matrix(self.members)

    def orders(self) -> dict[tuple[str, ...], list[Member]]:
        """Sort the runs by the order of their tasks."""
        found: dict[tuple[str, ...], list[Member]] = {}
        for member in self.members:
            found.setdefault(tuple(member.run.results["tasks"]), []).append(member)
        return found

    def _lacking(self, number: str, count: int) -> str:
        missing = [
            ", ".join(map(str, why))
            for member in self.members
            if (why := (member.run.results.get("missing") or {}).get(number))
        ]
        which = f"{count} of {len(self.members)} runs" if len(self.members) > 1 else "the run"
        said = f" ({plain(missing[0], 100)})" if missing else ""
        if number.startswith("delta_"):
            return f"not measured in {which}"
        return f"not known in {which}{said}"


def mean_matrix(members: Sequence[Member]) -> list[list[float | None]]:
    """Average the matrices of runs of one task order, cell by cell; None where a run lacks the cell."""
    matrices = [member.run.results["matrix"] for member in members]
    return [
        [None if None in cells else sum(cells) / len(cells) for cells in zip(*rows, strict=True)]
        for rows in zip(*matrices, strict=True)
    ]


def order_names(members: Sequence[Member]) -> dict[tuple[str, ...], str]:
    """Name the task orders of runs; those that share a name get a number."""
    names: dict[tuple[str, ...], str] = {}
    for member in members:
        order, name = tuple(member.run.results["tasks"]), plain(member.run.results["task_order"], 60)
        if order not in names:
            same = sum(one == name or one.startswith(f"{name} (") for one in names.values())
            names[order] = f"{name} ({same + 1})" if same else name
    return names


def group_runs(members: Sequence[Member]) -> list[Group]:
    """Group runs; what sets groups apart stands in their labels."""
    by_group: dict[tuple[str, ...], list[Member]] = {}
    for member in members:
        by_group.setdefault(member.run.group, []).append(member)
    records = summarise([member.run for member in members])  # one a group, in the order of the sorted groups
    pairs = list(zip(records, (by_group[key] for key in sorted(by_group)), strict=True))
    apart = [key for key in NAMES if len({record[key] for record, _ in pairs}) > 1]
    labels = [_label(record, apart) for record, _ in pairs]
    groups = []
    for place, (record, own) in enumerate(pairs):
        label = labels[place]
        if labels.count(label) > 1 and record["settings"]:
            label = f"{label} {plain(record['settings'], 60)}"
        groups.append(Group(label, record, own))
    return list(_distinct(groups))


def fields(groups: Sequence[Group]) -> dict[tuple[str, ...], list[Group]]:
    """Sort groups into those that may be compared with each other."""
    found: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        found.setdefault(group.field, []).append(group)
    return found


def _label(record: Mapping[str, Any], apart: Sequence[str]) -> str:
    said = [plain(record[key], 40) for key in apart if key != "fingerprint"]
    if "fingerprint" in apart:
        said.append(f"[{plain(record['fingerprint'], 12)}]")
    return " ".join([plain(record["method"], 40), *said])


def _distinct(groups: Sequence[Group]) -> Iterator[Group]:
    seen: dict[str, int] = {}
    for group in groups:
        seen[group.label] = seen.get(group.label, 0) + 1
        times = seen[group.label]
        yield group if times == 1 else Group(f"{group.label} ({times})", group.record, group.members)
