"""Cross entropy of many label positions, a part of them at a time: never the logits of all at once.

The gradient is computed with the loss, part by part, and kept: of the hidden states, and of the output layer's weights
that train. Nothing is computed twice.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from trace_hydra.errors import MethodError
from trace_hydra.models.precision import at_least_fp32

AT_ONCE = 2**26
"""Logits (positions x vocabulary) that are computed at a time: some 0.5 GB, in bf16 and fp32 together."""
FROM = 2**24
"""Logits of a batch from which this is done. On one thread of an AMD EPYC, bf16 autocast, 49,152 words, output layer
and loss take, forward and backward, as long as all at once up to 256 labels, 0.9 of that with 512, 0.6 with 1,024."""


class Head:
    """What a causal LM does behind its decoder: the output layer, and whatever else happens to logits.

    The model's own forward pass is run over given hidden states, in place of those that its decoder would compute.

    Args:
        model: Not wrapped.
        positions: How many to compute logits of at a time.
    """

    def __init__(self, model: PreTrainedModel, positions: int):
        self._model, self.positions = model, positions

    def weights(self) -> list[nn.Parameter]:
        """List the output layer's weights that train."""
        layer: Any = self._model.get_output_embeddings()
        return [weight for weight in layer.parameters() if weight.requires_grad]

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits (positions, vocab) from what the decoder gave there, (positions, width)."""
        decoder: Any = self._model.base_model
        given = BaseModelOutputWithPast(last_hidden_state=hidden.unsqueeze(0))  # type: ignore[arg-type]
        own = vars(decoder).get("forward")
        decoder.forward = lambda *_arguments, **_keywords: given
        try:
            return self._model.forward(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits[0]
        finally:
            del decoder.forward
            if own is not None:
                decoder.forward = own


def head_of(model: Any, num_labels: int) -> Head | None:
    """Give the part behind a model's decoder where that many labels are worth computing in parts.

    None too if somebody watches the output layer, for a hook sees its positions all at once, or if it is split over
    processes.

    Args:
        model: A Hugging Face causal LM, wrapped by PEFT or not.
        num_labels: Positions of the batch that have a label.
    """
    layer = model.get_output_embeddings()
    vocabulary = getattr(layer, "out_features", 0)
    if num_labels * vocabulary <= FROM:
        return None
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel) or inner.base_model is inner:
        return None
    watched = any(one._forward_hooks or one._forward_pre_hooks or one._backward_hooks for one in layer.modules())
    if watched or any(isinstance(one, DTensor) or one._backward_hooks for one in layer.parameters()):
        return None
    return Head(inner, max(1, AT_ONCE // vocabulary))


def cross_entropy(head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
    """Average the negative log-likelihood of labels.

    Args:
        head: Of the model.
        hidden: What its decoder gave at the positions, (positions, width).
        labels: The next tokens, (positions,), none of them ignored; at least one.

    Returns:
        Scalar, at least fp32, nats a label; can be differentiated once.
    """
    return _Parts.apply(head, hidden, labels, *head.weights())  # type: ignore[return-value]


class _Parts(torch.autograd.Function):
    """Mean cross entropy whose gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, head: Head, hidden: Tensor, labels: Tensor, *weights: Tensor) -> Tensor:
        needs_hidden = ctx.needs_input_grad[1]
        differentiates = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=at_least_fp32(hidden.dtype), device=hidden.device)
        of_hidden, sums = [], []
        for given, wanted in zip(hidden.split(head.positions), labels.split(head.positions), strict=True):
            given = given.detach().requires_grad_(needs_hidden)
            with torch.set_grad_enabled(differentiates):
                logits = head.logits(given)
            loss, gradient = loss_and_gradient(logits.detach(), wanted)
            total += loss
            if not differentiates:
                continue
            inputs = [*([given] if needs_hidden else []), *weights]
            with torch.autocast(hidden.device.type, enabled=False):  # as for any backward pass
                found = list(torch.autograd.grad(logits, inputs, gradient))
            del logits, gradient  # before the next ones are made
            of_hidden += [found.pop(0)] if needs_hidden else []
            sums = [one.add_(more) for one, more in zip(sums, found, strict=True)] if sums else found
        ctx.found = [torch.cat(of_hidden) if of_hidden else None, *sums]
        ctx.count = len(labels)
        return total / len(labels)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        # With create_graph these gradients, which have no graph, would count as constants.
        if torch.is_grad_enabled() or ctx.found is None:
            raise MethodError(
                "lm_loss of many labels can be differentiated once. Where it is differentiated again (retain_graph, "
                "create_graph), take torch's cross entropy of label_logits."
            )
        (of_hidden, *sums), ctx.found = ctx.found, None
        for one in (of_hidden, *sums):
            if one is not None:
                one.mul_(scale / ctx.count)  # a copy would need as much memory as the output layer
        return None, of_hidden, None, *sums


def loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the negative log-likelihood of labels; and its gradient, (positions, vocab), in the type of the logits."""
    values = torch.log_softmax(logits, -1, dtype=at_least_fp32(logits.dtype))
    places = labels.unsqueeze(1)
    loss = -values.gather(1, places).sum()
    gradient = values.exp_().scatter_add_(1, places, values.new_full(places.shape, -1.0))
    return loss, gradient.to(logits.dtype)
