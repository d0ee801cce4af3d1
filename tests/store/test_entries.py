"""Entries are there whole or not at all, whoever writes them when, and whatever goes wrong meanwhile."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT
from store_doubles import CONTENT, KEY, OTHER, VERSIONS, publish, use, write

from trace_hydra.errors import StoreError
from trace_hydra.store import drafts
from trace_hydra.store.entries import KINDS, Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


class Recorded:
    """Records what brings bytes and names to disk, in order, as (what, path below the store)."""

    def __init__(self, root: Path, monkeypatch):
        self.root, self.operations = root, []
        fsync, rename, replace = os.fsync, os.rename, os.replace

        def watched_fsync(descriptor):
            self.note("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", watched_fsync)
        for name, function in (("rename", rename), ("replace", replace)):

            def watched(source, target, name=name, function=function):
                function(source, target)
                self.note(name, target)

            monkeypatch.setattr(os, name, watched)

    def note(self, what, path):
        self.operations.append((what, str(Path(path).relative_to(self.root))))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc/self/fd to name what is synced")
def test_files_reach_the_disk_before_the_manifest_and_that_before_the_name(store, monkeypatch):
    """fsync of each file, then of the manifest and the draft's folder, then the rename, then fsync of its folder."""
    recorded = Recorded(store.root, monkeypatch)
    publish(store)
    monkeypatch.undo()
    operations = [(what, path.rpartition("/")[2] if path.startswith("drafts/") else path)
                  for what, path in recorded.operations]  # fmt: skip
    draft = next(path for what, path in recorded.operations if path.startswith("drafts/")).split("/")[1]
    manifest = operations.index(("replace", "manifest.json"))
    renamed = operations.index(("rename", f"stages/{KEY}"))
    assert {("fsync", name) for name in CONTENT} <= set(operations[:manifest])
    assert operations[manifest - 1][0] == "fsync" and "manifest.json" in operations[manifest - 1][1]
    assert manifest < renamed and ("fsync", draft) in operations[manifest:renamed]
    assert ("fsync", "stages") in operations[renamed:]


@pytest.mark.parametrize("before", ["nothing", "old"])
def test_a_power_cut_leaves_old_or_new(before, store, monkeypatch, tmp_path):
    """The store as the disk has it after any prefix of the operations: a file holds bytes only once it was synced.

    A copy is taken right behind each fsync, rename and replace; in it, files of drafts that were not synced by then are
    empty, as after a power cut. Each copy gives the old state, or the whole new entry.
    """
    if before == "old":
        publish(store, extra=b" old")
        store.drop(store.find("stages", KEY), list(CONTENT))
        store.discard("stages", KEY)
        publish(store, OTHER, extra=b" old")
    synced, copies = set(), []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def cut():
        copy = tmp_path / f"copy-{len(copies)}"
        shutil.copytree(store.root, copy)
        for path in copy.rglob("*"):
            original = store.root / path.relative_to(copy)
            if path.is_file() and OTHER not in path.parts and original.stat().st_ino not in synced:
                path.write_bytes(b"")
        copies.append(copy)

    def watched_fsync(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)
        cut()

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", lambda source, target: (rename(source, target), cut()))
    monkeypatch.setattr(os, "replace", lambda source, target: (replace(source, target), cut()))
    publish(store)
    monkeypatch.undo()
    found = [use(Store(copy)) for copy in copies]
    assert len(copies) >= 8 and found[0] is None and found[-1] == CONTENT
    assert all(one in (None, CONTENT) for one in found)
    assert not any((copy / "damaged").exists() for copy in copies)  # nothing partial had a name
    if before == "old":
        assert all(use(Store(copy), OTHER)["state.json"].endswith(b" old") for copy in copies)


