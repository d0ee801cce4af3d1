"""The command against an endpoint of the test's own: rejections, resuming, files written, wrong input."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_tiny

from trace_hydra import rationales
from trace_hydra.data.task import TRACE_TASKS

FOMC = TRACE_TASKS["FOMC"].instruction + "Text:\nSentence {}.\nStance:"
PY150 = "<s> import module{} <EOL>"


class Endpoint(ThreadingHTTPServer):
    """Speaks chat completions; `reply(question, nth)` is a text, or a status number; nth counts a row's requests."""

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply
        self.asked: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server: Any = self.server
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = sent["messages"][-1]["content"]
        with server.lock:
            server.asked[question] += 1
            reply = server.reply(question, server.asked[question])
        message = {"role": "assistant", "content": reply}
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        text = json.dumps({"choices": [{"message": message}], "usage": usage})
        self.send_response(reply if isinstance(reply, int) else 200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(reply) -> Endpoint:
        servers.append(Endpoint(reply))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def rows(template: str, answers: list[str], first: int = 0) -> list[dict[str, str]]:
    return [{"prompt": template.format(first + at), "answer": answer} for at, answer in enumerate(answers)]


def write(folder: Path, task: str, **splits: list[dict[str, str]]) -> None:
    (folder / task).mkdir(parents=True, exist_ok=True)
    for split, content in splits.items():
        (folder / task / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    write(folder, "FOMC", train=rows(FOMC, [*"ABCABC"]), test=rows(FOMC, ["B", "C"], 50))
    write(folder, "Py150", train=rows(PY150, ["import b"] * 3), test=rows(PY150, ["import c"], 50))
    return folder


def command(data: Path, url: str, *more: str) -> list[str]:
    out = str(data.parent / "out")
    given = ["--data", str(data), "--out", out, "--base-url", url, "--model", "teacher-1"]
    return [*given, "--retries", "0", "--concurrency", "1", *more]


def run(data: Path, url: str, *more: str) -> int:
    return rationales.main(command(data, url, *more))


def read(data: Path, file: str) -> Any:
    return json.loads((data.parent / "out" / file).read_text(encoding="utf-8"))


def number(question: str) -> int:
    return int(question.split("Sentence ")[1].split(".")[0])


def right(question: str, nth: int) -> str:
    return f"Sentence {number(question)} says so.\nAnswer:{'ABC'[number(question) % 3]}"


def test_wrong_answers_are_rejected_and_asked_again(data, serve, capsys):
    """Row 0 is right at once, row 1 at the 3rd attempt, row 2 never; rows 3 to 5 at the 2nd: 1 + 3 + 3 + 3 * 2 replies.

    At 100 and 10 tokens a reply and 10 and 30 USD a million: 13 * (100 * 10 + 10 * 30) / 1e6 = 0.0169 USD.
    """
    needs = {0: 1, 1: 3, 2: 99, 3: 2, 4: 2, 5: 2}

    def reply(question, nth):
        if "Sentence" not in question:
            return "yes"
        if nth >= needs[number(question)]:
            return right(question, nth)
        return "I think so." if number(question) == 3 else "Not sure.\nAnswer:D"

    server = serve(reply)
    prices = ["--usd-per-million-input", "10", "--usd-per-million-output", "30"]
    assert run(data, server.url, "--task", "FOMC", *prices) == 0
    report = read(data, "report.json")
    assert report == json.loads(capsys.readouterr().out)
    assert report["tasks"]["FOMC"] == {
        "rule": "answer",
        "rows": 6,
        "accepted": 5,
        "rejected": 1,
        "lost": 0,
        "acceptance_rate": 0.8333,
        "accepted_at_once": 0.1667,
        "rejections": {"wrong answer": 7, "no answer mark": 1},
        "replies": 13,
        "input_tokens": 1300,
        "output_tokens": 130,
        "usd": 0.0169,
        "left_out": [{"id": "train-2", "reasons": ["wrong answer"] * 3}],
        "not_asked": {},
    }
    assert report["total"]["acceptance_rate"] == 0.8333
    assert read(data, "FOMC/train.json")[1] == {
        "prompt": "What is the monetary policy stance for the following text? A. dovish, B. hawkish, C. neutral. "
        "Choose one from A, B and C. Give your reasoning first, and then the answer.\nText:\nSentence 1.\nReasoning:",
        "answer": "Sentence 1 says so.\nAnswer:B",
    }
    assert [number(row["prompt"]) for row in read(data, "FOMC/train.json")] == [0, 1, 3, 4, 5]
    assert [row["answer"] for row in read(data, "FOMC/test.json")] == ["B", "C"]
    assert all(row["prompt"].endswith("\nReasoning:") for row in read(data, "FOMC/test.json"))
    asked = sum(server.asked.values())
    assert asked == 13 + 1  # and the question of the preflight
    assert run(data, server.url, "--task", "FOMC", *prices) == 0  # all done: not even the preflight
    assert sum(server.asked.values()) == asked and read(data, "report.json") == report
    needs[2] = 4
    assert run(data, server.url, "--task", "FOMC", "--attempts", "5") == 0  # goes on at the 4th
    assert sum(server.asked.values()) == asked + 2 and read(data, "report.json")["total"]["accepted"] == 6


def test_stopped_by_a_refused_key_goes_on_without_asking_again(data, serve, capsys):
    refuse = [True]

    def reply(question, nth):
        if "Sentence" in question and number(question) == 4 and refuse:
            return 401
        return right(question, nth) if "Sentence" in question else "yes"

    server = serve(reply)
    assert run(data, server.url, "--task", "FOMC") == 2
    assert "refuses no key (--api-key-env null) (401)" in capsys.readouterr().err
    assert not (data.parent / "out" / "FOMC").exists() and not (data.parent / "out" / "report.json").exists()
    refuse.clear()
    assert run(data, server.url, "--task", "FOMC") == 0
    assert read(data, "report.json")["total"]["accepted"] == 6
    assert {number(question): count for question, count in server.asked.items() if "Sentence" in question} == {
        **dict.fromkeys(range(6), 1),
        4: 2,
    }


def test_killed_in_the_middle_goes_on(data, serve):
    """The endpoint kills the process when it is asked about the fifth row; the four replies before are kept."""
    victims: list[int] = []

    def reply(question, nth):
        if "Sentence" in question and number(question) == 4 and victims:
            os.kill(victims.pop(), signal.SIGKILL)
        return right(question, nth) if "Sentence" in question else "yes"

    server = serve(reply)
    arguments = [sys.executable, "-m", "trace_hydra.rationales", *command(data, server.url, "--task", "FOMC")]
    with server.lock:  # nothing is answered before the endpoint knows whom to kill
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        victims.append(process.pid)
    assert process.wait(60) == -signal.SIGKILL
    assert not (data.parent / "out" / "FOMC").exists()
    assert run(data, server.url, "--task", "FOMC") == 0
    counts = {number(question): count for question, count in server.asked.items() if "Sentence" in question}
    assert counts == {0: 1, 1: 1, 2: 1, 3: 1, 4: 2, 5: 1}
    assert read(data, "report.json")["total"] | {"rejections": {}} == {
        **{"rows": 6, "accepted": 6, "rejected": 0, "lost": 0, "replies": 6, "acceptance_rate": 1.0},
        **{"input_tokens": 600, "output_tokens": 60, "rejections": {}, "usd": None},
    }


def test_other_demonstrations_start_over(data, serve, tmp_path):
    """Stored rationales count only for what was asked."""
    server = serve(lambda question, nth: right(question, nth) if "Sentence" in question else "yes")
    assert run(data, server.url, "--task", "FOMC") == 0
    shown = [{"prompt": FOMC.format(90 + at), "rationale": "Because.", "answer": "ABC"[at]} for at in range(3)]
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"FOMC": shown}), encoding="utf-8")
    assert run(data, server.url, "--task", "FOMC", "--demonstrations", str(file)) == 0
    assert sum("Sentence" in question for question in server.asked.elements()) == 12


