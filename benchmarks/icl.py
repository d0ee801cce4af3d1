"""In-context learning with 6 demonstrations: the same engine with and without reading the shared head once.

python -m benchmarks.icl --data FOLDER --rows 8 --task FOMC
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.common import Contender, Stopwatch, alternate, options, prepared, report
from trace_hydra.evaluate import answer_prompts
from trace_hydra.interrupt import Interrupts
from trace_hydra.live import Live
from trace_hydra.models import decode
from trace_hydra.run import quiet
from trace_hydra.store.entries import Store


def answer(live: Live, shared: int, made: dict[int, list[str]]) -> Mapping[str, Any]:
    """Answer all tasks; heads of at least `shared` tokens are read once."""
    ctx = live.at(len(live.prepared.run.stages))
    tokens, texts = 0, []
    with patch.object(decode, "SHARED", shared), Stopwatch() as watch:
        for task in live.prepared.run.tasks:
            prompts = [row.prompt for row in live.prepared.tasks[task].test]
            answers, used = answer_prompts(live.method, ctx, prompts, live.prepared.views[task])
            tokens += used
            texts += [one["raw"] for one in answers]
    made[shared] = texts
    return {"seconds": watch.seconds, "tokens": tokens}


def main(argv: Sequence[str] | None = None) -> None:
    """Let both take turns."""
    parser = options(__doc__ or "")
    parser.add_argument("--task", nargs="+", default=["FOMC", "C-STANCE"])
    arguments = parser.parse_args(argv)
    order = f"task_order=[{','.join(arguments.task)}]"
    settings = ["method=icl", "trainer.precision=bf16-mixed", "capability=none", "protocol.max_prompt_tokens=3584"]
    made: dict[int, list[str]] = {}
    with quiet(), Interrupts() as interrupts:
        config, parts, plan = prepared(arguments, order, *settings)
        live = Live(config, parts, plan, Store(Path(config.paths.store)), interrupts)
        for stage in plan.run.stages:
            live.ensure(stage)
        with_reuse, without = partial(answer, live, decode.SHARED, made), partial(answer, live, 10**9, made)
        contenders = [Contender("ours", with_reuse, with_reuse), Contender("without reuse", without)]
        alternate(contenders, arguments.repeats)
    mine, theirs = made.values()
    different = sum(one != other for one, other in zip(mine, theirs, strict=True))
    print(f"{len(mine)} answers, {different} differ")
    report("6-shot in-context learning", contenders, arguments.out, answers=len(mine), different=different)


if __name__ == "__main__":
    main()
