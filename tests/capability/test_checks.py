"""Verifiable instructions: every check by hand-written answers, strict and loose scores, prompt files."""

import json
from types import SimpleNamespace

import pytest

from trace_hydra.capability import checks, instruct
from trace_hydra.capability.instruct import InstructionChecks, check_record, four_accuracies, read_prompts
from trace_hydra.errors import CapabilityError

# name, parameters, an answer that follows, answers that do not
CASES = [
    ("words", {"relation": "exactly", "count": 3}, "Don't stop, well-meaning.", ["Do stop now please.", "Two words."]),
    ("words", {"relation": "at_most", "count": 2}, "Only two.", ["Now it is four."]),
    ("sentences", {"relation": "exactly", "count": 2}, "It costs 3.50 euros. Why not?", ["One.", "A. B. C."]),
    ("sentences", {"relation": "exactly", "count": 2}, "今天下雨。我在家！", ["今天下雨。"]),
    ("paragraphs", {"relation": "exactly", "count": 2}, "One\nstill one\n\nTwo", ["One\nTwo", "One\n\nTwo\n \nThree"]),
    ("lines", {"relation": "at_least", "count": 2}, "One\n\nTwo", ["One\n\n"]),
    ("includes", {"phrases": ["ice cream", "red"]}, "RED ice cream!", ["ice creams are red", "bored ice cream"]),
    ("avoids", {"phrases": ["the"]}, "There they are.", ["The end.", "by the sea"]),
    ("word_frequency", {"word": "so", "relation": "at_least", "count": 2}, "So, so.", ["so some sort"]),
    ("letter_frequency", {"letter": "z", "relation": "exactly", "count": 2}, "Zigzag", ["zoo", "zzz"]),
    ("all_lowercase", {}, "all small, 3 of them", ["Not all", "123"]),
    ("all_uppercase", {}, "LOUD 3!", ["LOUd", "123"]),
    ("capital_words", {"relation": "exactly", "count": 1}, "I saw NASA", ["I saw it", "NASA and ESA"]),
    ("no_comma", {}, "One and two", ["One, two", "一，二", "واحد، اثنان"]),
    ("no_exclamation", {}, "Calm.", ["Loud!", "¡Hola"]),
    ("json_value", {}, '{"a": [1, 2]}', ['{"a": 1', "17", 'Here: {"a": 1}']),
    ("json_value", {}, '```json\n{"a": 1}\n```', ['```json\n{"a": 1}']),
    ("bullets", {"relation": "exactly", "count": 2}, "- one\n* two", ["- one", "-one\n-two", "- a\n- b\n- c"]),
    ("numbered", {"count": 2}, "1. one\n2) two", ["1. one\n3. two", "1. one", "1. a\n2. b\n3. c"]),
    ("placeholders", {"relation": "at_least", "count": 2}, "Dear [name], [date]", ["Dear [name]", "Dear [] []"]),
    ("title", {}, "<<A walk>>\nText", ["<A walk>", "<<>>", "<< >>"]),
    ("highlights", {"relation": "exactly", "count": 2}, "a *b* and **c d**", ["a *b*", "2 * 3 * 4 * 5"]),
    ("sections", {"marker": "Part", "count": 2}, "Part 1\nx\n## Part 2:\ny", ["Part 1\nx", "In Part 1 and\nin Part 2"]),
    ("starts_with", {"phrase": "Once upon"}, " once upon a time", ["It was once upon", "Once uponn"]),
    ("ends_with", {"phrase": "the end"}, 'So. "The end."', ["The end is near", "bathe end"]),
    ("ends_with", {"phrase": "really?"}, "Is it, really?\n", ["really", "really? Yes"]),
    ("quoted", {}, ' "All of it." ', ['"Part" of it', 'He said "so"', '"a" and "b"']),
    ("postscript", {"marker": "P.S."}, "Dear you\n\nP.S. Bye", ["P.S. Bye", "Text P.S. Bye", "Dear you\nP.S. "]),
    ("repeats_prompt", {"phrase": "Why so?"}, "Why  so?\nBecause.", ["Why so?", "Because. Why so?"]),
    ("two_answers", {"separator": "***"}, "one *** two", ["one", "one *** one", "a *** b *** c", "*** two"]),
    ("script", {"script": "cyrillic"}, "Это большой дом NASA и сад.", ["Eto dom", "Это some English words", "123"]),
    ("script", {"script": "japanese"}, "今日はいい天気です", ["오늘은"]),
]


