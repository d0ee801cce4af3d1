"""The short form of the soak: five kills."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from soak import soak


@pytest.mark.slow
def test_five_kills_and_the_same_bytes():
    row = soak("replay", 5, 1, [])
    assert row["kills"] == 5 and row["equal"] == row["runs"] >= 1
