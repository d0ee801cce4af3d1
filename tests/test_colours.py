"""A method's colour never changes, and no two of ours share one."""

import re

import pytest
from conftest import ROOT

from trace_hydra import colours
from trace_hydra.colours import PALETTE, colour_of

METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))


def test_every_method_has_a_colour_of_its_own():
    """A new method needs a line at the end of methods/colours.txt."""
    missing = [name for name in METHODS if colour_of(name) not in PALETTE]
    assert not missing
    assert len({colour_of(name) for name in METHODS}) == len(METHODS)


def test_palette_is_valid_and_without_doubles():
    assert all(re.fullmatch(r"#[0-9a-f]{6}", one) for one in PALETTE)
    assert len(set(PALETTE)) == len(PALETTE)


@pytest.mark.parametrize(
    ("method", "colour"),
    [("seqft", "#0072b2"), ("replay", "#cc79a7"), ("ewc", "#e69f00"), ("der", "#8877ff"), ("ema", "#cc3399")],
)
def test_colours_stay_as_published(method, colour):
    """What stood in a figure once: fails if a line of colours.txt is moved, put in or taken out."""
    assert colour_of(method) == colour


def test_a_method_from_elsewhere_has_a_colour_by_its_name(monkeypatch, tmp_path):
    """It stays the same whatever is added to the list. SHA-256 of "mine" begins 3fd3, so its hue is 0.2493."""
    assert colour_of("mine") == "#73b234" != colour_of("other")
    longer = tmp_path / "colours.txt"
    longer.write_text(colours._LISTED.read_text(encoding="utf-8") + "new\n", encoding="utf-8")
    monkeypatch.setattr(colours, "_LISTED", longer)
    colours._places.cache_clear()
    try:
        assert colour_of("mine") == "#73b234" and colour_of("new") == PALETTE[28]
        assert [colour_of(name) in PALETTE for name in METHODS] == [True] * len(METHODS)
    finally:
        colours._places.cache_clear()
