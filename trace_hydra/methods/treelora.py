"""TreeLoRA: adapters pulled towards the most similar earlier task, layer by layer (Qian et al. 2025, arXiv:2506.10355).

The paper's own text was not at hand: its formulas are as three summaries of it agree, without equation numbers; the
code is ZinYY/TreeLoRA, cited by file and function (model/Regular/Tree_LoRA.py, utils/kd_lora_tree.py, "tree" below).

Paper -> code:  layers -> levels: the lora_A matrices in the model's order, the first `depth` of them
    g_k = E[grad l(w_k; x, y)], a task's gradient -> gradients[name][k], mean of its optimizer steps' task gradients
    tasks are alike if ||g_i - g_i'||_1 <= delta, "gradient directions" -> tree.py, `gradient_distance`, in [0, 1]
    K-D tree, delta from a cut at the median -> tree.py, `build_tree`;  delta of a node -> its diameter at a level
    LCB_k = mu_k - 2 sqrt(log t / n_k), the children's bounds and delta for other nodes -> tree.py, `LevelSearch`, one
        per level and stage: one arm is pulled an optimizer step and costs one distance, 2 -> exploration; the bound of
        inner nodes is that of bandits in smooth trees (Coquelin and Munos 2007, arXiv:cs/0703062), for costs
    w <- w - alpha S[grad l] - lambda grad l_reg -> loss term "treelora", lambda -> strength; S -> low rank, LoRA
Differs from the paper: l_reg is there ||g_n - g_k||_1, whose gradient by w needs second derivatives of the model. Here
    sum over levels of <g_k, A - A_0>, A_0 where the stage began: the first-order change of the chosen task's loss, an
    inner product as in the code. Its gradient is g_k, so the step goes down the earlier task's loss too. One arm is
    pulled a step, not a sample, and what is compared is the mean gradient of the stage so far, less noisy.
Differs from the authors' code: gradients are stored (there the values of lora_A, `_grad_current.append(param_)`, added
    once per level at every step, tree `insert_grad`); near tasks are preferred (there twice negated, so far ones, tree
    `update_similarity`, `tree_search`) and taken by the lowest bound (there sampled from a softmax); the search goes
    down the tree (there it rescales the arms of one child of the root, and is built of differences between successive
    tasks by products with their mean); mean and count live through a stage (there an epoch; the bonus is
    sqrt(log(2 T (t+1)(t+2)) / 2n)); the term is not scaled (there divided by its own value, times the task's loss
    and a ramp 0..lambda over each epoch, tree `get_loss`: it grows whatever sign it has).
Differs from official TRACE: no code there. As in the authors', one adapter trains through all tasks.
Memory: 4 bytes per lora_A weight and task on the CPU, the same again on the device while a stage trains, and 8 more for
    A_0 and the stage's own gradient. With r = 8 on q and v of Llama-2-7B (64 levels): 8.4 MB a task.
Compute: no further pass; per step and level one inner product, one distance and log2(tasks) comparisons.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from trace_hydra.context import StageContext
from trace_hydra.errors import ConfigError, MethodError
from trace_hydra.methods.base import Method
from trace_hydra.methods.tree import LevelSearch, Node, build_tree, gradient_distance, pairwise_distances
from trace_hydra.sizes import RunSize, StateSize

log = logging.getLogger(__name__)


class TreeLoRA(Method):
    """Pull each adapted matrix down the gradient of the earlier task that is most like the current one there.

    Args:
        strength: Weight of the pull, lambda, above 0.
        exploration: Factor of sqrt(log t / n) in the lower confidence bound, at least 0.
        depth: Most levels, at least 1; null: all.
    """

    tunings = ("lora",)
    tuning_reason = "its levels are the lora_A matrices of adapters"
    terms = ("lm", "treelora")
    published = MappingProxyType({"lora": "TreeLoRA"})

    def __init__(self, *, strength: float, exploration: float, depth: int | None):
        if not strength > 0:
            raise ConfigError(f"method.strength={strength} must be above 0; it is the weight of the pull.")
        if not exploration >= 0:
            raise ConfigError(f"method.exploration={exploration} must be at least 0; it widens the confidence bounds.")
        if depth is not None and depth < 1:
            raise ConfigError(f"method.depth={depth} must be at least 1 or null (all); it is the number of levels.")
        self.strength, self.exploration, self.depth = strength, exploration, depth
        self.gradients: dict[str, Tensor] = {}
        """Weight of a level -> mean gradient of each task so far, (tasks, r, in), fp32, CPU."""
        self.searches: list[LevelSearch] = []
        """Of this stage, one a level; none in the first stage."""
        self.chosen: list[int] = []
        """The earlier task that each level is pulled to in the current optimizer step, from 0."""
        self._levels: dict[str, nn.Parameter] = {}
        self._stored: dict[str, Tensor] = {}  # gradients on the device
        self._start: dict[str, Tensor] = {}  # the weights where the stage began
        self._total: dict[str, Tensor] = {}  # sum of this stage's task gradients
        self._steps = 0

    def begin_stage(self, ctx: StageContext) -> None:
        """Build the tree of earlier tasks and a search per level, and choose for the first step.

        Raises:
            MethodError: If stored gradients are of other levels than the model has.
        """
        weights = ctx.trainable()
        self._levels = {name: weights[name] for name in level_names(weights, self.depth)}
        if self.gradients and list(self.gradients) != list(self._levels):
            raise MethodError(
                f"stage {ctx.stage.index} ({ctx.stage.task}): gradients of {len(self.gradients)} levels are stored, "
                f"the model has {len(self._levels)} or others; continue with the tuning and method.depth of the start."
            )
        self._start = {name: weight.detach().float().clone() for name, weight in self._levels.items()}
        self._total = {name: torch.zeros_like(start) for name, start in self._start.items()}
        self._stored = {name: gradients.to(ctx.device) for name, gradients in self.gradients.items()}
        self._steps, self.searches, self.chosen = 0, [], []
        if self.gradients:
            root = self.tree()
            self.searches = [LevelSearch(root, level, self.exploration) for level in range(len(self._levels))]
            self.chosen = [search.choose() for search in self.searches]

    def tree(self) -> Node:
        """Build the tree of the tasks so far; there must be one."""
        return build_tree([pairwise_distances(gradients) for gradients in self.gradients.values()])

    def losses(self, ctx: StageContext, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The task's loss and the pull; the pull is 0 in the first stage and at the first step of any."""
        loss = ctx.lm_loss(batch)
        if not self.searches:
            return {"lm": loss, "treelora": loss.new_zeros(())}
        updates = [weight.float() - self._start[name] for name, weight in self._levels.items()]
        return {"lm": loss, "treelora": self.strength * alignment(updates, self._pull())}

    def edit_gradients(self, ctx: StageContext) -> None:
        """Add the step's task gradient, observe the chosen tasks' distances, choose for the next step."""
        pull = self._pull()
        for level, (name, weight) in enumerate(self._levels.items()):
            if weight.grad is not None:
                self._total[name] += weight.grad.detach().float()
                if pull:  # it is part of .grad, and known exactly
                    self._total[name] -= self.strength * pull[level]
        self._steps += 1
        if pull:
            costs = [gradient_distance(*pair) for pair in zip(self._total.values(), pull, strict=True)]
            for search, task, cost in zip(self.searches, self.chosen, torch.stack(costs).tolist(), strict=True):
                search.observe(task, cost)
            self.chosen = [search.choose() for search in self.searches]

    def end_stage(self, ctx: StageContext) -> None:
        """Keep the stage's mean gradient."""
        for name, total in self._total.items():
            mean = (total / max(1, self._steps)).cpu().unsqueeze(0)  # (1, r, in)
            self.gradients[name] = torch.cat([self.gradients[name], mean]) if name in self.gradients else mean
        if self.searches:
            pulls = sum((Counter(search.pulls) for search in self.searches), Counter())
            shares = ", ".join(f"{task + 1}: {count / pulls.total():.0%}" for task, count in sorted(pulls.items()))
            log.info("%s was pulled to earlier stages, over levels and steps: %s.", ctx.task.name, shares)
        self.searches, self.chosen, self._steps = [], [], 0
        self._levels, self._stored, self._start, self._total = {}, {}, {}, {}

    def state_size(self, size: RunSize) -> StateSize:
        """4 bytes per weight of a level and task; on the device the earlier tasks' and two more."""
        names = level_names((name for name in size.weights if name in size.trainable), self.depth)
        number = sum(prod(size.weights[name]) for name in names)
        return StateSize(stored=4 * number * size.stages, device=4 * number * (size.stages - 1 + 2))

    def state_dict(self) -> dict[str, Any]:
        """Each task's gradient at each level; the tree follows from them."""
        return {f"gradients.{name}": gradients for name, gradients in self.gradients.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the gradients back."""
        self.gradients = {key.removeprefix("gradients."): gradients for key, gradients in state.items()}

    def _pull(self) -> list[Tensor]:
        """The chosen tasks' gradients, one a level; none in the first stage."""
        return [gradients[task] for gradients, task in zip(self._stored.values(), self.chosen, strict=True)]


def level_names(names: Iterable[str], depth: int | None) -> list[str]:
    """List the names of the first `depth` lora_A matrices, in the order given."""
    return [name for name in names if ".lora_A." in name][:depth]


def alignment(updates: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Sum <gradient, update> over levels: how much the updates change a loss with these gradients, to first order.

    Args:
        updates: One a level, fp32; receive the gradient.
        gradients: Shaped like `updates`.

    Returns:
        Scalar fp32, nats; negative where the updates lower that loss.
    """
    parts = [(update * gradient).sum() for update, gradient in zip(updates, gradients, strict=True)]
    return torch.stack(parts).sum()
