"""Rows of JSON-lines files in the shape of the hub's data sets, for the task files in this folder.

lm-evaluation-harness loads this file by its path, from its command line too, so it imports nothing of the package:

    lm_eval run --include_path trace_hydra/capability/tasks --tasks local_mmlu --metadata '{"ability": "<folder>"}' ...

The task files say only where rows come from; prompts, demonstrations, filters and metrics are the harness's own.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FIELDS: dict[str, dict[str, type]] = {
    "mmlu_dev.jsonl": dict.fromkeys(("subject", "question", "A", "B", "C", "D", "answer"), str),
    "mmlu_test.jsonl": dict.fromkeys(("subject", "question", "A", "B", "C", "D", "answer"), str),
    "gsm8k_test.jsonl": {"question": str, "answer": str},
    "bbh.jsonl": {"task": str, "input": str, "target": str},
    "tydiqa_goldp_train.jsonl": {"id": str, "title": str, "context": str, "question": str, "answers": list},
    "tydiqa_goldp_dev.jsonl": {"id": str, "title": str, "context": str, "question": str, "answers": list},
    "boolq.jsonl": {"question": str, "passage": str, "answer": bool},
    "piqa.jsonl": {"goal": str, "sol1": str, "sol2": str, "label": int},
}
"""File -> what each of its rows must hold; other fields are left out."""


def mmlu(ability: str, config_source: str, **_: Any) -> Any:
    """Give one subject, named by the harness's own task file."""
    subject = Path(config_source).stem.removeprefix("mmlu_")

    def split(name: str) -> list[Row]:
        return [
            {
                "question": row["question"],
                "subject": subject,
                "choices": [row[letter] for letter in "ABCD"],
                "answer": "ABCD".index(row["answer"]),
            }
            for row in rows(ability, name)
            if row["subject"] == subject
        ]

    return _splits(dev=split("mmlu_dev.jsonl"), test=split("mmlu_test.jsonl"))


def gsm8k(ability: str, **_: Any) -> Any:
    """Give the problems; the harness brings its own demonstrations."""
    return _splits(test=list(rows(ability, "gsm8k_test.jsonl")))


def bbh(ability: str, config_source: str, **_: Any) -> Any:
    """Give one subtask, named by the harness's own task file, which also holds the demonstrations."""
    subtask = Path(config_source).stem
    chosen = [row for row in rows(ability, "bbh.jsonl") if row["task"] == subtask]
    return _splits(test=[{"input": row["input"], "target": row["target"]} for row in chosen])


def tydiqa(ability: str, **_: Any) -> Any:
    """Give all languages; the harness keeps those whose id begins with the language of the task."""

    def split(name: str) -> list[Row]:
        return [
            {
                **{field: row[field] for field in ("id", "title", "context", "question")},
                "answers": {"text": [answer["text"] for answer in row["answers"]]},
            }
            for row in rows(ability, name)
        ]

    return _splits(train=split("tydiqa_goldp_train.jsonl"), validation=split("tydiqa_goldp_dev.jsonl"))


def boolq(ability: str, **_: Any) -> Any:
    """Give questions with passages; there are no rows for demonstrations."""
    made = [
        {"question": row["question"], "passage": row["passage"], "idx": index, "label": int(row["answer"])}
        for index, row in enumerate(rows(ability, "boolq.jsonl"))
    ]
    return _splits(validation=made, train=[])


def piqa(ability: str, **_: Any) -> Any:
    """Give goals with two solutions; there are no rows for demonstrations."""
    return _splits(validation=list(rows(ability, "piqa.jsonl")), train=[])


def rows(folder: str, name: str) -> tuple[Row, ...]:
    """Read a file of the folder.

    Raises:
        ValueError: If a row is not what `FIELDS` says; names file and row.
    """
    path = Path(folder).expanduser() / name
    return _rows(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _rows(path: Path, _changed: int) -> tuple[Row, ...]:
    """Parse once, not once a subject."""
    lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a text may hold other line separators
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    return tuple(_row(line, f"{path.name} row {number}", path.name) for number, line in numbered)


def _row(line: str, place: str, name: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} is not a JSON object")
    for field, kind in FIELDS[name].items():
        if type(row.get(field)) is not kind:
            raise ValueError(f"{place}: '{field}' is {row.get(field)!r}, not of type {kind.__name__}")
    if name.startswith("mmlu") and row["answer"] not in ("A", "B", "C", "D"):
        raise ValueError(f"{place}: 'answer' is {row['answer']!r}, not one of A, B, C, D")
    if name.startswith("piqa") and row["label"] not in (0, 1):
        raise ValueError(f"{place}: 'label' is {row['label']!r}, neither 0 nor 1")
    texts = [one.get("text") if isinstance(one, dict) else None for one in row.get("answers", ())]
    if name.startswith("tydiqa") and not (texts and all(isinstance(text, str) for text in texts)):
        raise ValueError(f"{place}: 'answers' must be a list of objects with a string 'text', at least one")
    return {field: row[field] for field in FIELDS[name]}


def _splits(**splits: list[Row]) -> Any:
    """Build a data set in memory; an empty split has the columns of the other one."""
    from datasets import Dataset, DatasetDict

    full = next((Dataset.from_list(found) for found in splits.values() if found), Dataset.from_list([]))
    made = {name: Dataset.from_list(found) if found else full.select([]) for name, found in splits.items()}
    return DatasetDict(**made)
