"""Names that become parts of paths: of tasks, runs and capability sets."""

import os
import re
import unicodedata
from pathlib import Path

from trace_hydra.errors import ConfigError, StoreError

LONGEST_NAME = 100
LONGEST_PART = 255
"""Bytes of a file's or folder's name, on every file system in use."""
NAME = re.compile(rf"(?!.*\.\.)(?=.{{1,{LONGEST_NAME}}}\Z)[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9_-])?", re.ASCII)
"""What a safe name is, for `fullmatch`."""


def safe_name(text: str, what: str) -> str:
    """Return a name that can be part of a path, as it is.

    Args:
        text: The name.
        what: The key it stands at, for the message.

    Raises:
        ConfigError: If it is anything but letters, digits, `_`, `.`, `-` of ASCII, begins with another character than
            a letter or digit, ends with a dot, holds two dots in a row, or is longer than 100 characters.
    """
    if NAME.fullmatch(text):
        return text
    raise ConfigError(f"{what}={text[:LONGEST_NAME]!a} is no safe name: {name_fault(text)}.")


def name_fault(text: str) -> str:
    """Say why a name is not safe, and what is."""
    if not text:
        fault = "it is empty"
    elif len(text) > LONGEST_NAME:
        fault = f"it has {len(text)} characters"
    elif foreign := next((one for one in text if not one.isascii()), None):
        fault = f"it holds {unicodedata.name(foreign, f'U+{ord(foreign):04X}')}"  # look-alikes cannot be told by eye
    elif ".." in text or text.endswith("."):
        fault = "it has two dots in a row, or a dot at its end"
    else:
        fault = "a path could lead elsewhere by it"
    return f"{fault}; use at most {LONGEST_NAME} letters, digits, '_', '.', '-', a letter or digit first"


def inside(root: Path, *parts: str) -> Path:
    """Join parts below a folder; the root itself may be a link, nothing below it may lead out of it.

    Args:
        root: A folder; need not exist.
        parts: One folder or file name each.

    Raises:
        StoreError: If a part is no plain name or longer than 255 bytes, or a link on the way leaves `root`.
    """
    for part in parts:
        if part in ("", ".", "..") or any(one in part for one in "/\\\0") or _num_bytes(part) > LONGEST_PART:
            raise StoreError(f"{part[:LONGEST_NAME]!a} cannot be the name of a file in {root}.")
    path = root.joinpath(*parts)
    try:
        real, home = path.resolve(), root.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise StoreError(f"{path} cannot be followed: {error}.") from error
    if not real.is_relative_to(home):
        raise StoreError(f"{path} leads to {real}, out of {home}. Remove the link; results are not kept through links.")
    return path


def _num_bytes(part: str) -> int:
    try:
        return len(os.fsencode(part))
    except UnicodeError:  # a lone surrogate
        return LONGEST_PART + 1
