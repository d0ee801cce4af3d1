"""Gradients as one vector, gradients of remembered rows, orthonormal bases, and the dual problem of GEM.

The flat order is that of `ctx.trainable()`. Bases hold one direction per row.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from random import Random

import torch
from torch import Tensor, nn

from trace_hydra.context import StageContext, batch_of
from trace_hydra.data.encode import EncodedRow
from trace_hydra.methods.resident import home

_CHUNK = 1 << 22  # columns of references that are on the device, or in fp64, at a time
Parameters = Mapping[str, Tensor]


def read_gradients(parameters: Parameters) -> Tensor:
    """Join all `.grad` to one fp32 vector; zeros where there is none."""
    parts = [weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in parameters.values()]
    return torch.cat([part.detach().reshape(-1).float() for part in parts])


def write_gradients(parameters: Parameters, flat: Tensor) -> None:
    """Put a vector back into `.grad`; a weight without a gradient gets one only where the vector is not zero."""
    for weight, part in zip(parameters.values(), _split(parameters, flat), strict=True):
        if weight.grad is not None:
            weight.grad.copy_(part)
        elif part.any():
            weight.grad = part.to(weight.dtype).clone()


def read_weights(parameters: Parameters) -> Tensor:
    """Join all weights to one fp32 vector, a copy."""
    return torch.cat([weight.detach().reshape(-1).float() for weight in parameters.values()])


def write_weights(parameters: Parameters, flat: Tensor) -> None:
    """Put a vector back into the weights."""
    with torch.no_grad():
        for weight, part in zip(parameters.values(), _split(parameters, flat), strict=True):
            weight.copy_(part)


def gradient_of(scalar: Tensor, parameters: Parameters) -> Tensor:
    """Take the gradient of a scalar as one fp32 vector; no `.grad` is read or written."""
    weights = list(parameters.values())
    parts = torch.autograd.grad(scalar, weights, allow_unused=True)
    flat = [torch.zeros_like(weight) if part is None else part for part, weight in zip(parts, weights, strict=True)]
    return torch.cat([part.reshape(-1).float() for part in flat])


def loss_gradient(
    ctx: StageContext, rows: Sequence[EncodedRow], rows_per_pass: int, into: Tensor | None = None
) -> Tensor:
    """Take the gradient of the lm loss on encoded rows, dropout off, as one fp32 vector; `.grad` stays as it is.

    Args:
        ctx: The stage.
        rows: At least one.
        rows_per_pass: Rows of a forward pass; passes are weighted by their rows, as in training.
        into: Vector of zeros on any device that the gradient is added to; None: a new one, where `home` says.
    """
    weights = list(ctx.trainable().values())
    if into is None:
        number = sum(weight.numel() for weight in weights)
        into = torch.zeros(number, device=home(4 * number, ctx.device))
    ordered = sorted(rows, key=lambda row: len(row.ids))
    with without_dropout(ctx.model), torch.enable_grad():
        for start in range(0, len(ordered), rows_per_pass):
            chosen = ordered[start : start + rows_per_pass]
            with ctx.autocast():
                loss = ctx.lm_loss(batch_of(chosen, ctx.device))
            parts = torch.autograd.grad(loss, weights, allow_unused=True)
            for part, place in zip(parts, _places(weights), strict=True):
                if part is not None:
                    into[place] += (part.reshape(-1).float() * (len(chosen) / len(ordered))).to(into.device)
    return into


def reference_products(parameters: Parameters, references: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply reference gradients with each other and with `.grad`, summed in fp64, a piece of the weights at a time.

    Args:
        parameters: What trains.
        references: (references, weights), fp32, on any device.

    Returns:
        G G', (references, references), and G g, (references,), both fp64 on the CPU.
    """
    number = len(references)
    total = torch.zeros(number, number + 1, dtype=torch.float64)
    for weight, place in zip(parameters.values(), _places(parameters.values()), strict=True):
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        for start in range(0, weight.numel(), _CHUNK):
            piece = gradient.reshape(-1)[start : start + _CHUNK].double()
            rows = references[:, place][:, start : start + _CHUNK].to(weight.device).double()
            total += (rows @ torch.cat([rows, piece[None]]).T).cpu()
    return total[:, :number], total[:, number]


