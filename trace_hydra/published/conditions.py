"""What a run of ours was made under, in the words of the published protocols, and where the two differ."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trace_hydra.data.release import RELEASE_ROWS
from trace_hydra.published.records import PARTS, UNKNOWN, Condition

ORDERS = {
    "1": ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"),
    "2": ("NumGLUE-cm", "NumGLUE-ds", "FOMC", "20Minuten", "C-STANCE", "Py150", "MeetingBank", "ScienceQA"),
}
"""The paper's task orders (arXiv:2310.06762, section 4 and appendix .4.7)."""
VARIANTS = {"trace5000": "5000", "trace1000": "1000", "trace500": "500", "trace_reasoning": "Reasoning"}
"""Name of our data option -> variant of the release, as the papers call it."""
ANY = "any"
"""Order of what is trained at once, or not at all."""
_NO_SETTINGS = "the run's configuration (.hydra/config.yaml) is not there"
_TEST = 2  # place of the test rows in RELEASE_ROWS
_DATA_LEAVES = re.compile(r"data\.(limit|max_prompt_chars)\.(train|test)|data\.(dedupe|drop_leaked)")

Status = Literal["same", "differs", "unclear", "unknown"]


@dataclass(frozen=True)
class Own:
    """A part of a run's protocol; `why` says why there is no value."""

    value: str | None
    why: str = ""

    def __str__(self) -> str:
        """Write the value, or why there is none."""
        return f"{UNKNOWN}: {self.why}" if self.value is None else self.value


@dataclass(frozen=True)
class Part:
    """A part of a protocol, ours and theirs."""

    name: str
    """As people call it."""
    ours: str
    theirs: str
    status: Status
    """`unclear`: ours is one of several values that are stated, or one that is only assumed; `unknown`: one is."""

    def __str__(self) -> str:
        """Write theirs / ours."""
        return f"{self.name}: {self.theirs} / ours {self.ours}"


def own_conditions(results: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Own]:
    """Say under which conditions a run was made.

    Args:
        results: Its results.json.
        settings: Leaves of its configuration by key path, as in `collect.Run.settings`; {} where it is lost.

    Returns:
        Own by key of `records.PARTS`; keys that do not concern the run are left out.
    """
    epochs = [stage.get("epochs") for stage in results["stages"]]
    trained = any(stage.get("steps") for stage in results["stages"])
    found = {
        "data": _data(results, settings),
        "order": Own(_order(results["tasks"])),
        "epochs": Own(_epochs_text(epochs) if trained else "none")
        if None not in epochs
        else Own(None, "results.json has no epochs"),
        "learning_rate": _setting(settings, "optim.optimizer.lr") if trained else Own("none"),
        "batch": _setting(settings, "budget.batch_size") if trained else Own("none"),
        "prompt": _setting(settings, "protocol.prompt"),
        "prompt_tokens": _setting(settings, "method.max_prompt_tokens", "protocol.max_prompt_tokens"),
        "decoding": _decoding(settings),
        "scoring": Own(str(results["protocol"]["scoring"]))
        if "scoring" in results["protocol"]
        else Own(None, "results.json has no protocol.scoring"),
    }
    for part, key in (("memory", "method.fraction"), ("variant", "method.variant"), ("splitter", "protocol.splitter")):
        if key in settings:
            found[part] = _setting(settings, key)
    if "method.demonstrations" in settings:
        found["demonstrations"] = Own(f"{settings['method.demonstrations']} from train rows")
    return found


def compare_parts(
    results: Mapping[str, Any], ours: Mapping[str, Own], theirs: Mapping[str, Condition]
) -> tuple[Part, ...]:
    """Hold a run's conditions against a row's, part by part; the BWT formula is no part of it.

    A part that no side has is left out; so are those that a row does not name because they do not concern it.
    """
    found = []
    for key, name in PARTS.items():
        if key == "formula" or (key not in theirs and key in ("splitter", "demonstrations", "variant")):
            continue
        if key not in ours and key not in theirs:
            continue
        own, stated = ours.get(key, Own(None, "not a setting of ours")), theirs.get(key, Condition())
        if key == "epochs":
            equal = [
                _same_epochs(own, value, theirs.get("order", Condition()), results) for _, value in stated.statements
            ]
        else:
            equal = [_same(own, value, key) for _, value in stated.statements]
        found.append(Part(name, str(own), str(stated), _status(own, stated, equal)))
    return tuple(found)


