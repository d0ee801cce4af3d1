"""A linear layer whose small singular directions train while the large ones stay (arXiv:2504.07097; PEFT's)."""

import torch
from torch import Tensor, nn


class Factored:
    """A linear layer whose small singular directions train, W + (U S V - U0 S0 V0) with PEFT's `osf.Linear`.

    `rank` directions are kept, at least 1 and fewer than the layer has; W stays as it is until `merge`.
    """

    def __init__(self, layer: nn.Linear, rank: int, adapter: str):
        from peft.tuners.osf import Linear, OSFConfig

        self.layer, self.adapter = layer, adapter
        weight = layer.weight.data
        layer.weight.data = weight.float()  # PEFT rounds the factors to the weight's dtype
        self.module = held = Linear(layer, adapter, config=OSFConfig(), effective_rank=rank)
        layer.weight.data = weight
        # Directions as columns; PEFT stores kept ones only where a low factor does not span all that is left.
        self.starts = {"U_low": held._osf_U_low_init[adapter], "V_low": held._osf_V_low_init.get_buffer(adapter).T}
        self.kept: dict[str, Tensor] = {}
        if adapter in held._osf_U_high:
            self.kept["U_low"] = held._osf_U_high.get_buffer(adapter)
        if adapter in held._osf_V_high:
            self.kept["V_low"] = held._osf_V_high.get_buffer(adapter).T

    @torch.no_grad()
    def put_back(self) -> None:
        """Project the changes of U_low and V_low off the kept directions."""
        for name, start in self.starts.items():
            factor = self.module.osf_svd_params[self.adapter][name]  # type: ignore[index]
            columns = factor if name == "U_low" else factor.T
            columns.copy_(start + self._outside(columns.float() - start, name))

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """Add the change to the weight and return the plain layer; the wrapper must not be used afterwards."""
        change = self.module.get_delta_weight(self.adapter).float()  # (out, in)
        change = self._outside(self._outside(change, "U_low").T, "V_low").T
        self.layer.weight.copy_(self.layer.weight.float() + change)
        self.module._detach_hooks()  # each holds the wrapper; PEFT removes them only in __del__
        return self.layer

    def _outside(self, columns: Tensor, name: str) -> Tensor:
        if name in self.kept:
            return columns - self.kept[name] @ (self.kept[name].T @ columns)
        return self.starts[name] @ (self.starts[name].T @ columns)
