"""What goes wrong around a run: damaged and old entries, full and read-only disks, a deleted directory, clocks."""

import errno
import itertools
import json
import logging
import os
import shutil
import subprocess
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import ROOT, run_tiny, some
from contract.test_resume import outcome, run_killed
from zygote import run_module

from trace_hydra.errors import StoreError
from trace_hydra.live import Live
from trace_hydra.methods.seqft import SeqFT
from trace_hydra.resume import StageCheckpoints
from trace_hydra.store.entries import Store
from trace_hydra.store.manifest import sealed

SETTINGS = [
    "method=ewc", "task_order=[FOMC,NumGLUE-cm,20Minuten]", "budget.batch_size=4", "budget.micro_batch_size=2",
    "budget.default_epochs=2", "budget.epochs={}", "evaluation=diagonal_last", "capability=smoke",
]  # fmt: skip
"""Three stages of four steps; seven cells."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run and its store."""
    folder = tmp_path_factory.mktemp("whole")
    run_tiny(folder, SETTINGS)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A folder with a copy of the finished run's store."""
    shutil.copytree(whole / "store", tmp_path / "store")
    return tmp_path


def stages(folder: Path) -> list[Path]:
    """Entries of the stages, in order."""
    note = json.loads(next((folder / "store" / "runs").iterdir()).read_text())
    return [folder / "store" / name for name in note["uses"] if name.startswith("stages/")]


def forget_answers(folder: Path, rows: set[int]) -> None:
    """Remove stored answers, so that the weights behind them are needed."""
    for manifest in (folder / "store" / "answers").glob("*/manifest.json"):
        if json.loads(manifest.read_text())["facts"]["row"] in rows:
            shutil.rmtree(manifest.parent)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


DAMAGE = {"flipped": flip, "empty": lambda path: path.write_bytes(b""), "gone": Path.unlink}
STAGE_FILES = ("weights.safetensors", "state.safetensors", "state.json", "manifest.json")
FILES = [
    *(("stages", name) for name in STAGE_FILES), ("answers", "answers.jsonl"), ("answers", "manifest.json"),
    ("capability", "records.jsonl"), ("capability", "manifest.json"),
]  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_damaged_entry_is_noticed_and_made_again(kind, name, how, whole, folder, caplog):
    """The last stage, whose answers are gone too, an answers entry or a capability entry; then the same results."""
    forget_answers(folder, {3} if kind == "stages" else set())
    entry = stages(folder)[-1] if kind == "stages" else sorted((folder / "store" / kind).iterdir())[0]
    DAMAGE[how](entry / name)
    run_tiny(folder, SETTINGS)
    assert f"{kind}/{entry.name} is damaged: " in caplog.text and name in caplog.text
    assert outcome(folder) == outcome(whole)
    assert len(list((folder / "store" / "damaged").iterdir())) == 1 and entry.is_dir()
    assert not [one for one in Store(folder / "store").entries(kind) if one.problems()]


@pytest.mark.parametrize(("damaged", "trained"), [((3,), {3}), ((2, 3), {2, 3}), ((1, 2, 3), {1, 2, 3}), ((1, 3), {3})])
def test_training_falls_back_to_the_last_good_stage(damaged, trained, whole, folder, caplog):
    """Weights flipped, which only hashing tells. Stages before one that is sound are not looked at."""
    forget_answers(folder, {3})
    for index in damaged:
        flip(stages(folder)[index - 1] / "weights.safetensors")
    run = run_tiny(folder, SETTINGS)
    assert set(run.snapshots) == trained and outcome(folder) == outcome(whole)
    for index in trained:
        assert f"stages/{stages(folder)[index - 1].name} is damaged: weights.safetensors" in caplog.text


@pytest.mark.parametrize("name", STAGE_FILES[:3])
def test_files_of_two_stages_swapped_are_noticed(name, whole, folder, caplog):
    forget_answers(folder, {2, 3})
    one, other = (entry / name for entry in stages(folder)[1:])
    if one.read_bytes() == other.read_bytes():
        other = stages(folder)[0] / "manifest.json"  # of no use there, and of another size
    kept = one.read_bytes()
    shutil.copy(other, one)
    if other.name == name:
        other.write_bytes(kept)
    run_tiny(folder, SETTINGS)
    assert caplog.text.count("is damaged") in (1, 2) and name in caplog.text and outcome(folder) == outcome(whole)


@pytest.mark.parametrize("how", some(DAMAGE, 2))
@pytest.mark.parametrize("name", STAGE_FILES)
def test_a_damaged_checkpoint_is_not_taken_up(name, how, whole, tmp_path, caplog):
    """Killed behind the second checkpoint of the first stage; the stage begins again."""
    caplog.set_level(logging.INFO)
    assert run_killed(tmp_path, [*SETTINGS, "checkpoint.every_steps=1"], 2)
    (saved,) = (tmp_path / "store" / "partial").iterdir()
    DAMAGE[how](saved / name)
    run_tiny(tmp_path, SETTINGS)
    assert f"partial/{saved.name} is damaged" in caplog.text and "goes on from its checkpoint" not in caplog.text
    assert outcome(tmp_path) == outcome(whole)


