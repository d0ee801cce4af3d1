"""Gradient projection memory (Saha et al. 2021, arXiv:2103.09762, eq. 5-9).

Paper -> code:  R^l -> inputs of linear layer l at `sample_tokens` positions (prompt and answer) of `sample_rows` train
        rows, seeded, taken when a stage ends; here one input per row, so R' of the paper
    M^l -> bases[weight name], (rank, in_features), one direction per row
    eq. 5: fewest singular directions with ||(R)_k||^2 >= eps ||R||^2;  eq. 8: R^ = R - M M'R, what is new;
    eq. 9: fewest with ||R_proj||^2 + ||(R^)_k||^2 >= eps ||R||^2 -> `core_space`
    eps -> threshold + threshold_increase x (stage - 1), at most 1, the same in every layer
    eq. 6: g - g M M' -> `edit_gradients`
Linear layers: all `nn.Linear` whose weight trains: under tuning=full those of the decoder layers and lm_head (if it
    shares no weight with the embedding); under tuning=lora A (its inputs are the layer's) and B (its inputs are A's
    outputs). If neither A's rows move within the old inputs nor B's within the old A x, B A x stays. B has only r
    inputs, so the threshold soon protects all of them and B stands still.
Other weights (embeddings, norms, biases) have no such space: unprotected=freeze trains them in the first stage
    only, as the paper does with batch norm; unprotected=train goes on with them, and old inputs then change.
Differs from the paper: AdamW leaves the subspace its gradient was projected to, so after each step W M is put back to
    what it was when the stage began (`after_step`): exact up to the rounding of the weights' dtype, with weight decay
    too, and it needs no copy of W. The authors' code takes one direction fewer than eq. 5 asks for in the first task.
Differs from official TRACE: no code there; its OGD keeps gradients of all weights (model/Regular/OGD.py:142).
Memory: per linear layer 4 x rank x in_features bytes on the CPU; while a stage trains 4 x rank x (in_features +
    out_features), together up to 8 GB on the device (`resident.home`), else on the CPU and a layer's at a time on the
    device; when a stage ends 4 x sample_tokens x in_features on the CPU for each layer at once.
Compute: per step 8 x rank x weight multiplications; per stage `sample_rows` forward passes and one SVD a layer.
"""

import logging
from collections.abc import Mapping
from math import ceil
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trace_hydra.context import StageContext, batch_of
from trace_hydra.errors import ConfigError, MethodError
from trace_hydra.methods.base import Method
from trace_hydra.methods.gradients import orthonormal_rows, project_off
from trace_hydra.methods.resident import held, home
from trace_hydra.sizes import RunSize, StateSize

log = logging.getLogger(__name__)
_PREFIX = "basis."
_NOISE = 1e-5  # singular values below this share of ||R|| are rounding noise in fp32


