"""Instructions whose following a program can verify, in the manner of IFEval (Zhou et al. 2023, arXiv:2311.07911).

A check is a pure function of an answer, registered under its name with a family; its keyword parameters are what an
item may set. Names, families and rules are our own, so scores are not IFEval scores.

Strict: the answer as it is. Loose, as in the paper (section 3): an instruction counts as followed if one of eight
variants of the answer follows it: with and without asterisks, and with and without its first and its last line.
Words are runs of letters and digits, joined by apostrophe or hyphen; text without spaces (Chinese) is one word.
"""

import inspect
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VERSION = 1
"""Raised when the verdict of a check changes; part of the identity of the sets that use them."""

RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at_least": lambda found, wanted: found >= wanted,
    "at_most": lambda found, wanted: found <= wanted,
    "exactly": lambda found, wanted: found == wanted,
}
SCRIPTS = {
    "latin": ("LATIN",),
    "cyrillic": ("CYRILLIC",),
    "greek": ("GREEK",),
    "arabic": ("ARABIC",),
    "hebrew": ("HEBREW",),
    "devanagari": ("DEVANAGARI",),
    "chinese": ("CJK",),
    "japanese": ("CJK", "HIRAGANA", "KATAKANA"),
    "korean": ("HANGUL",),
}
SCRIPT_SHARE = 0.8
"""Share of the letters that must be of the script: a name or a foreign word may stand in between."""


@dataclass(frozen=True)
class Check:
    """A registered check."""

    family: str
    function: Callable[..., bool]

    @property
    def parameters(self) -> dict[str, type]:
        """Names and types of what an item must set; `prompt` is given by the caller."""
        found = inspect.signature(self.function).parameters.values()
        return {one.name: one.annotation for one in found if one.kind is one.KEYWORD_ONLY and one.name != "prompt"}

    @property
    def needs_prompt(self) -> bool:
        """Whether the verdict depends on the prompt."""
        return "prompt" in inspect.signature(self.function).parameters


CHECKS: dict[str, Check] = {}


def check(family: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    """Register a function under its name."""

    def register(function: Callable[..., bool]) -> Callable[..., bool]:
        CHECKS[function.__name__] = Check(family, function)
        return function

    return register


def problem_of(name: Any, params: Any) -> str | None:
    """Say what is wrong with a check as an item spells it; None if nothing is."""
    if name not in CHECKS:
        return f"check {name!r} is unknown; there are {', '.join(sorted(CHECKS))}"
    wanted = CHECKS[name].parameters
    if not isinstance(params, Mapping) or params.keys() != wanted.keys():
        given = sorted(params) if isinstance(params, Mapping) else params
        return f"check {name!r} takes exactly the parameters {sorted(wanted)}, not {given}"
    for key, kind in wanted.items():
        value = params[key]
        if kind is int and (type(value) is not int or value < (params.get("relation") == "at_least")):
            return f"check {name!r}: {key}={value!r} must be a whole number that an answer can miss"
        if kind is str and (not isinstance(value, str) or not value.strip()):
            return f"check {name!r}: {key}={value!r} must be a text that is not empty"
        if kind == list[str] and not (isinstance(value, list) and value and all(map(_filled, value))):
            return f"check {name!r}: {key}={value!r} must be a list of texts"
    if params.get("relation", "exactly") not in RELATIONS:
        return f"check {name!r}: relation={params['relation']!r} must be one of {', '.join(RELATIONS)}"
    if params.get("script", "latin") not in SCRIPTS:
        return f"check {name!r}: script={params['script']!r} must be one of {', '.join(SCRIPTS)}"
    return None


def follows(answer: str, name: str, params: Mapping[str, Any], prompt: str = "") -> bool:
    """Tell whether an answer follows an instruction to the letter; an empty answer follows none."""
    if not answer.strip():
        return False
    one = CHECKS[name]
    return bool(one.function(answer, **params, **({"prompt": prompt} if one.needs_prompt else {})))


def follows_loosely(answer: str, name: str, params: Mapping[str, Any], prompt: str = "") -> bool:
    """Tell whether one of the eight variants of an answer follows an instruction."""
    return any(follows(variant, name, params, prompt) for variant in variants(answer))


def variants(answer: str) -> list[str]:
    """List the answer without its first line, its last, both or neither, each with and without asterisks."""
    lines = answer.strip().split("\n")
    cut = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(text.replace("*", "") for text in cut)]


