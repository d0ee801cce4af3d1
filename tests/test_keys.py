"""Every leaf of the configuration changes a key of the store, or stands on the list of what does not matter (R16)."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, compose_config
from omegaconf import DictConfig, OmegaConf

from trace_hydra import build, inputs
from trace_hydra.errors import TraceHydraError
from trace_hydra.prepare import prepare

BASE = [
    "debug=smoke", "task_order=[FOMC,Py150]", "logger=none", "callbacks=none", "capability=none", "seed=3",
    "data.rows.train=4", "data.rows.test=2",
]  # fmt: skip
# Together they have every option whose leaves differ: sampling makes the generation seed count, lfpt5 generates while
# it trains, replay has alignment rows.
CONFIGS = {
    "seqft": [*BASE, "method=seqft"],
    "ewc, lora, sampled": [*BASE, "method=ewc", "tuning=lora", "protocol=official", "protocol.max_prompt_tokens=128"],
    "replay": [*BASE, "method=replay"],
    "icl": [*BASE, "method=icl"],
    "lfpt5": [*BASE, "method=lfpt5"],
}
OTHER = {
    "optim.schedule": "linear", "protocol.prompt": None, "protocol.truncation": ("middle", "left"),
    "protocol.special_tokens": ("text", "parse"), "protocol.scoring": ("official", "corrected"),
    "protocol.splitter": ("ours", "re_eval"), "protocol.closed_answers": ("generate", "log_likelihood"),
    "evaluation.cells": ("all", "seen"), "on_nonfinite": "skip_batch",
    "on_oom": "halve", "trainer.precision": "bf16-mixed", "model.attn_implementation": ("eager", "sdpa"),
    "model.dtype": "bfloat16", "method.when": ("mixed", "after"), "method.fisher_reduction": ("mean", "sum"),
    "store.keep": "last", "trainer.accelerator": ("auto", "cpu"), "tuning.init": ("normal", "vocabulary"),
    "capability.when": "every_stage",
}  # fmt: skip
"""Leaves that take one of a few words: another one, or both."""
NOT_FREE = (
    # the class of a part, and how it is called: another one is another part, with other leaves
    "*._target_", "*._partial_", "*._convert_",
    # without a chat template, with one device: any other value is refused
    "protocol.prompt", "trainer.devices",
    # only where it is set at all
    "model.published", "task_order.shuffle",
)  # fmt: skip
UNUSED = {
    "seqft": ("protocol.decoding.temperature", "protocol.decoding.top_p"),
}


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    if isinstance(node, dict) and node:
        return {key: value for name, one in node.items() for key, value in leaves(one, f"{path}{name}.").items()}
    if isinstance(node, list) and node:
        return {key: value for at, one in enumerate(node) for key, value in leaves(one, f"{path}{at}.").items()}
    return {path.rstrip("."): node}


def other(leaf: str, value: Any) -> Any:
    """Another value of the same type; None if there is none."""
    for pattern, choice in OTHER.items():
        if leaf == pattern:
            choices = choice if isinstance(choice, tuple) else (choice,)
            return next((one for one in choices if one != value), None)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1 if not leaf.endswith(("batch_size", "hidden_size", "num_heads")) else value * 2
    if isinstance(value, float):
        return value / 2 if value else 0.25
    return f"{value}x" if isinstance(value, str) else None


def keys_of(config: DictConfig, directory: Path) -> set[str]:
    """All keys of the run; its directory plays no part."""
    prepared = prepare(config, build.validate(config), directory)
    return {*(stage.key for stage in prepared.run.stages), *prepared.run.answers.values()}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_leaf_changes_a_key_or_is_listed(name, tmp_path):
    config = compose_config([*CONFIGS[name], f"paths.runs={tmp_path}"])
    known = keys_of(config, tmp_path)
    missed, flipped = [], 0
    for leaf, value in leaves(OmegaConf.to_container(config, resolve=True)).items():
        if inputs.without_effect(leaf) or any(Path(leaf).match(pattern) for pattern in NOT_FREE):
            continue
        new = other(leaf, value)
        if new is None:
            assert value is None or leaf in OTHER or value in ([], {}), f"no other value for {leaf}={value!r}"
            continue
        changed = config.copy()
        OmegaConf.update(changed, leaf, new, force_add=True)
        try:
            found = keys_of(changed, tmp_path)
        except TraceHydraError:
            continue  # a value that no run can have
        flipped += 1
        sampled = config.protocol.decoding.do_sample or name in ("icl", "lfpt5")
        if not found - known and (sampled or leaf not in inputs.WHERE_DRAWN):
            missed.append(f"{leaf}: {value!r} -> {new!r}")
    assert not missed and flipped > 25


@pytest.mark.parametrize(
    "override",
    [
        "paths.data=/elsewhere", "paths.runs=/tmp/elsewhere", "store.keep=last", "checkpoint.every_s=5",
        "checkpoint.every_steps=1", "on_oom=halve", "model.name=other", "task_order.name=other",
        "evaluation.bootstrap_samples=7", "sweep.fail_fast=true", "protocol.name=other", "method.name=other",
    ],
)  # fmt: skip
def test_what_is_listed_changes_no_key(override, tmp_path):
    base = compose_config([*CONFIGS["seqft"], f"paths.runs={tmp_path}"])
    changed = base.copy()
    key, value = override.split("=")
    OmegaConf.update(changed, key, OmegaConf.create({"value": value})["value"])
    changed.paths.runs = str(tmp_path)
    assert inputs.without_effect(key) and keys_of(base, tmp_path) == keys_of(changed, tmp_path)


def test_closed_answers_are_in_the_keys_of_those_answers_alone(tmp_path):
    """FOMC's answers get other keys, Py150's and the stages keep theirs; the fingerprint tells the protocols apart."""
    runs = []
    for value in ("generate", "log_likelihood"):
        overrides = [*CONFIGS["seqft"], f"paths.runs={tmp_path}", f"protocol.closed_answers={value}"]
        config = compose_config(overrides)
        runs.append(prepare(config, build.validate(config), tmp_path).run)
    first, second = runs
    assert [stage.key for stage in first.stages] == [stage.key for stage in second.stages]
    assert first.fingerprint != second.fingerprint
    for (row, task), key in first.answers.items():
        assert (key == second.answers[row, task]) == (task == "Py150")


def test_first_stages_are_shared_by_orders_that_begin_alike(tmp_path):
    """[A, B, C] and [A, B, D] share two stages and row 0; [B, A] shares row 0 of A and B alone."""
    runs = {}
    for order in ("FOMC,Py150,NumGLUE-cm", "FOMC,Py150,NumGLUE-ds", "Py150,FOMC"):
        config = compose_config([*BASE, "method=seqft", f"task_order=[{order}]", f"paths.runs={tmp_path}"])
        runs[order] = prepare(config, build.validate(config), tmp_path).run
    first, second, third = runs.values()
    keys = [[stage.key for stage in run.stages] for run in (first, second, third)]
    assert keys[0][:2] == keys[1][:2] and keys[0][2] != keys[1][2] and not set(keys[2]) & set(keys[0])
    for task in ("FOMC", "Py150"):
        assert first.answers[0, task] == second.answers[0, task] == third.answers[0, task]
        assert first.answers[2, task] == second.answers[2, task] != third.answers[2, task]


@pytest.mark.parametrize("name", ["icl", "single_task"])
def test_stages_that_stand_apart_are_shared_by_all_orders(name, tmp_path):
    found = []
    for order in ("FOMC,Py150,NumGLUE-cm", "NumGLUE-cm,FOMC"):
        config = compose_config([*BASE, f"method={name}", f"task_order=[{order}]", f"paths.runs={tmp_path}"])
        run = prepare(config, build.validate(config), tmp_path).run
        found.append({stage.task: (stage.key, run.answers[stage.index, stage.task]) for stage in run.stages})
    assert all(found[0][task] == found[1][task] for task in found[1])


def test_methods_share_how_the_start_model_answers(tmp_path):
    """Those that change nothing before training, under full tuning; in-context learning has prompts of its own."""
    found = {}
    for name in ("seqft", "ewc", "replay", "gem", "icl"):
        config = compose_config([*BASE, f"method={name}", f"paths.runs={tmp_path}"])
        found[name] = prepare(config, build.validate(config), tmp_path).run.answers[0, "FOMC"]
    assert len({found[name] for name in ("seqft", "ewc", "replay", "gem")}) == 1 and found["icl"] != found["seqft"]


def test_the_length_of_a_run_counts_only_where_a_method_may_know_it(tmp_path):
    """olora's first stage is the same in a longer run; osf scales by the number of stages."""
    for name, shared in (("olora", True), ("osf", False)):
        keys = []
        for order in ("FOMC,Py150", "FOMC,Py150,NumGLUE-cm"):
            config = compose_config([*BASE, f"method={name}", f"task_order=[{order}]", f"paths.runs={tmp_path}"])
            keys.append(prepare(config, build.validate(config), tmp_path).run.stages[0].key)
        assert (keys[0] == keys[1]) == shared


