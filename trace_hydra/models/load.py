"""Pretrained causal language models from a local folder or the Hugging Face Hub, and what all models have in common.

A model of `conf/model` is an object with `name`, `problems()`, `load_tokenizer()`, `load()`, `identity()`, and for
estimates `skeleton()` and `local_tokenizer()`; building it costs nothing. `Pretrained` covers every architecture that
transformers knows.

What the rest of the package may rely on: the tokenizer has an end token and the declared pad token, decodes without
"cleaning up" spaces, and was not extended; the model has its published vocabulary, is in eval mode on the CPU, and
carries no sampling settings of its own (decoding belongs to the protocol).
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_hydra.errors import ConfigError, TraceHydraError, problem_list
from trace_hydra.models import checkpoint
from trace_hydra.models.quantization import quantization_arguments, quantization_problems

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16")
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
ADVICE = (
    "Set model.path to a local folder with config.json, weights and tokenizer, or check the Hub id, HF_TOKEN and "
    "the network."
)


class Pretrained:
    """A checkpoint that transformers can load without foreign code."""

    def __init__(
        self,
        *,
        name: str,
        path: str | None,
        revision: str | None,
        dtype: str,
        pad_token: str | None,
        attn_implementation: str,
        gradient_checkpointing: bool,
        trust_remote_code: bool,
        context_length: int | None,
        parameters: int | None,
        published: str | None,
        architecture: Mapping[str, Any] | None = None,
        quantization: str | None = None,
        kernels: str = "torch",
    ):
        """Keep the settings; reads and imports nothing.

        Args:
            name: Stands in results, run names and messages; the option of the config group.
            path: Folder with config.json, weights and tokenizer, or a Hub id.
            revision: Branch, tag or commit on the Hub; null is its main branch. Ignored for a folder.
            dtype: Of the weights in memory, one of `DTYPES`.
            pad_token: "unk", "eos", a token of the vocabulary, or null for the tokenizer's own.
            attn_implementation: As transformers names it, one of `ATTENTION`.
            gradient_checkpointing: Recompute activations in the backward pass (in train mode only).
            trust_remote_code: Execute Python code that the checkpoint brings along.
            context_length: Positions the model was trained for.
            parameters: Weights in all, for the plan's estimates.
            published: The model's name in published tables, null if in none.
            kernels: Of norms, rotary positions and gated layers, one of `kernels.KINDS`; put in by whoever trains.
            quantization: "nf4": linear layers but the output layer hold 4-bit weights, which cannot train (QLoRA).
            architecture: `model_type` and the sizes of its config.json, for `skeleton` of a Hub id.
        """
        self.name = name
        self.path = path
        self.revision = revision
        self.dtype = dtype
        self.pad_token = pad_token
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.trust_remote_code = trust_remote_code
        self.context_length = context_length
        self.parameters = parameters
        self.published = published
        self.architecture = dict(architecture or {})
        self.quantization = quantization
        self.kernels = kernels
        self._fetched: dict[bool, Path] = {}

    @property
    def folder(self) -> Path | None:
        """The local folder, None if `path` is a Hub id."""
        return checkpoint.local_folder(self.path) if self.path else None

    def problems(self) -> list[str]:
        """List what is known to be wrong before anything is loaded."""
        found = setting_problems(self.dtype, self.attn_implementation) + quantization_problems(self.quantization)
        found += checkpoint.path_problems(self.path, self.revision)
        if not found and self.folder is not None:
            found += self._format_problems(self.folder)
        return found

    def identity(self) -> dict[str, Any]:
        """Say which weights and tokenizer these are, for the keys of stored results; loads nothing.

        A Hub id is known by the commit that the cache holds of it; `load_tokenizer` fetches that first.
        """
        if self.folder is not None and self.folder.is_dir():
            source = {"folder": checkpoint.folder_identity(self.folder)}
        else:
            commit = checkpoint.cached_commit(str(self.path), self.revision)
            source = {"path": self.path, "revision": commit or self.revision}
        return source | {"dtype": self.dtype, "pad_token": self.pad_token, "loader": type(self).__name__}

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer with the declared pad token.

        Raises:
            ConfigError: If it cannot be loaded, has no end token or not the declared pad token.
        """
        self._check()
        with loading(self.name, self.path):
            tokenizer = self._read_tokenizer()
        return prepare_tokenizer(tokenizer, self.pad_token, self.name)

    def load(self) -> "PreTrainedModel":
        """Load the model on the CPU, in eval mode.

        Raises:
            ConfigError: If it cannot be loaded, lacks weights, or its vocabulary is smaller than the tokenizer's.
        """
        self._check()
        with loading(self.name, self.path):
            model = self._read_model()
        return finish_model(model, self.load_tokenizer(), self.gradient_checkpointing, self.name)

    def dropout(self) -> bool:
        """Whether the checkpoint's configuration asks for dropout of any kind in training."""
        found = self._skeleton_config().to_dict()
        return any(
            ("dropout" in key or "pdrop" in key) and value not in (None, False, 0) for key, value in found.items()
        )

    def skeleton(self) -> "PreTrainedModel":
        """Build the model on torch's meta device: shapes and types without weights, files or network.

        Raises:
            ConfigError: If neither a local config.json nor model.architecture says what the model is.
        """
        if found := setting_problems(self.dtype, self.attn_implementation):
            raise ConfigError(problem_list(found))
        with loading(self.name, "model.architecture", "It needs the model_type and the sizes of config.json."):
            return meta_model(self._skeleton_config(), self.dtype)

    def local_tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """Load the tokenizer if it is on this machine, None if it would have to be fetched or cannot be read."""
        if self.folder is None and not self._fetched.get(False):
            cached = checkpoint.cached_tokenizer(self.path, self.revision) if self.path else None
            if cached is None:
                return None
            self._fetched[False] = cached
        try:
            with loading(self.name, self.path):
                return prepare_tokenizer(self._read_tokenizer(), self.pad_token, self.name)
        except ConfigError as error:
            log.info("%s", error)
            return None

    def _skeleton_config(self) -> "PretrainedConfig":
        from transformers import AutoConfig

        if self.folder is not None and (self.folder / "config.json").is_file():
            return AutoConfig.from_pretrained(str(self.folder), trust_remote_code=self.trust_remote_code)
        return architecture_config(self.name, self.architecture)

    def _check(self) -> None:
        if found := self.problems():
            raise ConfigError(problem_list(found))

    def _format_problems(self, folder: Path) -> list[str]:
        return checkpoint.remote_code_problems(folder, self.trust_remote_code)

    def _read_tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        folder = self._files(weights=False)
        if (folder / "tokenizer.json").is_file() and not self.trust_remote_code:
            # Taken as it is. AutoTokenizer rebuilds it for some classes and then drops parts: the split of numbers into
            # digits of SmolLM2, for one, whose configuration names GPT2Tokenizer.
            return PreTrainedTokenizerFast.from_pretrained(str(folder))
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=self.trust_remote_code)

    def _read_model(self) -> "PreTrainedModel":
        import torch
        from transformers import AutoModelForCausalLM

        folder = self._files(weights=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=getattr(torch, self.dtype),
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            use_safetensors=checkpoint.weight_files(folder)[0].suffix == ".safetensors",
            output_loading_info=True,
            **quantization_arguments(self.quantization, self.dtype),
        )
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise ConfigError(
                f"model={self.name}: {self.path} lacks {len(missing)} of the weights of {type(model).__name__}, "
                f"{missing[0]} among them; they would be random. Set model.path to a complete checkpoint."
            )
        return model

    def _files(self, *, weights: bool) -> Path:
        """Return the folder with the files: `path` itself, or what the Hub has, downloaded to its cache.

        Everything is fetched here and loaded from the folder, so that a repository is checked like a folder, and an
        unreachable Hub costs one request: `from_pretrained` would retry for 23 s on each of several files.
        """
        if self.folder is not None:
            return self.folder
        if not self._fetched.get(weights):
            folder = checkpoint.fetch(str(self.path), self.revision, weights=weights, code=self.trust_remote_code)
            if found := checkpoint.folder_problems(folder, weights=weights) or self._format_problems(folder):
                raise ConfigError(problem_list(found))
            self._fetched[weights] = folder
        return self._fetched[weights]