def test_a_lost_reply_is_no_rejection(data, serve):
    """A 400 for one row: asked twice, then listed as lost; the next call asks again and gets it."""
    broken = [True]

    def reply(question, nth):
        if "Sentence" in question and number(question) == 1 and broken:
            return 400
        return right(question, nth) if "Sentence" in question else "yes"

    server = serve(reply)
    assert run(data, server.url, "--task", "FOMC", "--attempts", "2") == 0
    fomc = read(data, "report.json")["tasks"]["FOMC"]
    assert (fomc["accepted"], fomc["rejected"], fomc["lost"], fomc["rejections"]) == (5, 0, 1, {})
    (entry,) = fomc["left_out"]
    assert entry["id"] == "train-1" and entry["reasons"] == [] and "400" in entry["lost"]
    broken.clear()
    assert run(data, server.url, "--task", "FOMC", "--attempts", "2") == 0
    assert read(data, "report.json")["total"]["accepted"] == 6


def test_dry_run_asks_and_writes_nothing(data, serve, capsys):
    """Six rows, 3 attempts: three times the price of one; output 6 * 512 tokens at 30 USD a million = 0.09216."""
    server = serve(right)
    prices = ["--usd-per-million-input", "0", "--usd-per-million-output", "30"]
    assert run(data, server.url, "--task", "FOMC", "--dry-run", *prices) == 0
    fomc = json.loads(capsys.readouterr().out)["tasks"]["FOMC"]
    assert (fomc["rows"], fomc["open"], fomc["requests"], fomc["output_tokens_at_most"]) == (6, 6, 6, 3072)
    assert (fomc["usd"], fomc["usd_at_most"]) == (0.0922, 0.2765)
    assert fomc["input_tokens"] > 6 * 300
    assert not server.asked and not (data.parent / "out").exists()


