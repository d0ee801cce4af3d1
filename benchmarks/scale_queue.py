"""A day of one site as a queue: sweeps arrive, one login node plans them, devices train, one file system stores.

Sweeps come at random (Poisson), each of `runs` runs of `stages` stages. The login node plans a sweep and collects its
runs when all are done, and once a day lists and cleans the store. A run holds its devices through all its stages;
behind each, its bytes go through the file system, and its entries and the beats of its lock through the file system's
metadata. Each of these serves one at a time, in order of arrival; the devices serve as many runs as there are groups.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

DAY_S = 86400.0
DEVICES, BYTES, METADATA, LOGIN = (
    "devices", "file system: bytes a second", "file system: metadata", "login node: time",
)  # fmt: skip
OPERATIONS = {"publish": 25, "beat": 4, "scan": 10}
"""Calls to the file system, counted in `store/entries.py` (folders, opens, renames, syncs, looks at sizes),
`store/locks.py` (open, read, write, sync), and for an entry that `ls` and `gc` read in `store/survey.py`."""


@dataclass(frozen=True)
class Load:
    """What a stage, a run and a sweep ask for; seconds, bytes."""

    device_s: float
    """Of one device, a stage with its answers."""
    moved_bytes: float
    """A stage: entries, checkpoints, base models."""
    stored_bytes: float
    """A stage: what stays with store.keep=all."""
    stored_last_bytes: float
    """A stage: with store.keep=last."""
    entries: float
    """A stage: itself and its answers."""
    plan_sweep_s: float
    plan_run_s: float
    collect_run_s: float
    scan_entry_s: float
    """A day: `ls` and `gc`, an entry whose files are in memory."""
    scan_entry_bytes: float
    """Memory of a scan, an entry."""


@dataclass(frozen=True)
class Site:
    """What there is."""

    devices: int = 8
    moved_bytes_s: float = 1e9
    """Of the file system."""
    operation_s: float = 5e-4
    """Of one call to its metadata."""
    capacity_bytes: float = 100e12
    memory_bytes: float = 64e9
    """Of the login node."""
    keep_days: float = 30.0
    """After so many days `gc` takes what is stored."""
    devices_a_run: int = 1
    runs: int = 9
    """A sweep: 3 orders x 3 seeds."""
    stages: int = 8
    """A run."""
    beat_every_s: float = 10.0
    """`store/locks.py`."""


@dataclass
class Seen:
    """What a simulation saw of one queue."""

    busy_s: float = 0.0
    """Of all servers, on average."""
    waits: list[float] = field(default_factory=list)
    halfway: int = 0
    """Waiting at half of the time."""
    end: int = 0
    """Waiting at the end."""

    @property
    def mean_wait_s(self) -> float:
        """Of those that were served."""
        return sum(self.waits) / max(1, len(self.waits))


def utilisation(load: Load, site: Site, stages_a_day: float) -> dict[str, float]:
    """Share of each resource that a rate takes, in closed form; from 1 on its queue grows without end."""
    runs = stages_a_day / site.stages
    entries = stages_a_day * load.entries * site.keep_days
    login = runs / site.runs * load.plan_sweep_s + runs * (load.plan_run_s + load.collect_run_s)
    return {
        DEVICES: stages_a_day * load.device_s / (site.devices * DAY_S),
        BYTES: stages_a_day * load.moved_bytes / site.moved_bytes_s / DAY_S,
        METADATA: stages_a_day * metadata_s(load, site) / DAY_S,
        "file system: room, keep=all": stages_a_day * load.stored_bytes * site.keep_days / site.capacity_bytes,
        "file system: room, keep=last": stages_a_day * load.stored_last_bytes * site.keep_days / site.capacity_bytes,
        LOGIN: (login + scan_s(load, site, entries)) / DAY_S,
        "login node: memory of a scan": entries * load.scan_entry_bytes / site.memory_bytes,
    }


def metadata_s(load: Load, site: Site) -> float:
    """Seconds of metadata that a stage takes: its entries, and the beats of its lock while it is made."""
    beats = load.device_s / site.devices_a_run / site.beat_every_s
    return site.operation_s * (load.entries * OPERATIONS["publish"] + beats * OPERATIONS["beat"])


def scan_s(load: Load, site: Site, entries: float) -> float:
    """Seconds of the login node for a day's `ls` and `gc` of so many entries."""
    return entries * (load.scan_entry_s + OPERATIONS["scan"] * site.operation_s) if load.scan_entry_s else 0.0


