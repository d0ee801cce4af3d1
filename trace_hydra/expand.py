"""Composing the jobs of a sweep: what they have in common is read, parsed and merged once.

Which files make up a job's configuration is decided by its choices of groups (`method=ewc`) alone; Hydra applies plain
values (`seed.train=3`) to what came of them. So jobs with the same choices share one composition, over which the values
of one job after another are laid by Hydra's own function. Where that might differ from composing the job by itself, it
is composed by itself (`Composer.job`).
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import MISSING, Container, DictConfig, OmegaConf, open_dict
from omegaconf._utils import split_key
from omegaconf.errors import OmegaConfBaseException

from trace_hydra import entry, keys
from trace_hydra.errors import TraceHydraError

_OF_HYDRA = re.compile(r"(?<!\w)hydra(?!\w)")
"""In an interpolation: a reference to the node `hydra`, parts of which differ from job to job."""
_OWN_DIRECTORY = "${run_dir:}"


@dataclass(frozen=True)
class Composed:
    """A job's configuration without the node `hydra`."""

    folder: Path
    """hydra.sweep.dir, absolute."""
    subdir: str
    """hydra.sweep.subdir."""
    config: DictConfig | dict[str, Any]
    """Resolved to plain values, as composed if that is not possible. Not to be changed: jobs hold the same objects."""


class Composer:
    """Composes jobs as `ConfigLoader.load_sweep_config` does.

    Args:
        loader: Hydra's own.
        master: The sweep's configuration.
    """

    def __init__(self, loader: ConfigLoaderImpl, master: DictConfig):
        self._loader, self._master = _Loader(loader.config_search_path), master
        self._of_hydra: list[str] = OmegaConf.to_container(master.hydra.overrides.hydra)  # type: ignore[assignment]
        self._config_name = master.hydra.job.config_name
        self._is_group: dict[str, bool] = {}

    def jobs(self, combinations: Sequence[Sequence[str]]) -> list[Composed]:
        """Compose every job, in order.

        Args:
            combinations: The overrides of each.

        Raises:
            HydraException: If one cannot be composed.
        """
        alike: dict[tuple[str, ...], list[int]] = {}
        for number, given in enumerate(combinations):
            alike.setdefault(self._choices(given), []).append(number)
        found: dict[int, Composed] = {}
        for choices, numbers in alike.items():
            shared = self._shared(choices)
            for number in numbers:
                with self._job(combinations[number], number, shared) as (config, known):
                    found[number] = _read(config, known)
        return [found[number] for number in range(len(combinations))]

    @contextmanager
    def job(self, overrides: Sequence[str], number: int) -> Iterator[DictConfig]:
        """Compose one job; what is given is whole, for reading, and valid within the context."""
        with self._job(overrides, number, self._shared(self._choices(overrides))) as (config, _):
            yield config

    @contextmanager
    def _job(
        self, overrides: Sequence[str], number: int, shared: "_Shared | None"
    ) -> Iterator[tuple[DictConfig, Mapping[str, Any]]]:
        """Compose a job; by Hydra if there is nothing to share, or it might come out different.

        Yields:
            The configuration, and those of its nodes that are known to be plain values.
        """
        parsed = self._loader.parse(overrides)
        if shared is not None and not any(map(_is_special, parsed)):
            values = [one for one in parsed if not self._is_choice(one)]
            kept = _nodes(shared.config)
            try:
                known = shared.lay_over(values)
                OmegaConf.copy_cache(from_config=self._master, to_config=shared.config)
            except Exception:  # noqa: BLE001 - whatever it is: composed alone, the job fails in Hydra's words or not at all
                _put_nodes(shared.config, kept)
            else:
                try:
                    yield shared.config, known
                finally:
                    _put_nodes(shared.config, kept)
                return
        config = self._loader.load_sweep_config(self._master, list(overrides))
        with open_dict(config):
            config.hydra.job.num = number
            config.hydra.job.id = str(number)
        before = HydraConfig.instance().cfg
        try:
            HydraConfig.instance().set_config(config)
            yield config, {}
        finally:
            HydraConfig.instance().cfg = before

    def _choices(self, overrides: Sequence[str]) -> tuple[str, ...]:
        parsed = self._loader.parse(overrides)
        return tuple(text for text, one in zip(overrides, parsed, strict=True) if self._is_choice(one))

    def _is_choice(self, override: Override) -> bool:
        """Tell whether Hydra takes an override as the choice of a group; see its `defaults_list.Overrides`."""
        group = override.key_or_group
        if group not in self._is_group:
            self._is_group[group] = self._loader.repository_of(self._config_name, self._of_hydra).group_exists(group)
        return self._is_group[group] and not isinstance(override.value(), dict)

    def _shared(self, choices: tuple[str, ...]) -> "_Shared | None":
        """Compose choices of groups without any value; None if jobs cannot share that."""
        try:
            shared = _Shared(self._loader.load_sweep_config(self._master, list(choices)))
        except Exception:  # noqa: BLE001 - Hydra raises more than its own; the jobs say it when they are composed alone
            return None
        return None if shared.refers_to_hydra else shared


