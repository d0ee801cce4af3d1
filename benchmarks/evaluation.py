"""Seconds for the score matrix: ours, the loop of TRACE's code, and lm-evaluation-harness's HF backend.

    python -m benchmarks.evaluation --data FOLDER --rows 4 --tasks 8

Trains through the tasks once (or takes the stages from the store), then answers every cell of the lower triangle in
each way, greedily, with the same weights in bf16 and at most 512 new tokens; who goes first changes from cell to cell.
Answers are compared with ours: where they part, the difference of the two next tokens' logits in fp32 says whether it
was a tie. lm-eval comes from the extra `general`.
"""

import copy
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Contender, Stopwatch, options, prepared, report
from trace_hydra.context import StageContext, TrainTask
from trace_hydra.interrupt import Interrupts
from trace_hydra.live import Live
from trace_hydra.run import quiet
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
    """lm-evaluation-harness: longest first, batches of a fixed number of rows; prompts as the others get them."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm: Any = HFLM  # its arguments are hidden from checkers
    lm = lm(pretrained=ctx.model, tokenizer=ctx.tokenizer, batch_size=HARNESS_ROWS, max_length=4096)
    end = ctx.tokenizer.eos_token
    settings = {"until": [end], "max_gen_toks": NEW_TOKENS, "do_sample": False}
    encoded, _ = ctx.encoder.prompts(prompts, view.instruction)
    texts = ctx.tokenizer.batch_decode(encoded, clean_up_tokenization_spaces=False)
    requests = [Instance("generate_until", {}, (text, settings), at) for at, text in enumerate(texts)]
    with torch.inference_mode(), ctx.autocast():
        return lm.generate_until(requests, disable_tqdm=True)


PEERS: Mapping[str, Answer] = {"TRACE's code": official, "lm-eval": harness}


def matrix(arguments: Any, overrides: Sequence[str]) -> Iterator[tuple[Live, StageContext, TrainTask, list[str]]]:
    """Bring the model to the state of each row; yield the row's cells and their prompts."""
    config, parts, plan = prepared(arguments, *overrides)
    with Interrupts() as interrupts:
        live = Live(config, parts, plan, Store(Path(config.paths.store)), interrupts)
        for stage in plan.run.stages:
            live.ensure(stage)
        for stage in plan.run.stages:
            ctx = live.at(stage.index)
            ctx.model.to(ctx.device).eval()  # type: ignore[arg-type]
            for task in plan.run.tasks[: stage.index]:
                yield live, ctx, plan.views[task], [row.prompt for row in plan.tasks[task].test]


def parting(ctx: StageContext, exact: Any, prompt: str, view: TrainTask, texts: tuple[str, str]) -> float:
    """How far apart two answers' logits are in fp32 where the answers part; 0 is a tie.

    Args:
        exact: The model in fp32.
    """
    mine, other = (list(map(int, ids)) for ids in ctx.encoder.text_ids(list(texts)))
    end = ctx.encoder.end_id
    at = next(at for at, (one, two) in enumerate(zip_longest(mine, other)) if one != two)
    (head,), _ = ctx.encoder.prompts([prompt], view.instruction)
    ids = torch.tensor([[*map(int, head), *mine[:at]]], device=ctx.device)
    with torch.inference_mode():
        logits = exact(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    one, two = (tokens[at] if at < len(tokens) else end for tokens in (mine, other))
    return float(logits[one] - logits[two])


def main(argv: Sequence[str] | None = None) -> None:
    """Time every cell."""
    parser = options(__doc__ or "")
    parser.add_argument("--tasks", type=int, default=8, help="tasks of the order: T (T + 1) / 2 cells")
    parser.add_argument("--only", nargs="*", choices=list(PEERS), default=list(PEERS), help="contenders beside ours")
    arguments = parser.parse_args(argv)
    ways: dict[str, Answer] = {"ours": ours, **{name: PEERS[name] for name in arguments.only}}
    if not importlib.util.find_spec("lm_eval"):
        ways.pop("lm-eval", None)
    contenders = {name: Contender(name, partial(dict)) for name in ways}
    parted: dict[str, list[float]] = {name: [] for name in ways}
    with quiet():
        for cell, (live, ctx, view, prompts) in enumerate(matrix(arguments, settings(arguments.tasks))):
            made: dict[str, list[str]] = {}
            seconds: dict[str, float] = {}
            if cell == 0:
                for answer in ways.values():
                    answer(live, ctx, view, prompts[:1])
            for name in list(ways) if cell % 2 == 0 else reversed(ways):
                with Stopwatch() as watch:
                    made[name] = ways[name](live, ctx, view, prompts)
                seconds[name] = watch.seconds
            tokens = sum(map(len, ctx.encoder.text_ids(made["ours"]))) + len(prompts)  # an end token each
            for name, one in contenders.items():
                one.samples.append({"seconds": seconds[name], "tokens": tokens, "cell": [ctx.stage.index, view.name]})
            times = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
            print(f"  row {ctx.stage.index}, {view.name}, {tokens} tokens: {times}", flush=True)
            exact = None
            for name, texts in made.items():
                for prompt, one, other in zip(prompts, made["ours"], texts, strict=True):
                    if one != other:
                        exact = exact or copy.deepcopy(ctx.model).float()
                        parted[name].append(parting(ctx, exact, prompt, view, (one, other)))
    show(list(contenders.values()), parted, len(contenders["ours"].samples), arguments)


def show(contenders: Sequence[Contender], parted: dict[str, list[float]], cells: int, arguments: Any) -> None:
    """Print ratios of all cells together and of each task's, and where answers part."""
    tasks = by_task(contenders)
    for task, seconds in tasks.items():
        times = ", ".join(f"{name} {value:.1f} s ({value / seconds['ours']:.2f} x)" for name, value in seconds.items())
        print(f"{task}: {times}")
    totals = {one.name: sum(sample["seconds"] for sample in one.samples) for one in contenders}
    for name, margins in parted.items():
        widest = max(map(abs, margins), default=0.0)
        print(f"{name}: {totals[name]:.1f} s, {totals[name] / totals['ours']:.2f} x ours; {len(margins)} answers are")
        print(f"  other than ours, and part where logits differ by at most {widest:.3f}")
    title = f"matrix of {cells} cells, median and spread over cells"
    report(title, contenders, arguments.out, seconds=totals, tasks=tasks, parted=parted)


def by_task(contenders: Sequence[Contender]) -> dict[str, dict[str, float]]:
    """Add up the seconds of each task's cells: task -> contender -> seconds."""
    found: dict[str, dict[str, float]] = {}
    for one in contenders:
        for sample in one.samples:
            seconds = found.setdefault(sample["cell"][1], {})
            seconds[one.name] = seconds.get(one.name, 0.0) + sample["seconds"]
    return found


def settings(tasks: int) -> list[str]:
    """Give the overrides: TRACE's first tasks, greedily, in bf16."""
    return [
        f"task_order=[{','.join(TASKS[:tasks])}]", "protocol=official", "protocol.decoding.do_sample=false",
        "protocol.truncation=middle", "protocol.special_tokens=text", "trainer.precision=bf16-true", "capability=none",
        "evaluation=diagonal_last", "evaluation.cells=diagonal_last",
    ]  # fmt: skip


TASKS = ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")


if __name__ == "__main__":
    main()
