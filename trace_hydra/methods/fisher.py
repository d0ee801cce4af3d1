"""The diagonal of the Fisher information, from per-example gradients."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_hydra.context import StageContext
from trace_hydra.data.task import Example


def diagonal_fisher(ctx: StageContext, examples: Sequence[Example], reduction: str) -> dict[str, Tensor]:
    """Average the squared gradient of each row's log-likelihood, at the weights as they are now.

    F_i = 1/N * sum_n (d log p(y_n | x_n) / d theta_i)^2 with `reduction="sum"`: log p(y | x) of the whole answer, the
    sum over its tokens and end token. With "mean", log p is their mean, the loss that is trained: a row of T tokens
    counts 1/T^2 of it. The answers are those of the data (the empirical Fisher).

    One forward and backward pass a row, in the model's current mode (dropout is off in `end_stage`). `.grad` is neither
    read nor written; `ctx.rng` decides the order of the rows, which only rounding can tell.

    Args:
        ctx: Its model is on its device.
        examples: At least one row.
        reduction: "sum" or "mean", over the tokens of a row.

    Returns:
        Name of a trainable parameter -> fp32 on the CPU, shaped like it, >= 0; zero where no gradient arrives. While
        it is summed, it takes 4 bytes per trainable parameter on the device, and as much again for one gradient.
    """
    weights = ctx.trainable()
    fisher = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    for batch in ctx.batches(examples, 1):
        with torch.enable_grad(), ctx.autocast():
            logits, labels = ctx.label_logits(batch)  # (num_labels, vocab)
            log_likelihood = -F.cross_entropy(logits.float(), labels, reduction=reduction)
        gradients = torch.autograd.grad(log_likelihood, list(weights.values()), allow_unused=True)
        for total, gradient in zip(fisher.values(), gradients, strict=True):
            if gradient is not None:
                total += gradient.float().square() / len(examples)
    return {name: total.cpu() for name, total in fisher.items()}
