"""Drafts by looking up where a row's last tokens stood before: it often goes on as it did there.

Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding; Yang et al. 2023, arXiv:2304.04487).
One pass reads a draft, and what the model itself would have said is kept (Leviathan et al. 2023, arXiv:2211.17192), so
answers are those without drafts, but for rounding.
"""

from collections.abc import Sequence

MATCH = 3
"""Tokens that must be the same before their continuation is drafted."""
LONGEST = 63
"""Tokens of a draft."""
PASS_COSTS = {"cpu": 64}
"""What a pass costs beside its tokens, in tokens, by kind of device: reading the weights."""
PASS_COSTS_ELSEWHERE = 256


class Lookup:
    """A row's tokens, and where its last ones stood before.

    Args:
        ids: The first tokens.
    """

    def __init__(self, ids: Sequence[int]):
        self.ids: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        self._source: int | None = None
        self.right = 0
        """Tokens in a row that were as the continuation says."""
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Append a token."""
        if self._source is not None and self.ids[self._source] == token:
            self._source, self.right = self._source + 1, self.right + 1
        else:
            self._source, self.right = None, 0
        self.ids.append(token)
        last = tuple(self.ids[-MATCH:])
        if self._source is None:
            self._source = self._behind.get(last)
        self._behind[last] = len(self.ids)

    @property
    def chance(self) -> float:
        """Chance that the next token is the drafted one: of n + 2 trials n + 1 went well (Laplace's rule)."""
        return 0.0 if self._source is None else (self.right + 1) / (self.right + 2)

    def draft(self, limit: int) -> list[int]:
        """Give the next tokens if all goes on as it did: `limit` of them, or none."""
        if self._source is None:
            return []
        period = len(self.ids) - self._source
        return [self.ids[self._source + at % period] for at in range(limit)]


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
