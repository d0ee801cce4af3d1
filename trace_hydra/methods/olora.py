"""O-LoRA, orthogonal low-rank adapters (Wang et al. 2023, arXiv:2310.14152, eq. 6-8).

Paper -> code:  one adapter per task, earlier ones fixed, all summed -> adapters "default", "stage_2", ..., all active
    O_{i,t} = A_i^T A_t (eq. 6) -> `overlap`: old @ new^T, as PEFT keeps lora_A transposed, (r, in)
    L_orth = sum over j, k of O_{i,t}[j, k]^2 (eq. 8) -> norm="squared";  lambda_1 (eq. 7) -> strength
    A -> factor: "lora_A", which spans what an update reads, is what the authors' and TRACE's code take; "lora_B" is the
    letter of the paper, whose A (d x r, W + AB) spans what an update writes (cmnfriend/O-LoRA, issues 30 and 39)
Differs from the paper: earlier adapters are fixed weights, so they get no dropout.
Differs from official TRACE: squared entries (there absolute ones, model/Regular/O_LoRA.py:54-67; norm="absolute"); no
    L2 term (there with weight 0); a new adapter is new (there the optimizer's old copy overwrites its first values;
    so optim.carry must stay false).
Memory: 4 bytes per adapter weight and task, on the device and once more on the CPU (`state_dict`). Compute: every
    forward and backward pass goes through all adapters so far; r * t * in products a layer for the penalty.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trace_hydra.context import StageContext, TrainTask
from trace_hydra.errors import ConfigError, MethodError
from trace_hydra.methods.base import Method
from trace_hydra.sizes import RunSize, StateSize


class OLoRA(Method):
    """Train a new adapter in each stage, kept orthogonal to the earlier ones.

    Args:
        strength: Weight of the penalty, lambda_1, at least 0.
        norm: "squared" or "absolute" entries of the overlap.
        factor: "lora_A" or "lora_B", in PEFT's names: what must be orthogonal.
    """

    tunings = ("lora",)
    tuning_reason = "every task gets an adapter of its own"
    terms = ("lm", "olora")
    published = MappingProxyType({"lora": "O-LoRA"})

    def __init__(self, *, strength: float, norm: Literal["squared", "absolute"], factor: Literal["lora_A", "lora_B"]):
        if strength < 0:
            raise ConfigError(f"method.strength={strength} must be at least 0; it is the weight of the overlap.")
        if norm not in ("squared", "absolute"):
            raise ConfigError(f"method.norm={norm!r} must be 'squared' or 'absolute'.")
        if factor not in ("lora_A", "lora_B"):
            raise ConfigError(f"method.factor={factor!r} must be 'lora_A' or 'lora_B'.")
        self.strength, self.norm, self.factor = strength, norm, factor
        self.adapters: list[str] = []
        """Adapters of the stages so far, in order."""
        self.kept: dict[str, Tensor] = {}
        """Their weights, on the CPU."""
        self._pairs: list[tuple[Tensor, nn.Parameter]] = []

    def begin_stage(self, ctx: StageContext) -> None:
        """Add this stage's adapter, freeze the earlier ones, and pair its factors with theirs."""
        self._mount(ctx)
        new = "default" if ctx.stage.index == 1 else f"stage_{ctx.stage.index}"
        if new not in ctx.model.peft_config:  # type: ignore[operator]
            ctx.model.add_adapter(new, ctx.tuning.config())  # type: ignore[operator, attr-defined]
        _activate(ctx.model, [*self.adapters, new], new)
        factors = {name: weight for name, weight in ctx.model.named_parameters() if f".{self.factor}." in name}
        self._pairs = []
        for name, weight in factors.items():
            if f".{new}." in name and self.adapters:
                earlier = [factors[name.replace(f".{new}.", f".{old}.")].detach() for old in self.adapters]
                self._pairs.append((torch.cat([self._rows(one) for one in earlier]), weight))
        self.adapters.append(new)

    def losses(self, ctx: StageContext, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The task's loss and the weighted overlap; the overlap is 0 in the first stage."""
        penalty = torch.zeros((), device=ctx.device)
        with torch.autocast(ctx.device.type, enabled=False):
            for old, new in self._pairs:
                penalty = penalty + overlap(old, self._rows(new), self.norm)
        return {"lm": ctx.lm_loss(batch), "olora": self.strength * penalty}

    def end_stage(self, ctx: StageContext) -> None:
        """Keep the adapter's weights."""
        for name, weight in ctx.trainable().items():
            self.kept[name] = weight.detach().float().cpu().clone()
        self._pairs = []

    def answer(self, ctx: StageContext, prompts: Sequence[str], task: TrainTask) -> list[str]:
        """Answer with all adapters."""
        self._mount(ctx)
        return super().answer(ctx, prompts, task)

    def serve(
        self, ctx: StageContext, prompts: Sequence[str]
    ) -> Iterator[tuple[Sequence[int], Sequence[Sequence[int]]]]:
        """Serve with all adapters."""
        self._mount(ctx)
        yield from super().serve(ctx, prompts)

    def state_size(self, size: RunSize) -> StateSize:
        """All adapters on the CPU; on the device the earlier ones, and once more the factor that is compared."""
        factor = sum(prod(size.weights[name]) for name in size.trainable if f".{self.factor}." in name)
        earlier = size.stages - 1
        return StateSize(
            stored=4 * size.num_trainable * size.stages,
            device=earlier * (size.weight_bytes * size.num_trainable + size.weight_bytes * factor),
        )

    def state_dict(self) -> dict[str, Any]:
        """The adapters' names and weights."""
        return {"adapters": list(self.adapters), **self.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take names and weights back; a model that lacks an adapter gets it when it is next used."""
        self.adapters = list(state["adapters"])
        self.kept = {name: weight for name, weight in state.items() if name != "adapters"}

    def _rows(self, weight: Tensor) -> Tensor:
        """The factor with one basis vector a row: (r, in) or (r, out)."""
        return weight if self.factor == "lora_A" else weight.T

    def _mount(self, ctx: StageContext) -> None:
        """Give a model that lacks earlier adapters (a restored run) all of them; the random state stays as it is."""
        missing = [name for name in self.adapters if name not in ctx.model.peft_config]  # type: ignore[operator]
        if not missing:
            return
        with torch.random.fork_rng(devices=[ctx.device] if ctx.device.type == "cuda" else []):
            for name in missing:
                ctx.model.add_adapter(name, ctx.tuning.config())  # type: ignore[operator, attr-defined]
        weights = dict(ctx.model.named_parameters())
        with torch.no_grad():
            for name, weight in self.kept.items():
                weights[name].copy_(weight)
        _activate(ctx.model, self.adapters, self.adapters[-1])


def overlap(old: Tensor, new: Tensor, norm: str) -> Tensor:
    """Sum the squared or absolute entries of O = old @ new^T (eq. 6 and 8), a scalar in fp32.

    Args:
        old: Basis vectors of earlier tasks as rows, (r * tasks, width).
        new: Basis vectors of this task as rows, (r, width); receives the gradient.
        norm: "squared" or "absolute".
    """
    product = old.float() @ new.float().T  # (r * tasks, r)
    return product.square().sum() if norm == "squared" else product.abs().sum()


def _activate(model: nn.Module, adapters: Sequence[str], trained: str) -> None:
    """Let all adapters take part in the forward pass and only one train.

    PEFT's `set_adapter` makes every active adapter trainable; what trains is set and checked here.

    Raises:
        MethodError: If anything but the new adapter's weights trains, or nothing.
    """
    model.base_model.set_adapter(list(adapters))  # type: ignore[operator, union-attr]
    for name, weight in model.named_parameters():
        weight.requires_grad_(".lora_" in name and f".{trained}." in name)
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if isinstance(dropouts, nn.ModuleDict):
            for name in adapters:
                if name != trained and name in dropouts:
                    dropouts[name] = nn.Identity()
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if not names or not all(name.endswith(f".{trained}.weight") for name in names):
        raise MethodError(f"adapter '{trained}' should train alone; trainable are {names[:4]}.")
