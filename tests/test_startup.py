"""What a command loads before it says something."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

HEAVY = (
    "torch",
    "transformers",
    "lightning",
    "peft",
    "wandb",
    "datasets",
    "pandas",
    "matplotlib",
    "sklearn",
    "joblib",
    "submitit",
)
CODE = """
import json, runpy, sys
module, *sys.argv[1:] = json.loads({arguments!r})
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as end:
    code = end.code or 0
else:
    code = 0
print(json.dumps([code, [name for name in {heavy!r} if name in sys.modules]]), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["trace_hydra", "--cfg", "job"],
        ["trace_hydra", "--cfg", "job", "method=ewc", "debug=smoke"],
        ["trace_hydra", "--help"],
        ["trace_hydra.store", "ls"],
        ["trace_hydra.collect", "."],
        ["trace_hydra.status", "."],
    ],
    ids=" ".join,
)
def test_light_commands_load_nothing_heavy(arguments, tmp_path):
    if arguments[0] == "trace_hydra.store":
        arguments = [*arguments, "--store", str(tmp_path)]
    if arguments[0] in ("trace_hydra.collect", "trace_hydra.status"):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "error.txt").write_text("DataError: x")
        arguments = [*arguments[:-1], str(tmp_path)]
    code = CODE.format(arguments=json.dumps(arguments), heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    _, loaded = json.loads(done.stderr.splitlines()[-1])
    assert loaded == [], done.stderr
