"""Rows of a run that is estimated: counted where they and the tokenizer are at hand, else from published counts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from omegaconf import DictConfig

from trace_hydra.build import Parts
from trace_hydra.data.encode import Encoder
from trace_hydra.data.options import closed_options
from trace_hydra.data.release import RELEASE_CHARACTERS, RELEASE_ROWS, RELEASE_TOKENS
from trace_hydra.data.task import TaskData, TaskSpec
from trace_hydra.errors import ConfigError, problem_list

CHARACTERS_PER_TOKEN = 4
_FRAME = 60  # characters of a row as JSON beside its texts


@dataclass(frozen=True)
class TaskRows:
    """What an estimate needs to know of a task's rows; lengths after truncation, averages unless said otherwise."""

    name: str
    train: int
    test: int
    row_bytes: float
    """Of a train row as JSON, as methods keep it."""
    row_tokens: float
    """Of an encoded train row."""
    answer_tokens: float
    """Those of them that carry the loss."""
    longest_row: int
    longest_answer: int
    prompt_tokens: float
    """Of a test prompt."""
    longest_prompt: int
    max_new_tokens: int


@dataclass(frozen=True)
class RunRows:
    """The rows of all tasks, in training order."""

    tasks: tuple[TaskRows, ...]
    alignment: int
    notes: tuple[str, ...]
    """Where the numbers come from, for the reader."""


def rows_of(config: DictConfig, parts: Parts) -> RunRows:
    """Count the rows, or take the published counts.

    Raises:
        ConfigError: If there are neither rows nor published counts.
    """
    problems = parts.data.problems(list(parts.specs))
    if problems:
        return _published(config, parts, problems)
    data = parts.data.load(list(parts.specs), seed=config.seed.data)
    tokenizer = parts.model.local_tokenizer()
    if tokenizer is None:
        note = f"rows: counted; no tokenizer at hand: {CHARACTERS_PER_TOKEN} characters a token"
        return RunRows(tuple(_by_characters(config, parts, data)), len(data.alignment), (note,))
    encoder = Encoder.of(tokenizer, config.protocol)
    tasks = tuple(_counted(config, parts.specs[name], task, encoder) for name, task in data.tasks.items())
    return RunRows(tasks, len(data.alignment), ("rows and tokens: counted",))


def sampled_rows(
    config: DictConfig, specs: Mapping[str, TaskSpec], data: TaskData, encoder: Encoder, sample: int
) -> RunRows:
    """Count rows that are loaded; lengths are those of about `sample` rows a split, spread over it evenly."""
    tasks = tuple(_counted(config, specs[name], task, encoder, sample) for name, task in data.tasks.items())
    return RunRows(tasks, len(data.alignment), (f"rows: counted, lengths of {sample} a split",))


def _counted(config: DictConfig, spec: TaskSpec, task: Any, encoder: Encoder, sample: int | None = None) -> TaskRows:
    train, test = (split[:: max(1, len(split) // sample) if sample else 1] for split in (task.train, task.test))
    rows = encoder.pairs(train, task.instruction)
    prompts, _ = encoder.prompts([row.prompt for row in test], task.instruction)
    tokens, answers = [len(row.ids) for row in rows], [len(row.ids) - row.num_prompt for row in rows]
    asked = [len(ids) for ids in prompts]
    return TaskRows(
        name=spec.name,
        train=len(task.train),
        test=len(task.test),
        row_bytes=_json_bytes(train),
        row_tokens=_mean(tokens),
        answer_tokens=_mean(answers),
        longest_row=max(tokens),
        longest_answer=max(answers),
        prompt_tokens=_mean(asked),
        longest_prompt=max(asked),
        max_new_tokens=_new_tokens(config.protocol, spec),
    )


def _by_characters(config: DictConfig, parts: Parts, data: TaskData) -> list[TaskRows]:
    found = []
    for name, task in data.tasks.items():
        prompts, answers = [len(row.prompt) for row in task.train], [len(row.answer) for row in task.train]
        lengths = (_mean(prompts), max(prompts), _mean(answers), max(answers))
        counts = (len(task.train), len(task.test), _json_bytes(task.train))
        found.append(_from_lengths(config, parts.specs[name], *counts, lengths))
    return found


def _published(config: DictConfig, parts: Parts, problems: list[str]) -> RunRows:
    variant = getattr(parts.data, "variant", None)
    known = RELEASE_ROWS.get(variant or "", {})
    if unknown := [name for name in parts.specs if name not in known or name not in RELEASE_CHARACTERS]:
        raise ConfigError(problem_list([*problems, f"no published counts of {', '.join(unknown)} to estimate with."]))
    limit = getattr(parts.data, "limit", None) or {}
    tasks = []
    for name, spec in parts.specs.items():
        train, _, test = known[name]
        train, test = min(train, limit.get("train") or train), min(test, limit.get("test") or test)
        lengths = RELEASE_CHARACTERS[name]
        escaped = 6 if spec.language == "zh" else 1  # JSON writes "\uXXXX"
        row_bytes = escaped * (lengths[0] + lengths[2]) + _FRAME
        tasks.append(_from_lengths(config, spec, train, test, row_bytes, lengths, _characters_per_token(name)))
    note = (
        f"rows: not at hand ({problems[0].split('. ')[0]}); published counts of {variant}, lengths as in trace5000: "
        "mean tokens of a row by LLaMA-2's tokenizer, shared out between prompt and answer by their median characters"
    )
    alignment = known.get(str(getattr(parts.data, "alignment", None)), (0, 0, 0))[0]
    return RunRows(tuple(tasks), alignment, (note,))


def _characters_per_token(name: str) -> float:
    """Divide a row's characters by its tokens but the begin and end token; more than usual is of rows that were cut."""
    prompt, _, answer, _ = RELEASE_CHARACTERS[name]
    return min(CHARACTERS_PER_TOKEN, (prompt + answer) / (RELEASE_TOKENS[name] - 2))


def _from_lengths(
    config: DictConfig,
    spec: TaskSpec,
    train: int,
    test: int,
    row_bytes: float,
    lengths: Sequence[float],
    per_token: float = CHARACTERS_PER_TOKEN,
) -> TaskRows:
    """Turn characters (prompt average and longest, answer average and longest) to tokens, cut as the protocol says."""
    protocol = config.protocol
    limits = (protocol.max_prompt_tokens,) * 2 + (protocol.max_answer_tokens,) * 2
    tokens = [min(ceil(length / per_token), limit) for length, limit in zip(lengths, limits, strict=True)]
    prompt, longest_prompt, answer, longest_answer = tokens
    return TaskRows(
        name=spec.name,
        train=train,
        test=test,
        row_bytes=row_bytes,
        row_tokens=prompt + answer + 1,
        answer_tokens=answer + 1,
        longest_row=longest_prompt + longest_answer + 1,
        longest_answer=longest_answer + 1,
        prompt_tokens=prompt,
        longest_prompt=longest_prompt,
        max_new_tokens=_new_tokens(protocol, spec),
    )


def _new_tokens(protocol: Any, spec: TaskSpec) -> int:
    """Give the answer limit; options that are chosen from take a pass over the prompt and little more."""
    return 1 if closed_options(spec, protocol) else protocol.decoding.max_new_tokens or spec.max_new_tokens


def _json_bytes(examples: Sequence[Any]) -> float:
    return len(json.dumps([asdict(example) for example in examples])) / max(1, len(examples))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