def test_entries_of_an_older_schema_are_made_again_and_of_a_newer_one_refused(whole, folder, caplog):
    for number in (0, 99):
        for path in (folder / "store").glob("*/*/manifest.json"):
            path.write_bytes(sealed({**json.loads(path.read_text()), "schema": number}))
        if number:
            before = sorted((folder / "store").rglob("*.safetensors"))
            with pytest.raises(StoreError, match=r"schema 99.*newer version.*paths\.store"):
                run_tiny(folder, SETTINGS)
            assert sorted((folder / "store").rglob("*.safetensors")) == before
        else:
            run_tiny(folder, SETTINGS)
            assert caplog.text.count("has schema 0 instead of 1") >= 10 and outcome(folder) == outcome(whole)


class FullDisk:
    """From the n-th file opened for writing in `drafts/` on, nothing more can be written below a folder.

    A file is begun, as where blocks run out in its middle.
    """

    def __init__(self, folder: Path, after: float, only: str = ""):
        self.folder, self.after, self.only, self.opened = folder, after, only, 0
        self._open = Path.open
        self.patched = patch.object(Path, "open", lambda path, *rest, **named: self.open(path, *rest, **named))

    def open(self, path: Path, mode: str = "r", *rest, **named):
        stream = self._open(path, mode, *rest, **named)
        if (
            mode[0] not in "wx"
            or self.folder not in path.parents
            or "locks" in path.parts
            or self.only not in str(path)
        ):
            return stream
        self.opened += "drafts" in path.parts
        if self.opened <= self.after:
            return stream
        stream.write(b"part" if "b" in mode else "part")
        stream.close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


SAVING = [*SETTINGS, "checkpoint.every_steps=1"]


@pytest.fixture(scope="module")
def writes(tmp_path_factory):
    """Files that a run opens for writing in the store."""
    folder = tmp_path_factory.mktemp("counted")
    disk = FullDisk(folder, float("inf"))
    with disk.patched:
        run_tiny(folder, SAVING)
    return disk.opened


@pytest.mark.slow
@pytest.mark.parametrize("point", range(10))
def test_a_full_disk_ends_the_run_and_loses_nothing(point, writes, whole, tmp_path):
    """At ten points, evenly from the first to the last file; the message names path and bytes; then there is room."""
    assert writes > 60
    disk = FullDisk(tmp_path, point * (writes - 1) // 9)
    with disk.patched, pytest.raises(StoreError) as caught:
        run_tiny(tmp_path, SAVING)
    message = str(caught.value)
    assert str(tmp_path) in message and "No space left on device" in message and " bytes" in message
    store = tmp_path / "store"
    assert not list((store / "drafts").iterdir()) and not (store / "damaged").exists()
    for kind in ("stages", "answers", "capability", "partial"):
        assert not [one.name for one in Store(store).entries(kind) if one.problems()]
    run_tiny(tmp_path, SAVING)
    assert outcome(tmp_path) == outcome(whole)


def test_a_checkpoint_that_cannot_be_written_is_a_warning_and_leaves_the_one_before(whole, tmp_path, caplog):
    """From the third checkpoint of the run on: five files each. Then the run is killed, and goes on from the second."""
    caplog.set_level(logging.INFO)
    disk = FullDisk(tmp_path, 10, only="partial-")
    left = []

    def end(live, stage, effort):
        left.extend((tmp_path / "store" / "partial").iterdir())
        raise KeyboardInterrupt

    with disk.patched, patch.object(Live, "_publish", end), pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path, SAVING)
    assert caplog.text.count("the stage under way was not saved") == 2 and " bytes" in caplog.text
    assert [path.name[-8:] for path in left] == ["00000002"]
    with FullDisk(tmp_path, 0, only="partial-").patched:
        run_tiny(tmp_path, SAVING)
    assert "goes on from its checkpoint at phase 1, step 2" in caplog.text and outcome(tmp_path) == outcome(whole)


@pytest.fixture
def mounted(tmp_path):
    """Mounts on folders of the test, given the options of `mount`; where that is not allowed the test is skipped."""
    places = []

    def mount(place: Path, *options: str) -> None:
        place.mkdir(parents=True, exist_ok=True)
        try:
            done = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("no mount here")
        if done.returncode:
            pytest.skip(f"mount {' '.join(options)}: {done.stderr.strip()}")
        places.extend({place} - set(places))  # a remount is no second one

    yield mount
    for place in reversed(places):
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_file_system_that_fills_up(whole, tmp_path, mounted):
    """A tmpfs of 8 MB: it is filled behind the second checkpoint, and freed for the second start."""
    mounted(tmp_path / "store", "-t", "tmpfs", "-o", "size=8m", "tmpfs")
    save, saved, filler = StageCheckpoints.save, [], tmp_path / "store" / "filler"

    def fill(self, lightning):
        save(self, lightning)
        saved.append(1)
        if len(saved) == 2:
            with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(1 << 12))

    settings = [*SAVING, "store.reserve_gb=0"]
    with patch.object(StageCheckpoints, "save", fill), pytest.raises(StoreError) as caught:
        run_tiny(tmp_path, settings)
    assert "No space left on device" in str(caught.value) and "It needs " in str(caught.value)
    assert [path.name[-8:] for path in (tmp_path / "store" / "partial").iterdir()] == ["00000002"]
    filler.unlink()
    run_tiny(tmp_path, settings)
    assert outcome(tmp_path) == outcome(whole)