def test_limit_repeats_and_budget(data, serve, capsys):
    """Repeated rows are asked about once, a smaller limit is part of a larger one, money ends the run."""
    write(data, "FOMC", train=rows(FOMC, [*"ABCABC"]) * 2)
    server = serve(lambda question, nth: right(question, nth) if "Sentence" in question else "yes")
    assert run(data, server.url, "--task", "FOMC", "--limit", "2") == 0
    assert read(data, "report.json")["tasks"]["FOMC"]["not_asked"] == {"dedupe": 6, "limit": 4}
    few = [row["prompt"] for row in read(data, "FOMC/train.json")]
    assert run(data, server.url, "--task", "FOMC", "--limit", "4") == 0
    more = [row["prompt"] for row in read(data, "FOMC/train.json")]
    assert len(few) == 2 and len(more) == 4 and set(few) < set(more)
    assert sum("Sentence" in question for question in server.asked.elements()) == 4
    prices = ["--usd-per-million-input", "0", "--usd-per-million-output", "1000", "--max-usd", "0.01"]
    capsys.readouterr()
    assert run(data, server.url, "--task", "FOMC", *prices) == 2  # a reply may take 0.512 USD
    assert "--max-usd 0.01 would be exceeded" in capsys.readouterr().err


def test_written_folder_trains(data, serve, tmp_path):
    """data=trace_reasoning reads it, method=rcl finds reasoning in each row, letters and Py150's answer first."""

    def reply(question, nth):
        if "Sentence" in question:
            return right(question, nth)
        return "It needs another module." if "import b" in question else "yes"

    assert run(data, serve(reply).url, "--task", "FOMC", "--task", "Py150") == 0
    assert read(data, "Py150/train.json")[0] == {
        "prompt": "Complete the next line of the following codes. Give your answer first, and then the reasoning.\n"
        "<s> import module0 <EOL>",
        "answer": "import b\nReasoning:It needs another module.",
    }
    folder = data.parent / "out"
    # The first of the two, which the second replaces, tells run_tiny that these rows are no mini rows.
    given = ["data=trace", "data=trace_reasoning", f"paths.data={folder}", "task_order=[FOMC,Py150]"]
    seen = run_tiny(tmp_path / "runs", ["method=rcl", "method.rationales=required", *given])
    assert seen.results["complete"]
    method: Any = seen.method
    fomc, code = (method._layout(seen.ctx, seen.views[task]) for task in ("FOMC", "Py150"))
    assert (fomc.reasons, fomc.letters, fomc.answer_first) == (True, "ABC", False)
    assert (code.reasons, code.letters, code.answer_first) == (True, "", True)
    for task in ("FOMC", "Py150"):
        assert [row.answer for row in seen.views[task].train] == [
            row["answer"] for row in read(data, f"{task}/train.json")
        ]


