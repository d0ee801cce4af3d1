"""Score without a model: `python -m trace_hydra.score`, in three forms.

    --task Py150 --protocol official --rows FILE        rows {"prompt", "answer", "prediction"}, JSON lines or a list
    --matrix FILE                                       {"tasks": [...], "matrix": [T rows], "row0": [...] or null}
    RUN_DIR protocol=official                           score a finished run's answers again

Each prints one JSON object; the last also writes RUN_DIR/rescored/<protocol>.json. Exit codes: 0 done, 2 if an option,
a file or a row is wrong (the message goes to stderr).
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trace_hydra.data.task import METRICS, TRACE_TASKS, TaskSpec, final_prediction
from trace_hydra.errors import ConfigError, DataError, StoreError, TraceHydraError
from trace_hydra.files import write_json
from trace_hydra.metrics.bootstrap import bootstrap
from trace_hydra.metrics.continual import ScoreMatrix, summary
from trace_hydra.metrics.records import json_rows, located, read_json, texts
from trace_hydra.metrics.score import SCORINGS, TaskScore, score_task
from trace_hydra.metrics.text import cut_at
from trace_hydra.names import inside

_BUILT_IN = {"official": "official", "greedy": "corrected"}
_BOOTSTRAP_SAMPLES = 1000  # as conf/evaluation/default.yaml


def scoring_of(protocol: str) -> str:
    """Look up how a protocol scores: `scoring` in conf/protocol/<protocol>.yaml.

    Returns:
        "official" or "corrected".

    Raises:
        ConfigError: If there is no such protocol, or its file names no known scoring.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from trace_hydra.entry import project_root

    files = {path.stem: path for path in sorted((project_root() / "conf" / "protocol").glob("*.yaml"))}
    if protocol not in files and protocol not in _BUILT_IN:
        raise ConfigError(f"protocol={protocol} is none of {', '.join(sorted({*files, *_BUILT_IN}))}.")
    if protocol not in files:
        return _BUILT_IN[protocol]
    try:
        scoring = OmegaConf.select(OmegaConf.load(files[protocol]), "scoring")  # type: ignore[arg-type]
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{files[protocol]} cannot be read: {error}.") from error
    if scoring not in SCORINGS:
        raise ConfigError(f"{files[protocol]}: scoring={scoring!r} is none of {', '.join(SCORINGS)}.")
    return scoring


def score_rows(path: Path, *, task: str, protocol: str, metric: str | None = None) -> TaskScore:
    """Score the rows of a file; a task that is not TRACE's needs `metric`.

    Raises:
        ConfigError: If task, protocol or metric is unknown.
        DataError: If the file cannot be read or a row is wrong; names file:row, rows counted from 1.
    """
    spec = TRACE_TASKS.get(task)
    if metric is not None and metric not in METRICS:
        raise ConfigError(f"--metric {metric} is none of {', '.join(METRICS)}.")
    if spec is None and metric is None:
        raise ConfigError(
            f"--task {task} is none of {', '.join(TRACE_TASKS)}. For a task of your own add --metric "
            f"(one of {', '.join(METRICS)})."
        )
    if spec is not None and metric not in (None, spec.metric):
        raise ConfigError(f"--metric {metric}: {task} is scored by {spec.metric}; leave --metric out.")
    scoring = scoring_of(protocol)
    rows = [
        texts(row, place, ("prompt", "answer", "prediction"), DataError) for place, row in json_rows(path, DataError)
    ]
    if not rows:
        raise DataError(f"{path} holds no rows.")
    prompts, answers, predictions = zip(*rows, strict=True)
    return score_task(
        task=task,
        metric=spec.metric if spec else str(metric),
        scoring=scoring,
        protocol=protocol,
        prompts=prompts,
        answers=answers,
        predictions=predictions,
        instruction=spec.instruction if spec else "",
    )


def score_matrix(path: Path) -> dict[str, Any]:
    """Compute OP, BWT, ... (`metrics.continual.summary`) of a matrix file, in its own unit.

    Raises:
        DataError: If the file is no matrix; names the cell.
    """
    content = read_json(path, DataError)
    if not isinstance(content, dict) or not _is_names(content.get("tasks")) or "matrix" not in content:
        raise DataError(f'{path} must be {{"tasks": [names], "matrix": [a row a stage], "row0": [a row] or null}}.')
    tasks, matrix, row0 = content["tasks"], content["matrix"], content.get("row0")
    if not isinstance(matrix, list) or len(matrix) != len(tasks):
        given = f"{len(matrix)} rows" if isinstance(matrix, list) else repr(matrix)
        raise DataError(
            f"{path}: 'matrix' must be a list of {len(tasks)} rows, one after each stage, not {given}; the row before "
            "training goes into 'row0'."
        )
    with located(path, DataError):
        return summary(ScoreMatrix(tasks, [row0 if row0 is not None else [None] * len(tasks), *matrix]))


