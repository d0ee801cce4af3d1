"""A pickle that does something, and the command line in a process of its own."""

import importlib.util
import os
import pickle
import subprocess
from pathlib import Path
from types import ModuleType

from conftest import ROOT
from zygote import run_module


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_pickle(folder: Path, canary: Path) -> Path:
    """Write a pickle that makes `canary`."""
    path = folder / "hostile.pkl"
    path.write_bytes(pickle.dumps(Hostile(canary)))
    return path


def command(*arguments: object, module: str = "trace_hydra", **environment: str) -> subprocess.CompletedProcess:
    """Run `python -m <module>` without network."""
    return run_module(module, *arguments, env={**os.environ, "WANDB_MODE": "offline", **environment})


def chat_server() -> ModuleType:
    """The endpoint for tests of judges, which lies in another folder of tests."""
    spec = importlib.util.spec_from_file_location("chat_server", ROOT / "tests" / "chat_server.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
