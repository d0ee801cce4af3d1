"""Reading TRACE's layout: every kind of bad file is named, rows are chosen alike whatever else is loaded."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from trace_hydra.data.release import VARIANT_FOLDERS
from trace_hydra.data.rows import read_split
from trace_hydra.data.task import TRACE_TASKS, final_prediction
from trace_hydra.data.trace import TraceData
from trace_hydra.errors import ConfigError, DataError

NONE = {"train": None, "eval": None, "test": None}


def make(root: Path | str | None, **changes) -> TraceData:
    settings = {
        "name": "trace",
        "root": None if root is None else str(root),
        "variant": None,
        "limit": NONE,
        "max_prompt_chars": NONE,
        "dedupe": False,
        "drop_leaked": False,
        "strict": True,
        "alignment": "Lima",
        "tasks": {},
    }
    return TraceData(**{**settings, **changes})


def rows(split: str, count: int, answer: str = "A") -> list[dict]:
    return [{"prompt": f"{split} question {number}", "answer": answer} for number in range(count)]


def write(root: Path, task: str, **splits) -> None:
    """Write a task's files; each split is a list of rows, or the file's bytes, or None for no file."""
    content = {split: rows(split, 3) for split in ("train", "eval", "test")} | splits
    (root / task).mkdir(parents=True, exist_ok=True)
    for split, value in content.items():
        if value is not None:
            raw = value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()
            (root / task / f"{split}.json").write_bytes(raw)


def bad_file(first: object) -> list:
    return [{"prompt": "good", "answer": "A"}, first, {"prompt": "also good", "answer": "B"}]


BAD_ROWS = {
    "missing key": ({"prompt": "q"}, "row 2: has no key 'answer'; its keys: 'prompt'"),
    "null": ({"prompt": "q", "answer": None}, "row 2: 'answer' is null, not a string"),
    "not a string": ({"prompt": 7, "answer": "A"}, "row 2: 'prompt' is the number 7, not a string"),
    "not an object": (["q", "A"], "row 2: is a list, not an object"),
    "empty prompt": ({"prompt": " \n", "answer": "A"}, "row 2: 'prompt' is empty"),
    "empty answer": ({"prompt": "q", "answer": ""}, "row 2: 'answer' is empty"),
}


@pytest.mark.parametrize(("reason", "row", "message"), [(key, *value) for key, value in BAD_ROWS.items()])
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_row(tmp_path, reason, row, message, split):
    """Row 2 of three is bad: strict refuses it by file and row, lenient drops and counts it, ids keep their numbers."""
    write(tmp_path, "FOMC", **{split: bad_file(row)})
    with pytest.raises(DataError) as error:
        make(tmp_path).load(["FOMC"], seed=0)
    assert f"FOMC/{split}.json {message}" in str(error.value)
    assert "data.strict=false" in str(error.value)
    lenient = make(tmp_path, strict=False)
    task = lenient.load(["FOMC"], seed=0).tasks["FOMC"]
    assert [example.id for example in getattr(task, split)] == [f"{split}-0", f"{split}-2"]
    assert lenient.files["FOMC"][split]["dropped"] == {reason: 1}
    assert lenient.files["FOMC"][split]["rows"] == 3


BAD_FILES = {
    "zero bytes": (b"", "is empty"),
    "blank": (b" \n", "is empty"),
    "empty list": (b"[]", "is an empty list"),
    "malformed": (
        b'[{"prompt": "q", "answer": "A"},\n {"prompt" "q"}]',
        "is not JSON: Expecting ':' delimiter, line 2, column 12",
    ),
    "cut off": (b'[{"prompt": "q", "ans', "is not JSON: Unterminated string starting at, line 1, column 18"),
    "object": (b'{"prompt": ["q"], "answer": ["A"]}', "holds an object, not a JSON list"),
    "string": (b'"rows"', "holds a string, not a JSON list"),
    "JSON lines": (b'{"prompt": "q", "answer": "A"}\n{"prompt": "r", "answer": "B"}\n', "holds JSON lines"),
    "deep": (b"[" * 200_000, "is not JSON that can be read: RecursionError"),
    "long number": (b"[" + b"9" * 5000 + b"]", "is not JSON that can be read: ValueError"),
}


@pytest.mark.parametrize(("raw", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
@pytest.mark.parametrize("strict", [True, False])
def test_bad_file(tmp_path, raw, message, strict):
    """Lenient reading drops rows, never a file."""
    write(tmp_path, "FOMC", test=raw)
    (problem,) = make(tmp_path, strict=strict).problems(["FOMC"])
    assert problem.startswith(f"FOMC/test.json {message}")


def test_byte_order_mark(tmp_path):
    """Refused when strict, read past and noted when lenient."""
    write(tmp_path, "FOMC", eval=b"\xef\xbb\xbf" + json.dumps(rows("eval", 2)).encode())
    (problem,) = make(tmp_path).problems(["FOMC"])
    assert problem.startswith("FOMC/eval.json begins with a UTF-8 byte order mark")
    lenient = make(tmp_path, strict=False)
    assert len(lenient.load(["FOMC"], seed=0).tasks["FOMC"].eval) == 2
    assert lenient.files["FOMC"]["eval"]["bom"]
    assert not lenient.files["FOMC"]["test"]["bom"]


def test_bad_utf8(tmp_path):
    r"""Latin-1 ä (0xE4) in row 2. It stands behind `[{"prompt": "q", "answer": "A"}, {"prompt": "`, 45 bytes."""
    start = b'[{"prompt": "q", "answer": "A"}, {"prompt": "'
    write(tmp_path, "FOMC", train=start + b'\xe4", "answer": "B"}, {"prompt": "\xc3\xa4", "answer": "C"}]')
    problems = make(tmp_path).problems(["FOMC"])
    assert problems[0].startswith("FOMC/train.json is not UTF-8: byte 45 (counted from 0) is 0xE4.")
    assert problems[1].startswith("FOMC/train.json row 2: 'prompt' has bytes that are not UTF-8.")
    lenient = make(tmp_path, strict=False)
    train = lenient.load(["FOMC"], seed=0).tasks["FOMC"].train
    assert [(row.id, row.prompt) for row in train] == [("train-0", "q"), ("train-2", "ä")]
    assert lenient.files["FOMC"]["train"]["dropped"] == {"not UTF-8": 1}


def test_text_is_kept_as_it_is(tmp_path):
    """CRLF, surrounding blanks, a NUL, 30,000 tokens and an empty MeetingBank transcript are all legal."""
    empty = TRACE_TASKS["MeetingBank"].instruction + "Meeting transcripts:\n\nSummary:"
    texts = ["a\r\nb\rc", "  x \n", "\0", empty, "word " * 30_000]
    write(tmp_path, "MeetingBank", train=[{"prompt": "p" + text, "answer": "a" + text} for text in texts])
    train = make(tmp_path).load(["MeetingBank"], seed=0).tasks["MeetingBank"].train
    assert [(row.prompt, row.answer) for row in train] == [("p" + text, "a" + text) for text in texts]


def test_extra_keys_and_empty_eval_answers_are_legal(tmp_path):
    """Extra keys are counted; nothing is scored against eval answers."""
    write(tmp_path, "FOMC", train=[{"prompt": "q", "answer": "A", "id": 1, "x": []}], eval=rows("eval", 2, answer=""))
    data = make(tmp_path)
    assert len(data.load(["FOMC"], seed=0).tasks["FOMC"].eval) == 2
    assert data.files["FOMC"]["train"]["extra_keys"] == {"id": 1, "x": 1}


def test_all_missing_files_are_listed(tmp_path):
    write(tmp_path, "FOMC", eval=None, test=None)
    (tmp_path / "FOMC" / "test.jsonl").write_text("{}")
    problems = make(tmp_path).problems(["FOMC", "C-STANCE", "Py150"])
    assert [problem.split(". ")[0] for problem in problems] == [
        f"{tmp_path} has no folder C-STANCE",
        f"{tmp_path} has no folder Py150",
        f"{tmp_path} has no FOMC/eval.json.",
        f"{tmp_path} has no FOMC/test.json",
    ]
    assert "There is test.jsonl, which is not read" in problems[3]


def test_all_problems_in_one_error(tmp_path):
    """Settings, task names and files together, in the error that `load` raises."""
    write(tmp_path, "FOMC", train=b"{")
    data = make(
        tmp_path,
        variant="trace50",
        limit={"train": 0, "eval": True, "tset": 1},
        max_prompt_chars={"test": "9"},
        strict="no",
        alignment="../Lima",
        tasks={"Own": {"metric": "accuracy", "max_new_tokens": "8"}},
    )
    with pytest.raises(DataError) as error:
        data.load(["FOMC", "Mine", "Own"], seed=0)
    message = str(error.value)
    for part in (
        "data.variant='trace50' is none of trace5000,",
        "data.limit.train=0 must be",
        "data.limit.eval=True must be",
        "data.limit.tset is unknown",
        "data.max_prompt_chars.test='9' must be",
        "data.strict='no' must be",
        "data.alignment='../Lima' is no folder name",
        "task 'Mine' is unknown",
        "data.tasks.Own: a value of a wrong type",
        "FOMC/train.json is not JSON",
        f"{tmp_path} has no folder Mine",
    ):
        assert part in message


def test_setting_that_is_no_mapping():
    with pytest.raises(ConfigError, match=r"data\.limit=5 must be a mapping"):
        make("x", limit=5)
    with pytest.raises(ConfigError, match=r"data\.tasks\.A='x' must be a mapping"):
        make("x", tasks={"A": "x"})


def test_missing_root_says_how_to_get_the_data(tmp_path):
    for data, start in (
        (make(None), "data=trace needs a folder, paths.data is null."),
        (make(tmp_path / "no"), f"paths.data={tmp_path / 'no'} does not exist."),
        (make(tmp_path), f"paths.data={tmp_path} has none of the task folders FOMC."),
    ):
        (problem,) = data.problems(["FOMC"])
        assert problem.startswith(start)
        assert "TRACE-Benchmark.zip" in problem
        assert "data=trace5000 paths.data=FOLDER" in problem
        assert "data=mini needs no files" in problem


def test_problems_are_shortened_fairly(tmp_path):
    """30 bad train rows and a missing test file are 31 problems: 20 are shown, the missing file among them."""
    write(tmp_path, "FOMC", train=rows("train", 30, answer=""), test=None)
    problems = make(tmp_path).problems(["FOMC"])
    assert len(problems) == 21
    assert problems[-1] == "... and 11 more."
    assert f"{tmp_path} has no FOMC/test.json." in problems
    assert problems[0].startswith("FOMC/train.json row 1:")


def test_link_out_of_the_root(tmp_path):
    """A linked file, a linked task folder and a link to itself are refused; a link within the root is fine."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    write(outside, "FOMC")
    write(root, "C-STANCE", train=None, test=None)
    (root / "C-STANCE" / "train.json").symlink_to(outside / "FOMC" / "train.json")
    (root / "C-STANCE" / "test.json").symlink_to("eval.json")
    (root / "FOMC").symlink_to(outside / "FOMC")
    problems = make(root, strict=False).problems(["C-STANCE", "FOMC"])
    assert [problem.split(" is a link out of ")[0] for problem in problems] == [
        "C-STANCE/train.json",
        "FOMC/train.json",
        "FOMC/eval.json",
        "FOMC/test.json",
    ]
    (root / "C-STANCE" / "eval.json").unlink()
    (root / "C-STANCE" / "eval.json").symlink_to("eval.json")
    assert "C-STANCE/eval.json cannot be followed" in str(read_split(root, root, "C-STANCE", "eval").fatal)


