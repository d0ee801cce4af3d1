"""A step of the framework gives the gradients of the plain computation: each row alone, logits everywhere.

The plain side knows nothing of ours: no padding, no micro-batches, transformers' own shifted cross entropy, summed over
all label tokens of the step and divided by their number.
"""

import copy
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config

from trace_hydra.context import StageContext
from trace_hydra.data.batches import TrainBatches
from trace_hydra.data.encode import IGNORED, EncodedRow
from trace_hydra.methods.base import Method
from trace_hydra.models import attention
from trace_hydra.models.forward import lm_loss
from trace_hydra.models.tuning import Full, Lora
from trace_hydra.plan import Phase, Stage
from trace_hydra.stage import StageModule

VOCABULARY = 60
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=640, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    # its layers attend to 64 tokens and to all, by turns
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=64, final_logit_softcapping=2.0),
    "gemma2": Gemma2Config(
        **SIZES, head_dim=8, sliding_window=64, final_logit_softcapping=2.0, attn_logit_softcapping=1.0
    ),
}
KINDS = [
    *((name, kind) for name in ("llama", "qwen2", "qwen3") for kind in (attention.NAME, "sdpa")),
    ("gemma3", attention.NAME),  # PyTorch's kernel under this name too: windows need masks
    ("gemma2", "eager"),  # sdpa cannot cap scores
]
TUNINGS = {
    "full": Full(),
    "lora": Lora(r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"]),
}
# Both sides add the same terms in another order. A sum of n terms in fp32 is off by some sqrt(n) * 6e-8 of its size; a
# weight's gradient has a term for each of the 2,104 tokens here: 2.8e-6 of its largest value (measured: 8e-7). In fp64
# the same is 5e-15, and 1e-13 was measured where a norm's fp32 fell on the other side of a rounding; Gemma's norms
# multiply by their weights, and eager attention takes its softmax, in fp32 whatever the type of the weights.
FP32, FP64 = 5e-6, 1e-12


@pytest.fixture(scope="module")
def rows() -> list[EncodedRow]:
    """12 rows of 3 to 600 tokens, of one block of attention and of many; 1 to 90 labels."""
    rng, made = Random(0), []
    lengths = {
        3: 1,
        4: 2,
        9: 1,
        40: 7,
        41: 1,
        90: 60,
        150: 2,
        200: 90,
        383: 3,
        395: 17,
        400: 1,
        600: 5,
    }
    for number, (length, labels) in enumerate(lengths.items()):
        ids = np.array([rng.randrange(3, VOCABULARY) for _ in range(length)], dtype=np.int32)
        made.append(EncodedRow(ids, length - labels, False, f"row-{number}"))
    return made


class Keeping(Method):
    """Keeps the accumulated gradients that the optimizer got, and the shapes of the passes."""

    def __init__(self):
        self.gradients: dict[str, torch.Tensor] = {}
        self.shapes: list[tuple[int, ...]] = []

    def losses(self, ctx, batch):
        self.shapes.append(tuple(batch["input_ids"].shape))
        return {"lm": lm_loss(ctx.model, dict(batch))}

    def after_step(self, ctx):
        self.gradients = {name: cast(torch.Tensor, one.grad).clone() for name, one in ctx.trainable().items()}


def made(name: str, kind: str, tuning: str, dtype: torch.dtype) -> Any:
    """A model to train; its weights are the same whatever attends."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(CONFIGS[name]), attn_implementation="eager" if kind == "eager" else "sdpa"
        )
        if kind == attention.NAME:
            attention.use_for_cpu(model)
        model = TUNINGS[tuning].apply(model).to(dtype)
        for at, weight in model.named_parameters():
            if "lora_B" in at:  # zero at first, and so would be the gradient of A
                torch.nn.init.normal_(weight, std=0.1)
    return model.train()


def framework(model: Any, rows: list[EncodedRow]) -> Keeping:
    """One step of a stage, as a run trains it."""
    method = Keeping()
    ctx: Any = SimpleNamespace(model=model, stage=Stage(1, "one", len(rows), 1, 1, 0, ""))
    ctx.trainable = lambda: StageContext.trainable(ctx)
    module = StageModule(
        method=method, ctx=ctx, phase=Phase("task", (), 1), optimizer=lambda weights: torch.optim.SGD(weights, lr=0.0),
        schedule="constant", warmup_steps=0, total_steps=1, clip_norm=None,
    )  # fmt: skip
    batches = TrainBatches(rows, batch_size=len(rows), micro_batch_size=2, seed="0")
    double = next(model.parameters()).dtype == torch.float64
    trainer = Trainer(
        accelerator="cpu", precision="64-true" if double else "32-true", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, cast(Any, batches))
    return method


def plain(model: Any, rows: list[EncodedRow]) -> dict[str, torch.Tensor]:
    """Row after row by transformers alone."""
    total = sum(row.num_labels for row in rows)
    for row in rows:
        ids = torch.tensor(row.ids, dtype=torch.long)[None]
        labels = ids.clone()
        labels[:, : row.num_prompt] = IGNORED
        if next(model.parameters()).dtype == torch.float32:
            loss = model(input_ids=ids, labels=labels, num_items_in_batch=total).loss
        else:  # the same in fp64; transformers' own casts logits to fp32
            logits = model(input_ids=ids).logits
            loss = torch.nn.functional.cross_entropy(
                logits[0, :-1], labels[0, 1:], ignore_index=IGNORED, reduction="sum"
            )
            loss = loss / total
        loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_steps_gradients_are_those_of_the_plain_computation(rows, name, kind, tuning, dtype):
    model = made(name, kind, tuning, dtype)
    assert model.config._attn_implementation == kind
    seen = framework(model, rows)
    assert len(seen.shapes) > 3 and seen.shapes != sorted(seen.shapes, reverse=True)
    assert min(width for _, width in seen.shapes) < 64 < 512 < max(width for _, width in seen.shapes)
    wanted = plain(made(name, "eager" if kind == "eager" else "sdpa", tuning, dtype), rows)
    assert seen.gradients.keys() == wanted.keys()
    off = {
        weight: float((gradient - wanted[weight]).abs().max() / wanted[weight].abs().max())
        for weight, gradient in seen.gradients.items()
    }
    exact = dtype == torch.float64 and not name.startswith("gemma")
    assert max(off.values()) < (FP64 if exact else FP32), off
