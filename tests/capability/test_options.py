"""Every option of conf/capability and conf/judge in a run from end to end, on the tiny model."""

import json
from pathlib import Path

import pytest
from chat_server import completion, failure, serving
from conftest import ROOT, run_tiny
from test_judge_local import CHAT, tiny

from trace_hydra.capability.__main__ import compare_again
from trace_hydra.errors import ConfigError

OPTIONS = sorted(path.stem for path in (ROOT / "conf" / "capability").glob("*.yaml"))
SHORT = {
    "mini": ["capability.sets.mini.limit=1"],
    "smoke": [],
    "instruction": [
        "capability.sets.helpful.limit=2",
        "capability.sets.helpful.max_new_tokens=4",
        "capability.sets.checks.limit=3",
        "capability.sets.checks.max_new_tokens=4",
    ],
    "safety": [
        "capability.sets.harmless.limit=2",
        "capability.sets.harmless.max_new_tokens=4",
        "capability.sets.preference.limit=3",
        "capability.sets.refusal.limit=1",
        "capability.sets.refusal.max_new_tokens=4",
    ],
    "general": [
        "capability.sets.general.limit=1",
        "capability.sets.general.max_new_tokens=4",
        "+capability.sets.general.sets.mmlu.categories=[anatomy,virology]",
        "+capability.sets.general.sets.bbh.categories=[navigate]",
        "+capability.sets.general.sets.tydiqa.categories=[english]",
    ],
}
SHORT["all"] = [*SHORT["general"], *SHORT["instruction"], *SHORT["safety"]]


@pytest.fixture
def hhh(tmp_path) -> Path:
    """Prompts in TRACE's layout."""
    root = tmp_path / "hhh"
    for axis, sets in (
        ("helpful", ["self-instruct", "LIMA"]),
        ("harmless", ["CoNa", "Controversial", "Malicious", "PhysicalSafetyUnsafe"]),
    ):
        for name in sets:
            (root / axis / name).mkdir(parents=True)
            rows = [{"prompt": f"Say {name} {number}.", "answer": ""} for number in range(3)]
            (root / axis / name / "test.json").write_text(json.dumps(rows))
    return root


def options(tmp_path, option: str, hhh: Path, *more: str) -> list[str]:
    own = [f"capability={option}", f"paths.store={tmp_path}/store", f"paths.hhh={hhh}", *SHORT.get(option, [])]
    return ["method=seqft", "task_order=[FOMC]", "budget.default_epochs=8", "budget.lr_full=0.01", *own, *more]


def judge(url: str, *more: str) -> list[str]:
    settings = {"base_url": url, "model": "some-judge", "api_key_env": "THE_KEY", "retries": 0, "backoff_s": 0}
    return ["judge=openai", *(f"judge.{key}={value}" for key, value in settings.items()), *more]


def verdict(number, body):
    """Prefer the longer answer, always."""
    text = body["messages"][-1]["content"]
    if "[Assistant A's Answer]" not in text:
        return completion("yes")
    first, second = text.split("[Assistant A's Answer]")[1].split("[Assistant B's Answer]")
    return completion("[[A]] longer" if len(first) > len(second.split("[Your Verdict]")[0]) else "[[B]] longer")


@pytest.mark.parametrize("option", [one for one in OPTIONS if one not in ("none", "general", "all")])
def test_every_option_runs_without_a_judge(tmp_path, option, hhh):
    run = run_tiny(tmp_path, options(tmp_path, option, hhh))
    found = run.results["capability"]
    assert found["failed"] == {} and found["sets"]
    areas = {"mini": {"general", "instruction", "safety"}, "smoke": {"general", "instruction", "safety"}}
    assert {one["area"] for one in found["sets"].values()} == areas.get(option, {option})
    if option == "instruction":
        assert (
            found["sets"]["checks"]["accuracies"]["before"].keys()
            == found["sets"]["checks"]["accuracies"]["after"].keys()
        )
        assert "| checks, after |" in (run.directory / "report.md").read_text()


