"""Exported stages, loaded by plain transformers and PEFT in an interpreter that never sees this package."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import compose_config, run_tiny
from omegaconf import OmegaConf

from trace_hydra.errors import ConfigError, MethodError, StoreError
from trace_hydra.export import export
from trace_hydra.models.attention import by_pytorch
from trace_hydra.models.prompts import VirtualTokens
from trace_hydra.store.__main__ import main
from trace_hydra.store.entries import Store

ORDER = "task_order=[FOMC,Py150]"
FAST = "optim.optimizer.lr=0.05"
"""So large that a trained model cannot be taken for the start model."""
TEXT = "What is 12 + 30?\nAnswer:"
LOADER = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

found = {}
for name, base in json.loads(sys.argv[1]).items():
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(base or name)
    if base:
        model = PeftModel.from_pretrained(model, name)
        for other in json.loads(sys.argv[3]).get(name, []):
            model.load_adapter(f"{name}/{other}", other)
            model.base_model.set_adapter(["default", other])
    ids = tokenizer(sys.argv[2], return_tensors="pt")
    settings = GenerationConfig.from_pretrained(name, max_new_tokens=8)
    with torch.no_grad():
        logits = model.eval()(**ids).logits[0, -ids["input_ids"].shape[1]:]  # PEFT gives a soft prompt's too
        text = model.generate(**ids, generation_config=settings)[0, ids["input_ids"].shape[1]:]
    found[name] = {"logits": logits, "text": text, "ids": ids["input_ids"][0]}
assert "trace_hydra" not in sys.modules
torch.save(found, "found.pt")
"""


def run(folder, *overrides):
    """A tiny run as the command line leaves it; `logits` and `text` are those of its own model after each stage."""
    seen = run_tiny(folder, [ORDER, FAST, "evaluation=diagonal_last", "evaluation.row0=false", *overrides])
    (seen.directory / ".hydra").mkdir()
    OmegaConf.save(seen.config, seen.directory / ".hydra" / "config.yaml")
    return seen


def own(seen):
    """Logits and greedy continuation of TEXT by the run's model, which is still in memory after its last stage."""
    ctx, method = seen.ctx, seen.method
    ids = ctx.tokenizer(TEXT)["input_ids"]
    _, prefixes = next(iter(method.serve(ctx, [TEXT])))
    prefix = list(prefixes[0])
    ctx.model.eval()
    with torch.no_grad(), by_pytorch(ctx.model):
        logits = ctx.model(input_ids=torch.tensor([[*prefix, *ids]])).logits[0, len(prefix) :]
    ctx.generated.clear()
    text = ctx.generate([TEXT], 8, prefixes=[prefix])[0]
    return SimpleNamespace(logits=logits, text=text, ids=ids)