@pytest.mark.parametrize(("name", "params", "good", "bad"), CASES, ids=[case[0] for case in CASES])
def test_check(name, params, good, bad):
    assert checks.problem_of(name, params) is None
    assert checks.follows(good, name, params, "Say it first: why so?")
    assert [answer for answer in bad if checks.follows(answer, name, params, "Say it first: why so?")] == []
    assert not checks.follows(" \n", name, params, "why so?")  # an empty answer follows nothing


def test_every_check_has_a_case_and_prompts_of_ours():
    """A new check without a case here, or without a prompt, fails."""
    own = read_prompts(instruct.OWN_FILE)
    assert {case[0] for case in CASES} == set(checks.CHECKS) == {one["name"] for row in own for one in row["checks"]}
    assert len(own) >= 60 and len({row["prompt"] for row in own}) == len(own)
    assert max(len(row["checks"]) for row in own) in (2, 3)


def test_an_empty_answer_is_no_way_to_avoid_a_word():
    assert not checks.follows("", "avoids", {"phrases": ["x"]}) and not checks.follows("", "no_comma", {})


def test_loose_forgives_a_first_or_last_line_and_asterisks():
    """A greeting line makes the strict verdict fail; without it all is lower case. Two more lines are too many."""
    answer = "Sure!\nall small"
    assert not checks.follows(answer, "all_lowercase", {})
    assert checks.follows_loosely(answer, "all_lowercase", {})
    assert checks.follows_loosely("Sure!\n**all small**\nBye", "quoted", {}) is False
    assert checks.follows_loosely("**the end**\nHope it helps", "ends_with", {"phrase": "the end"})
    assert not checks.follows_loosely("Sure!\nOf course!\nall small", "all_lowercase", {})
    assert len(checks.variants("a\nb\nc")) == 8


def test_accuracies():
    """Two prompts, three instructions: one prompt follows all (50 %), two of three instructions are followed."""
    assert checks.accuracies([[True], [True, False]]) == (50.0, pytest.approx(200 / 3))


def test_four_accuracies_of_records():
    """First prompt: followed loosely only. Second: one of two instructions, strictly and loosely."""
    item = {"prompt": "p", "category": "c", "id": "1", "checks": [{"name": "all_lowercase"}]}
    two = {**item, "checks": [{"name": "no_comma"}, {"name": "includes", "phrases": ["tea"]}]}
    records = [check_record(item, "Sure!\nsmall", "checks"), check_record(two, "no tea, thanks", "checks")]
    assert [(record["score"], record["loose"]) for record in records] == [(0.0, 100.0), (0.0, 0.0)]
    assert four_accuracies(records) == {
        "prompt_strict": 0.0,
        "prompt_loose": 50.0,
        "instruction_strict": pytest.approx(100 / 3),
        "instruction_loose": pytest.approx(200 / 3),
    }
    own = InstructionChecks(file=None, limit=None, max_new_tokens=1)
    first = [{**record, "id": str(number)} for number, record in enumerate(records)]
    better = {**check_record(two, "tea", "checks"), "id": "1"}
    pairs = own.compare(first, [first[0], better])
    assert [pair["delta"] for pair in pairs] == [0.0, 100.0]
    found = own.summary(pairs)["accuracies"]
    assert found["before"] == four_accuracies(first) and found["after"]["prompt_strict"] == 50.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "checks": [{"name": "shiny"}]}, "check 'shiny' is unknown; there are all_lowercase,"),
        ({"prompt": "p", "checks": [{"name": "words", "count": 3}]}, "takes exactly the parameters"),
        ({"prompt": "p", "checks": [{"name": "numbered", "count": "3"}]}, "count='3' must be a whole number"),
        ({"prompt": "p", "checks": [{"name": "words", "relation": "at_least", "count": 0}]}, "that an answer can miss"),
        ({"prompt": "p", "checks": [{"name": "words", "relation": "about", "count": 3}]}, "relation='about'"),
        ({"prompt": "p", "checks": [{"name": "script", "script": "runic"}]}, "script='runic'"),
        ({"prompt": "p", "checks": [{"name": "includes", "phrases": []}]}, "must be a list of texts"),
        ({"prompt": "p", "checks": [{"name": "starts_with", "phrase": " "}]}, "a text that is not empty"),
        ({"prompt": "p", "checks": [{"name": "repeats_prompt", "phrase": "q"}]}, "does not stand in the prompt"),
        ({"prompt": "p", "checks": []}, "at least one check"),
        ({"prompt": " ", "checks": [{"name": "title"}]}, "'prompt' that is not empty"),
        ({"prompt": "p", "checks": ["title"]}, "must be an object with a 'name'"),
        ({"prompt": "p", "checks": [{"name": "title"}], "key": 1}, "unknown keys ['key']"),
        ({"prompt": "p", "checks": [{"name": "title"}], "id": 7}, "'id' must be a text"),
        (None, "a row must be an object"),
    ],
)
def test_a_wrong_prompt_file_names_file_and_row(tmp_path, row, message):
    path = tmp_path / "own.json"
    path.write_text(json.dumps([{"prompt": "fine", "checks": [{"name": "title"}]}, row]))
    (problem,) = InstructionChecks(file=str(path), limit=None, max_new_tokens=8).problems()
    assert problem.startswith(f"{path}:2: ") and message in problem


