"""Forward passes whose logits exist only where a label is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trace_hydra.data.encode import IGNORED


def label_logits(model: nn.Module, batch: dict[str, Any], **inputs: Any) -> tuple[Tensor, Tensor]:
    """Run the model and compute logits only at positions whose next token has a label.

    The output layer sees the hidden states of those positions alone, so whatever the architecture does to its logits
    (soft caps, scaling) still happens.

    Args:
        model: A Hugging Face causal LM, wrapped by PEFT or not.
        batch: input_ids, attention_mask, labels, each (batch, seq).
        inputs: Replaces or adds keyword arguments of the model's forward (inputs_embeds, ...).

    Returns:
        Logits (num_labels, vocab) and their labels (num_labels,), rows of the batch one after the other.
    """
    targets = batch["labels"][:, 1:]  # (batch, seq - 1)
    mask = targets != IGNORED
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False, **inputs}
    with _only_positions(model, mask):
        logits = model(**given).logits  # (1, num_labels, vocab)
    return logits[0], targets[mask]


def lm_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Average the negative log-likelihood of answer tokens and end token over the batch (arXiv:2310.06762, App. .1).

    Returns:
        Scalar fp32, nats per labelled token; 0 if the batch has none.
    """
    logits, labels = label_logits(model, batch)
    if not labels.numel():
        return logits.float().sum() * 0.0
    return F.cross_entropy(logits.float(), labels)


@contextmanager
def _only_positions(model: nn.Module, mask: Tensor) -> Iterator[None]:
    output_layer = model.get_output_embeddings()  # type: ignore[operator]

    def select(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = arguments[0]  # (batch, seq, width)
        return (hidden[:, :-1][mask].unsqueeze(0), *arguments[1:])

    handle = output_layer.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def prompt_log_likelihood(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Sum the log-likelihood of each row's labelled tokens: (batch,), fp32, nats, without gradient."""
    with torch.no_grad():
        logits, labels = label_logits(model, batch)
        token = -F.cross_entropy(logits.float(), labels, reduction="none")  # (num_labels,)
        mask = batch["labels"][:, 1:] != IGNORED
        rows = mask.nonzero()[:, 0]
        return torch.zeros(len(mask), device=token.device).index_add(0, rows, token)


def last_hidden_states(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Run the decoder without its output layer: (batch, seq) to (batch, seq, width), after the last norm."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(arguments[0])
        return (arguments[0][:, :1], *arguments[1:])  # logits of one position, nobody reads them

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)  # type: ignore[operator]
    try:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        handle.remove()
    return seen[0]
