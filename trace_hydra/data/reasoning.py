"""The final answer in a text that also holds reasoning.

The layouts are those of TRACE's Reasoning variant (arXiv:2310.06762, Table 33): reasoning, a mark, the answer; or the
answer first, then a mark and the reasoning. `final_answer` finds them by their marks, never by a task's name.
"""

import re
from collections.abc import Iterable

ANSWER_FIRST = "\nReasoning:"
"""Stands between an answer that comes first and its reasoning."""
MARKS = ("Answer", "回答", "答案")
"""Start a line, with a narrow or a wide colon behind them, before an answer that comes last."""
SUMMARY_MARK = "Therefore, the summary of the meeting transcripts is:\n"
"""Stands before the answer in MeetingBank's train rows, which have no other mark."""
SPLITTERS = ("ours", "re_eval")


def final_answer(text: str, letters: str = "", splitter: str = "ours") -> str:
    r"""Take the final answer out of a generated or stored text.

    "re_eval" is what re_eval.py:21-39 of jinghan1he/SEEKR does: wide colons become narrow ones everywhere; what stands
    before "\nReasoning:", else between the first and the second "\nAnswer:", else "\n回答:", else "\n答案:", else all;
    stripped; empty becomes one space; tasks with letters as answers keep one character.

    "ours" takes the same parts in the same order, and differs so: colons outside marks stay; MeetingBank's sentence
    is a mark too; a mark may be the text's first line; a "Reasoning:" that repeats the prompt's end is passed over (and
    without an answer behind it there is none); an empty answer stays empty; a letter is the first option that stands
    alone behind a mark, or right at the start of a text without one.

    Args:
        text: Reasoning and answer.
        letters: The options of a task whose answers are single letters, such as "ABC"; empty for other tasks.
        splitter: One of `SPLITTERS`.
    """
    return _as_re_eval(text, letters) if splitter == "re_eval" else _ours(text, letters)


def holds_reasoning(text: str) -> bool:
    """Say whether a text has a mark between reasoning and answer."""
    return ANSWER_FIRST in text or _behind_mark("\n" + text) is not None


def answer_comes_first(text: str) -> bool:
    """Say whether the reasoning stands behind the answer."""
    return ANSWER_FIRST in text


def option_letters(answers: Iterable[str]) -> str:
    """List the letters that answers are made of, in order; empty if one of them is not a single capital letter."""
    found = {answer.strip() for answer in answers}
    return "".join(sorted(found)) if found and all(re.fullmatch("[A-Z]", one) for one in found) else ""


def _ours(text: str, letters: str) -> str:
    text = text.strip()
    echoed = text.startswith(ANSWER_FIRST.strip())
    text = "\n" + text.removeprefix(ANSWER_FIRST.strip()).lstrip()
    behind = None
    if ANSWER_FIRST in text:
        answer = text.split(ANSWER_FIRST)[0]
    else:
        behind = _behind_mark(text)
        answer = behind if behind is not None else "" if echoed else text
    answer = answer.strip()
    if letters:
        find = re.match if behind is None else re.search
        option = find(rf"(?<![A-Za-z])[{letters}](?![A-Za-z])", answer)
        return option.group() if option else answer
    return answer


def _behind_mark(text: str) -> str | None:
    for mark in (*(rf"\n{mark}[:：]" for mark in MARKS), re.escape(SUMMARY_MARK)):
        parts = re.split(mark, text)
        if len(parts) > 1:
            return parts[1]
    return None


def _as_re_eval(text: str, letters: str) -> str:
    text = text.replace("：", ":")
    if ANSWER_FIRST in text:
        answer = text.split(ANSWER_FIRST)[0]
    else:
        answer = next((text.split(f"\n{mark}:")[1] for mark in MARKS if f"\n{mark}:" in text), text)
    answer = answer.strip() or " "
    return answer[0] if letters else answer