def architecture_config(name: str, architecture: Mapping[str, Any]) -> "PretrainedConfig":
    """Make a configuration of `model_type` and sizes.

    Raises:
        ConfigError: If there are none.
    """
    from transformers import AutoConfig

    if not architecture.get("model_type"):
        raise ConfigError(
            f"model={name}: model.architecture is empty, so the model's size is unknown without its files. Set it as "
            "in conf/model/llama2_7b_chat.yaml, or model.path to a local folder with config.json."
        )
    return AutoConfig.for_model(**architecture)


def meta_model(config: "PretrainedConfig", dtype: str) -> "PreTrainedModel":
    """Build a model on the meta device; eager attention, because other kernels are refused where they are absent."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=getattr(torch, dtype))
    return model.eval()


def setting_problems(dtype: str, attn_implementation: str) -> list[str]:
    """Check the settings that all kinds of models share."""
    found = []
    if dtype not in DTYPES:
        found.append(f"model.dtype={dtype!r} is none of {', '.join(DTYPES)}.")
    if attn_implementation not in ATTENTION:
        found.append(f"model.attn_implementation={attn_implementation!r} is none of {', '.join(ATTENTION)}.")
    return found


def prepare_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", pad_token: str | None, name: str
) -> "PreTrainedTokenizerBase":
    """Set the declared pad token and exact decoding, in place; never adds a token.

    Raises:
        ConfigError: If there is no end token, or no such pad token.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model={name}: its tokenizer has no end token (eos_token), so no answer could be ended.")
    if pad_token is not None:
        token = {"unk": tokenizer.unk_token, "eos": tokenizer.eos_token}.get(pad_token, pad_token)
        if token is None or token not in tokenizer.get_vocab():
            raise ConfigError(
                f"model.pad_token={pad_token!r}: the tokenizer of model={name} has no such token. "
                "Use eos, unk, or a token of its vocabulary."
            )
        tokenizer.pad_token = token
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"model.pad_token=null, but the tokenizer of model={name} has no pad token of its own. "
            "Set model.pad_token to eos, unk, or a token of its vocabulary that no text uses."
        )
    # Some checkpoints ask for it; it turns "don 't" into "don't" and so changes code and answers.
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def finish_model(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", gradient_checkpointing: bool, name: str
) -> "PreTrainedModel":
    """Check the vocabulary, drop the checkpoint's sampling settings, switch to eval mode; in place.

    Raises:
        ConfigError: If the tokenizer can produce ids that the embedding does not have.
    """
    from transformers import GenerationConfig

    _check_vocabulary(model, tokenizer, name)
    given = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends: list[Any] = [] if given is None else [given] if isinstance(given, int) else list(given)
    if tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
    )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.eval()


