"""Lightning's strategies for several devices: one process a device, started by a launcher (`ranks`)."""

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial as bound
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trace_hydra import ranks, zero

_SMALL = 2**20
"""Gradients of fewer elements travel together."""


class Launched(ClusterEnvironment):
    """Tells Lightning about the processes. To it each is a machine with one device, whatever shares a machine."""

    creates_processes_externally = True  # type: ignore[assignment]

    @property
    def main_address(self) -> str:
        """The launcher's."""
        return os.environ["MASTER_ADDR"]

    @property
    def main_port(self) -> int:
        """The launcher's."""
        return int(os.environ["MASTER_PORT"])

    @staticmethod
    def detect() -> bool:
        """Whether there was a launcher."""
        return ranks.launched()

    def world_size(self) -> int:
        """Processes of the run."""
        return ranks.size()

    def set_world_size(self, size: int) -> None:
        """Leave it as the launcher says."""

    def global_rank(self) -> int:
        """This process."""
        return ranks.rank()

    def set_global_rank(self, rank: int) -> None:
        """Leave it as the launcher says."""

    def local_rank(self) -> int:
        """The one device of its machine."""
        return 0

    def node_rank(self) -> int:
        """This process."""
        return ranks.rank()


class _SavedByAll:
    """Hands a checkpoint to the CheckpointIO of every process: the store is used by all in step."""

    checkpoint_io: Any

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save on all processes; the store writes on rank 0."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all, beside the accelerator's work."""
        ranks.most([0])


class Replicas(_SavedByAll, DDPStrategy):
    """Every process holds the whole model (trainer.strategy=ddp); `average_gradients` joins their steps.

    torch's DistributedDataParallel is not used: it averages during the last backward pass only what that pass reaches,
    while a step's earlier micro-batches may reach other soft prompts or adapters, and it holds all gradients twice.
    """

    def configure_ddp(self) -> None:
        """Leave the module as it is."""


class Shards(_SavedByAll, ModelParallelStrategy):
    """Weights, gradients and optimizer state are split over the processes while a phase trains (FSDP2).

    Before and behind a phase every process has the whole model: methods, evaluation and the store see plain tensors.
    That takes the model once in each process's host memory while a phase trains, and once on each device elsewhere.
    What is saved has the form that one process saves.
    """

    lightning_restore_optimizer = True  # type: ignore[assignment]

    def shard(self, model: nn.Module) -> nn.Module:
        """Make a sharded twin of a model on the host, layer by layer; the model's own tensors stay as they are."""
        twin = _twin(model)
        mesh = self.device_mesh["data_parallel"]
        layers = {name for one in twin.modules() for name in getattr(one, "_no_split_modules", None) or ()}
        for module in list(twin.modules()):
            if type(module).__name__ in layers:
                fully_shard(module, mesh=mesh)
        fully_shard(twin, mesh=mesh)
        return twin

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: checkpoints take weights from the model."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Collect an optimizer's state from all processes, as one process would have it, on the host."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return {**state, "state": map_tensors(state["state"], lambda one: whole(one).cpu())}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's part of what `optimizer_state` gave."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_optimizer(optimizer, saved)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Take what the CheckpointIO has; the weights are in the model before it is split."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path)


class Zero(_SavedByAll, DDPStrategy):
    """Weights, gradients and optimizer state are split over the processes while a phase trains (DeepSpeed's ZeRO-3).

    As with `Shards`, all is whole before and behind a phase, and what is saved has the form that one process saves.
    Lightning's DeepSpeedStrategy is not used: it has checkpoints of its own, refuses a CPU, and takes one pass a step.

    Args:
        config: DeepSpeed's configuration, `trainer.deepspeed`.
    """

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self.config = config
        self.engine: zero.Engine | None = None
        """While a phase trains."""

    def shard(self, model: nn.Module) -> nn.Module:
        """Make a twin of a model on the host, to be split by `setup`; the model's own tensors stay as they are."""
        return _twin(model)

    def setup(self, trainer: Any) -> None:
        """Build the optimizer over whole weights, then split both."""
        module: Any = self.lightning_module
        self.accelerator.setup(trainer)  # type: ignore[union-attr]
        self.setup_optimizers(trainer)
        config = zero.engine_config(self.config, module.clip_norm)
        self.engine = zero.Engine(module.model, self.optimizers[0], config, self.root_device)
        self.model_to_device()
        self.setup_precision_plugin()

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **keywords: Any) -> Any:
        """Take the passes of a step and call the hooks behind them, then let DeepSpeed clip and step."""
        result = self.precision_plugin._wrap_closure(self.lightning_module, optimizer, closure)  # type: ignore[arg-type]
        self.engine.step()  # type: ignore[union-attr]
        return result

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: checkpoints take weights from the model."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Collect the optimizer's state from all processes, as one process would have it, on the host."""
        return self.engine.state()  # type: ignore[union-attr]

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's part of what `optimizer_state` gave."""
        (saved,) = checkpoint["optimizer_states"]
        self.engine.load(saved)  # type: ignore[union-attr]

    def teardown(self) -> None:
        """Take DeepSpeed's hooks off; weights and optimizer stay split where they are, until they are read."""
        if self.engine is not None:
            self.engine.close()
        self.precision_plugin.teardown()
        self.accelerator.teardown()  # type: ignore[union-attr]


