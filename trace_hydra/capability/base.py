"""The interface of a capability set, and the records that all sets speak in."""

from collections.abc import Sequence
from typing import Any

from trace_hydra.capability.subject import Subject

Record = dict[str, Any]
"""One item, a JSON object. Always: `area` (of `AREAS`), `set` (a name such as "mmlu"), `category` (a subject, subtask
or language; the set's name if it has none), `id` (unique within set and category), `measure` (how it is scored, in
words) and `score` (0-100, or None: it is only scored by comparison). The rest (prompt, output, reference, ...) is for
the reader."""

Pair = dict[str, Any]
"""One item before and after training: `area`, `set`, `category`, `id`, `measure`, `before`, `after` (0-100, or None
where a judge compared), `delta` (points; None: no valid verdict). The rest (prompt, both outputs, verdicts) is for the
reader."""

AREAS = ("general", "instruction", "safety")
"""The three deltas of TRACE (arXiv:2310.06762, section 4.2): R^G, R^I, R^S."""


class CapabilitySet:
    """Items that the start model and the trained model answer alike. Building one costs nothing and reads nothing.

    One object may hold several named sets (the six of general ability); records say which one they belong to.
    Constructors take keywords only, from conf/capability.
    """

    version = 1
    """Raised when a change alters prompts, outputs or scores; part of the identity."""
    macro = False
    """Whether a set's score is the mean of its categories' means (MMLU, BBH, TyDiQA in Table 2 of the paper), not of
    its items."""

    def problems(self) -> list[str]:
        """List what is known to be wrong before anything is loaded: files, packages, names, shots, an endpoint."""
        return []

    def warnings(self, model: Any) -> list[str]:
        """List what the user should know before the run; `model` is the model part, with `name` and `identity()`."""
        return []

    def notice(self) -> str:
        """Say in a line what the set will take beyond the model's answers, such as a judge's price; "": nothing."""
        return ""

    def identity(self) -> dict[str, Any]:
        """Say what decides outputs and scores, as JSON values: items (a hash), settings, versions of packages."""
        raise NotImplementedError

    def answers_identity(self) -> dict[str, Any]:
        """Say what decides the records alone, where a comparison has settings of its own (a judge)."""
        return self.identity()

    def measure(self, subject: Subject) -> list[Record]:
        """Let the model answer every item.

        Args:
            subject: In eval mode on its device; training's random state is kept by the caller.

        Returns:
            A record an item, in the set's own order, which is always the same.
        """
        raise NotImplementedError

    def compare(self, before: Sequence[Record], after: Sequence[Record]) -> list[Pair]:
        """Pair the records of the start model with those of the trained one; a judged set asks its judge here.

        Raises:
            CapabilityError: If they do not hold the same items, or a judge could not be asked.
        """
        return paired(before, after)

    def summary(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """Say more about pairs of one named set than before, after and delta: JSON values for results.json."""
        return {}


def paired(before: Sequence[Record], after: Sequence[Record]) -> list[Pair]:
    """Join scored records item by item.

    Raises:
        CapabilityError: If they do not hold the same items.
    """
    from trace_hydra.errors import CapabilityError

    first = {key_of(record): record for record in before}
    second = {key_of(record): record for record in after}
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())
        raise CapabilityError(
            f"capability: the start model and this one answered different items, {len(odd)} of them on one side only, "
            f"such as {odd[0]}. Remove the stored answers of the start model (paths.store/capability) and run again."
        )
    return [
        {
            **{name: record[name] for name in ("area", "set", "category", "id", "measure")},
            "before": record["score"],
            "after": second[key]["score"],
            "delta": None if record["score"] is None else second[key]["score"] - record["score"],
            "prompt": record.get("prompt"),
            "output_before": record.get("output"),
            "output_after": second[key].get("output"),
        }
        for key, record in first.items()
    ]


def key_of(record: Record) -> tuple[str, str, str]:
    """What names an item."""
    return record["set"], record["category"], record["id"]
