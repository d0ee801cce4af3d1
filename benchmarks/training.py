"""Training speed on a mixture of the tasks: ours, TRL's SFTTrainer, the HF Trainer, and the settings of TRACE's code.

    python -m benchmarks.training --data FOLDER --rows 4 --tuning full

All train the same rows (the same ids and labels) once with the same optimizer and rows a step, from the same weights,
in bf16 autocast without gradient checkpointing. Counted are prompt and answer tokens without padding. Before the turns
each takes one step on the eight longest rows, which warms it up; the losses of that step say whether all train the
same. A compiled model is compiled before the turns, for all batches. TRL comes from the extra `benchmarks`; without it
its lines are left out.
"""

import copy
import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from random import Random
from typing import Any

import torch
from lightning.pytorch import Trainer
from omegaconf import OmegaConf

from benchmarks.common import Contender, Stopwatch, alternate, options, prepared, report
from trace_hydra.context import StageContext
from trace_hydra.data.batches import TrainBatches
from trace_hydra.data.encode import IGNORED, EncodedRow
from trace_hydra.methods.base import Method
from trace_hydra.models.device import fit_to
from trace_hydra.models.generate import Decoding
from trace_hydra.plan import Phase, Stage
from trace_hydra.run import quiet
from trace_hydra.stage import StageModule

ROWS_A_STEP = 8
OFFICIAL_ROWS = 4
"""Of a micro-batch in TRACE's scripts."""


COMPILED = "ours, compiled"