class _Elsewhere(Exception):
    """A value would be set through an interpolation, in a node of another name."""


class _Shared:
    """A composition that the values of one job after another are laid over.

    Attributes:
        config: The whole.
        refers_to_hydra: Whether a value, or the job's folder, depends on the node `hydra`.
    """

    def __init__(self, config: DictConfig):
        self.config = config
        raw: dict[str, Any] = OmegaConf.to_container(config, resolve=False)  # type: ignore[assignment]
        sweep = raw.pop("hydra")["sweep"]
        found = {key: list(_interpolations(value)) for key, value in {**raw, "hydra.sweep": sweep}.items()}
        self.refers_to_hydra = any(_OF_HYDRA.search(text) for texts in found.values() for text in texts)
        self._plain = {key: value for key, value in raw.items() if not found[key] and value != MISSING}

    def lay_over(self, values: Sequence[Override]) -> dict[str, Any]:
        """Set values; the nodes at the root that hold them are copied first, so that the others stay as they were.

        Returns:
            The nodes that hold neither one of the values nor an interpolation, as plain values.
        """
        touched = {split_key(one.key_or_group)[0] for one in values}
        nodes = _nodes(self.config)
        _put_nodes(self.config, {key: copy.deepcopy(node) if key in touched else node for key, node in nodes.items()})
        for one in values:
            if _leads_elsewhere(self.config, one.key_or_group):
                raise _Elsewhere
            ConfigLoaderImpl._apply_overrides_to_config([one], self.config)
        return {key: value for key, value in self._plain.items() if key not in touched}


class _Loader(ConfigLoaderImpl):
    """Hydra's loader; reads and parses every file, and parses every override, once."""

    def __init__(self, search_path: Any):
        super().__init__(search_path)
        self._overrides: dict[str, Override] = {}
        self._repositories: dict[tuple[str | None, str], CachingConfigRepository] = {}

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """Parse overrides.

        Raises:
            OverrideParseException: If one cannot be parsed.
        """
        new = [text for text in dict.fromkeys(overrides) if text not in self._overrides]
        self._overrides.update(zip(new, OverridesParser.create().parse_overrides(new), strict=True))
        return [self._overrides[text] for text in overrides]

    def repository_of(self, config_name: str | None, overrides: Sequence[str]) -> CachingConfigRepository:
        """Give the files of a search path, which overrides may change."""
        search_path = [one for one in self.parse(overrides) if one.get_key_element() == "hydra.searchpath"]
        key = (config_name, str([one.input_line for one in search_path]))
        if key not in self._repositories:
            repository = CachingConfigRepository(self.repository)
            self._process_config_searchpath(config_name, search_path, repository)
            self._repositories[key] = repository
        return self._repositories[key]

    def _parse_overrides_and_create_caching_repo(self, config_name: str | None, overrides: list[str]) -> Any:
        return self.parse(overrides), _Copies(self.repository_of(config_name, overrides))


