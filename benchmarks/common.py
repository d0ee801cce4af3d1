"""What the benchmarks share: rows, the model, contenders that take turns, and a table of ratios."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from rich.console import Console
from rich.table import Table

from trace_hydra import build, entry, inputs, schema
from trace_hydra.prepare import Prepared, prepare

CONF = entry.project_root() / "conf"


@dataclass
class Contender:
    """One side of a comparison."""

    name: str
    run: Callable[[], Mapping[str, Any]]
    """Does the work; returns at least `seconds`, of the part that counts, and `tokens`, useful ones."""
    warm_up: Callable[[], Any] = lambda: None
    """Runs before the first turn and does not count."""
    samples: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Useful tokens a second, the median of the samples."""
        return statistics.median(one["tokens"] / one["seconds"] for one in self.samples)


def options(description: str) -> argparse.ArgumentParser:
    """Make the parser of a benchmark's command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder in TRACE's layout; generated rows without it")
    parser.add_argument("--rows", type=int, default=4, help="rows a task")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contender")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("overrides", nargs="*", help="of the configuration, such as model=hf model.path=FOLDER")
    return parser


def prepared(arguments: argparse.Namespace, *overrides: str) -> tuple[Any, build.Parts, Prepared]:
    """Compose a run and read its rows: configuration, parts, plan."""
    rows = arguments.rows
    data = [f"data.rows={{train:{rows},eval:1,test:{rows}}}"]
    if arguments.data:
        data = ["data=trace", f"paths.data={arguments.data}", f"data.limit={{train:{rows},eval:1,test:{rows}}}"]
    schema.register()
    entry.register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = entry.rewrite_overrides([*data, "logger=none", "callbacks=none", *overrides, *arguments.overrides])
        config = compose("config", given)
    parts = build.validate(config)
    return config, parts, prepare(config, parts, Path("benchmark"))


def alternate(contenders: Sequence[Contender], repeats: int) -> None:
    """Let contenders take turns, A B then B A, so that a machine that slows down does so for all."""
    for contender in contenders:
        contender.warm_up()
    for turn in range(repeats):
        for contender in contenders if turn % 2 == 0 else reversed(contenders):
            sample = contender.run()
            contender.samples.append(sample)
            rate = sample["tokens"] / sample["seconds"]
            print(f"  {contender.name}: {sample['seconds']:.1f} s, {rate:.0f} tokens/s", flush=True)


def ratios(ours: Contender, other: Contender) -> list[float]:
    """How many times faster ours was, turn by turn."""
    pairs = zip(ours.samples, other.samples, strict=True)
    return [(one["tokens"] / one["seconds"]) / (two["tokens"] / two["seconds"]) for one, two in pairs]


def machine() -> dict[str, Any]:
    """Describe what this ran on."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "versions": inputs.versions()}


def report(title: str, contenders: Sequence[Contender], out: Path | None, **facts: Any) -> None:
    """Print the table, ours first, and write the numbers."""
    ours = contenders[0]
    table = Table(title=title, title_justify="left")
    for column in ("", "tokens/s", "ours is faster by", "spread"):
        table.add_column(column, justify="left" if not column else "right")
    rows = []
    for one in contenders:
        times = ratios(ours, one)
        row = {"name": one.name, "tokens_per_s": one.rate, "ratio": statistics.median(times), "ratios": times}
        rows.append({**row, "samples": [dict(sample) for sample in one.samples]})
        spread = f"{min(times):.2f}-{max(times):.2f}"
        table.add_row(one.name, f"{one.rate:.0f}", f"{row['ratio']:.2f} x", spread if one is not ours else "")
    Console(width=110).print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        content = {"title": title, "machine": machine(), **facts, "contenders": rows}
        out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class Stopwatch:
    """Seconds of a block, the device's work included."""

    def __enter__(self) -> "Stopwatch":
        self._wait()
        self._begun = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self._begun

    @staticmethod
    def _wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
