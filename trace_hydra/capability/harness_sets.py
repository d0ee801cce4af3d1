"""The six sets of general ability: which tasks of lm-evaluation-harness they are, and what can be checked beforehand.

Nothing here imports the harness: its task files are read as files, so that a wrong setting is told before a model is
loaded.
"""

import hashlib
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_hydra.capability.tasks import local

OWN_TASKS = Path(local.__file__).parent
LANGUAGES = {
    "ar": "arabic",
    "bn": "bengali",
    "en": "english",
    "fi": "finnish",
    "id": "indonesian",
    "ko": "korean",
    "ru": "russian",
    "sw": "swahili",
    "te": "telugu",
}
"""TyDiQA's languages with gold passages; Japanese and Thai, of the paper's eleven, are not among the gold passages."""


@dataclass(frozen=True)
class Source:
    """One set."""

    folder: str
    """Of the harness's own task files."""
    files: str
    """Pattern of those that are a category each, one file if the set has none."""
    prefix: str
    """What stands before the category in a task's name; without categories the whole name."""
    measures: tuple[str, ...]
    """Metrics of the harness, `metric` or `metric, filter`."""
    hub: str
    """Data set on the hub."""
    rows: str
    """File of test rows in a local folder."""
    demonstrations: str | None
    """File of demonstrations in a local folder; None: the harness's own task file holds them, or there are none."""
    group_by: str | None = None
    """Field of a local row that names the category."""

    @property
    def local_files(self) -> list[str]:
        """The files a local folder must have."""
        return [self.rows, *([self.demonstrations] if self.demonstrations else [])]

    def categories(self) -> dict[str, Path]:
        """Map the set's categories to the harness's own task files; empty if it has none or is not installed."""
        folder = harness_tasks()
        found = sorted((folder / self.folder).glob(self.files)) if folder else []
        return {self.category(file.stem): file for file in found} if self.group_by else {}

    def category(self, name: str) -> str:
        """Name a category from a task's name or its file's."""
        short = name.removeprefix(self.prefix)
        return LANGUAGES.get(short, short) if self.folder == "tydiqa" else short


SOURCES = {
    "mmlu": Source(
        "mmlu/default",
        "mmlu_*.yaml",
        "mmlu_",
        ("acc",),
        "cais/mmlu",
        "mmlu_test.jsonl",
        "mmlu_dev.jsonl",
        "subject",
    ),
    "gsm8k": Source(
        "gsm8k",
        "gsm8k-cot.yaml",
        "gsm8k_cot",
        ("exact_match, strict-match", "exact_match, flexible-extract"),
        "openai/gsm8k",
        "gsm8k_test.jsonl",
        None,
    ),
    "bbh": Source(
        "bbh/cot_fewshot",
        "[a-z]*.yaml",
        "bbh_cot_fewshot_",
        ("exact_match, get-answer",),
        "SaylorTwift/bbh",
        "bbh.jsonl",
        None,
        "task",
    ),
    "tydiqa": Source(
        "tydiqa",
        "tydiqa_goldp_*.yaml",
        "tydiqa_goldp_",
        ("f1", "exact_match"),
        "google-research-datasets/tydiqa",
        "tydiqa_goldp_dev.jsonl",
        "tydiqa_goldp_train.jsonl",
        "id",
    ),
    "boolq": Source("super_glue/boolq", "default.yaml", "boolq", ("acc",), "aps/super_glue", "boolq.jsonl", None),
    "piqa": Source("piqa", "piqa.yaml", "piqa", ("acc", "acc_norm"), "baber/piqa", "piqa.jsonl", None),
}
SETTINGS = {"shots", "measure", "limit", "categories"}


def harness_tasks() -> Path | None:
    """Find the harness's own task files without importing it; None if it is not installed."""
    spec = importlib.util.find_spec("lm_eval")
    return Path(spec.origin).parent / "tasks" if spec and spec.origin else None


def setting_problems(name: str, settings: Mapping[str, Any]) -> list[str]:
    """List what is wrong with the settings of a set by themselves."""
    if name not in SOURCES:
        return [f"capability: there is no set '{name}' of general ability; there are {', '.join(SOURCES)}."]
    source, where = SOURCES[name], f"capability set {name}"
    found = [f"{where} has no setting '{key}'; it has {_list(SETTINGS)}." for key in sorted(settings.keys() - SETTINGS)]
    shots, limit = settings.get("shots"), settings.get("limit")
    if type(shots) is not int or shots < 0:
        found.append(f"{where}: shots={shots!r} must be a number of demonstrations, 0 or more.")
    if settings.get("measure") not in source.measures:
        options = "; ".join(source.measures)
        found.append(f"{where}: measure={settings.get('measure')!r} is not one of the harness's: {options}.")
    if limit is not None and (type(limit) is not int or limit < 1):
        found.append(f"{where}: limit={limit!r} must be at least 1, or null for all items.")
    wanted = settings.get("categories")
    if wanted is not None and (odd := [one for one in wanted if one not in source.categories()]) and harness_tasks():
        known = _list(source.categories()) or "none: categories=null"
        found.append(f"{where}: categories holds {_list(odd)}; there are {known}.")
    elif wanted is not None and not list(wanted):
        found.append(f"{where}: categories is an empty list; null takes all.")
    return found