@pytest.mark.parametrize("name", ["../FOMC", "/etc", "FOMC/../../x", "a\0b", ".hidden", ""])
def test_task_name_that_leads_elsewhere(tmp_path, name):
    write(tmp_path / "root", "C-STANCE")
    write(tmp_path, "FOMC")
    data = make(tmp_path / "root", tasks={name: {"metric": "accuracy", "max_new_tokens": 1}})
    assert any("is no task name" in problem for problem in data.problems([name]))


def test_unreadable_file(tmp_path):
    """A folder where a file should be."""
    write(tmp_path, "FOMC", eval=None)
    (tmp_path / "FOMC" / "eval.json").mkdir()
    assert make(tmp_path).problems(["FOMC"]) == ["FOMC/eval.json cannot be read: Is a directory."]


def test_limits_are_nested_random_and_independent(tmp_path):
    """Smaller samples are parts of larger ones, in file order, not the file's head, and not moved by another task."""
    write(tmp_path, "FOMC", train=rows("train", 100))
    write(tmp_path, "C-STANCE", train=rows("train", 100))

    def ids(size, seed=1, order=("FOMC", "C-STANCE"), task="FOMC"):
        data = make(tmp_path, limit={"train": size, "eval": None, "test": None})
        return [int(row.id.split("-")[1]) for row in data.load(order, seed=seed).tasks[task].train]

    nested = [ids(size) for size in (1, 5, 20, 99, 100, 500)]
    assert [len(sample_ids) for sample_ids in nested] == [1, 5, 20, 99, 100, 100]
    for small, large in itertools.pairwise(nested):
        assert set(small) <= set(large)
        assert large == sorted(large)
    assert nested[2] != list(range(20))
    assert ids(20) == ids(20, order=("C-STANCE", "FOMC")) == ids(20, order=("FOMC",))
    assert ids(20) != ids(20, seed=2)
    assert ids(20) != ids(20, task="C-STANCE")


