"""What the full benchmark costs, and which part of a site is full first at so many stages a day.

    python -m benchmarks.scale --out scale.json [--rate limit.json] [--runs RUNS] [--devices 64] [--stages 100 10000]

Cost: every method of `conf/method` x 3 orders x 3 seeds on all rows of TRACE, 7B and 70B (`scale_cost.py`). Site: the
mean stage of that at 7B, service times measured here (`scale_store.py`), put into a queue (`scale_queue.py`).
`--rate` takes the FLOP/s that `benchmarks.limit` measured; `--runs` how much longer a method's step takes than a plain
one, from `results.json` of finished runs.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import scale_cost, scale_queue
from benchmarks.scale_cost import MODELS, ORDERS, ROWS, SEEDS, Planner, Rates, Work
from benchmarks.scale_queue import DAY_S, Load, Site
from trace_hydra.run import quiet


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and write the numbers."""
    given = _parser().parse_args(arguments)
    rates = Rates.of(json.loads(given.rate.read_text(encoding="utf-8"))) if given.rate else Rates()
    rates = replace(rates, disk_bytes=given.bytes_s)
    ratios = step_ratios(given.runs) if given.runs else {}
    with quiet():
        costs = {model: costs_of(model, given.methods, rates, ratios) for model in given.models}
    for model, found in costs.items():
        _show_cost(model, found, rates)
    service = _measured(given.folder)
    _show_service(service)
    load = load_of(costs[given.models[0]]["all methods"], service)
    site = Site(given.devices, given.bytes_s, given.operation_ms / 1e3, given.capacity_tb * 1e12)
    days = [day_of(load, site, stages, given.days) for stages in given.stages]
    for one in days:
        _show_day(one)
    if given.out:
        from benchmarks.startup import machine

        content = {
            "machine": machine(), "rates": asdict(rates), "ratios": ratios, "costs": costs, "service": service,
            "load": asdict(load), "site": asdict(site), "days": days,
        }  # fmt: skip
        given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def costs_of(
    model: str, methods: Sequence[str], rates: Rates, ratios: Mapping[str, float], rows: Sequence[str] = ROWS
) -> dict[str, dict[str, Any]]:
    """Plan methods x orders x seeds for one of `MODELS`: numbers by method, and of all together."""
    planner, works, found = Planner(rows), list[Work](), dict[str, dict[str, Any]]()
    for method in methods:
        work, facts = scale_cost.cost_of(planner, rates, *MODELS[model], f"method={method}", orders=ORDERS, seeds=SEEDS)
        ratio = ratios.get(method)
        work.beside = sum(work.training.values()) * ((ratio or 1.0) - 1.0)
        works.append(work)
        found[method] = {**work.numbers(), **facts, "step_ratio": ratio}
    found["all methods"] = scale_cost.total(works).numbers()
    return found


