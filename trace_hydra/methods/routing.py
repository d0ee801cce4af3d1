"""Which adapter a prompt goes to: features of prompts, ridge regression solved recursively, adapters on and off."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trace_hydra.context import StageContext
from trace_hydra.models.generate import length_batches


def update(inverse: Tensor, weight: Tensor, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Add rows to a ridge regression: R' = R - R X^T (I + X R X^T)^-1 X R, W' = W + R' X^T (Y - X W).

    Args:
        inverse: R = (lambda I + sum of X^T X so far)^-1, (E, E), fp64.
        weight: W = R times the sum of X^T Y so far, (E, tasks), fp64.
        rows: X, (rows, E), fp64.
        labels: Y, (rows, tasks), fp64.
    """
    spread = rows @ inverse  # X R, (rows, E)
    gram = torch.eye(len(rows), dtype=rows.dtype) + spread @ rows.T
    inverse = inverse - spread.T @ torch.cholesky_solve(spread, torch.linalg.cholesky(gram))
    inverse = (inverse + inverse.T) / 2  # rounding would let the halves drift apart over many updates
    return inverse, weight + inverse @ (rows.T @ (labels - rows @ weight))


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Divide states (batch, seq, width) by their root mean square and average them where `mask` is 1, in fp32."""
    states = states.float()
    normed = states / states.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    share = mask.float() / mask.sum(1, keepdim=True)
    return (normed * share.unsqueeze(-1)).sum(1)


def prompt_features(ctx: StageContext, layer: nn.Module, prompts: Sequence[str], instruction: str) -> Tensor:
    """Average the normed states that a layer puts out over each prompt's tokens: (prompts, width), fp32, CPU.

    The layers behind it do not run. Dropout is off; the model's mode and the random states are as before afterwards.

    Args:
        ctx: Of the run; its precision and batch size count.
        layer: A decoder layer of its model.
        prompts: Cut as the protocol cuts them.
        instruction: The head to keep if a prompt must be cut.
    """
    ids, _ = ctx.encoder.prompts(prompts, instruction)
    found: dict[int, Tensor] = {}
    was_training = ctx.model.training
    ctx.model.eval()
    with torch.no_grad():
        for indices in length_batches([len(one) for one in ids], 0, ctx.batch_tokens):
            batch = _padded([ids[index] for index in indices], ctx.device)
            with ctx.autocast():
                states = _states_behind(ctx.model, layer, batch)
            found.update(zip(indices, pooled(states, batch["attention_mask"]).cpu(), strict=True))
    ctx.model.train(was_training)
    return torch.stack([found[index] for index in range(len(ids))])


class _Reached(Exception):
    """Ends a forward pass behind the layer asked for."""


def _states_behind(model: nn.Module, layer: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Run the model as far as a layer and give what that put out, (batch, seq, width)."""
    seen: list[Tensor] = []

    def stop(_module: nn.Module, _arguments: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])
        raise _Reached

    handle = layer.register_forward_hook(stop)
    try:
        model(**batch, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Pad ids on the right, where a causal model's real tokens do not see it."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@contextmanager
def only_adapters(model: nn.Module, adapters: Sequence[str]) -> Iterator[None]:
    """Let these adapters take part, none for the base model; what is active and trains is as before afterwards."""
    active = list(model.base_model.active_adapters)  # type: ignore[union-attr, arg-type]
    trains = [(weight, weight.requires_grad) for weight in model.parameters()]
    model.base_model.set_adapter(list(adapters))  # type: ignore[operator, union-attr]
    try:
        yield
    finally:
        model.base_model.set_adapter(active)  # type: ignore[operator, union-attr]
        for weight, flag in trains:
            weight.requires_grad_(flag)