def test_other_problems_are_listed(tmp_path):
    missing = InstructionChecks(file=str(tmp_path / "no.json"), limit=0, max_new_tokens=0).problems()
    assert len(missing) == 3 and "No such file" in missing[2] and "limit" in missing[0]
    twice = tmp_path / "twice.json"
    twice.write_text(json.dumps([{"id": "a", "prompt": "p", "checks": [{"name": "title"}]}] * 2))
    with pytest.raises(CapabilityError, match=r"twice.json:2: id 'a' occurs twice"):
        read_prompts(twice)
    (tmp_path / "bad.json").write_text("[")
    with pytest.raises(CapabilityError, match="is no JSON"):
        read_prompts(tmp_path / "bad.json")
    assert InstructionChecks(file=None, limit=5, max_new_tokens=8).problems() == []


class Scripted:
    """A subject whose answers are known beforehand."""

    max_length = 100

    def __init__(self, answers, template=None):
        self.answers, self.tokenizer = answers, SimpleNamespace(chat_template=template)
        self.modes = []

    def encoder(self, mode):
        self.modes.append(mode)
        return SimpleNamespace(prompts=lambda prompts, instruction, limit: ([[limit] for _ in prompts], 0))

    def generate(self, prompts, max_new_tokens, *, ids, **_):
        assert all(one == [self.max_length - max_new_tokens] for one in ids)
        return [SimpleNamespace(text=self.answers[prompt]) for prompt in prompts]


@pytest.mark.parametrize(("template", "mode"), [(None, "raw"), ("{{ x }}", "chat")])
def test_measure_verifies_each_answer(tmp_path, template, mode):
    path = tmp_path / "own.json"
    rows = [
        {"prompt": "small", "checks": [{"name": "all_lowercase"}]},
        {"prompt": "title", "checks": [{"name": "title"}, {"name": "no_comma"}], "category": "mine", "id": "x"},
    ]
    path.write_text(json.dumps(rows))
    part = InstructionChecks(file=str(path), limit=None, max_new_tokens=8)
    subject = Scripted({"small": "yes", "title": "<<a>>, b"}, template)
    first, second = part.measure(subject)  # type: ignore[arg-type]
    assert subject.modes == [mode]
    assert (first["category"], first["id"], first["score"]) == ("case", "001", 100.0)
    assert (second["category"], second["id"], second["score"], second["loose"]) == ("mine", "x", 0.0, 0.0)
    assert [one["strict"] for one in second["checks"]] == [True, False]
    assert {first["area"], first["set"], first["measure"]} == {"instruction", "checks", "prompt-level strict accuracy"}
    (pair, _) = part.compare([first, second], [{**first, "score": 0.0}, second])
    assert pair["delta"] == -100.0


def test_identity_follows_items_and_settings():
    def identity(**change):
        return InstructionChecks(**{"file": None, "limit": None, "max_new_tokens": 8, **change}).identity()

    assert identity() == identity()
    assert identity() != identity(limit=5) and identity() != identity(max_new_tokens=9)
