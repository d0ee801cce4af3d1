"""What can be known about a checkpoint before it is loaded: is it there, complete, and loadable without its own code.

Imports neither torch nor transformers at import time, so that a configuration is checked in milliseconds.
"""

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from trace_hydra.errors import ConfigError

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TEXT_PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja"]
OTHER_FORMATS = ["original/*", "onnx/*", "consolidated*"]
HUB_TIMEOUT_S = 15
_LARGE = 1 << 26
_memo: dict[str, Path] = {}


def local_folder(path: str) -> Path | None:
    """Return the folder that `path` names, None if it is to be taken as a Hub id.

    An existing folder wins; otherwise what is written like a path ("/x", "./x", "~/x", "a/b/c") is a folder that is
    missing, and is returned all the same.
    """
    folder = Path(path).expanduser()
    if folder.is_dir() or path.startswith(("/", "./", "../", "~")) or path.count("/") > 1:
        return folder
    return None


def offline() -> bool:
    """Tell whether the user forbade the Hub client to use the network (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE)."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in names)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; an absent file and one that holds something else give an empty mapping.

    Raises:
        ValueError: If the file is no JSON.
    """
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def has_chat_template(folder: Path) -> bool:
    """Tell whether a local checkpoint ships a chat template, in any of the places that transformers reads."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    try:
        return bool(read_json(folder / "tokenizer_config.json").get("chat_template"))
    except ValueError:
        return False


def weight_files(folder: Path) -> list[Path]:
    """List the files that hold weights: safetensors if there are any, else PyTorch's own format."""
    for pattern in WEIGHT_PATTERNS:
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def path_problems(path: str | None, revision: str | None) -> list[str]:
    """Say what is wrong with `model.path` itself, and with the files it names as far as they are on this machine."""
    if not path:
        return ["model.path is empty. Set it to a folder with config.json and weights, or to a Hub id (owner/name)."]
    folder = local_folder(path)
    if folder is not None:
        return folder_problems(folder)
    if not HUB_ID.fullmatch(path):
        return [f"model.path={path!r} is neither an existing folder nor a Hub id (owner/name)."]
    if offline():
        # Imported here: only runs that are offline need it to judge the configuration.
        from huggingface_hub import try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(path, "config.json", revision=revision or "main"), str):
            return [
                f"model.path={path} is not in the local Hub cache and HF_HUB_OFFLINE forbids to fetch it. "
                "Set model.path to a local folder, or run once online."
            ]
    return []


def folder_problems(folder: Path, *, weights: bool = True) -> list[str]:
    """Say what a local checkpoint lacks: config.json, weights (if asked for), a shard of them, tokenizer files."""
    if not folder.is_dir():
        return [f"model.path={folder} does not exist. Set it to a folder with config.json and weights, or to a Hub id."]
    if not (folder / "config.json").is_file():
        adapter = " It holds a PEFT adapter, not a model." if (folder / "adapter_config.json").is_file() else ""
        return [f"model.path={folder} has no config.json.{adapter} Set model.path to the folder of a whole model."]
    if (folder / "adapter_config.json").is_file():
        # transformers would load the base that the adapter names instead, from wherever that is.
        return [
            f"model.path={folder} holds a PEFT adapter (adapter_config.json) beside a model. Merge it into the "
            "weights, or take adapter_config.json away to load the model alone."
        ]
    problems = []
    if weights and not weight_files(folder):
        problems.append(f"model.path={folder} has no weights ({' or '.join(WEIGHT_PATTERNS)}).")
    for index in [folder / name for name in INDEXES]:
        if weights and (missing := _missing_shards(index)):
            problems.append(f"{index} names {missing[0]}, which is missing ({len(missing)} in all). Copy it again.")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        problems.append(f"model.path={folder} has no tokenizer (one of {', '.join(TOKENIZER_FILES)}).")
    return problems


def _missing_shards(index: Path) -> list[str]:
    try:
        shards = set(read_json(index).get("weight_map", {}).values())
    except ValueError:
        return ["(unreadable index)"]
    present = {file.suffix for file in weight_files(index.parent)}
    # The index of the format that is not loaded may stay behind when its shards were deleted to save disk.
    return sorted(name for name in shards if Path(name).suffix in present and not (index.parent / name).is_file())


