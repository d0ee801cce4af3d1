"""The capability sets within a run: the start model once, stages, failures, files, loggers, and comparing again."""

import csv
import json

import pytest
import torch
from capability_doubles import Lengths
from conftest import run_tiny

from trace_hydra.capability.__main__ import compare_again, main
from trace_hydra.errors import ConfigError, StoreError

TWO = "task_order=[FOMC,20Minuten]"
OWN = "{_target_: capability_doubles.Lengths, prompts: [one two, three, four five six, seven], area: %s, broken: '%s'}"


def overrides(tmp_path, area="general", broken="", when="end", more=()):
    node = OWN % (area, broken)
    return [
        "method=seqft",
        TWO,
        "capability=none",
        f"+capability.sets.own={node}",
        f"capability.when={when}",
        "trust.targets=[capability_doubles.]",
        f"paths.store={tmp_path}/store",
        "budget.default_epochs=8",
        "budget.lr_full=0.01",
        *more,
    ]


def test_a_run_reports_its_deltas(tmp_path):
    """before and after are the means of the stored records; the delta is their difference."""
    run = run_tiny(tmp_path, overrides(tmp_path))
    found = run.results["capability"]
    read = {
        row: [json.loads(line) for line in (run.directory / f"capability/{row}/own.jsonl").read_text().splitlines()]
        for row in (0, 2)
    }
    before, after = ([record["score"] for record in read[row]] for row in (0, 2))
    assert before != after  # the model was trained
    assert found["sets"]["lengths_general"]["before"] == sum(before) / 4
    assert found["general"]["delta"] == pytest.approx(sum(after) / 4 - sum(before) / 4)
    low, high = found["general"]["interval"]
    assert low <= found["general"]["delta"] <= high and found["row"] == 2 and list(found["stages"]) == ["2"]
    assert found["failed"] == {} and len(found["fingerprint"]) == 12 and found["tokens"] > 0
    report = (run.directory / "report.md").read_text()
    assert "ΔR^G, general ability" in report and "lengths_general" in report


def test_measuring_moves_nothing_in_training(tmp_path):
    """The same weights and matrix with and without sets, measured after every stage."""
    plain = run_tiny(tmp_path / "a", ["method=seqft", TWO, "budget.default_epochs=8", "budget.lr_full=0.01"])
    measured = run_tiny(tmp_path / "b", overrides(tmp_path, when="every_stage"))
    assert plain.results["matrix"] == measured.results["matrix"]
    assert all(torch.equal(plain.weights_after[name], one) for name, one in measured.weights_after.items())
    assert list(measured.results["capability"]["stages"]) == ["1", "2"]


def test_the_start_model_answers_once(tmp_path, caplog):
    """A second run of another method takes its records from the store; a damaged file is measured again."""
    counts = []

    def count(one, subject, original=Lengths.measure):
        counts.append(subject.method.__class__.__name__)
        return original(one, subject)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Lengths, "measure", count)
        first = run_tiny(tmp_path / "a", overrides(tmp_path))
        second = run_tiny(tmp_path / "b", ["method=ewc", *overrides(tmp_path)[1:]])
        assert counts == ["StartModel", "SeqFT", "EWC"]
        manifests = (tmp_path / "store" / "capability").glob("*/manifest.json")
        (stored,) = (one.with_name("records.jsonl") for one in manifests if '"row": 0' in one.read_text())
        stored.write_bytes(stored.read_bytes().replace(b'"score": ', b'"score": 1', 1))
        third = run_tiny(tmp_path / "c", overrides(tmp_path))
    assert counts[3:] == ["StartModel"] and "records.jsonl has" in caplog.text
    assert [run.results["capability"]["sets"]["lengths_general"]["before"] for run in (second, third)] == [
        first.results["capability"]["sets"]["lengths_general"]["before"]
    ] * 2


def test_a_store_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    """A file stands where the folder should be."""
    (tmp_path / "store").write_text("")
    run = run_tiny(tmp_path, overrides(tmp_path))
    assert run.results["complete"] and run.results["capability"]["failed"] == {}
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize(("broken", "why"), [("crash", "RuntimeError: out of memory"), ("judge", "the judge is down.")])
def test_a_failing_set_does_not_lose_the_run(tmp_path, broken, why, caplog):
    run = run_tiny(tmp_path, overrides(tmp_path, broken=broken))
    assert run.results["complete"] and run.results["capability"]["failed"] == {"2/own": why}
    assert "python -m trace_hydra.capability" in caplog.text
    assert "**Failed:**" in (run.directory / "report.md").read_text()


