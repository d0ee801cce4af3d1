"""Progressive Prompts: a prompt per task, joined to the frozen ones (Razdaibiedina et al. 2023, arXiv:2301.12314).

Paper -> code:  section 3: P_k for task k, the model and P_1 .. P_{k-1} frozen; input [P_k, .., P_1, x] -> `_prefix`
    maximise sum of log p(y | [P_k, .., P_1, x]) over P_k -> the base class's loss behind ctx.prefix
    section 3: residual reparametrisation P'_k = P_k + MLP(P_k), two linear layers with a narrow middle; thrown away
        after training, P'_k stays -> `ResidualMLP`, folded in `end_stage`
    a test row of task i gets [P_i, .., P_1]: that needs the task's identity -> task_id=true
Differs from the paper: with task_id=false every row gets all prompts so far, for comparison with methods that are not
    told the task; then forgetting is possible though no prompt changes. Equation numbers could not be checked.
Differs from official TRACE: each task has its own prompt (there the base prompt is one for all, only the MLP is per
    task; model/Dynamic_network/PP.py), earlier ones are frozen (there not detached), and prompts are present in
    generation (there infer_single never prepends them; the end-of-task call raises TypeError, :348).
Memory: 4 x prompt_length x width bytes per task, on the device and once more in the state. While a stage trains also
    8 x bottleneck x width bytes for the MLP. Compute: prompt_length more tokens a row for every task so far.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from trace_hydra.context import StageContext, TrainTask
from trace_hydra.errors import ConfigError
from trace_hydra.methods.base import Method
from trace_hydra.models.prompts import all_ids, virtual_tokens
from trace_hydra.sizes import RunSize, StateSize


class ResidualMLP(nn.Module):
    """P + MLP(P): (length, width) to the same shape.

    Args:
        width: Of the vectors.
        bottleneck: Of the hidden layer.
    """

    def __init__(self, width: int, bottleneck: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, bottleneck), nn.ReLU(), nn.Linear(bottleneck, width), nn.LayerNorm(width)
        )

    def forward(self, table: Tensor) -> Tensor:
        """Reparametrise a table, in the weights' precision."""
        return table + self.layers(table)


class ProgressivePrompts(Method):
    """Train one new prompt a task before all earlier ones, which stay as they are.

    Args:
        prompt_length: Virtual tokens of a task's prompt, at least 1.
        bottleneck: Width of the MLP's hidden layer; 0: no reparametrisation.
        task_id: Whether a test row gets the prompts up to its own task (true) or all so far (false).
    """

    tunings = ("prompt",)
    tuning_reason = "every task gets a soft prompt and the model stays frozen"
    published = MappingProxyType({"prompt": "Progressive Prompts"})

    def __init__(self, *, prompt_length: int, bottleneck: int, task_id: bool):
        if prompt_length < 1:
            raise ConfigError(f"method.prompt_length={prompt_length} must be at least 1; it is a prompt's tokens.")
        if bottleneck < 0:
            raise ConfigError(f"method.bottleneck={bottleneck} must be at least 0; 0 means no reparametrisation.")
        self.prompt_length, self.bottleneck, self.task_id = prompt_length, bottleneck, task_id
        self.sees_task_id = task_id
        self.cells = "diagonal" if task_id else "all"
        self.prompts: dict[str, Tensor] = {}
        """Task -> its trained prompt, (prompt_length, width), fp32, CPU, in training order."""

    def prefix_length(self, tuning: int, stages: int) -> int:
        """The prompts of all tasks."""
        return self.prompt_length * stages

    def setup(self, ctx: StageContext) -> None:
        """Drop the tuning's prompt; row 0 is the model's own."""
        virtual_tokens(ctx.model).clear()
        ctx.prefix = ()

    def begin_stage(self, ctx: StageContext) -> None:
        """Add the task's prompt and its MLP, freeze the earlier ones."""
        self._mount(ctx)
        tokens = virtual_tokens(ctx.model)
        tokens.requires_grad_(False)
        name = _table(len(self.prompts))
        values = ctx.tuning.first_values(tokens, self.prompt_length)  # type: ignore[attr-defined]
        tokens.add(name, values)
        if self.bottleneck:
            tokens.maps[name] = ResidualMLP(values.shape[1], self.bottleneck).to(ctx.device)
        ctx.prefix = self._prefix(ctx, len(self.prompts) + 1)

    def end_stage(self, ctx: StageContext) -> None:
        """Fold the MLP into the prompt, and keep it."""
        tokens = virtual_tokens(ctx.model)
        name = _table(len(self.prompts))
        with torch.no_grad():
            tokens.tables[name].copy_(tokens.vectors(name))
        if name in tokens.maps:
            del tokens.maps[name]
        tokens.tables[name].requires_grad_(False)
        self.prompts[ctx.task.name] = tokens.tables[name].detach().float().cpu().clone()

    def answer(self, ctx: StageContext, prompts: Sequence[str], task: TrainTask) -> list[str]:
        """Answer behind the prompts up to the task's own; behind all so far if the task is not told or not learned."""
        self._mount(ctx)
        learned = list(self.prompts)
        count = learned.index(task.name) + 1 if self.task_id and task.name in learned else len(learned)
        before, ctx.prefix = ctx.prefix, self._prefix(ctx, count)
        try:
            return super().answer(ctx, prompts, task)
        finally:
            ctx.prefix = before

    def serve(
        self, ctx: StageContext, prompts: Sequence[str]
    ) -> Iterator[tuple[Sequence[int], Sequence[Sequence[int]]]]:
        """Put all prompts so far before each prompt: no task is told."""
        self._mount(ctx)
        yield range(len(prompts)), [self._prefix(ctx, len(self.prompts))] * len(prompts)

    def state_size(self, size: RunSize) -> StateSize:
        """One prompt a task; the prompt and its MLP train."""
        prompt, hidden = self.prompt_length * size.width, self.bottleneck
        mlp = 2 * size.width * hidden + hidden + 3 * size.width if hidden else 0  # two linear layers, a layer norm
        return StateSize(
            stored=4 * size.stages * prompt, device=4 * (size.stages - 1) * prompt, trained=float(prompt + mlp)
        )

    def state_dict(self) -> dict[str, Any]:
        """The prompts, and the tasks in training order."""
        return {"tasks": list(self.prompts), **{f"prompt.{task}": values for task, values in self.prompts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back; a model that lacks their tables gets them when they are next used."""
        self.prompts = {task: state[f"prompt.{task}"] for task in state["tasks"]}

    def _prefix(self, ctx: StageContext, count: int) -> list[int]:
        """Ids of the first `count` tasks' prompts, the newest first."""
        return all_ids(virtual_tokens(ctx.model), [_table(number) for number in reversed(range(count))])

    def _mount(self, ctx: StageContext) -> None:
        """Give a model that lacks earlier prompts (a restored run) all of them."""
        tokens = virtual_tokens(ctx.model)
        for number, values in enumerate(self.prompts.values()):
            if _table(number) not in tokens.tables:
                tokens.add(_table(number), values)
                tokens.tables[_table(number)].requires_grad_(False)


def _table(number: int) -> str:
    """Name of the table of the task at a position of the order, from 0."""
    return f"task_{number + 1}"
