"""What can be wrong with how many processes and devices a run has."""

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig

from trace_hydra import ranks, zero
from trace_hydra.keys import name_of
from trace_hydra.methods.base import Method
from trace_hydra.models.compiled import compile_problems
from trace_hydra.models.kernels import kernel_problems
from trace_hydra.strategies import SHARDED, STRATEGIES

_HOW = "torchrun --nproc-per-node <devices> -m trace_hydra trainer=ddp ..."


def with_lightning_trainer(plain: Any) -> Any:
    """Take from the `trainer` node of a resolved configuration what is ours, not Lightning's."""
    if not isinstance(trainer := plain.get("trainer"), Mapping):
        return plain
    return {**plain, "trainer": {key: value for key, value in trainer.items() if key != "compile"}}


def device_problems(config: DictConfig) -> Iterator[str]:
    """List problems of the `trainer` node with the processes that a launcher started."""
    trainer = config.trainer
    strategy, devices, nodes = trainer.get("strategy", "auto"), trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if devices not in (1, "1", [0]) or nodes != 1:
        yield (
            f"trainer.devices={devices}, trainer.num_nodes={nodes}: a process uses one device. Set trainer.devices=1; "
            f"for several, {_HOW}."
        )
    if strategy not in ("auto", *STRATEGIES):
        yield f"trainer.strategy={strategy} is none of auto, {', '.join(STRATEGIES)}."
    elif strategy in STRATEGIES and not ranks.launched():
        yield f"trainer.strategy={strategy} needs a process for each device: {_HOW}."
    elif strategy == "auto" and ranks.size() > 1:
        yield (
            f"{ranks.size()} processes were started for one run (WORLD_SIZE={ranks.size()}), but trainer.strategy=auto "
            "uses one. Set trainer=ddp, trainer=fsdp or trainer=deepspeed."
        )
    if strategy == "deepspeed":
        yield from zero.problems(config)
    if trainer.get("compile") and config.model.get("gradient_checkpointing"):
        yield (
            "trainer.compile=true with model.gradient_checkpointing=true: torch.compile leaves such layers as they "
            "are. Set one of them to false."
        )
    if strategy in SHARDED and trainer.get("compile"):
        yield (
            f"trainer.compile=true with trainer.strategy={strategy}: split weights are not compiled. Set "
            "trainer.compile=false, or use trainer=ddp."
        )
    if strategy in SHARDED and config.on_oom == "halve":
        yield (
            f"on_oom=halve with trainer.strategy={strategy}: while one process is out of memory, the others wait for "
            "its part of the weights. Set on_oom=stop."
        )


def machine_problems(config: DictConfig) -> Iterator[str]:
    """List what this machine lacks of compilers and kernels; for an estimate it need not have them."""
    yield from compile_problems(config.trainer.get("compile", False))
    yield from kernel_problems(config.model.get("kernels") or "torch", str(config.trainer.get("accelerator")))


def shard_problems(config: DictConfig, method: Method) -> Iterator[str]:
    """List what a method cannot do where no process has whole weights."""
    if (strategy := config.trainer.get("strategy", "auto")) in SHARDED and not method.sharded:
        yield (
            f"method={name_of(config, 'method')} with trainer.strategy={strategy}: the method works on whole weights "
            "or gradients while it trains, and no process has them. Use trainer=ddp."
        )
    if strategy in SHARDED and config.model.get("quantization"):
        yield (
            f"model.quantization={config.model.quantization} with trainer.strategy={strategy}: 4-bit weights are not "
            "split. Use trainer=ddp."
        )
