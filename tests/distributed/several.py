"""A process of several runs, one after the other: python several.py FOLDER NAME=OVERRIDES... ; OVERRIDES joined by ;

Notes of each optimizer step which rows it held on all processes, and its loss, in FOLDER/<name>/steps.jsonl.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import compose_config

from trace_hydra import ranks
from trace_hydra import run as main
from trace_hydra.stage import StageModule

steps: list[dict] = []
edit, train = StageModule.on_before_optimizer_step, StageModule.training_step


def watch_rows(module, batch, batch_index):
    module.seen_ids = [name for one in batch if one["weight"] for name in one["example_ids"]]
    return train(module, batch, batch_index)


def watch_step(module, optimizer):
    step = module.readings._steps[-1]
    terms = [float(value) * share for value, share in zip(step.waiting, step.shares, strict=True)]
    together = [name for part in ranks.gather(module.seen_ids) for name in part]
    steps.append({"rows": sorted(together), "loss": sum(terms)})
    edit(module, optimizer)


StageModule.training_step, StageModule.on_before_optimizer_step = watch_rows, watch_step  # type: ignore[assignment]  # watched from outside

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for argument in sys.argv[2:]:
        name, _, overrides = argument.partition("=")
        directory = folder / name
        directory.mkdir(parents=True, exist_ok=True)
        steps.clear()
        places = [f"paths.runs={folder}", f"paths.store={directory / 'store'}"]
        main.run(compose_config([*overrides.split(";"), *places]), directory)
        if ranks.is_first():
            (directory / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