def rescore(run: Path, *, protocol: str | None = None) -> dict[str, Any]:
    """Score the stored answers of a finished run under another protocol's scoring, and store the result.

    Scoring is all that changes: prompts and decoding stay those of the run. Official scoring takes the generated text
    as it is, corrected scoring cuts it at the task's stop strings.

    Args:
        run: Folder with results.json, test_rows/ and predictions/.
        protocol: None: the run's own.

    Returns:
        protocol, scoring, run_protocol, tasks, matrix, the summary's keys, confidence; also written to
        `run`/rescored/<protocol>.json.

    Raises:
        ConfigError: If the protocol is unknown.
        StoreError: If a file of the run is missing, damaged or does not fit the others, or the result cannot be
            written.
    """
    place = run / "results.json"
    results = read_json(place, StoreError)
    if not isinstance(results, dict) or not _is_names(results.get("tasks")) or results.get("matrix") is None:
        raise StoreError(f"{place} needs 'tasks' and 'matrix'. Name the folder of a finished run.")
    with located(place, StoreError):
        scored = ScoreMatrix(results["tasks"], results["matrix"])
    run_protocol = results.get("protocol")
    if not isinstance(run_protocol, dict) or not isinstance(run_protocol.get("name"), str):
        raise StoreError(f"{place}: protocol.name is missing.")
    protocol = protocol or str(run_protocol["name"])
    scoring = scoring_of(protocol)
    specs = {task: _spec(task, results.get("task_specs"), place) for task in scored.tasks}
    tests = {task: _test_rows(run / "test_rows" / f"{task}.jsonl") for task in scored.tasks}
    matrix, examples = ScoreMatrix(scored.tasks), {}
    for row in range(len(scored.rows)):
        for task in scored.tasks:
            if scored.get(row, task) is None:
                continue
            answers = _answers_file(run, results, row, task)
            score = _score_cell(answers, tests[task], specs[task], scoring=scoring, protocol=protocol)
            examples[row, task] = [values["score"] for values in score.rows]
            matrix.set(row, task, score.score)
    rescored = {
        "protocol": protocol,
        "scoring": scoring,
        "run_protocol": run_protocol,
        **matrix.to_json(),
        **summary(matrix),
        "confidence": bootstrap(
            matrix.tasks, examples, samples=_BOOTSTRAP_SAMPLES, seed=_seed(results.get("seed"), place)
        ),
    }
    write_json(rescored, inside(run, "rescored", f"{protocol}.json"))
    return rescored


def _score_cell(
    answers: Path, tests: Mapping[str, tuple[str, str]], spec: TaskSpec, *, scoring: str, protocol: str
) -> TaskScore:
    """Score one predictions file against the test rows, which it must cover one by one."""
    predictions = []
    records = list(json_rows(answers, StoreError))
    for (place, record), (row_id, (prompt, answer)) in zip(records, tests.items(), strict=False):
        found, sha256, raw, reference = texts(record, place, ("id", "prompt_sha256", "raw", "reference"), StoreError)
        expected = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
        if found != row_id or sha256 != expected or reference != answer:
            raise StoreError(f"{place}: {found!r} is not the test row {row_id!r} that test_rows/ has here.")
        predictions.append(final_prediction(cut_at(raw, spec.stop) if scoring == "corrected" else raw, spec))
    if len(records) != len(tests):
        expected = answers.parents[2] / "test_rows" / answers.name
        raise StoreError(
            f"{answers} holds {len(records)} answers to {len(tests)} rows in {expected}; one is cut short."
        )
    prompts, references = zip(*tests.values(), strict=True)
    return score_task(
        task=spec.name,
        metric=spec.metric,
        scoring=scoring,
        protocol=protocol,
        prompts=prompts,
        answers=references,
        predictions=predictions,
        instruction=spec.instruction,
    )


