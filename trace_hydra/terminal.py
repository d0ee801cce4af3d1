"""What a terminal can show: text without control characters, lines that fit, encodings without Unicode, line or bar.

Nothing here changes global state at import; a command line calls `soften` first.
"""

import codecs
import io
import logging
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

MODES = ("auto", "bar", "lines", "quiet")
"""Values of `progress`."""
SWEEP_LINE = "TRACE_HYDRA_SWEEP_LINE"
"""Environment variable: id of the process whose line on the terminal stands for all jobs of a sweep."""
ERASE = "\r\x1b[2K"
"""Empties the line of a terminal, where a progress line stood."""
_SIMPLER = {
    "·": "-", "…": "...", "±": "+-", "→": "->", "Δ": "delta ", "–": "-", "—": "-", "─": "-", "━": "-", "│": "|",
    "✓": "+", "✗": "x",
}  # fmt: skip
_HANDLER = "trace_hydra.simpler"
MARGIN = 3
"""Columns that a redrawn line leaves free: one as wide as the terminal would wrap, and an ellipsis may take three."""
_NARROWEST = 20
_sweep_note = [""]


def plain(text: object, keep: str = "") -> str:
    r"""Write control characters as escapes (`\x1b`, `\u202e`), so that a terminal cannot be steered by a text.

    Those are Unicode's control, format, surrogate and line separating characters: all that could move the cursor,
    reorder, hide, or break what is shown.

    Args:
        text: Anything from a file, a configuration, a model.
        keep: Characters that stay, such as a line break.
    """
    return "".join(one if one in keep or _harmless(one) else ascii(one)[1:-1] for one in str(text))


def _harmless(character: str) -> bool:
    return (character.isascii() and character.isprintable()) or unicodedata.category(character) not in _STEERING


_STEERING = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def is_live(stream: Any) -> bool:
    """Whether a line on this stream can be redrawn in place: a terminal, and not a dumb one."""
    try:
        return bool(stream.isatty()) and os.environ.get("TERM", "") not in ("dumb", "unknown")
    except (AttributeError, ValueError):  # no stream at all, or closed
        return False


def mode_of(given: str, stream: Any) -> str:
    """Turn `progress` into bar, lines or quiet for a stream.

    auto is a bar on a terminal and lines elsewhere, and quiet where another process draws a line for the whole sweep.
    A bar that cannot be drawn becomes lines.
    """
    if given == "auto" and is_live(stream):
        drawn_by = os.environ.get(SWEEP_LINE)
        return "quiet" if drawn_by and drawn_by != str(os.getpid()) else "bar"
    if given in ("auto", "bar"):
        return "bar" if is_live(stream) else "lines"
    return given


_CODES = {"red": 31, "green": 32, "yellow": 33, "cyan": 36}


def colours(stream: Any) -> bool:
    """Whether to colour: not with NO_COLOR set to anything, always with FORCE_COLOR, else on a terminal that can."""
    if os.environ.get("NO_COLOR"):
        return False
    return os.environ.get("FORCE_COLOR", "0") not in ("", "0") or is_live(stream)


def paint(text: str, colour: str | None, on: bool) -> str:
    """Colour a text if colours are on and one is given."""
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if on and colour else text


def width_of(default: int = 80) -> int:
    """Columns of the terminal (COLUMNS, else stdout's), at least 20."""
    return max(shutil.get_terminal_size(fallback=(default, 24)).columns, _NARROWEST)


def cut(text: str, width: int) -> str:
    """Shorten a text to a width; what is cut off is an ellipsis."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def fitting(parts: Sequence[tuple[int, str]], width: int, gap: str = " · ") -> str:
    """Join the parts that fit, in their order; that of rank 0 is cut rather than left out.

    Args:
        parts: Rank and text each; those of low ranks get room first.
        width: Columns that there are.
        gap: Stands between parts.
    """
    kept: set[int] = set()
    used = -len(gap)
    for place in sorted(range(len(parts)), key=lambda place: parts[place][0]):
        rank, text = parts[place]
        if text and (not rank or used + len(gap) + len(text) <= width):
            kept.add(place)
            used += len(gap) + len(text)
    return cut(gap.join(text for place, (_, text) in enumerate(parts) if place in kept), width)


def clock_time(seconds: float) -> str:
    """Write seconds as m:ss, from an hour on as h:mm:ss, from two days on in days."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Line:
    """One line at the end of a terminal that is redrawn in place, and makes room for what else is written there.

    Args:
        stream: Where to write.
    """

    def __init__(self, stream: Any):
        self._stream, self._shown = stream, False
        self._handlers: list[logging.Handler] = []

    def draw(self, text: str) -> None:
        """Put a text in the line's place; it must fit."""
        self._stream.write(ERASE + text)
        self._stream.flush()
        self._shown = True

    def above(self, text: str) -> None:
        """Write a line that stays."""
        self.erase()
        self._stream.write(text + "\n")
        self._stream.flush()

    def erase(self) -> None:
        """Leave the place free."""
        if self._shown:
            self._shown = False
            self._stream.write(ERASE)
            self._stream.flush()

    def watch_log(self) -> None:
        """Erase the line before each log record that goes to a terminal; the next `draw` brings it back."""
        for handler in logging.getLogger().handlers:
            stream = getattr(handler, "stream", None)
            if isinstance(handler, logging.StreamHandler) and stream is not None and stream.isatty():
                handler.addFilter(self._before_record)
                self._handlers.append(handler)

    def close(self) -> None:
        """Take the line away for good."""
        self.erase()
        for handler in self._handlers:
            handler.removeFilter(self._before_record)
        self._handlers = []

    def _before_record(self, record: logging.LogRecord) -> bool:
        self.erase()
        return True


def sweep_note() -> str:
    """Say how the sweep stands that works in this process, in a few words; "" outside of sweeps."""
    return _sweep_note[0]


def set_sweep_note(text: str) -> None:
    """Set what `sweep_note` gives; "" takes it away."""
    _sweep_note[0] = text


def soften(*streams: Any) -> None:
    """Let streams of any encoding write any text: what they lack is simplified or escaped, never an error.

    Args:
        streams: By default stdout and stderr of this process, for as long as it lives.
    """
    codecs.register_error(_HANDLER, _simplify)
    for stream in streams or (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def _simplify(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(_SIMPLER.get(one, ascii(one)[1:-1]) for one in found), error.end


@contextmanager
def plain_logs(least: int = logging.NOTSET) -> Iterator[None]:
    """Keep control characters out of what is logged, and what weighs less than `least` away from the terminal.

    Args:
        least: A level of `logging`; files get everything.
    """
    handlers = [(handler, _filter(handler, least)) for handler in logging.getLogger().handlers]
    for handler, check in handlers:
        handler.addFilter(check)
    try:
        yield
    finally:
        for handler, check in handlers:
            handler.removeFilter(check)


def _filter(handler: logging.Handler, least: int) -> Callable[[logging.LogRecord], bool]:
    to_file = isinstance(handler, logging.FileHandler)

    def check(record: logging.LogRecord) -> bool:
        if not to_file and record.levelno < least:
            return False
        try:
            text = record.getMessage()
        except (TypeError, ValueError):  # logging says so itself
            return True
        if (shown := plain(text, "\n\t")) != text:
            record.msg, record.args = shown, None
        return True

    return check
