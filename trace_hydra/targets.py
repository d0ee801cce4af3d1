"""Objects named by `_target_`: what may be built at which key, arguments checked against signatures, and the call.

Each key has one kind of object, so a name is checked for what it is and for where it stands; `trust.targets` adds names
to every key. Hydra's own `instantiate` hides an ImportError behind "Error locating target" and refuses only what its
authors thought of.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, get_type_hints

_DOTTED = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+", re.ASCII)
_TRUSTED = re.compile(r"[A-Za-z_][A-Za-z0-9_]*((\.[A-Za-z_][A-Za-z0-9_]*)*\.|(\.[A-Za-z_][A-Za-z0-9_]*)+)", re.ASCII)
_SWITCHES = ("_target_", "_partial_", "_convert_")


@dataclass(frozen=True)
class Kind:
    """What may be built at a key."""

    what: str
    """For messages."""
    home: str
    """Package of the name, and of the module that defines the object."""
    fits: Callable[[Any], bool]
    partial: bool = False
    """Whether the node only binds arguments (`_partial_: true`), because the rest is known later."""
    besides: tuple[str, ...] = ()
    """Keys that are no arguments: whoever makes the call takes them out."""


def _subclass(base: str) -> Callable[[Any], bool]:
    def fits(found: Any) -> bool:
        parent = locate(base)
        return inspect.isclass(found) and issubclass(found, parent) and found is not parent

    return fits


def _having(*names: str) -> Callable[[Any], bool]:
    def fits(found: Any) -> bool:
        return inspect.isclass(found) and all(inspect.isfunction(getattr(found, name, None)) for name in names)

    return fits


def _is_trainer(found: Any) -> bool:
    return found is locate("lightning.pytorch.Trainer")


def _is_logger_factory(found: Any) -> bool:
    return inspect.isfunction(found) and found.__name__.endswith("_logger")


_MODEL = Kind("a model of trace_hydra.models", "trace_hydra.models.", _having("problems", "load", "load_tokenizer"))
_JUDGE = Kind("a judge of trace_hydra.capability", "trace_hydra.capability.", _having("problems", "ask", "is_model"))
_OPTIMIZER = Kind("an optimizer of torch.optim", "torch.optim.", _subclass("torch.optim.Optimizer"), partial=True)
_TRAINER = Kind("lightning.pytorch.Trainer", "lightning.pytorch.", _is_trainer, partial=True, besides=("deepspeed",))
_LOGGER = Kind("a factory *_logger of trace_hydra.loggers", "trace_hydra.loggers.", _is_logger_factory, partial=True)
_METHOD = Kind(
    "a trace_hydra.methods.base.Method", "trace_hydra.methods.", _subclass("trace_hydra.methods.base.Method")
)
_TUNING = Kind(
    "a trace_hydra.models.tuning.Tuning", "trace_hydra.models.", _subclass("trace_hydra.models.tuning.Tuning")
)
_DATA = Kind("a data source of trace_hydra.data", "trace_hydra.data.", _having("problems", "load"))
# None of Lightning's own callbacks: they do not hear a run's events, and several write to any path they are given.
_CALLBACK = Kind(
    "a trace_hydra.callbacks.base.RunCallback",
    "trace_hydra.callbacks.",
    _subclass("trace_hydra.callbacks.base.RunCallback"),
)
_ENGINE = Kind("an engine of trace_hydra.engines", "trace_hydra.engines.", _subclass("trace_hydra.engines.base.Engine"))
_SET = Kind(
    "a trace_hydra.capability.base.CapabilitySet",
    "trace_hydra.capability.",
    _subclass("trace_hydra.capability.base.CapabilitySet"),
)
_KEY = r"[^.\[\]]+"
PLACES = {
    "model": _MODEL,
    "tuning": _TUNING,
    "method": _METHOD,
    "data": _DATA,
    "engine": _ENGINE,
    r"optim\.optimizer": _OPTIMIZER,
    "trainer": _TRAINER,
    rf"callbacks\.{_KEY}": _CALLBACK,
    rf"logger\.{_KEY}": _LOGGER,
    rf"capability\.sets\.{_KEY}": _SET,
    rf"(capability\.sets\.{_KEY}\.)?judge": _JUDGE,
    rf"(capability\.sets\.{_KEY}\.)?judge\.model": _MODEL,
}
"""Key (a pattern) -> what may be built there. Nothing is built at any other key."""


def kind_at(path: str) -> Kind | None:
    """Look up what may be built at a key; None: nothing."""
    return next((kind for key, kind in PLACES.items() if re.fullmatch(key, path)), None)


def trust_problems(trusted: Sequence[Any]) -> list[str]:
    """Say which entries of `trust.targets` are neither a package with a final dot nor one full name."""
    return [
        f"trust.targets: {_shown(entry)} names too much or nothing. Name a package with a dot at its end "
        "(my_package.), or one class in full (my_package.mine.Mine)."
        for entry in trusted
        if not isinstance(entry, str) or not _TRUSTED.fullmatch(entry)
    ]


def find_targets(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Walk to every mapping with a `_target_`, with its key path."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from find_targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from find_targets(value, f"{path}[{index}]")


def target_problems(path: str, node: Mapping[str, Any], trusted: Sequence[str] = ()) -> list[str]:
    """Say why a `_target_` may not or cannot be called with its keywords; imports it only if its name is allowed.

    Args:
        path: The node's key in the configuration, which decides what may stand there.
        node: With `_target_`.
        trusted: `trust.targets`, checked by `trust_problems`.
    """
    target, kind = node["_target_"], kind_at(path)
    place = f"{path}._target_={_shown(target)}"
    if not isinstance(target, str) or not _DOTTED.fullmatch(target) or "__" in target:
        return [f"{place}: not allowed, it is no plain name of a class."]
    may = f"{path} must be {kind.what}" if kind else f"nothing is built at {path}"
    by_trust = _is_trusted(target, trusted)
    if not by_trust and (kind is None or not _is_below(target, kind.home)):
        return [
            f"{place}: not allowed; {may}. If you trust it, name its package with 'trust.targets=[my_package.]' on the "
            "command line."
        ]
    try:
        called = locate(target)
    except (ImportError, AttributeError) as error:
        return [f"{place}: {error}."]
    if not (by_trust and _is_callable_of(called, target, trusted)) and not (kind and _is_of(kind, called)):
        home = ".".join(str(getattr(called, part, "?")) for part in ("__module__", "__qualname__"))
        return [f"{place}: not allowed; it is {home}, and {may}."]
    if found := list(_switch_problems(path, node, kind)):
        return found
    besides = kind.besides if kind else ()
    keywords = {key: value for key, value in keywords_of(node, called).items() if key not in besides}
    return [f"{path}.{problem}" for problem in _binding_problems(called, keywords, _binds(node))]


def _shown(value: Any) -> str:
    """Show a name as it is, and what is none in ASCII, so that look-alikes and control characters can be seen."""
    return value if isinstance(value, str) and _DOTTED.fullmatch(value) else ascii(value)[:200]


def _is_trusted(name: str, trusted: Sequence[str]) -> bool:
    return any(name == entry or (entry.endswith(".") and name.startswith(entry)) for entry in trusted)


def _is_below(target: str, home: str) -> bool:
    """Whether the name is a public one of a module below `home`, or of `home` itself."""
    module, _, name = target.rpartition(".")
    return f"{module}.".startswith(home) and not any(part.startswith("_") for part in (*module.split("."), name))


def _is_callable_of(called: Any, target: str, trusted: Sequence[str]) -> bool:
    """Whether a trusted name leads to a class or function that is trusted too (not to `my_package.os.system`)."""
    if not (inspect.isclass(called) or inspect.isfunction(called)):
        return False
    return target in trusted or _is_trusted(f"{called.__module__}.{called.__qualname__}", trusted)


def _is_of(kind: Kind, called: Any) -> bool:
    """Whether the object itself, under whatever name it was found, is of a kind: an allowed module may hold others."""
    module, name = getattr(called, "__module__", None), getattr(called, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or not f"{module}.".startswith(kind.home):
        return False
    if getattr(sys.modules.get(module), name, None) is not called or getattr(called, "_is_protocol", False):
        return False
    return not inspect.isabstract(called) and kind.fits(called)


def _switch_problems(path: str, node: Mapping[str, Any], kind: Kind | None) -> Iterator[str]:
    """Refuse Hydra's switches that are not heard here, rather than to do something else in silence."""
    for key in node:
        if not isinstance(key, str):
            yield f"{path}.{key!a}: an argument's name must be text."
        elif key.startswith("_") and key not in _SWITCHES:
            yield f"{path}.{_shown(key)}: not allowed; arguments are given by name, nested objects are always built."
    if node.get("_convert_", "all") != "all":
        yield f"{path}._convert_={_shown(node['_convert_'])}: not allowed; arguments are always plain values (all)."
    given = node.get("_partial_", False)
    if not isinstance(given, bool) or (kind is not None and given != kind.partial):
        must = "true or false" if kind is None else "true" if kind.partial else "false"
        yield f"{path}._partial_={_shown(given)} must be {must}."


