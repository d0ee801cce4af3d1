"""One colour a method, the same in figures, pages and dashboards."""

import colorsys
import hashlib
from functools import cache
from pathlib import Path

PALETTE = (
    # Okabe and Ito (2008), without black, which a dark page swallows
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442"),
    # each as far as possible from all before it, from white and from near black, in OKLab, as seen with normal vision,
    # protanopia and deuteranopia (Machado et al. 2009); contrast of at least 1.8 to white and near black
    *("#773333", "#0000ff", "#443388", "#8877ff", "#99ccaa", "#994477", "#aa4422", "#6622bb", "#66bb77", "#dd11cc"),
    *("#773366", "#5555ff", "#7799ff", "#66ccdd", "#aacc66", "#664499", "#ff1166", "#777755", "#ff6644", "#cc99aa"),
    *("#cc3399", "#991100", "#0077dd", "#665555", "#3300dd", "#aa88cc", "#557799", "#666644", "#ff55cc", "#00ccff"),
    *("#ee9988", "#119922", "#118877", "#559999", "#ddbb22", "#ffaa99", "#770077", "#ff0088", "#5511aa", "#ff99cc"),
)
"""`#rrggbb`; more than a dozen cannot all be told apart, so a figure says names too."""

_LISTED = Path(__file__).parent / "methods" / "colours.txt"


def colour_of(method: str) -> str:
    """Give a method's `#rrggbb`: of those in methods/colours.txt by their place there, of others by their name alone.

    Two methods that are not listed can come out alike.
    """
    place = _places().get(method, len(PALETTE))
    if place < len(PALETTE):
        return PALETTE[place]
    hue = int.from_bytes(hashlib.sha256(method.encode("utf-8", "backslashreplace")).digest()[:2], "big") / 65536
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, 0.45, 0.55))


def listed() -> tuple[str, ...]:
    """Name the methods that have a colour of their own, in its order."""
    return tuple(_places())


@cache
def _places() -> dict[str, int]:
    lines = (line.strip() for line in _LISTED.read_text(encoding="utf-8").splitlines())
    return {name: place for place, name in enumerate(line for line in lines if line and not line.startswith("#"))}