def remote_code_problems(folder: Path, trust_remote_code: bool) -> list[str]:
    """Refuse a checkpoint that can only be loaded by executing code it brings along."""
    try:
        config = read_json(folder / "config.json")
    except ValueError as error:
        return [f"{folder / 'config.json'} is no JSON ({error})."]
    if quantized := (config.get("quantization_config") or {}).get("quant_method"):
        return [f"model.path={folder} is quantized ({quantized}); its weights cannot be trained. Use the original."]
    if not config.get("auto_map") or trust_remote_code:
        return []
    # Imported here: it takes a second, and few checkpoints have an auto_map.
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind in CONFIG_MAPPING:
        return []
    hint = " For Baichuan 2 use model=baichuan2_7b_chat." if kind == "baichuan" else ""
    return [
        f"model.path={folder}: transformers does not know model_type={kind!r}; the checkpoint brings its own Python "
        f"code (trust_remote_code). If you trust its source, set model.trust_remote_code=true.{hint}"
    ]


def fetch(path: str, revision: str | None, *, weights: bool, code: bool) -> Path:
    """Download a Hub repository to the Hub client's cache, or find it there; return its folder.

    Takes one format of weights, safetensors if there are any. Asks the Hub once, with a time limit; if it cannot be
    reached, what the cache holds must do.

    Raises:
        ConfigError: If the Hub cannot be reached and the cache does not hold the repository.
        OSError: What the Hub refuses: no such repository or revision, no access.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    files = () if offline() else _hub_files(path, revision)
    patterns = TEXT_PATTERNS + (["*.py"] if code else [])
    if weights:
        safe = any(Path(file).match(WEIGHT_PATTERNS[0]) for file in files)
        patterns = [*patterns, WEIGHT_PATTERNS[0] if safe else WEIGHT_PATTERNS[1]]
    try:
        folder = snapshot_download(
            path,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=OTHER_FORMATS,
            local_files_only=not files,
        )
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"model.path={path}: the Hugging Face Hub cannot be reached and the local cache does not hold it. "
            "Set model.path to a local folder with config.json, weights and tokenizer, or check the network."
        ) from error
    return Path(folder)


def cached_tokenizer(path: str, revision: str | None) -> Path | None:
    """Find the folder of a Hub repository's tokenizer in the Hub client's cache, without asking the Hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in TOKENIZER_FILES:
        try:
            found = try_to_load_from_cache(path, name, revision=revision or "main")
        except HFValidationError:  # the path of a folder that is not there
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def cached_commit(path: str, revision: str | None) -> str | None:
    """Name the commit of a Hub repository whose tokenizer the Hub client's cache holds."""
    folder = cached_tokenizer(path, revision)
    return folder.name if folder is not None and folder.parent.name == "snapshots" else None


def _hub_files(path: str, revision: str | None) -> tuple[str, ...]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(path, revision=revision, timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError:
        raise
    # The client's transport errors (no route, name, or answer in time) have no public base class.
    except Exception as error:  # noqa: BLE001
        log.warning("The Hugging Face Hub cannot be reached (%s); %s must be in the local cache.", error, path)
        return ()
    return tuple(file.rfilename for file in info.siblings or ())


def folder_identity(folder: Path) -> str:
    """Hash what a local checkpoint is: 16 hex digits, over its configuration, tokenizer and weight files."""
    digest = hashlib.sha256()
    texts = [file for file in folder.iterdir() if file.suffix in {".json", ".model", ".txt", ".jinja"}]
    for file in sorted([*texts, *weight_files(folder)], key=lambda file: file.name):
        digest.update(f"{file.name}\0{sha256(file)}\0".encode())
    return digest.hexdigest()[:16]


def remember_hashes(file: Path) -> None:
    """Keep the hashes of large files in a JSON file from now on; hashing 26 GB takes a minute at every start."""
    _memo["file"] = file


def sha256(file: Path) -> str:
    """Hash a file; a large one that was hashed before, and has the same size, time and inode, is not read again."""
    state = file.stat()
    large = state.st_size > _LARGE and _memo.get("file") is not None
    key = f"{file.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ino}"
    known = _known_hashes() if large else {}
    if key in known:
        return known[key]
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if large:
        _keep_hashes({**known, key: found})
    return found


def _known_hashes() -> dict[str, str]:
    try:
        found = json.loads(_memo["file"].read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _keep_hashes(known: dict[str, str]) -> None:
    """Write for the next run; another process may win, and then the file is hashed once more."""
    draft = _memo["file"].with_name(f".{_memo['file'].name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(known), encoding="utf-8")
        os.replace(draft, _memo["file"])
    except OSError as error:
        log.info("%s: hashes of weight files are not kept: %s", _memo["file"], error.strerror)
