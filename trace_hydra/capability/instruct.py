"""Verifiable instructions: prompts whose instructions `checks` can verify; no judge needed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_hydra.capability import checks
from trace_hydra.capability.base import CapabilitySet, Pair, Record, key_of, paired
from trace_hydra.capability.items import OWN, encode, limit_problems, prompt_mode, read_json, spread
from trace_hydra.capability.subject import Subject
from trace_hydra.errors import CapabilityError
from trace_hydra.keys import digest

OWN_FILE = OWN / "checks.json"


class InstructionChecks(CapabilitySet):
    """Answers to prompts with verifiable instructions, scored in the manner of IFEval (see `checks`).

    Args:
        file: JSON list of {"prompt", "checks": [{"name", parameters...}]}, `id` and `category` optional; null: ours.
        limit: Prompts, chosen evenly; null: all.
        max_new_tokens: Limit of an answer.
    """

    def __init__(self, *, file: str | None, limit: int | None, max_new_tokens: int):
        self.file = Path(file).expanduser() if file else OWN_FILE
        self.limit, self.max_new_tokens = limit, max_new_tokens

    def problems(self) -> list[str]:
        """List a file that is missing or wrong, and impossible limits."""
        found = limit_problems("limit of the instruction checks", self.limit)
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            found.append(f"max_new_tokens={self.max_new_tokens!r} of the instruction checks must be at least 1.")
        try:
            read_prompts(self.file)
        except CapabilityError as error:
            found.append(str(error))
        return found

    def identity(self) -> dict[str, Any]:
        """Say which prompts and checks these are."""
        items = spread(read_prompts(self.file), self.limit)
        return {"items": digest(items), "checks": checks.VERSION, "max_new_tokens": self.max_new_tokens}

    def measure(self, subject: Subject) -> list[Record]:
        """Answer every prompt, in the chat template where there is one."""
        return answer_checks(subject, spread(read_prompts(self.file), self.limit), "checks", self.max_new_tokens)

    def compare(self, before: Sequence[Record], after: Sequence[Record]) -> list[Pair]:
        """Pair the records, with what became of each check."""
        checked = [{key_of(record): record["checks"] for record in side} for side in (before, after)]
        return [
            {**pair, "checks_before": checked[0][key_of(pair)], "checks_after": checked[1][key_of(pair)]}
            for pair in paired(before, after)
        ]

    def summary(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """Give IFEval's four accuracies, before and after."""
        return {
            "accuracies": {
                when: four_accuracies([{"checks": pair[f"checks_{when}"]} for pair in pairs])
                for when in ("before", "after")
            }
        }


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Read and check prompts; each gets an `id` (its row) and a `category` (family of its first check) if it has none.

    Raises:
        CapabilityError: With all problems of the file, each as file:row.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise CapabilityError(f"{path} must hold a JSON list of prompts with checks, at least one.")
    problems = [f"{path}:{number}: {text}." for number, row in enumerate(rows, 1) if (text := _row_problem(row))]
    if problems:
        raise CapabilityError(
            "\n".join([*problems[:10], *([f"... and {len(problems) - 10} more"] * (len(problems) > 10))])
        )
    named = [
        {"category": checks.CHECKS[row["checks"][0]["name"]].family, "id": f"{number:03d}", **row}
        for number, row in enumerate(rows, 1)
    ]
    seen: set[tuple[str, str]] = set()
    for number, row in enumerate(named, 1):
        key = (row["category"], row["id"])
        if key in seen:
            raise CapabilityError(f"{path}:{number}: id {key[1]!r} occurs twice in category {key[0]!r}.")
        seen.add(key)
    return named


def answer_checks(subject: Subject, items: Sequence[Mapping[str, Any]], name: str, max_new_tokens: int) -> list[Record]:
    """Let the model answer and verify each answer; `score` is 100 if every instruction is followed to the letter."""
    prompts = [item["prompt"] for item in items]
    ids = encode(subject, prompts, max_new_tokens, prompt_mode(subject))
    answers = subject.generate(prompts, max_new_tokens, ids=ids)
    return [check_record(item, answer.text, name) for item, answer in zip(items, answers, strict=True)]


def check_record(item: Mapping[str, Any], answer: str, name: str) -> Record:
    """Verify one answer.

    Returns:
        A record; besides the score: `loose` (0 or 100) and `checks`, each with `name`, `strict` and `loose`.
    """
    verdicts = []
    for one in item["checks"]:
        params = {key: value for key, value in one.items() if key != "name"}
        given = (answer, one["name"], params, item["prompt"])
        verdicts.append(
            {"name": one["name"], "strict": checks.follows(*given), "loose": checks.follows_loosely(*given)}
        )
    return {
        "area": "instruction",
        "set": name,
        "category": item["category"],
        "id": item["id"],
        "measure": "prompt-level strict accuracy",
        "score": 100.0 * all(one["strict"] for one in verdicts),
        "loose": 100.0 * all(one["loose"] for one in verdicts),
        "prompt": item["prompt"],
        "output": answer,
        "reference": item["checks"],
        "checks": verdicts,
    }


def four_accuracies(records: Sequence[Record]) -> dict[str, float]:
    """Compute IFEval's four accuracies of records with `checks`, in percent."""
    found = {}
    for kind in ("strict", "loose"):
        prompt, instruction = checks.accuracies([[one[kind] for one in record["checks"]] for record in records])
        found |= {f"prompt_{kind}": prompt, f"instruction_{kind}": instruction}
    return found


def _row_problem(row: Any) -> str | None:
    if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        return "a row must be an object with a 'prompt' that is not empty"
    if not isinstance(row.get("checks"), list) or not row["checks"]:
        return "'checks' must be a list with at least one check"
    if extra := row.keys() - {"prompt", "checks", "id", "category"}:
        return f"unknown keys {sorted(extra)}; a row has prompt, checks and, if wanted, id and category"
    for key in ("id", "category"):
        if key in row and not (isinstance(row[key], str) and row[key].strip()):
            return f"'{key}' must be a text that is not empty"
    for one in row["checks"]:
        if not isinstance(one, Mapping):
            return f"check {one!r} must be an object with a 'name'"
        params = {key: value for key, value in one.items() if key != "name"}
        if problem := checks.problem_of(one.get("name"), params):
            return problem
        phrase = params.get("phrase", "") if one["name"] == "repeats_prompt" else ""
        if phrase and " ".join(phrase.split()).lower() not in " ".join(row["prompt"].split()).lower():
            return f"check 'repeats_prompt': its phrase {phrase!r} does not stand in the prompt"
    return None
