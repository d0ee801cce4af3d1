"""A K-D tree over tasks whose gradients are alike, and a lower-confidence-bound search in it.

Gradients have levels (one per adapted matrix). A K-D tree cuts along one axis after another: here the node at depth d
cuts its tasks by their gradients at level d, again from the first where there are fewer levels than cuts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log, sqrt

import torch
from torch import Tensor


@dataclass(frozen=True)
class Node:
    """Tasks and how far apart they are; a leaf is one task."""

    tasks: tuple[int, ...]
    diameters: tuple[float, ...]
    """Largest distance between two of the tasks, at each level."""
    children: tuple["Node", "Node"] | None = None


def gradient_distance(left: Tensor, right: Tensor) -> Tensor:
    """Half the L1 distance of two gradients' directions, each of L1 norm 1: a metric on directions, in [0, 1].

    Args:
        left: Any shape; a gradient that is 0 has no direction and is 1/2 from every other.
        right: Like `left`.

    Returns:
        Scalar fp32.
    """
    return 0.5 * (_directions(left.reshape(1, -1)) - _directions(right.reshape(1, -1))).abs().sum()


def pairwise_distances(gradients: Tensor) -> list[list[float]]:
    """Compute `gradient_distance` between all tasks at one level, from (tasks, ...)."""
    directions = _directions(gradients.flatten(1))
    return (0.5 * torch.cdist(directions, directions, p=1.0)).tolist()


def build_tree(distances: Sequence[Sequence[Sequence[float]]]) -> Node:
    """Cut the tasks in halves until each is alone.

    A node takes its two farthest tasks a and b at its level, orders its tasks by d(., a) - d(., b), ties by number, and
    cuts at the median, so that the depth is log2 of the number of tasks, rounded up.

    Args:
        distances: [level][task][task], symmetric; at least one level and one task.
    """
    return _node(distances, tuple(range(len(distances[0]))), 0)


class LevelSearch:
    """Looks for the task nearest to the current one at one level; each task is an arm, a distance what it costs.

    Args:
        root: The tree.
        level: Whose distances are observed.
        exploration: Factor of sqrt(log t / n), at least 0.
    """

    def __init__(self, root: Node, level: int, exploration: float):
        self.root, self.level, self.exploration = root, level, exploration
        self.pulls = dict.fromkeys(root.tasks, 0)
        """How often each task was observed."""
        self.totals = dict.fromkeys(root.tasks, 0.0)
        """Sum of the distances observed."""
        self.comparisons = 0
        """Pairs of nodes compared by `choose` so far."""

    def bound(self, node: Node) -> float:
        """Bound the smallest mean distance under a node from below.

        Leaf: mean - exploration * sqrt(log t / n), with t = 1 + all observations and n its own; -inf without any.
        Inner node: the larger of two bounds: the lower one of its children, and the same formula over all its tasks
        minus its diameter, because tasks that near each other are, by the triangle inequality, as near to any other.
        """
        pulls = sum(self.pulls[task] for task in node.tasks)
        if not pulls:
            return -inf
        mean = sum(self.totals[task] for task in node.tasks) / pulls
        own = mean - self.exploration * sqrt(log(1 + sum(self.pulls.values())) / pulls)
        if node.children is None:
            return own
        return max(own - node.diameters[self.level], min(self.bound(child) for child in node.children))

    def choose(self) -> int:
        """Go down from the root to the child with the lower bound, left if equal; the task of the leaf."""
        node = self.root
        while node.children is not None:
            self.comparisons += 1
            left, right = node.children
            node = left if self.bound(left) <= self.bound(right) else right
        return node.tasks[0]

    def observe(self, task: int, distance: float) -> None:
        """Add one observed distance to a task, in [0, 1]."""
        self.pulls[task] += 1
        self.totals[task] += distance


def _node(distances: Sequence[Sequence[Sequence[float]]], tasks: tuple[int, ...], depth: int) -> Node:
    diameters = tuple(max(level[one][other] for one in tasks for other in tasks) for level in distances)
    if len(tasks) == 1:
        return Node(tasks, diameters)
    level = distances[depth % len(distances)]
    pairs = [(one, other) for one in tasks for other in tasks if one < other]
    first, second = max(pairs, key=lambda pair: level[pair[0]][pair[1]])
    ordered = sorted(tasks, key=lambda task: (level[task][first] - level[task][second], task))
    half = (len(ordered) + 1) // 2
    children = (
        _node(distances, tuple(sorted(ordered[:half])), depth + 1),
        _node(distances, tuple(sorted(ordered[half:])), depth + 1),
    )
    return Node(tasks, diameters, children)


def _directions(rows: Tensor) -> Tensor:
    """Scale rows to L1 norm 1, in fp32; a row of zeros stays."""
    rows = rows.float()
    norms = rows.abs().sum(1, keepdim=True)
    return rows / torch.where(norms > 0, norms, torch.ones_like(norms))
