"""Runs whose true numbers are known."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import special

from trace_hydra.metrics.continual import evaluate
from trace_hydra.statistics import ExampleScores, RunScores

TASKS = ("alpha", "beta", "gamma", "delta")


def given_run(
    cells, *, tasks: Sequence[str] = TASKS[:2], seed: int = 0, method: str = "one", ids=None, prompts=None
) -> RunScores:
    """A run with the row scores given by (row, task)."""
    scores = {}
    for (row, task), values in cells.items():
        own = ids[task] if ids else tuple(f"test-{i}" for i in range(len(values)))
        hashes = prompts[task] if prompts else ()
        scores[row, task] = ExampleScores(tuple(own), np.array(values, dtype=np.float64), tuple(hashes))
    return RunScores(f"{method}-{seed}", method, tuple(tasks), "given", seed, scores)


class World:
    """Draws groups of runs: what varies between rows, orders, seeds, trainings and answers, in standard deviations.

    Points are `means` plus noise; with `binary`, answers are right with the chance `means` (in percent), by a probit
    model whose chance over all that varies is exactly that.

    Args:
        means: By (row, position in training order), (T + 1, T); NaN: not scored.
        rows: Test rows a task.
        row: Of test rows, the same in all runs and stages: some are harder.
        row_stage: Of test rows in one row of the matrix, the same in all runs.
        order: Of a cell, the same in all runs of an order.
        seed: Of a cell, the same in all runs of a seed.
        run: Of a cell of one run.
        answer: Of one answer.
        binary: Score 0 or 100 for each answer; the deviations above are then on the probit scale and `answer` is 1.
    """

    def __init__(self, means, rows, *, row=0.0, row_stage=0.0, order=0.0, seed=0.0, run=0.0, answer=1.0, binary=False):
        self.means, self.rows = np.asarray(means, dtype=np.float64), rows
        self.row, self.row_stage, self.order, self.seed, self.run, self.answer = (
            row,
            row_stage,
            order,
            seed,
            run,
            answer,
        )
        self.binary = binary
        self.count = self.means.shape[1]
        self.ids = tuple(f"test-{i}" for i in range(rows))

    def draw(self, rng: np.random.Generator, design: Sequence[tuple[int, int]], shift: float = 0.0) -> list[RunScores]:
        """Draw a run for each (order, seed); orders are rotations of the tasks, seeds numbers."""
        size = self.count
        shape = (size + 1, size)  # by (row, task), tasks in the order of the first order
        hard = rng.normal(size=(1, size, self.rows)) * self.row
        hard = hard + rng.normal(size=(*shape, self.rows)) * self.row_stage
        by_order = {order: rng.normal(size=shape) * self.order for order in sorted({order for order, _ in design})}
        by_seed = {seed: rng.normal(size=shape) * self.seed for seed in sorted({seed for _, seed in design})}
        runs = []
        for order, seed in design:
            names = [TASKS[(i + order) % size] for i in range(size)]
            columns = [TASKS.index(name) for name in names]
            cell = by_order[order] + by_seed[seed] + rng.normal(size=shape) * self.run
            values = (cell[..., None] + hard)[:, columns] + rng.normal(size=(*shape, self.rows)) * self.answer
            values = self._scored(values) if self.binary else self.means[..., None] + shift + values
            cells = {
                (row, name): ExampleScores(self.ids, values[row, column])
                for row in range(size + 1)
                for column, name in enumerate(names)
                if not np.isnan(self.means[row, column])
            }
            runs.append(RunScores(f"run-{order}-{seed}", "one", tuple(names), f"order{order}", seed, cells))
        return runs

    def truth(self, number: str) -> float:
        """Compute a number over endless rows, averaged over endless orders, seeds and trainings."""
        if ":" in number:
            return float(self.means[-1, 0])
        noise = np.sqrt(self.order**2 + self.seed**2 + self.run**2)
        if self.binary or not noise or number not in ("forgetting", "bwt_clipped"):
            return float(evaluate(self.means, [number])[number])
        trained = self.means + np.random.default_rng(0).normal(0, noise, (100_000, *self.means.shape))
        return float(evaluate(trained, [number])[number].mean())

    def _scored(self, latent: np.ndarray) -> np.ndarray:
        parts = (self.row, self.row_stage, self.order, self.seed, self.run, self.answer)
        total = np.sqrt(sum(part**2 for part in parts))
        return 100.0 * (special.ndtri(self.means / 100)[..., None] * total + latent > 0)


def two_methods(world: World, rng: np.random.Generator, design, shift: float = 0.0) -> dict[str, list[RunScores]]:
    """Draw two methods on the same rows; the first scores `shift` points more. Orders have one effect on both."""
    both = world.draw(rng, [*design, *((order, seed + 1000) for order, seed in design)])
    first, second = both[: len(design)], both[len(design) :]
    moved = [
        replace(run, cells={cell: ExampleScores(own.ids, own.values + shift) for cell, own in run.cells.items()})
        for run in first
    ]
    return {"one": moved, "two": [replace(run, seed=run.seed - 1000, method="two") for run in second]}


def triangle(first: float, last: float, count: int = len(TASKS), before: float = 20.0) -> np.ndarray:
    """Make means: `before` until a task is trained, then `first`, going straight to `last` in the last row."""
    means = np.full((count + 1, count), before)
    for column in range(count):
        means[column + 1 :, column] = np.linspace(first, last, count - column) if column < count - 1 else first
    return means
