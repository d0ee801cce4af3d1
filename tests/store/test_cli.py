"""`python -m trace_hydra.store`: what it lists, finds wrong and removes, on stores made by hand."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from trace_hydra.store.__main__ import main, size_text
from trace_hydra.store.drafts import begin
from trace_hydra.store.entries import Store

DAY_S = 86400.0
WEIGHTS = ("weights.safetensors", "state.safetensors")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def key(letter):
    return letter * 16


def stage(store, letter, *, uses=(), trainable=90, old_days=0.0):
    """A stage of 100 + 10 + 1 bytes, of a model of 100 weights."""

    def write(folder):
        (folder / "weights.safetensors").write_bytes(b"w" * 100)
        (folder / "state.safetensors").write_bytes(b"s" * 10)
        (folder / "state.json").write_bytes(b"0")

    run = {node: {"_target_": f"package.{node}.{node.title()}"} for node in ("model", "method", "tuning")}
    entry = store.publish(
        "stages", key(letter), write, inputs={"run": run, "stage": {"task": "FOMC"}}, versions={"torch": "2"},
        uses=[f"stages/{key(one)}" for one in uses],
        facts={"task": "FOMC", "effort": {"trainable_params": trainable}, "parameters": 100},
    )  # fmt: skip
    age(entry.folder / "manifest.json", old_days)
    return entry


def small(store, kind, letter, *, uses=(), old_days=0.0, **inputs):
    """An entry of 5 bytes."""
    entry = store.publish(
        kind, key(letter), lambda folder: (folder / "x.jsonl").write_bytes(b"x" * 5) and None, inputs=inputs,
        versions={}, uses=uses, facts={"task": "FOMC", "row": 1, "set": "mini", "at": "step 3"},
    )  # fmt: skip
    age(entry.folder / "manifest.json", old_days)
    return entry


def age(path, days):
    then = path.stat().st_mtime - days * DAY_S
    os.utime(path, (then, then))


def note(store, directory, *letters, finished=True):
    directory.mkdir(exist_ok=True)
    store.note_run(directory, [f"stages/{key(letter)}" for letter in letters], finished=finished)


def command(store, *arguments):
    return main([*arguments, "--store", str(store.root)])


def listed(store, capsys):
    capsys.readouterr()
    assert command(store, "ls", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    return {f"{one['kind']}/{one['key'][0]}": one for one in found["entries"]}, found


def names(store):
    """What is there: the kind's first letter and the key's."""
    return {f"{path.parent.name[0]}{path.name[0]}" for kind in ("stages", "answers", "capability", "partial")
            for path in (store.root / kind).glob("*")}  # fmt: skip


def test_ls_shows_sizes_users_parents_and_locks(store, tmp_path, capsys):
    stage(store, "a")
    store.drop(stage(store, "b", uses="a"), WEIGHTS)
    small(store, "answers", "c", uses=[f"stages/{key('b')}"])
    note(store, tmp_path / "one", "a", "b")
    note(store, tmp_path / "two", "a", finished=False)
    (store.root / "models" / "m").mkdir(parents=True)
    (store.root / "models" / "m" / "model.safetensors").write_bytes(b"m" * 7)
    with store.lock("stages", key("d"), "a stage"):
        entries, found = listed(store, capsys)
        assert command(store, "ls") == 0
        text = capsys.readouterr().out
    a, b = entries["stages/a"], entries["stages/b"]
    assert (a["bytes"], a["runs"], a["uses"], a["dropped"]) == (111, 2, [], [])
    assert (b["bytes"], b["runs"], b["uses"]) == (1, 1, [f"stages/{key('a')}"]) and set(b["dropped"]) == set(WEIGHTS)
    assert entries["answers/c"]["what"] == "row 1, FOMC" and a["what"] == "FOMC: Model Method Tuning"
    assert found["bytes"] == {
        "stages": 112, "answers": 5, "capability": 0, "partial": 0, "models": 7, "drafts": 0, "damaged": 0, "tokens": 0,
    }  # fmt: skip
    assert found["locked"][f"stages/{key('d')}"]["pid"] == os.getpid()
    for part in (key("a"), "weights dropped", "111 B", "models 7 B", f"locked: stages/{key('d')} by", str(os.getpid())):
        assert part in text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (999_600, "1 MB"), (2e13, "20.00 TB")]
)
def test_sizes(size, text):
    assert size_text(size) == text


def test_show_by_a_beginning_of_the_key(store, tmp_path, capsys):
    stage(store, "a")
    stage(store, "b", uses="a")
    note(store, tmp_path / "one", "a", "b", finished=False)
    for given in ("aa", "stages/a", key("a")):
        assert command(store, "show", given) == 0
        text = capsys.readouterr().out
        for part in (f"used for: stages/{key('b')}", f"used by: {tmp_path / 'one'}", "not finished", "100 bytes"):
            assert part in text
        assert json.loads(text[text.index("{") :])["inputs"]["stage"] == {"task": "FOMC"}
    for given, part in (("st", "fits 2 entries"), ("zz", "holds no entry 'zz'")):
        assert command(store, "show", given) == 2
        assert part in capsys.readouterr().err
    assert main(["ls", "--store", str(tmp_path / "none")]) == 2
    assert "--store" in capsys.readouterr().err


def test_verify_names_files_and_moves_nothing_unless_asked(store, capsys):
    """Byte 50 of the weights is another: the size is right. The second entry's file is shorter."""
    entry, short = stage(store, "a"), small(store, "answers", "c")
    stage(store, "b")
    assert command(store, "verify") == 0
    (entry.folder / "weights.safetensors").write_bytes(b"w" * 50 + b"v" + b"w" * 49)
    (short.folder / "x.jsonl").write_bytes(b"x")
    model = store.root / "models" / "m"
    model.mkdir(parents=True)
    (model / "x").write_bytes(b"x")
    (model / "manifest.json").write_text(json.dumps({"files": {"x": {"size": 2, "sha256": ""}}}))
    capsys.readouterr()
    assert command(store, "verify") == 1
    text = capsys.readouterr().out
    assert f"stages/{key('a')}: weights.safetensors has another SHA-256" in text
    assert f"answers/{key('c')}: x.jsonl has 1 bytes instead of 5" in text and "models/m: x has 1 bytes" in text
    assert "4 checked, 3 damaged" in text and names(store) == {"sa", "sb", "ac"}
    assert command(store, "verify", "bb") == 0
    assert command(store, "verify", "--set-aside", "aa") == 1 and names(store) == {"sb", "ac"}
    assert len(list((store.root / "damaged").iterdir())) == 1


