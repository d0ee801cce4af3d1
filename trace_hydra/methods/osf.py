"""Orthogonal subspace fine-tuning by adaptive SVD (Nayak et al. 2025, arXiv:2504.07097), on the layers of PEFT's OSF.

Paper -> code (formulas by name, equation numbers unchecked):
    W = U S V', the top k of m = min(out, in) directions "high", the rest "low" -> each stage a PEFT `osf.Linear` over
        every linear layer but the output layer; U_low, S_low, V_low train, and are merged into W when the stage ends
    layer importance: mean over tokens of cos(x, W x), normalised to mean 1 over layers -> `_importance`, `shares`; of
        unequal widths the first m entries count, on rows of the previous task, as in the authors' code
    r = mrr + I (trr - mrr) -> `shares`: min_retention, target_retention; k = round(r m)
    U_low' U_high = 0, V_low' V_high = 0 -> gradients: PEFT's hooks; weights: `after_step`
    rank=growing: k = round(m (stage - 1) / stages); the authors' scripts add 0.07 max(out, in) for each of 15 tasks
Differs from the paper: its projection G - U_high U_high' G V_high V_high' leaves what only one side holds; here, as in
        the authors' code and PEFT's, both sides go, so U_high' dW = 0 and dW V_high = 0.
    AdamW leaves the subspace its gradient was projected to, so after each step the changes of U_low and V_low are
        projected again, and once more when they are merged: exact up to the rounding of the weights' dtype.
    similarity=absolute: signed cosines average to about 0 (SmolLM2-135M: mean -0.0003, deviation 0.03, half of them
        below 0); divided by that, half of the layers keep all and half keep least. r is cut to [mrr, 1].
    Stage 1 has no previous task: rank=adaptive measures on its own rows, so pretrained weights are protected too;
        the authors' scripts tune the first task plainly, as rank=growing does.
    A layer of k = m stands still, one of k = 0 trains whole. Weight decay acts on the factors, on no kept direction.
    At the same learning rate W moves further than in full fine-tuning, as U, S and V each take a whole AdamW step: 5
        times as far on SmolLM2-135M (|dW| 18.1 against 3.6 after 9 steps of 1e-4); lr_scale makes up for it.
    Factors are fp32, whatever dtype the weights have: PEFT rounds them to it, and its cast back loses the hooks.
Differs from official TRACE: no code there.
Memory: on the device a layer, r = m - k, has beside W (without gradient and moments) r (out + in + 1) weights that
    train, as many initial ones, and k out (out > in) or k in (in > out) kept ones, fp32; on the CPU one number.
Compute: a pass adds 2 r (out + in) multiplications a token to a layer's out in; each micro-batch and each step about
    2 r k (out + in); each stage one SVD a layer and `sample_rows` forward passes.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trace_hydra.context import StageContext, batch_of
from trace_hydra.errors import ConfigError, MethodError
from trace_hydra.methods.base import Method
from trace_hydra.methods.factored import Factored
from trace_hydra.plan import Phase
from trace_hydra.sizes import RunSize, StateSize

log = logging.getLogger(__name__)
_DIGITS = 8  # of a stored importance
_CHOICES = (("adaptive", "growing"), ("absolute", "signed"), ("train", "freeze"))


class OSF(Method):
    """Train the small singular directions of each linear layer, across the large ones.

    Args:
        rank: "adaptive" by layer importance, or "growing" with the stages.
        min_retention: Least share of directions kept, mrr, in [0, 1); read by rank=adaptive.
        target_retention: Share kept at average importance, trr, in [mrr, 1]; read by rank=adaptive.
        similarity: "absolute" or "signed" cosine of a layer's input and output; read by rank=adaptive.
        sample_rows: Train rows that importance is measured on, at least 1.
        unprotected: "train" or "freeze": weights that are not those of a wrapped layer, in stages that wrap any.
        lr_scale: Factor of the learning rate in stages that wrap any layer, above 0.
    """

    tunings = ("full",)
    sees_num_stages = True
    tuning_reason = "its weights are factors of the full ones"
    merges = True
    published = MappingProxyType({"full": "OSF"})

    def __init__(
        self,
        *,
        rank: Literal["adaptive", "growing"],
        min_retention: float,
        target_retention: float,
        similarity: Literal["absolute", "signed"],
        sample_rows: int,
        unprotected: Literal["train", "freeze"],
        lr_scale: float,
    ):
        given = {"rank": rank, "similarity": similarity, "unprotected": unprotected}
        for (key, value), allowed in zip(given.items(), _CHOICES, strict=True):
            if value not in allowed:
                raise ConfigError(f"method.{key}={value!r} must be '{allowed[0]}' or '{allowed[1]}'.")
        if not 0 <= min_retention < 1:
            raise ConfigError(f"method.min_retention={min_retention} must be in [0, 1); it is the least share kept.")
        if not min_retention <= target_retention <= 1:
            allowed = f"[method.min_retention={min_retention}, 1]; it is the share kept at average importance."
            raise ConfigError(f"method.target_retention={target_retention} must be in {allowed}")
        if sample_rows < 1:
            raise ConfigError(f"method.sample_rows={sample_rows} must be at least 1; it is the number of rows sampled.")
        if not lr_scale > 0:
            raise ConfigError(f"method.lr_scale={lr_scale} must be above 0; it multiplies the learning rate.")
        self.rank, self.similarity, self.unprotected, self.lr_scale = rank, similarity, unprotected, lr_scale
        self.min_retention, self.target_retention, self.sample_rows = min_retention, target_retention, sample_rows
        self.importance: dict[str, float] = {}  # layer name -> mean cosine on the last task; none with rank=growing
        self.wrapped: dict[str, Factored] = {}  # by layer name, while a stage trains

    def begin_stage(self, ctx: StageContext) -> None:
        """Put factors in place of the layers' weights; the model computes what it did before.

        Raises:
            MethodError: If no linear layer trains, or others than those whose importance is stored.
        """
        layers = linear_layers(ctx)
        if self.rank == "adaptive" and not self.importance:
            self.importance = self._importance(ctx)
        if not layers or (self.importance and self.importance.keys() != layers.keys()):
            raise MethodError(
                f"stage {ctx.stage.index} ({ctx.stage.task}) trains {len(layers)} linear layers, importance is stored "
                f"for {len(self.importance)}. Use the model and the tuning it was measured with."
            )
        ranks = self._ranks(ctx, layers)
        if any(ranks.values()) and self.unprotected == "freeze":
            ctx.model.requires_grad_(False)
        for name, layer in layers.items():
            layer.weight.requires_grad_(ranks[name] == 0)
            if 0 < ranks[name] < min(layer.weight.shape):
                # Named after the stage: optim.carry=true is then refused, the optimizer's state fits no other factors.
                self.wrapped[name] = Factored(layer, ranks[name], f"stage_{ctx.stage.index}")
                ctx.model.set_submodule(name, self.wrapped[name].module)
        kept = sum(ranks.values()) / sum(min(layer.weight.shape) for layer in layers.values())
        log.info("%s: %.1f %% of the layers' singular directions are kept.", ctx.task.name, 100 * kept)

    def phases(self, ctx: StageContext) -> Sequence[Phase]:
        """The task's rows, with smaller steps where factors train."""
        scale = self.lr_scale if self.wrapped else 1.0
        return [Phase("task", ctx.task.train, ctx.epochs_of(ctx.task.name), scale)]

    def after_step(self, ctx: StageContext) -> None:
        """Undo what the optimizer moved within the kept directions."""
        for factored in self.wrapped.values():
            factored.put_back()

    def end_stage(self, ctx: StageContext) -> None:
        """Merge the factors, give the model its own layers back, and measure importance on this task."""
        for name, factored in self.wrapped.items():
            ctx.model.set_submodule(name, factored.merge())
        self.wrapped = {}
        ctx.model.requires_grad_(True)  # as tuning=full had it
        if self.rank == "adaptive":
            self.importance = self._importance(ctx)

    def state_size(self, size: RunSize) -> StateSize:
        """One number a layer, on the device factors and copies; the most if adaptive: all keep `min_retention`."""
        names = [name for name in size.linear if size.weights[name][0] != size.vocabulary]
        share = self.min_retention if self.rank == "adaptive" else (size.stages > 1) / size.stages  # of stage 2
        whole = sum(prod(size.weights[name]) for name in names)
        device, trained = 0, size.num_trainable - whole if self.unprotected == "train" else 0
        for out, width in (size.weights[name] for name in names):
            kept = self._kept(share, min(out, width))
            factors = (min(out, width) - kept) * (out + width + 1)
            trained += factors if kept else out * width
            if kept and factors:
                device += 4 * (2 * factors + (kept * max(out, width) if out != width else 0))
        if self.rank == "growing":
            return StateSize(device=device, trained=max(trained, size.num_trainable))  # all of them in stage 1
        entry = len('"": 0., ') + _DIGITS - len(".weight")
        return StateSize(len('{"importance": {}}') + sum(len(name) + entry for name in names), device, trained=trained)

    def state_dict(self) -> dict[str, Any]:
        """Importance on the last task."""
        return {"importance": dict(self.importance)} if self.importance else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take importance back."""
        self.importance = dict(state.get("importance", {}))

    def _kept(self, share: float, smaller: int) -> int:
        """k of a layer with `smaller` singular directions; the paper keeps at least one."""
        return min(max(round(share * smaller), int(self.rank == "adaptive")), smaller)

    def _ranks(self, ctx: StageContext, layers: Mapping[str, nn.Linear]) -> dict[str, int]:
        kept = dict.fromkeys(layers, (ctx.stage.index - 1) / ctx.num_stages)
        if self.rank == "adaptive":
            kept = shares(self.importance, self.min_retention, self.target_retention, self.similarity)
        return {name: self._kept(kept[name], min(layer.weight.shape)) for name, layer in layers.items()}

    def _importance(self, ctx: StageContext) -> dict[str, float]:
        """Average cos(x, W x) over all tokens of sampled train rows, for each layer."""
        examples = ctx.rng.sample(list(ctx.task.train), min(self.sample_rows, len(ctx.task.train)))
        layers, tokens = linear_layers(ctx), 0
        sums = {name: torch.zeros((), dtype=torch.float64, device=ctx.device) for name in layers}

        def add(name: str, _layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            width = min(arguments[0].shape[-1], output.shape[-1])
            cosine = F.cosine_similarity(arguments[0][..., :width].float(), output[..., :width].float(), dim=-1)
            sums[name] += cosine.double().sum()

        handles = [layer.register_forward_hook(partial(add, name)) for name, layer in layers.items()]
        try:
            with torch.no_grad(), ctx.autocast():
                for row in ctx.encode(examples):  # one at a time: no padding among the tokens
                    tokens += len(row.ids)
                    ctx.label_logits(batch_of([row], ctx.device))
        finally:
            for handle in handles:
                handle.remove()
        return {name: round(float(total) / tokens, _DIGITS) for name, total in sums.items()}


def linear_layers(ctx: StageContext) -> dict[str, nn.Linear]:
    """List linear layers whose weight trains, by name, without the output layer."""
    output = ctx.model.get_output_embeddings()  # type: ignore[operator]
    layers = {name: layer for name, layer in ctx.model.named_modules() if isinstance(layer, nn.Linear)}
    return {name: layer for name, layer in layers.items() if layer is not output and layer.weight.requires_grad}


def shares(importance: Mapping[str, float], least: float, target: float, similarity: str) -> dict[str, float]:
    """Share of singular directions to keep in each layer, r = mrr + I (trr - mrr), cut to [mrr, 1].

    I is `importance`, the layers' mean cosines, divided by its mean over layers; mrr is `least`, trr `target`.
    """
    scores = {name: abs(score) if similarity == "absolute" else score for name, score in importance.items()}
    mean = sum(scores.values()) / len(scores) or 1.0
    return {name: min(max(least + score / mean * (target - least), least), 1.0) for name, score in scores.items()}