def _binds(node: Mapping[str, Any]) -> bool:
    return node.get("_partial_") is True


def locate(target: str) -> Any:
    """Import a dotted path that is allowed: the longest module, then attributes.

    Raises:
        ImportError: If no part of it is a module, or a module fails to import.
        AttributeError: If the module lacks the name.
    """
    parts = target.split(".")
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(f"{error.name}.")):
                continue
            raise
        for attribute in parts[length:]:
            found = getattr(found, attribute)
        return found
    raise ImportError(f"no module named {parts[0]!r}")


def keywords_of(node: Mapping[str, Any], called: Any) -> dict[str, Any]:
    """Take a node's arguments; `name` only where the callable wants it, for it also names the option."""
    keywords = {key: value for key, value in node.items() if not (key.startswith("_") and key.endswith("_"))}
    if "name" in keywords and "name" not in _signature(called).parameters:
        keywords.pop("name")
    return keywords


def _binding_problems(called: Any, keywords: Mapping[str, Any], partial: bool) -> Iterator[str]:
    from pydantic import ValidationError
    from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

    signature = _signature(called)
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in signature.parameters.values())
    hints = _hints(called)
    for key, value in keywords.items():
        if key not in signature.parameters:
            if not takes_any:
                known = ", ".join(name for name in signature.parameters if name != "self")
                yield f"{key}={value}: {called.__name__} has no such argument. It has: {known or 'none'}."
            continue
        if isinstance(value, (Mapping, list)) or key not in hints:
            continue
        try:
            _checker(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            yield f"{key}={value}: {error.errors()[0]['msg']}."
        except (PydanticSchemaGenerationError, PydanticUserError):
            continue  # an annotation that no plain value can be checked against
    if not partial:
        for name, parameter in signature.parameters.items():
            required = parameter.default is inspect.Parameter.empty and parameter.kind in (
                inspect.Parameter.KEYWORD_ONLY,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
            )
            if required and name not in keywords:
                yield f"{name}: missing; {called.__name__} needs it."


# The plan of a sweep checks the same classes for every job; to build what checks them takes most of the time.
_MANY = 512


@lru_cache(_MANY)
def _signature(called: Any) -> inspect.Signature:
    return inspect.signature(called)


@lru_cache(_MANY)
def _checker(hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))


@lru_cache(_MANY)
def _hints(called: Any) -> dict[str, Any]:
    try:
        return get_type_hints(called.__init__ if inspect.isclass(called) else called)
    except (NameError, TypeError):
        return {}


def instantiate(node: Mapping[str, Any]) -> Any:
    """Call a `_target_` that `target_problems` has passed, or bind its keywords if `_partial_`; nested ones first."""
    called = locate(node["_target_"])
    keywords = {key: _nested(value) for key, value in keywords_of(node, called).items()}
    return partial(called, **keywords) if _binds(node) else called(**keywords)


def _nested(value: Any) -> Any:
    if isinstance(value, Mapping):
        return instantiate(value) if "_target_" in value else {key: _nested(one) for key, one in value.items()}
    return [_nested(one) for one in value] if isinstance(value, list | tuple) else value
