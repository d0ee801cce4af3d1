"""Asking a teacher about the rows of a task until each has a good rationale or no attempt left, and what came of it."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trace_hydra.capability.replies import Conversation, Estimate, Reply, usd_of
from trace_hydra.capability.teacher import Recipe, conversation, judged
from trace_hydra.data.task import Example
from trace_hydra.files import write_json
from trace_hydra.keys import digest

Prices = tuple[float | None, float | None]


class Chat(Protocol):
    """What `ChatClient` and `LocalChat` have in common."""

    max_tokens: int

    def problems(self) -> list[str]:
        """List what is wrong with settings or endpoint."""
        ...

    def identity(self) -> dict[str, Any]:
        """Say what decides a reply."""
        ...

    def estimate(self, conversations: Sequence[Conversation], *, variant: int = 0) -> Estimate:
        """Say what `ask` would take."""
        ...

    def ask(self, conversations: Sequence[Conversation], *, variant: int = 0) -> list[Reply]:
        """Get replies, in order."""
        ...


@dataclass(frozen=True)
class Lesson:
    """A task as the teacher sees it."""

    recipe: Recipe
    """From `teacher.ready`."""
    rows: tuple[Example, ...]
    """Train rows to write rationales for; their ids are unique."""
    sha256: str
    """Of the file they come from."""

    def gold(self, row: Example) -> str:
        """The answer alone."""
        return self.recipe.gold(row.answer)

    def conversation(self, row: Example, attempt: int) -> Conversation:
        """What is asked about a row at an attempt, counted from 0."""
        return conversation(self.recipe, self.recipe.convert(row.prompt), self.gold(row), attempt)

    def stored(self, row: Example, rationale: str) -> dict[str, str]:
        """A row of the Reasoning layout."""
        return {
            "prompt": self.recipe.convert(row.prompt),
            "answer": self.recipe.joined(rationale, self.gold(row)),
        }


class Progress:
    """What became of each row: why its attempts were rejected, or its rationale; a file, written whole or not at all.

    Progress made with another teacher, recipe or file of rows counts as none. More attempts go on where fewer ended.

    Args:
        file: Read if it is there and fits.
        key: Hash of what decides rationales.
    """

    def __init__(self, file: Path, key: str):
        self.file = file
        self.key = key
        self.rows: dict[str, dict[str, Any]] = {}
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["key"] == key and all(map(_is_record, content["rows"].values())):
                self.rows = content["rows"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # not there, or damaged: the replies are in the cache

    @classmethod
    def of(cls, lesson: Lesson, chat: Chat, folder: Path) -> "Progress":
        """Open the progress of a lesson with a teacher."""
        parts = {"recipe": lesson.recipe.identity(), "teacher": chat.identity(), "rows": lesson.sha256}
        return cls(folder / f"{lesson.recipe.task}.json", digest(parts, 32))

    def reasons(self, row: Example) -> list[str]:
        """Why attempts were rejected, in order; the one that was accepted is not among them."""
        return self.rows.get(row.id, {}).get("reasons", [])

    def rationale(self, row: Example) -> str | None:
        """The accepted rationale."""
        return self.rows.get(row.id, {}).get("rationale")

    def open_rows(self, rows: Sequence[Example], attempts: int) -> list[Example]:
        """Rows without a rationale that have attempts left."""
        return [row for row in rows if self.rationale(row) is None and len(self.reasons(row)) < attempts]

    def note(self, row: Example, reply: Reply, rationale: str, reason: str) -> None:
        """Note an attempt; `reason` is empty if it was accepted."""
        record = self.rows.setdefault(
            row.id, {"reasons": [], "rationale": None, "lost": None, "input_tokens": 0, "output_tokens": 0}
        )
        record["lost"] = reply.error if reply.text is None else None
        record["input_tokens"] += reply.input_tokens
        record["output_tokens"] += reply.output_tokens
        if reply.text is None:
            return
        if reason:
            record["reasons"].append(reason)
        else:
            record["rationale"] = rationale

    def lost(self, row: Example) -> str | None:
        """Why the last attempt brought no reply at all; such an attempt does not count."""
        return self.rows.get(row.id, {}).get("lost")

    def save(self) -> None:
        """Write the file.

        Raises:
            StoreError: If it cannot be written.
        """
        write_json({"key": self.key, "rows": self.rows}, self.file)


def teach(lesson: Lesson, chat: Chat, progress: Progress, *, attempts: int, say: Callable[[str], None]) -> None:
    """Ask until each row has a rationale or `attempts` rejections; a reply that is lost is asked for again once.

    Raises:
        CapabilityError: If the teacher can no longer be asked; its replies so far are in its cache.
    """
    losses: Counter[str] = Counter()
    for attempt in range(attempts):
        while True:
            asked = [
                row
                for row in progress.open_rows(lesson.rows, attempts)
                if len(progress.reasons(row)) == attempt and losses[row.id] < 2
            ]
            if not asked:
                break
            replies = chat.ask([lesson.conversation(row, attempt) for row in asked], variant=attempt)
            for row, reply in zip(asked, replies, strict=True):
                if reply.text is None:
                    losses[row.id] += 1
                verdict = ("", "") if reply.text is None else _judged(lesson, row, reply, chat.max_tokens)
                progress.note(row, reply, *verdict)
            progress.save()
            accepted = sum(progress.rationale(row) is not None for row in asked)
            say(f"{lesson.recipe.task}: attempt {attempt + 1} on {len(asked)} rows, {accepted} accepted.")


def estimate(lesson: Lesson, chat: Chat, progress: Progress, *, attempts: int, prices: Prices) -> dict[str, Any]:
    """Say what `teach` would take, as JSON; asks nothing.

    `usd` is for the next attempt alone, `usd_at_most` if each of the rows needs all that it has left.
    """
    rows = progress.open_rows(lesson.rows, attempts)
    next_usd, most_usd = 0.0, 0.0
    total: Counter[str] = Counter(requests=0, cached=0, input_tokens=0, output_tokens_at_most=0)
    for attempt in range(attempts):
        group = [row for row in rows if len(progress.reasons(row)) == attempt]
        if not group:
            continue
        one = chat.estimate([lesson.conversation(row, attempt) for row in group], variant=attempt)
        for key in total:
            total[key] += getattr(one, key)
        next_usd += one.usd or 0.0
        most_usd += (one.usd or 0.0) * (attempts - attempt)
    known = None not in prices
    return {
        "rows": len(lesson.rows),
        "open": len(rows),
        **total,
        "usd": round(next_usd, 4) if known else None,
        "usd_at_most": round(most_usd, 4) if known else None,
    }


def outcome(lesson: Lesson, progress: Progress, prices: Prices) -> dict[str, Any]:
    """Describe what came of a lesson, as JSON; each reply counts once, in whichever run it was paid."""
    rows = lesson.rows
    records = [progress.rows.get(row.id, {}) for row in rows]
    accepted = [row for row in rows if progress.rationale(row) is not None]
    left_out = [
        {"id": row.id, "reasons": progress.reasons(row), **({"lost": lost} if (lost := progress.lost(row)) else {})}
        for row in rows
        if progress.rationale(row) is None
    ]
    num_in = sum(record.get("input_tokens", 0) for record in records)
    num_out = sum(record.get("output_tokens", 0) for record in records)
    usd = usd_of(num_in, num_out, prices)
    return {
        "rule": lesson.recipe.check,
        "rows": len(rows),
        "accepted": len(accepted),
        "rejected": sum("lost" not in entry for entry in left_out),
        "lost": sum("lost" in entry for entry in left_out),
        "acceptance_rate": _share(len(accepted), len(rows)),
        "accepted_at_once": _share(sum(not progress.reasons(row) for row in accepted), len(rows)),
        "rejections": dict(Counter(reason for row in rows for reason in progress.reasons(row)).most_common()),
        "replies": len(accepted) + sum(len(progress.reasons(row)) for row in rows),
        "input_tokens": num_in,
        "output_tokens": num_out,
        "usd": None if usd is None else round(usd, 4),
        "left_out": left_out,
    }


def totals(tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add outcomes up."""
    counts = {
        key: sum(task[key] for task in tasks)
        for key in ("rows", "accepted", "rejected", "lost", "replies", "input_tokens", "output_tokens")
    }
    reasons: Counter[str] = Counter()
    for task in tasks:
        reasons.update(task["rejections"])
    usd = [task["usd"] for task in tasks]
    return {
        **counts,
        "acceptance_rate": _share(counts["accepted"], counts["rows"]),
        "rejections": dict(reasons.most_common()),
        "usd": None if None in usd else round(sum(usd), 4),
    }


def _judged(lesson: Lesson, row: Example, reply: Reply, max_tokens: int) -> tuple[str, str]:
    return judged(lesson.recipe, str(reply.text), lesson.gold(row), cut_off=reply.output_tokens >= max_tokens)


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _is_record(record: Any) -> bool:
    return (
        isinstance(record["reasons"], list)
        and (record["rationale"] is None or isinstance(record["rationale"], str))
        and {"lost", "input_tokens", "output_tokens"} <= record.keys()
    )