def test_nothing_goes_to_the_system_temp_directory(store, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the system temp directory")

    for name in ("mkstemp", "mkdtemp", "gettempdir", "NamedTemporaryFile", "TemporaryDirectory", "TemporaryFile"):
        monkeypatch.setattr(tempfile, name, refuse)
    publish(store)
    store.discard("stages", KEY)
    publish(store)
    assert use(store) == CONTENT


JOB = """
import logging, sys
from pathlib import Path
from trace_hydra.store.entries import Store
logging.basicConfig(level=logging.INFO, format="%(message)s")
store, key = Store(Path(sys.argv[1])), "a" * 16
def write(folder):
    (folder / "large").write_bytes(b"same" * 250_000)
    (folder / "who").write_text("anyone")
sys.stdin.readline()
for _ in range(int(sys.argv[2])):
    with store.lock("stages", key, "the test"):
        if store.find("stages", key) is None:
            print("made", flush=True)
            entry = store.publish("stages", key, write, inputs={}, versions={})
    for _ in range(3):  # without the lock, as one that lost it would
        store.publish("stages", key, write, inputs={}, versions={})
        entry = store.find("stages", key)
        assert entry.file("large").read_bytes() == b"same" * 250_000 and entry.file("who").read_text() == "anyone"
print("done")
"""


def test_twenty_processes_at_once_make_one_entry(store):
    """All start at the same moment and publish the same key; then all have it, nobody saw it damaged."""
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, str(store.root), "2"], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(20)
    ]  # fmt: skip
    for job in jobs:
        job.stdin.write("go\n")  # type: ignore[union-attr]
        job.stdin.flush()  # type: ignore[union-attr]
    said = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 20, [err for _, err in said if err]
    assert sum(out.count("made") for out, _ in said) == 1 and not any("damaged" in err for _, err in said)
    assert [path.name for path in (store.root / "stages").iterdir()] == [KEY]
    for folder in ("drafts", "locks"):
        assert not list((store.root / folder).iterdir())
    assert not (store.root / "damaged").exists()


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
def test_a_writer_that_fails_leaves_nothing(error, store):
    def fail(folder):
        write(folder)
        raise error

    with pytest.raises(StoreError if isinstance(error, OSError) else type(error)) as caught:
        store.publish("stages", KEY, fail, inputs={}, versions={}, needs=12345)
    if isinstance(error, OSError):
        assert str(store.root / "stages" / KEY) in str(caught.value) and "12,345 bytes" in str(caught.value)
    assert not list((store.root / "drafts").iterdir()) and store.find("stages", KEY) is None


