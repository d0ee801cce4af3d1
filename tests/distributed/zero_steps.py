"""A process of two that trains a small model with DeepSpeed's engine and without: python zero_steps.py FOLDER

Step 2 does not reach one weight, step 3 is dropped, and before step 4 the state goes to a new engine.
"""

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from trace_hydra import ranks, zero
from trace_hydra.strategies import whole

CLIP = 0.05
SHARES = (0.5, 0.3, 0.2)
"""Of the micro-batches of a step; the processes hold other rows of each."""
GIVEN = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100},
    "zero_allow_untested_optimizer": True,
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.other = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(5, 3)

    def forward(self, rows: Tensor, skip: bool) -> Tensor:
        out = self.second(torch.tanh(self.first(rows)))
        return out if skip else out + self.other(rows)


def rows_of(step: int, part: int, rank: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(100 * step + 10 * part + rank))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def plain(model: nn.Module, steps: list[int]) -> tuple[list[float], dict]:
    """What one process does with the rows of both; a weight that is not reached has gradient 0."""
    optimizer, norms = adam(model), []
    for step in steps:
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        for part, share in enumerate(SHARES):
            for rank in range(2):
                (model(rows_of(step, part, rank), step == 2).square().mean() * share / 2).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
    return norms, optimizer.state_dict()


def split(model: nn.Module, steps: list[int]) -> tuple[list[float], dict]:
    config = zero.engine_config(GIVEN, CLIP)
    engine, norms = zero.Engine(model, adam(model), config, torch.device("cpu")), []
    for step in steps:
        if step == 4:
            saved = engine.state()
            engine.close()
            model = again(model)
            engine = zero.Engine(model, adam(model), config, torch.device("cpu"))
            engine.load(saved)
        engine.begin()
        for part, share in enumerate(SHARES):
            engine.boundary(part == len(SHARES) - 1)
            rows = rows_of(step, part, ranks.rank())
            loss = engine.forward(lambda rows=rows, step=step: model(rows, step == 2)).square().mean() * share  # noqa: B023
            engine.backward(loss)
        if step == 3:
            engine.drop()
        else:
            norms.append(float(engine.norm()))
        engine.step()
    state = engine.state()
    engine.close()
    whole_model.load_state_dict({name: whole(one) for name, one in model.named_parameters()})
    return norms, state


def again(model: nn.Module) -> nn.Module:
    found = Net()
    found.load_state_dict({name: whole(one) for name, one in model.named_parameters()})
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    whole_model = Net()
    start = copy.deepcopy(whole_model)
    with ranks.joined(torch.device("cpu")):
        norms, state = split(copy.deepcopy(start), [1, 2, 3, 4, 5])
    wanted_norms, wanted = plain(start, [1, 2, 4, 5])
    found = {"weights": whole_model.state_dict(), "norms": torch.tensor(norms), "state": state["state"]}
    known = {"weights": start.state_dict(), "norms": torch.tensor(wanted_norms), "state": wanted["state"]}
    torch.save((found, known), Path(sys.argv[1]) / f"steps{ranks.rank()}.pt")
