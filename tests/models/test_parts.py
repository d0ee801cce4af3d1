"""Cross entropy in parts: the loss and gradients of all logits at once, without them."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, Qwen3Config

from trace_hydra.data.encode import IGNORED
from trace_hydra.errors import MethodError
from trace_hydra.models import parts
from trace_hydra.models.forward import lm_loss

VOCABULARY, WIDTH = 50, 32
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "tied": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "capped": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=1.5),
    "divided": GraniteConfig(**SIZES, logits_scaling=3.0),
    "multiplied": CohereConfig(**SIZES, logit_scale=0.25),
}
LABELS = 4 + 9
PART = 3


def made(name: str, *, lora: bool = False) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").train()
        with torch.no_grad():  # far from a flat distribution, so that a cap shows
            model.get_output_embeddings().weight.mul_(20)
        if lora:
            model = get_peft_model(
                model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
            )
    return model


@pytest.fixture
def batch():
    ids = torch.arange(3, 43).reshape(2, 20)
    labels = torch.full_like(ids, IGNORED)
    labels[0, 16:], labels[1, 2:11] = ids[0, 16:], ids[1, 2:11]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def found(model: Any, batch: dict[str, Any], kind: torch.dtype | None = None) -> tuple[torch.Tensor, dict[str, Any]]:
    model.zero_grad()
    with torch.autocast("cpu", kind) if kind is not None else nullcontext():
        loss = lm_loss(model, batch)
    (loss * 0.7).backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return loss.detach(), gradients


@pytest.fixture
def in_parts(monkeypatch):
    """Parts of three positions from now on; how many positions the output layer saw in each."""

    def begin() -> list[int]:
        monkeypatch.setattr(parts, "AT_ONCE", PART * VOCABULARY)
        monkeypatch.setattr(parts, "FROM", PART * VOCABULARY)
        seen: list[int] = []
        logits = parts.Head.logits
        monkeypatch.setattr(parts.Head, "logits", lambda head, hidden: seen.append(len(hidden)) or logits(head, hidden))
        return seen

    return begin


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_all_logits(name, lora, batch, in_parts):
    """fp32: the same terms in another order, so 1e-6 of the loss and 1e-5 of a weight's largest gradient."""
    model = made(name, lora=lora)
    wanted, gradients = found(model, batch)
    seen = in_parts()
    loss, others = found(model, batch)
    assert seen == [3, 3, 3, 3, 1] and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert others.keys() == gradients.keys()
    for weight, gradient in gradients.items():
        assert (others[weight] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), weight


def test_fp64_stays_fp64(batch, in_parts):
    """Norms compute in fp32 either way, on the same numbers; what differs is the order of fp64 sums."""
    model = made("capped").double()
    wanted, gradients = found(model, batch)
    in_parts()
    loss, others = found(model, batch)
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(wanted.item(), rel=1e-14)
    for weight, gradient in gradients.items():
        assert (others[weight] - gradient).abs().max() <= 1e-12 * gradient.abs().max(), weight


def test_under_autocast_the_difference_is_that_of_bf16(batch, in_parts):
    """bf16 has 8 bits: 2^-8 of a value in each of some roundings."""
    model = made("tied")
    wanted, gradients = found(model, batch, torch.bfloat16)
    in_parts()
    loss, others = found(model, batch, torch.bfloat16)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-3)
    assert all(one.dtype == torch.float32 for one in others.values())
    for weight, gradient in gradients.items():
        assert (others[weight] - gradient).norm() <= 0.02 * gradient.norm(), weight


class Largest(TorchDispatchMode):
    """Keeps the most logits, (..., vocab), that a tensor held."""

    logits = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor) and one.dim() > 1 and one.shape[-1] == VOCABULARY and len(one) != WIDTH:
                self.logits = max(self.logits, one.numel())
        return result


@pytest.mark.parametrize("lora", [False, True])
def test_never_the_logits_of_more_than_a_part(lora, batch, in_parts):
    """13 labels: 650 logits at once, 150 in parts of three, in the backward pass too."""
    model = made("capped", lora=lora)
    with Largest() as plain:
        found(model, batch)
    in_parts()
    with Largest() as less:
        found(model, batch)
    assert (plain.logits, less.logits) == (LABELS * VOCABULARY, PART * VOCABULARY)


def test_without_gradients_there_are_none(batch, in_parts):
    model = made("llama").requires_grad_(False)
    wanted = lm_loss(model, batch)
    seen = in_parts()
    frozen = lm_loss(model, batch)
    with torch.no_grad():
        other = lm_loss(model.requires_grad_(True), batch)
    assert len(seen) == 10 and not frozen.requires_grad and not other.requires_grad
    assert frozen.item() == other.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_gradients_of_some_weights(batch, in_parts):
    model = made("tied")
    chosen = [model.model.layers[0].self_attn.q_proj.weight, model.lm_head.weight]
    wanted = torch.autograd.grad(lm_loss(model, batch), chosen)
    in_parts()
    loss = lm_loss(model, batch)
    for one, other in zip(torch.autograd.grad(loss, chosen, retain_graph=True), wanted, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    with pytest.raises(MethodError, match="differentiated once"):
        torch.autograd.grad(loss, chosen)


def test_gradients_of_gradients_are_refused(batch, in_parts):
    model = made("llama")
    in_parts()
    weight = model.model.norm.weight
    with pytest.raises(MethodError, match=r"differentiated once.*label_logits"):
        torch.autograd.grad(lm_loss(model, batch), [weight], create_graph=True)


def test_who_watches_the_output_layer_sees_all_at_once(batch, in_parts):
    model = made("llama")
    seen = in_parts()
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda layer, given, out: shapes.append(tuple(out.shape)))
    lm_loss(model, batch)
    handle.remove()
    handle = model.lm_head.weight.register_hook(lambda gradient: gradient * 0)
    _, gradients = found(model, batch)
    handle.remove()
    assert not seen and shapes == [(1, LABELS, VOCABULARY)] and not gradients["lm_head.weight"].any()


def test_few_labels_are_left_alone(batch, in_parts):
    model = made("llama")
    seen = in_parts()
    batch["labels"][1], batch["labels"][0, :17] = IGNORED, IGNORED
    lm_loss(model, batch)
    assert not seen


def test_the_decoder_is_itself_again_after_an_error(batch, in_parts, monkeypatch):
    model = made("llama")
    in_parts()
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: 1 / 0 if hidden.shape[1] == PART else hidden)
    with pytest.raises(ZeroDivisionError):
        lm_loss(model, batch)
    assert "forward" not in vars(model.model) and model.model(batch["input_ids"]).last_hidden_state.shape == (2, 20, 32)