def _answers_file(run: Path, results: Mapping[str, Any], row: int, task: str) -> Path:
    """Find the answers of a cell: its own file, or that of the row whose answers it carries."""
    carried = results.get("carried")
    source = carried.get(f"{row},{task}") if isinstance(carried, dict) else None
    file = run / "predictions" / str(row) / f"{task}.jsonl"
    if source is None or file.is_file():
        return file
    if isinstance(source, bool) or not isinstance(source, int) or source >= row:
        raise StoreError(f"{run / 'results.json'}: carried['{row},{task}']={source!r} is no earlier row.")
    return _answers_file(run, results, source, task)


def _test_rows(path: Path) -> dict[str, tuple[str, str]]:
    """Read prompts and answers by id, in order."""
    rows = {}
    for place, row in json_rows(path, StoreError):
        row_id, prompt, answer = texts(row, place, ("id", "prompt", "answer"), StoreError)
        if row_id in rows:
            raise StoreError(f"{place}: id {row_id!r} is there twice.")
        rows[row_id] = (prompt, answer)
    if not rows:
        raise StoreError(f"{path} holds no test rows.")
    return rows


def _spec(task: str, specs: Any, place: Path) -> TaskSpec:
    """Build what results.json says about a task."""
    fields = specs.get(task) if isinstance(specs, dict) else None
    instruction, stop = (fields.get("instruction"), fields.get("stop")) if isinstance(fields, dict) else (None, None)
    if not isinstance(fields, dict) or not isinstance(instruction, str) or not _is_names(stop, empty=True):
        raise StoreError(f"{place}: task_specs.{task} needs 'metric', 'instruction' and 'stop'.")
    with located(place, StoreError):  # the answer limit plays no part in scoring
        return TaskSpec(
            task,
            fields.get("metric"),  # type: ignore[arg-type]
            1,
            instruction,
            stop=tuple(stop),  # type: ignore[arg-type]
            splitter=fields.get("splitter"),
            letters=fields.get("letters", ""),
        )


def _seed(seed: Any, place: Path) -> int:
    """Take the seed that the run's own intervals have."""
    value = seed.get("data") if isinstance(seed, dict) else seed
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise StoreError(f"{place}: seed.data={value!r} must be an integer of at least 0.")
    return value


def _is_names(value: Any, *, empty: bool = False) -> bool:
    return isinstance(value, list) and (empty or bool(value)) and all(isinstance(name, str) for name in value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trace_hydra.score", description="Score without a model.")
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    parser.add_argument("override", nargs="?", metavar="protocol=NAME", help="with RUN_DIR; default: the run's own")
    parser.add_argument("--rows", type=Path, help="file of rows with prompt, answer and prediction")
    parser.add_argument("--task", help="name of the rows' task")
    parser.add_argument("--protocol", help="name of a protocol, for example official or greedy")
    parser.add_argument("--metric", help="for a task that is not TRACE's")
    parser.add_argument("--matrix", type=Path, help="file with tasks, matrix and row0")
    options = parser.parse_args(arguments)
    try:
        print(json.dumps(_chosen(options), indent=2, allow_nan=False))
    except TraceHydraError as error:
        print(f"trace_hydra.score: {error}", file=sys.stderr)
        return 2
    return 0


def _chosen(options: argparse.Namespace) -> dict[str, Any]:
    """Do what the options ask for."""
    forms = [name for name in ("run", "rows", "matrix") if getattr(options, name) is not None]
    if len(forms) != 1:
        raise ConfigError("give one of: RUN_DIR protocol=NAME; --task, --protocol and --rows; --matrix (see --help).")
    row_options = {name: getattr(options, name) for name in ("task", "protocol", "metric")}
    if forms != ["rows"] and (given := [f"--{name}" for name, value in row_options.items() if value is not None]):
        raise ConfigError(f"{', '.join(given)} goes with --rows; with RUN_DIR write protocol=NAME.")
    if forms == ["matrix"]:
        return score_matrix(options.matrix)
    if forms == ["run"]:
        if options.override and not re.fullmatch(r"protocol=.+", options.override):
            raise ConfigError(f"{options.override}: after RUN_DIR only protocol=NAME is known.")
        return rescore(options.run, protocol=options.override and options.override.partition("=")[2])
    if options.task is None or options.protocol is None:
        raise ConfigError("--rows needs --task and --protocol.")
    return asdict(score_rows(options.rows, **row_options))


if __name__ == "__main__":
    sys.exit(main())
