"""MIGU, magnitude-based gradient updating (Du et al. 2024, arXiv:2406.17245, section 3).

Paper -> code:  output h = x W of each linear layer; L1-normalised magnitude |h_i| / ||h||_1 of a token, averaged over
    the step's tokens -> `magnitudes`, caught by forward hooks (their sum; the mean ranks neurons alike)
    mask = Top_T(magnitude), gradients of the other output neurons set to 0 -> `edit_gradients`
    T -> masked, the share that is masked;  tuning=lora: the outputs of A and of B, each with its own mask
    first_stage: whether the first task is masked too; the authors' code leaves it alone
Differs from the authors' code: it leaves out the normalisation (long vectors count more) and counts padding; exactly
    floor(masked * n) of n neurons are masked (there those up to the quantile). An output layer that shares its weight
    with the embeddings is left alone. AdamW still moves a masked row by its momentum, as there.
Differs from official TRACE: no code there.
Memory: 4 bytes per output neuron on the device. Compute: one pass over the outputs of each linear layer that trains.
"""

from collections.abc import Mapping
from functools import partial
from math import floor
from typing import Any

import torch
from torch import Tensor, nn

from trace_hydra.context import StageContext
from trace_hydra.errors import ConfigError
from trace_hydra.methods.base import Method
from trace_hydra.sizes import RunSize, StateSize


class Migu(Method):
    """Update only the output neurons with large outputs.

    Args:
        masked: Share of each linear layer's output neurons whose gradient is dropped, in [0, 1).
        first_stage: Whether the first task is trained with masks.
    """

    tunings = ("full", "lora")
    tuning_reason = "it selects output neurons of linear layers, and none of them trains"

    def __init__(self, *, masked: float, first_stage: bool):
        if not 0 <= masked < 1:
            raise ConfigError(f"method.masked={masked} must be in [0, 1); it is the share of neurons not updated.")
        self.masked, self.first_stage = masked, first_stage
        self.magnitudes: dict[str, Tensor] = {}
        """Summed normalised magnitude of each layer's output neurons since the last step, by the layer's name."""
        self._layers: dict[str, nn.Linear] = {}
        self._hooks: list[Any] = []
        self._tokens: Tensor | None = None
        self._counts = True

    def begin_stage(self, ctx: StageContext) -> None:
        """Hook the linear layers that train."""
        if ctx.stage.index == 1 and not self.first_stage:
            return
        embeddings = ctx.model.get_input_embeddings()  # type: ignore[operator]
        for name, module in ctx.model.named_modules():
            if isinstance(module, nn.Linear) and module.weight.requires_grad and module.weight is not embeddings.weight:
                self._layers[name] = module
                self._hooks.append(module.register_forward_hook(partial(self._count, name)))

    def losses(self, ctx: StageContext, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The task's loss; the hooks count while it is computed."""
        self._tokens = batch["attention_mask"].bool()  # (batch, seq)
        self._counts = batch.get("weight", 1.0) > 0  # not a row that only keeps processes in step
        return {"lm": ctx.lm_loss(batch)}

    def edit_gradients(self, ctx: StageContext) -> None:
        """Set the gradient of the neurons with the smallest magnitudes to 0."""
        for name, magnitude in self.magnitudes.items():
            keep = mask(ctx.total(magnitude), self.masked)
            for weight in (self._layers[name].weight, self._layers[name].bias):
                if weight is not None and weight.grad is not None:
                    weight.grad[~keep] = 0.0
        self.magnitudes = {}

    def end_stage(self, ctx: StageContext) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._layers, self._hooks, self.magnitudes, self._tokens = {}, [], {}, None

    def state_size(self, size: RunSize) -> StateSize:
        """A number per output neuron, and the outputs of one layer in fp32, twice, while they are counted."""
        outs = [size.weights[name][0] for name in size.linear]
        tokens = size.micro_batch * size.longest_row
        return StateSize(
            device=4 * sum(outs) + 8 * tokens * max((out for out in outs if out != size.vocabulary), default=0)
        )

    def _count(self, name: str, module: nn.Module, arguments: Any, output: Tensor) -> None:
        if not module.training or not self._counts:
            return
        shares = output.detach().float().abs()  # (batch, seq, out), or (1, labels, out) at the output layer
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        if self._tokens is not None and self._tokens.shape == shares.shape[:-1]:
            shares = shares * self._tokens.unsqueeze(-1)
        total = shares.flatten(0, -2).sum(0)  # (out,)
        self.magnitudes[name] = self.magnitudes[name] + total if name in self.magnitudes else total


def mask(magnitude: Tensor, masked: float) -> Tensor:
    """Say which neurons are updated: all but the floor(masked * n) smallest, (n,), bool."""
    keep = torch.ones_like(magnitude, dtype=torch.bool)
    keep[magnitude.argsort(stable=True)[: floor(masked * len(magnitude) + 1e-9)]] = False
    return keep