class Bench:
    """The rows and the start weights that all contenders get."""

    def __init__(self, arguments: Any):
        tuning = [f"tuning={arguments.tuning}"]
        self.config, self.parts, self.plan = prepared(arguments, "budget=mini", *tuning)
        self.rows: list[EncodedRow] = []
        for task in self.plan.tasks.values():
            self.rows += self.plan.encoder.pairs(task.train, task.instruction)
        Random(0).shuffle(self.rows)
        self.tokens = num_tokens(self.rows)
        self.start = self.parts.model.load()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def model(self, *, ours: bool = False, compile: bool = False) -> Any:
        """Give a model in the start state, as tuned; ours as a run fits it to the device."""
        torch.manual_seed(0)
        model = copy.deepcopy(self.start)
        if ours:
            settings: Any = OmegaConf.merge(self.config.trainer, {"compile": compile})
            fit_to(torch.device(self.device), model, settings, self.config.model.get("kernels") or "torch")
        model = self.parts.tuning.apply(model)
        model.train()
        return model.to(self.device)

    @cached_property
    def _compiled(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """The one compiled model, for compiling anew in each turn would be timed, and its start weights."""
        model = self.model(ours=True, compile=True)
        return model, {name: weight.clone() for name, weight in model.state_dict().items()}

    def compiled(self) -> Any:
        """Give the compiled model in the start state."""
        model, start = self._compiled
        model.load_state_dict(start)
        model.zero_grad(set_to_none=True)
        return model

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        """Build the same optimizer for all."""
        return self.parts.optimizer([weight for weight in model.parameters() if weight.requires_grad])


def ours(bench: Bench, rows: Sequence[EncodedRow], *, compile: bool = False) -> Mapping[str, Any]:
    """One phase of a stage, as the framework trains it."""
    model = bench.compiled() if compile else bench.model(ours=True)
    ctx = StageContext(
        model=model, tokenizer=bench.plan.tokenizer, encoder=bench.plan.encoder, tuning=bench.parts.tuning,
        device=torch.device(bench.device), decoding=Decoding(False, 1.0, 1.0), batch_tokens=4096, instructions={},
        alignment=(), epochs_of=lambda task: 1, generation_seed=0, data_seed=0, autocast=lambda: None, total_stages=1,
    )  # fmt: skip
    ctx.stage = Stage(1, "mixture", len(rows), 1, 1, num_tokens(rows), "")
    steps = -(-len(rows) // ROWS_A_STEP)
    module = StageModule(
        method=Method(), ctx=ctx, phase=Phase("task", (), 1), optimizer=bench.parts.optimizer, schedule="constant",
        warmup_steps=0, total_steps=steps, clip_norm=1.0,
    )  # fmt: skip
    batches = TrainBatches(rows, batch_size=ROWS_A_STEP, micro_batch_size=ROWS_A_STEP, seed="0")
    trainer = Trainer(
        accelerator="auto", devices=1, precision="bf16-mixed", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    with Stopwatch() as watch:
        trainer.fit(module, batches)  # type: ignore[arg-type]
    return {"seconds": watch.seconds, "tokens": num_tokens(rows), "loss": module.readings.means["lm"]}


def official(bench: Bench, rows: Sequence[EncodedRow]) -> Mapping[str, Any]:
    """TRACE's loop: batches of 4 in random order, padded on the left to the longest, logits everywhere.

    training/main.py and utils/data/data_collator.py at 462e39f; two micro-batches a step, so that steps are alike.
    """
    model = bench.model()
    optimizer = bench.optimizer(model)
    order, losses = list(rows), []
    Random(1).shuffle(order)
    with Stopwatch() as watch:
        for step in range(0, len(order), ROWS_A_STEP):
            group = order[step : step + ROWS_A_STEP]
            for start in range(0, len(group), OFFICIAL_ROWS):
                batch = {key: value.to(bench.device) for key, value in left_padded(group[start : start + 4]).items()}
                with torch.autocast(bench.device, torch.bfloat16):
                    loss = model(**batch, use_cache=False).loss
                losses.append(loss.item())  # logged after every micro-batch
                (loss * OFFICIAL_ROWS / ROWS_A_STEP).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return {"seconds": watch.seconds, "tokens": num_tokens(rows), "loss": sum(losses) / len(losses)}


def left_padded(rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
    """Pad on the left to the longest."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for at, row in enumerate(rows):
        ids[at, -len(row.ids) :] = torch.tensor(row.ids)
        mask[at, -len(row.ids) :] = 1
        labels[at, -row.num_labels :] = ids[at, -row.num_labels :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def num_tokens(rows: Sequence[EncodedRow]) -> int:
    """Count tokens without padding."""
    return sum(len(row.ids) for row in rows)


def dataset(rows: Sequence[EncodedRow]) -> Any:
    """The rows as trainers take them."""
    from datasets import Dataset

    pairs = [(row.ids.tolist(), [IGNORED] * row.num_prompt + row.ids[row.num_prompt :].tolist()) for row in rows]
    return Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in pairs])


def settings(folder: str) -> dict[str, Any]:
    """What the trainers of transformers and TRL have in common here."""
    return dict(
        output_dir=folder, per_device_train_batch_size=ROWS_A_STEP, num_train_epochs=1, bf16=True,
        use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False, save_strategy="no", report_to=[],
        lr_scheduler_type="constant", max_grad_norm=1.0, disable_tqdm=True, logging_strategy="no",
        dataloader_pin_memory=False,
    )  # fmt: skip


def hf(bench: Bench, rows: Sequence[EncodedRow]) -> Mapping[str, Any]:
    """The HF Trainer with batches of similar lengths."""
    from transformers import DataCollatorForSeq2Seq, TrainingArguments
    from transformers import Trainer as HfTrainer

    model = bench.model()
    with tempfile.TemporaryDirectory() as folder:
        trainer = HfTrainer(
            model=model,
            args=TrainingArguments(**settings(folder), train_sampling_strategy="group_by_length"),
            train_dataset=dataset(rows),
            data_collator=DataCollatorForSeq2Seq(bench.plan.tokenizer, padding=True),
            optimizers=(bench.optimizer(model), None),
        )
        with Stopwatch() as watch:
            done = trainer.train()
    return {"seconds": watch.seconds, "tokens": num_tokens(rows), "loss": done.training_loss}


def trl(bench: Bench, rows: Sequence[EncodedRow], *, packing: bool) -> Mapping[str, Any]:
    """TRL's SFTTrainer, rows padded in batches of similar lengths, or packed."""
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]  # an extra

    model = bench.model()
    longest = max(len(row.ids) for row in rows)
    own = settings("")
    if packing:  # as many tokens a step as eight rows have on average
        own["per_device_train_batch_size"] = max(1, round(ROWS_A_STEP * num_tokens(rows) / len(rows) / longest))
    else:
        own["train_sampling_strategy"] = "group_by_length"
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**{**own, "output_dir": folder}, packing=packing, max_length=longest),
            train_dataset=dataset(rows),
            processing_class=bench.plan.tokenizer,
            optimizers=(bench.optimizer(model), None),
        )
        with Stopwatch() as watch:
            done = trainer.train()
    return {"seconds": watch.seconds, "tokens": num_tokens(rows), "loss": done.training_loss}


WAYS: Mapping[str, Any] = {
    "ours": ours,
    COMPILED: partial(ours, compile=True),
    "TRL packed": partial(trl, packing=True),
    "TRL padded": partial(trl, packing=False),
    "HF Trainer": hf,
    "TRACE's code": official,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Let all take turns."""
    parser = options(__doc__ or "")
    parser.add_argument("--tuning", default="full", help="full or lora")
    parser.add_argument("--only", nargs="*", choices=[name for name in WAYS if name != "ours"], help="contenders")
    arguments = parser.parse_args(argv)
    losses: dict[str, float] = {}
    with quiet():
        bench = Bench(arguments)
        longest = sorted(bench.rows, key=lambda row: len(row.ids))[-ROWS_A_STEP:]

        def step(name: str) -> None:
            losses[name] = WAYS[name](bench, longest)["loss"]
            if name == COMPILED:  # for the shapes of all batches
                WAYS[name](bench, bench.rows)

        names = ["ours", *(arguments.only if arguments.only is not None else list(WAYS)[1:])]
        if not importlib.util.find_spec("trl"):
            names = [name for name in names if not name.startswith("TRL")]
        contenders = [Contender(name, partial(WAYS[name], bench, bench.rows), partial(step, name)) for name in names]
        alternate(contenders, arguments.repeats)
    print("loss of one step on the same rows: " + ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items()))
    shape = f"{len(bench.rows)} rows, {bench.tokens:,} tokens, {ROWS_A_STEP} rows a step"
    report(f"training, tuning={arguments.tuning}: {shape}", contenders, arguments.out, losses=losses)


if __name__ == "__main__":
    main()
