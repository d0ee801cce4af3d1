"""The README's how-tos are followed to the letter, in a folder outside the repository."""

import json
import os
import re

import pytest
from conftest import ROOT
from zygote import run_module

README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language; "" for those without one."""
    parts = re.split(r"^```(.*)\n", text, flags=re.MULTILINE)
    return [body for opening, body in zip(parts[1::4], parts[2::4], strict=True) if opening == language]


def follow(folder, line: str, *more: str):
    """Run a command of the README on the tiny model."""
    import shlex

    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "trace_hydra"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]), "WANDB_MODE": "offline"}
    return run_module("trace_hydra", *words[3:], *more, cwd=folder, env=environment)


def test_adding_a_method(tmp_path):
    text = section("Add a method")
    (python,), (yaml,), commands = blocks(text, "python"), blocks(text, "yaml"), blocks(text, "")
    (tmp_path / "my_methods").mkdir()
    (tmp_path / "my_methods" / "l2start.py").write_text(python, encoding="utf-8")
    (tmp_path / "my_conf" / "method").mkdir(parents=True)
    (tmp_path / "my_conf" / "method" / "l2start.yaml").write_text(yaml, encoding="utf-8")
    done = follow(tmp_path, commands[-1], "debug=smoke", "task_order=[FOMC,Py150]", f"paths.runs={tmp_path / 'runs'}")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs").rglob("results.json")
    assert json.loads(path.read_text())["method"] == "l2start"
    metrics = next((tmp_path / "runs").rglob("metrics.csv")).read_text()
    assert "train/loss/l2" in metrics.splitlines()[0]


def test_a_method_outside_needs_to_be_trusted(tmp_path):
    text = section("Add a method")
    (tmp_path / "my_conf" / "method").mkdir(parents=True)
    (tmp_path / "my_conf" / "method" / "l2start.yaml").write_text(blocks(text, "yaml")[0], encoding="utf-8")
    line = blocks(text, "")[-1].replace("'trust.targets=[my_methods.]'", "debug=smoke")
    done = follow(tmp_path, line)
    assert done.returncode == 2 and "trust.targets" in done.stderr


def test_adding_a_task(tmp_path):
    text = section("Add a task")
    (yaml,), (command,) = blocks(text, "yaml"), blocks(text, "")
    (tmp_path / "my_conf" / "data").mkdir(parents=True)
    (tmp_path / "my_conf" / "data" / "mine.yaml").write_text(yaml, encoding="utf-8")
    task = tmp_path / "my_data" / "Capitals"
    task.mkdir(parents=True)
    for split, places in (("train", ["Rome", "Bern"]), ("eval", ["Oslo"]), ("test", ["Wien", "Riga"])):
        rows = [{"prompt": f"Name the city.\nCity {place}:", "answer": place} for place in places]
        (task / f"{split}.json").write_text(json.dumps(rows))
    done = follow(tmp_path, command, "debug=smoke", f"paths.runs={tmp_path / 'runs'}")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs").rglob("results.json")
    results = json.loads(path.read_text())
    assert results["tasks"] == ["Capitals"] and results["stages"][0]["epochs"] == 3
    assert results["task_specs"]["Capitals"]["instruction"] == "Name the city.\n"


@pytest.mark.parametrize("line", [line.split("#")[0].strip() for line in blocks(section("Use"), "")[0].splitlines()])
def test_every_line_of_use_composes(line, tmp_path):
    """Hydra composes each command; the audit's and the scorer's own options are tested with them."""
    words = line.replace("FOLDER", str(tmp_path))
    if "trace_hydra." in words.split()[2]:
        return
    if " -m method" in words or "sweep=" in words:
        words = words.replace(" -m method=seqft,replay", " method=replay").replace(",[Py150,FOMC]", "")
    done = follow(tmp_path, words, "--cfg", "job") if "--cfg" not in words else follow(tmp_path, words)
    assert done.returncode == 0 and "method:" in done.stdout, done.stderr


def test_the_table_names_every_method():
    for path in (ROOT / "conf" / "method").glob("*.yaml"):
        assert f"`{path.stem}`" in section("What works today")
