"""`debug=cost`: what a run would take, from shapes and row counts, without weights. Formulas: `cost_model`."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from trace_hydra import build, keys
from trace_hydra.build import Parts
from trace_hydra.cost_model import Memory, Precision, optimizer_bytes, run_size, shape_of
from trace_hydra.cost_rows import RunRows, rows_of
from trace_hydra.errors import ConfigError, problem_list
from trace_hydra.evaluate import cells_to_score
from trace_hydra.files import write_json
from trace_hydra.prepare import plan_passes
from trace_hydra.sizes import RunSize, StateSize

ADVICE = {
    "weights": "model.dtype=bfloat16 if they are frozen, or a smaller model",
    "copies of the weights (autocast)": "model.dtype=bfloat16 if they are frozen, trainer.precision=bf16-true",
    "gradients": "tuning=lora",
    "optimizer": "tuning=lora, or another optim.optimizer",
    "activations": "model.gradient_checkpointing=true, budget.micro_batch_size, protocol.max_prompt_tokens",
    "logits": "budget.micro_batch_size, protocol.max_answer_tokens",
    "generation": "evaluation.batch_tokens",
    "method": "tuning=lora, or the values of method.*",
    "method: state": "tuning=lora, or the values of method.*",
    "method: while training": "tuning=lora, or the values of method.*",
    "the device's share (trainer.accelerator=cpu)": "tuning=lora, or a smaller model",
}
"""What lowers an item."""


@dataclass(frozen=True)
class Estimate:
    """What a run would take; memory in bytes."""

    size: RunSize
    state: StateSize
    trained: float
    """Weights that train at once."""
    parameters: int
    device: Mapping[str, float]
    """Items while training; "generation" stands in place of everything that only training needs."""
    device_total: float
    host: Mapping[str, float]
    compute: Mapping[str, float]
    notes: tuple[str, ...]


def report(config: DictConfig, directory: Path) -> None:
    """Estimate, print tables and a verdict, and write cost.json.

    Raises:
        TraceHydraError: What a user can cause.
    """
    parts = build.validate(config, files=False)
    if problems := list(_problems(config)):
        raise ConfigError(problem_list(problems))
    estimate = estimate_run(config, parts)
    verdicts = [
        _verdict("device", estimate.device_total, config.cost.device_gb, estimate.device),
        _verdict("host", sum(estimate.host.values()), config.cost.host_gb, estimate.host),
    ]
    path = directory / "cost.json"
    write_json(_json(config, estimate, verdicts), path)
    _show(config, estimate, [str(one["text"]) for one in verdicts], path)


def estimate_run(
    config: DictConfig, parts: Parts, rows: RunRows | None = None, model: nn.Module | None = None
) -> Estimate:
    """Estimate a run whose parts are built; rows are counted and its `skeleton` is built unless they are given.

    Raises:
        ConfigError: If neither the model's architecture nor the rows are known.
    """
    rows = rows or rows_of(config, parts)
    model = skeleton(parts) if model is None else model
    memory = memory_of(config, parts, model)
    size = run_size(memory, rows, config.budget.micro_batch_size, len(parts.tuning.prefix(model)))
    state = parts.method.state_size(size)
    trained = float(size.num_trainable) if state.trained is None else state.trained
    training = _training(config, parts, memory, rows, size, state, trained)
    generation = memory.generation(_generation_tokens(config, rows))
    carried = training.get("optimizer", 0.0) if config.optim.carry else 0.0
    total = max(sum(training.values()), training["weights"] + carried + generation)
    device, host = {**training, "generation": generation}, _host(training, state)
    if config.trainer.get("accelerator") == "cpu":
        device, total, host = {}, 0.0, {**host, "the device's share (trainer.accelerator=cpu)": total}
    notes = (*rows.notes, "time and the method's extra passes are not estimated: see Compute in its docstring")
    parameters = sum(memory.shape.count([name]) for name in memory.shape.weights)
    return Estimate(
        size, state, trained, parameters, device, total, host, _compute(config, parts, memory, rows, size), notes
    )


def skeleton(parts: Parts) -> nn.Module:
    """Build the model that would train on the meta device; the global random state stays as it was."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        warnings.simplefilter("ignore")
        return parts.tuning.apply(parts.model.skeleton())


def memory_of(config: DictConfig, parts: Parts, model: nn.Module) -> Memory:
    """Apply the formulas to a run's model, on the meta device or any other."""
    return Memory(
        shape_of(model),
        Precision.of(config.trainer.get("precision") or "32-true"),
        eager=parts.model.attn_implementation == "eager",
        checkpointing=bool(parts.model.gradient_checkpointing),
    )


def _training(
    config: DictConfig, parts: Parts, memory: Memory, rows: RunRows, size: RunSize, state: StateSize, trained: float
) -> dict[str, float]:
    """Items on the device while a stage trains."""
    found = {"weights": memory.weights()}
    share = trained / max(1, size.num_trainable)
    if trained:
        gradients = memory.trained(size.trainable) * share
        labels = size.micro_batch * max(task.longest_answer for task in rows.tasks)
        found |= {
            "gradients": gradients,
            "optimizer": trained * optimizer_bytes(parts.optimizer, size.weight_bytes),
            "copies of the weights (autocast)": memory.copies(),
            "activations": size.activation_bytes,
            "logits": memory.logits(labels),
        }
    return found | {"method": state.device}


