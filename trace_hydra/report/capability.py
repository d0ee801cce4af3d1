"""The capability part of report.md: deltas, their sets in the layout of TRACE's Table 2, published rows beside them."""

from collections.abc import Mapping
from typing import Any

from trace_hydra.published import Ability, abilities, judged
from trace_hydra.published.records import table_name
from trace_hydra.report.parts import interval, number, table, tag

TITLES = {"general": "ΔR^G, general ability", "instruction": "ΔR^I, instruction following", "safety": "ΔR^S, safety"}
COLUMNS = {"mmlu": "MMLU", "gsm8k": "GSM8K", "bbh": "BBH", "tydiqa": "TyDiQA", "boolq": "BoolQ", "piqa": "PIQA"}
"""Sets of the paper's Table 2, in its order."""
_MOST_CATEGORIES = 60
_PROTOCOLS = {
    "general": "arXiv:2310.06762, Table 2: OpenCompass, version and chat template unknown; scores 0-100, MMLU, BBH and "
    "TyDiQA macro averages",
    "judged": "arXiv:2310.06762, GPT-4-0613 against the start model, two orders, merging unknown; percent of prompts",
}


def capability(results: Mapping[str, Any]) -> str:
    """Write the section; nothing if no set was measured."""
    found = results["capability"]
    if not found:
        return ""
    head = f"{tag(results)}, capability [{found['fingerprint']}]"
    parts = [f"## What is left of the start model: {head}"]
    parts += [f"After stage {found['row']}. Intervals: 95 %, paired bootstrap over items."] if found["row"] else []
    if "sets" in found:
        parts += [
            _areas(found),
            _table_2(results),
            _other_sets(found),
            _accuracies(found),
            _judged(results),
            _stages(found),
        ]
    if found["failed"]:
        parts.append("**Failed:**\n\n" + "\n".join(f"- {key}: {why}" for key, why in found["failed"].items()))
    if "sets" in found:
        parts.append(_categories(found))
    return "\n\n".join(part for part in parts if part)


def published(kind: str, model: str | None) -> tuple[Mapping[str, Any], str]:
    """Look up what TRACE printed for a model: method -> numbers, and under which protocol; `kind` general or judged."""
    found: dict[str, Any] = {}
    for one in abilities() if kind == "general" else judged():
        if one.paper != "TRACE" or one.model != model:
            continue
        if isinstance(one, Ability):
            if one.table == "2":
                found[one.method] = {name.lower(): score for name, score in one.scores.items()}
        else:
            shares = {"win": one.win, "tie": one.tie, "lose": one.lose, "where": table_name(one.table)}
            found.setdefault(one.method, {})[one.area] = shares
    return found, _PROTOCOLS[kind]


def _areas(found: Mapping[str, Any]) -> str:
    rows = []
    for area, title in TITLES.items():
        if one := found.get(area):
            verdict = "differs from 0" if one["differs"] else "not told from 0"
            how = "win share - lose share" if one["measure"] == "judge" else "change of score"
            rows.append([title, _signed(one["delta"]), interval(one["interval"]), verdict, how, ", ".join(one["sets"])])
    head = ["", "points", "95 % interval", "", "measure", "mean of"]
    return table(head, rows, texts=("", "measure", "mean of")) if rows else ""


def _table_2(results: Mapping[str, Any]) -> str:
    """Write the six sets as the paper's Table 2 does, with the published rows of the same model."""
    found = results["capability"]
    sets = {name: found["sets"][name] for name in COLUMNS if name in found["sets"]}
    if not sets:
        return ""
    own = f"{tag(results)}, lm-evaluation-harness"
    rows = [
        ["start model", *(number(_of(sets, name, "before")) for name in COLUMNS), "", own],
        [results["method"], *(number(_of(sets, name, "after")) for name in COLUMNS), _delta(found, "general"), own],
        ["change", *(_signed(_of(sets, name, "delta")) for name in COLUMNS), "", own],
    ]
    names = results.get("published") or {}
    printed, protocol = published("general", names.get("model"))
    base = printed.get("base")
    for method in ("base", str(names.get("method"))):
        if base and (scores := printed.get(method)):
            delta = sum(scores.values()) / len(scores) - sum(base.values()) / len(base)
            label = "published start model" if method == "base" else f"published {method}"
            cells = [number(scores.get(name)) for name in COLUMNS]
            rows.append([label, *cells, "" if method == "base" else _signed(delta), protocol])
    return table(["general ability", *COLUMNS.values(), "ΔR^G", "protocol"], rows, texts=("protocol",))


def _other_sets(found: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            one["area"],
            number(one["before"]),
            number(one["after"]),
            _signed(one["delta"]),
            interval(one["interval"]),
            str(one["n"]),
            one["measure"],
        ]
        for name, one in found["sets"].items()
        if one["before"] is not None
    ]
    head = ["set", "area", "before", "after", "change", "95 % interval", "items", "measure"]
    return table(head, rows, texts=("area", "measure")) if rows else ""


def _accuracies(found: Mapping[str, Any]) -> str:
    """Write what a set of instruction checks says beside its score."""
    rows = [
        [f"{name}, {when}", *(number(value) for value in one["accuracies"][when].values())]
        for name, one in found["sets"].items()
        if "accuracies" in one
        for when in ("before", "after")
    ]
    head = ["instruction checks", "prompts, strict", "instructions, strict", "prompts, loose", "instructions, loose"]
    return table(head, rows) if rows else ""


def _judged(results: Mapping[str, Any]) -> str:
    """Write the shares of judged sets, with the published ones of the same model and method."""
    found = results["capability"]
    rows = [
        [
            name,
            one["area"],
            *(number(one.get(share)) for share in ("win", "tie", "lose")),
            str(one["unscored"]),
            number(one.get("position_bias")),
            f"{tag(results)}, {one['measure']}",
        ]
        for name, one in found["sets"].items()
        if one["before"] is None
    ]
    if not rows:
        return ""
    names = results.get("published") or {}
    printed, protocol = published("judged", names.get("model"))
    for area, shares in printed.get(str(names.get("method")), {}).items():
        cells = [number(shares[share]) for share in ("win", "tie", "lose")]
        rows.append([f"published {names['method']}", area, *cells, "–", "–", f"{protocol}, {shares['where']}"])
    head = ["judged set", "area", "win %", "tie %", "lose %", "without verdict", "position bias %", "protocol"]
    return table(head, rows, texts=("area", "protocol"))


def _stages(found: Mapping[str, Any]) -> str:
    if len(found["stages"]) < 2:
        return ""
    rows = [[row, *(_delta(one, area) for area in TITLES)] for row, one in found["stages"].items()]
    return table(["after stage", *TITLES.values()], rows)


def _categories(found: Mapping[str, Any]) -> str:
    """Write the subjects, subtasks and languages of each set that has several."""
    parts = []
    for name, one in found["sets"].items():
        if 1 < len(one["categories"]) <= _MOST_CATEGORIES:
            rows = [
                [category, str(own["n"]), number(own["before"]), number(own["after"]), _signed(own["delta"])]
                for category, own in one["categories"].items()
            ]
            body = table([name, "items", "before", "after", "change"], rows)
            parts.append(f"<details><summary>{name} by category</summary>\n\n{body}\n\n</details>")
    return "\n\n".join(parts)


def _delta(found: Mapping[str, Any], area: str) -> str:
    return f"{_signed(found[area]['delta'])} [{interval(found[area]['interval'])}]" if area in found else "–"


def _of(sets: Mapping[str, Any], name: str, key: str) -> float | None:
    return sets[name][key] if name in sets else None


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"