def add_references(parameters: Parameters, factors: Tensor, references: Tensor) -> None:
    """Add `factors` (references,) times `references` (references, weights) to `.grad`, a weight at a time.

    A weight without a gradient gets one only where the sum is not zero.
    """
    for weight, place in zip(parameters.values(), _places(parameters.values()), strict=True):
        starts = range(place.start, place.stop, _CHUNK)
        pieces = [references[:, start : min(start + _CHUNK, place.stop)].to(weight.device) for start in starts]
        change = torch.cat([factors.to(piece) @ piece for piece in pieces]).view_as(weight)
        if weight.grad is not None:
            weight.grad.copy_(weight.grad.float() + change)
        elif change.any():
            weight.grad = change.to(weight.dtype)


def draw(rows: Sequence[EncodedRow], count: int, rng: Random) -> list[EncodedRow]:
    """Draw rows without putting any back; all of them, without touching `rng`, if there are no more than `count`."""
    return list(rows) if len(rows) <= count else rng.sample(list(rows), count)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode and back, module by module.

    Modules that checkpoint activations stay as they are themselves: they recompute in train mode only.
    """
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            if not getattr(module, "gradient_checkpointing", False):
                module.training = False
        yield
    finally:
        for module, training in before.items():
            module.training = training


def project_off(vectors: Tensor, basis: Tensor) -> Tensor:
    """Remove what lies in the span of an orthonormal basis.

    Args:
        vectors: (..., width).
        basis: (rank, width), rows orthonormal; rank 0 removes nothing.
    """
    return vectors - (vectors @ basis.T) @ basis


def extend_basis(
    basis: Tensor, candidates: Iterable[Tensor], tolerance: float, device: torch.device | None = None
) -> Tensor:
    """Orthonormalise vectors against a basis and each other (Gram-Schmidt, each twice), one at a time.

    Args:
        basis: (rank, width), rows orthonormal.
        candidates: Vectors of `width`, any length; one whose part outside the span is at most `tolerance` of its
            norm is left out.
        tolerance: In (0, 1).
        device: Of the candidates, where the work is done; None: the basis' own.

    Returns:
        (rank + new, width) where `basis` is; the first `rank` rows are `basis`.
    """
    new: list[Tensor] = []
    moved = basis.to(device or basis.device)
    for candidate in candidates:
        norm = candidate.norm()
        if norm == 0 or len(basis) + len(new) >= basis.shape[1]:
            continue
        rest = candidate / norm
        for _ in range(2):
            rest = project_off(rest, moved)
            for row in new:
                rest = rest - (row @ rest) * row
        if rest.norm() > tolerance:
            new.append(rest / rest.norm())
    return torch.cat([basis, torch.stack(new).to(basis.device)]) if new else basis


def orthonormal_rows(vectors: Tensor, basis: Tensor) -> Tensor:
    """Orthonormalise rows that are nearly so, among each other and against a basis: same shape as `vectors`."""
    return torch.linalg.qr(project_off(vectors, basis).T)[0].T


def solve_dual(gram: Tensor, conflict: Tensor, margin: float) -> Tensor:
    """Minimise 1/2 v' gram v + conflict' v subject to v >= margin, exactly (arXiv:1706.08840, eq. 11).

    Every set of variables off their bound is tried; among the solutions that keep the bounds the best is the optimum,
    because some optimum is the solution of its own set. So it takes 2^n solves of at most n unknowns.

    Args:
        gram: G G', (n, n), fp64, positive semi-definite.
        conflict: G g, (n,), fp64.
        margin: Lower bound, at least 0.

    Returns:
        v, (n,), fp64.
    """
    number = len(conflict)
    size = gram.diagonal().sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))  # variables are scaled so that the diagonal is 1
    matrix, linear, bound = gram / size.outer(size), conflict / size, margin * size

    def objective(values: Tensor) -> float:
        return float(0.5 * values @ matrix @ values + linear @ values)

    best, lowest = bound, objective(bound)
    for count in range(1, number + 1):
        for free in map(list, combinations(range(number), count)):
            pushed = linear[free] + matrix[free] @ bound - matrix[free][:, free] @ bound[free]
            inside = -torch.linalg.pinv(matrix[free][:, free], rtol=1e-12, hermitian=True) @ pushed
            if (inside >= bound[free]).all():
                values = bound.clone()
                values[free] = inside
                if (value := objective(values)) < lowest:
                    best, lowest = values, value
    return best / size


def _split(parameters: Parameters, flat: Tensor) -> Iterator[Tensor]:
    for weight, place in zip(parameters.values(), _places(parameters.values()), strict=True):
        yield flat[place].view_as(weight)


def _places(weights: Iterable[Tensor]) -> Iterator[slice]:
    """Where each weight stands in the flat order."""
    start = 0
    for weight in weights:
        yield slice(start, start + weight.numel())
        start += weight.numel()
