"""SLoRA, subspace-denoised low-rank adaptation (Yang et al. 2026, ACL Anthology 2026.acl-long.247, p. 5437-5454).

Sources. Paper: its abstract; the method section was not at hand, so no equation numbers, and "audit" is what a third
party's paper-to-code table says of it. Code: behaviour of the released src/model/builder.py and
src/train/cl_train_slora.py (github.com/alina1031/SLoRA).
Paper -> code:  later updates add noise, found by subspace similarity with the base model (abstract) -> `denoised`
    SLoRA-Pre cleans after each task, -Post after all, each task's update by itself (abstract, code) -> variant
    a new adapter per task; the base has all earlier updates merged in (code) -> adapters="per_task"
    B A = U S V^T, truncated to c = int(r * ratio) directions, ratios 0.1, ..., 1 (code) -> `thin_svd`, `ranks_of`
    U_0: first r left singular vectors of the frozen pretrained weight (audit) -> `left_basis`, before anything merges
    c of the highest ||U'^T U_0||_F, U' the first r left singular vectors of the truncation (code). It has only c of
        them; the other r - c are an arbitrary completion that rounding decides. The square, averaged over all
        completions: o_c + (r - c) (r - o_c) / (out - c), o_c = ||U_c^T U_0||_F^2 -> similarity="completed"
    c of the highest ||U_c^T U_0,c||_F^2, top c against top c (audit) -> similarity="top_c". It never falls as c grows:
        nothing is removed, and a third party's run with it came out as sequential LoRA
    the kept update is merged with scale 1 instead of alpha / r (code, found by trial) -> kept_scale=r / alpha
Differs from the paper: adapters="one" is this project's single adapter through all tasks, cleaned in place: the kept
    part goes balanced into the first c rows and columns; of the rest B is 0 and A drawn anew as at LoRA's start
    (arXiv:2106.09685, section 4.1), for a pair of zeros has no gradient. "post" then cleans the sum of all tasks.
Differs from the code: exact truncation (there an unseeded random sketch per c); the completion's expectation (there
    whatever it is); U_0 of the pretrained weight (there with earlier updates merged in); ties keep more (there less).
Unverified: whether the paper normalises its score, and its batch size and dropout.
Differs from official TRACE: no code there. The optimizer must be new in each stage (optim.carry=false, the default).
    With variant="post" the rows before the last are sequential LoRA's: BWT compares raw with cleaned.
Memory: on the CPU 4 r out bytes per adapted layer (U_0); "post" with "per_task" 4 bytes per adapter weight and earlier
    task. Compute: none per step; at a stage's end a QR of both factors and an r x r SVD per layer, at the first one
    also an eigenproblem of the layer's smaller side.
"""

import logging
from collections.abc import Mapping, Sequence
from math import sqrt
from types import MappingProxyType
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from trace_hydra.context import StageContext
from trace_hydra.errors import ConfigError
from trace_hydra.methods.base import Method
from trace_hydra.sizes import RunSize, StateSize

log = logging.getLogger(__name__)


