"""Seconds for the score matrix: ours, the loop of TRACE's code, and lm-evaluation-harness's HF backend.

    python -m benchmarks.evaluation --data FOLDER --rows 4 --tasks 8

Trains through the tasks once (or takes the stages from the store), then answers every cell of the lower triangle in
each way, greedily, with the same weights in bf16 and at most 512 new tokens. Answers are compared with ours; where they
part, the margin between the two most likely tokens says whether it was a tie. lm-eval comes from the extra `general`.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Contender, Stopwatch, options, prepared, report
from trace_hydra import run as main_path
from trace_hydra.context import StageContext, TrainTask
from trace_hydra.interrupt import Interrupts
from trace_hydra.live import Live
from trace_hydra.store.entries import Store

OFFICIAL_ROWS = 4
"""Prompts of a batch in TRACE's inference/infer_single.py."""
HARNESS_ROWS = 16
NEW_TOKENS = 512
Answer = Callable[[Live, StageContext, TrainTask, Sequence[str]], list[str]]


def ours(live: Live, ctx: StageContext, view: TrainTask, prompts: Sequence[str]) -> list[str]:
    """As a run answers."""
    return live.method.answer(ctx, prompts, view)


def official(live: Live, ctx: StageContext, view: TrainTask, prompts: Sequence[str]) -> list[str]:
    """Batches of 4 in the file's order, padded on the left, `generate` (inference/infer_single.py at 462e39f)."""
    model: Any = ctx.model
    answers = []
    encoded, _ = ctx.encoder.prompts(prompts, view.instruction)
    for start in range(0, len(encoded), OFFICIAL_ROWS):
        batch = encoded[start : start + OFFICIAL_ROWS]
        longest = max(map(len, batch))
        ids = torch.full((len(batch), longest), ctx.encoder.end_id)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(batch):
            ids[row, longest - len(one) :], mask[row, longest - len(one) :] = torch.tensor(one), 1
        with torch.inference_mode(), ctx.autocast():
            made = model.generate(
                input_ids=ids.to(ctx.device), attention_mask=mask.to(ctx.device), max_new_tokens=NEW_TOKENS,
                do_sample=False, pad_token_id=ctx.encoder.end_id, eos_token_id=ctx.encoder.end_id,
            )  # fmt: skip
        answers += ctx.tokenizer.batch_decode(
            made[:, longest:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    return answers


def harness(live: Live, ctx: StageContext, view: TrainTask, prompts: Sequence[str]) -> list[str]:
    """lm-evaluation-harness: longest first, batches of a fixed number of rows."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm: Any = HFLM  # its arguments are hidden from checkers
    lm = lm(pretrained=ctx.model, tokenizer=ctx.tokenizer, batch_size=HARNESS_ROWS, max_length=4096)
    end = ctx.tokenizer.eos_token
    settings = {"until": [end], "max_gen_toks": NEW_TOKENS, "do_sample": False}
    requests = [Instance("generate_until", {}, (prompt, settings), at) for at, prompt in enumerate(prompts)]
    with torch.inference_mode(), ctx.autocast():
        return lm.generate_until(requests, disable_tqdm=True)


def cells(arguments: Any) -> tuple[dict[str, list[float]], dict[str, list[list[str]]], int, Any]:
    """Answer every cell in each way, one after the other: seconds and answers by contender; tokens; where."""
    ways: dict[str, Answer] = {"ours": ours, "TRACE's code": official}
    if importlib.util.find_spec("lm_eval"):
        ways["lm-eval"] = harness
    names = f"[{','.join(TASKS[: arguments.tasks])}]"
    settings = [
        f"task_order={names}", "protocol=official", "protocol.decoding.do_sample=false", "protocol.truncation=middle",
        "protocol.special_tokens=text", "trainer.precision=bf16-true", "capability=none", "evaluation=diagonal_last",
        "evaluation.cells=diagonal_last",
    ]  # fmt: skip
    config, parts, plan = prepared(arguments, *settings)
    store = Store(Path(config.paths.store))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[list[str]]] = {name: [] for name in ways}
    tokens = 0
    with Interrupts() as interrupts:
        live = Live(config, parts, plan, store, interrupts)
        for stage in plan.run.stages:
            live.ensure(stage)
        for stage in plan.run.stages:
            ctx = live.at(stage.index)
            ctx.model.to(ctx.device).eval()  # type: ignore[arg-type]
            for task in plan.run.tasks[: stage.index]:
                view, prompts = plan.views[task], [row.prompt for row in plan.tasks[task].test]
                for name, answer in ways.items():
                    with Stopwatch() as watch:
                        made = answer(live, ctx, view, prompts)
                    seconds[name].append(watch.seconds)
                    answers[name].append(made)
                tokens += sum(len(one) for one in ctx.encoder.text_ids(answers["ours"][-1]))
                row = ", ".join(f"{name} {values[-1]:.1f} s" for name, values in seconds.items())
                print(f"  row {stage.index}, {task}: {row}", flush=True)
    return seconds, answers, tokens, ctx


TASKS = ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")


def main() -> None:
    """Time every cell."""
    parser = options(__doc__ or "")
    parser.add_argument("--tasks", type=int, default=8, help="tasks of the order: T (T + 1) / 2 cells")
    arguments = parser.parse_args()
    with main_path.quiet(), tempfile.TemporaryDirectory():
        seconds, answers, tokens, _ = cells(arguments)
    contenders = []
    for name, values in seconds.items():
        contender = Contender(name, partial(dict))
        contender.samples = [{"seconds": sum(values), "tokens": tokens}]
        contenders.append(contender)
    different = {
        name: sum(
            a != b
            for mine, theirs in zip(answers["ours"], made, strict=True)
            for a, b in zip(mine, theirs, strict=True)
        )
        for name, made in answers.items()
    }
    total = sum(map(len, answers["ours"]))
    print(f"{len(seconds['ours'])} cells, {total} answers; other than ours: {different}")
    facts: Mapping[str, Any] = {"cells": {name: values for name, values in seconds.items()}, "different": different}
    report(f"matrix of {len(seconds['ours'])} cells", contenders, arguments.out, **facts)


if __name__ == "__main__":
    main()
