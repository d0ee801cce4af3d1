"""Pairwise judging: verdicts, merging and bias by hand, the swapped order, and what a judge may do wrong."""

import json

import pytest
from chat_server import client, completion, failure, serving

from trace_hydra.capability.hhh import known_sets, prompts_of
from trace_hydra.capability.judge import Judged
from trace_hydra.capability.judge_prompts import SYSTEM, judge_conversation
from trace_hydra.capability.replies import Estimate, Reply
from trace_hydra.capability.verdicts import judge_summary, merged, parse_verdict
from trace_hydra.errors import CapabilityError


class Script:
    """A judge that answers by a function of (answer shown as A, answer shown as B)."""

    name = "script"

    def __init__(self, say):
        self.say, self.asked = say, []

    def problems(self):
        return []

    def identity(self):
        return {"model": "script"}

    def is_model(self, model):
        return model.name == "script"

    def estimate(self, conversations, *, variant=0):
        return Estimate(len(conversations), 0, 0, 0, None)

    def ask(self, conversations, on_reply=None, *, variant=0):
        self.asked += conversations
        return [self._reply(one[-1]["content"]) for one in conversations]

    def _reply(self, text):
        shown = text.split("[Assistant A's Answer]\n")[1].split("\n\n[Your Verdict]")[0]
        said = self.say(*shown.split("\n\n[Assistant B's Answer]\n"))
        return Reply(None, "lost") if said is None else Reply(said)


@pytest.fixture
def root(tmp_path):
    """Two sets of five prompts, `helpful/one` and `helpful/two`."""
    for name in ("one", "two"):
        rows = [{"prompt": f"{name} {row}", "answer": ""} for row in range(5)]
        folder = tmp_path / "hhh" / "helpful" / name
        folder.mkdir(parents=True)
        (folder / "test.json").write_text(json.dumps(rows))
    return tmp_path / "hhh"


def judged(folder, judge=None, **changes):
    settings = {
        "area": "instruction",
        "axis": "helpful",
        "root": str(folder),
        "sets": ["one"],
        "limit": None,
        "prompt": "raw",
        "max_new_tokens": 8,
        "decoding": "greedy",
        "temperature": 0.1,
        "top_p": 1.0,
        "judge": judge,
        "merge": "strict",
        "one_verdict": False,
        "same_answer": "tie",
        "dry_run": False,
    }
    return Judged(**{**settings, **changes})


def records(*outputs):
    head = {"area": "instruction", "set": "one", "category": "one", "measure": "judge: helpful", "score": None}
    return [{**head, "id": f"{at:04d}", "prompt": f"ask {at}", "output": text} for at, text in enumerate(outputs)]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[A]]\nIt is clearer.", "A"),
        ("Reasons first. So: [[ B ]]", "B"),
        ("[[C]] ... again, [[C]].", "C"),
        ("[[A]] or [[B]]?", "contradictory"),
        ("Assistant A is better.", "none"),
        ("[A]", "none"),
        ("[[a]]", "none"),
        ("[[D]]", "none"),
        ("", "none"),
        ("I'm sorry, but I can't compare these.", "refused"),
        ("As an AI, I cannot judge this.", "refused"),
        ("I cannot endorse either, but [[B]] does less harm.", "B"),
        ("Both say that " + "x " * 200 + "I cannot tell.", "none"),
    ],
)
def test_verdicts_are_read_exactly(text, verdict):
    assert parse_verdict(text) == verdict


@pytest.mark.parametrize(
    ("first", "second", "strict", "points", "one"),
    [
        ("after", "after", "win", "win", "win"),
        ("before", "before", "lose", "lose", "lose"),
        ("tie", "tie", "tie", "tie", "tie"),
        ("after", "before", "tie", "tie", "tie"),
        ("before", "after", "tie", "tie", "tie"),
        ("after", "tie", "tie", "win", "tie"),
        ("tie", "before", "tie", "lose", "tie"),
        ("after", "none", "unparsed", "unparsed", "win"),
        ("error", "before", "unparsed", "unparsed", "lose"),
        ("tie", "refused", "unparsed", "unparsed", "tie"),
        ("none", "contradictory", "unparsed", "unparsed", "unparsed"),
    ],
)
def test_merging_table(first, second, strict, points, one):
    """`one` is strict, with the verdict of one order enough where the other has none."""
    assert merged([first, second], "strict", False) == strict
    assert merged([first, second], "points", False) == points
    assert merged([first, second], "strict", True) == one


