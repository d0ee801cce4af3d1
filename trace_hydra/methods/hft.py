"""Half fine-tuning (Hui et al. 2024, arXiv:2404.18466, section 3).

Paper -> code:  half of the parameters frozen in each round, another random half in the next -> `begin_stage`, drawn
    from `ctx.rng`;  half -> share
    whole matrices are selected, by category within each layer (self-attention, feed-forward, layer norm) -> `choose`
    A category with an odd number of matrices in a layer (the three of a gated feed-forward block) trains one more in
    every second layer, drawn at random, so that exactly half of them train over the model
    What lies outside the layers (embeddings, final norm, output layer) -> outer
Differs from official TRACE: no code there. The optimizer must be new in each stage (optim.carry=false, the default):
    other weights train.
Memory: none; the gradients and optimizer state of what trains (LLaMA-2-7B: 51.9 % of the weights).
Compute: no extra work per step.
"""

import logging
import re
from collections.abc import Sequence
from math import prod
from random import Random
from types import MappingProxyType
from typing import Literal

from trace_hydra.context import StageContext
from trace_hydra.errors import ConfigError, MethodError
from trace_hydra.methods.base import Method
from trace_hydra.sizes import RunSize, StateSize

log = logging.getLogger(__name__)

CATEGORIES = (("norm", r"norm|\bln_"), ("attention", r"attn|attention"), ("feed_forward", r"mlp|feed_forward|ffn|moe"))
"""Category and what the name of a module within a layer contains; the first that fits counts."""
_LAYER = re.compile(r"^(.*?\.\d+)\.(.+)$")


class HalfFineTuning(Method):
    """Freeze a fresh random half of the weights in each stage.

    Args:
        share: Share of each category's matrices that train, in (0, 1]; half in the paper.
        outer: "train" or "freeze" embeddings, final norm and output layer.
    """

    tunings = ("full",)
    tuning_reason = "it selects among the model's own matrices"
    published = MappingProxyType({"full": "HFT"})

    def __init__(self, *, share: float, outer: Literal["train", "freeze"]):
        if not 0 < share <= 1:
            raise ConfigError(f"method.share={share} must be in (0, 1]; it is the share of matrices that train.")
        if outer not in ("train", "freeze"):
            raise ConfigError(f"method.outer={outer!r} must be 'train' or 'freeze'.")
        self.share, self.outer = share, outer
        self.fraction = 0.0
        """Share of all weights that train in this stage."""

    def begin_stage(self, ctx: StageContext) -> None:
        """Draw this stage's half and set `requires_grad` on all weights accordingly."""
        trained = self._draw([name for name, _ in ctx.model.named_parameters()], ctx.rng)
        counted, total = 0, 0
        for name, weight in ctx.model.named_parameters():
            weight.requires_grad_(name.rpartition(".")[0] in trained)
            total += weight.numel()
            counted += weight.numel() * weight.requires_grad
        self.fraction = counted / total
        log.info("stage %d (%s): %.1f %% of the weights train.", ctx.stage.index, ctx.task.name, 100 * self.fraction)

    def state_size(self, size: RunSize) -> StateSize:
        """Nothing is held; what trains is that of a draw, of which others differ little."""
        trained = self._draw(list(size.weights), Random(0))
        return StateSize(
            trained=sum(prod(shape) for name, shape in size.weights.items() if name.rpartition(".")[0] in trained)
        )

    def _draw(self, names: Sequence[str], rng: Random) -> set[str]:
        """Draw the modules whose weights train."""
        inner, outer = _units(names)
        trained = {unit for units in choose(inner, self.share, rng).values() for unit in units}
        return trained | set(outer) if self.outer == "train" else trained


def choose(inner: dict[tuple[str, str], list[str]], share: float, rng: Random) -> dict[tuple[str, str], list[str]]:
    """Draw what trains.

    Args:
        inner: (category, layer) -> its matrices.
        share: Share of each category.
        rng: Draws; moved on.

    Returns:
        (category, layer) -> the matrices that train. Over all layers with n matrices in a category, round(share * n *
        layers) train, and any two such layers differ by at most one.
    """
    alike: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for key, units in inner.items():
        alike.setdefault((key[0], len(units)), []).append(key)
    chosen = {}
    for (_, size), keys in alike.items():
        each, rest = divmod(round(share * size * len(keys)), len(keys))
        more = set(rng.sample(keys, rest))
        for key in keys:
            chosen[key] = rng.sample(inner[key], each + (key in more))
    return chosen


def _units(names: Sequence[str]) -> tuple[dict[tuple[str, str], list[str]], Sequence[str]]:
    """Sort the modules that hold weights, by the weights' names, into (category, layer) and those outside the layers.

    Raises:
        MethodError: If a module within a layer fits no category.
    """
    inner: dict[tuple[str, str], list[str]] = {}
    outer: list[str] = []
    for name in dict.fromkeys(name.rpartition(".")[0] for name in names):
        match = _LAYER.match(name)
        if match is None:
            outer.append(name)
            continue
        layer, inside = match.groups()
        category = next((one for one, pattern in CATEGORIES if re.search(pattern, inside)), None)
        if category is None:
            raise MethodError(f"{name} is neither self-attention, feed-forward nor norm; nothing else can be halved.")
        inner.setdefault((category, layer), []).append(name)
    return inner, outer
