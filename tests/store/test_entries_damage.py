"""A damaged entry is found before use, named, set aside and made again, whatever was done to which of its files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from store_doubles import CONTENT, KEY, OTHER, publish, use

from trace_hydra.errors import StoreError
from trace_hydra.store.entries import DamagedEntry, Store
from trace_hydra.store.manifest import sealed

FILES = (*CONTENT, "manifest.json")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def named(name: str) -> str:
    return f"stages/{KEY} is damaged: {name}"


def flip(path: Path, share: float) -> None:
    raw = bytearray(path.read_bytes())
    raw[min(len(raw) - 1, int(share * len(raw)))] ^= 0xFF
    path.write_bytes(bytes(raw))


def swap(path: Path) -> None:
    shutil.copy(path.parents[1] / OTHER / path.name, path)


def link(path: Path) -> None:
    moved = path.rename(path.parents[2] / path.name)
    path.symlink_to(moved)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "first byte": lambda path: flip(path, 0),
    "middle byte": lambda path: flip(path, 0.5),
    "last byte": lambda path: flip(path, 1),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "gone": Path.unlink,
    "another entry's": swap,
    "a link": link,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_named_set_aside_and_made_again(name, how, store, caplog):
    """Every file, every damage: never used, moved to damaged/, and the next publish gives the sound content."""
    publish(store)
    publish(store, OTHER, extra=b" of another entry")
    DAMAGE[how](store.root / "stages" / KEY / name)
    assert use(store) is None
    assert named(name) in caplog.text or (name == "manifest.json" and named("it has no manifest.json") in caplog.text)
    (aside,) = (store.root / "damaged").iterdir()
    assert aside.name.startswith(f"stages-{KEY}-") and store.find("stages", KEY) is None
    assert publish(store) is not None and use(store) == CONTENT
    assert use(store, OTHER) == {file: content + b" of another entry" for file, content in CONTENT.items()}


def test_any_single_flipped_byte_of_a_manifest_is_found(store):
    """All of them, lowest bit: facts, inputs and versions have no other witness than the manifest's own hash.

    White space that becomes other white space would change nothing; no space is one bit from another.
    """
    folder = publish(store).folder
    whole = (folder / "manifest.json").read_bytes()
    kept = folder.parents[1] / "kept"
    shutil.copytree(folder, kept)
    for place in range(len(whole)):
        raw = bytearray(whole)
        raw[place] ^= 1
        (folder / "manifest.json").write_bytes(bytes(raw))
        assert store.find("stages", KEY) is None, (place, bytes(raw[max(0, place - 20) : place + 20]))
        shutil.copytree(kept, folder)
    assert use(store) == CONTENT


def wrong(**changes):
    return lambda manifest: sealed({**manifest, **changes})


def without(field):
    return lambda manifest: sealed({name: value for name, value in manifest.items() if name != field})


def described(**changes):
    """Another description of the first file."""
    return lambda manifest: sealed(
        {**manifest, "files": {**manifest["files"], "state.json": {**manifest["files"]["state.json"], **changes}}}
    )


MANIFESTS = {
    "of another kind": (wrong(kind="answers"), f"is of answers/{KEY}"),
    "of another key": (wrong(key=OTHER), f"is of stages/{OTHER}"),
    "another size": (described(size=3), "state.json has 19 bytes instead of 3"),
    "another hash": (described(sha256="0" * 64), "state.json has another SHA-256"),
    "no JSON": (lambda _: b"{", "cannot be read"),
    "not UTF-8": (lambda _: b"\xff\xfe", "cannot be read"),
    "a list": (lambda _: b"[]", "holds no object"),
    "a number": (lambda _: b"1", "holds no object"),
    "nested": (lambda _: b"[" * 100_000, "cannot be read"),
    "schema 0": (wrong(schema=0), "has schema 0 instead of 1"),
    "schema as text": (wrong(schema="1"), "has schema '1' instead of 1"),
    "schema flipped": (lambda manifest: json.dumps({**manifest, "schema": 9}).encode(), "has schema 9"),
    "facts changed": (lambda manifest: json.dumps({**manifest, "facts": {"tokens": 8}}).encode(), "was changed"),
    "no hash": (lambda manifest: json.dumps({**manifest, "sha256": None}).encode(), "was changed"),
    "no schema": (without("schema"), "has schema None"),
    "no kind": (without("kind"), "is of None"),
    "no files": (without("files"), "does not describe its files"),
    "no facts": (without("facts"), "lacks facts or uses"),
    "no uses": (without("uses"), "lacks facts or uses"),
    "a file outside": (wrong(files={"../x": {"size": 1, "sha256": ""}}), "does not describe its files"),
    "no such file named": (wrong(files={}), "does not name"),
}  # fmt: skip


@pytest.mark.parametrize("which", MANIFESTS)
def test_a_wrong_manifest_is_named_with_its_reason(which, store, caplog):
    make, reason = MANIFESTS[which]
    path = publish(store).folder / "manifest.json"
    path.write_bytes(make(json.loads(path.read_bytes())))
    assert use(store) is None
    assert f"stages/{KEY} is damaged" in caplog.text and reason in caplog.text
    assert list((store.root / "damaged").iterdir()) and publish(store) and use(store) == CONTENT


def test_an_entry_of_a_newer_schema_is_refused_and_left_alone(store):
    path = publish(store).folder / "manifest.json"
    path.write_bytes(wrong(schema=99)(json.loads(path.read_bytes())))
    before = path.read_bytes()
    with pytest.raises(StoreError, match=rf"stages/{KEY} .* schema 99; this trace_hydra knows 1.*newer version"):
        store.find("stages", KEY)
    with pytest.raises(StoreError, match="schema 99"):
        publish(store)
    assert path.read_bytes() == before and not (store.root / "damaged").exists()
    assert not list((store.root / "drafts").iterdir())


@pytest.mark.parametrize("change", ["publish", "drop", "discard"])
def test_what_another_process_does_between_two_looks_is_no_damage(change, store, monkeypatch, caplog):
    """`find` sees no manifest, old sizes, or a folder that is going: it looks again before it calls that damage."""
    from trace_hydra.store import entries

    if change != "publish":
        publish(store)
    look, looks = entries.look, []

    def interrupted(folder, kind, key):
        looks.append(1)
        seen, manifest, problem = look(folder, kind, key)
        if len(looks) == 1:
            monkeypatch.setattr(entries, "look", look)
            if change == "publish":
                publish(store)
            elif change == "drop":
                store.drop(store.find(kind, key), ["weights.bin"])
            else:
                store.discard(kind, key)
            return ("inode", b"before"), None, "weights.bin has None bytes instead of 1280"
        return seen, manifest, problem

    monkeypatch.setattr(entries, "look", interrupted)
    found = store.find("stages", KEY)
    assert (found is None) == (change == "discard") and not caplog.text and not (store.root / "damaged").exists()


def test_an_entry_whose_file_was_dropped_meanwhile_is_not_set_aside(store):
    mine: Any = store.find("stages", publish(store).key)
    store.drop(store.find("stages", KEY), ["weights.bin"])
    with pytest.raises(DamagedEntry, match=r"weights\.bin"):
        mine.file("weights.bin")
    found: Any = store.find("stages", KEY)
    assert found.file("state.json").read_bytes() == CONTENT["state.json"]
    with pytest.raises(DamagedEntry, match="does not name"):
        mine.file("no_such_file")