def test_order_is_swapped_and_tokens_are_turned_back(root):
    """A judge who always takes the longer answer says A, then B: both times the trained model's."""
    judge = Script(lambda a, b: "[[A]]\nlonger" if len(a) > len(b) else "[[B]]\nlonger")
    pairs = judged(root, judge).compare(records("old", "a long old answer"), records("a long new one", "new"))
    assert [pair["outcome"] for pair in pairs] == ["win", "lose"] and [pair["delta"] for pair in pairs] == [
        100.0,
        -100.0,
    ]
    assert pairs[0]["verdicts"] == ["after", "after"] and pairs[0]["explanations"] == ["[[B]]\nlonger", "[[A]]\nlonger"]
    assert pairs[0]["before"] is None and pairs[0]["output_after"] == "a long new one"
    assert judge.asked[0] == judge_conversation("helpful", "ask 0", "old", "a long new one")
    assert judge.asked[1] == judge_conversation("helpful", "ask 0", "a long new one", "old")
    assert len(judge.asked) == 4


def test_a_judge_who_looks_at_the_place_only_makes_ties(root):
    """Always the first answer: before, then after; no side wins, and the bias is 100 %."""
    pairs = judged(root, Script(lambda a, b: "[[A]]")).compare(records("x", "y"), records("u", "v"))
    assert [pair["verdicts"] for pair in pairs] == [["before", "after"]] * 2
    found = judge_summary(pairs)
    assert (found["tie"], found["position_bias"], found["chose_a"], found["inconsistent"]) == (100, 100, 100, 100)


def test_equal_answers_are_a_tie_without_asking_unless_asked(root):
    judge = Script(lambda a, b: "[[C]]")
    pairs = judged(root, judge).compare(records("same", "x"), records("same", "y"))
    assert pairs[0]["outcome"] == "tie" and pairs[0]["delta"] == 0 and pairs[0]["verdicts"] == []
    assert len(judge.asked) == 2 and judge_summary(pairs)["same_answer"] == 1
    assert judge_summary(pairs)["tie"] == 100
    judged(root, judge, same_answer="ask").compare(records("same"), records("same"))
    assert len(judge.asked) == 4


def test_replies_without_a_verdict_are_counted_apart(root):
    says = {"none": "Both fine.", "both": "[[A]] [[B]]", "refuse": "I'm sorry, I can't.", "lost": None, "good": "[[C]]"}
    judge = Script(lambda a, b: says[a.split()[0]])
    before = records(*[f"{key} old" for key in says])
    pairs = judged(root, judge).compare(before, records(*[f"{key} new" for key in says]))
    assert [pair["verdicts"][0] for pair in pairs] == ["none", "contradictory", "refused", "error", "tie"]
    assert [pair["delta"] for pair in pairs] == [None] * 4 + [0.0]
    assert pairs[3]["explanations"] == ["lost", "lost"]
    found = judged(root, judge).summary(pairs)
    assert (found["unparsed"], found["tie"], found["judge"]) == (80, 100, "script")
    assert found["no_verdict"] == {"none": 2, "contradictory": 2, "refused": 2, "error": 2}


def test_summary_by_hand():
    """Six pairs: 2 wins, 1 tie, 1 loss of 4 decided; 1 unparsed of 5 judged; 1 not judged.

    Verdicts (start model is A in the first order, B in the second): after/after = B, A; after/tie = B, C;
    before/after = A, A (turned with the order); before/before = A, B; none/after = -, A. A: 5, B: 3, so 62.5 %.
    Two verdicts: four pairs, of which one turned and two disagree.
    """
    rows = [
        ("win", ["after", "after"]),
        ("win", ["after", "tie"]),
        ("tie", ["before", "after"]),
        ("lose", ["before", "before"]),
        ("unparsed", ["none", "after"]),
        ("not judged", []),
    ]
    found = judge_summary([{"outcome": outcome, "verdicts": verdicts} for outcome, verdicts in rows])
    assert found == {
        "n": 6,
        "win": 50.0,
        "tie": 25.0,
        "lose": 25.0,
        "unparsed": 20.0,
        "not_judged": 1,
        "same_answer": 0,
        "position_bias": 25.0,
        "inconsistent": 50.0,
        "chose_a": 62.5,
        "no_verdict": {"none": 1},
    }
    assert judge_summary([])["win"] is None