def step_ratios(folder: Path) -> dict[str, float]:
    """Read how much longer a step of each method takes than a plain one: the median of the stages of finished runs."""
    found: dict[str, list[float]] = {}
    for path in sorted(folder.rglob("results.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        ratios = [(stage.get("effort") or {}).get("step_ratio") for stage in results["stages"]]
        found.setdefault(results["method"], []).extend(ratio for ratio in ratios if ratio is not None)
    return {method: statistics.median(ratios) for method, ratios in sorted(found.items()) if ratios}


def load_of(numbers: Mapping[str, float], service: Mapping[str, float]) -> Load:
    """Make the mean stage of a benchmark out of what all its runs take, and of measured service times."""
    stages = numbers["distinct_stages"]
    return Load(
        device_s=3600 * (numbers["training_with_steps_h"] + numbers["answering_h"]) / stages,
        moved_bytes=numbers["moved_bytes"] / stages,
        stored_bytes=numbers["stored_bytes"] / stages,
        stored_last_bytes=numbers["stored_last_bytes"] / stages,
        entries=1 + numbers["distinct_cells"] / stages,
        plan_sweep_s=service["plan_sweep_s"],
        plan_run_s=service["plan_job_s"],
        collect_run_s=service["collect_run_s"],
        scan_entry_s=service["ls_entry_s"] + service["gc_entry_s"],
        scan_entry_bytes=service["scan_entry_bytes"],
    )


def day_of(load: Load, site: Site, stages: float, days: float) -> dict[str, Any]:
    """Compute and simulate a rate of stages a day, on the site as it is and with devices enough for it."""
    sites = {"as it is": site, "with devices enough": scale_queue.enough_devices(load, site, stages)}
    found = {}
    for name, one in sites.items():
        breaks = scale_queue.breaks_at(load, one)
        seen = scale_queue.simulate(load, one, stages, days=days)
        resources = {
            resource: {"computed": share, "breaks_at": breaks[resource], **_simulated(seen.get(resource), days)}
            for resource, share in scale_queue.utilisation(load, one, stages).items()
        }
        found[name] = {"devices": one.devices, "resources": resources}
    rooms = {"all": load.stored_bytes, "last": load.stored_last_bytes}
    full = {keep: site.capacity_bytes / (stages * size) for keep, size in rooms.items()}
    return {"stages": stages, "days": days, "full_after_days": full, "sites": found}


def _simulated(seen: scale_queue.Seen | None, days: float) -> dict[str, float]:
    if seen is None:
        return {}
    busy = seen.busy_s / DAY_S / days
    return {"simulated": busy, "mean_wait_s": seen.mean_wait_s, "halfway": seen.halfway, "end": seen.end}


def _measured(folder: Path | None) -> dict[str, float]:
    from benchmarks.scale_store import measure

    with tempfile.TemporaryDirectory(dir=folder) as place:
        return measure(Path(place))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--rate", type=Path, metavar="JSON", help="FLOP/s measured by benchmarks.limit --out")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="finished runs whose step ratios count")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="*", default=scale_cost.method_names(), help="(default: all)")
    parser.add_argument("--stages", nargs="*", type=float, default=[100, 10_000], help="trained a day")
    parser.add_argument("--days", type=float, default=10.0, help="simulated")
    parser.add_argument("--folder", type=Path, help="on the disk that is measured (default: a temporary one)")
    site = Site()
    parser.add_argument("--devices", type=int, default=site.devices)
    parser.add_argument("--bytes-s", type=float, default=site.moved_bytes_s, help="of the file system")
    parser.add_argument("--operation-ms", type=float, default=1e3 * site.operation_s, help="of its metadata")
    parser.add_argument("--capacity-tb", type=float, default=site.capacity_bytes / 1e12)
    return parser


_HOURS = ("training_h", "training_with_steps_h", "answering_h", "answering_at_most_h")


def _show_cost(model: str, found: Mapping[str, Mapping[str, Any]], rates: Rates) -> None:
    table = Table(title=f"{model}, 3 orders x 3 seeds, 8 tasks; {rates.source}", title_justify="left")
    counts = ("method", "tuning", "devices", "stages", "cells", "step")
    for column in (*counts, "train h", "x step", "answer h", "at most", "kept TB", "keep=last", "moved TB", "beside"):
        table.add_column(column, justify="left" if column in ("method", "tuning", "beside") else "right", no_wrap=True)
    for method, one in found.items():
        ratio = f"{one['step_ratio']:.2f}" if one.get("step_ratio") else ""
        numbers = (f"{one[key]:,.0f}" for key in _HOURS)
        sizes = (f"{one[key] / 1e12:.3g}" for key in ("stored_bytes", "stored_last_bytes", "moved_bytes"))
        beside = [*one.get("works_in", ()), *(["answer"] if one.get("answers_itself") else [])]
        counts = (f"{one['distinct_stages']:,}", f"{one['distinct_cells']:,}", ratio)
        devices = str(one.get("devices", "")) + "!" * (not one.get("fits", True))
        table.add_row(method, one.get("tuning", ""), devices, *counts, *numbers, *sizes, ", ".join(beside))
    Console(width=185).print(table)


def _show_service(service: Mapping[str, float]) -> None:
    table = Table(title="measured here", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for name, number in service.items():
        table.add_row(name, f"{number:.3g}")
    Console(width=110).print(table)


def _show_day(day: Mapping[str, Any]) -> None:
    for name, site in day["sites"].items():
        title = f"{day['stages']:,.0f} stages a day, {site['devices']} devices ({name}), {day['days']:g} days simulated"
        table = Table(title=title, title_justify="left")
        for column in ("resource", "computed", "simulated", "mean wait s", "waiting halfway", "at the end", "full at"):
            table.add_column(column, justify="left" if column == "resource" else "right", no_wrap=True)
        for resource, one in site["resources"].items():
            simulated = (
                [f"{one['simulated']:.3f}", f"{one['mean_wait_s']:,.1f}", str(one["halfway"]), str(one["end"])]
                if "simulated" in one
                else [""] * 4
            )
            table.add_row(resource, f"{one['computed']:.3f}", *simulated, f"{one['breaks_at']:,.0f}")
        Console(width=130).print(table)
    after = (f"{days:,.1f} days with store.keep={keep}" for keep, days in day["full_after_days"].items())
    print(f"without gc the disk is full after {', '.join(after)}")


if __name__ == "__main__":
    sys.exit(main())
