"""Text of others (answers of models, rows of files, names) made fit to be shown: what is invisible becomes visible."""

import unicodedata
from dataclasses import dataclass

_LEFT_ALONE = {"\n", "\t", "\u200c", "\u200d", "\u00ad"}  # joiners and soft hyphens belong to ordinary writing


@dataclass(frozen=True)
class Shown:
    """A text as it is shown."""

    text: str
    left_out: int
    """Characters cut away behind it."""


def shown(text: str, most: int) -> Shown:
    """Cut a text, and write controls, reversed writing and halves of characters as ⟦U+202E⟧.

    Args:
        text: May hold anything, unpaired surrogates too. It is not escaped for any format.
        most: Characters that are kept.
    """
    kept = text[:most].replace("\r\n", "\n")
    return Shown("".join(map(_visible, kept)), max(0, len(text) - most))


def plain(text: object, most: int = 200) -> str:
    """Show a name or a value on one line, cut with an ellipsis."""
    found = shown(str(text), most)
    return found.text.replace("\n", "⏎").replace("\t", " ") + ("…" if found.left_out else "")


def _visible(character: str) -> str:
    """Spell out what has no shape of its own: controls, formatting, surrogates, private and odd separators."""
    if character in _LEFT_ALONE or character.isprintable():
        return character
    if unicodedata.category(character) == "Zs":
        return character
    return f"⟦U+{ord(character):04X}⟧"
