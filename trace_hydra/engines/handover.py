"""A model's weights for an engine outside this model: as plain tensors, or as a folder that transformers loads."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trace_hydra.engines.base import State
from trace_hydra.errors import EngineError, StoreError
from trace_hydra.keys import digest
from trace_hydra.models.generate import end_ids
from trace_hydra.store import drafts


def active_adapters(model: nn.Module) -> list[str]:
    """List the adapters that take part in the model's answers; [] without any."""
    wrapped: Any = model
    if not hasattr(model, "peft_config") or wrapped.get_model_status().enabled is False:
        return []
    return sorted(wrapped.active_adapters)


def changes(model: nn.Module) -> int:
    """Count what was written into the weights so far: another number, other weights (`.data` goes unseen)."""
    return sum(one._version for one in model.parameters())


def base_model(model: nn.Module) -> Any:
    """Take the model of transformers out of PEFT's wrapper.

    Raises:
        EngineError: If it is none.
    """
    from transformers import PreTrainedModel

    inner = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    if not isinstance(inner, PreTrainedModel):
        raise EngineError(f"{type(inner).__name__} is no model that transformers can load again. Use engine=hf.")
    return inner


def plain_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights under the start model's names, layer by layer, adapters merged; the model stays as it is.

    Raises:
        EngineError: If an adapter is no plain LoRA on a linear layer.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    inner = base_model(model)
    adapted = {name: one for name, one in inner.named_modules() if isinstance(one, BaseTunerLayer)}
    for key, tensor in inner.state_dict().items():
        layer, found, rest = key.partition(".base_layer.")
        if found and layer in adapted:
            yield f"{layer}.{rest}", _merged(layer, adapted[layer], tensor) if rest == "weight" else tensor
        elif not any(key.startswith(f"{name}.") for name in _parents(key) if name in adapted):
            yield key, tensor


def _parents(key: str) -> Iterator[str]:
    parts = key.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))


def _merged(name: str, layer: Any, weight: Tensor) -> Tensor:
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer) or not isinstance(layer.get_base_layer(), nn.Linear) or layer.lora_variant:
        raise EngineError(
            f"{name} has an adapter of {type(layer).__name__} that is no plain LoRA; it cannot be merged. Use "
            "engine=hf."
        )
    active = [one for one in layer.active_adapters if one in layer.lora_A]
    if layer.merged or layer.disable_adapters or not active:
        return weight
    total = weight.detach().float()
    for one in active:
        total = total + layer.get_delta_weight(one).detach().float()  # type: ignore[attr-defined]
    return total.to(weight.dtype)


def write_model(model: nn.Module, tokenizer: Any, folder: Path, *, weights: bool = True) -> None:
    """Write a folder that `from_pretrained` loads: the model with its adapters merged, and the tokenizer.

    What the folder says of decoding is the neutral sampling; a request for greedy answers says so itself.

    Args:
        model: Stays as it is.
        tokenizer: Its tokenizer.
        folder: Exists.
        weights: Whether to write them; else configuration and tokenizer only.
    """
    from transformers import GenerationConfig

    inner = base_model(model)
    config = inner.config
    before = {key: getattr(config, key, None) for key in ("architectures", "dtype", "_name_or_path")}
    try:
        config._name_or_path = ""
        if weights:
            inner.save_pretrained(folder, state_dict=dict(plain_weights(model)))
        else:
            config.architectures, config.dtype = [type(inner).__name__], inner.dtype
            config.save_pretrained(folder)
    finally:
        for key, value in before.items():
            setattr(config, key, value)
    tokenizer.save_pretrained(folder)
    ends = end_ids(model, tokenizer)
    GenerationConfig(
        do_sample=True, top_k=0, bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=ends[0]
    ).save_pretrained(folder)


class Folders:
    """Folders for others to read, one at a time.

    Unless they are kept they lie among the store's drafts, which removes those of processes that have died.

    Args:
        root: Of the store.
        keep: Whether a folder stays, in `<root>/served/<key>`, and is used again by whoever has the same weights.
    """

    def __init__(self, root: str, keep: bool):
        self.root, self.keep = Path(root).expanduser(), keep
        self._at: tuple[str | None, int, Path] | None = None
        """Key, `changes` of the model, folder."""

    def model(self, state: State | None, model: nn.Module, tokenizer: Any) -> Path:
        """Give the folder of the model as it is now; written where `state` does not say that it is there."""
        key = digest([state.key, active_adapters(model)]) if state else None
        now = changes(model)
        if key is None or self._at is None or self._at[:2] != (key, now):
            other = self._at is not None and self._at[0] == key  # the weights are no longer those of the state
            self.close()
            path = self._write(None if other else key, lambda folder: write_model(model, tokenizer, folder))
            self._at = (key, now, path)
        return self._at[2]

    def other(self, write: Any) -> Path:
        """Make a folder of its own; whoever asked for it removes it."""
        return self._write(None, write)

    def close(self) -> None:
        """Remove the folder, unless it is kept."""
        if self._at is not None and self._at[2].parent.name == "drafts":
            shutil.rmtree(self._at[2], ignore_errors=True)
        self._at = None

    def _write(self, key: str | None, write: Any) -> Path:
        kept = self.root / "served" / key if self.keep and key else None
        if kept is not None and kept.is_dir():
            return kept
        draft = None
        try:
            draft = drafts.begin(self.root, f"served-{key or 'now'}")
            write(draft)
            for path in draft.rglob("*.safetensors"):
                path.chmod(draft.stat().st_mode & 0o666)  # made readable for their maker only
            if kept is None:
                return draft.absolute()
            kept.parent.mkdir(exist_ok=True)
            with suppress(OSError):  # another process was first
                os.rename(draft, kept)
            return kept.absolute()
        except BaseException as error:
            if draft is not None:
                shutil.rmtree(draft, ignore_errors=True)
            if isinstance(error, OSError):
                raise StoreError(
                    f"engine.folder={self.root}: the model cannot be written: {error.strerror or error}. Free space, "
                    "or set engine.folder."
                ) from error
            raise
