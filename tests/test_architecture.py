"""Who may import whom (docs/architecture.md), checked on the source itself."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "trace_hydra"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "_data" not in path.parts)
METHODS = [path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")]

# Folder or module -> the parts of the package it may import. What is not listed may import anything.
ALLOWED = {
    "errors": set(),
    "plan": {"errors"},
    "keys": {"errors"},
    "names": {"errors"},
    "credentials": set(),
    "colours": set(),
    "ranks": {"errors"},
    "data": {"errors", "plan", "keys", "names", "data", "metrics", "models"},
    "metrics": {"errors", "plan", "keys", "data", "metrics", "models"},
    "models": {"errors", "plan", "keys", "ranks", "data", "metrics", "models"},
    "context": {"errors", "plan", "keys", "ranks", "data", "models", "engines"},
    "engines": {"errors", "keys", "ranks", "models", "store", "capability", "methods", "engines"},
    "methods": {"errors", "plan", "sizes", "keys", "data", "models", "context", "methods"},
    "terminal": set(),
    "callbacks": {"errors", "plan", "terminal", "metrics", "callbacks"},
    "capability": {
        "errors",
        "keys",
        "files",
        "names",
        "credentials",
        "ranks",
        "data",
        "metrics",
        "models",
        "context",
        "methods",
        "store",
        "capability",
    },
    "store": {"errors", "files", "ranks", "store"},
    "published": {"errors", "data", "metrics", "published"},
    "statistics": {"errors", "names", "metrics", "statistics"},
}
WITHOUT_TORCH = (
    "errors",
    "plan",
    "keys",
    "entry",
    "expand",
    "guard",
    "diagnose",
    "schema",
    "ranks",
    "__main__",
    "job",
    "heartbeat",
    "terminal",
    "sweep_record",
    "status/__main__",
    "collect",
    "run_folder",
    "colours",
    "dashboard/facts",
    "dashboard/pages",
    "dashboard/server",
    "score",
    "audit",
    "metrics/continual",
    "metrics/spread",
    "statistics",
    "data/task",
    "report/page",
)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    """Parts of the package that a file imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(parsed(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("trace_hydra.")}
    return found - {"__version__"}


def strings_of(path: Path) -> frozenset[str]:
    nodes = (node for node in ast.walk(parsed(path)) if isinstance(node, ast.Constant))
    return frozenset(node.value for node in nodes if isinstance(node.value, str))


def outside_methods() -> list[Path]:
    return [path for path in MODULES if part_of(path) != "methods"]


def test_imports_point_inwards():
    for path in MODULES:
        allowed = ALLOWED.get(part_of(path))
        if allowed is not None and path.name != "__main__.py":  # a command line may use everything
            assert imports_of(path) <= allowed, path


def test_stage_and_evaluation_know_no_concrete_method():
    """Outside `methods/`, only the base class is imported."""
    for path in outside_methods():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trace_hydra.methods"):
                assert node.module == "trace_hydra.methods.base", path


def test_no_method_is_named_outside_its_folder():
    """No string outside `methods/` is the name of a method, so nothing can branch on one."""
    # "lora" is also a way of tuning, said by its class alone; "der" is a German article in generated sentences.
    words = {"tuning.py": {"lora"}, "minuten.py": {"der"}}
    for path in outside_methods():
        assert not strings_of(path) & set(METHODS) - words.get(path.name, set()), path


def test_files_stay_small():
    assert [path for path in MODULES if len(path.read_text(encoding="utf-8").splitlines()) > 350] == []


def test_a_method_is_one_file_and_one_yaml():
    """Every yaml of conf/method points into trace_hydra/methods, and its file is at most 250 lines."""
    from omegaconf import OmegaConf

    for name in METHODS:
        node = OmegaConf.load(ROOT / "conf" / "method" / f"{name}.yaml")
        target = OmegaConf.select(node, "_target_")  # type: ignore[arg-type]
        if target is None:  # an option that only switches others on, on top of another method's yaml
            continue
        path = ROOT / Path(*target.split(".")[:-1]).with_suffix(".py")
        assert path.parent == PACKAGE / "methods" and path.is_file()
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 250


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_light_modules_load_no_torch():
    names = ["trace_hydra." + module.replace("/", ".") for module in WITHOUT_TORCH]
    code = f"""
import sys
for name in {names!r}:
    __import__(name)
    if 'torch' in sys.modules:
        sys.exit(print(name))
"""
    assert run_python(code).strip() == ""


def test_importing_changes_no_global_state():
    """Importing every module leaves working directory, search path, environment and random states alone."""
    names = ["trace_hydra." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in MODULES]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    code = f"""
import os, random, sys, warnings
import numpy, torch, transformers, lightning, peft, matplotlib
warnings.simplefilter("ignore")
def state():
    return (os.getcwd(), list(sys.path), dict(os.environ), random.getstate(), str(numpy.random.get_state()),
            torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.is_grad_enabled())
before = state()
for name in {names!r}:
    __import__(name)
print([now == then for now, then in zip(state(), before)])
"""
    assert run_python(code).strip() == str([True] * 8)
