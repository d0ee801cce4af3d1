"""Methods that edit gradients or weights give the same weights however a step's rows are dealt into micro-batches."""

import pytest
from conftest import ROOT, compose_config, method_node, run_tiny

from trace_hydra.methods.base import Method
from trace_hydra.targets import locate

METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
# Answers of one letter: every micro-batch has as many labels as rows, so its mean is that of its rows.
SETTINGS = [
    "task_order=[FOMC,C-STANCE]", "data.rows.train=8", "budget.batch_size=4",
    "optim.optimizer._target_=torch.optim.SGD", "~optim.optimizer.betas", "optim.optimizer.lr=0.05",
]  # fmt: skip


def edits(name: str) -> bool:
    method = locate(method_node(name)._target_)
    return any(getattr(method, hook) is not getattr(Method, hook) for hook in ("edit_gradients", "after_step"))


EDITING = [name for name in METHODS if edits(name)]


@pytest.mark.parametrize("clip", [pytest.param("null", marks=pytest.mark.long), "0.05"])
@pytest.mark.parametrize("name", EDITING)
def test_micro_batches_change_nothing(name, clip, tmp_path):
    """SGD, so that a step is linear in the gradient; 1e-4 of the weights' change is float rounding.

    With clip_norm=0.05 every step is clipped: the method edits the whole step's gradient, then its norm is taken.
    """
    config = compose_config([f"method={name}"])
    dropout = ["tuning.dropout=0"] if "dropout" in config.tuning else []
    runs = [
        run_tiny(
            tmp_path / str(size),
            [*SETTINGS, f"method={name}", f"budget.micro_batch_size={size}", f"optim.clip_norm={clip}", *dropout],
        )
        for size in (4, 1)
    ]
    whole, parts = (run.weights_after for run in runs)
    before = runs[0].weights_before
    changed = sum(float((whole[one] - before[one]).square().sum()) for one in whole if one in before) ** 0.5
    apart = sum(float((whole[one] - parts[one]).square().sum()) for one in whole) ** 0.5
    assert changed > 0 and apart <= 1e-4 * changed