def test_nothing_left(tmp_path):
    """All train rows leaked: an error before anything runs. An empty eval is none (FOMC's eval is its test)."""
    write(tmp_path, "FOMC", train=rows("test", 3), eval=rows("test", 3))
    (problem,) = make(tmp_path, drop_leaked=True).problems(["FOMC"])
    assert problem.startswith("FOMC/train.json has no row left with data.strict=True, data.drop_leaked=True")
    write(tmp_path, "FOMC", train=rows("train", 3), eval=rows("test", 3))
    assert make(tmp_path, drop_leaked=True).load(["FOMC"], seed=0).tasks["FOMC"].eval == ()


def test_variant_folder_and_hint(tmp_path):
    """The archive's own folders are found below root; without a variant, the message names the option to choose."""
    write(tmp_path / "TRACE-Benchmark" / "LLM-CL-Benchmark_500", "FOMC")
    write(tmp_path / "LLM-CL-Benchmark_5000", "FOMC", train=rows("train", 5))
    assert len(make(tmp_path, variant="trace5000").load(["FOMC"], seed=0).tasks["FOMC"].train) == 5
    assert len(make(tmp_path, variant="trace500").load(["FOMC"], seed=0).tasks["FOMC"].train) == 3
    (problem,) = make(tmp_path).problems(["FOMC"])
    assert "It holds LLM-CL-Benchmark_5000, LLM-CL-Benchmark_500: choose data=trace5000." in problem


