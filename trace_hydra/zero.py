"""DeepSpeed's ZeRO-3 behind the few calls that a step needs (trainer=deepspeed, extra `deepspeed`).

DeepSpeed keeps flat parts of weights, gradients and optimizer state on each process and brings a layer's weights
together while a pass is in it. What leaves this module has the form that one process has.
"""

import argparse
import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trace_hydra import ranks

T = TypeVar("T")
INSTALL = "pip install --no-build-isolation 'trace-hydra[deepspeed]'"
_OWN = ("zero_optimization", "zero_allow_untested_optimizer", "wall_clock_breakdown", "comms_logger", "dump_state")
"""Keys of DeepSpeed's configuration that leave a step what it is in one process."""
_ROUNDING = ("zero_quantized_", "zeropp_", "zenflow", "offload_", "mics_")
"""Beginnings of keys of zero_optimization that change numbers, or that nobody has tried here."""
_PRECISIONS = ("32-true", "32", "bf16-mixed")
_OPTIMIZERS = ("AdamW", "Adam", "SGD", "RMSprop", "NAdam", "RAdam", "Adamax")
"""Of torch.optim: those that treat every number of a weight alone; ZeRO-3 hands them flat parts of many weights."""


def problems(config: Any) -> Iterator[str]:
    """List what keeps a run (its whole configuration) from training with trainer.strategy=deepspeed."""
    trainer = config.trainer
    given: Mapping[str, Any] = trainer.get("deepspeed") or {}
    if find_spec("deepspeed") is None:
        yield f"trainer.strategy=deepspeed needs the package deepspeed: {INSTALL}."
    if (stage := (given.get("zero_optimization") or {}).get("stage")) != 3:
        yield f"trainer.deepspeed.zero_optimization.stage={stage} must be 3. Take trainer=ddp where weights fit whole."
    if other := sorted(key for key in given if key not in _OWN):
        yield (
            f"trainer.deepspeed.{other[0]}: not taken; batch, precision, clipping and optimizer of a run stand in "
            f"budget, trainer.precision and optim. DeepSpeed hears of {', '.join(_OWN)}."
        )
    for key, value in (given.get("zero_optimization") or {}).items():
        if key.startswith(_ROUNDING) and value:
            yield f"trainer.deepspeed.zero_optimization.{key}={value}: not supported. Leave it out."
    if str(trainer.get("precision")) not in _PRECISIONS:
        yield (
            f"trainer.precision={trainer.get('precision')} with trainer.strategy=deepspeed: set bf16-mixed or 32-true."
        )
    if (dtype := config.model.get("dtype")) not in (None, "float32"):
        yield f"model.dtype={dtype} with trainer.strategy=deepspeed: it splits weights of one type. Set float32."
    target = str((config.optim.get("optimizer") or {}).get("_target_"))
    if target.rpartition(".")[2] not in _OPTIMIZERS:
        yield (
            f"optim.optimizer._target_={target} with trainer.strategy=deepspeed: it must treat every number of a "
            f"weight alone. Use one of torch.optim: {', '.join(_OPTIMIZERS)}."
        )


def engine_config(given: Mapping[str, Any], clip_norm: float | None) -> dict[str, Any]:
    """Complete what trainer.deepspeed says: a micro-batch's share of the step is in its loss, so none is scaled."""
    return {
        **copy.deepcopy(dict(given)),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm or 0.0,
        "steps_per_print": None,
    }


