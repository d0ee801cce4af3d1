"""Let a teacher write rationales for RCL: `python -m trace_hydra.rationales`; docs/rationales.md explains it.

    --data FOLDER --task NAME [--task ...] --out FOLDER --model NAME [--base-url URL] [--api-key-env NAME]

Reads `<data>/<task>/{train,test}.json`, asks the teacher for a rationale for each train row, rejects those that do not
lead to the gold answer and asks again, and writes `<out>/<task>/{train,test}.json` in the layout of TRACE's Reasoning
variant, with `<out>/report.json`. What was asked is kept in `<out>/.teacher`, so the same command goes on where an
earlier one ended. Exit codes: 0 done, 2 if an option, a file or the teacher is wrong (the message goes to stderr).
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_hydra.capability import lessons
from trace_hydra.capability.client import ChatClient
from trace_hydra.capability.lessons import Chat, Lesson, Progress
from trace_hydra.capability.teacher import NUM_ORDERS, Recipe, ready, recipe_of
from trace_hydra.data.reasoning import holds_reasoning
from trace_hydra.data.release import HOW_TO_GET, variants_in
from trace_hydra.data.rows import FileRows, read_split
from trace_hydra.data.select import select
from trace_hydra.data.task import METRICS, SPLITS, TASK_NAME, TRACE_TASKS, Example
from trace_hydra.errors import CapabilityError, ConfigError, DataError, StoreError, TraceHydraError, problem_list
from trace_hydra.files import write_json
from trace_hydra.metrics.records import read_json

STATE = ".teacher"
"""Folder below --out with replies and progress."""
_MOST_PROBLEMS = 20


def make(options: argparse.Namespace, chat: Chat) -> dict[str, Any]:
    """Make the rationales that the options ask for, or estimate them with --dry-run.

    Args:
        options: Of `parser`.
        chat: The teacher; keeps its replies by itself.

    Returns:
        The report, which is also in <out>/report.json, or the estimate.

    Raises:
        ConfigError: If an option is wrong.
        DataError: If rows cannot be read.
        CapabilityError: If the teacher cannot be asked, a demonstration is wrong, or no rationale was accepted.
        StoreError: If --out cannot be written.
    """
    tasks = list(dict.fromkeys(options.task))
    _check(options, tasks)
    read = {task: _read(options.data, task) for task in tasks}
    recipes = {task: _recipe(options, task) for task in tasks}
    fitted = {
        task: ready(recipes[task], [row.answer for row in read[task]["train"].examples], read[task]["test"].examples)
        for task in tasks
    }
    made, dropped = {}, {}
    for task in tasks:
        made[task], dropped[task] = _lesson(options, fitted[task], read[task])
    progress = {task: Progress.of(lesson, chat, options.out / STATE / "progress") for task, lesson in made.items()}
    prices = (options.usd_per_million_input, options.usd_per_million_output)
    if options.dry_run:
        return {
            "dry_run": True,
            "tasks": {
                task: lessons.estimate(made[task], chat, progress[task], attempts=options.attempts, prices=prices)
                for task in tasks
            },
        }
    is_open = any(progress[task].open_rows(made[task].rows, options.attempts) for task in tasks)
    if is_open and (problems := chat.problems()):
        raise CapabilityError(problem_list(problems))
    for task in tasks:
        lessons.teach(made[task], chat, progress[task], attempts=options.attempts, say=_say)
    outcomes = {
        task: {**lessons.outcome(made[task], progress[task], prices), "not_asked": dropped[task]} for task in tasks
    }
    report = {
        "schema": 1,
        "teacher": chat.identity(),
        "attempts": options.attempts,
        "seed": options.seed,
        "total": lessons.totals(list(outcomes.values())),
        "tasks": outcomes,
    }
    for task in tasks:
        _write(options.out / task, made[task], progress[task], read[task])
    write_json(report, options.out / "report.json")
    if none := [task for task in tasks if not outcomes[task]["accepted"]]:
        raise CapabilityError(
            f"no rationale was accepted for {', '.join(none)}, so no rows were written; {options.out / 'report.json'} "
            "says why. Take a better teacher, demonstrations closer to the task, or more --attempts."
        )
    return report


def _check(options: argparse.Namespace, tasks: Sequence[str]) -> None:
    """Refuse wrong options, all at once."""
    found = [f"--task {task!r} is no task name; use letters, digits, '_', '.', '-'." for task in tasks if not _ok(task)]
    own = [task for task in tasks if _ok(task) and task not in TRACE_TASKS]
    if own and options.metric is None:
        found.append(
            f"--task {', '.join(own)} is none of {', '.join(TRACE_TASKS)}. For a task of your own add --metric (one of "
            f"{', '.join(METRICS)}) and --demonstrations."
        )
    for name in ("attempts", "limit", "max_prompt_chars"):
        value = getattr(options, name)
        if value is not None and value < 1:
            found.append(f"--{name.replace('_', '-')} {value} must be at least 1.")
    if options.attempts > NUM_ORDERS and options.temperature == 0:
        found.append(
            f"--temperature 0 gives the same reply again after {NUM_ORDERS} of --attempts {options.attempts}; set "
            f"--temperature above 0, or at most --attempts {NUM_ORDERS}."
        )
    if options.out.is_dir() and any(options.out.iterdir()) and not (options.out / STATE).is_dir():
        found.append(f"--out {options.out} holds files that are not this command's; name another folder.")
    elif options.out.exists() and not options.out.is_dir():
        found.append(f"--out {options.out} is no folder.")
    if options.out.resolve() == options.data.resolve():
        found.append(f"--out {options.out} is --data; its rows would be written over.")
    if not options.data.is_dir():
        found.append(f"--data {options.data} is no folder. {HOW_TO_GET}")
    if found:
        raise ConfigError(problem_list(found))


def _ok(task: str) -> bool:
    return TASK_NAME.fullmatch(task) is not None


def _read(root: Path, task: str) -> dict[str, FileRows]:
    """Read a task's files; eval may be absent.

    Raises:
        DataError: If one cannot be read or has a bad row.
    """
    if not (root / task).is_dir():
        there = ", ".join(sorted(entry.name for entry in root.iterdir() if (entry / "train.json").is_file()))
        inside = [str(root / entry.name) for entry in sorted(root.glob("LLM-CL-Benchmark_*"))]
        hint = f"Name one of {', '.join(inside)}." if variants_in(root) and inside else f"It has {there or 'none'}."
        raise DataError(f"--data {root} has no task folder {task}. {hint}")
    files = {split: read_split(root, root, task, split) for split in SPLITS}
    if files["eval"].missing:
        files["eval"] = FileRows()
    problems = [
        problem.replace("data.strict=false drops and counts such rows (row 1 is the first).", "(Row 1 is the first.)")
        for file in files.values()
        for problem in (*file.problems, *([file.fatal] if file.fatal else []))
    ]
    if problems:
        more = [f"... and {len(problems) - _MOST_PROBLEMS} more."] if len(problems) > _MOST_PROBLEMS else []
        raise DataError(problem_list([*problems[:_MOST_PROBLEMS], *more]))
    return files


def _recipe(options: argparse.Namespace, task: str) -> Recipe:
    """Make a task's recipe of what is built in and what --demonstrations says."""
    given, place = None, f"built-in demonstrations of {task}"
    if options.demonstrations is not None:
        content = read_json(options.demonstrations, CapabilityError)
        if not isinstance(content, dict):
            raise CapabilityError(f'{options.demonstrations} must be an object, {{"{task}": [three demonstrations]}}.')
        if task in content:
            given, place = content[task], f"{options.demonstrations}: {task}"
    spec = TRACE_TASKS.get(task)
    recipe = recipe_of(task, spec.metric if spec else str(options.metric), given, place)
    if spec is None:
        return recipe
    return recipe.with_instructions(spec.instruction, _reasoning_instructions()[task])