def _host(training: Mapping[str, float], state: StateSize) -> dict[str, float]:
    return {
        "weights": training["weights"],  # they are loaded there first
        "method: state": state.stored,
        "method: while training": state.host,
    }


def _generation_tokens(config: DictConfig, rows: RunRows) -> float:
    longest = max(task.longest_prompt + task.max_new_tokens for task in rows.tasks)
    return max(config.evaluation.batch_tokens, longest)


def _compute(config: DictConfig, parts: Parts, memory: Memory, rows: RunRows, size: RunSize) -> dict[str, float]:
    """Work of the whole run: tokens, answers, FLOPs."""
    names = [task.name for task in rows.tasks]
    passes = plan_passes(config.budget, parts.method, names, size.rows, size.row_tokens, size.alignment)
    evaluation = config.evaluation
    cells = cells_to_score(
        evaluation.cells, names, row0=evaluation.row0, next_task=evaluation.next_task, own=parts.method.cells
    )
    by_name = {task.name: task for task in rows.tasks}
    tokens = sum(one[3] for one in passes)
    mean = size.mean_row_bytes and sum(
        rows * tokens for rows, tokens in zip(size.rows, size.row_tokens, strict=True)
    ) / sum(size.rows)
    per_token = memory.train_flops(mean, size.mean_answer_tokens) / max(1.0, mean)
    answers = new = flops = 0.0
    for _, name in cells:
        task = by_name[name]
        answers += task.test
        new += task.test * task.max_new_tokens
        flops += task.test * memory.forward_flops(task.prompt_tokens + task.max_new_tokens, task.max_new_tokens)
    return {
        "optimizer steps": sum(one[2] for one in passes),
        "tokens trained": tokens,
        "training FLOPs": tokens * per_token,
        "answers": answers,
        "answer tokens, at most": new,
        "answering FLOPs, at most": flops,
    }


def _problems(config: DictConfig) -> list[str]:
    return [
        f"cost.{key}={config.cost[key]} must be above 0; it is a memory in 10^9 bytes."
        for key in ("device_gb", "host_gb")
        if not config.cost[key] > 0
    ]


def _verdict(place: str, total: float, budget_gb: float, items: Mapping[str, float]) -> dict[str, Any]:
    if not items:
        return {"fits": True, "text": f"{place}: not used", "largest": None}
    largest = max(items, key=lambda name: items[name])
    fits = total <= budget_gb * 1e9
    text = f"{place}: {_gb(total)} of {budget_gb:g} GB (cost.{place}_gb): {'fits' if fits else 'does not fit'}"
    text += f". Largest: {largest}, {_gb(items[largest])} GB; lowered by {ADVICE[largest]}."
    return {"fits": fits, "text": text, "largest": largest}


def _json(config: DictConfig, estimate: Estimate, verdicts: list[dict[str, Any]]) -> dict[str, Any]:
    names = {node: keys.name_of(config, node) for node in ("model", "method", "tuning", "data", "task_order")}
    return {
        **names,
        "parameters": estimate.parameters,
        "trainable": estimate.trained,
        "device_bytes": {**estimate.device, "total": estimate.device_total},
        "host_bytes": {**estimate.host, "total": sum(estimate.host.values())},
        "budget_gb": {"device": config.cost.device_gb, "host": config.cost.host_gb},
        "verdict": {"device": verdicts[0], "host": verdicts[1]},
        "compute": dict(estimate.compute),
        "notes": list(estimate.notes),
    }


def _show(config: DictConfig, estimate: Estimate, verdicts: list[str], path: Path) -> None:
    console = Console(width=max(Console().width, 88))
    names = (keys.name_of(config, node) for node in ("model", "method", "tuning", "data"))
    title = f"{' · '.join(names)}: {estimate.parameters:,} weights, {estimate.trained:,.0f} train"
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    table = Table()
    for column in ("", "item", "GB"):
        table.add_column(column, justify="right" if column == "GB" else "left", no_wrap=True)
    for place, items, total in (
        ("device", estimate.device, estimate.device_total),
        ("host", estimate.host, sum(estimate.host.values())),
    ):
        for name, amount in items.items():
            table.add_row(place, name, _gb(amount))
        if items:
            table.add_row(place, "at most at once", _gb(total), end_section=True)
    for name, amount in estimate.compute.items():
        table.add_row("run", name, f"{amount:,.0f}" if amount < 1e12 else f"{amount:.3g}")
    console.print(table)
    for line in (*estimate.notes, *verdicts, f"written: {path}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _gb(amount: float) -> str:
    """Write 10^9 bytes with a digit behind the point, small amounts with two digits."""
    return f"{amount / 1e9:,.1f}" if amount >= 1e8 or not amount else f"{amount / 1e9:.2g}"
