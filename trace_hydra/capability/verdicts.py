"""From a judge's replies to outcomes and shares."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from trace_hydra.capability.base import Pair

MERGES = ("strict", "points")
OUTCOMES = ("win", "tie", "lose", "unparsed", "not judged")
DELTAS = {"win": 100.0, "tie": 0.0, "lose": -100.0}
_POINTS = {"after": 1, "tie": 0, "before": -1}
_TOKEN = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_REFUSAL = re.compile(
    r"\b(?:I(?:['’]m| am) (?:sorry|unable|not able)|I (?:cannot|can['’]?t|won['’]t|must decline))", re.I
)


def parse_verdict(text: str) -> str:
    """Read a reply: "A", "B" or "C"; or "none", "contradictory" (several different tokens), "refused" (no token, and
    words of refusal near the start)."""
    tokens = set(_TOKEN.findall(text))
    if len(tokens) == 1:
        return tokens.pop()
    if tokens:
        return "contradictory"
    return "refused" if _REFUSAL.search(text[:200]) else "none"


def merged(verdicts: Sequence[str], merge: str, one_verdict: bool) -> str:
    """Merge the verdicts of both orders to an outcome, from the trained model's side."""
    points = [_POINTS[verdict] for verdict in verdicts if verdict in _POINTS]
    if not points or (len(points) < len(verdicts) and not one_verdict):
        return "unparsed"
    agreed = points[0] if len(set(points)) == 1 else 0
    total = agreed if merge == "strict" else sum(points)
    return "win" if total > 0 else "lose" if total < 0 else "tie"


def judge_summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Sum up judged pairs; shares in percent, None of nothing.

    Returns:
        n pairs; win, tie, lose: of the pairs with an outcome; unparsed: of the pairs judged; same_answer: pairs tied
        without asking; position_bias: pairs where both orders chose the same place (so the verdict turned with the
        order), and inconsistent: pairs where the two orders disagree in any way, both of the pairs with two verdicts;
        chose_a: verdicts for the answer shown first, of those for either (50 without bias); no_verdict: replies
        without a verdict, counted by reason.
    """
    outcomes = Counter(pair["outcome"] for pair in pairs)
    decided = sum(outcomes[name] for name in DELTAS)
    two = [pair["verdicts"] for pair in pairs if pair["verdicts"] and all(one in _POINTS for one in pair["verdicts"])]
    first = [verdict for pair in pairs for verdict in pair["verdicts"][:1]]
    second = [verdict for pair in pairs for verdict in pair["verdicts"][1:]]
    chose_a = first.count("before") + second.count("after")
    chose_b = first.count("after") + second.count("before")
    return {
        "n": len(pairs),
        **{name: _percent(outcomes[name], decided) for name in DELTAS},
        "unparsed": _percent(outcomes["unparsed"], decided + outcomes["unparsed"]),
        "not_judged": outcomes["not judged"],
        "same_answer": sum(pair["outcome"] == "tie" and not pair["verdicts"] for pair in pairs),
        "position_bias": _percent(sum(set(one) == {"before", "after"} for one in two), len(two)),
        "inconsistent": _percent(sum(one[0] != one[1] for one in two), len(two)),
        "chose_a": _percent(chose_a, chose_a + chose_b),
        "no_verdict": dict(Counter(one for one in first + second if one not in _POINTS)),
    }


def _percent(count: int, total: int) -> float | None:
    return 100.0 * count / total if total else None
