"""Generation whose rows end one by one: a finished row's slot goes to the next prompt, and a shared head is read once.

Which answer a prompt gets does not depend on the others, but for rounding: sampling draws from numbers of its own.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from trace_hydra.models.forward import only_positions
from trace_hydra.models.slots import Slots

SHARED = 16
"""Tokens that all prompts must share before they are read apart."""
_REFILL = 0.25
"""Share of the slots that must be free before prompts are read into them: a pass over few rows costs much of one over
many."""


@dataclass
class _Row:
    """A prompt under way."""

    index: int
    slot: int
    num_prompt: int
    new: list[int] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    """Uniform in [0, 1), one for each token that may be sampled."""


@dataclass(frozen=True)
class Plan:
    """What ends and what chooses."""

    max_new_tokens: int
    ends: frozenset[int]
    choose: Callable[[Tensor, Sequence[float]], Tensor]
    """Logits (rows, vocab) and a number for each row to token ids (rows,)."""
    numbers: Callable[[int], list[float]]
    """Index of a prompt -> its numbers."""
    stopped: Callable[[Sequence[int]], bool]
    """New tokens -> whether a stop string is there."""


def decode(
    model: Any, prompts: Sequence[Sequence[int]], plan: Plan, batch_tokens: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield index and new tokens of each prompt as it ends, in no order.

    Args:
        model: A causal LM that `slots.attends_to_all`, on its device, in eval mode.
        prompts: Token ids, none empty.
        plan: Limits and choice.
        batch_tokens: Columns of all slots together, at most; there is at least one slot.
    """
    waiting = deque(sorted(range(len(prompts)), key=lambda index: -len(prompts[index])))
    if not waiting:
        return
    longest = len(prompts[waiting[0]]) + plan.max_new_tokens
    count = max(1, min(len(prompts), batch_tokens // longest))
    slots = Slots(model.config.get_text_config().num_hidden_layers, count)
    head = shared_head(prompts)
    read = _Reader(model, prompts[0][:head])
    rows: dict[int, _Row] = {}
    while waiting or rows:
        free = [slot for slot in range(count) if slot not in rows]
        if waiting and (len(free) >= max(1, _REFILL * count) or not rows):
            new = [_Row(waiting.popleft(), slot, 0) for slot in free[: len(waiting)]]
            for row in new:
                row.num_prompt, row.numbers = len(prompts[row.index]), plan.numbers(row.index)
            logits, filled = read([prompts[row.index][head:] for row in new])
            slots.admit([row.slot for row in new], filled, [row.num_prompt for row in new])
            rows.update((row.slot, row) for row in new)
            yield from _take(new, logits, plan, slots, rows)
            continue
        active = list(rows.values())
        logits = _step(model, slots, active)
        yield from _take(active, logits, plan, slots, rows)


def shared_head(prompts: Sequence[Sequence[int]]) -> int:
    """Count the tokens that all prompts begin with, less than the shortest has; 0 if too few to be read apart."""
    if len(prompts) < 2:
        return 0
    ordered = sorted(map(tuple, prompts))
    first, last = ordered[0], ordered[-1]  # what these share, all in between do
    limit = min(map(len, prompts)) - 1
    shared = next((at for at in range(limit) if first[at] != last[at]), limit)
    return shared if shared >= SHARED else 0


class Head:
    """What a model remembers of the tokens that all prompts begin with, read once; of none: nothing."""

    def __init__(self, model: Any, ids: Sequence[int]):
        self.length = len(ids)
        self.states: list[tuple[Tensor, Tensor]] = []
        if ids:
            cache = DynamicCache()
            with only_positions(model, torch.tensor([len(ids) - 1], device=model.device)):
                model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
            self.states = [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[misc]

    def cache(self, rows: int) -> DynamicCache:
        """Make a cache that holds it for so many rows."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.states):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return cache


class _Reader:
    """Reads prompts: those tokens that all share once, the rest of several at a time."""

    def __init__(self, model: Any, head: Sequence[int]):
        self.model, self.device = model, model.device
        self.head = Head(model, head)

    def __call__(self, tails: Sequence[Sequence[int]]) -> tuple[Tensor, Cache]:
        """Give the logits behind each prompt, (rows, vocab), and the keys and values, from the first column on."""
        longest = max(map(len, tails))
        ids = torch.zeros(len(tails), longest, dtype=torch.long)
        for row, tail in enumerate(tails):  # padded on the right: no token sees the padding
            ids[row, : len(tail)] = torch.tensor(tail)
        last = torch.tensor([row * longest + len(tail) - 1 for row, tail in enumerate(tails)])
        cache, given = self.head.cache(len(tails)), dict[str, Any]()
        if length := self.head.length:
            own = torch.ones(longest, longest, dtype=torch.bool).tril()
            seen = torch.cat([torch.ones(longest, length, dtype=torch.bool), own], 1)
            given["attention_mask"] = seen[None, None].expand(len(tails), 1, -1, -1).to(self.device)
            given["position_ids"] = torch.arange(length, length + longest, device=self.device)[None]
        with only_positions(self.model, last.to(self.device)):
            output = self.model(input_ids=ids.to(self.device), past_key_values=cache, use_cache=True, **given)
        return output.logits[0], cache


def _step(model: Any, slots: Slots, active: Sequence[_Row]) -> Tensor:
    """Read the newest token of every row; gives the logits of those active."""
    device = model.device
    ids = torch.zeros(len(slots.lengths), 1, dtype=torch.long)
    for row in active:
        ids[row.slot, 0] = row.new[-1]
    output = model(
        input_ids=ids.to(device),
        attention_mask=slots.mask(device),
        position_ids=slots.positions(device),
        past_key_values=slots.cache,
        use_cache=True,
    )
    slots.step()
    return output.logits[[row.slot for row in active], -1]


def _take(
    active: Sequence[_Row], logits: Tensor, plan: Plan, slots: Slots, rows: dict[int, _Row]
) -> Iterator[tuple[int, list[int]]]:
    """Choose a token for each row, and end those that are done."""
    numbers = [row.numbers[len(row.new)] if row.numbers else 0.0 for row in active]
    for row, token in zip(active, plan.choose(logits, numbers).tolist(), strict=True):
        row.new.append(token)
        if token in plan.ends or len(row.new) == plan.max_new_tokens or plan.stopped(row.new):
            slots.release(row.slot)
            del rows[row.slot]
            yield row.index, row.new


def greedy(logits: Tensor, numbers: Sequence[float]) -> Tensor:
    """Take the most likely tokens."""
    return logits.argmax(-1)


def sampler(temperature: float, top_p: float) -> Callable[[Tensor, Sequence[float]], Tensor]:
    """Sample from the most likely tokens that together reach `top_p` (Holtzman et al. 2020, arXiv:1904.09751, 3.1)."""

    def choose(logits: Tensor, numbers: Sequence[float]) -> Tensor:
        chances, tokens = torch.softmax(logits.float() / temperature, -1).sort(-1, descending=True)
        sums = chances.cumsum(-1)
        chances[sums - chances >= top_p] = 0.0
        sums = chances.cumsum(-1)
        at = torch.tensor(numbers, dtype=sums.dtype, device=sums.device)[:, None] * sums[:, -1:]
        chosen = torch.searchsorted(sums, at, right=True).clamp(max=chances.shape[-1] - 1)
        return tokens.gather(-1, chosen)[:, 0]

    return choose
