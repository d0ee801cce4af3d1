"""Parts of report.md that rest on the files of a run: forgotten answers, warnings about the data, its command line."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_hydra.report.cells import figure
from trace_hydra.report.examples import Answer, Forgotten, most_forgotten
from trace_hydra.report.facts import data_warnings, read_settings
from trace_hydra.report.hostile import Shown
from trace_hydra.report.tables import markdown_text


def forgotten(results: Mapping[str, Any], directory: Path) -> str:
    """Write the tasks that lost most since their own stage, with the answers that lost most."""
    found, note = most_forgotten(results, directory)
    parts = ["## What was forgotten most", *map(_task, found), *([markdown_text(note, 1000)] if note else [])]
    return "\n\n".join(parts)


def warnings(results: Mapping[str, Any], directory: Path) -> str:
    """Write what of the data a reader of the scores should know; nothing where there is nothing."""
    found = data_warnings(results, directory)
    return (
        "## Warnings about the data\n\n" + "\n".join(f"- {markdown_text(one, 500)}" for one in found) if found else ""
    )


def again(directory: Path) -> str:
    """Write the command line that makes the run again, and where it differs from its protocol's file."""
    settings = read_settings(directory)
    command = _fenced(settings.command) if settings.command else f"Not known: {markdown_text(settings.note, 500)}"
    differs = [
        f"- {markdown_text(one.path)}: {markdown_text(one.value)}, in the protocol's file {markdown_text(one.default)}"
        for one in settings.changed
    ]
    return "\n\n".join(["## Make it again", command, *(["\n".join(differs)] if differs else [])])


def _task(one: Forgotten) -> str:
    name = markdown_text(one.task)
    change = figure(one.change, sign=True)
    parts = [
        f"### {name}: {figure(one.before)} after its own stage {one.stage}, {figure(one.after)} at the end ({change})"
    ]
    if one.rows:
        parts.append(f"{one.fell} of {one.rows} answers score less than right after stage {one.stage}.")
    parts += [_answer(answer, one.stage) for answer in one.answers]
    return "\n\n".join([*parts, *([markdown_text(one.note, 500)] if one.note else [])])


def _answer(one: Answer, stage: int) -> str:
    parts = [f"**Row {markdown_text(one.id)}: {figure(one.score_before)} → {figure(one.score_after)}**"]
    prompt = "Prompt, its end" if one.prompt and one.prompt.left_out else "Prompt"
    parts += _quoted(prompt, one.prompt) if one.prompt else ["The prompt is not in test\\_rows."]
    parts += _quoted("Expected", one.reference)
    parts += _quoted(f"After stage {stage}", one.before)
    parts += _quoted("At the end", one.after)
    return "\n\n".join(parts)


def _quoted(label: str, text: Shown) -> list[str]:
    cut = [f"{text.left_out:,} more characters are not shown."] if text.left_out else []
    return [f"{label}:", _fenced(text.text) if text.text else "(empty)", *cut]


def _fenced(text: str) -> str:
    """Put text between fences that it cannot close."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
