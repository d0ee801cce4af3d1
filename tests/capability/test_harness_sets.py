"""What is told before a model is loaded, and where rows come from."""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT
from harness_subject import SETS, random_tiny

from trace_hydra.capability.harness import Harness
from trace_hydra.capability.harness_sets import SOURCES
from trace_hydra.capability.tasks import local
from trace_hydra.errors import CapabilityError

pytest.importorskip("lm_eval", reason="needs pip install 'trace-hydra[general]'")


def harness(root, sets, **changes):
    settings = {"prompt": "raw", "limit": None, "max_new_tokens": 6, **changes}
    return Harness(sets=sets, root=None if root is None else str(root), **settings)


def changed(name: str, **settings):
    return {name: {**SETS[name], **settings}}


@pytest.fixture(autouse=True)
def online(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def boolq(tmp_path):
    row = {"passage": "The moon has no air.", "question": "is there air on the moon", "answer": False}
    (tmp_path / "boolq.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def test_the_six_sets_as_the_paper_names_them():
    """57 subjects, 27 subtasks, 9 languages; no problem with the hub's rows at 5, 8, 3 and 0 shots."""
    assert {name: len(source.categories()) for name, source in SOURCES.items()} == {
        **{"mmlu": 57, "gsm8k": 0, "bbh": 27, "tydiqa": 9, "boolq": 0, "piqa": 0}
    }
    assert harness(None, SETS).problems() == []


@pytest.mark.parametrize(
    ("sets", "changes", "words"),
    [
        ({"mmul": {"shots": 5, "measure": "acc"}}, {}, "no set 'mmul' of general ability; there are mmlu, gsm8k"),
        ({}, {}, "sets is empty"),
        (changed("mmlu", shots=6), {}, "mmlu: shots=6, but there are fewer demonstrations: abstract_algebra 5"),
        (changed("gsm8k", shots=9), {}, "gsm8k: shots=9, but there are fewer demonstrations: gsm8k 8"),
        (changed("bbh", shots=4), {}, "bbh: shots=4, but there are fewer demonstrations: boolean_expressions 3"),
        (changed("bbh", shots=-1), {}, "bbh: shots=-1 must be a number of demonstrations"),
        (changed("bbh", shots=True), {}, "bbh: shots=True must be a number of demonstrations"),
        (changed("piqa", measure="f1"), {}, "piqa: measure='f1' is not one of the harness's: acc; acc_norm"),
        (changed("piqa", limit=0), {}, "piqa: limit=0 must be at least 1"),
        (changed("mmlu", categories=["anatomi"]), {}, "mmlu: categories holds anatomi; there are abstract_algebra"),
        (changed("boolq", categories=["all"]), {}, "boolq: categories holds all; there are none"),
        (changed("mmlu", categories=[]), {}, "mmlu: categories is an empty list"),
        (changed("boolq", shot=1), {}, "boolq has no setting 'shot'; it has categories, limit, measure, shots"),
        (changed("boolq"), {"limit": 0}, "limit=0 of general ability must be at least 1"),
        (changed("boolq"), {"max_new_tokens": 0}, "max_new_tokens=0 of general ability must be at least 1"),
        (changed("boolq"), {"prompt": "text"}, "prompt='text' is neither raw nor chat"),
    ],
)
def test_wrong_settings(sets, changes, words):
    (found,) = harness(None, sets, **changes).problems()
    assert words in found


def test_a_missing_package_is_told(boolq, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    (found,) = harness(boolq, changed("boolq")).problems()
    assert "pip install 'trace-hydra[general]'" in found


def test_wrong_folders_and_files(boolq, tmp_path):
    assert harness(boolq, changed("boolq")).problems() == []
    (found,) = harness(tmp_path / "none", changed("boolq")).problems()
    assert "none is not a folder" in found
    (found,) = harness(boolq, {**changed("boolq"), **changed("mmlu")}).problems()
    assert "capability set mmlu needs mmlu_dev.jsonl, mmlu_test.jsonl in" in found
    (found,) = harness(boolq, changed("boolq", shots=1)).problems()
    assert "boolq: shots=1, but there are fewer demonstrations: boolq 0" in found
    (boolq / "boolq.jsonl").write_text("\n")
    (found,) = harness(boolq, changed("boolq")).problems()
    assert "boolq.jsonl has no rows" in found
    with pytest.raises(CapabilityError, match="has no rows"):
        harness(boolq, changed("boolq")).measure(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("boolq", '{"passage": "p", "question": "q"}', "boolq.jsonl row 2: 'answer' is None, not of type bool"),
        ("boolq", '{"passage": "p"', "boolq.jsonl row 2 is not JSON"),
        ("boolq", "[1]", "boolq.jsonl row 2 is not a JSON object"),
        ("piqa", '{"goal": "g", "sol1": "a", "sol2": "b", "label": 2}', "'label' is 2, neither 0 nor 1"),
        ("piqa", '{"goal": "g", "sol1": "a", "sol2": "b", "label": true}', "'label' is True, not of type int"),
        (
            "mmlu_test",
            '{"subject": "s", "question": "q", "A": "", "B": "", "C": "", "D": "", "answer": "E"}',
            "'answer' is 'E', not one of A, B, C, D",
        ),
        (
            "tydiqa_goldp_dev",
            '{"id": "i", "title": "", "context": "", "question": "", "answers": []}',
            "'answers' must be a list",
        ),
    ],
)
def test_wrong_rows(tmp_path, name, row, words):
    (tmp_path / f"{name}.jsonl").write_text(f"\n{row}\n")
    with pytest.raises(ValueError, match="row 2") as caught:
        local.rows(str(tmp_path), f"{name}.jsonl")
    assert words in str(caught.value)


def test_a_changed_file_is_read_anew_and_odd_line_ends_stay_in_texts(boolq):
    (first,) = local.rows(str(boolq), "boolq.jsonl")
    row = {**first, "passage": "one\u2028two"}
    (boolq / "boolq.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n" * 2, encoding="utf-8")
    assert local.rows(str(boolq), "boolq.jsonl") == (row,)


def test_real_slices(shared_data):
    """5 dev rows a subject, demonstrations of TyDiQA for three languages only."""
    root = shared_data / "ability"
    assert harness(root, SETS).problems() == []
    (found,) = harness(root, changed("mmlu", shots=6)).problems()
    assert "abstract_algebra 5, anatomy 5" in found and "and 52 more" in found
    (found,) = harness(root, changed("tydiqa", shots=1)).problems()
    assert found.endswith("arabic 0, bengali 0, finnish 0, indonesian 0, russian 0 and 1 more. Lower shots.")
    three = changed("tydiqa", shots=5, categories=["english", "korean", "swahili"])
    assert harness(root, three).problems() == []


def test_demonstrations_of_the_harness_are_those_of_the_benchmark(shared_data):
    """Three demonstrations a subtask, their answers word for word in BIG-Bench Hard's own prompts."""
    import yaml

    own = shared_data / "ability" / "bbh_cot_prompts"
    differ = []
    for name, path in SOURCES["bbh"].categories().items():
        samples = yaml.safe_load(path.read_text(encoding="utf-8"))["fewshot_config"]["samples"]
        text = " ".join((own / f"{name}.txt").read_text(encoding="utf-8").split())
        if not all(" ".join(sample["target"].split()) in text for sample in samples):
            differ.append(name)
    assert differ == []


def test_rows_of_the_hub(monkeypatch):
    """Without a folder the harness loads its own data set: asked for by its name, in the hub's shape."""
    import datasets

    asked = []

    def load(path, name=None, **_):
        asked.append((path, name))
        made = {"goal": ["dry a cup"], "sol1": ["use a towel"], "sol2": ["add tea"], "label": [0]}
        split = datasets.Dataset.from_dict(made)
        return datasets.DatasetDict({"train": split, "validation": split})

    monkeypatch.setattr(datasets, "load_dataset", load)
    (record,) = harness(None, changed("piqa")).measure(random_tiny(ROOT))
    assert asked == [("baber/piqa", None)]
    assert record["reference"] == "use a towel" and record["prompt"] == "Question: dry a cup\nAnswer:"


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        CapabilityError, match=r"piqa cannot be read from baber/piqa of the hub: ConnectionError"
    ) as one:
        harness(None, changed("piqa")).measure(random_tiny(ROOT))
    assert "paths.ability" in str(one.value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (found,) = harness(None, changed("piqa")).problems()
    assert "needs baber/piqa from the hub; HF_HUB_OFFLINE is set and there is no copy" in found
    (tmp_path / "hub" / "datasets--baber--piqa").mkdir(parents=True)
    assert harness(None, changed("piqa")).problems() == []


def test_checks_import_neither_harness_nor_datasets(boolq):
    code = f"""
import sys
from trace_hydra.capability.harness import Harness
sets = {{"boolq": {{"shots": 0, "measure": "acc"}}, "bbh": {{"shots": 3, "measure": "exact_match, get-answer"}}}}
one = Harness(sets=sets, root={str(boolq)!r}, prompt="raw", limit=None, max_new_tokens=None)
print(len(one.problems()), len(one.identity()["rows"]), [name in sys.modules for name in ("lm_eval", "evaluate")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "1 2 [False, False]"


def test_a_short_context_is_worth_a_warning():
    from types import SimpleNamespace

    one = harness(None, changed("mmlu"))
    assert "1024 positions" in one.warnings(SimpleNamespace(name="small", context_length=1024))[0]
    assert one.warnings(SimpleNamespace(name="large", context_length=8192)) == []