def test_a_failed_publish_leaves_what_was_there(store, monkeypatch):
    publish(store, extra=b" first")
    monkeypatch.setattr(
        os, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    with pytest.raises(StoreError, match="No space left"):
        publish(store)
    monkeypatch.undo()
    assert use(store)["state.json"].endswith(b" first")


@pytest.mark.parametrize("operation", ["mkdir", "file", "manifest", "fsync", "rename"])
def test_a_full_disk_names_path_and_bytes_wherever_it_is_noticed(operation, store, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*_, **__):
        raise full

    def fail_for(function, part):
        return lambda path, *rest, **named: refuse() if part in str(path) else function(path, *rest, **named)

    if operation == "mkdir":
        monkeypatch.setattr(Path, "mkdir", refuse)
    elif operation == "file":
        monkeypatch.setattr(Path, "write_bytes", fail_for(Path.write_bytes, "answers"))
    elif operation == "manifest":
        monkeypatch.setattr(Path, "open", fail_for(Path.open, ".manifest.json"))
    else:
        monkeypatch.setattr(os, operation, refuse)
    with pytest.raises(StoreError) as caught:
        publish(store, needs=54321)
    monkeypatch.undo()
    for part in (
        str(store.root / "stages" / KEY),
        "No space left on device",
        "54,321 bytes",
        "paths.store",
        "are free",
    ):
        assert part in str(caught.value)
    assert not list((store.root / "drafts").iterdir()) and publish(store) and use(store) == CONTENT


def test_a_dead_process_s_draft_goes_when_the_store_is_opened_next(store):
    """That of a living process stays, and that of another host."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = drafts.begin(store.root, "mine")
    kind, place, pid, started = mine.name.rsplit(".", 3)
    assert pid == str(os.getpid())
    (mine.parent / f"{kind}.{place}.{dead.pid}.{started}").mkdir()
    elsewhere = mine.parent / f"{kind}.00000000.{dead.pid}.{started}"
    elsewhere.mkdir()
    Store(store.root)
    assert set(mine.parent.iterdir()) == {mine, elsewhere}


def test_dropped_files_are_gone_for_good_and_the_manifest_says_so(store):
    entry = publish(store)
    store.drop(entry, ["weights.bin", "no_such_file"])
    for one in (entry, store.find("stages", KEY)):
        assert one.manifest["dropped"] == ["weights.bin"] and not one.has("weights.bin") and one.has("state.json")
    assert not (entry.folder / "weights.bin").exists() and not entry.problems()
    assert entry.size == sum(len(content) for name, content in CONTENT.items() if name != "weights.bin")


def test_discarded_entries_are_gone(store):
    publish(store)
    store.discard("stages", KEY)
    store.discard("stages", KEY)  # of what is not there: nothing
    assert store.find("stages", KEY) is None and not list((store.root / "drafts").iterdir())


def test_runs_are_noted_by_directory(store, tmp_path):
    for finished in (False, True):
        store.note_run(tmp_path / "run", [f"stages/{KEY}"], finished=finished)
    (note,) = (store.root / "runs").iterdir()
    found = json.loads(note.read_text())
    assert found["directory"] == str(tmp_path / "run") and found["finished"] and found["uses"] == [f"stages/{KEY}"]


@pytest.mark.parametrize(
    ("kind", "key"),
    [("stages", "../../etc"), ("stages", "/etc"), ("stages", "A" * 16), ("stages", "abc"), ("stages", f"{KEY}\n"),
     ("stages", ""), ("..", KEY), ("drafts", KEY), ("stages/x", KEY), ("models", KEY)],
)  # fmt: skip
def test_names_that_lead_elsewhere_are_refused(kind, key, store):
    for attempt in (store.find, store.discard, lambda *name: publish(store, name[1], name[0])):
        with pytest.raises(StoreError, match="names no entry"):
            attempt(kind, key)
    assert sorted(path.name for path in store.root.iterdir()) == ["drafts"]


def test_manifests_do_not_depend_on_where_they_are_made(tmp_path, monkeypatch):
    """Two stores, two current directories, another host name and user: the same bytes."""
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setenv("USER", name)
        monkeypatch.setattr("platform.node", lambda name=name: name)
        entry = publish(Store(tmp_path / name / "store"), uses=[f"stages/{OTHER}"])
        found.append((entry.folder / "manifest.json").read_bytes())
    assert found[0] == found[1] and str(tmp_path).encode() not in found[0] and b"host" not in found[0]


def test_an_entry_says_what_it_was_made_from(store):
    entry = publish(store, uses=[f"stages/{OTHER}"])
    assert entry.uses == [f"stages/{OTHER}"] and entry.facts == {"tokens": 7} and entry.manifest["versions"] == VERSIONS
    assert entry.manifest["inputs"] == {"seed": 42, "key": KEY} and entry.json("state.json") == {"rows": [1, 2, 3]}
    assert [one.key for one in store.entries("stages")] == [KEY] and set(KINDS) >= {"stages", "partial"}


def test_a_store_that_cannot_be_written_is_read_with_one_warning(store, monkeypatch, caplog):
    publish(store)
    mkdir = Path.mkdir

    def refuse(path, *rest, **named):
        if store.root in path.parents:
            raise OSError(errno.EROFS, "Read-only file system")
        mkdir(path, *rest, **named)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with caplog.at_level(logging.INFO):
        read = Store(store.root)
        with read.lock("stages", OTHER, "a test") as held:
            assert held
        assert not read.writable and use(read) == CONTENT and publish(read, OTHER) is None
        read.note_run(store.root, [], finished=True)
    (record,) = caplog.records
    assert f"paths.store={store.root} cannot be written (Read-only file system)" in record.getMessage()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_store_is_an_error_and_not_a_read_only_one(code, store, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    with pytest.raises(StoreError, match=os.strerror(code)):
        Store(store.root)
