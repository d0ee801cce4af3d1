"""Attention by blocks, on a CPU: PyTorch's own kernel computes the same, forward and backward."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trace_hydra.models import blocks
from trace_hydra.models.attention import NAME, attend, use_for_cpu

SIZES: dict[str, Any] = dict(
    vocab_size=30, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=600,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation="sdpa")
    use_for_cpu(made)
    return made


@pytest.mark.parametrize("kept", [0, blocks.KEPT])
@pytest.mark.parametrize("length", [2, 64, 65, 512, 513])
def test_values_and_gradients_are_those_of_pytorch(model, length, kept, monkeypatch):
    """fp32: sums in another order, so 1e-5 of values around 1; whether weights are kept or computed again."""
    monkeypatch.setattr(blocks, "KEPT", kept)
    layer, torch_rng = model.model.layers[0].self_attn, torch.Generator().manual_seed(1)
    shapes = [(3, 6, length, 8), (3, 2, length, 8), (3, 2, length, 8)]
    given = [torch.randn(shape, generator=torch_rng).requires_grad_() for shape in shapes]
    outputs, gradients = [], []
    for function in (attend, sdpa_attention_forward):
        output, weights = function(layer, given[0], given[1], given[2], None, scaling=0.3)
        gradients.append(torch.autograd.grad(output.square().sum(), given))
        outputs.append(output)
        assert weights is None and output.shape == (3, length, 6, 8)
    assert torch.allclose(*outputs, atol=1e-5)
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("length", [64, 200, 700])
def test_in_bf16_it_is_as_close_to_the_exact_result_as_pytorch(length):
    """Relative to fp64; bf16 has 8 bits, so 4e-3 of rounding. Measured: outputs 4.5e-3 (PyTorch, whose scores are not
    rounded, 2.9e-3), gradients 5e-3 (PyTorch 7e-3)."""
    rng = torch.Generator().manual_seed(2)
    shapes = [(2, 6, length, 32), (2, 2, length, 32), (2, 2, length, 32)]
    given = [torch.randn(shape, generator=rng).bfloat16().requires_grad_() for shape in shapes]
    exact = [one.detach().double().requires_grad_() for one in given]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        exact[0], exact[1], exact[2], is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    output = blocks.causal_attention(given[0], given[1], given[2], 32**-0.5)
    weights = torch.randn(output.shape, generator=rng).bfloat16()
    off = [float((output - wanted).detach().norm() / wanted.detach().norm())]
    ours, theirs = torch.autograd.grad(output, given, weights), torch.autograd.grad(wanted, exact, weights.double())
    off += [float((one - other).norm() / other.norm()) for one, other in zip(ours, theirs, strict=True)]
    assert output.dtype == torch.bfloat16 and max(off) < 8e-3, off


def test_under_autocast_it_computes_in_autocasts_type():
    """Some architectures hand it queries in fp32 beside values in bf16."""
    query, key, value = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = blocks.causal_attention(query, key, value, 1.0)
        plain = blocks.causal_attention(query.bfloat16(), key.bfloat16(), value, 1.0)
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, plain)


def test_a_model_takes_it_and_gives_the_same_logits(model):
    ids = torch.arange(24).reshape(2, 12)
    assert model.config._attn_implementation == NAME
    ours = model(ids).logits
    model.set_attn_implementation("sdpa")
    theirs = model(ids).logits
    use_for_cpu(model)
    assert torch.allclose(ours, theirs, atol=1e-5) and model.config._attn_implementation == NAME


def test_a_mask_a_cache_and_other_kinds_go_the_general_way(model):
    """Left padding needs a mask; a step of generation has one query and many keys."""
    ids, mask = torch.arange(24).reshape(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    results = []
    for name in (NAME, "sdpa"):
        model.set_attn_implementation(name)
        masked = model(ids, attention_mask=mask).logits[:, 6:]
        read = model(ids[:, :8], use_cache=True)
        step = model(ids[:, 8:9], past_key_values=read.past_key_values).logits
        results.append((masked, step))
    use_for_cpu(model)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*results, strict=True))
    eager = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation="eager")
    use_for_cpu(eager)
    assert eager.config._attn_implementation == "eager"


def test_dropout_drops_weights(model):
    """All values 1: without dropout every output is 1; with half dropped, 0 or 2 for the first token."""
    layer = model.model.layers[0].self_attn
    query, ones = torch.zeros(1, 6, 4, 8), torch.ones(1, 2, 4, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped, _ = attend(layer, query, ones, ones, None, dropout=0.5)
    plain, _ = attend(layer, query, ones, ones, None)
    assert torch.allclose(plain, torch.ones(1, 4, 6, 8)) and set(dropped[0, 0].flatten().tolist()) == {0.0, 2.0}