def test_gc_is_dry_unless_told_and_takes_leftovers(store, tmp_path, capsys):
    """Gone: a draft of a dead process, an old one of nobody, a damaged entry, a checkpoint whose stage is stored and an
    old one that nobody goes on from. Staying: living or young drafts, checkpoints of an unfinished run, a young one."""
    stage(store, "a")
    drafts = store.root / "drafts"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = begin(store.root, "living").name
    begin(store.root, "dead").rename(drafts / living.replace(f".{os.getpid()}.", f".{dead.pid}."))
    for name in ("nobody", "young"):
        (drafts / name).mkdir()
    age(drafts / "nobody", 8)
    age(drafts / living, 8)
    for letter, of, days in (("1", "a", 0), ("2", "b", 30), ("3", "c", 30), ("4", "c", 2)):
        small(store, "partial", letter, stage=key(of), old_days=days)
    note(store, tmp_path / "run", "b", finished=False)
    store.set_aside("stages", stage(store, "e").key, "a test")
    before = names(store)
    assert command(store, "gc") == 0
    text = capsys.readouterr().out
    assert names(store) == before == {"sa", "p1", "p2", "p3", "p4"} and "To do it: --yes" in text
    assert "5 could go" in text and "its stage is stored" in text and "no unfinished run goes on from it" in text
    assert command(store, "gc", "--yes") == 0
    assert names(store) == {"sa", "p2", "p4"} and not list((store.root / "damaged").iterdir())
    assert {path.name for path in drafts.iterdir()} == {living, "young"}


def test_gc_unused_keeps_what_runs_stand_on_and_its_parents(store, tmp_path, capsys):
    """c is used, made from b, made from a; d is nobody's; e is, but young; f is used by a run of another host, 1 by one
    whose directory is gone; 2 is locked."""
    for letter, uses in (("a", ""), ("b", "a"), ("c", "b"), ("d", "c"), ("f", ""), ("1", ""), ("2", "")):
        stage(store, letter, uses=uses, old_days=30)
    stage(store, "e", old_days=1)
    small(store, "answers", "9", old_days=30)
    note(store, tmp_path / "run", "c")
    note(store, tmp_path / "elsewhere", "f")
    note(store, tmp_path / "gone", "1")
    for path in (store.root / "runs").iterdir():
        content = json.loads(path.read_text())
        if content["directory"].endswith("elsewhere"):
            path.write_text(json.dumps({**content, "host": "another", "directory": "/nowhere/run"}))
    (tmp_path / "gone").rmdir()
    with store.lock("stages", key("2"), "a stage"):
        assert command(store, "gc", "--unused", "--yes") == 0
    assert names(store) == {"sa", "sb", "sc", "se", "sf", "s2"}
    assert len(list((store.root / "runs").iterdir())) == 2
    assert command(store, "gc", "--unused", "--yes", "--older-than", "0", "--ignore-host", "another") == 0
    assert names(store) == {"sa", "sb", "sc"}


@pytest.mark.parametrize(("keep", "left"), [("last", "bcd"), ("adapters", "acd"), ("none", "cd")])
def test_gc_keep_drops_weights_of_finished_runs(store, tmp_path, capsys, keep, left):
    """Finished: a (an adapter), then b (the whole model). c belongs to an unfinished run too, d to none."""
    stage(store, "a", trainable=10)
    stage(store, "b", uses="a")
    stage(store, "c")
    stage(store, "d")
    note(store, tmp_path / "one", "a", "b")
    note(store, tmp_path / "two", "c")
    note(store, tmp_path / "three", "c", finished=False)
    assert command(store, "gc", "--keep", keep, "--yes") == 0
    with_weights = {entry.key[0] for entry in store.entries("stages") if entry.has(WEIGHTS[0])}
    assert with_weights == set(left) and names(store) == {"sa", "sb", "sc", "sd"}
    dropped = 4 - len(left)
    assert capsys.readouterr().out.count("drop weights") == dropped
    assert command(store, "verify") == 0


def test_no_command_but_export_loads_torch(store):
    stage(store, "a")
    code = (
        "import sys; from trace_hydra.store.__main__ import main\n"
        "for one in (['ls'], ['show', 'aa'], ['verify'], ['gc']): assert main([*one, '--store', sys.argv[1]]) == 0\n"
        "assert not {'torch', 'omegaconf', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(store.root)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