def named(name: str, own: str | None, option: str, stated: Condition) -> Part:
    """Compare names, of a model or a method that is `option` in our configuration."""
    ours = Own(own, f"{option} has no name in published tables")
    equal = [own == value for _, value in stated.statements]
    return Part(name, str(ours), str(stated), _status(ours, stated, equal))


def _status(own: Own, stated: Condition, equal: Sequence[bool]) -> Status:
    if not stated.statements or own.value is None:
        return "unknown"
    if not any(equal):
        return "differs"
    certain = all(equal) and (len(equal) > 1 or stated.statements[0][0] in ("", "paper", "scripts"))
    return "same" if certain else "unclear"


def _same(own: Own, value: str, key: str) -> bool:
    if own.value is None:
        return False
    if key == "order" and value == ANY:
        return set(own.value.split(" > ")) == set(ORDERS["1"]) or own.value in ORDERS
    try:
        return float(own.value) == float(value)
    except ValueError:
        return own.value == value


def _same_epochs(own: Own, value: str, order: Condition, results: Mapping[str, Any]) -> bool:
    """Compare by task where both orders are known, else by position."""
    if own.value is None or "none" in (own.value, value):
        return own.value == value
    tasks = tuple(results["tasks"])
    numbers = [int(part) for part in value.split(",")]
    theirs = dict.fromkeys(tasks, numbers[0])
    if len(numbers) > 1:
        theirs = dict(zip(ORDERS.get(order.value or "", tasks), numbers, strict=False))
    return {stage.get("task"): stage["epochs"] for stage in results["stages"]} == {
        task: theirs.get(task) for task in tasks
    }


def _epochs_text(epochs: Sequence[int]) -> str:
    return f"{epochs[0]} for every task" if len(set(epochs)) == 1 else ",".join(map(str, epochs))


def _order(tasks: Sequence[str]) -> str:
    return next((name for name, order in ORDERS.items() if tuple(tasks) == order), " > ".join(tasks))


def _data(results: Mapping[str, Any], settings: Mapping[str, Any]) -> Own:
    """Name the variant, and in what the rows are others: test rows are counted, train rows follow from settings."""
    option = settings.get("data.variant", results["data"])
    if option not in VARIANTS:
        return Own(str(results["data"]))
    last = {cell["task"]: cell["n"] for cell in results["cells"] if cell["row"] == len(results["tasks"])}
    whole = RELEASE_ROWS[option]
    apart = [
        f"{task} tested on {n} of {whole[task][_TEST]} rows"
        for task, n in last.items()
        if task in whole and n != whole[task][_TEST]
    ]
    apart += [
        f"{key}={settings[key]}"
        for key in settings
        if _DATA_LEAVES.fullmatch(key) and settings[key] not in (None, False)
    ]
    if apart:
        return Own(f"{VARIANTS[option]}, but {', '.join(apart)}")
    return Own(VARIANTS[option]) if settings else Own(None, f"{option}, and {_NO_SETTINGS}")


def _decoding(settings: Mapping[str, Any]) -> Own:
    sampled = _setting(settings, "protocol.decoding.do_sample")
    if sampled.value is None:
        return sampled
    text = "greedy"
    if settings["protocol.decoding.do_sample"]:
        text = f"sampled at T {settings.get('protocol.decoding.temperature')}"
        nucleus = settings.get("protocol.decoding.top_p")
        text += f", top-p {nucleus}" if nucleus not in (None, 1, 1.0) else ""
    closed = settings.get("protocol.closed_answers", "generate")
    return Own(text if closed == "generate" else f"{text}; closed answers by {str(closed).replace('_', '-')}")


def _setting(settings: Mapping[str, Any], *keys: str) -> Own:
    """Look up the first of some leaves that is there, through references like ${budget.lr_full}."""
    for key in keys:
        if key in settings:
            value = settings[key]
            for _ in range(len(settings)):  # a chain of references ends by then, or is a circle
                reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
                if reference is None or reference[1] not in settings:
                    break
                value = settings[reference[1]]
            if isinstance(value, str) and "${" in value:
                return Own(None, f"{key} is {value}")
            return Own(f"{value:g}" if isinstance(value, float) else str(value))
    return Own(None, f"no {keys[-1]} in the run's configuration" if settings else _NO_SETTINGS)