@pytest.mark.slow
def test_all_of_it_with_a_judge(tmp_path, hhh, shared_data, monkeypatch):
    monkeypatch.setenv("THE_KEY", "a-key-that-stays-secret")
    with serving(verdict) as server:
        more = [*judge(server.url), f"paths.ability={shared_data}/ability"]
        run = run_tiny(tmp_path, options(tmp_path, "all", hhh, *more))
    found = run.results["capability"]
    assert found["failed"] == {} and {"general", "instruction", "safety"} <= found.keys()
    assert found["general"]["sets"] == ["mmlu", "gsm8k", "bbh", "tydiqa", "boolq", "piqa"]
    assert found["sets"]["mmlu"]["macro"] and list(found["sets"]["mmlu"]["categories"]) == ["anatomy", "virology"]
    assert found["instruction"]["measure"] == "judge" and found["instruction"]["sets"] == ["self-instruct", "LIMA"]
    assert set(server.keys) == {"Bearer a-key-that-stays-secret"}
    report = (run.directory / "report.md").read_text()
    assert "| general ability | MMLU | GSM8K | BBH | TyDiQA | BoolQ | PIQA | ΔR^G |" in report
    assert not [path for path in tmp_path.rglob("*.json*") if "stays-secret" in path.read_text(errors="ignore")]


def test_a_judge_that_dies_loses_nothing_and_is_asked_later(tmp_path, hhh, monkeypatch):
    """It answers the preflight, then never again; the run ends, and another judge compares what is stored."""
    monkeypatch.setenv("THE_KEY", "secret-enough")

    def dying(number, body):
        return completion("yes") if number == 0 else failure(401, "revoked")

    with serving(dying) as server:
        run = run_tiny(tmp_path, options(tmp_path, "instruction", hhh, *judge(server.url)))
    found = run.results["capability"]
    assert run.results["complete"] and list(found["failed"]) == ["1/helpful"] and "401" in found["failed"]["1/helpful"]
    assert found["instruction"]["measure"] == "score"  # the checks need no judge
    with serving(verdict) as server:
        results = compare_again(run.directory, [*judge(server.url), f"judge.cache={tmp_path}/replies"])
    again = results["capability"]
    assert again["failed"] == {} and again["instruction"]["measure"] == "judge"
    pairs = [json.loads(one) for one in (run.directory / "capability/1/helpful.pairs.jsonl").read_text().splitlines()]
    longer = [len(pair["output_after"].strip()) > len(pair["output_before"].strip()) for pair in pairs]
    assert len(pairs) == 4 and all(pair["outcome"] in ("win", "tie", "lose") for pair in pairs)
    assert sum(pair["outcome"] == "win" for pair in pairs) <= sum(longer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["judge=openai", "judge.api_key_env=NO_SUCH_KEY"], r"NO_SUCH_KEY is not set"),
        (judge("http://127.0.0.1:9/v1"), r"judge\.base_url=http://127\.0\.0\.1:9/v1 cannot be reached"),
        (["paths.hhh=null"], r"Set paths\.hhh"),
        (["capability.sets.helpful.sets=[Nobody]"], r"'Nobody' is unknown"),
        (["capability.sets.helpful.merge=loudest"], r"merge=loudest must be one of"),
    ],
)
def test_wrong_input_is_told_before_training(tmp_path, hhh, monkeypatch, changes, message):
    monkeypatch.setenv("THE_KEY", "secret-enough")
    with pytest.raises(ConfigError, match=message):
        run_tiny(tmp_path, options(tmp_path, "instruction", hhh, *changes))
    assert not (tmp_path / "run" / "results.json").exists()


def test_general_names_what_is_missing_before_training(tmp_path, hhh):
    with pytest.raises(ConfigError, match=r"paths\.ability=.*nowhere is not a folder"):
        run_tiny(tmp_path, options(tmp_path, "general", hhh, f"paths.ability={tmp_path}/nowhere"))


def test_a_judge_in_the_same_process(tmp_path, hhh):
    """The option judge=local on a saved checkpoint; random weights give no verdict, which is counted, not averaged."""
    tokenizer, folder = tiny().load_tokenizer(), tmp_path / "chat"
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    tiny(seed=1).load().save_pretrained(folder)
    own = ["judge=local", f"judge.model.path={folder}", "judge.model.dtype=float32", "judge.max_tokens=4"]
    run = run_tiny(tmp_path, options(tmp_path, "instruction", hhh, *own, "capability.sets.helpful.same_answer=ask"))
    found = run.results["capability"]
    assert found["failed"] == {} and found["instruction"]["measure"] == "score"
    pairs = [json.loads(one) for one in (run.directory / "capability/1/helpful.pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 4 and all(set(pair["verdicts"]) == {"none"} for pair in pairs)
    assert found["sets"]["LIMA"]["unscored"] == 2 and found["sets"]["LIMA"]["delta"] is None