def test_reasoning_may_lack_eval(tmp_path, caplog):
    """Only trace_reasoning does without eval.json; the log says that the files are not the release's."""
    write(tmp_path, "FOMC", eval=None)
    for variant in (None, "trace500", "trace5000"):
        assert make(tmp_path, variant=variant).problems(["FOMC"]) == [f"{tmp_path} has no FOMC/eval.json."]
    data = make(tmp_path, variant="trace_reasoning")
    assert data.load(["FOMC"], seed=0).tasks["FOMC"].eval == ()
    assert set(data.files["FOMC"]) == {"train", "test"}
    assert "2 files are not those of trace_reasoning; the first: FOMC/train.json has 3 rows;" in caplog.text


def test_alignment(tmp_path):
    """Only Lima's train.json is read: its eval and test answers may be empty. Without the folder there is none."""
    write(tmp_path, "FOMC")
    assert make(tmp_path).load(["FOMC"], seed=0).alignment == ()
    write(tmp_path, "Lima", eval=None, test=rows("test", 2, answer=""))
    limit = {**NONE, "train": 2}
    assert len(make(tmp_path, limit=limit).load(["FOMC"], seed=0).alignment) == 2
    assert make(tmp_path, alignment=None).load(["FOMC"], seed=0).alignment == ()
    write(tmp_path, "Lima", train=rows("train", 2, answer=""))
    assert make(tmp_path).problems(["FOMC"])[0].startswith("Lima/train.json row 1: 'answer' is empty.")


