"""The benchmarks run, on the tiny model and generated rows; what they say of speed is not looked at."""

import importlib.util
import json

import pytest

from benchmarks import evaluation, icl, limit, training


@pytest.fixture
def run(tmp_path, capsys):
    """Give a function that runs a benchmark's command and returns what it wrote and printed."""

    def start(main, *arguments: str):
        out = tmp_path / "out.json"
        main([*arguments, "--repeats", "1", "--out", str(out), "model=tiny", "trainer=cpu", f"paths.store={tmp_path}"])
        return json.loads(out.read_text()), capsys.readouterr().out

    return start


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_training(run, tuning):
    """All count the same tokens, and their first steps on the same rows have the same loss (bf16: 3 digits)."""
    found, printed = run(training.main, "--rows", "2", "--tuning", tuning, "--only", "HF Trainer")
    names = [one["name"] for one in found["contenders"]]
    assert names == ["ours", "HF Trainer"]
    assert len({one["samples"][0]["tokens"] for one in found["contenders"]}) == 1
    assert found["losses"]["HF Trainer"] == pytest.approx(found["losses"]["ours"], rel=2e-3)
    assert "loss of one step on the same rows" in printed


def test_official_loop_trains(run):
    """Two micro-batches count alike in it whatever their labels, so its loss is near ours, not equal."""
    found, _ = run(training.main, "--rows", "2", "--only", "TRACE's code")
    assert found["losses"]["TRACE's code"] == pytest.approx(found["losses"]["ours"], rel=0.1)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs the extra `benchmarks`")
@pytest.mark.parametrize("name", ["TRL packed", "TRL padded"])
def test_trl_trains(run, name):
    found, _ = run(training.main, "--rows", "2", "--only", name)
    assert found["losses"][name] == pytest.approx(found["losses"]["ours"], rel=2e-3)


def test_matrix_evaluation(run):
    """Two tasks, three cells; TRACE's loop answers as we do but for ties."""
    found, printed = run(evaluation.main, "--rows", "3", "--tasks", "2")
    (ours, *others) = found["contenders"]
    assert [sample["cell"] for sample in ours["samples"]] == [[1, "C-STANCE"], [2, "C-STANCE"], [2, "FOMC"]]
    assert "TRACE's code" in [one["name"] for one in others]
    assert all(abs(margin) < 0.1 for margins in found["parted"].values() for margin in margins)
    assert "x ours" in printed
    assert found["tasks"].keys() == {"C-STANCE", "FOMC"} and "C-STANCE: ours" in printed
    assert sum(one["ours"] for one in found["tasks"].values()) == pytest.approx(found["seconds"]["ours"])


def test_shared_heads(run):
    found, printed = run(icl.main, "--rows", "8", "--task", "FOMC")
    assert (found["answers"], found["different"]) == (8, 0)
    assert "without reuse" in printed


def test_share_of_the_limit(run):
    found, _ = run(limit.main, "--rows", "1")
    assert 0 < found["training_share"] < 1
    assert 0 < found["reading_share"] < 1
