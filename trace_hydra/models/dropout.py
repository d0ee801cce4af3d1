"""Dropout for CPUs, where PyTorch draws a random number of 53 bits for every element, one after the other."""

import torch
from torch import Tensor, nn

BITS = 16
"""Random bits that decide about an element; a draw of 64 serves four. Probabilities are off by at most 2^-17."""


class FewDraws(nn.Dropout):
    """Dropout (Srivastava et al. 2014, JMLR 15, section 4) by `BITS` random bits an element of PyTorch's generator.

    What is kept is scaled by the probability that it is kept with, `p` rounded to a multiple of 2^-16.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Zero elements at random in train mode; any shape, the same shape and type."""
        dropped = _dropped(self.p)
        if not self.training or not dropped:
            return input
        count = input.numel()
        draws = torch.empty(-(-count // 4), dtype=torch.int64, device=input.device).random_(-(2**63), None)
        bits = draws.view(torch.int16)[:count].view(input.shape)
        kept = (bits >= dropped - 2 ** (BITS - 1)).to(input.dtype)
        return input * kept.mul_(1 / (1 - dropped / 2**BITS))


def _dropped(p: float) -> int:
    """Of the 2^16 numbers that can be drawn, how many drop an element."""
    return round(p * 2**BITS)


def draw_less(model: nn.Module) -> None:
    """Put `FewDraws` in the place of a model's dropout, in place; what drops nothing or everything stays."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout and 0 < _dropped(child.p) < 2**BITS:
                parent.register_module(name, FewDraws(child.p).train(child.training))