def test_a_task_of_ones_own(data, serve, tmp_path):
    """Metric and demonstrations from the command line; the mark from the file."""
    write(data, "sums", train=rows("{} + 1\nAnswer:", ["1", "2"]), test=rows("{} + 1\nAnswer:", ["9"], 8))
    shown = [{"prompt": f"{n} + 2\nAnswer:", "rationale": "Two more.", "answer": str(n + 2)} for n in range(3)]
    file = tmp_path / "own.json"
    file.write_text(
        json.dumps({"sums": {"demonstrations": shown, "cue": "Add.", "mark": "\n回答："}}), encoding="utf-8"
    )
    server = serve(lambda question, nth: f"One more.\n回答：{int(question[0]) + 1}" if "+" in question else "yes")
    assert run(data, server.url, "--task", "sums", "--metric", "accuracy", "--demonstrations", str(file)) == 0
    assert read(data, "sums/train.json")[1] == {
        "prompt": "1 + 1\nGive your reasoning first, and then the answer.\nReasoning:",
        "answer": "One more.\n回答：2",
    }
    assert read(data, "sums/test.json")[0]["answer"] == "9"


def test_nothing_accepted_writes_no_rows(data, serve, capsys, tmp_path):
    """Three demonstrations of the same words have one order only; still each attempt is a request of its own."""
    shown = [{"prompt": FOMC.format(90), "rationale": "Because.", "answer": "A"}] * 3
    (tmp_path / "own.json").write_text(json.dumps({"FOMC": shown}), encoding="utf-8")
    server = serve(lambda question, nth: "no idea")
    assert run(data, server.url, "--task", "FOMC", "--demonstrations", str(tmp_path / "own.json")) == 2
    assert "no rationale was accepted for FOMC" in capsys.readouterr().err
    assert read(data, "report.json")["total"]["rejections"] == {"no answer mark": 18}
    assert sum("Sentence" in question for question in server.asked.elements()) == 18
    assert not (data.parent / "out" / "FOMC").exists()


def test_test_rows_hold_the_letter_alone(data, serve):
    """ScienceQA's plain test answers have a text behind the letter, the Reasoning variant's have none."""
    head = TRACE_TASKS["ScienceQA"].instruction + "\nQuestion:\nSentence {}.\n\nChoices:\nA. a\nB. b\n\nAnswer:"
    full = rows(head, ["A\nFirst.", "B\nSecond."])
    write(data, "ScienceQA", train=full, test=rows(head, ["B\nLast."], 7), eval=rows(head, ["A\nMid."], 8))
    server = serve(lambda question, nth: right(question, nth) if "Sentence" in question else "yes")
    assert run(data, server.url, "--task", "ScienceQA") == 0
    assert [row["answer"][-9:] for row in read(data, "ScienceQA/train.json")] == ["\nAnswer:A", "\nAnswer:B"]
    assert [read(data, f"ScienceQA/{split}.json")[0]["answer"] for split in ("test", "eval")] == ["B", "A"]