class _Copies(IConfigRepository):
    """The files of a repository, for one composition, which changes what it is given."""

    def __init__(self, files: CachingConfigRepository):
        self._files, self._given = files, dict[str, ConfigResult | None]()

    def load_config(self, config_path: str) -> ConfigResult | None:
        if config_path not in self._given:
            self._given[config_path] = copy.deepcopy(self._files.load_config(config_path))
        return self._given[config_path]

    def get_schema_source(self) -> ConfigSource:
        return self._files.get_schema_source()

    def group_exists(self, config_path: str) -> bool:
        return self._files.group_exists(config_path)

    def config_exists(self, config_path: str) -> bool:
        return self._files.config_exists(config_path)

    def get_group_options(self, group_name: str, results_filter: ObjectType | None = ObjectType.CONFIG) -> list[str]:
        return self._files.get_group_options(group_name, results_filter)

    def get_sources(self) -> list[ConfigSource]:
        return self._files.get_sources()

    def initialize_sources(self, config_search_path: Any) -> None:
        self._files.initialize_sources(config_search_path)


def _read(config: DictConfig, known: Mapping[str, Any]) -> Composed:
    """Take from a job's configuration what outlasts it."""
    raw = config.hydra.sweep._get_node("subdir")._value()
    folder = Path(str(OmegaConf.select(config, "hydra.sweep.dir"))).absolute()
    if raw == _OWN_DIRECTORY:
        subdir = _own_directory(config, known)
    else:
        subdir = str(OmegaConf.select(config, "hydra.sweep.subdir"))
    nodes = [str(key) for key in config if key != "hydra"]
    try:
        if known:
            plain = {key: known[key] if key in known else keys.resolved_node(config, key) for key in nodes}
            return Composed(folder, subdir, plain)
    except OmegaConfBaseException:
        pass
    whole = copy.deepcopy(config)
    with open_dict(whole):
        del whole["hydra"]  # a run does not have it either
    try:
        return Composed(folder, subdir, OmegaConf.to_container(whole, resolve=True))  # type: ignore[arg-type]
    except OmegaConfBaseException:
        return Composed(folder, subdir, whole)


def _own_directory(config: DictConfig, known: Mapping[str, Any]) -> str:
    try:
        return entry.run_directory_name(config, known)
    except (TraceHydraError, OmegaConfBaseException):
        return str(OmegaConf.select(config, "hydra.sweep.subdir"))  # says where it was asked for


def _is_special(override: Override) -> bool:
    """Whether an override may do more than to choose an option or to set a value that depends on no other job."""
    text = str(override.input_line)
    return (
        override.is_hydra_override()
        or override.is_sweep_override()
        or ("${" in text and _OF_HYDRA.search(text) is not None)
    )


def _nodes(config: DictConfig) -> dict[str, Any]:
    return vars(config)["_content"]


def _put_nodes(config: DictConfig, nodes: dict[str, Any]) -> None:
    object.__setattr__(config, "_content", nodes)


def _leads_elsewhere(config: DictConfig, key: str) -> bool:
    """Whether a node on the way to a key is an interpolation, or an item of a list."""
    node: Any = config
    for part in split_key(key):
        if not isinstance(node, DictConfig):
            return isinstance(node, Container)
        if node._is_interpolation():
            return True
        if node._is_none() or node._is_missing():
            return False
        node = node._get_node(part, validate_access=False)
    return isinstance(node, Container) and node._is_interpolation()


def _interpolations(node: Any) -> Iterator[str]:
    """Go through the texts in plain values that hold an interpolation."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _interpolations(key)
            yield from _interpolations(value)
    elif isinstance(node, list):
        for value in node:
            yield from _interpolations(value)
    elif isinstance(node, str) and "${" in node:
        yield node