def breaks_at(load: Load, site: Site) -> dict[str, float]:
    """Stages a day at which each resource is full; all grow in proportion."""
    return {name: 1 / share if share else float("inf") for name, share in utilisation(load, site, 1.0).items()}


def enough_devices(load: Load, site: Site, stages_a_day: float, share: float = 0.8) -> Site:
    """Give a site as many devices as keep `share` of them busy."""
    groups = stages_a_day * load.device_s / DAY_S / share / site.devices_a_run
    return replace(site, devices=max(1, -int(-groups // 1)) * site.devices_a_run)


def simulate(load: Load, site: Site, stages_a_day: float, *, days: float, seed: int = 0) -> dict[str, Seen]:
    """Play some days through, from an idle site whose store is as full as it stays.

    Returns:
        For devices, file system (bytes, metadata) and login node, by the names of `utilisation`.
    """
    try:
        import simpy
    except ModuleNotFoundError as error:
        raise SystemExit("benchmarks.scale needs simpy: pip install 'trace-hydra[benchmarks]'") from error
    environment = simpy.Environment()
    day = _Day(environment, simpy.Resource, load, site, Random(seed))
    environment.process(day.arrivals(stages_a_day / site.stages / site.runs / DAY_S))
    environment.process(day.cleaning(scan_s(load, site, stages_a_day * load.entries * site.keep_days)))
    environment.run(until=days * DAY_S / 2)
    for name, queue in day.queues.items():
        day.seen[name].halfway = len(queue.queue)
    environment.run(until=days * DAY_S)
    for name, queue in day.queues.items():
        day.seen[name].end = len(queue.queue)
    return day.seen


class _Day:
    """The processes of a simulation."""

    def __init__(self, environment: Any, resource: Callable[..., Any], load: Load, site: Site, random: Random):
        self.environment, self.load, self.site, self.random = environment, load, site, random
        self.groups = max(1, site.devices // site.devices_a_run)
        servers = {DEVICES: self.groups, BYTES: 1, METADATA: 1, LOGIN: 1}
        self.queues: Mapping[str, Any] = {name: resource(environment, count) for name, count in servers.items()}
        self.seen = {name: Seen() for name in servers}

    def arrivals(self, rate: float) -> Generator:
        while True:
            yield self.environment.timeout(self.random.expovariate(rate))
            self.environment.process(self.sweep())

    def cleaning(self, seconds: float) -> Generator:
        while seconds:
            yield self.environment.timeout(DAY_S)
            self.environment.process(self.served(LOGIN, seconds))

    def sweep(self) -> Generator:
        load, runs = self.load, self.site.runs
        yield from self.served(LOGIN, load.plan_sweep_s + runs * load.plan_run_s)
        yield self.environment.all_of([self.environment.process(self.run()) for _ in range(runs)])
        yield from self.served(LOGIN, runs * load.collect_run_s)

    def run(self) -> Generator:
        with self.queues["devices"].request() as turn:
            yield from self.waited(DEVICES, turn)
            for _ in range(self.site.stages):
                begun = self.environment.now
                yield self.environment.timeout(self.load.device_s / self.site.devices_a_run)
                yield from self.served(BYTES, self.load.moved_bytes / self.site.moved_bytes_s)
                yield from self.served(METADATA, metadata_s(self.load, self.site))
                self.seen[DEVICES].busy_s += (self.environment.now - begun) / self.groups

    def served(self, name: str, seconds: float) -> Generator:
        if not seconds:
            return
        with self.queues[name].request() as turn:
            yield from self.waited(name, turn)
            yield self.environment.timeout(seconds)
        self.seen[name].busy_s += seconds

    def waited(self, name: str, turn: Any) -> Generator:
        asked = self.environment.now
        yield turn
        self.seen[name].waits.append(self.environment.now - asked)