class Engine:
    """A model that is split from now on, in place, and its optimizer.

    Args:
        model: Whole weights, on the host.
        optimizer: Over those that train; DeepSpeed hands it flat parts of them from now on. Its state is split too.
        config: DeepSpeed's, see `engine_config`.
        device: Of this process.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any], device: torch.device
    ):
        self._device, self._optimizer, self._dropped = device, optimizer, False
        self._sizes = [len(group["params"]) for group in optimizer.param_groups]
        self._weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        before = optimizer.state_dict()
        optimizer.state.clear()
        with _told_of(device):
            import deepspeed  # type: ignore[import-not-found]

            deepspeed.init_distributed(dist_init_required=False)
            deepspeed.zero.Init(module=model, config_dict_or_path=dict(config), dtype=torch.float32)
            self._engine, *_ = deepspeed.initialize(
                args=argparse.Namespace(device_rank=device.index or 0),
                model=_Passes(model),
                optimizer=optimizer,
                model_parameters=self._weights,
                config=dict(config),
                dist_init_required=False,
            )
        self.load(before)

    def begin(self) -> None:
        """Begin a step without gradients; a weight that the step does not reach keeps none of the last one."""
        self._dropped = False
        self._engine.optimizer.zero_grad()
        self._engine.optimizer.grad_partitions_flat_buffer.zero_()

    def boundary(self, last: bool) -> None:
        """Say whether the next micro-batch is the last of its step."""
        self._engine.set_gradient_accumulation_boundary(last)

    def forward(self, call: Callable[[], T]) -> T:
        """Call something that takes a forward pass; the engine must see each pass begin and end.

        The engine ends autocast, so it is begun again, without its cache: that would hold the casts of all weights.
        """
        kind = self._device.type
        on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

        def inner() -> T:
            with torch.autocast(kind, dtype=dtype, enabled=on, cache_enabled=False):
                return call()

        return self._engine(inner)

    def backward(self, loss: Tensor) -> None:
        """Take a backward pass; gradients are averaged over the processes and added to this process's part."""
        self._engine.backward(loss)

    def norm(self) -> Tensor:
        """Norm of the step's gradient over all processes, before clipping."""
        from deepspeed.utils import safe_get_local_grad  # type: ignore[import-not-found]

        norms = torch._foreach_norm([safe_get_local_grad(weight) for weight in self._weights], 2)  # type: ignore
        return ranks.total(torch.stack(norms).square().sum()).sqrt()

    def drop(self) -> None:
        """Take no step with these gradients."""
        self._dropped = True

    def step(self) -> None:
        """Clip, and change the weights, unless the step was dropped."""
        if not self._dropped:
            self._engine.step()

    def state(self) -> dict[str, Any]:
        """Collect the optimizer's state from all processes, as one process would have it, on the host."""
        from deepspeed.utils import safe_get_full_optimizer_state  # type: ignore[import-not-found]

        flat: Mapping[str, Any] = next(iter(self._optimizer.state.values()), {})
        state: dict[int, dict[str, Any]] = {}
        for index, weight in enumerate(self._weights) if flat else ():
            state[index] = {
                name: _on_host(safe_get_full_optimizer_state(weight, name) if _is_split(value) else value)
                for name, value in flat.items()
            }
        groups, first = [], 0
        for group, size in zip(self._optimizer.param_groups, self._sizes, strict=True):
            groups.append({**group, "params": list(range(first, first + size))})
            first += size
        return {"state": state, "param_groups": groups}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take this process's part of an optimizer's state in the form of one process."""
        for group, options in zip(self._optimizer.param_groups, saved["param_groups"], strict=True):
            group.update({name: value for name, value in options.items() if name != "params"})
        state: Mapping[int, Mapping[str, Any]] = saved["state"]
        if not state:
            return
        from deepspeed.utils import safe_set_local_optimizer_state  # type: ignore[import-not-found]

        on_device = any(group.get("fused") or group.get("capturable") for group in self._optimizer.param_groups)
        for part in self._engine.optimizer.fp32_partitioned_groups_flat:
            own = self._optimizer.state[part] = {}
            for name, value in state[0].items():
                own[name] = torch.zeros_like(part) if _is_split(value) else copy.deepcopy(value)
                if on_device and isinstance(value, Tensor) and not _is_split(value):
                    own[name] = own[name].to(part.device)  # where such an optimizer counts its steps
        for index, weight in enumerate(self._weights):
            for name, value in state[index].items():
                if _is_split(value):
                    safe_set_local_optimizer_state(weight, _part(value, weight), name)

    def close(self) -> None:
        """Let the model go; its weights stay split."""
        self._engine.destroy()


class _Passes(nn.Module):
    """What the engine calls as its model: anything that takes a pass through the model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[], T]) -> T:
        return call()


def is_split(tensor: Tensor) -> bool:
    """Whether DeepSpeed has split a weight."""
    return hasattr(tensor, "ds_id")


def gathered(weight: Tensor) -> Tensor:
    """Collect a weight from all processes; all of them ask for it."""
    import deepspeed  # type: ignore[import-not-found]

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()


def _is_split(value: Any) -> bool:
    """Whether a value of an optimizer's state is one number for each of a weight's; others count steps."""
    return isinstance(value, Tensor) and value.dim() > 0


def _on_host(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _part(value: Tensor, weight: Any) -> Tensor:
    """Cut out this process's part of what belongs to a weight, with zeros behind the end."""
    size = weight.ds_tensor.numel()
    part = torch.zeros(size, dtype=torch.float32, device=weight.ds_tensor.device)
    own = value.flatten()[ranks.rank() * size : (ranks.rank() + 1) * size]
    part[: len(own)].copy_(own)
    return part


@contextmanager
def _told_of(device: torch.device) -> Iterator[None]:
    """Tell DeepSpeed by the environment which device is this process's, and keep it from printing."""
    before = os.environ.get("LOCAL_RANK")
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of the autocast that `forward` begins again
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before