def test_a_teacher_in_this_process(data, tmp_path, capsys):
    """A random model: every reply is judged, none holds an answer, and rows and replies add up."""
    from trace_hydra.models.tiny import Tiny

    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "context_length": 4096, "parameters": None}
    model: Any = {"name": "tiny", "seed": 0, "dtype": "float32", "attn_implementation": "sdpa", "published": None}
    tiny = Tiny(**model, **sizes, gradient_checkpointing=False)
    tokenizer: Any = tiny.load_tokenizer()
    tokenizer.chat_template = "{% for one in messages %}{{ one.role }}:{{ one.content }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(tmp_path / "model")
    tiny.load().save_pretrained(tmp_path / "model")
    given = ["--data", str(data), "--out", str(tmp_path / "out"), "--task", "FOMC", "--limit", "2"]
    given += ["--attempts", "2", "--max-tokens", "4"]
    assert rationales.main([*given, "--local-model", str(tmp_path / "model")]) == 2
    assert "no rationale was accepted for FOMC" in capsys.readouterr().err
    total = read(data, "report.json")["total"]
    assert (total["rows"], total["rejected"], total["replies"], sum(total["rejections"].values())) == (2, 2, 4, 4)
    assert rationales.main([*given, "--local-model", str(tmp_path / "absent")]) == 2
    assert f"--local-model {tmp_path / 'absent'} does not exist" in capsys.readouterr().err


WRONG: list[tuple[list[str], str]] = [
    (["--task", "ScienceQA"], r"has no task folder ScienceQA. It has FOMC, Py150\."),
    (["--task", "mine"], "For a task of your own add --metric"),
    (["--task", "../FOMC"], "is no task name"),
    (["--task", "FOMC", "--attempts", "0"], "--attempts 0 must be at least 1"),
    (["--task", "FOMC", "--temperature", "0", "--attempts", "7"], "--temperature 0 gives the same reply"),
    (["--task", "FOMC", "--local-model", "x"], "name the teacher"),
    (["--task", "FOMC", "--api-key-env", "NO_SUCH_KEY"], "the environment variable NO_SUCH_KEY is not set"),
    (["--task", "FOMC", "--max-usd", "1"], "--max-usd 1 needs --usd-per-million-input"),
    (["--task", "FOMC", "--demonstrations", "absent.json"], "absent.json cannot be read"),
    (["--task", "FOMC"], "--base-url http://127.0.0.1:9/v1 cannot be reached"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_input_says_what_to_do(data, options, message, capsys):
    assert run(data, "http://127.0.0.1:9/v1", *options) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert re.search(message, captured.err)
    assert not (data.parent / "out").exists()


def test_wrong_rows_and_folders(data, capsys):
    write(data, "FOMC", train=[{"prompt": "p", "answer": ""}])
    assert run(data, "http://127.0.0.1:9/v1", "--task", "FOMC") == 2
    assert "FOMC/train.json row 1: 'answer' is empty. (Row 1 is the first.)" in capsys.readouterr().err
    (data.parent / "out").mkdir()
    (data.parent / "out" / "mine.txt").write_text("x", encoding="utf-8")
    assert run(data, "http://127.0.0.1:9/v1", "--task", "FOMC") == 2
    assert "holds files that are not this command's" in capsys.readouterr().err


def test_the_key_is_in_no_file_and_no_message(data, serve, capsys, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-very-secret-123")
    server = serve(lambda question, nth: f"sk-very-secret-123 {right(question, nth)}" if "Sent" in question else "yes")
    assert run(data, server.url, "--task", "FOMC", "--api-key-env", "TEACHER_KEY") == 0
    captured = capsys.readouterr()
    assert "very-secret" not in captured.out + captured.err
    files = [path for path in (data.parent / "out").rglob("*") if path.is_file()]
    assert len(files) > 6 and not any("very-secret" in path.read_text(encoding="utf-8") for path in files)
