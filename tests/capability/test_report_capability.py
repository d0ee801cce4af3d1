"""The capability section of report.md, and the published rows beside it."""

import pytest

from trace_hydra.report.capability import capability, published


def one_set(area, before, after, **more):
    delta = more.pop("delta", None if before is None else after - before)
    found = {"area": area, "measure": "accuracy", "n": 10, "unscored": 0, "before": before, "after": after}
    return found | {"delta": delta, "interval": [delta - 1, delta + 1], "differs": True, "categories": {}} | more


def results(sets, published_names=None, **more):
    areas = {}
    for area in ("general", "instruction", "safety"):
        own = {name: one for name, one in sets.items() if one["area"] == area}
        if own:
            mean = sum(one["delta"] for one in own.values()) / len(own)
            kind = "judge" if any(one["before"] is None for one in own.values()) else "score"
            area_result = {"delta": mean, "interval": [mean - 1, mean + 1], "differs": abs(mean) > 1}
            areas[area] = {**area_result, "measure": kind, "sets": list(own), "n": 10}
    stage = {**areas, "sets": sets}
    return {
        "method": "seqft",
        "protocol": {"name": "greedy", "fingerprint": "abc"},
        "published": published_names or {},
        "capability": {**stage, "row": 8, "fingerprint": "f00", "failed": {}, "stages": {"8": stage}, **more},
    }


def test_no_capability_no_section():
    assert capability({"capability": {}}) == ""


def test_table_2_with_the_published_rows_of_the_same_model_and_method():
    """LLaMA-2-7B-Chat in Table 2: SeqFT's delta is -2.58 as printed, and as computed here from its twelve cells."""
    sets = {name: one_set("general", 40.0, 30.0) for name in ("mmlu", "gsm8k", "bbh", "tydiqa", "boolq", "piqa")}
    text = capability(results(sets, {"model": "LLaMA-2-7B-Chat", "method": "SeqFT"}))
    head, own, trained, change, base, seqft = text[text.index("| general ability |") :].splitlines()[:1] + [
        line for line in text.splitlines() if line.startswith(("| start", "| seqft", "| change", "| published"))
    ]
    assert head.split(" | ")[1:7] == ["MMLU", "GSM8K", "BBH", "TyDiQA", "BoolQ", "PIQA"]
    assert own.count("40.00") == 6 and trained.count("30.00") == 6 and change.count("-10.00") == 6
    assert base.startswith("| published start model | 46.56 | 26.08 | 40.23 | 23.47 | 70.55 | 76.22 |")
    assert "| -2.58 | arXiv:2310.06762, Table 2: OpenCompass" in seqft and "greedy [abc]" in trained


def test_published_deltas_are_those_of_the_paper():
    """Table 2's printed deltas but for the two that its own cells contradict (Vicuna LoraSeqFT: -5.31, -6.81)."""
    expected = {
        ("LLaMA-2-7B-Chat", "SeqFT"): -2.58,
        ("LLaMA-2-7B-Chat", "LoraSeqFT"): -7.03,
        ("Vicuna-7B-V1.5", "LoraSeqFT"): -5.31,
        ("Vicuna-13B-V1.5", "LoraSeqFT"): -6.81,
    }
    for (model, method), delta in expected.items():
        printed, _ = published("general", model)
        means = [sum(printed[name].values()) / 6 for name in (method, "base")]
        assert means[0] - means[1] == pytest.approx(delta, abs=0.006)
    assert published("general", "no-such-model")[0] == {}


def test_judged_shares_stand_beside_the_papers():
    judged = one_set("instruction", None, None, delta=-46.0, win=12.0, tie=30.0, lose=58.0, position_bias=10.0)
    text = capability(results({"judged": judged}, {"model": "LLaMA-2-7B-Chat", "method": "SeqFT"}))
    assert "| judged | instruction | 12.00 | 30.00 | 58.00 | 0 | 10.00 | greedy [abc], accuracy |" in text
    assert "| published SeqFT | instruction | 12.00 | 30.00 | 58.00 |" in text and "win share - lose share" in text


def test_failures_stages_and_categories_are_shown():
    categories = {
        "a": {"n": 3, "before": 1.0, "after": 2.0, "delta": 1.0},
        "b": {"n": 2, "before": 1.0, "after": 1.0, "delta": 0.0},
    }
    sets = {"own": one_set("safety", 50.0, 40.0, categories=categories)}
    found = results(sets, failed={"8/judge": "down"})
    found["capability"]["stages"]["4"] = found["capability"]["stages"]["8"]
    text = capability(found)
    assert "- 8/judge: down" in text and "own by category" in text and "| a | 3 | 1.00 | 2.00 | +1.00 |" in text
    assert "| after stage |" in text and text.count("-10.00 [-11.00 to -9.00]") == 2