@pytest.mark.parametrize("how", ["refused", "mounted"])
def test_a_read_only_store_is_used_and_the_rest_computed(how, whole, folder, request, caplog):
    """Stage 3 and the answers of row 3 are missing; one warning, the same results, nothing written."""
    forget_answers(folder, {3})
    shutil.rmtree(stages(folder)[2])
    store, mkdir = folder / "store", Path.mkdir

    def refuse(path, *rest, **named):
        if store in path.parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        mkdir(path, *rest, **named)

    if how == "mounted":
        mount = request.getfixturevalue("mounted")
        mount(store, "--bind", str(store))
        mount(store, "-o", "remount,bind,ro")
    before = sorted(store.rglob("*"))
    with patch.object(Path, "mkdir", refuse if how == "refused" else mkdir):
        run = run_tiny(folder, SAVING)
    assert set(run.snapshots) == {3} and sorted(store.rglob("*")) == before
    found, expected = outcome(folder), outcome(whole)
    assert found["results"] == expected["results"]
    assert all(found[name] == expected[name] for name in expected if name.startswith("run/"))
    warned = [
        one.getMessage() for one in caplog.records if one.name.startswith("trace_hydra") and one.levelname == "WARNING"
    ]
    assert len(warned) == 1 and f"paths.store={store} cannot be written (Read-only file system)" in warned[0]


VANDALISED: list[Path] = []
VANDAL = ["method=seqft", "method._target_=test_faults.Vandal", "trust.targets=[test_faults.]"]


class Vandal(SeqFT):
    """Deletes run directories at the end of the second stage: those named, or all in a folder of the environment's."""

    def end_stage(self, ctx):
        for path in VANDALISED or Path(os.environ.get("VANDALISED", os.devnull)).glob("*"):
            if ctx.stage.index == 2:
                shutil.rmtree(path)


def test_a_run_directory_deleted_under_the_run_is_complete_at_the_end(tmp_path, monkeypatch):
    """Same files, same bytes as in a run that is left alone, but for clocks."""
    left, deleted = tmp_path / "left" / "run", tmp_path / "deleted" / "run"
    run_tiny(left.parent, [*SETTINGS[1:], *VANDAL])
    monkeypatch.setattr("test_faults.VANDALISED", [deleted])
    run_tiny(deleted.parent, [*SETTINGS[1:], *VANDAL])
    names = {str(path.relative_to(deleted)) for path in deleted.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(left)) for path in left.rglob("*") if path.is_file()}
    for name in names - {"results.json", "report.md", "report.html"}:
        assert (deleted / name).read_bytes() == (left / name).read_bytes(), name
    assert outcome(deleted.parent) == outcome(left.parent)


@pytest.mark.slow
def test_a_deleted_run_directory_can_be_scored_and_exported_afterwards(tmp_path):
    """From the command line, with Hydra's folder, its log, a CSV logger and all callbacks."""
    environment = {**os.environ, "TRACE_HYDRA_STORE": str(tmp_path / "store"), "VANDALISED": str(tmp_path / "runs"),
                   "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}  # fmt: skip

    def command(module, *arguments):
        return run_module(module, *arguments, env=environment)

    done = command("trace_hydra", "debug=smoke", "task_order=[FOMC,Py150]", *VANDAL, f"paths.runs={tmp_path / 'runs'}")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert {"config.yaml", "overrides.yaml", "hydra.yaml"} == {path.name for path in (run / ".hydra").iterdir()}
    scored = command("trace_hydra.score", run)
    assert scored.returncode == 0 and json.loads(scored.stdout)["op"] is not None
    exported = command("trace_hydra.store", "export", run, tmp_path / "out", "--trust", "test_faults.")
    assert exported.returncode == 0, exported.stderr


def test_a_clock_that_jumps_changes_nothing(whole, tmp_path, monkeypatch):
    """Wall time goes +-1e7 s back and forth; every_s=1000 is never due, 1e-6 is."""
    jumps = itertools.cycle([1e7, -1e7])
    real, save, saved = time.time, StageCheckpoints.save, []
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    monkeypatch.setattr(StageCheckpoints, "save", lambda self, lightning: (saved.append(1), save(self, lightning)))
    for every_s in (1000, 1e-6):
        folder = tmp_path / str(every_s)
        run_tiny(folder, [*SETTINGS, f"checkpoint.every_s={every_s}", "checkpoint.share=1"])
        assert outcome(folder) == outcome(whole) and bool(saved) == (every_s < 1)