def accuracies(verdicts: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Compute prompt-level and instruction-level accuracy in percent.

    Args:
        verdicts: Of each prompt, whether each of its instructions was followed.
    """
    single = [one for prompt in verdicts for one in prompt]
    return 100.0 * sum(map(all, verdicts)) / len(verdicts), 100.0 * sum(single) / len(single)


def _filled(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def _occurrences(text: str, phrase: str) -> int:
    """Count a phrase as whole words, upper and lower case alike."""
    return len(re.findall(rf"(?<!\w){re.escape(phrase.lower())}(?!\w)", text.lower()))


def _letters(text: str) -> list[str]:
    return [letter for letter in text if letter.isalpha()]


# --- length ------------------------------------------------------------------------------------------------------


@check("length")
def words(text: str, *, relation: str, count: int) -> bool:
    """Number of words."""
    return RELATIONS[relation](len(_words(text)), count)


@check("length")
def sentences(text: str, *, relation: str, count: int) -> bool:
    """Number of sentences: parts with a word in them that end in . ! ? before a blank, in 。！？, or at the end."""
    parts = re.split(r"[.!?]+(?=[\s\"'”»)]|$)|[。！？]+", text)
    return RELATIONS[relation](sum(bool(_words(part)) for part in parts), count)


@check("length")
def paragraphs(text: str, *, relation: str, count: int) -> bool:
    """Number of blocks of text between empty lines."""
    return RELATIONS[relation](sum(bool(part.strip()) for part in re.split(r"\n\s*\n", text)), count)


@check("length")
def lines(text: str, *, relation: str, count: int) -> bool:
    """Number of lines that are not blank."""
    return RELATIONS[relation](sum(bool(line.strip()) for line in text.splitlines()), count)


# --- keywords ----------------------------------------------------------------------------------------------------


@check("keywords")
def includes(text: str, *, phrases: list[str]) -> bool:
    """Every phrase occurs."""
    return all(_occurrences(text, phrase) for phrase in phrases)


@check("keywords")
def avoids(text: str, *, phrases: list[str]) -> bool:
    """No phrase occurs."""
    return not any(_occurrences(text, phrase) for phrase in phrases)


@check("keywords")
def word_frequency(text: str, *, word: str, relation: str, count: int) -> bool:
    """How often a word occurs."""
    return RELATIONS[relation](_occurrences(text, word), count)


@check("keywords")
def letter_frequency(text: str, *, letter: str, relation: str, count: int) -> bool:
    """How often a letter occurs, upper and lower case alike."""
    return RELATIONS[relation](text.lower().count(letter.lower()), count)


# --- case and punctuation ----------------------------------------------------------------------------------------


@check("case")
def all_lowercase(text: str) -> bool:
    """Letters, and none of them upper case."""
    return bool(_letters(text)) and text == text.lower()


@check("case")
def all_uppercase(text: str) -> bool:
    """Letters, and none of them lower case."""
    return bool(_letters(text)) and text == text.upper()


@check("case")
def capital_words(text: str, *, relation: str, count: int) -> bool:
    """Number of words of two letters or more in capitals."""
    found = [word for word in _words(text) if len(_letters(word)) > 1 and word.isupper()]
    return RELATIONS[relation](len(found), count)


@check("punctuation")
def no_comma(text: str) -> bool:
    """No comma of any script."""
    return not re.search("[,，、،]", text)


@check("punctuation")
def no_exclamation(text: str) -> bool:
    """No exclamation mark."""
    return not re.search("[!！¡]", text)


# --- format ------------------------------------------------------------------------------------------------------


@check("format")
def json_value(text: str) -> bool:
    """A JSON object or list and nothing else but a code fence around it."""
    bare = re.sub(r"^```(?:json)?\s*\n(.*)\n\s*```$", r"\1", text.strip(), flags=re.DOTALL | re.IGNORECASE)
    try:
        return isinstance(json.loads(bare), dict | list)
    except (ValueError, RecursionError):
        return False


@check("format")
def bullets(text: str, *, relation: str, count: int) -> bool:
    """Number of lines that begin with *, - or • and a blank."""
    return RELATIONS[relation](len(re.findall(r"^\s*[*•-]\s+\S", text, re.MULTILINE)), count)


@check("format")
def numbered(text: str, *, count: int) -> bool:
    """Lines numbered 1 to `count` in order, as "1." or "1)", and no other numbered line."""
    found = re.findall(r"^\s*(\d+)[.)]\s+\S", text, re.MULTILINE)
    return [int(number) for number in found] == list(range(1, count + 1))


@check("format")
def placeholders(text: str, *, relation: str, count: int) -> bool:
    """Number of placeholders in square brackets, such as [name]."""
    return RELATIONS[relation](len(re.findall(r"\[[^\[\]\n]+\]", text)), count)


@check("format")
def title(text: str) -> bool:
    """A title in double angle brackets, such as <<A day at sea>>."""
    return bool(re.search(r"<<[^<>\n]*\w[^<>\n]*>>", text))


@check("format")
def highlights(text: str, *, relation: str, count: int) -> bool:
    """Number of parts in single or double asterisks, such as *this*."""
    return RELATIONS[relation](len(re.findall(r"\*\*[^*\n]+\*\*|\*[^*\s][^*\n]*\*", text)), count)


@check("format")
def sections(text: str, *, marker: str, count: int) -> bool:
    """Number of lines that begin with a marker and a number, such as "Part 2"."""
    return len(re.findall(rf"^\W*{re.escape(marker)}\s+\d+\b", text, re.MULTILINE)) == count


# --- beginning and end -------------------------------------------------------------------------------------------


@check("frame")
def starts_with(text: str, *, phrase: str) -> bool:
    """The first words, upper and lower case alike."""
    return bool(re.match(rf"\s*{re.escape(phrase.lower())}(?!\w)", text.lower()))


@check("frame")
def ends_with(text: str, *, phrase: str) -> bool:
    """The last words, upper and lower case alike; closing punctuation may follow."""
    closing = r"[\s.!?\"'”*]*$" if re.search(r"\w$", phrase) else r"\s*$"
    return bool(re.search(rf"(?<!\w){re.escape(phrase.lower())}{closing}", text.lower()))


@check("frame")
def quoted(text: str) -> bool:
    """The whole answer stands in double quotation marks."""
    return bool(re.fullmatch(r'\s*["“][^"“”]*["”]\s*', text))


@check("frame")
def postscript(text: str, *, marker: str) -> bool:
    """A line that begins with a marker such as "P.S." and goes on, with something before it."""
    return bool(re.search(rf"\S.*\n\s*{re.escape(marker)}\s*\S", text, re.DOTALL))


@check("combination")
def repeats_prompt(text: str, *, phrase: str, prompt: str) -> bool:
    """The answer begins with a given part of its prompt, word for word, and goes on."""
    given = " ".join(phrase.split()).lower()
    found = " ".join(text.split()).lower()
    return given in " ".join(prompt.split()).lower() and found.startswith(given) and len(found) > len(given)


@check("combination")
def two_answers(text: str, *, separator: str) -> bool:
    """Two different answers with a separator between them."""
    parts = [part.strip() for part in text.split(separator)]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


@check("language")
def script(text: str, *, script: str) -> bool:
    """Most letters are of a script; tells Russian from English, not English from French."""
    letters = _letters(text)
    own = [letter for letter in letters if unicodedata.name(letter, "").startswith(SCRIPTS[script])]
    return bool(letters) and len(own) >= SCRIPT_SHARE * len(letters)
