"""Forward passes whose logits exist only where a label is."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trace_hydra.data.encode import IGNORED
from trace_hydra.models import parts
from trace_hydra.models.precision import at_least_fp32


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
    positions = label_positions(batch)
    with only_positions(model, positions):
        logits = _logits(model, batch, inputs)  # (1, num_labels, vocab)
    return logits[0], batch["labels"].flatten()[positions + 1]


def label_positions(batch: Mapping[str, Any]) -> Tensor:
    """Tell where in the flattened batch a next token with a label is predicted: (num_labels,).

    A batch from `data.batches.collate` says so itself; of others the labels are searched, which waits for the device.
    """
    if _is_collated(batch):
        return batch["label_positions"].index
    has_label = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED) != IGNORED  # (batch, seq)
    return has_label.flatten().nonzero()[:, 0]


def lm_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Average the negative log-likelihood of answer tokens and end token over the batch (arXiv:2310.06762, App. .1).

    Of many labels the logits are computed a part at a time (`models.parts`).

    Returns:
        Scalar, at least fp32, nats per labelled token; 0 if the batch has none.
    """
    positions = label_positions(batch)
    if (head := parts.head_of(model, positions.numel())) is not None:
        with _intercepted(model) as seen:
            _logits(model, batch, {})
        hidden = seen[0].flatten(0, 1).index_select(0, positions)
        return parts.cross_entropy(head, hidden, batch["labels"].flatten()[positions + 1])
    logits, labels = label_logits(model, batch)
    logits = logits.to(at_least_fp32(logits.dtype))
    return F.cross_entropy(logits, labels) if labels.numel() else logits.sum() * 0.0


def _logits(model: nn.Module, batch: Mapping[str, Any], inputs: Mapping[str, Any]) -> Tensor:
    """Run the model on a batch whose rows hold one text each."""
    # Padded on the right, no token sees the padding in a causal model; without a mask attention has faster kernels.
    mask = None if _is_collated(batch) else batch["attention_mask"]
    with _nothing_packed():
        return model(**{"input_ids": batch["input_ids"], "attention_mask": mask, "use_cache": False, **inputs}).logits


def _is_collated(batch: Mapping[str, Any]) -> bool:
    """Whether a batch is as `data.batches.collate` made it."""
    known = batch.get("label_positions")
    return known is not None and known.labels is batch["labels"]


@contextmanager
def only_positions(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Let the output layer see some positions of the flattened batch alone: logits are then (1, positions, vocab)."""
    output_layer = model.get_output_embeddings()  # type: ignore[operator]

    def select(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = arguments[0]  # (batch, seq, width)
        return (hidden.flatten(0, 1).index_select(0, positions).unsqueeze(0), *arguments[1:])

    handle = output_layer.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _nothing_packed() -> Iterator[None]:
    """Keep transformers from looking for several texts in one row, which waits for the device in every pass."""
    from transformers import masking_utils

    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


def prompt_log_likelihood(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Sum the log-likelihood of each row's labelled tokens: (batch,), fp32, nats, without gradient."""
    with torch.no_grad():
        logits, labels = label_logits(model, batch)
        token = -F.cross_entropy(logits.float(), labels, reduction="none")  # (num_labels,)
        num_rows, width = batch["labels"].shape
        return torch.zeros(num_rows, device=token.device).index_add(0, label_positions(batch) // width, token)


def last_hidden_states(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Run the decoder without its output layer: (batch, seq) to (batch, seq, width), after the last norm."""
    with _intercepted(model) as seen:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return seen[0]


@contextmanager
def _intercepted(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the output layer would get, (batch, seq, width); it gets no position."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(arguments[0])
        return (arguments[0][:, :0], *arguments[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)  # type: ignore[operator]
    try:
        yield seen
    finally:
        handle.remove()