def _check_vocabulary(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    embeddings: Any = model.get_input_embeddings()
    size = embeddings.num_embeddings
    outside = sorted(token for token, number in tokenizer.get_vocab().items() if number >= size)
    needed = {str(tokenizer.special_tokens_map.get(f"{kind}_token")) for kind in ("bos", "eos", "pad", "unk")}
    # Gemma 3 1B shares its tokenizer with the larger models and has no row for their image token.
    if needed.isdisjoint(outside) and set(outside) <= set(tokenizer.all_special_tokens):
        if outside:
            log.warning("model=%s has no embedding for %s; do not use them in texts.", name, ", ".join(outside))
        return
    raise ConfigError(
        f"model={name}: the tokenizer has {len(outside)} tokens ({', '.join(outside[:3])}, ...) beyond the model's "
        f"vocabulary of {size}. Model and tokenizer do not belong together; the vocabulary is never resized."
    )


@contextmanager
def loading(name: str, path: Any, advice: str = ADVICE) -> Iterator[None]:
    """Turn whatever goes wrong while files are fetched and read into a ConfigError: a short reason and the advice."""
    try:
        yield
    except TraceHydraError:
        raise
    # Broad on purpose: tokenizers raises bare Exception, the Hub client and safetensors types of their own.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines[0] if lines else type(error).__name__)[:300]
        if "trust_remote_code" in str(error):
            reason = "it needs its own Python code; if you trust its source, set model.trust_remote_code=true"
        raise ConfigError(f"model={name}: could not load {path}: {reason.rstrip('.')}. {advice}") from error