def _reasoning_instructions() -> Mapping[str, str]:
    """Look up how prompts begin that ask for reasoning: data.tasks.<task>.instruction of data=trace_reasoning."""
    from omegaconf import OmegaConf

    from trace_hydra.entry import project_root

    config = OmegaConf.load(project_root() / "conf" / "data" / "trace_reasoning.yaml")
    return {task: str(OmegaConf.select(config, "tasks")[task].instruction) for task in TRACE_TASKS}


def _lesson(options: argparse.Namespace, recipe: Recipe, read: Mapping[str, FileRows]) -> tuple[Lesson, dict[str, int]]:
    """Choose the rows to ask about: no row twice, at most --limit of them."""
    chosen, dropped = select(
        {"train": read["train"].examples, "test": read["test"].examples},
        task=recipe.task,
        seed=options.seed,
        limit={"train": options.limit},
        max_prompt_chars={"train": options.max_prompt_chars},
        dedupe=True,
        drop_leaked=options.drop_leaked,
    )
    if not chosen["train"]:
        raise DataError(f"{recipe.task}/train.json has no row left: {dropped['train']}.")
    for row in (row for split in SPLITS if split in read for row in read[split].examples):
        recipe.convert(row.prompt)  # refuses a foreign instruction before anything is paid for
    return Lesson(recipe, chosen["train"], read["train"].sha256), dropped["train"]


def _write(folder: Path, lesson: Lesson, progress: Progress, read: Mapping[str, FileRows]) -> None:
    """Write a task's files; without an accepted row there is nothing to train on, and none of its files stays."""
    rows = [lesson.stored(row, rationale) for row in lesson.rows if (rationale := progress.rationale(row)) is not None]
    if not rows:
        for split in SPLITS:
            (folder / f"{split}.json").unlink(missing_ok=True)
        return
    for split in ("test", "eval"):
        if read[split].examples:
            write_json([_plain(lesson.recipe, row) for row in read[split].examples], folder / f"{split}.json")
    write_json(rows, folder / "train.json")