def test_changed_file_is_read_again(tmp_path):
    """`load` uses what `problems` read, unless the file has changed since."""
    write(tmp_path, "FOMC")
    data = make(tmp_path)
    assert data.problems(["FOMC"]) == []
    write(tmp_path, "FOMC", train=rows("train", 9))
    assert len(data.load(["FOMC"], seed=0).tasks["FOMC"].train) == 9


def test_released_rows(shared_data):
    """Row counts as in the samples' README; every prompt starts with its task's instruction."""
    data = make(shared_data / "trace")
    names = list(TRACE_TASKS)
    loaded = data.load(names, seed=0)
    counts = {
        name: tuple(len(getattr(task, split)) for split in ("train", "eval", "test"))
        for name, task in loaded.tasks.items()
    }
    usual = (200, 50, 100)
    assert counts == dict.fromkeys(names, usual) | {"Py150": (200, 50, 96), "NumGLUE-cm": (200, 41, 81)}
    assert len(loaded.alignment) == 200
    for name, task in loaded.tasks.items():
        assert task.instruction == TRACE_TASKS[name].instruction
    assert loaded.tasks == make(shared_data / "trace").load(names[::-1], seed=0).tasks


def test_reasoning_rows(shared_data):
    """60 train and 30 test rows a task, no eval; answers of train end in the answer's tag and the answer."""
    loaded = make(shared_data / "trace_reasoning", variant="trace_reasoning").load(list(TRACE_TASKS), seed=0)
    assert {(len(task.train), len(task.eval), len(task.test)) for task in loaded.tasks.values()} == {(60, 0, 30)}
    assert all("\n回答：" in row.answer for row in loaded.tasks["C-STANCE"].train)
    assert {row.answer for row in loaded.tasks["C-STANCE"].test} <= {"A", "B", "C"}


CONF = Path(__file__).resolve().parents[2] / "conf" / "data"


def composed(option: str, root: Path) -> TraceData:
    """Build an option as Hydra does: trace.yaml, the option's own keys over it."""
    settings: dict[str, Any] = {}
    for name in ("trace", option):
        keys = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
        assert isinstance(keys, dict)
        settings |= {str(key): value for key, value in keys.items()}
    assert settings["root"] == "${paths.data}"
    settings["root"] = str(root)
    for facts in settings["tasks"].values():
        if "splitter" in facts:
            assert facts["splitter"] == "${protocol.splitter}"
            facts["splitter"] = "ours"
    settings.pop("defaults", None)
    assert settings.pop("_target_") == "trace_hydra.data.trace.TraceData"
    return TraceData(**settings)


@pytest.mark.parametrize("option", ["trace", *VARIANT_FOLDERS])
def test_options_build_and_are_named_after_themselves(tmp_path, option):
    """Each file of conf/data gives exactly the constructor's keywords, and finds its own folder."""
    data = composed(option, tmp_path)
    assert data.name == option
    assert data.variant == (None if option == "trace" else option)
    write(tmp_path / VARIANT_FOLDERS.get(option, "."), "FOMC")
    assert data.problems(["FOMC"]) == []


def test_reasoning_option_knows_the_instructions(shared_data):
    """The instructions in trace_reasoning.yaml stand at the head of each row; answers may span lines."""
    loaded = composed("trace_reasoning", shared_data / "trace_reasoning").load(list(TRACE_TASKS), seed=0)
    for task in loaded.tasks.values():
        assert task.spec.instruction != TRACE_TASKS[task.name].instruction
        for row in task.train:  # what evaluation takes out of a reference answer is its final answer
            final = final_prediction(row.answer, task.spec)
            assert final and final != row.answer and final in row.answer
            assert not task.spec.letters or final in task.spec.letters
        for row in task.train + task.test:
            assert row.prompt.startswith(task.spec.instruction)
        if task.name != "Py150":  # the line of code comes first, what follows is not scored
            stops = [stop for stop in task.spec.stop if any(stop in row.answer for row in task.train)]
            assert stops == []
