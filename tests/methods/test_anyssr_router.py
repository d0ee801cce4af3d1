"""Any-SSR's router: ridge regression task by task is that of all tasks at once; prompts find their task."""

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from conftest import run_tiny

from trace_hydra.methods.anyssr import AnalyticRouting
from trace_hydra.methods.routing import pooled, update


def test_update_by_hand():
    """lambda = 2, one row x = 3, y = 1: R = 1 / (2 + 9), W = 3 / 11; a second x = 1, y = 0: R = 1 / 12, W = 3 / 12."""
    inverse, weight = torch.tensor([[0.5]]).double(), torch.zeros(1, 1).double()
    for x, y, r, w in ((3.0, 1.0, 1 / 11, 3 / 11), (1.0, 0.0, 1 / 12, 3 / 12)):
        inverse, weight = update(inverse, weight, torch.tensor([[x]]).double(), torch.tensor([[y]]).double())
        assert float(inverse) == pytest.approx(r, rel=1e-14) and float(weight) == pytest.approx(w, rel=1e-14)


@pytest.mark.parametrize("ridge", [100.0, 1.0, 1e-2])
@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
def test_recursion_is_joint_ridge_regression(ridge, rows_at_once):
    """Over all task orders and splits: R and W are those of all rows at once, W's columns in the order of the tasks.

    Tasks of 20, 31 and 9 rows, features 24 wide: some splits have fewer rows than features, some more.
    """
    generator = torch.Generator().manual_seed(0)
    tasks = [
        torch.randn(rows, 24, generator=generator, dtype=torch.float64).relu() + number
        for number, rows in enumerate((20, 31, 9))
    ]
    for order in permutations(range(3)):
        inverse, weight = torch.eye(24, dtype=torch.float64) / ridge, torch.zeros(24, 0, dtype=torch.float64)
        for place, task in enumerate(order):
            weight = F.pad(weight, (0, 1))
            for rows in tasks[task].split(rows_at_once):
                labels = F.one_hot(torch.full((len(rows),), place), place + 1).double()
                inverse, weight = update(inverse, weight, rows, labels)
        rows = torch.cat(tasks)
        labels = F.one_hot(torch.repeat_interleave(torch.tensor([20, 31, 9])), 3).double()
        gram = rows.T @ rows + ridge * torch.eye(24, dtype=torch.float64)
        assert torch.allclose(inverse @ gram, torch.eye(24, dtype=torch.float64), atol=1e-9)
        assert torch.allclose(weight, torch.linalg.solve(gram, rows.T @ labels)[:, list(order)], rtol=1e-9, atol=1e-10)


def test_pooled_by_hand():
    """(3, 4) / sqrt(12.5) and (1, 1) / 1, the mean over two tokens; a third is padding, whatever stands there."""
    states = torch.tensor([[[3.0, 4.0], [1.0, 1.0], [9.0, -9.0]]])
    expected = torch.tensor([[3.0, 4.0]]) / 12.5**0.5 / 2 + 0.5
    assert torch.allclose(pooled(states, torch.tensor([[1, 1, 0]])), expected, atol=1e-6)


def test_test_prompts_find_their_task(tmp_path):
    """Six generated tasks, a random model: 12 train prompts each are enough for 9 in 10 test prompts, chance is 1 in 6.

    Measured: all 120, though two tasks share their instruction.
    """
    tasks = ["C-STANCE", "FOMC", "Py150", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"]
    run = run_tiny(
        tmp_path,
        [
            "method=anyssr",
            f"task_order=[{','.join(tasks)}]",
            "data.rows.train=12",
            "data.rows.test=20",
            "evaluation=diagonal_last",
            "protocol.decoding.max_new_tokens=1",
        ],
    )
    right = [
        route == place
        for place, task in enumerate(tasks)
        for route in run.method.route(
            run.ctx, [row.prompt for row in run.data.tasks[task].test], run.views[task].instruction
        )
    ]
    assert len(right) == 120 and sum(right) >= 0.9 * len(right)


def test_planted_features_are_told_apart():
    """Clusters along 5 axes, 1 apart with noise 0.1: all right, also of tasks learned first."""
    method = AnalyticRouting(frozen_share=0.5, expansion=64, ridge=1.0)
    generator = torch.Generator().manual_seed(1)
    weight, inverse = torch.zeros(64, 0).double(), torch.eye(64).double()
    centres = torch.eye(5, 8)
    for task in range(5):
        rows = method.expand(centres[task] + 0.1 * torch.randn(40, 8, generator=generator))
        weight = F.pad(weight, (0, 1))
        inverse, weight = update(inverse, weight, rows, F.one_hot(torch.full((40,), task), task + 1).double())
    fresh = method.expand(centres.repeat(20, 1) + 0.1 * torch.randn(100, 8, generator=generator))
    assert (fresh @ weight).argmax(1).tolist() == list(range(5)) * 20
