"""Keys, tokens and passwords in a configuration: refused, because a configuration is stored, logged and uploaded.

They belong in environment variables; a configuration names the variable. No message here shows a value.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SHORTEST_SECRET = 12
"""Shorter values of the environment's secrets ("none", "EMPTY", "changeme") are not searched for."""

_SECRET_KEY = re.compile(
    r"(^|_)((api|access|private|secret)_?key|(api|access|auth|hf|hub|refresh|bearer)_?token|secret|passw(or)?d"
    r"|passphrase|credentials?)$",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)$")
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|AKIA[0-9A-Z]{16}|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[0-9A-Za-z_-]{30,}|wandb_v1_\w{20,})"
)
"""Keys that begin like what they are: of OpenAI and others, Hugging Face, GitHub, AWS, Slack, Google, W&B."""
_URL_SECRET = re.compile(
    r"[a-z][a-z0-9+.-]*://[^/\s?#]*@|://\S*[?&](api_?key|key|token|access_token|auth|secret|password|sig)=",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}", re.ASCII)
_ADVICE = (
    "Put it into an environment variable instead; configurations are stored and uploaded. (Its value is not shown.)"
)


def secret_problems(node: Any, path: str = "") -> list[str]:
    """Say which values of a configuration are secrets: by their key, their look, or because the environment has them.

    Args:
        node: Plain mappings, lists and values.
        path: Of the node.
    """
    return [f"{key} {fault}. {_ADVICE}" for key, fault in _walk(node, path, _secrets_of_environment())]


def argument_problems(arguments: Sequence[str]) -> list[str]:
    """Say which command line arguments hold a secret, before anything stores, shows or logs them."""
    known = _secrets_of_environment()
    found = []
    for argument in arguments:
        key, separator, value = argument.lstrip("+~").partition("=")
        # What stands before the first "=" is shown, unless the secret is part of it.
        shown = key if separator and _fault("", key, known) is None else "an argument of the command line"
        fault = _fault(key, value, known) if separator else None
        if fault := fault or _fault("", argument, known) or _pair_fault(value):
            found.append(f"{shown} {fault}. {_ADVICE}")
    return found


def variable_fault(value: Any) -> str | None:
    """Say why a value is not the name of an environment variable but may be a key given in its place; None: it is one.

    A name in capitals may be one that is not set; one with small letters counts only if it is.
    """
    if value is None or (isinstance(value, str) and ("${" in value or value == "null")):
        return None
    if not isinstance(value, str) or not _VARIABLE.fullmatch(value) or _TOKEN.search(value):
        return "must be the name of an environment variable, such as OPENAI_API_KEY, and looks like a key itself"
    if value not in os.environ and not value.isupper():
        return "must be the name of an environment variable, such as OPENAI_API_KEY; there is none of this name"
    return None


def _walk(node: Any, path: str, known: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            below = f"{path}.{key}" if path else str(key)
            if _fault("", str(key), known):
                yield path or "the configuration", "has a key that is a secret"
                continue
            yield from _walk(value, below, known)
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _walk(value, f"{path}[{index}]", known)
    elif fault := _fault(path, node, known):
        yield path, fault


def _fault(path: str, value: Any, known: Mapping[str, str]) -> str | None:
    """Say why a value is a secret, None if it is none."""
    key = re.sub(r"\[\d+\]$", "", path).rpartition(".")[2]
    is_text = isinstance(value, str)
    if key.endswith("_key_env"):
        return variable_fault(value)
    # An interpolation is not the value yet; it is looked at again when it is resolved.
    if _SECRET_KEY.search(key) and value not in (None, "", "null") and not (is_text and value.startswith("${")):
        return "is a place for a secret"
    if not is_text:
        return None
    if _TOKEN.search(value):
        return "holds what looks like a key"
    if _URL_SECRET.search(value):
        return "is an address with a user, password or key in it"
    return next((f"holds the value of the environment variable {name}" for name, one in known.items() if one in value),
                None)  # fmt: skip


def _pair_fault(value: str) -> str | None:
    """Look into `{api_key: ...}` given in one argument."""
    keys = re.findall(r"([A-Za-z_]+)\s*:\s*(?!null\b|\$\{)[^\s,}]", value)
    return "has a place for a secret in it" if any(_SECRET_KEY.search(key) for key in keys) else None


def _secrets_of_environment() -> dict[str, str]:
    """Take the variables that hold secrets by their name; files that hold them are none."""
    return {
        name: value.strip()
        for name, value in os.environ.items()
        if _SECRET_VARIABLE.search(name.upper())
        and len(value.strip()) >= SHORTEST_SECRET
        and not value.strip().startswith(("/", "~", "."))
    }