def local_problems(name: str, settings: Mapping[str, Any], root: str) -> list[str]:
    """List what a local folder lacks for a set: files, sound rows, categories, demonstrations."""
    source, folder = SOURCES[name], Path(root).expanduser()
    missing = [file for file in source.local_files if not (folder / file).is_file()]
    if missing:
        return [
            f"capability set {name} needs {_list(missing)} in {root}; set paths.ability to a folder that holds it, or "
            "to null for the hub's data sets."
        ]
    try:
        rows = {file: local.rows(root, file) for file in source.local_files}
    except (OSError, ValueError) as error:
        return [f"capability set {name}: {root}: {error}. Replace the file."]
    counts = {file: Counter(_group(source, row) for row in found) for file, found in rows.items()}
    wanted = list(settings.get("categories") or source.categories()) or [""]
    empty = [group for group in source.categories() or [""] if not counts[source.rows][group]]
    if empty:
        what = f" of {_list(empty)}" if source.group_by else ""
        return [f"capability set {name}: {root}/{source.rows} has no rows{what}. Add them or leave the set out."]
    shots = settings["shots"]
    have = {group: _demonstrations(source, group, counts) for group in wanted}
    short = {group: number for group, number in have.items() if number < shots}
    return [_too_few(name, shots, short)] if short else []


def hub_problems(name: str, settings: Mapping[str, Any]) -> list[str]:
    """List what is known to fail with the hub's data sets: demonstrations, no network and no copy of the data."""
    source, found = SOURCES[name], []
    offline = any(os.environ.get(key, "").upper() in ("1", "ON", "YES", "TRUE") for key in OFFLINE)
    if offline and not _is_cached(source.hub):
        switches = _list(key for key in OFFLINE if os.environ.get(key))
        found.append(
            f"capability set {name} needs {source.hub} from the hub; {switches} is set and there is no copy in the "
            "cache. Unset it, or set paths.ability to a folder with the rows."
        )
    own = {group: count for group in source.categories() or [""] if (count := _own_demonstrations(source, group)) >= 0}
    known = {"mmlu": dict.fromkeys(source.categories(), 5)}.get(name, own)  # every subject has five in MMLU's dev split
    short = {group: number for group, number in known.items() if number < settings["shots"]}
    return [*found, *([_too_few(name, settings["shots"], short)] if short else [])]


OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def file_hash(path: Path) -> str:
    """Hash a file; "missing" if there is none."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    except OSError:
        return "missing"


def _demonstrations(source: Source, group: str, counts: Mapping[str, Counter[str]]) -> int:
    if source.demonstrations:
        return counts[source.demonstrations][group]
    return max(_own_demonstrations(source, group), 0)


def _own_demonstrations(source: Source, group: str) -> int:
    """Count the demonstrations that the harness's own task file holds; -1 if they come from the data."""
    folder = harness_tasks()
    if folder is None:
        return -1
    path = source.categories()[group] if source.group_by else folder / source.folder / source.files
    if source.folder not in ("gsm8k", "bbh/cot_fewshot"):
        return -1
    return _samples(path)


def _samples(path: Path) -> int:
    import yaml

    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return len(config.get("fewshot_config", {}).get("samples", ()))


def _group(source: Source, row: Mapping[str, Any]) -> str:
    if source.group_by is None:
        return ""
    return re.split("-", row["id"])[0] if source.group_by == "id" else row[source.group_by]


def _too_few(name: str, shots: int, short: Mapping[str, int]) -> str:
    places = ", ".join(f"{group or name} {number}" for group, number in list(short.items())[:5])
    more = f" and {len(short) - 5} more" if len(short) > 5 else ""
    return f"capability set {name}: shots={shots}, but there are fewer demonstrations: {places}{more}. Lower shots."


def _is_cached(repository: str) -> bool:
    """Tell whether a data set may be in the caches of `datasets` and `huggingface_hub`."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    places = (prepared / repository.replace("/", "___"), hub / f"datasets--{repository.replace('/', '--')}")
    return any(place.is_dir() for place in places)


def _list(names: Any) -> str:
    return ", ".join(sorted(str(name) for name in names))
