"""Generation whose rows end one by one: a finished row's slot goes to the next prompt, and a shared head is read once.

Which answer a prompt gets does not depend on the others, but for rounding: sampling draws from numbers of its own.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from trace_hydra.models import attention
from trace_hydra.models.forward import only_positions
from trace_hydra.models.lookup import Lookup, best_width, pass_cost
from trace_hydra.models.remembered import behind
from trace_hydra.models.slots import Slots, as_attended

SHARED = 16
"""Tokens that all prompts must share before they are read apart."""
_REFILL = 0.25
"""Share of the slots that must be free before prompts are read into them: a pass over few rows costs much of one over
many."""


@dataclass
class _Row:
    """A prompt under way."""

    index: int
    numbers: list[float]
    """Uniform in [0, 1), one for each token that may be sampled."""
    lookup: Lookup
    new: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    """What the pass under way reads behind the newest token."""


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
        batch_tokens: Columns of all slots together, and of a head that is kept apart; there is at least one slot.
    """
    waiting = deque(sorted(range(len(prompts)), key=lambda index: -len(prompts[index])))
    if not waiting:
        return
    read = _Reader(model, prompts[0][: shared_head(prompts)])
    longest = len(prompts[waiting[0]]) - read.apart + plan.max_new_tokens
    count = max(1, min(len(prompts), (batch_tokens - read.apart) // longest))
    slots = Slots(model.config.get_text_config().num_hidden_layers, count, longest, read.apart)
    rows: list[_Row] = []  # in the order of their slots
    while waiting or rows:
        free = count - len(rows)
        if waiting and (free >= max(1, _REFILL * count) or not rows):
            asked = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            for group in groups([len(prompts[index]) - read.head.length for index in asked], read.pass_cost):
                new = [_Row(asked[at], plan.numbers(asked[at]), Lookup(prompts[asked[at]])) for at in group]
                tails = [prompts[row.index][read.head.length :] for row in new]
                logits, filled = read(tails)
                slots.admit(filled, [len(prompts[row.index]) - read.apart for row in new])
                rows += new
                yield from _take(rows, range(len(rows) - len(new), len(rows)), logits[:, None], plan, slots)
            continue
        _draft(rows, plan, read.pass_cost)
        with read.remembering():
            logits = _step(model, slots, rows)
        yield from _take(rows, range(len(rows)), logits, plan, slots)


def groups(lengths: Sequence[int], cost: int) -> list[list[int]]:
    """Cut prompts, longest first, into passes so that padding and passes together cost least.

    Args:
        lengths: Of what is read, longest first.
        cost: What a pass costs beside its tokens, in tokens.

    Returns:
        Places in `lengths`.
    """
    best, begun = [0] * (len(lengths) + 1), [0] * (len(lengths) + 1)
    for end in range(1, len(lengths) + 1):
        best[end], begun[end] = min(
            (best[start] + cost + (end - start) * lengths[start], start) for start in range(end)
        )
    found, end = [], len(lengths)
    while end:
        found.append(list(range(begun[end], end)))
        end = begun[end]
    return found[::-1]


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
            self.states = [(as_attended(one.keys), as_attended(one.values)) for one in cache.layers]  # type: ignore

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
        self.pass_cost = pass_cost(self.device.type)
        self.apart = self.head.length if model.config.get_text_config()._attn_implementation == attention.NAME else 0
        """Tokens of the head that stay where they are; 0: each row has a copy."""

    def remembering(self) -> AbstractContextManager[None]:
        """Let passes see the head that is kept apart."""
        return behind(self.head.states) if self.apart else nullcontext()

    def __call__(self, tails: Sequence[Sequence[int]]) -> tuple[Tensor, Cache]:
        """Give the logits behind each prompt, (rows, vocab), and the keys and values, from the first column on."""
        longest = max(map(len, tails))
        ids = torch.zeros(len(tails), longest, dtype=torch.long)
        for row, tail in enumerate(tails):  # padded on the right: no token sees the padding
            ids[row, : len(tail)] = torch.tensor(tail)
        last = torch.tensor([row * longest + len(tail) - 1 for row, tail in enumerate(tails)])
        given = self._behind_head(len(tails), longest) if self.head.length else {"past_key_values": DynamicCache()}
        with only_positions(self.model, last.to(self.device)), self.remembering():
            output = self.model(input_ids=ids.to(self.device), use_cache=True, **given)
        return output.logits[0], given["past_key_values"]

    def _behind_head(self, rows: int, longest: int) -> dict[str, Any]:
        """Make cache, mask and positions for tokens behind the head."""
        length = self.head.length
        given: dict[str, Any] = {"position_ids": torch.arange(length, length + longest, device=self.device)[None]}
        seen = torch.ones(longest, longest, dtype=torch.bool).tril()
        if self.apart:
            given["past_key_values"] = DynamicCache()
        else:
            given["past_key_values"] = self.head.cache(rows)
            seen = torch.cat([torch.ones(longest, length, dtype=torch.bool), seen], 1)
        return {**given, "attention_mask": seen[None, None].expand(rows, 1, -1, -1).to(self.device)}


def _draft(rows: Sequence[_Row], plan: Plan, cost: int) -> None:
    """Give each row the tokens that the next pass reads behind its newest."""
    left = [plan.max_new_tokens - len(row.new) - 1 for row in rows]  # a pass gives a token more than it drafted
    width = min(best_width([row.lookup.chance for row in rows], cost), max(left))
    for row, most in zip(rows, left, strict=True):
        row.draft = row.lookup.draft(min(width, most))


def _step(model: Any, slots: Slots, rows: Sequence[_Row]) -> Tensor:
    """Read the newest token of every row and its draft; gives logits (rows, tokens, vocab)."""
    width = 1 + max(len(row.draft) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for at, row in enumerate(rows):
        ids[at, : 1 + len(row.draft)] = torch.tensor([row.new[-1], *row.draft])
    return model(input_ids=ids.to(model.device), **slots.begin(width, model.device)).logits


def _take(
    rows: list[_Row], asked: Sequence[int], logits: Tensor, plan: Plan, slots: Slots
) -> Iterator[tuple[int, list[int]]]:
    """Choose tokens for rows, as many as their drafts foresaw and one more, and end those that are done.

    Args:
        rows: All under way.
        asked: Places of those that the logits belong to.
        logits: (asked rows, tokens, vocab).
        plan: Limits and choice.
        slots: Of the rows.
    """
    chosen = _choose([rows[at] for at in asked], logits, plan)
    for at, tokens in reversed(list(zip(asked, chosen, strict=True))):
        row, before = rows[at], len(rows[at].new)
        done = _append(row, tokens, plan)
        if done:
            slots.release(at)
            last = rows.pop()
            if last is not row:
                rows[at] = last
            yield row.index, row.new
        elif before:  # the first token comes from the prompt's own pass
            slots.advance(at, len(row.new) - before)


def _choose(rows: Sequence[_Row], logits: Tensor, plan: Plan) -> list[list[int]]:
    """Choose a token behind each that was read; of sampled ones only while drafts are right, for sampling takes long.

    Each is sampled by the number that is its own, so a draft decides how many a pass gives, and not which.
    """
    width = logits.shape[1]
    if not any(row.numbers for row in rows):
        return plan.choose(logits.flatten(0, 1), []).view(-1, width).tolist()
    found: list[list[int]] = [[] for _ in rows]
    going = list(range(len(rows)))
    for place in range(width):
        numbers = [rows[at].numbers[len(rows[at].new) + place] for at in going]
        tokens = plan.choose(logits[going, place], numbers).tolist()
        for at, token in zip(going, tokens, strict=True):
            found[at].append(token)
        going = [at for at in going if rows[at].draft[place : place + 1] == found[at][place:]]
        if not going:
            break
    return found


def _append(row: _Row, tokens: Sequence[int], plan: Plan) -> bool:
    """Append the tokens chosen behind the newest and behind each drafted one, while drafts are right; tells an end."""
    for foreseen, token in zip([*row.draft, None], tokens, strict=False):
        row.new.append(token)
        if token in plan.ends or len(row.new) == plan.max_new_tokens or plan.stopped(row.new):
            return True
        row.lookup.add(token)
        if token != foreseen:
            break
    return False


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