STRATEGIES: Mapping[str, Callable[..., Any]] = {"ddp": Replicas, "fsdp": Shards, "deepspeed": Zero}
"""By the value of trainer.strategy."""
SHARDED = ("fsdp", "deepspeed")
"""Those under which no process has a whole weight while a phase trains."""


def build_trainer(partial: Callable[..., Trainer], *, plugins: Iterable[Any] = (), **settings: Any) -> Trainer:
    """Build a Trainer for this process's device; it writes and shows nothing by itself.

    Args:
        partial: Built from the `trainer` node.
        plugins: Beside those of the node.
        settings: Arguments of Trainer that replace those of the node.
    """
    given, config = dict(getattr(partial, "keywords", {})), {}
    if "deepspeed" in given:  # no argument of the Trainer
        config = given.pop("deepspeed")
        partial = bound(partial.func, **given)  # type: ignore[attr-defined]
    plugins = [*(given.get("plugins") or ()), *plugins]
    if (strategy := STRATEGIES.get(given.get("strategy", "auto"))) is not None:
        device = device_of(given)
        settings |= {"strategy": strategy(config) if strategy is Zero else strategy(), "num_nodes": ranks.size()}
        settings["devices"] = [device.index] if device.type == "cuda" else 1
        plugins = [*plugins, Launched()]
    return partial(
        **settings,
        plugins=plugins,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def device_of(trainer: Mapping[str, Any]) -> torch.device:
    """Say which device is this process's, by the `trainer` node: of several GPUs that of its local rank."""
    if trainer.get("accelerator") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", ranks.local_rank() if torch.cuda.device_count() > ranks.local_rank() else 0)


def average_gradients(weights: Iterable[nn.Parameter], missing: bool) -> None:
    """Replace every gradient by the mean over the processes; one that a process lacks counts as 0.

    Args:
        weights: What trains, in the same order on all processes.
        missing: Whether any process lacks a gradient.
    """
    weights = list(weights)
    if missing:
        has = ranks.most([weight.grad is not None for weight in weights])
        weights = [weight for weight, there in zip(weights, has, strict=True) if there]
        for weight in weights:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    average([weight.grad for weight in weights])  # type: ignore[misc]


def average(tensors: list[Tensor]) -> None:
    """Replace tensors by their means over the processes."""
    waiting: list[Any] = []
    small: dict[torch.dtype, list[Tensor]] = {}
    joined: list[tuple[Tensor, list[Tensor]]] = []
    for tensor in tensors:
        if tensor.numel() < _SMALL or not tensor.is_contiguous():
            small.setdefault(tensor.dtype, []).append(tensor)
        else:
            waiting.append(dist.all_reduce(tensor.div_(ranks.size()), async_op=True))
    for group in small.values():
        flat = torch.cat([tensor.flatten() for tensor in group]).div_(ranks.size())
        waiting.append(dist.all_reduce(flat, async_op=True))
        joined.append((flat, group))
    for work in waiting:
        work.wait()
    for flat, group in joined:
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def whole(tensor: Tensor) -> Tensor:
    """Collect a tensor that is split over the processes; all of them ask for it. Others are returned as they are."""
    if zero.is_split(tensor):
        return zero.gathered(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _twin(model: nn.Module) -> nn.Module:
    """Copy a model's modules; its parameters are new ones of the same data."""
    return copy.deepcopy(model, {id(one): nn.Parameter(one.data, one.requires_grad) for one in model.parameters()})


def put_whole(model: nn.Module, twin: nn.Module) -> None:
    """Copy the weights of a sharded twin back, one collected tensor at a time."""
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
            own[name].copy_(whole(tensor))


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load an optimizer's state, split as its weights are."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def part(index: int, value: Any) -> Any:
        weight = weights[index]
        if not isinstance(weight, DTensor) or not isinstance(value, Tensor) or value.shape != weight.shape:
            return value
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)

    state = {
        index: {name: part(index, value) for name, value in values.items()} for index, values in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change all tensors in nested mappings."""
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, change) for key, value in tree.items()}
    return change(tree) if isinstance(tree, Tensor) else tree
