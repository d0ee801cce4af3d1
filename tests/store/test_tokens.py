"""Tokens of data sets, kept: the same rows with and without, other keys for what decides them, damage, gc."""

import os

import pytest
from conftest import compose_config

from trace_hydra.data import tokens
from trace_hydra.data.encode import Encoder
from trace_hydra.data.task import Example
from trace_hydra.errors import StoreError
from trace_hydra.models.tiny import Tiny
from trace_hydra.store.__main__ import main
from trace_hydra.store.entries import Store
from trace_hydra.store.tokens import TokenFiles

SETTINGS = {
    "prompt": "raw", "truncation": "middle", "special_tokens": "text", "max_prompt_tokens": 40, "max_answer_tokens": 8,
}  # fmt: skip
HEAD = "Task.\n"
ROWS = [Example(f"train-{at}", f"{HEAD}{'x' * at}ä?", "yes" * (at % 4)) for at in range(0, 60, 3)]


class Counts:
    """A tokenizer that counts how often it is asked for texts."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *arguments, **keywords):
        self.calls += 1
        return self.tokenizer(*arguments, **keywords)


@pytest.fixture
def tokenizer(monkeypatch):
    monkeypatch.setattr(tokens, "WORTH_KEEPING", 100)
    monkeypatch.setattr("trace_hydra.data.encode.tokenizer_digest", lambda one: tokens.tokenizer_digest(one.tokenizer))
    node = compose_config(["model=tiny"]).model
    return Counts(Tiny(**{key: value for key, value in node.items() if not key.startswith("_")}).load_tokenizer())


def encoder(tokenizer, folder=None, **changes) -> Encoder:
    made = Encoder(tokenizer, **{**SETTINGS, **changes})
    made.cache = TokenFiles(folder) if folder else None
    tokenizer.calls = 0
    return made


def plain(rows) -> list:
    return [(row.ids.tolist(), row.ids.dtype, row.num_prompt, row.truncated, row.example_id) for row in rows]


@pytest.mark.parametrize("truncation", ["middle", "left"])
def test_what_is_kept_is_what_is_made(tokenizer, tmp_path, truncation):
    """Rows, prompts and lengths, in a process that makes them and one that finds them; the second tokenises nothing."""
    prompts = [row.prompt for row in ROWS]
    without = encoder(tokenizer, truncation=truncation)
    wanted = plain(without.pairs(ROWS, HEAD)), without.prompts(prompts, HEAD), without.lengths(prompts)
    assert any(row[3] for row in wanted[0]) and not all(row[3] for row in wanted[0]) and wanted[1][1] > 0
    for times in range(2):
        made = encoder(tokenizer, tmp_path, truncation=truncation)
        assert plain(made.pairs(ROWS, HEAD)) == wanted[0]
        assert made.prompts(prompts, HEAD) == wanted[1] and made.lengths(prompts) == wanted[2]
        assert (tokenizer.calls == 0) == (times == 1)
    assert len(list((tmp_path / "tokens").iterdir())) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"truncation": "left"}, {"special_tokens": "parse"}, {"max_prompt_tokens": 41}, {"max_answer_tokens": 9},
    ],
)  # fmt: skip
def test_what_decides_tokens_is_in_the_key(tokenizer, tmp_path, change):
    encoder(tokenizer, tmp_path).pairs(ROWS, HEAD)
    encoder(tokenizer, tmp_path, **change).pairs(ROWS, HEAD)
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def test_texts_their_order_and_the_head_are_in_the_key(tokenizer, tmp_path):
    made = encoder(tokenizer, tmp_path)
    made.pairs(ROWS, HEAD)
    made.pairs(ROWS[::-1], HEAD)
    made.pairs(ROWS, "")
    made.pairs(ROWS[:-1], HEAD)
    made.prompts([row.prompt for row in ROWS], HEAD)
    made.prompts([row.prompt for row in ROWS], HEAD, 39)
    assert len(list((tmp_path / "tokens").iterdir())) == 6


def test_another_tokenizer_has_another_digest(tokenizer):
    known = tokens.tokenizer_digest(tokenizer.tokenizer)
    assert known and known == tokens.tokenizer_digest(tokenizer.tokenizer)
    tokenizer.tokenizer.add_tokens(["<|more|>"])
    assert tokens.tokenizer_digest(tokenizer.tokenizer) != known
    assert tokens.tokenizer_digest(tokenizer) is None  # code that is not the library's


def test_little_is_not_kept(tokenizer, tmp_path):
    encoder(tokenizer, tmp_path).pairs(ROWS[:2], HEAD)
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize("damage", ["flipped", "short", "empty"])
def test_a_damaged_file_is_made_again(tokenizer, tmp_path, damage, caplog):
    wanted = plain(encoder(tokenizer, tmp_path).pairs(ROWS, HEAD))
    (path,) = tmp_path.rglob("*.safetensors")
    raw = path.read_bytes()
    flipped = raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:]
    path.write_bytes({"flipped": flipped, "short": raw[:-1], "empty": b""}[damage])
    assert plain(encoder(tokenizer, tmp_path).pairs(ROWS, HEAD)) == wanted
    assert path.read_bytes() == raw and "damaged" in caplog.text


def test_a_store_that_cannot_be_written_stops_nothing(tokenizer, tmp_path):
    (tmp_path / "tokens").write_text("in the way")
    assert plain(encoder(tokenizer, tmp_path).pairs(ROWS, HEAD)) == plain(encoder(tokenizer).pairs(ROWS, HEAD))


def test_a_key_is_no_path(tmp_path):
    with pytest.raises(StoreError, match="no key"):
        TokenFiles(tmp_path).load("../models")


def test_gc_takes_what_was_not_read_for_days(tokenizer, tmp_path, capsys):
    """Both were made ten days ago, one was read today."""
    store = Store(tmp_path / "store")
    encoder(tokenizer, store.root).pairs(ROWS, HEAD)
    encoder(tokenizer, store.root).pairs(ROWS[1:], HEAD)
    for folder in (store.root / "tokens").iterdir():
        then = folder.stat().st_mtime - 10 * 86400
        os.utime(folder, (then, then))
    encoder(tokenizer, store.root).pairs(ROWS, HEAD)
    assert main(["gc", "--store", str(store.root)]) == 0 and "1 could go" in capsys.readouterr().out
    assert main(["gc", "--store", str(store.root), "--yes"]) == 0
    capsys.readouterr()
    encoder(tokenizer, store.root).pairs(ROWS, HEAD)
    assert tokenizer.calls == 0 and len(list((store.root / "tokens").iterdir())) == 1