def test_stored_answers_are_compared_again(tmp_path, monkeypatch):
    """A judge that was down is up again; no model is loaded."""
    whole = run_tiny(tmp_path / "a", overrides(tmp_path)).results["capability"]
    run = run_tiny(tmp_path / "b", overrides(tmp_path, broken="judge"))
    monkeypatch.setattr(Lengths, "measure", None)
    monkeypatch.setattr(Lengths, "compare", Lengths.__mro__[1].compare)
    results = compare_again(run.directory, trust=["capability_doubles."])
    assert results["capability"]["general"] == whole["general"] and results["capability"]["failed"] == {}
    assert json.loads((run.directory / "results.json").read_text()) == results
    assert (run.directory / "capability/2/own.pairs.jsonl").is_file()


def test_an_area_without_verdicts_has_no_delta_left(tmp_path, monkeypatch):
    """A judge that gives no verdict this time: what stood there before goes, in results.json too."""
    run = run_tiny(tmp_path, overrides(tmp_path, area="safety"))
    assert "safety" in run.results["capability"]
    compare = Lengths.compare
    silent = {"before": None, "after": None, "delta": None}
    monkeypatch.setattr(Lengths, "compare", lambda *given: [{**pair, **silent} for pair in compare(*given)])
    again = compare_again(run.directory, trust=["capability_doubles."])["capability"]
    assert "safety" not in again and again["sets"]["lengths_safety"]["unscored"] == 4


def test_comparing_again_refuses_what_it_cannot_do(tmp_path, capsys):
    run = run_tiny(tmp_path, overrides(tmp_path))
    with pytest.raises(ConfigError, match=r"own\._target_=capability_doubles\.Lengths: not allowed"):
        compare_again(run.directory)
    with pytest.raises(ConfigError, match=r"judge=nobody: the first override must be judge=NAME, one of"):
        compare_again(run.directory, ["judge=nobody"])
    with pytest.raises(ConfigError, match=r"only judge\.KEY=VALUE"):
        compare_again(run.directory, ["judge=openai", "model=x"])
    with pytest.raises(StoreError, match=r"results\.json cannot be read"):
        compare_again(tmp_path / "nothing")
    assert main([str(tmp_path / "nothing")]) == 2 and "results.json" in capsys.readouterr().err


@pytest.mark.parametrize("when", ["never", "[0]", "[3]", "[]", "[1.5]"])
def test_stages_that_are_not_there_are_refused(tmp_path, when):
    with pytest.raises(ConfigError, match=r"capability\.when=.*stages from 1 to 2"):
        run_tiny(tmp_path, overrides(tmp_path, when=when))


def test_problems_of_a_set_are_told_before_training(tmp_path):
    with pytest.raises(ConfigError, match=r"capability\.sets\.own: made to be refused\."):
        run_tiny(tmp_path, overrides(tmp_path, broken="problems"))


def test_what_is_no_set_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"capability\.sets\.own\._target_=.*SeqFT: not allowed; .* must be a .*CapabilitySet"
    ):
        run_tiny(
            tmp_path, [*overrides(tmp_path)[:3], "+capability.sets.own={_target_: trace_hydra.methods.seqft.SeqFT}"]
        )


def test_deltas_reach_the_loggers_and_the_terminal(tmp_path, capsys):
    more = ["callbacks=default", "callbacks.progress.mode=quiet", "logger=csv"]
    run = run_tiny(tmp_path, overrides(tmp_path, area="safety", when="every_stage", more=more))
    rows = list(csv.DictReader((run.directory / "csv/metrics.csv").open()))
    logged = [float(row["capability/delta_safety"]) for row in rows if row.get("capability/delta_safety")]
    stages = run.results["capability"]["stages"]
    assert logged == pytest.approx([stages[row]["safety"]["delta"] for row in ("1", "2")])
    assert [float(row["delta_safety"]) for row in rows if row.get("delta_safety")] == pytest.approx(logged[-1:])
    assert "capability after stage 2" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["l2p", "pp", "anyssr", "lfpt5"])
def test_methods_that_keep_prompts_or_adapters_apart_are_served(tmp_path, method):
    """What they keep reaches the sets: other answers than the start model's, and every prompt answered once."""
    from conftest import SMALLER

    own = [f"method={method}", *overrides(tmp_path)[1:], *SMALLER.get(method, []), "budget.lr_prompt=1.0"]
    run = run_tiny(tmp_path, own)
    groups = list(run.method.serve(run.ctx, ["a", "b c", "d"]))
    assert sorted(index for indices, _ in groups for index in indices) == [0, 1, 2]
    if method != "anyssr":
        assert all(prefix for _, prefixes in groups for prefix in prefixes)
    pairs = [json.loads(one) for one in (run.directory / "capability/2/own.pairs.jsonl").read_text().splitlines()]
    assert any(pair["output_before"] != pair["output_after"] for pair in pairs)