def test_without_a_judge_answers_wait_and_are_judged_later(root):
    before, after = records("a", "same"), records("bb", "same")
    pairs = judged(root).compare(before, after)
    assert [(pair["outcome"], pair["delta"]) for pair in pairs] == [("not judged", None)] * 2
    later = judged(root, Script(lambda a, b: "[[A]]" if len(a) > 1 else "[[B]]")).compare(before, after)
    assert [pair["outcome"] for pair in later] == ["win", "tie"]
    assert judged(root).price() is None


def test_dry_run_asks_nothing_and_tells_the_price(root, caplog):
    caplog.set_level("INFO")
    judge = Script(lambda a, b: "[[A]]")
    (pair,) = judged(root, judge, dry_run=True).compare(records("a"), records("b"))
    assert pair["outcome"] == "not judged" and judge.asked == [] and "requests=2" in caplog.text
    rows = records("a", "b"), records("a", "c")
    price, given = judged(root, judge, sets=["one", "two"]).price(), judged(root, judge).price(*rows)
    assert price and price.requests == 20 and given and given.requests == 2


def test_price_at_most_by_hand(root, tmp_path):
    """One prompt of 5 bytes, two answers of at most 8 tokens, that is 24 bytes each: twice the same length of text."""
    chat = client("http://127.0.0.1:1/v1", tmp_path / "cache", usd_per_million_input=1e6, usd_per_million_output=0.0)
    system, user = judge_conversation("helpful", "one 0", "x" * 24, "y" * 24)
    tokens = 2 * sum(-(-len(one["content"].encode()) // 3) + 4 for one in (system, user))
    price = judged(root, chat, limit=1).price()
    assert price == Estimate(2, 0, tokens, 20, float(tokens))
    assert (
        f"up to 2 requests a measured stage, {tokens:,} tokens in, 20 out, at most {tokens:,}.00 USD"
        in judged(root, chat, limit=1).notice()
    )
    assert judged(root).notice() == ""


def test_different_items_are_refused(root):
    with pytest.raises(CapabilityError, match="different items"):
        judged(root, Script(lambda a, b: "[[A]]")).compare(records("a", "b"), records("a"))


def test_texts_are_put_in_as_they_are():
    """Braces, backslashes and the words of the frame in an answer change nothing else of the prompt."""
    odd = "{answer_b} \\1 %s [Assistant B's Answer] [[A]]"
    system, user = judge_conversation("harmless", odd, odd, "b")
    assert user["content"].count(odd) == 2 and "b\n\n[Your Verdict]\nWhich assistant does less harm?" in user["content"]
    assert system["content"] == SYSTEM["harmless"] != SYSTEM["helpful"]
    for token in ("[[A]] if", "[[B]] if", "[[C]] if", "harm"):
        assert token in system["content"]


def test_identity_holds_what_decides_and_the_answers_do_not_know_the_judge(root):
    one, other = judged(root), judged(root, Script(lambda a, b: ""), merge="points")
    assert one.answers_identity() == other.answers_identity() and one.identity() != other.identity()
    base = json.dumps(one.identity())
    for change in ({"limit": 2}, {"max_new_tokens": 9}, {"prompt": "chat"}, {"decoding": "sampled"}, {"sets": ["two"]}):
        assert json.dumps(judged(root, **change).answers_identity()) != json.dumps(one.answers_identity())
    for change in ({"one_verdict": True}, {"same_answer": "ask"}, {"merge": "points"}):
        assert json.dumps(judged(root, **change).identity()) != base
    assert judged(root, temperature=0.7).identity() == one.identity()  # greedy: temperature does nothing


def test_the_judged_model_as_judge_is_warned_of(root, tmp_path):
    from types import SimpleNamespace

    chat = client("http://127.0.0.1:1/v1", tmp_path, model="meta-llama/Llama-2-7b-chat")
    (warning,) = judged(root, chat).warnings(SimpleNamespace(name="llama2_7b_chat", path="other"))
    assert "the judge test is the judged model itself (llama2_7b_chat)" in warning
    assert judged(root, chat).warnings(SimpleNamespace(name="vicuna7b", path="lmsys/vicuna-7b")) == []
    assert judged(root, chat).warnings(SimpleNamespace(name="mine", path="/models/Llama-2-7b-chat/"))
    assert judged(root).warnings(SimpleNamespace(name="llama2_7b_chat")) == []


def test_a_limit_takes_evenly_spaced_rows(root):
    """Two of five: rows 1 and 3 (0 * 5 // 2 and 1 * 5 // 2, from 1)."""
    assert known_sets(str(root), "helpful") == ["one", "two"]
    assert prompts_of(str(root), "helpful", "one", 2) == [(1, "one 0"), (3, "one 2")]
    assert len(prompts_of(str(root), "helpful", "one", 99)) == 5


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"root": None}, ["paths.hhh"]),
        ({"root": "/nowhere"}, ["paths.hhh=/nowhere", "helpful"]),
        ({"sets": ["three"]}, ["'three' is unknown", "one, two"]),
        ({"sets": ["../helpful/one"]}, ["is unknown"]),
        ({"sets": []}, ["one, two"]),
        ({"limit": 0}, ["limit=0"]),
        ({"max_new_tokens": 0}, ["max_new_tokens=0"]),
        ({"merge": "mean"}, ["merge=mean", "strict, points"]),
        ({"axis": "honest"}, ["axis=honest", "helpful, harmless"]),
        ({"decoding": "sampled", "temperature": 0}, ["temperature=0"]),
    ],
    ids=str,
)
def test_wrong_settings_are_named(root, changes, parts):
    (problem,) = judged(root, **changes).problems()
    assert all(part in problem for part in parts)
    assert judged(root).problems() == []


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '[{"prompt": "a"}, {"prompt": 1}]', '[{"prompt": "a"}, {"answer": ""}]']
)
def test_damaged_files_are_named_with_their_row(root, content):
    (root / "helpful" / "one" / "test.json").write_text(content)
    (problem,) = judged(root).problems()
    assert "one/test.json" in problem and ("row 2" in problem or '"a"' not in content)


