"""Encoded rows as batches: optimizer steps of rows with similar lengths, each dealt out in micro-batches."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from random import Random
from typing import Any

import numpy as np

from trace_hydra.data.encode import IGNORED, EncodedRow

PASS = 256
"""Tokens that a forward and backward pass costs beside its own. On 2 cores of an AMD EPYC, SmolLM2, full tuning, bf16
autocast: one row of 512 tokens 1.22 s, two 1.87, four 3.50, eight of 256 3.03."""


class LabelPositions:
    """Where a batch has labels, known without asking the device; no collection to Lightning, which copies those.

    Attributes:
        index: (num_labels,), int64: positions in the flattened batch whose next token has a label.
        labels: The labels that this is true of; a batch whose labels are another tensor has other positions.
    """

    def __init__(self, index: Any, labels: Any):
        self.index, self.labels = index, labels


class TrainBatches:
    """Optimizer steps of one phase, bucketed by length, another seeded order in every epoch.

    Which rows a step holds depends on the seed and the epoch alone. How they are dealt out into micro-batches, and to
    how many processes, changes no gradient but for rounding: a micro-batch counts by its share of the step's labels.

    Args:
        rows: Encoded rows, at least one.
        batch_size: Rows of an optimizer step.
        micro_batch_size: Rows of a forward pass; of short rows more, as far as they take no more memory (`deal`).
        seed: Any string; the epoch is added to it.
        rank: This process, from 0.
        world_size: Processes that share each step; their gradients are averaged.
    """

    def __init__(
        self,
        rows: Sequence[EncodedRow],
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: str,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        """The epoch whose order the next pass takes; every pass that begins moves it on."""
        self._rank, self._world_size = rank, world_size
        self._tokens = micro_batch_size * max(len(row.ids) for row in rows)
        self._labels = micro_batch_size * max(row.num_labels for row in rows)
        self._skip = 0

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def start_at(self, epoch: int, step: int) -> None:
        """Let the next iteration begin behind `step` steps of an epoch."""
        more, self._skip = divmod(step, len(self))
        self.epoch = epoch + more

    def tokens_before(self) -> int:
        """Count the tokens of all epochs and steps before where the next iteration begins, on all processes."""
        lengths = [len(row.ids) for row in self.rows]
        steps = bucketed_steps(lengths, self.batch_size, f"{self.seed}-{self.epoch}") if self._skip else []
        return self.epoch * sum(lengths) + sum(lengths[index] for step in steps[: self._skip] for index in step)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        # A generator: Lightning asks for an iterator once more than it trains, and that one must not move the epoch on.
        seed, skip = f"{self.seed}-{self.epoch}", self._skip
        self.epoch, self._skip = self.epoch + 1, 0
        yield from islice(self._steps(seed), skip, None)

    def _steps(self, seed: str) -> Iterator[list[dict[str, Any]]]:
        for step in bucketed_steps([len(row.ids) for row in self.rows], self.batch_size, seed):
            yield self._micro_batches([self.rows[index] for index in step])

    def _micro_batches(self, rows: Sequence[EncodedRow]) -> list[dict[str, Any]]:
        """Collate this process's share of a step; each has its `weight`."""
        dealt = deal(rows, self._tokens, self._labels, -(-len(rows) // self._world_size))
        labels = sum(row.num_labels for row in rows)
        batches = []
        for chosen in dealt[self._rank :: self._world_size]:
            share = sum(row.num_labels for row in chosen) / labels if labels else len(chosen) / len(rows)
            batches.append({**collate(chosen), "weight": share * self._world_size})
        # All processes take as many passes: with a row that does not count if there is nothing else.
        while len(batches) * self._world_size < len(dealt):
            batches.append({**collate(rows[:1]), "weight": 0.0})
        step = {"step_ids": [row.example_id for row in rows], "step_tokens": sum(len(row.ids) for row in rows)}
        return [{**one, **step} for one in batches]


def deal(rows: Sequence[EncodedRow], tokens: int, labels: int, most: int) -> list[list[EncodedRow]]:
    """Deal the rows of a step, sorted by length, into micro-batches that together cost least.

    A micro-batch costs its padded tokens and `PASS` for the pass itself.

    Args:
        rows: Shortest first.
        tokens: Padded tokens of a micro-batch, at most; a single row may have more.
        labels: Positions with a loss, likewise.
        most: Rows of a micro-batch, at most.
    """
    cheapest, starts = [0], [0]  # of the first so many rows: their cost, and where their last micro-batch begins
    for end in range(1, len(rows) + 1):
        longest, num_labels = len(rows[end - 1].ids), 0
        options = []
        for start in range(end - 1, max(-1, end - 1 - most), -1):
            num_labels += rows[start].num_labels
            size = (end - start) * longest
            if start < end - 1 and (size > tokens or num_labels > labels):
                break
            options.append((cheapest[start] + size + PASS, start))
        cost, start = min(options)
        cheapest.append(cost)
        starts.append(start)
    dealt: list[list[EncodedRow]] = []
    end = len(rows)
    while end:
        dealt.insert(0, list(rows[starts[end] : end]))
        end = starts[end]
    return dealt


def bucketed_steps(lengths: Sequence[int], batch_size: int, seed: str) -> list[list[int]]:
    """Deal row indices into steps of rows with similar lengths, in a seeded order of rows and steps.

    Rows are shuffled, cut into pools of 32 steps, sorted by length within a pool and dealt out; then the steps are
    shuffled. The step with fewer than `batch_size` rows, if any, comes last.
    """
    rng = Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    num_full = len(order) // batch_size * batch_size
    rest = order[num_full:]
    steps: list[list[int]] = []
    pool_size = 32 * batch_size
    for start in range(0, num_full, pool_size):
        pool = sorted(order[start : min(start + pool_size, num_full)], key=lambda index: lengths[index])
        steps += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
    rng.shuffle(steps)
    return [*steps, sorted(rest, key=lambda index: lengths[index])] if rest else steps


def collate(rows: Sequence[EncodedRow]) -> dict[str, Any]:
    """Pad rows on the right.

    The pad id is 0: masked and without loss, so its value never matters.

    Returns:
        input_ids, attention_mask, labels, each (batch, longest), int64; label_positions; num_tokens without padding;
        example_ids.
    """
    import torch

    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    positions = []
    for index, row in enumerate(rows):
        length = len(row.ids)
        ids[index, :length] = torch.from_numpy(row.ids.astype(np.int64))
        mask[index, :length] = 1
        labels[index, row.num_prompt : length] = ids[index, row.num_prompt : length]
        positions.append(np.arange(row.num_prompt - 1, length - 1) + index * longest)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "label_positions": LabelPositions(torch.from_numpy(np.concatenate(positions)), labels),
        "num_tokens": sum(len(row.ids) for row in rows),
        "example_ids": [row.example_id for row in rows],
    }


def to_device(batch: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """Move a batch."""
    import torch

    moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    if (known := batch.get("label_positions")) is not None and known.labels is batch["labels"]:
        moved["label_positions"] = LabelPositions(known.index.to(device), moved["labels"])
    return moved