def load_elsewhere(root, out, others=None):
    """Export runs and load the folders in a fresh interpreter.

    Args:
        root: Where folders go.
        out: Name -> (run, settings of the export, folder of the base model or None).
        others: Name -> adapters to switch on beside "default".
    """
    first = next(iter(out.values()))[0]
    export(first.directory, root / "base", stage=0)
    for name, (seen, settings, _) in out.items():
        assert export(seen.directory, root / name, **settings) == root / name
    bases = {name: base for name, (_, _, base) in out.items()}
    subprocess.run(
        [sys.executable, "-c", LOADER, json.dumps(bases), TEXT, json.dumps(others or {})],
        check=True, cwd=root, env={"PATH": "", "HF_HUB_OFFLINE": "1", "HOME": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    runs = {name: one[0] for name, one in out.items()}
    return SimpleNamespace(root=root, runs=runs, found=torch.load(root / "found.pt"), start=run_start(first))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    whole = run(root / "a", "method=seqft", "tuning=full")
    adapter = run(root / "b", "method=lora", "tuning=lora")
    prompt = run(root / "c", "method=seqft", "tuning=prompt")
    out = {
        "whole": (whole, {}, None), "adapter": (adapter, {}, "base"), "merged": (adapter, {"merge": True}, None),
        "prompt": (prompt, {}, "base"),
    }  # fmt: skip
    return load_elsewhere(root, out)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """An adapter a task, all active; a soft prompt a task, all joined; adapters that are merged as the run goes on."""
    root = tmp_path_factory.mktemp("several")
    adapters = run(root / "a", "method=olora", "tuning=lora")
    joined = run(root / "b", "method=pp", "tuning=prompt", "method.task_id=false", "method.prompt_length=3")
    merging = run(root / "c", "method=slora", "tuning=lora")
    out = {
        "adapters": (adapters, {}, "base"), "adapters_merged": (adapters, {"merge": True}, None),
        "joined": (joined, {}, "base"), "merging": (merging, {"merge": True}, None),
    }  # fmt: skip
    return load_elsewhere(root, out, {"adapters": ["stage_2"]})


def run_start(seen):
    """Logits of the start model."""
    model = seen.parts.model.load()
    with torch.no_grad():
        return model(input_ids=torch.tensor([seen.ctx.tokenizer(TEXT)["input_ids"]])).logits[0]


def assert_same(loaded, name, tolerance):
    ours, theirs = own(loaded.runs[name]), loaded.found[name]
    assert theirs["ids"].tolist() == ours.ids
    torch.testing.assert_close(theirs["logits"], ours.logits, rtol=tolerance, atol=tolerance)
    assert (theirs["logits"] - loaded.start).abs().max() > 0.1  # not the start model's
    text = loaded.runs[name].ctx.tokenizer.decode(theirs["text"], skip_special_tokens=True)
    assert text == ours.text


# PEFT adds a soft prompt in one piece: other kernels, other rounding; merging adds B A to W first.
@pytest.mark.parametrize(("name", "tolerance"), [("whole", 0), ("adapter", 0), ("prompt", 1e-5), ("merged", 1e-4)])
def test_a_folder_gives_the_logits_and_the_text_of_the_run(loaded, name, tolerance):
    assert_same(loaded, name, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tolerance"), [("adapters", 0), ("adapters_merged", 1e-4), ("joined", 1e-5), ("merging", 1e-4)]
)
def test_methods_with_adapters_or_prompts_of_their_own(several, name, tolerance):
    assert_same(several, name, tolerance)
    if name == "adapters":
        assert "default, stage_2; active: default, stage_2" in (several.root / name / "README.md").read_text()


@pytest.mark.slow
def test_adapters_beside_changed_weights_are_refused(several, tmp_path):
    with pytest.raises(MethodError, match="start model's own weights"):
        export(several.runs["merging"].directory, tmp_path / "out")


def test_a_folder_says_what_it_is_and_nothing_of_the_machine(loaded):
    names = {path.name for path in (loaded.root / "whole").iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    for name, seen in loaded.runs.items():
        for path in (loaded.root / name).rglob("*"):
            if path.suffix in (".json", ".md"):
                assert str(loaded.root) not in path.read_text(), path
        card = (loaded.root / name / "README.md").read_text()
        results = json.loads((seen.directory / "results.json").read_text())
        for part in (
            results["stages"][1]["key"], results["protocol"]["fingerprint"], f"{results['matrix'][2][0]:.2f}",
            f"OP: {results['op']:.2f}", f"BWT: {results['bwt']:.2f}", results["versions"]["torch"], "FOMC > Py150",
        ):  # fmt: skip
            assert part in card, (name, part)
    assert not [path for path in loaded.root.iterdir() if path.name.startswith(".")]  # no draft is left


def test_an_earlier_stage_by_number_and_by_key(loaded):
    """Stage 1 holds the weights of the run's snapshot after stage 1, bit for bit."""
    from safetensors.torch import load_file

    seen = loaded.runs["whole"]
    key = json.loads((seen.directory / "results.json").read_text())["stages"][0]["key"]
    export(seen.directory, loaded.root / "by_number", stage=1)
    store = str(seen.config.paths.store)
    arguments = ["export", key[:9], str(loaded.root / "by_key"), "--run", str(seen.directory), "--store", store]
    assert main(arguments) == 0
    kept = seen.snapshots[1][0]
    for name in ("by_number", "by_key"):
        weights = load_file(loaded.root / name / "model.safetensors")
        assert weights.keys() == kept.keys() and all(torch.equal(weights[one], kept[one]) for one in kept)
    card = (loaded.root / "by_key" / "README.md").read_text()
    assert "stage 1 of 2" in card and "OP:" not in card


@pytest.mark.parametrize(
    ("name", "settings", "error", "parts"),
    [
        ("whole", {"merge": True}, MethodError, ["--merge", "tuning=full", "no adapters"]),
        ("prompt", {"merge": True}, MethodError, ["--merge", "tuning=prompt"]),
        ("whole", {"stage": 3}, StoreError, ["stage 3", "1 (FOMC, "]),
        ("whole", {"stage": "zz"}, StoreError, ["stage zz"]),
        ("whole", {"settings": ["model.seed=1"]}, ConfigError, ["model.seed=1", "changes no number"]),
    ],
)
def test_what_cannot_be_exported_is_refused(loaded, tmp_path, name, settings, error, parts):
    with pytest.raises(error) as caught:
        export(loaded.runs[name].directory, tmp_path / "out", **settings)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_methods_that_pick_by_prompt(tmp_path):
    """Any-SSR's adapters can be written, but no merged model answers like it; L2P's pool is no single soft prompt."""
    routed = run(tmp_path / "a", "method=anyssr", "tuning=lora")
    export(routed.directory, tmp_path / "adapters")
    assert (tmp_path / "adapters" / "stage_2" / "adapter_model.safetensors").is_file()
    assert "what picks is not in this folder" in (tmp_path / "adapters" / "README.md").read_text()
    with pytest.raises(MethodError, match="picks one of 2 adapters"):
        export(routed.directory, tmp_path / "out", merge=True)
    pool = run(tmp_path / "b", "method=l2p", "tuning=prompt")
    with pytest.raises(MethodError, match="picks soft prompts for each row"):
        export(pool.directory, tmp_path / "out")
    assert isinstance(pool.ctx.model.get_input_embeddings(), VirtualTokens)


def test_another_start_model_dropped_weights_and_existing_folders_are_refused(tmp_path):
    seen = run(tmp_path / "a", "method=seqft")
    path = seen.directory / ".hydra" / "config.yaml"
    config = OmegaConf.load(path)
    OmegaConf.update(config, "model.hidden_size", 16)
    OmegaConf.save(config, path)
    with pytest.raises(StoreError, match="had another model"):
        export(seen.directory, tmp_path / "out")
    OmegaConf.save(seen.config, path)
    with pytest.raises(StoreError, match="exists"):
        export(seen.directory, tmp_path / "a")
    store = Store(tmp_path / "a" / "store")
    for entry in store.entries("stages"):
        store.drop(entry, ["weights.safetensors", "state.safetensors"])
    with pytest.raises(StoreError, match="without its weights"):
        export(seen.directory, tmp_path / "out")
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_what_a_run_trusts_must_be_trusted_again(tmp_path):
    """A configuration from elsewhere names a class of its own and trusts itself: nothing is imported."""
    config = compose_config(["debug=smoke", f"paths.store={tmp_path}"])
    OmegaConf.update(config, "model._target_", "foreign_package.Model")
    OmegaConf.update(config, "trust.targets", ["foreign_package."])
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    OmegaConf.save(config, tmp_path / "run" / ".hydra" / "config.yaml")
    with pytest.raises(ConfigError, match=r"model\._target_=foreign_package\.Model: not allowed"):
        export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ConfigError, match="no module named 'foreign_package'"):
        export(tmp_path / "run", tmp_path / "out", trust=["foreign_package."])


def test_a_run_under_way_and_a_base_by_name(loaded, tmp_path, monkeypatch):
    """Without results.json the store knows the stages; no row is read. An adapter names its base if told."""
    seen = loaded.runs["adapter"]
    results = (seen.directory / "results.json").rename(tmp_path / "results.json")
    monkeypatch.setattr(type(seen.parts.data), "load", lambda *_, **__: pytest.fail("rows were read"))
    try:
        export(seen.directory, tmp_path / "out", stage=1, base="someone/base")
    finally:
        results.rename(seen.directory / "results.json")
    assert (
        json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/base"
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'base_model: "someone/base"' in card and "had not finished" in card
    unnamed = json.loads((loaded.root / "adapter" / "adapter_config.json").read_text())
    assert unnamed["base_model_name_or_path"] is None
    assert "--stage 0" in (loaded.root / "adapter" / "README.md").read_text()