class GPM(Method):
    """Move the weights of linear layers only across the space that inputs of past tasks span.

    Args:
        threshold: eps in the first stage, in (0, 1]: share of the inputs' energy that is protected.
        threshold_increase: What eps grows by in each stage, at least 0.
        sample_rows: Train rows of a task whose inputs are looked at, at least 1.
        sample_tokens: Inputs taken of all those rows together, at least 1, rounded up to as many from each row; bounds
            the rank a task adds.
        unprotected: "freeze" or "train": weights that are not those of a linear layer, from the second stage on.
    """

    tunings = ("full", "lora")
    tuning_reason = "it protects the inputs of linear layers, and none of them trains"

    def __init__(
        self,
        *,
        threshold: float,
        threshold_increase: float,
        sample_rows: int,
        sample_tokens: int,
        unprotected: Literal["freeze", "train"],
    ):
        if not 0 < threshold <= 1:
            raise ConfigError(
                f"method.threshold={threshold} must be in (0, 1]; it is the share of the inputs' energy protected."
            )
        if not 0 <= threshold_increase <= 1:
            raise ConfigError(
                f"method.threshold_increase={threshold_increase} must be in [0, 1]; eps grows by it each stage."
            )
        for key, value, meaning in (
            ("sample_rows", sample_rows, "the number of rows whose inputs are looked at"),
            ("sample_tokens", sample_tokens, "the number of inputs taken from those rows"),
        ):
            if value < 1:
                raise ConfigError(f"method.{key}={value} must be at least 1; it is {meaning}.")
        if unprotected not in ("freeze", "train"):
            raise ConfigError(f"method.unprotected={unprotected!r} must be 'freeze' or 'train'.")
        self.threshold, self.threshold_increase = threshold, threshold_increase
        self.sample_rows, self.sample_tokens = sample_rows, sample_tokens
        self.unprotected = unprotected
        self.bases: dict[str, Tensor] = {}
        """Weight name -> (rank, in_features), CPU, fp32."""
        self.active: dict[str, Tensor] = {}
        """The bases while a stage trains, on the device if they are small."""
        self.held: dict[str, Tensor] = {}
        """Weight name -> W M when the stage began, (out_features, rank), where `active` is."""

    def begin_stage(self, ctx: StageContext) -> None:
        """Note what each layer does to the protected inputs.

        Raises:
            MethodError: If no linear layer trains, or others than those the bases were made for.
        """
        layers = linear_layers(ctx)
        if not layers or (self.bases and self.bases.keys() != layers.keys()):
            raise MethodError(
                f"stage {ctx.stage.index} ({ctx.stage.task}) trains {len(layers)} linear layers, bases are stored for "
                f"{len(self.bases)}. Use the tuning they were made with, one that trains linear layers."
            )
        size = sum(4 * len(basis) * sum(layers[name].weight.shape) for name, basis in self.bases.items())
        place = home(size, ctx.device)
        self.active = {name: basis.to(place) for name, basis in self.bases.items()}
        self.held = {
            name: (layers[name].weight.detach().float() @ basis.to(ctx.device).T).to(place)
            for name, basis in self.active.items()
        }

    def edit_gradients(self, ctx: StageContext) -> None:
        """Project each layer's gradient; drop that of frozen weights."""
        if not self.active:
            return
        for name, weight in ctx.trainable().items():
            if name in self.active and weight.grad is not None:
                weight.grad.copy_(project_off(weight.grad.float(), self.active[name].to(weight.device)))
            elif name not in self.active and self.unprotected == "freeze":
                weight.grad = None

    def after_step(self, ctx: StageContext) -> None:
        """Undo what the optimizer moved within the protected inputs."""
        if not self.active:
            return
        weights = ctx.trainable()
        with torch.no_grad():
            for name, basis in self.active.items():
                weight, basis = weights[name].float(), basis.to(ctx.device)
                weights[name].copy_(weight - (weight @ basis.T - self.held[name].to(ctx.device)) @ basis)

    def end_stage(self, ctx: StageContext) -> None:
        """Add what this task's inputs span to the bases."""
        self.active, self.held = {}, {}
        threshold = min(1.0, self.threshold + self.threshold_increase * (ctx.stage.index - 1))
        for name, inputs in self._inputs(ctx).items():
            basis = self.bases.get(name, torch.zeros(0, inputs.shape[1]))
            self.bases[name] = core_space(inputs.to(ctx.device), basis.to(ctx.device), threshold).cpu()
        ranks = sum(len(basis) for basis in self.bases.values())
        width = sum(basis.shape[1] for basis in self.bases.values())
        log.info("%s: %.1f %% of the layers' input directions are protected.", ctx.task.name, 100 * ranks / width)

    def state_size(self, size: RunSize) -> StateSize:
        """Bases with as many directions as inputs were looked at; a layer's at a time on the device if large."""
        taken = [min(self.sample_tokens, self.sample_rows * tokens) for tokens in size.row_tokens]
        shapes = [size.weights[name] for name in size.linear]
        stored = sum(4 * inside * min(inside, sum(taken)) for _, inside in shapes)
        stage = [4 * min(inside, sum(taken[:-1])) * (inside + out) for out, inside in shapes]
        on_device = held(sum(stage), 2 * max(stage, default=0))
        inputs = 4 * max(taken) * sum(inside for _, inside in shapes)
        return StateSize(stored=stored, device=on_device, host=max(inputs, sum(stage) - on_device))

    def state_dict(self) -> dict[str, Any]:
        """The bases."""
        return {_PREFIX + name: basis for name, basis in self.bases.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the bases back."""
        self.bases = {key.removeprefix(_PREFIX): basis for key, basis in state.items()}

    def _inputs(self, ctx: StageContext) -> dict[str, Tensor]:
        """Collect inputs of all layers, weight name -> (tokens, in_features), CPU, fp32."""
        examples = ctx.rng.sample(list(ctx.task.train), min(self.sample_rows, len(ctx.task.train)))
        per_row = ceil(self.sample_tokens / len(examples))
        seed = ctx.rng.random()
        kept: dict[str, list[Tensor]] = {name: [] for name in linear_layers(ctx)}

        def hook(name: str):
            def keep(_layer: nn.Module, arguments: tuple[Tensor, ...], _output: Tensor) -> None:
                inputs = arguments[0].detach().flatten(0, -2)  # (positions, in_features)
                chosen = Random(f"{seed}-{len(kept[name])}").sample(range(len(inputs)), min(per_row, len(inputs)))
                kept[name].append(inputs[sorted(chosen)].float().cpu())

            return keep

        handles = [layer.register_forward_hook(hook(name)) for name, layer in linear_layers(ctx).items()]
        try:
            with torch.no_grad(), ctx.autocast():
                for row in ctx.encode(examples):  # one at a time: no padding among the inputs
                    ctx.label_logits(batch_of([row], ctx.device))
        finally:
            for handle in handles:
                handle.remove()
        return {name: torch.cat(inputs) for name, inputs in kept.items()}


def linear_layers(ctx: StageContext) -> dict[str, nn.Linear]:
    """List linear layers whose weight trains, by the weight's name; a weight shared with an embedding is not listed."""
    weights = ctx.trainable()
    layers = {f"{name}.weight": layer for name, layer in ctx.model.named_modules() if isinstance(layer, nn.Linear)}
    return {name: layer for name, layer in layers.items() if name in weights}


def core_space(inputs: Tensor, basis: Tensor, threshold: float) -> Tensor:
    """Add the fewest directions to a basis that hold a share of the inputs' energy (eq. 5, 8, 9).

    Args:
        inputs: (tokens, in_features), fp32.
        basis: M', (rank, in_features), rows orthonormal; rank 0 in the first stage (eq. 5).
        threshold: eps.

    Returns:
        (rank + new, in_features), rows orthonormal; the first rows are `basis`.
    """
    total = inputs.double().square().sum()
    rest = project_off(inputs, basis)
    missing = threshold * total - (total - rest.double().square().sum())
    if missing <= 0:
        return basis
    _, singular, directions = torch.linalg.svd(rest, full_matrices=False)
    energy = singular.double().square().cumsum(0)
    count = int((energy < missing).sum()) + 1
    count = min(count, int((singular > _NOISE * total.sqrt()).sum()), basis.shape[1] - len(basis))
    return torch.cat([basis, orthonormal_rows(directions[:count], basis)])
