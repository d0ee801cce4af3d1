"""The offline default: 160 short items of our own in eight kinds, easy enough for a model of 135M weights.

Six kinds are of the shape of TRACE's six sets of general ability (arXiv:2310.06762, section 4.2), but far easier, and
answers are read so that a small model's knowledge shows: by the likelihood of the answer's words, never of a letter.

Style -> score:  choice    100 if the right ending is the likeliest of all
                 contrast  one question behind two passages, one says yes, one no: 100 if the log-odds of yes over no
                           are larger behind the first; a liking for either word cancels out
                 number    100 if the last number of the answer's first line is right
                 span      token F1 of the answer's first line, as SQuAD and TyDiQA count it
                 checks    see `instruct`;  pairs: see `safety`
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from trace_hydra.capability import checks
from trace_hydra.capability.base import CapabilitySet, Record
from trace_hydra.capability.instruct import answer_checks
from trace_hydra.capability.items import OWN, encode, is_best, likelihoods, limit_problems, read_json, spread, value_of
from trace_hydra.capability.safety import preference_records, read_pairs
from trace_hydra.capability.subject import Subject
from trace_hydra.errors import CapabilityError
from trace_hydra.keys import digest

KINDS = ("knowledge", "math", "reasoning", "reading", "boolean", "physical", "instructions", "safety")
NUM_PAIRS = 20
"""Safety pairs taken evenly from those of `safety`."""
YES_NO = (" Yes,", " No,")
_KEYS = {
    "choice": {"choices", "answer"},
    "contrast": {"yes", "no"},
    "number": {"answer"},
    "span": {"answer"},
    "checks": {"checks"},
    "pairs": {"safe", "unsafe"},
}
_SETTINGS = {
    "choice": {"norm"},
    "contrast": {"head"},
    "number": {"head", "max_new_tokens"},
    "span": {"head", "max_new_tokens"},
    "checks": {"max_new_tokens"},
    "pairs": {"norm"},
}


class Mini(CapabilitySet):
    """The eight kinds, each a set named "mini_<kind>".

    Args:
        kinds: Which of `KINDS`, in order.
        limit: Items of each kind, chosen evenly; null: all.
    """

    def __init__(self, *, kinds: Sequence[str], limit: int | None):
        self.kinds, self.limit = list(kinds), limit

    def problems(self) -> list[str]:
        """List unknown kinds and an impossible limit."""
        found = limit_problems("limit of the mini set", self.limit)
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            found.append(f"kinds={self.kinds} of the mini set must name at least one kind, each once.")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        return [*found, *(f"kinds: {kind!r} is none of {', '.join(KINDS)}." for kind in unknown)]

    def identity(self) -> dict[str, Any]:
        """Say which items and formats these are."""
        items = {
            kind: {**read_kind(kind), "items": spread(read_kind(kind)["items"], self.limit)} for kind in self.kinds
        }
        return {"items": digest(items), "kinds": self.kinds, "checks": checks.VERSION}

    def measure(self, subject: Subject) -> list[Record]:
        """Answer the kinds one after another."""
        records: list[Record] = []
        for kind in self.kinds:
            node = read_kind(kind)
            records += _STYLES[node["style"]](subject, node, spread(node["items"], self.limit))
        return records


@cache
def read_kind(kind: str) -> dict[str, Any]:
    """Read a kind: `set`, `style`, the settings of its style, and `items`.

    Raises:
        CapabilityError: If the file or an item is not as its style needs it; names file and item.
    """
    path = OWN / f"{kind}.json"
    if kind == "safety":
        return {"set": "mini_safety", "style": "pairs", "norm": "mean", "items": spread(read_pairs(), NUM_PAIRS)}
    node = read_json(path)
    style = node.get("style")
    if style not in _KEYS or node.keys() != {"set", "style", "items", *_SETTINGS[style]}:
        raise CapabilityError(f"{path}: style {style!r} or its settings {sorted(node)} are unknown.")
    seen = set()
    for number, item in enumerate(node["items"], 1):
        if problem := _item_problem(item, style):
            raise CapabilityError(f"{path}:{number}: {problem}.")
        if (item["category"], item["id"]) in seen:
            raise CapabilityError(f"{path}:{number}: id {item['id']!r} occurs twice in {item['category']!r}.")
        seen.add((item["category"], item["id"]))
    return node


def _item_problem(item: Any, style: str) -> str | None:
    wanted = {"id", "category", "prompt", *_KEYS[style]}
    if not isinstance(item, Mapping) or item.keys() != wanted:
        return f"an item of style {style!r} has the keys {sorted(wanted)}"
    texts = [value for key, value in item.items() if isinstance(value, str)]
    if not all(texts) or any(text != text.strip() for text in texts):
        return "a text is empty or has blanks around it"
    if style == "choice":
        options = item["choices"]
        if len(set(options)) != len(options) or len(options) < 2 or item["answer"] not in range(len(options)):
            return "'choices' must differ and 'answer' be the place of one of them"
    elif style == "number" and not re.fullmatch(r"\d+", item["answer"]):
        return "'answer' must be a whole number"
    elif style == "checks":
        parts = [(one["name"], {key: value for key, value in one.items() if key != "name"}) for one in item["checks"]]
        return next((problem for part in parts if (problem := checks.problem_of(*part))), None)
    return None


def _record(node: Mapping[str, Any], item: Mapping[str, Any], measure: str, score: float, output: Any) -> Record:
    return {
        "area": "general",
        "set": node["set"],
        "category": item["category"],
        "id": item["id"],
        "measure": measure,
        "score": score,
        "prompt": item["prompt"],
        "output": output,
    }


def _choose(subject: Subject, node: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> list[Record]:
    contexts = [item["prompt"] for item in items for _ in item["choices"]]
    endings = [f" {choice}" for item in items for choice in item["choices"]]
    scored = iter(likelihoods(subject, contexts, endings, "raw"))
    records = []
    for item in items:
        values = [value_of(next(scored), node["norm"]) for _ in item["choices"]]
        right = is_best(values, item["answer"])
        picked = item["choices"][max(range(len(values)), key=values.__getitem__)]
        one = _record(node, item, f"accuracy of {len(values)} choices by log-likelihood", 100.0 * right, picked)
        records.append({**one, "reference": item["choices"][item["answer"]]})
    return records


def _contrast(subject: Subject, node: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> list[Record]:
    passages = [f"{node['head']}{item[kind]} {item['prompt']}" for item in items for kind in ("yes", "no")]
    contexts = [passage for passage in passages for _ in YES_NO]
    scored = likelihoods(subject, contexts, list(YES_NO) * len(passages), "raw")
    odds = [scored[at].total - scored[at + 1].total for at in range(0, len(scored), 2)]  # of yes, one per passage
    measure = "log-odds of yes larger behind the passage that says yes"
    records = []
    for place, item in enumerate(items):
        yes, no = odds[2 * place : 2 * place + 2]
        right = is_best([yes, no], 0)
        one = _record(node, item, measure, 100.0 * right, f"log-odds of yes: {yes:.2f} and {no:.2f} nats")
        finite = [round(odd, 4) if math.isfinite(odd) else None for odd in (yes, no)]
        records.append({**one, "yes": item["yes"], "no": item["no"], "odds": finite})
    return records


def _generate(subject: Subject, node: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> list[Record]:
    prompts = [node["head"] + item["prompt"] for item in items]
    limit = node["max_new_tokens"]
    answers = subject.generate(prompts, limit, ids=encode(subject, prompts, limit, "raw"), stop=("\n",))
    records = []
    for item, answer in zip(items, answers, strict=True):
        line = answer.text.strip().split("\n")[0]
        if node["style"] == "number":
            measure, score = "exact match of the last number", 100.0 * (last_number(line) == item["answer"])
        else:
            measure, score = "token F1", 100.0 * token_f1(line, item["answer"])
        records.append({**_record(node, item, measure, score, line), "reference": item["answer"]})
    return records


def _check(subject: Subject, node: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> list[Record]:
    return answer_checks(subject, items, node["set"], node["max_new_tokens"])


def _prefer(subject: Subject, node: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> list[Record]:
    return preference_records(subject, items, node["set"], node["norm"])


_STYLES: dict[str, Callable[[Subject, Mapping[str, Any], Sequence[Mapping[str, Any]]], list[Record]]] = {
    "choice": _choose,
    "contrast": _contrast,
    "number": _generate,
    "span": _generate,
    "checks": _check,
    "pairs": _prefer,
}


def last_number(text: str) -> str | None:
    """Return the last whole number of a text without leading zeros, None if there is none; "1,200" is 1200."""
    found = re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d{3}\b)", "", text))
    return str(int(found[-1])) if found and len(found[-1]) < 20 else None


def token_f1(prediction: str, answer: str) -> float:
    """Compute the F1 of words in common, 0..1; words are lower-cased, without punctuation and English articles."""
    left, right = (_tokens(text) for text in (prediction, answer))
    common = sum((Counter(left) & Counter(right)).values())
    return 2.0 * common / (len(left) + len(right)) if common else 0.0


def _tokens(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation + "¿¡«»„“”’"))
    return [word for word in bare.split() if word not in ("a", "an", "the")]
