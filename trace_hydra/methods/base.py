"""The interface of a method. A hook that a method does not need is left alone."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from trace_hydra.context import StageContext, TrainTask
from trace_hydra.plan import Phase
from trace_hydra.sizes import RunSize, StateSize


class Method:
    """A way to train a model on one task after another; the base class is plain sequential fine-tuning.

    Constructors take keywords only and give no default to what changes the science; the yaml holds the values.
    """

    version = 1
    """Raised when a change alters weights; part of every stage key."""
    terms: tuple[str, ...] = ("lm",)
    """Loss terms that `losses` must return, and that must not be zero from stage 2 on."""
    tunings: tuple[str, ...] | None = None
    """Options of `tuning` the method works with; None: any that trains something."""
    tuning_reason = ""
    """Why other tunings do not work; shown to whoever asks for one."""
    cells: Literal["all", "diagonal", "last"] = "all"
    """Which cells are the method's own. "diagonal": an answer never changes after its task's stage, so the diagonal
    is scored and carried down. "last": nothing is trained before the last stage, only its row is scored."""
    sees_all_tasks = False
    """Whether `ctx.all_tasks` is filled."""
    sees_task_id = False
    """Whether answers use which task a prompt belongs to."""
    grad_at_test = False
    """Whether `answer` trains."""
    picks_by_prompt = False
    """Whether each prompt is answered with weights, adapters or soft prompts that are picked by it."""
    merges = False
    """Whether weights change that do not train themselves, because trained ones are merged into them."""
    makes_rows = False
    """Whether it generates while it trains: rows of its own (ids begin with 'pseudo-'), say. Decoding then decides its
    weights too."""
    sees_num_stages = False
    """Whether `ctx.num_stages` may be read; its stages are then not shared with runs of another length."""
    draws_in_losses = False
    """Whether `losses` draws (from `ctx.rng` or the global generators): how many processes share a step then decides
    its weights too."""
    sharded = False
    """Whether it trains where no process has a whole weight: no hook may look at weights or gradients between
    `phases` and `end_stage`, at either end of which the model is whole."""
    stages_apart = False
    """Whether each stage begins at the start model and leaves nothing to the next; runs with other orders share it."""

    published: Mapping[str, str] = MappingProxyType({})
    """Option of `tuning` -> the method's name among published results (`family` there); reports show those rows."""

    def prefix_length(self, tuning: int, stages: int) -> int:
        """Most virtual tokens before a row, from those of the tuning; they count towards the model's positions."""
        return tuning

    def row_problems(self, task: TrainTask) -> list[str]:
        """Say what the method lacks in a task's train rows; asked for each task before the model is loaded."""
        return []

    def setup(self, ctx: StageContext) -> None:
        """Prepare once, before row 0 is scored; may replace `ctx.model`."""

    def begin_stage(self, ctx: StageContext) -> None:
        """Prepare a stage: new adapter, frozen weights, teacher."""

    def phases(self, ctx: StageContext) -> Sequence[Phase]:
        """List what to train on in this stage, in order; empty: no training."""
        return [Phase("task", ctx.task.train, ctx.epochs_of(ctx.task.name))]

    def rows_per_pass(self, rows: Sequence[int], stage: int, alignment: int) -> int:
        """Estimate how many rows stage `stage` (from 1) goes over in a pass; for the plan and the time left.

        Args:
            rows: Train rows of each task in order.
            stage: From 1.
            alignment: Alignment rows of the data.
        """
        return rows[stage - 1]

    def losses(self, ctx: StageContext, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Compute named, weighted scalars; their sum is minimised, each is logged."""
        return {"lm": ctx.lm_loss(batch)}

    def edit_gradients(self, ctx: StageContext) -> None:
        """Change `.grad`, once per optimizer step, after accumulation and before clipping."""

    def after_step(self, ctx: StageContext) -> None:
        """Change weights after `optimizer.step()`."""

    def end_stage(self, ctx: StageContext) -> None:
        """Keep what later stages need; the model is in eval mode on its device, gradients can be taken."""

    def answer(self, ctx: StageContext, prompts: Sequence[str], task: TrainTask) -> list[str]:
        """Answer prompts of a task, in order."""
        return ctx.generate(prompts, task.max_new_tokens, instruction=task.instruction, stop=task.stop)

    def serve(
        self, ctx: StageContext, prompts: Sequence[str]
    ) -> Iterator[tuple[Sequence[int], Sequence[Sequence[int]]]]:
        """Bring the model into the state in which it answers prompts of no task; for the capability sets.

        Yields:
            Indices of prompts, and the ids of the soft prompt before each of them; between two yields the model is in
            the state for these. Every index comes once; afterwards the model is as before.
        """
        yield range(len(prompts)), [ctx.prefix] * len(prompts)

    def num_stored_examples(self) -> int:
        """Count the rows kept from the stages so far, for the report."""
        return 0

    def state_size(self, size: RunSize) -> StateSize:
        """Estimate what the method will hold; for `debug=cost`, before anything is loaded."""
        return StateSize()

    def state_dict(self) -> dict[str, Any]:
        """Give what `end_stage` kept, as tensors and JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave.

        A model that lacks what earlier stages added gets it when it is next used. What that draws must leave the random
        state as it was (`torch.random.fork_rng`): a stage would begin otherwise than in a run that was never stopped.
        """
