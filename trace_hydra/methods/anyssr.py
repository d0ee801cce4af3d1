"""Any-SSR, analytic subspace routing (Tong et al. 2025, ICCV, arXiv:2503.13575); on TRACE OP 55.69, BWT 0.00.

Sources. Formulas and tables: summaries that quote them; the paper itself, and so its equation numbers, was not at hand.
Code: github.com/ZHUANGHP/Any-SSR, by file.
Paper -> code:  h_{<=Lf}, the first L_f layers, frozen, without adapters -> `_split`, frozen_share
    task k: an adapter of its own in the layers above, the others off -> adapters "default", "stage_2", ...
    h~ = ReLU(mean over a prompt's tokens of h_{<=Lf}, times a fixed Gaussian matrix), E wide -> `features`, `expand`
    R_k = (sum_i h~_i^T h~_i + lambda I)^-1, by Woodbury's identity R - R h~^T (I + h~ R h~^T)^-1 h~ R -> `update`
    W_k = (I - R_k h~^T h~) W_{k-1} + R_k h~^T Y, Y one-hot tasks -> `update`, as W + R h~^T (Y - h~ W)
    so R and W are those of ridge regression on all prompts at once: nothing of the router is forgotten
    k* = argmax_k (h~ W)_k, whose adapter alone generates -> `route`, `answer`;  before training the base model answers
Differs from the paper: E is 1024 (there 10,000), see conf/method/anyssr.yaml for what that costs; a prompt's mean
    leaves padding out, and each token's state is divided by its root mean square first (the authors' code: the model's
    final norm, the same with a learned scale), so that a few states far larger than the others do not decide.
Differs from the authors' code: ReLU as in the paper (there none); rows of earlier tasks are never read again
    (train_router_ana_continual.py goes through all tasks' rows so far in every step, so that old rows count several
    times); R and W in fp64 (there fp32 and fp16); the router is there after the first task (there after the second).
Differs from official TRACE: no code there.
Related: SAPT (Zhao et al. 2024, arXiv:2401.08295) too has an adapter per task and picks by the prompt. There queries
    and keys are trained with the adapters, all adapters take part by soft attention weights that training and answering
    share, and pseudo-rows of old tasks from a generator keep that attention. Here the choice is hard and solved in
    closed form on frozen features, without stored or generated rows; tasks share nothing but the base model.
Precision: layers run in the trainer's precision; states are fp32 from their norm on, expanded in fp32; R, W in fp64.
Memory: on the CPU 8 E^2 bytes for R (E = 1024: 8.4 MB; 10,000: 800 MB; twice that during an update), 8 E per task for
    W, 4 E per unit of width for the matrix, which is drawn anew from its seed and not stored, and 4 bytes per adapter
    weight above L_f and task; those adapters once more on the device.
Compute: each train prompt once, each test prompt once through the first L_f layers; 4 E^2 operations a train prompt.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from math import ceil, prod
from random import Random
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trace_hydra.context import StageContext, TrainTask
from trace_hydra.errors import ConfigError, MethodError
from trace_hydra.methods.base import Method
from trace_hydra.methods.routing import only_adapters, prompt_features, update
from trace_hydra.sizes import RunSize, StateSize

_UPDATE_ROWS = 256  # of one Woodbury step: memory and speed only, the result is the same


class AnalyticRouting(Method):
    """Train an adapter per task; a ridge regression solved recursively says which one answers a prompt.

    Args:
        frozen_share: L_f as a share of the layers, rounded up, in (0, 1).
        expansion: E, width of the expanded features, at least 1.
        ridge: lambda, above 0.
    """

    tunings = ("lora",)
    tuning_reason = "every task gets an adapter of its own"
    picks_by_prompt = True
    published = MappingProxyType({"lora": "Any-SSR"})

    def __init__(self, *, frozen_share: float, expansion: int, ridge: float):
        if not 0 < frozen_share < 1:
            raise ConfigError(
                f"method.frozen_share={frozen_share} must be in (0, 1); it is the share of layers without adapters."
            )
        if expansion < 1:
            raise ConfigError(f"method.expansion={expansion} must be at least 1; it is the width of router features.")
        if ridge <= 0:
            raise ConfigError(f"method.ridge={ridge} must be above 0; it is the weight of the router's squared norm.")
        self.frozen_share, self.expansion, self.ridge = frozen_share, expansion, ridge
        self.adapters: list[str] = []
        """Adapters of the stages so far, in order: the columns of `weight`."""
        self.kept: dict[str, Tensor] = {}
        """Their weights, fp32, CPU."""
        self.seed = 0
        """Of the expansion."""
        self.inverse = torch.zeros(0)
        """R, (E, E), fp64, CPU; before the first task not there."""
        self.weight = torch.zeros(0)
        """W, (E, tasks), fp64, CPU."""
        self._projection = torch.zeros(0, 0)
        self._restored = False

    def setup(self, ctx: StageContext) -> None:
        """Draw the seed of the expansion; check that layers with adapters are left.

        Raises:
            ConfigError: If none is.
        """
        self.seed = Random(f"{ctx.data_seed}-expansion").getrandbits(63)
        _, layers, frozen = self._split(ctx.model)
        if not self._own(ctx.model, "default"):
            raise ConfigError(
                f"method.frozen_share={self.frozen_share} freezes {frozen} of the model's {len(layers)} layers; "
                f"the others hold none of tuning.target_modules. Set it to at most {1 - 1 / len(layers):g}."
            )

    def begin_stage(self, ctx: StageContext) -> None:
        """Add this stage's adapter; it alone is active and trains."""
        self._mount(ctx)
        new = "default" if ctx.stage.index == 1 else f"stage_{ctx.stage.index}"
        if new not in ctx.model.peft_config:  # type: ignore[operator]
            self._add(ctx, new)
        self._activate(ctx.model, new)
        self.adapters.append(new)

    def end_stage(self, ctx: StageContext) -> None:
        """Keep the adapter, and teach the router this task's prompts."""
        for name, weight in ctx.trainable().items():
            self.kept[name] = weight.detach().float().cpu().clone()
        if not self.inverse.numel():
            self.inverse = torch.eye(self.expansion, dtype=torch.float64) / self.ridge
            self.weight = torch.zeros(self.expansion, 0, dtype=torch.float64)
        self.weight = F.pad(self.weight, (0, len(self.adapters) - self.weight.shape[1]))
        features = self.features(ctx, [row.prompt for row in ctx.task.train], ctx.task.instruction)
        for rows in features.split(_UPDATE_ROWS):
            labels = torch.zeros(len(rows), len(self.adapters), dtype=torch.float64)
            labels[:, -1] = 1
            self.inverse, self.weight = update(self.inverse, self.weight, self.expand(rows), labels)

    def answer(self, ctx: StageContext, prompts: Sequence[str], task: TrainTask) -> list[str]:
        """Answer each prompt with the adapter it is routed to; before the first task with the base model."""
        answers, start, order = [""] * len(prompts), len(ctx.generated), []
        for indices in self._routed(ctx, prompts, task.instruction):
            found = super().answer(ctx, [prompts[index] for index in indices], task)
            order += indices
            for index, text in zip(indices, found, strict=True):
                answers[index] = text
        made = dict(zip(order, ctx.generated[start:], strict=True))
        ctx.generated[start:] = [made[index] for index in range(len(prompts))]  # records are paired with prompts
        return answers

    def serve(
        self, ctx: StageContext, prompts: Sequence[str]
    ) -> Iterator[tuple[Sequence[int], Sequence[Sequence[int]]]]:
        """Switch to the adapter each prompt is routed to."""
        for indices in self._routed(ctx, prompts, ""):
            yield indices, [ctx.prefix] * len(indices)

    def _routed(self, ctx: StageContext, prompts: Sequence[str], instruction: str) -> Iterator[list[int]]:
        """Group prompts by adapter; it is on, alone, while its group is handled."""
        self._mount(ctx)
        routes = self.route(ctx, prompts, instruction) if self.adapters and prompts else [-1] * len(prompts)
        for chosen in sorted(set(routes)):
            with only_adapters(ctx.model, [self.adapters[chosen]] if self.adapters else []):
                yield [index for index, route in enumerate(routes) if route == chosen]

    def route(self, ctx: StageContext, prompts: Sequence[str], instruction: str) -> list[int]:
        """Name the task of each prompt, from 0 in the order of the stages; of equal values the first."""
        rows = self.features(ctx, prompts, instruction).split(_UPDATE_ROWS)
        return [int(task) for part in rows for task in (self.expand(part) @ self.weight).argmax(1)]

    def features(self, ctx: StageContext, prompts: Sequence[str], instruction: str) -> Tensor:
        """Average the normed states behind layer L_f of the start model over each prompt's tokens.

        Args:
            ctx: Its model's adapters are off meanwhile, dropout too.
            prompts: Cut as the protocol cuts them.
            instruction: The head to keep if a prompt must be cut.

        Returns:
            (prompts, width), fp32, CPU.
        """
        _, layers, frozen = self._split(ctx.model)
        with only_adapters(ctx.model, []):
            return prompt_features(ctx, layers[frozen - 1], prompts, instruction)

    def expand(self, features: Tensor) -> Tensor:
        """Map features (rows, width) to ReLU(features @ Gaussian), (rows, E), fp64; the matrix is always the same."""
        width = features.shape[1]
        if self._projection.shape != (width, self.expansion):
            generator = torch.Generator().manual_seed(self.seed)
            self._projection = torch.randn(width, self.expansion, generator=generator) / width**0.5
        return (features @ self._projection).relu().double()

    def state_size(self, size: RunSize) -> StateSize:
        """R, W and all adapters on the CPU, once more R and the expansion; on the device earlier tasks' adapters."""
        frozen = ceil(self.frozen_share * size.layers - 1e-9)
        adapter = 0
        for name in size.trainable:
            place = re.search(r"\.(\d+)\.", name)
            if place and int(place[1]) >= frozen:
                adapter += prod(size.weights[name])
        return StateSize(
            stored=8 * self.expansion * (self.expansion + size.stages) + 4 * adapter * size.stages,
            device=size.weight_bytes * adapter * (size.stages - 1),
            host=8 * self.expansion**2 + 4 * self.expansion * size.width,
            trained=adapter,
        )

    def state_dict(self) -> dict[str, Any]:
        """The router, the seed of its expansion, the adapters' names and weights."""
        router = {"R": self.inverse, "W": self.weight} if self.adapters else {}
        return {"adapters": list(self.adapters), "seed": self.seed, **router, **self.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back; a model gets the adapters when it is next used."""
        self.adapters, self.seed = list(state["adapters"]), state["seed"]
        self.inverse, self.weight = (state.get(name, torch.zeros(0)) for name in ("R", "W"))
        self.kept = {name: one for name, one in state.items() if ".lora_" in name}
        self._projection, self._restored = torch.zeros(0, 0), True

    def _split(self, model: nn.Module) -> tuple[str, nn.ModuleList, int]:
        """Find the decoder layers: the name of their list, the list, and how many of them, L_f, have no adapter."""
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and any(".lora_" in inner for inner, _ in module.named_parameters()):
                return name, module, ceil(self.frozen_share * len(module) - 1e-9)
        raise MethodError("no adapter stands in a list of layers, so no layers can be counted; change tuning.")

    def _own(self, model: nn.Module, adapter: str) -> list[str]:
        """List an adapter's weights above L_f."""
        name, layers, frozen = self._split(model)
        above = tuple(f"{name}.{index}." for index in range(frozen, len(layers)))
        names = (one for one, _ in model.named_parameters() if one.startswith(above) and ".lora_" in one)
        return [one for one in names if f".{adapter}." in one]

    def _add(self, ctx: StageContext, adapter: str) -> None:
        name, layers, frozen = self._split(ctx.model)
        config = ctx.tuning.config()  # type: ignore[attr-defined]
        config.layers_pattern = name.rsplit(".", 1)[-1]
        config.layers_to_transform = list(range(frozen, len(layers)))
        ctx.model.add_adapter(adapter, config)  # type: ignore[operator]

    def _activate(self, model: nn.Module, adapter: str) -> None:
        """Let one adapter take part and train; below L_f the start adapter stays as drawn, B = 0, without effect."""
        model.base_model.set_adapter([adapter])  # type: ignore[operator, union-attr]
        own = set(self._own(model, adapter))
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in own)

    def _mount(self, ctx: StageContext) -> None:
        """After a restart, give the model all adapters so far; training's random state stays as it is."""
        if not self._restored or not self.adapters:
            return
        with torch.random.fork_rng(devices=[ctx.device] if ctx.device.type == "cuda" else []):
            for name in self.adapters:
                if name not in ctx.model.peft_config:  # type: ignore[operator]
                    self._add(ctx, name)
        weights = dict(ctx.model.named_parameters())
        with torch.no_grad():
            for name, weight in self.kept.items():
                weights[name].copy_(weight)
        self._activate(ctx.model, self.adapters[-1])
        self._restored = False
