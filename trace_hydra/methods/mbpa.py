"""MbPA++: sparse replay, and adaptation to each test row (de Masson d'Autume et al. 2019, arXiv:1906.01076).

Paper -> code:  section 3.2, episodic memory <x, y> -> memory, a share `write` of each task's rows
    key network, frozen -> `key`: mean START embedding of a prompt's tokens;  section 3.3, 1 % replay -> replay_rate
    section 3.4, K nearest keys, Euclidean -> `nearest`, neighbours
    eq. 2: argmin_W' lambda |W' - W|^2 - sum_k 1/K log p(y_k | x_k; W') -> `_adapt`, `steps` gradient steps from W;
        lambda -> strength;  L -> steps;  the adapted weights answer one row, then W comes back, bit for bit
Differs from the paper: keys are mean token embeddings, not a second BERT's first token (no second model in memory);
    log p is divided by the answer's tokens, so that long answers do not outweigh others; replayed rows share steps with
    new ones at the paper's rate, a new draw a stage (there 100 rows after 10,000), at least one; a task's rows are
    written when its stage ends, so replay is of earlier tasks only; dropout is off while adapting.
Differs from official TRACE: replay happens (there replay_size = 0, model/Replay/MbPAplusplus.py); keys are means over
    the prompt (there the state of position 0, padding or BOS, :194); every test row is answered (there a break after
    the first batch, :311); the whole write share is kept (there the first 100 micro-batches, :197-200).
Memory: the text of written rows and 4 bytes per row and width for keys; 4 bytes per weight of the embedding matrix on
    the CPU; one copy of the trainable weights on the device while answering.
Compute: per test row `steps` forward and backward passes over `neighbours` rows; 960 row passes with the
    paper's values, so scoring takes far longer than training. Lower steps and neighbours on a CPU.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_hydra.context import StageContext, TrainTask
from trace_hydra.data.batches import collate
from trace_hydra.data.encode import IGNORED, EncodedRow
from trace_hydra.data.task import Example
from trace_hydra.errors import ConfigError
from trace_hydra.methods.base import Method
from trace_hydra.methods.memory import ExampleMemory, kept_rows, rows_size
from trace_hydra.plan import Phase
from trace_hydra.sizes import RunSize, StateSize


class LocalAdaptation(Method):
    """Replay a little, and fit the model to a test row's neighbours before it answers.

    Args:
        write: Share of each task's train rows that is written to the memory, in (0, 1].
        replay_rate: Replayed rows per new row, in [0, 1].
        neighbours: K, memory rows a test row is adapted to, at least 1.
        steps: L, gradient steps of the adaptation; 0: none.
        learning_rate: Of these steps, above 0.
        strength: lambda, weight of the squared distance to the base weights, at least 0.
        tokens_per_forward: Padded tokens of neighbours in one forward pass, at least one row; changes memory and
            speed, not the loss.
    """

    grad_at_test = True

    def __init__(
        self,
        *,
        write: float,
        replay_rate: float,
        neighbours: int,
        steps: int,
        learning_rate: float,
        strength: float,
        tokens_per_forward: int,
    ):
        if not 0 < write <= 1:
            raise ConfigError(f"method.write={write} must be in (0, 1]; it is the share of each task's rows stored.")
        if not 0 <= replay_rate <= 1:
            raise ConfigError(f"method.replay_rate={replay_rate} must be in [0, 1]; it is replayed rows per new row.")
        for key, value, least in (
            ("neighbours", neighbours, 1),
            ("steps", steps, 0),
            ("strength", strength, 0),
            ("tokens_per_forward", tokens_per_forward, 1),
        ):
            if value < least:
                raise ConfigError(f"method.{key}={value} must be at least {least}; it belongs to the local adaptation.")
        if learning_rate <= 0:
            raise ConfigError(f"method.learning_rate={learning_rate} must be above 0; it is the adaptation's step.")
        self.write, self.replay_rate = write, replay_rate
        self.neighbours, self.steps = neighbours, steps
        self.learning_rate, self.strength = learning_rate, strength
        self.tokens_per_forward = tokens_per_forward
        self.memory = ExampleMemory()
        self.keys: dict[str, Tensor] = {}
        """Task -> keys of its rows in memory, (rows, width), fp32, CPU."""
        self.embedding = torch.zeros(0)
        """Of the start model, (vocab, width), fp32, CPU."""

    def setup(self, ctx: StageContext) -> None:
        """Copy the start model's token embeddings: the key network."""
        weight: Tensor = ctx.model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
        self.embedding = weight.detach().float().cpu().clone()

    def phases(self, ctx: StageContext) -> Sequence[Phase]:
        """The task's rows with a few of the memory's."""
        stored = self.memory.examples()
        replayed = ctx.rng.sample(stored, self._num_replayed(len(ctx.task.train), len(stored)))
        return [Phase("task", [*ctx.task.train, *replayed], ctx.epochs_of(ctx.task.name))]

    def rows_per_pass(self, rows: Sequence[int], stage: int, alignment: int) -> int:
        """The task's rows and those replayed."""
        stored = sum(kept_rows(count, self.write) for count in rows[: stage - 1])
        return rows[stage - 1] + self._num_replayed(rows[stage - 1], stored)

    def end_stage(self, ctx: StageContext) -> None:
        """Write the task's rows and their keys."""
        self.memory.keep(ctx.task.name, ctx.task.train, self.write, ctx.rng)
        stored = self.memory.by_task[ctx.task.name]
        self.keys[ctx.task.name] = self.key(ctx, [row.prompt for row in stored], ctx.task.instruction)

    def answer(self, ctx: StageContext, prompts: Sequence[str], task: TrainTask) -> list[str]:
        """Answer each prompt with weights adapted to its neighbours; while nothing is stored, with the base weights."""
        if not len(self.memory) or not self.steps:
            return super().answer(ctx, prompts, task)
        stored, keys = self.memory.examples(), torch.cat([self.keys[name] for name in self.memory.by_task])
        queries = self.key(ctx, prompts, task.instruction)
        base = {name: weight.detach().clone() for name, weight in ctx.trainable().items()}
        was_training = ctx.model.training
        ctx.model.eval()
        answers = []
        try:
            for prompt, query in zip(prompts, queries, strict=True):
                self._adapt(ctx, [stored[index] for index in nearest(keys, query, self.neighbours)], base)
                answers += super().answer(ctx, [prompt], task)
                _put_back(ctx, base)
        finally:
            _put_back(ctx, base)
            ctx.model.train(was_training)
        return answers

    def key(self, ctx: StageContext, prompts: Sequence[str], instruction: str) -> Tensor:
        """Average the start embeddings of each prompt's tokens, cut as the protocol cuts them: (prompts, width)."""
        ids, _ = ctx.encoder.prompts(prompts, instruction)
        return torch.stack([self.embedding[torch.tensor(one)].mean(0) for one in ids])

    def num_stored_examples(self) -> int:
        """The rows written to the memory."""
        return len(self.memory)

    def state_size(self, size: RunSize) -> StateSize:
        """Written rows, their keys, the key network; while answering, one copy of what trains on the device."""
        written = [kept_rows(rows, self.write) for rows in size.rows]
        vectors = 4 * size.width * (sum(written) + size.vocabulary)
        return StateSize(
            stored=rows_size(size, written) + vectors,
            device=size.weight_bytes * size.num_trainable if self.steps else 0,
        )

    def state_dict(self) -> dict[str, Any]:
        """Rows, keys and the key network."""
        keys = {f"keys.{task}": keys for task, keys in self.keys.items()}
        return {"memory": self.memory.state_dict(), "embedding": self.embedding, **keys}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.memory.load_state_dict(state["memory"])
        self.embedding = state["embedding"]
        self.keys = {task: state[f"keys.{task}"] for task in self.memory.by_task}

    def _num_replayed(self, num_new: int, num_stored: int) -> int:
        return min(num_stored, ceil(num_new * self.replay_rate - 1e-9))

    def _adapt(self, ctx: StageContext, examples: Sequence[Example], base: Mapping[str, Tensor]) -> None:
        """Take `steps` gradient steps on eq. 2, from the base weights."""
        rows = ctx.encode(examples)
        batches = list(self._batches(ctx, rows))
        weights = ctx.trainable()
        for _ in range(self.steps):
            gradients = {name: 2 * self.strength * (weight.detach() - base[name]) for name, weight in weights.items()}
            for batch in batches:
                with torch.enable_grad(), ctx.autocast():
                    loss = summed_loss(ctx, batch) / len(rows)
                found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for name, gradient in zip(weights, found, strict=True):
                    if gradient is not None:
                        gradients[name] += gradient
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.sub_(gradients[name], alpha=self.learning_rate)

    def _batches(self, ctx: StageContext, rows: Sequence[EncodedRow]) -> Iterator[dict[str, Tensor]]:
        """Pad rows of similar length together."""
        left = sorted(rows, key=lambda row: -len(row.ids))
        while left:
            count = max(1, self.tokens_per_forward // len(left[0].ids))
            batch, left = collate(left[:count]), left[count:]
            yield {key: value.to(ctx.device) for key, value in batch.items() if isinstance(value, Tensor)}


def nearest(keys: Tensor, query: Tensor, count: int) -> list[int]:
    """List the rows of `keys` (rows, width) with the smallest Euclidean distance to `query` (width,), nearest first.

    Of equally near rows the first comes first.
    """
    distances = (keys - query).square().sum(1)
    return torch.argsort(distances, stable=True)[:count].tolist()


def summed_loss(ctx: StageContext, batch: Mapping[str, Any]) -> Tensor:
    """Sum over rows the mean negative log-likelihood of a row's answer tokens; scalar fp32."""
    logits, labels = ctx.label_logits(batch)
    losses = F.cross_entropy(logits.float(), labels, reduction="none")  # (num_labels,)
    mask = batch["labels"][:, 1:] != IGNORED
    counts = mask.sum(1)
    return (losses / counts[mask.nonzero()[:, 0]]).sum()


def _put_back(ctx: StageContext, base: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, weight in ctx.trainable().items():
            weight.copy_(base[name])
