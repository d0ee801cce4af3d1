"""report.md: a run on one page, every table headed by the protocol its numbers were made under."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_hydra.callbacks.table import row_label
from trace_hydra.report.capability import capability
from trace_hydra.report.parts import interval, number, table, tag
from trace_hydra.report.text_answers import again, forgotten, warnings

FORMULAS = {
    "op": ("OP", "mean score after the last stage"),
    "bwt": ("BWT", "mean change of the earlier tasks since their own stage; negative is forgetting"),
    "bwt_over_t": ("BWT over T", "the same sum divided by all T tasks"),
    "bwt_clipped": ("BWT clipped", "over T, gains counted as 0"),
    "fwt": ("FWT", "mean gain on a task before its own stage, over the untouched model"),
    "forgetting": ("forgetting", "mean loss against the best score of an earlier row"),
}


def render(results: Mapping[str, Any], directory: Path) -> str:
    """Write the report of a results.json as Markdown; `directory` is where the run lies, for the commands."""
    parts = [
        _head(results),
        _summary(results),
        _matrix(results),
        _last_row(results),
        forgotten(results, directory),
        capability(results),
        _effort(results),
        warnings(results, directory),
        _disclosures(results),
        again(directory),
        _rescore(directory),
        _versions(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _engine(protocol: Mapping[str, Any]) -> str:
    """Name the engine and what decides its answers; nothing where it is not known."""
    engine = protocol.get("engine")
    others = {key: value for key, value in (engine or {}).items() if key != "name" and value is not None}
    said = ", ".join(f"{key} {value}" for key, value in others.items())
    return f", answers by engine {engine['name']}{f' ({said})' if said else ''}" if engine else ""


def _head(results: Mapping[str, Any]) -> str:
    seeds = ", ".join(f"{key} {value}" for key, value in (results["seed"] or {}).items())
    lines = [
        f"# {results['name']}",
        "",
        f"- model {results['model']}, method {results['method']}, tuning {results['tuning']}",
        f"- data {results['data']}, task order {results['task_order']}: {' → '.join(results['tasks'])}",
        f"- seeds: {seeds}",
        f"- protocol {tag(results)}, scoring {results['protocol']['scoring']}{_engine(results['protocol'])}",
    ]
    if chosen := results["disclosures"].get("closed_answers"):
        lines.append(f"- answers: {chosen}; those of other tasks are generated")
    if not results["complete"]:
        lines.append("- **incomplete**: not every planned cell of the matrix was scored")
    if results["non_finite"]:
        lines.append(f"- **not finite**, and left empty: {', '.join(results['non_finite'])}")
    return "\n".join(lines)


def _summary(results: Mapping[str, Any]) -> str:
    rows = []
    for key, (name, meaning) in FORMULAS.items():
        ends = interval((results["confidence"] or {}).get(key))
        rows.append([name, number(results[key]), ends, tag(results), _meaning(results, key, meaning)])
    head = ["", "0-100", "95 % interval", "protocol", "meaning"]
    return f"## Summary: {tag(results)}\n\n" + table(head, rows, texts=("protocol", "meaning"))


def _meaning(results: Mapping[str, Any], key: str, meaning: str) -> str:
    if results[key] is not None:
        return meaning
    return f"not known: {', '.join(results['missing'].get(key, ['a cell is missing']))}"


def _matrix(results: Mapping[str, Any]) -> str:
    tasks = results["tasks"]
    rows = []
    for index, row in enumerate(results["matrix"]):
        cells = [number(cell) for cell in row]
        if index:
            cells[index - 1] = f"**{cells[index - 1]}**"
        rows.append([row_label(tasks, index), *cells])
    body = table(["after", *tasks], rows)
    note = "Bold: the task's own stage. –: not scored."
    if results["carried"]:
        note += f" {len(results['carried'])} cells repeat an earlier row's answers (`carried` in results.json)."
    return f"## Scores: {tag(results)}\n\n{body}\n\n{note}\n\n![heat map of the scores](matrix.png)"


def _last_row(results: Mapping[str, Any]) -> str:
    last = len(results["tasks"])
    by_task = (results["confidence"] or {}).get("tasks") or {}
    rows = []
    for cell in results["cells"]:
        if cell["row"] == last:
            others = ", ".join(f"{name} {number(value)}" for name, value in cell["metrics"].items())
            ends = interval((by_task.get(cell["task"]) or {}).get("score"))
            rows.append([cell["task"], number(cell["score"]), ends, cell["metric"], str(cell["n"]), others])
    if not rows:
        return ""
    head = ["task", "score", "95 % interval", "metric", "answers", "all metrics"]
    return f"## After the last stage: {tag(results)}\n\n{table(head, rows, texts=('metric', 'all metrics'))}"


def _effort(results: Mapping[str, Any]) -> str:
    tokens, truncated = results["tokens"], results["truncated"]
    rows = []
    for index in range(len(results["tasks"]) + 1):
        stage = results["stages"][index - 1] if 0 < index <= len(results["stages"]) else None
        cut = truncated.get(stage["task"], {}) if stage else {}
        rows.append(
            [
                row_label(results["tasks"], index),
                f"{stage['rows']:,}" if stage else "–",
                str(stage["epochs"]) if stage else "–",
                _count(tokens["train"], index - 1),
                _count(tokens["evaluate"], index),
                number((stage or {}).get("effort", {}).get("step_ratio")),
                str(cut.get("train", "–")),
                str(cut.get("test", "–")),
            ]
        )
    counts = ["stage", "rows", "epochs", "trained tokens", "scoring tokens"]
    head = [*counts, "step / plain step", "train rows cut", "test rows cut"]
    notes = (
        f"Wall clock: {results['wall_clock_s']:,.1f} s. Step / plain step: seconds of a step with all that a method "
        "does while it trains, over those of a plain step's passes. Rows cut: longer than the protocol's limits, see "
        "audit.json."
    )
    return f"## Effort\n\n{table(head, rows)}\n\n{notes}{_exceptions(results['stages'])}"


def _exceptions(stages: Sequence[Mapping[str, Any]]) -> str:
    """Say where training was not as the configuration has it: smaller micro-batches, steps left out."""
    sizes = {stage["task"]: stage.get("micro_batch_size") for stage in stages}
    skipped = {stage["task"]: stage.get("effort", {}).get("skipped") for stage in stages}
    notes = ""
    if len(set(sizes.values())) > 1:
        notes += f"\n\nRows of a micro-batch: {_listed(sizes)}."
    if any(skipped.values()):
        notes += f"\n\nSteps not taken for a value that was not finite: {_listed(skipped)}."
    return notes


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{task} {value}" for task, value in values.items() if value)


def _disclosures(results: Mapping[str, Any]) -> str:
    told = {key: value for key, value in results["disclosures"].items() if key != "closed_answers"}  # in the head
    if not told:
        return ""
    lines = [f"- {key}: {_yes_no(value)}" for key, value in told.items()]
    return "## What the method uses\n\n" + "\n".join(lines)


def _rescore(directory: Path) -> str:
    command = f"python -m trace_hydra.score {shlex.quote(str(directory))} protocol=official"
    return f"## Score the same answers again\n\n```\n{command}\n```"


def _versions(results: Mapping[str, Any]) -> str:
    return "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in results["versions"].items())


def _count(counts: Sequence[int], index: int) -> str:
    return f"{counts[index]:,}" if 0 <= index < len(counts) else "–"


def _yes_no(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
