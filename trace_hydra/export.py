"""A stage of a run as a Hugging Face folder: a whole model, adapters, or a soft prompt as PEFT has it.

Nothing of this package is needed to load it.
"""

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trace_hydra.errors import MethodError, StoreError
from trace_hydra.export_card import Written, card_text
from trace_hydra.export_source import Served, Source, open_run
from trace_hydra.files import write_bytes
from trace_hydra.live import WEIGHTS
from trace_hydra.models.generate import end_ids
from trace_hydra.models.prompts import VirtualTokens


def export(
    directory: Path,
    out: Path,
    *,
    store: Path | None = None,
    stage: int | str | None = None,
    merge: bool = False,
    base: str | None = None,
    settings: Sequence[str] = (),
    trust: Sequence[str] = (),
) -> Path:
    """Write a stage to a new folder; it appears whole or not at all.

    Args:
        directory: Of the run, finished or not.
        out: The folder.
        store: None: the run's `paths.store`.
        stage: From 1, or the beginning of a stage's key; None: the last; 0: the start model.
        merge: Whether adapters are merged into the weights.
        base: Hub id or folder of the start model, for adapter_config.json; None: the run's Hub id, if it has one.
        settings: As for `open_run`.
        trust: As for `open_run`.

    Raises:
        TraceHydraError: If the stage is not stored, cannot be loaded without its method's code, or the start model is
            another than it was trained from.
    """
    if out.exists() or out.is_symlink():
        raise StoreError(f"{out} exists; name a folder that does not.")
    draft = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}"
    try:
        draft.mkdir(parents=True)
        source = open_run(directory, store=store, settings=settings, trust=trust, scratch=out.parent)
        row = source.row_of(stage)
        base = base or _hub_id(source)
        with source.serving(row) as served:
            _write_generation(served.model, source, draft)
            written = _write_model(served, source, draft, merge, base)
            source.tokenizer.save_pretrained(draft)
            text = card_text(source, row, served.entry, written, base)
        write_bytes(text.encode(), draft / "README.md")
        mode = (draft / "README.md").stat().st_mode  # safetensors makes files that nobody else may read
        for path in draft.rglob("*.safetensors"):
            path.chmod(mode)
        os.rename(draft, out)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out


def _write_model(served: Served, source: Source, draft: Path, merge: bool, base: str | None) -> Written:
    """Write weights and configuration in the form that the model has.

    Raises:
        MethodError: If no such form is what the run answers with.
    """
    from peft import PeftModel
    from transformers import PreTrainedModel

    model, method = served.model, source.parts.method
    name = type(method).__name__
    if isinstance(model, PeftModel):
        active = tuple(model.active_adapters)
        adapters = tuple(model.peft_config)
        if not merge:
            return _write_adapters(served, source, draft, base)
        if method.picks_by_prompt and len(adapters) > 1:
            raise MethodError(
                f"--merge: {name} picks one of {len(adapters)} adapters for each prompt, so no single model answers as "
                "the run did. Leave --merge out to get the adapters."
            )
        model = model.merge_and_unload(adapter_names=list(active))
    elif merge:
        raise MethodError(f"--merge: tuning={source.parts.tuning.name} has no adapters to merge.")
    if served.entry is not None and isinstance(model.get_input_embeddings(), VirtualTokens):
        return _write_prompt(served, source, draft, base)
    if not isinstance(model, PreTrainedModel):
        raise MethodError(f"{name} answers with a {type(model).__name__}, which transformers cannot load.")
    model.config._name_or_path = ""
    model.save_pretrained(draft)
    return Written("model")


def _write_adapters(served: Served, source: Source, draft: Path, base: str | None) -> Written:
    """Write all adapters: "default" to the folder itself, the others to folders of their names."""
    model = served.model
    assert served.entry is not None
    with safe_open(str(served.entry.file(WEIGHTS)), framework="pt") as file:  # type: ignore[no-untyped-call]
        changed = [name for name in file.keys() if f".{model.base_model.prefix}" not in name]  # noqa: SIM118
    if changed:
        raise MethodError(
            f"{type(source.parts.method).__name__} changed {len(changed)} of the start model's own weights, "
            f"{changed[0]} among them: adapters alone are not its model. Export the whole with --merge."
        )
    _save_peft(model, draft, base)
    return Written("adapters", tuple(model.peft_config), tuple(model.active_adapters))


def _write_prompt(served: Served, source: Source, draft: Path, base: str | None) -> Written:
    """Write the soft prompt before every row as an adapter of PEFT's prompt tuning."""
    from peft import PromptTuningConfig, TaskType, get_peft_model

    model, method = served.model, source.parts.method
    if method.picks_by_prompt or not served.prefix:
        why = "picks soft prompts for each row" if method.picks_by_prompt else "has no soft prompt at this stage"
        raise MethodError(f"{type(method).__name__} {why}; PEFT's prompt tuning has one prompt for all rows.")
    tokens: VirtualTokens = model.get_input_embeddings()
    rows = torch.cat([tokens.vectors(name) for name in tokens.tables]).detach()
    vectors = rows[torch.tensor(served.prefix) - tokens.first]
    model.set_input_embeddings(tokens.embedding)
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(vectors))
    wrapped = get_peft_model(model, config)
    wrapped.prompt_encoder["default"].embedding.weight.data = vectors.clone()  # type: ignore[union-attr, index]
    _save_peft(wrapped, draft, base)
    return Written("prompt", ("default",), ("default",))


def _save_peft(model: Any, draft: Path, base: str | None) -> None:
    """Save adapters without the place where the base model lay."""
    # Left to itself PEFT asks the Hub whether the base's vocabulary was extended; it never is.
    model.save_pretrained(draft, save_embedding_layers=False)
    for path in draft.rglob("adapter_config.json"):
        content = {**json.loads(path.read_text(encoding="utf-8")), "base_model_name_or_path": base}
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_generation(model: Any, source: Source, draft: Path) -> None:
    """Write how the run's protocol decodes, as the model's own settings."""
    from transformers import GenerationConfig

    decoding, tokenizer = source.config.protocol.decoding, source.tokenizer
    ends = end_ids(model, tokenizer)
    settings: dict[str, Any] = {"do_sample": False}
    if decoding.do_sample:
        settings = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    if decoding.max_new_tokens is not None:
        settings["max_new_tokens"] = decoding.max_new_tokens
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    model.generation_config.save_pretrained(draft)


def _hub_id(source: Source) -> str | None:
    """The start model's id on the Hub; None if it is a folder, or comes from elsewhere."""
    model = source.parts.model
    return model.path if getattr(model, "path", None) and model.folder is None else None
