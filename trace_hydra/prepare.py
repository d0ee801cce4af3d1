"""From rows to a plan: what will be trained and scored, in tokens, before a model is loaded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.table import Table

from trace_hydra import inputs, keys
from trace_hydra.build import Parts, measured_rows
from trace_hydra.context import TrainTask
from trace_hydra.data.encode import Encoder
from trace_hydra.data.options import closed_options, option_problems
from trace_hydra.data.rows import is_unicode
from trace_hydra.data.task import Task, TaskData
from trace_hydra.errors import DataError, problem_list
from trace_hydra.evaluate import cells_to_score
from trace_hydra.methods.base import Method
from trace_hydra.plan import RunInfo, Stage
from trace_hydra.shown import print_table, say
from trace_hydra.store.tokens import TokenFiles

DISCLOSED = ("sees_all_tasks", "sees_task_id", "grad_at_test", "merges", "makes_rows", "cells")
"""What a method declares about itself and every report shows."""


@dataclass(frozen=True)
class Prepared:
    """What is known before the model is loaded."""

    run: RunInfo
    tasks: dict[str, Task]
    views: dict[str, TrainTask]
    data: TaskData
    tokenizer: Any
    encoder: Encoder
    truncated: dict[str, dict[str, int]]
    """Task -> split -> rows that the length limits cut."""
    entries: dict[str, dict[str, Any]]
    """What decides each entry of the store: by "stages/<key>" in order, and by "answers/<row>/<task>"."""


def prepare(
    config: DictConfig,
    parts: Parts,
    directory: Path,
    count: Callable[[Task, str, Encoder], tuple[dict[str, int], int]] | None = None,
    micro: Mapping[int, int] | None = None,
    plain: Mapping[str, Any] | None = None,
) -> Prepared:
    """Read rows and tokenizer and plan the run that will write to `directory`.

    Args:
        config: The run's, validated.
        parts: Built from it.
        directory: Of the run.
        count: Replaces `count_task`; the plan of a sweep counts what its jobs share once.
        micro: Stage -> rows of a forward pass, where it is not `budget.micro_batch_size`.
        plain: The same configuration, resolved, if the caller has it.

    Raises:
        DataError: If rows cannot be read, or the method cannot train on them.
        ConfigError: If the tokenizer cannot do what the protocol asks.
    """
    plain = inputs.resolved(config if plain is None else plain)
    data = parts.data.load(list(parts.specs), seed=config.seed.data)
    tokenizer = parts.model.load_tokenizer()
    protocol = config.protocol
    encoder = Encoder.of(tokenizer, protocol)
    encoder.cache = TokenFiles(Path(config.paths.store))
    views = {name: _view(task, protocol) for name, task in data.tasks.items()}
    if problems := [problem for view in views.values() for problem in parts.method.row_problems(view)]:
        raise DataError(f"method={keys.name_of(config, 'method')}: {problem_list(problems)}")
    if problems := _option_problems(data, views, encoder):
        raise DataError(f"protocol.closed_answers={protocol.closed_answers}: {problem_list(problems)}")
    counts = {name: (count or count_task)(task, views[name].instruction, encoder) for name, task in data.tasks.items()}
    truncated = {name: cut for name, (cut, _) in counts.items()}
    tokens = {name: number for name, (_, number) in counts.items()}
    own = parts.method.cells
    evaluation = config.evaluation
    cells = cells_to_score(
        evaluation.cells, list(data.tasks), row0=evaluation.row0, next_task=evaluation.next_task, own=own
    )
    entries = _entries(config, plain, parts, data, views, encoder, cells, micro or {})
    stage_keys = [name.removeprefix("stages/") for name in entries if name.startswith("stages/")]
    run = RunInfo(
        name=directory.name,
        directory=directory,
        **{node: keys.name_of(config, node) for node in ("model", "method", "tuning", "data", "task_order")},
        tasks=tuple(data.tasks),
        seed=config.seed.train,
        protocol=protocol.name,
        fingerprint=_fingerprint(plain["protocol"], data, encoder),
        config=plain,
        stages=tuple(_plan_stages(config, parts, data, tokens, stage_keys, micro or {})),
        cells=tuple((row, task, len(data.tasks[task].test)) for row, task in cells),
        answers={(row, task): inputs.key_of(entries[f"answers/{row}/{task}"]) for row, task in cells},
        measured=(0, *measured_rows(config)) if parts.capability else (),
        disclosures={key: getattr(parts.method, key) for key in DISCLOSED} | _disclosed(views),
    )
    return Prepared(run, data.tasks, views, data, tokenizer, encoder, truncated, entries)


def show_plan(prepared: Prepared) -> None:
    """Print what will be done: a table of stages, and the cells that will be scored."""
    run = prepared.run
    table = Table(
        title=f"{run.model} · {run.method} · {run.tuning} · {run.data} · seed {run.seed}", title_justify="left"
    )
    for column in ("stage", "task", "rows", "epochs", "steps", "tokens", "cut rows"):
        table.add_column(column, justify="left" if column == "task" else "right", no_wrap=True)
    for stage in run.stages:
        cut = prepared.truncated[stage.task]["train"]
        numbers = (stage.rows, stage.epochs, stage.steps, stage.tokens, cut)
        table.add_row(str(stage.index), stage.task, *(f"{number:,}" for number in numbers))
    print_table(table)
    generations = sum(count for _, _, count in run.cells)
    say(
        f"protocol {run.protocol} [{run.fingerprint}]: {len(run.cells)} cells, {generations:,} answers; "
        f"results go to {run.directory}"
    )


def token_counter(prepared: Prepared) -> Callable[[str], int]:
    """Count the tokens of any text; the run's own rows are counted now, in batches, which is ten times faster."""
    splits = [rows for task in prepared.tasks.values() for rows in (task.train, task.eval, task.test)]
    texts = [text for rows in splits for row in rows for text in (row.prompt, row.answer) if is_unicode(text)]
    known = dict(zip(texts, prepared.encoder.lengths(texts), strict=True))
    return lambda text: known[text] if text in known else len(prepared.encoder.text_ids([text])[0])