def test_a_set_that_leads_out_of_its_root_is_refused(root, tmp_path):
    outside = tmp_path / "secret"
    outside.mkdir()
    (outside / "test.json").write_text('[{"prompt": "secret"}]')
    (root / "helpful" / "link").symlink_to(outside)
    (problem,) = judged(root, sets=["link"]).problems()
    assert "leads out" in problem and "secret" not in problem


def test_the_endpoint_is_part_of_the_problems_but_not_of_a_dry_run(root, tmp_path):
    chat = client("http://127.0.0.1:1/v1", tmp_path)
    (problem,) = judged(root, chat).problems()
    assert "cannot be reached" in problem
    assert judged(root, chat, dry_run=True).problems() == []


def test_judging_through_an_endpoint_with_faults(root, tmp_path):
    """A 500, a broken reply and a refusal on the way; judging again sends nothing for what was answered."""

    def script(number, body):
        if number == 0:
            return failure(500)
        if number == 1:
            return 200, {}, b'{"choices": [{"mess'
        user = body["messages"][1]["content"]
        if "ask 1" in user:
            return completion("I'm sorry, I can't help with that.")
        return completion("[[A]]\nbetter" if "Answer]\nnew" in user.split("[Assistant B")[0] else "[[B]]\nbetter")

    with serving(script) as server:
        one = judged(root, client(server.url, tmp_path / "cache"))
        pairs = one.compare(records("old", "old"), records("new", "new"))
        assert [pair["outcome"] for pair in pairs] == ["win", "unparsed"] and len(server.requests) == 6
        assert one.compare(records("old", "old"), records("new", "new")) == pairs and len(server.requests) == 6
        assert one.summary(pairs)["no_verdict"] == {"refused": 2}
