"""Closed answers: the log-likelihood of each option behind its prompt, all options of a prompt in one pass.

The options of a prompt form a tree of tokens: what several begin with stands there once, each token sees the prompt and
what its own options have before it, and logits exist only behind the prompt and behind tokens that are not the last.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trace_hydra import ranks
from trace_hydra.models.decode import Head, shared_head
from trace_hydra.models.forward import only_positions
from trace_hydra.models.generate import Generated, length_batches
from trace_hydra.models.precision import cast_once
from trace_hydra.models.slots import attends_to_all

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Chosen(Generated):
    """An answer that was chosen: `num_new` is 0, `stopped` true."""

    log_likelihoods: dict[str, float]
    """Option -> nats of all its tokens."""


@dataclass(frozen=True)
class _Row:
    """What is read in one row: a prompt, behind it some of the beginnings of its options."""

    prompt: int
    beginnings: list[Ids]
    """The empty one first, each behind its parent; but for that one, a token each."""
    next: list[list[int]]
    """Behind each, the tokens that its options go on with."""

    @property
    def is_chain(self) -> bool:
        """Whether each beginning goes on from the one before it: any causal model reads that right."""
        return all(one[:-1] == before for before, one in zip(self.beginnings, self.beginnings[1:], strict=False))


def choose(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Ids]],
    *,
    batch_tokens: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """Compute the log-likelihood of each prompt's options, in the order given: nats, summed over their tokens.

    The model's mode is as before afterwards.

    Args:
        model: A causal LM, on its device.
        prompts: Token ids, none empty.
        options: Token ids of each prompt's options, none empty.
        batch_tokens: Padded tokens of one pass, those of a shared head included; there is at least one row.
        on_batch: Called with (prompts, prompt tokens) behind each pass.
    """
    was_training = model.training
    model.eval()
    found: list[dict[Ids, float]] = [{} for _ in prompts]
    together = attends_to_all(model)
    rows = [row for at, one in enumerate(options) for row in _rows(at, one, together)]
    with torch.inference_mode(), cast_once(model):
        size = shared_head(prompts) if together else 0
        head = Head(model, list(prompts[0][:size]) if size else [])
        lengths = [len(prompts[row.prompt]) + len(row.beginnings) - 1 for row in rows]
        for batch in length_batches(lengths, 0, batch_tokens):
            chosen = [rows[at] for at in batch]
            for row, beginning, token, value in _read(model, head, prompts, chosen):
                found[row.prompt][*beginning, token] = value
            if on_batch:
                done = {row.prompt for row in chosen if row.next[0]}
                on_batch(len(done), sum(len(prompts[at]) for at in done))
    model.train(was_training)
    return [
        [sum(known[option[: end + 1]] for end in range(len(option))) for option in one]
        for known, one in zip(found, options, strict=True)
    ]


def choose_shared(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Ids]],
    *,
    batch_tokens: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """Choose as `choose` does, each process of the run a part; all of them call, and get all values."""
    if ranks.size() == 1:
        return choose(model, prompts, options, batch_tokens=batch_tokens, on_batch=on_batch)

    def own(numbers: Sequence[int]) -> dict[int, list[float]]:
        asked, among = [prompts[number] for number in numbers], [options[number] for number in numbers]
        values = choose(model, asked, among, batch_tokens=batch_tokens, on_batch=on_batch)
        return dict(zip(numbers, values, strict=True))

    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    found = ranks.shared_out(order, own)
    if on_batch and (others := [number for at, number in enumerate(order) if at % ranks.size() != ranks.rank()]):
        on_batch(len(others), sum(len(prompts[number]) for number in others))
    return [found[number] for number in range(len(prompts))]


def likeliest(values: Sequence[float]) -> int:
    """Give the place of the largest value; of equal ones the first."""
    return max(range(len(values)), key=values.__getitem__)


def _rows(prompt: int, options: Sequence[Ids], together: bool) -> Iterator[_Row]:
    """Lay out a prompt's options: in one row, or (where a model takes no mask of ours) a row for each path."""
    after: dict[Ids, set[int]] = {}
    for option in options:
        for end, token in enumerate(option):
            after.setdefault(option[:end], set()).add(token)
    ordered = sorted(after, key=lambda one: (len(one), one))
    if together:
        yield _Row(prompt, ordered, [sorted(after[one]) for one in ordered])
        return
    leaves = [one for one in ordered if not any(other[:-1] == one for other in ordered if other)]
    for leaf in leaves:
        path = [leaf[:length] for length in range(len(leaf) + 1)]
        yield _Row(prompt, path, [sorted(after.pop(one, ())) for one in path])  # what paths share is taken from one


def _read(
    model: Any, head: Head, prompts: Sequence[Sequence[int]], rows: Sequence[_Row]
) -> Iterator[tuple[_Row, Ids, int, float]]:
    """Read rows, padded on the right, and yield row, beginning, next token and its log-probability."""
    tails = [prompts[row.prompt][head.length :] for row in rows]
    longest = max(len(tail) + len(row.beginnings) - 1 for tail, row in zip(tails, rows, strict=True))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    behind, asked, tokens = [], [], []
    for at, (tail, row) in enumerate(zip(tails, rows, strict=True)):
        read = [*tail, *(one[-1] for one in row.beginnings[1:])]
        ids[at, : len(read)] = torch.tensor(read)
        for place, (beginning, following) in enumerate(zip(row.beginnings, row.next, strict=True)):
            tokens += [(len(behind), token) for token in following]
            asked += [(row, beginning, token) for token in following]
            behind.append(at * longest + len(tail) - 1 + place)
    device = model.device
    given: dict[str, Any] = {"past_key_values": head.cache(len(rows)), "use_cache": True} if head.length else {}
    given.setdefault("use_cache", False)
    if head.length or not all(row.is_chain for row in rows):
        mask, positions = _tree(rows, [len(tail) for tail in tails], longest, head.length)
        given |= {"attention_mask": mask.to(device), "position_ids": positions.to(device)}
    with only_positions(model, torch.tensor(behind, device=device)):
        logits = model(input_ids=ids.to(device), **given).logits[0]  # (beginnings of all rows, vocab)
    places, wanted = torch.tensor(tokens, device=device).T
    logits = logits.float()
    values = (logits[places, wanted] - logits.logsumexp(-1)[places]).tolist()
    for (row, beginning, token), value in zip(asked, values, strict=True):
        yield row, beginning, token, value


def _tree(rows: Sequence[_Row], sizes: Sequence[int], longest: int, head: int) -> tuple[Tensor, Tensor]:
    """Say what each token sees, (rows, 1, longest, head + longest), bool, and its position, (rows, longest).

    Args:
        rows: What is read.
        sizes: How many tokens of each prompt stand in its row.
        longest: Columns of a row.
        head: Tokens that stand before all rows.
    """
    before, own = torch.ones(longest, head, dtype=torch.bool), torch.ones(longest, longest, dtype=torch.bool).tril()
    seen = torch.cat([before, own], 1).expand(len(rows), 1, -1, -1)
    positions = torch.arange(head, head + longest).expand(len(rows), -1)
    if all(row.is_chain for row in rows):
        return seen, positions
    seen, positions = seen.clone(), positions.clone()
    for at, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        columns = {one: size - 1 + place for place, one in enumerate(row.beginnings)}
        for one, column in list(columns.items())[1:]:
            seen[at, 0, column, head + size :] = False
            seen[at, 0, column, [head + columns[one[:length]] for length in range(1, len(one) + 1)]] = True
            positions[at, column] = head + size + len(one) - 1
    return seen, positions