def _view(task: Task, protocol: Any) -> TrainTask:
    decoding = protocol.decoding
    return TrainTask(
        name=task.name,
        train=task.train,
        instruction=task.instruction,
        max_new_tokens=decoding.max_new_tokens or task.spec.max_new_tokens,
        stop=task.spec.stop if decoding.stop else (),
        language=task.spec.language,
        options=closed_options(task.spec, protocol),
    )


def _option_problems(data: TaskData, views: Mapping[str, TrainTask], encoder: Encoder) -> list[str]:
    tasks = [(task, views[name]) for name, task in data.tasks.items()]
    return [
        problem for task, view in tasks for problem in option_problems(task, view.options, encoder, view.max_new_tokens)
    ]


def _disclosed(views: Mapping[str, TrainTask]) -> dict[str, str]:
    """Name the tasks whose answers are chosen; nothing where all are generated."""
    chosen = [name for name, view in views.items() if view.options]
    return {"closed_answers": f"log-likelihood of the options of {', '.join(chosen)}"} if chosen else {}


def count_task(task: Task, instruction: str, encoder: Encoder) -> tuple[dict[str, int], int]:
    """Count a task's rows that the limits cut, by split, and the train tokens of one pass."""
    rows = encoder.pairs(task.train, instruction)
    _, cut = encoder.prompts([example.prompt for example in task.test], instruction)
    return {"train": sum(row.truncated for row in rows), "test": cut}, sum(len(row.ids) for row in rows)


def _plan_stages(
    config: DictConfig,
    parts: Parts,
    data: TaskData,
    tokens: Mapping[str, int],
    identities: Sequence[str],
    micro: Mapping[int, int],
) -> list[Stage]:
    budget = config.budget
    counts = [len(task.train) for task in data.tasks.values()]
    mean_tokens = [tokens[name] / count for name, count in zip(data.tasks, counts, strict=True)]
    passes = plan_passes(budget, parts.method, list(data.tasks), counts, mean_tokens, len(data.alignment))
    return [
        Stage(index, name, *planned, key, micro.get(index, 0), parts.method.stages_apart)
        for index, (name, planned, key) in enumerate(zip(data.tasks, passes, identities, strict=True), start=1)
    ]


def _entries(
    config: DictConfig,
    plain: Mapping[str, Any],
    parts: Parts,
    data: TaskData,
    views: Mapping[str, TrainTask],
    encoder: Encoder,
    cells: Sequence[tuple[int, str]],
    micro: Mapping[int, int],
) -> dict[str, dict[str, Any]]:
    """Say what decides each entry of the store that the run needs, by name; see `inputs`."""
    epochs = {name: epochs_of(config.budget, name) for name in data.tasks}
    shared, stages = inputs.stage_inputs(plain, parts, data, views, epochs)
    found: dict[str, dict[str, Any]] = {}
    states = [inputs.key_of(inputs.start_inputs(plain, parts))]
    apart = parts.method.stages_apart
    for index, own in enumerate(stages, start=1):
        own["micro_batch_size"] = micro.get(index, config.budget.micro_batch_size)
        whole = {"run": shared, "stage": own, "previous": states[-1] if found and not apart else None}
        states.append(inputs.key_of(whole))
        found[f"stages/{states[-1]}"] = whole
    versions = inputs.versions()
    for row, name in cells:
        found[f"answers/{row}/{name}"] = inputs.answers_inputs(
            plain, parts, encoder, views[name], data.tasks[name].prompts_hash, states[row], versions
        )
    return found


def plan_passes(
    budget: Any,
    method: Method,
    names: Sequence[str],
    counts: Sequence[int],
    mean_tokens: Sequence[float],
    alignment: int,
) -> list[tuple[int, int, int, int]]:
    """Plan each stage: rows of a pass, passes, optimizer steps, tokens.

    Args:
        budget: The `budget` node.
        method: Says which rows a stage goes over.
        names: Tasks in training order.
        counts: Train rows of each.
        mean_tokens: Average tokens of an encoded train row of each.
        alignment: Alignment rows of the data.
    """
    stages = []
    for index, name in enumerate(names, start=1):
        rows = method.rows_per_pass(counts, index, alignment)
        epochs = epochs_of(budget, name) if rows else 0
        if method.cells == "last" and rows:
            epochs = 1
            rows = sum(count * epochs_of(budget, task) for task, count in zip(names, counts, strict=True))
        # Replayed rows are counted with the mean length of the tasks so far.
        per_row = mean_tokens[index - 1] if rows == counts[index - 1] else sum(mean_tokens[:index]) / index
        steps = ceil(rows / budget.batch_size) * epochs
        stages.append((rows, epochs, steps, round(rows * per_row * epochs)))
    return stages


def epochs_of(budget: Any, task: str) -> int:
    """Passes over a task: by its name, else the default."""
    return budget.epochs.get(task, budget.default_epochs)


def _fingerprint(protocol: Mapping[str, Any], data: TaskData, encoder: Encoder) -> str:
    tasks = {
        name: {key: getattr(task.spec, key) for key in ("metric", "max_new_tokens", "stop", "splitter", "letters")}
        | ({"options": options} if (options := closed_options(task.spec, protocol)) else {})
        for name, task in sorted(data.tasks.items())
    }
    rows = {name: task.test_hash for name, task in sorted(data.tasks.items())}
    return keys.protocol_fingerprint(protocol, rows, tasks, encoder.template)