def test_the_source_of_a_method_from_elsewhere_is_in_the_key(tmp_path, monkeypatch):
    """Another file, the same class and the same configuration: another key."""
    import importlib
    import sys

    monkeypatch.syspath_prepend(str(tmp_path))
    keys = []
    for number in (1, 2):
        text = f"from trace_hydra.methods.base import Method\n\n\nclass Mine(Method):\n    factor = {number}\n"
        (tmp_path / "mine_method.py").write_text(text)
        sys.modules.pop("mine_method", None)
        importlib.invalidate_caches()
        overrides = ["method._target_=mine_method.Mine", "+trust.targets=[mine_method.]"]
        config = compose_config([*BASE, "method=seqft", f"paths.runs={tmp_path}", overrides[0]])
        config.trust.targets = ["mine_method."]
        keys.append(prepare(config, build.validate(config), tmp_path).run.stages[0].key)
    assert keys[0] != keys[1]


def test_the_start_weights_and_the_tokenizer_are_in_the_key(tmp_path):
    """One byte in the middle of a weight file, one of the tokenizer: other keys; another folder: the same."""
    from trace_hydra.models.tiny import Tiny

    node = compose_config(["model=tiny"]).model
    tiny = Tiny(**{key: value for key, value in node.items() if not key.startswith("_")})
    folder = tmp_path / "model"
    tiny.load().save_pretrained(folder)
    tiny.load_tokenizer().save_pretrained(folder)

    def key(path: Path) -> str:
        overrides = [*BASE, "method=seqft", "model=llama2_7b_chat", f"model.path={path}", f"paths.runs={tmp_path}"]
        config = compose_config([*overrides, "model.context_length=4096", "model.pad_token=null"])
        return prepare(config, build.validate(config), tmp_path).run.stages[0].key

    import shutil

    first = key(folder)
    shutil.copytree(folder, tmp_path / "moved")
    assert key(tmp_path / "moved") == first
    weights = tmp_path / "moved" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(raw)
    assert key(tmp_path / "moved") != first
    shutil.copytree(folder, tmp_path / "again")
    settings = tmp_path / "again" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "note": 1}))
    assert key(tmp_path / "again") != first
    assert ROOT.is_dir()