def _plain(recipe: Recipe, row: Example) -> dict[str, str]:
    """A row to score: the prompt asks for reasoning, the answer has none."""
    alone = recipe.letters or holds_reasoning(row.answer)
    return {"prompt": recipe.convert(row.prompt), "answer": recipe.gold(row.answer) if alone else row.answer}


def teacher(options: argparse.Namespace) -> Chat:
    """Build what the options name: a model behind an endpoint, or one in this process."""
    cache = str(options.out / STATE / "replies")
    if (options.model is None) == (options.local_model is None):
        raise ConfigError("name the teacher: --model NAME (with --base-url), or --local-model PATH.")
    if options.local_model is not None:
        return _local(options, cache)
    key = options.api_key_env or (None if options.base_url else "OPENAI_API_KEY")
    return ChatClient(
        name=options.model,
        base_url=options.base_url,
        model=options.model,
        api_key_env=key,
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        timeout_s=options.timeout_s,
        retries=options.retries,
        backoff_s=1.0,
        concurrency=options.concurrency,
        requests_per_minute=options.requests_per_minute,
        max_usd=options.max_usd,
        usd_per_million_input=options.usd_per_million_input,
        usd_per_million_output=options.usd_per_million_output,
        cache=cache,
        node="teacher",
    )


def _local(options: argparse.Namespace, cache: str) -> Chat:
    from trace_hydra.capability.local_judge import LocalChat
    from trace_hydra.models.load import Pretrained

    if options.max_usd is not None:
        raise ConfigError("--max-usd goes with --model; a model in this process costs no money.")
    model = Pretrained(
        name=str(options.local_model),
        path=str(options.local_model),
        revision=None,
        dtype="float32",
        pad_token="eos",
        attn_implementation="sdpa",
        gradient_checkpointing=False,
        trust_remote_code=False,
        context_length=None,
        parameters=None,
        published=None,
    )
    return LocalChat(
        name=str(options.local_model),
        model=model,
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        batch_tokens=8192,
        seed=options.seed,
        device="auto",
        cache=cache,
        node="teacher",
    )


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = argparse.ArgumentParser(
        prog="python -m trace_hydra.rationales", description="Let a teacher write rationales for method=rcl."
    )
    add = made.add_argument
    add("--data", type=Path, required=True, help="folder with the task folders, in TRACE's layout")
    add("--task", action="append", required=True, metavar="NAME", help="a task folder; repeat for more")
    add("--out", type=Path, required=True, help="folder to write to; the same one goes on where a run ended")
    add("--demonstrations", type=Path, metavar="FILE", help="JSON; default: three built-in ones for each TRACE task")
    add("--metric", choices=METRICS, help="of tasks that are not TRACE's; decides how answers are checked")
    add("--model", help="the teacher, as its endpoint names it")
    add("--base-url", help="of an OpenAI-compatible endpoint; default: OpenAI's own")
    add("--api-key-env", metavar="NAME", help="environment variable with the key; default with OpenAI: OPENAI_API_KEY")
    add("--local-model", metavar="PATH", help="a chat model in this process instead: a folder or a Hub id")
    add("--limit", type=int, help="most train rows a task, a seeded sample; default: all")
    add("--max-prompt-chars", type=int, help="leave longer train rows out")
    add("--drop-leaked", action="store_true", help="leave train rows out whose prompt is a test prompt")
    add("--seed", type=int, default=0, help="of the sample and of a local model (default 0)")
    add("--attempts", type=int, default=3, help="most replies a row (default 3)")
    add("--temperature", type=float, default=0.7, help="default 0.7")
    add("--max-tokens", type=int, default=512, help="limit of a reply (default 512)")
    add("--concurrency", type=int, default=4, help="requests at a time (default 4)")
    add("--requests-per-minute", type=float, help="default: no limit")
    add("--timeout-s", type=float, default=120.0, help="of a request (default 120)")
    add("--retries", type=int, default=5, help="further tries of a failed request (default 5)")
    add("--usd-per-million-input", type=float, help="price of tokens sent")
    add("--usd-per-million-output", type=float, help="price of tokens received")
    add("--max-usd", type=float, help="stop before this call has spent more; needs both prices")
    add("--dry-run", action="store_true", help="count requests, tokens and cost; ask and write nothing")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        print(json.dumps(make(options, teacher(options)), indent=2, ensure_ascii=False))
    except TraceHydraError as error:
        print(f"trace_hydra.rationales: {_as_options(str(error), options)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"trace_hydra.rationales: {StoreError(str(error))}", file=sys.stderr)
        return 2
    return 0


def _as_options(message: str, options: argparse.Namespace) -> str:
    """Name options where the teacher names nodes of a configuration."""
    if options.local_model is not None:
        message = message.replace("teacher.model: model.path=", "teacher.local_model=")
        message = message.replace("teacher.model", "teacher.local_model")
    message = message.replace("(or teacher=local, teacher=none)", "(or take --local-model)")
    return re.sub(r"\bteacher\.([a-z_]+)=?", lambda found: f"--{found[1].replace('_', '-')} ", message).replace(
        "  ", " "
    )


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
