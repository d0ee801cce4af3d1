"""Drafts by looking up where a row's last tokens stood before: it often goes on as it did there.

Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding; Yang et al. 2023, arXiv:2304.04487).
One pass reads a draft, and what the model itself would have said is kept (Leviathan et al. 2023, arXiv:2211.17192), so
answers are those without drafts, but for rounding.
"""

from collections.abc import Sequence

MATCHES = (3, 2, 1)
"""How many tokens may be looked up, the most first. On 64 answers of SmolLM2 to the release's MeetingBank, Py150 and
20Minuten, each row alone took 4,214 passes with three only and 3,434 so."""
LONGEST = 63
"""Tokens of a draft."""
PASS_COSTS = {"cpu": 64}
"""What a pass costs beside its tokens, in tokens, by kind of device: reading the weights."""
PASS_COSTS_ELSEWHERE = 256


class Lookup:
    """A row's tokens, and where its last ones stood before.

    Args:
        ids: The prompt.
    """

    def __init__(self, ids: Sequence[int]):
        self.ids: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        self._source: int | None = None
        self._right = 0
        self._tried, self._went_well = 0, 0
        for token in ids:
            self._source = self._append(token)

    def add(self, token: int) -> None:
        """Append what the model chose."""
        source, right = self._source, self._source is not None and self.ids[self._source] == token
        self._tried += source is not None
        self._went_well += right
        self._right = self._right + 1 if right else 0
        found = self._append(token)
        self._source = source + 1 if right and source is not None else found

    @property
    def chance(self) -> float:
        """Chance that the next token is the drafted one: what went well so far, of all drafts and of this one."""
        if self._source is None:
            return 0.0
        rate = (self._went_well + 1) / (self._tried + 2)  # Laplace's rule
        return (self._right + rate) / (self._right + 1)

    def draft(self, limit: int) -> list[int]:
        """Give the next tokens if all goes on as it did: `limit` of them, or none."""
        if self._source is None:
            return []
        period = len(self.ids) - self._source
        return [self.ids[self._source + at % period] for at in range(limit)]

    def _append(self, token: int) -> int | None:
        """Append; gives the place behind where the last tokens stood before, as many as did, and latest."""
        self.ids.append(token)
        ends = [tuple(self.ids[-length:]) for length in MATCHES if length <= len(self.ids)]
        found = next((self._behind[end] for end in ends if end in self._behind), None)
        for end in ends:
            self._behind[end] = len(self.ids)
        return found


def best_width(chances: Sequence[float], pass_cost: int) -> int:
    """Choose how many tokens to draft for every row: most expected tokens for what the pass costs.

    Args:
        chances: Of each row, that a drafted token is right if those before it are.
        pass_cost: What a pass costs beside its tokens, in tokens.
    """
    if not any(chances):
        return 0
    rows = len(chances)
    best, best_rate, expected, right = 0, rows / (pass_cost + rows), float(rows), list(chances)
    for width in range(1, LONGEST + 1):
        expected += sum(right)
        right = [one * chance for one, chance in zip(right, chances, strict=True)]
        if (rate := expected / (pass_cost + rows * (width + 1))) > best_rate:
            best, best_rate = width, rate
    return best


def pass_cost(device: str) -> int:
    """What a pass costs beside its tokens, in tokens, on such a device."""
    return PASS_COSTS.get(device, PASS_COSTS_ELSEWHERE)
