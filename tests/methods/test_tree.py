"""The tree over tasks and the search in it, by hand and on planted groups of gradients."""

from math import ceil, log2

import pytest
import torch

from trace_hydra.methods.tree import LevelSearch, Node, build_tree, gradient_distance, pairwise_distances


def line(*positions: float) -> list[list[float]]:
    """Distances between points on a line."""
    return [[abs(one - other) for other in positions] for one in positions]


def planted(groups: str, seed: int = 0, levels: int = 4, width: int = 64, noise: float = 0.1) -> list[torch.Tensor]:
    """Gradients (tasks, width) of each level: a random direction for each letter, and noise."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(levels):
        centers = {letter: torch.randn(width, generator=generator) for letter in sorted(set(groups))}
        found.append(
            torch.stack([centers[letter] + noise * torch.randn(width, generator=generator) for letter in groups])
        )
    return found


def leaves(node: Node, depth: int = 0) -> list[tuple[int, int]]:
    """(task, depth) of each leaf, from left to right."""
    if node.children is None:
        return [(node.tasks[0], depth)]
    return [leaf for child in node.children for leaf in leaves(child, depth + 1)]


def test_distance_by_hand():
    """(1, -1) and (2, 2) have directions (1/2, -1/2) and (1/2, 1/2): half of |0| + |-1| is 1/2.

    (3, 1) is (3/4, 1/4): to (1/2, 1/2) half of 1/4 + 1/4. Opposites are 1 apart, 0 is 1/2 from all.
    """
    one = torch.tensor([1.0, -1.0])
    assert float(gradient_distance(one, torch.tensor([2.0, 2.0]))) == 0.5
    assert float(gradient_distance(torch.tensor([[3.0], [1.0]]), torch.tensor([[7.0], [7.0]]))) == 0.25
    assert float(gradient_distance(one, -5 * one)) == 1.0 and float(gradient_distance(one, 5 * one)) == 0.0
    assert float(gradient_distance(torch.zeros(2), one)) == 0.5


def test_pairwise_distances_are_a_metric():
    """The same as one by one; symmetric, 0 on the diagonal, at most 1; the way round by a third is no shorter."""
    gradients = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(1))
    found = pairwise_distances(gradients)
    for one in range(6):
        for other in range(6):
            expected = float(gradient_distance(gradients[one], gradients[other]))
            assert found[one][other] == pytest.approx(expected, abs=1e-6) and 0 <= found[one][other] <= 1
            assert found[one][other] == pytest.approx(found[other][one], abs=1e-6)
            assert all(found[one][other] <= found[one][via] + found[via][other] + 1e-6 for via in range(6))
        assert found[one][one] == 0.0


def test_tree_by_hand():
    """Level 0 puts the tasks at 0, 1, 5, 6, 20, level 1 at 0, 9, 1, 4, 2.

    Root, level 0: farthest are 0 and 4, the median cut leaves {0, 1, 2} and {3, 4}. {0, 1, 2}, level 1 (0, 9, 1):
    farthest are 0 and 1, task 2 is at 1 - 8 < 0, so {0, 2} and {1}. {0, 2}, level 0 again: {0}, {2}.
    """
    root = build_tree([line(0, 1, 5, 6, 20), line(0, 9, 1, 4, 2)])
    assert leaves(root) == [(0, 3), (2, 3), (1, 2), (3, 2), (4, 2)]
    assert root.children is not None and root.diameters == (20, 9)
    left, right = root.children
    assert (left.tasks, left.diameters) == ((0, 1, 2), (5, 9)) and (right.tasks, right.diameters) == ((3, 4), (14, 2))
    assert left.children is not None and [child.tasks for child in left.children] == [(0, 2), (1,)]
    assert left.children[0].diameters == (5, 1) and left.children[1].diameters == (0, 0)


def test_order_is_by_both_of_the_farthest():
    """0 and 1 are farthest. Task 2 is at 6 - 9 = -3, task 3 at 5 - 1 = 4, though task 3 is nearer to 0."""
    root = build_tree([[[0, 10, 6, 5], [10, 0, 9, 1], [6, 9, 0, 6], [5, 1, 6, 0]]])
    assert root.children is not None and [child.tasks for child in root.children] == [(0, 2), (1, 3)]


def test_ties_are_cut_by_number():
    root = build_tree([line(3, 3, 3, 3)])
    assert root.children is not None and [child.tasks for child in root.children] == [(0, 1), (2, 3)]
    assert leaves(build_tree([line(7)])) == [(0, 0)]


@pytest.mark.parametrize("groups", ["aaaabbbb", "abababab", "baabbaab", "ab", "aabb", "aab"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_groups_are_separated_at_the_root(groups, seed):
    root = build_tree([pairwise_distances(one) for one in planted(groups, seed)])
    assert root.children is not None
    assert [len({groups[task] for task in child.tasks}) for child in root.children] == [1, 1]
    assert all(max(child.diameters) < 0.3 < min(root.diameters) for child in root.children)


def test_groups_of_unequal_size_share_no_node_below_the_cut():
    """Three and five: the median leaves one half pure, the other is cut by group next."""
    groups = "abbabbab"
    root = build_tree([pairwise_distances(one) for one in planted(groups)])
    assert root.children is not None
    pure = [len({groups[task] for task in child.tasks}) == 1 for child in root.children]
    mixed = root.children[pure.index(False)]
    assert sorted(pure) == [False, True] and mixed.children is not None
    assert any({groups[task] for task in child.tasks} == {"a"} for child in mixed.children)


def test_lower_confidence_bound_by_hand():
    """Two tasks 0.3 apart at the search's level; task 0 cost 0.2 and 0.4, task 1 cost 0.9: t = 4.

    Leaves: 0.3 - 2 sqrt(ln 4 / 2) = -1.365109; 0.9 - 2 sqrt(ln 4) = -1.454820. The root's own:
    1.5 / 3 - 2 sqrt(ln 4 / 3) - 0.3 = -1.159560, larger than the lower child's.
    """
    root = build_tree([line(0.0, 5.0), line(0.0, 0.3)])
    search = LevelSearch(root, 1, 2.0)
    assert root.children is not None and search.bound(root) == -float("inf")
    for task, cost in ((0, 0.2), (1, 0.9), (0, 0.4)):
        search.observe(task, cost)
    assert [search.bound(child) for child in root.children] == pytest.approx([-1.365109, -1.454820], abs=1e-5)
    assert search.bound(root) == pytest.approx(-1.159560, abs=1e-5)
    assert search.choose() == 1  # tried less, so its bound is lower though it cost more
    search.exploration = 0.0
    assert search.choose() == 0 and search.bound(root) == pytest.approx(0.3)  # max(0.5 - 0.3, min(0.3, 0.9))


def test_bound_without_exploration_never_exceeds_the_best_task_below():
    """Costs are true distances, so every node's bound must be at most the nearest of its tasks' (triangle inequality).

    Each task is observed up to three times, in every node.
    """
    gradients = planted("aabbccab", seed=3)
    current = torch.randn(64, generator=torch.Generator().manual_seed(9))
    root = build_tree([pairwise_distances(one) for one in gradients])
    costs = [float(gradient_distance(current, one)) for one in gradients[1]]
    search = LevelSearch(root, 1, 0.0)

    def check(node: Node):
        assert search.bound(node) <= min(costs[task] for task in node.tasks) + 1e-6
        for child in node.children or ():
            check(child)

    for task in (5, 0, 5, 3, 7, 1, 1, 2, 6, 4):
        search.observe(task, costs[task])
        check(root)


@pytest.mark.parametrize("number", [1, 2, 3, 5, 6, 8, 9])
def test_number_of_comparisons(number):
    """A search compares at most log2(tasks), rounded up, pairs of nodes; exactly that for a power of two."""
    root = build_tree([line(*range(number))])
    search = LevelSearch(root, 0, 2.0)
    for _ in range(20):
        before = search.comparisons
        search.observe(search.choose(), 0.5)
        made = search.comparisons - before
        assert made <= ceil(log2(number)) and made >= int(log2(number))
    assert sum(search.pulls.values()) == 20 and max(depth for _, depth in leaves(root)) == ceil(log2(number))


@pytest.mark.parametrize("group", ["a", "b"])
@pytest.mark.parametrize("level", [0, 3])
def test_search_finds_the_group_and_tries_the_other_once(group, level):
    """A task of a planted group searches 40 rounds, with little exploration (0.05).

    The other group costs about 0.7 more than its diameter, so one observation of one of its four tasks speaks for all
    of them. Without the bound of inner nodes each of them would be tried.
    """
    groups = "abababab"
    gradients = planted(groups + group, seed=5)
    tree = build_tree([pairwise_distances(one[:8]) for one in gradients])
    search = LevelSearch(tree, level, 0.05)
    for _ in range(40):
        task = search.choose()
        search.observe(task, float(gradient_distance(gradients[level][8], gradients[level][task])))
    assert groups[search.choose()] == group
    assert sum(count for task, count in search.pulls.items() if groups[task] != group) == 1


def test_with_the_papers_exploration_near_tasks_are_pulled_more():
    """Factor 2 and costs in [0, 1]: exploration is wide, but the near group gets more than half of 400 rounds."""
    gradients = planted("ababb", seed=6)
    tree = build_tree([pairwise_distances(one[:4]) for one in gradients])
    search = LevelSearch(tree, 0, 2.0)
    for _ in range(400):
        task = search.choose()
        search.observe(task, float(gradient_distance(gradients[0][4], gradients[0][task])))
    assert min(search.pulls.values()) > 0 and search.pulls[1] + search.pulls[3] > 240