class SLoRA(Method):
    """Remove from LoRA updates the directions that lie no better in the base weight's subspace than chance.

    Args:
        variant: "pre": clean after each stage; "post": once, after the last.
        adapters: "per_task": a new adapter per stage, merged afterwards; "one": a single adapter through all stages.
        ratios: Candidate shares of the rank, each in (0, 1].
        similarity: "completed" or "top_c", see above.
        kept_scale: Factor of what is kept, in (0, 1].
    """

    tunings = ("lora",)
    tuning_reason = "it cleans the updates of low-rank adapters"
    merges = True
    published = MappingProxyType({"lora": "SLoRA"})

    def __init__(
        self,
        *,
        variant: Literal["pre", "post"],
        adapters: Literal["per_task", "one"],
        ratios: Sequence[float],
        similarity: Literal["completed", "top_c"],
        kept_scale: float,
    ):
        for key, value, allowed in (
            ("variant", variant, ("pre", "post")),
            ("adapters", adapters, ("per_task", "one")),
            ("similarity", similarity, ("completed", "top_c")),
        ):
            if value not in allowed:
                raise ConfigError(f"method.{key}={value!r} must be {allowed[0]!r} or {allowed[1]!r}.")
        if not ratios or not all(0 < ratio <= 1 for ratio in ratios):
            raise ConfigError(f"method.ratios={list(ratios)} must hold at least one share of the rank, each in (0, 1].")
        if not 0 < kept_scale <= 1:
            raise ConfigError(f"method.kept_scale={kept_scale} must be in (0, 1]; it is the factor of what is kept.")
        if adapters == "one" and kept_scale != 1:
            why = "a single adapter would shrink at the end of every stage"
            raise ConfigError(f"method.kept_scale={kept_scale} needs method.adapters=per_task, or set 1: {why}.")
        self.variant, self.similarity, self.kept_scale, self.ratios = variant, similarity, kept_scale, list(ratios)
        self.per_task = self.merges = adapters == "per_task"
        self.sees_num_stages = variant == "post"
        self.ranks: list[list[int]] = []
        """Directions kept, one list per cleaned update of a stage, one number per layer."""
        self.bases: dict[str, Tensor] = {}
        """Layer -> U_0, (out, rank), on the CPU."""
        self.past: dict[str, Tensor] = {}
        """"<stage>.<layer>.lora_A" and "_B" of merged updates that are not yet cleaned, on the CPU."""

    def end_stage(self, ctx: StageContext) -> None:
        """Clean and merge this stage's update, or keep it for the end."""
        stage = ctx.stage.index
        clean = self.variant == "pre" or stage == ctx.num_stages  # only "post" may ask
        drawn = torch.Generator().manual_seed(ctx.rng.getrandbits(63))
        chosen: list[list[int]] = []
        with torch.no_grad():
            for name, layer in lora_layers(ctx.model).items():
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                first = ((2 * torch.rand(a.shape, generator=drawn) - 1) / sqrt(a.shape[1])).to(a)  # as PEFT draws A
                if name not in self.bases:
                    self.bases[name] = left_basis(layer.get_base_layer().weight, len(a)).cpu()
                pairs = [(b, a)]
                if self.per_task and self.variant == "post":
                    if clean:
                        pairs = [self._past(one, name, b.device) for one in range(1, stage)] + pairs
                    else:
                        for key, one in (("A", a), ("B", b)):
                            self.past[f"{stage}.{name}.lora_{key}"] = one.detach().float().cpu().clone()
                kept = [self._denoised(*pair, name) for pair in pairs] if clean else []
                chosen.append([len(tall) for _, tall in kept])
                if self.per_task:
                    _merge(layer, self.kept_scale * _sum(kept) - _sum(pairs[:-1]) if clean else _sum(pairs))
                    a.copy_(first)
                    b.zero_()
                elif clean:
                    _write(a, b, *kept[0], first)
        for kept in zip(*chosen, strict=True):
            self.ranks.append(list(kept))
            average = sum(kept) / len(kept)
            log.info("stage %d: kept %.1f directions on average over %d layers.", stage, average, len(kept))

    def state_size(self, size: RunSize) -> StateSize:
        """Bases of the adapted layers, updates not yet cleaned, and the numbers of directions kept."""
        ranks = {name: size.weights[name][0] for name in size.trainable if ".lora_A." in name}
        bases = 0
        for name, rank in ranks.items():
            out, inside = size.weights[name.replace(".lora_A.", ".lora_B.")][0], size.weights[name][1]
            bases += 4 * out * min(rank, out, inside)
        kept = self.per_task and self.variant == "post"
        updates = size.stages if self.per_task or self.variant == "pre" else 1
        return StateSize(stored=bases + kept * 4 * (size.stages - 1) * size.num_trainable + 4 * updates * len(ranks))

    def state_dict(self) -> dict[str, Any]:
        """Bases, updates not yet cleaned, and the numbers of directions kept."""
        kinds = (("basis.", self.bases), ("past.", self.past))
        tensors = {kind + name: one for kind, kept in kinds for name, one in kept.items()}
        return {"ranks": [list(one) for one in self.ranks], **tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.ranks = [list(one) for one in state["ranks"]]
        self.bases, self.past = (
            {name.removeprefix(kind): one for name, one in state.items() if name.startswith(kind)}
            for kind in ("basis.", "past.")
        )

    def _past(self, stage: int, layer: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Factors B and A of an earlier stage's update, merged raw."""
        b, a = (self.past[f"{stage}.{layer}.lora_{key}"].to(device) for key in "BA")
        return b, a

    def _denoised(self, b: Tensor, a: Tensor, layer: str) -> tuple[Tensor, Tensor]:
        return denoised(b, a, self.bases[layer].to(b.device), ranks_of(self.ratios, len(a)), self.similarity)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """List PEFT's adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def left_basis(weight: Tensor, rank: int) -> Tensor:
    """Compute the first left singular vectors of (out, in): (out, min(rank, out, in)), orthonormal, in fp32.

    From the eigenvectors of the smaller Gram matrix, in fp64 because that squares the singular values.
    """
    matrix = _exact(weight)
    count = min(rank, *matrix.shape)
    if matrix.shape[0] <= matrix.shape[1]:
        return torch.linalg.eigh(matrix @ matrix.T)[1][:, -count:].flip(1).float()
    right = torch.linalg.eigh(matrix.T @ matrix)[1][:, -count:].flip(1)
    return torch.linalg.qr(matrix @ right)[0].float()


def thin_svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose b @ a, (out, r) @ (r, in), exactly: U (out, k), S (k), V^T (k, in) in fp64, k = min(r, out, in).

    QR of both factors leaves the SVD of a k x k matrix; (out, in) is never formed.
    """
    left, upper = torch.linalg.qr(_exact(b))
    right, lower = torch.linalg.qr(_exact(a).T)
    u, s, vt = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return left @ u, s, vt @ right.T


def ranks_of(ratios: Sequence[float], rank: int) -> list[int]:
    """List the candidate ranks, ascending: shares of the rank rounded down, at least 1."""
    return sorted({max(1, int(rank * ratio + 1e-9)) for ratio in ratios})


def scores(left: Tensor, basis: Tensor, candidates: Sequence[int], similarity: str) -> list[float]:
    """Compare the first c left vectors of an update with the base's, for each candidate c.

    Args:
        left: Left singular vectors of the update, (out, k).
        basis: U_0, (out, r).
        candidates: Values of c, each at most k.
        similarity: "completed": between 0 and r, adding a direction raises it only where its squared projection onto
            U_0 is above that of a random direction, (r - overlap_c) / (out - c). "top_c": never falls with c.
    """
    basis = basis.to(left)
    if similarity == "top_c":
        return [float((left[:, :c].T @ basis[:, :c]).square().sum()) for c in candidates]
    out, rank = basis.shape
    overlap = (basis.T @ left).square().sum(0).cumsum(0).tolist()  # ||U_c^T U_0||_F^2 at c - 1
    return [overlap[c - 1] + (rank - c) * (rank - overlap[c - 1]) / max(out - c, 1) for c in candidates]


def denoised(b: Tensor, a: Tensor, basis: Tensor, candidates: Sequence[int], similarity: str) -> tuple[Tensor, Tensor]:
    """Truncate b @ a at the best candidate rank c: balanced factors (out, c) and (c, in) in fp32.

    Of candidates whose scores agree within rounding (1e-6) the largest counts.
    """
    left, singular, right = thin_svd(b, a)
    candidates = sorted({min(c, len(singular)) for c in candidates})
    values = scores(left, basis, candidates, similarity)
    c = max(one for one, value in zip(candidates, values, strict=True) if value >= max(values) - 1e-6)
    root = singular[:c].sqrt()
    wide, tall = left[:, :c] * root, root[:, None] * right[:c]
    return wide.float().to(b.device), tall.float().to(b.device)


def _exact(matrix: Tensor) -> Tensor:
    """In fp64, on the CPU where the device has none."""
    return (matrix.detach().cpu() if matrix.device.type == "mps" else matrix.detach()).double()


def _sum(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum the products of factors; a scalar 0 for none."""
    return sum((wide.float() @ tall.float() for wide, tall in pairs), torch.zeros(()))


def _merge(layer: Any, change: Tensor) -> None:
    """Add a change of B A to the base weight: in fp32, rounded once."""
    base = layer.get_base_layer().weight
    base.copy_(base.float() + layer.scaling["default"] * change)


def _write(a: Tensor, b: Tensor, wide: Tensor, tall: Tensor, first: Tensor) -> None:
    """Put the kept factors into an adapter of unchanged rank; the rest gets LoRA's first values."""
    kept = len(tall)
    a.copy_(torch.cat([tall.to(a), first[kept:]]))
    b.zero_()
    b[:, :kept] = wide.to(b)
