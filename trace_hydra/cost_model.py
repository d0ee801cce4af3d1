"""Shapes of a model on the meta device, and the formulas for what it takes to train it and to generate with it.

B rows of s tokens in a micro-batch, T = B s; L layers of width h, a query heads and k key heads of size d, an MLP of
width f, a vocabulary of V, n labels; c bytes a number in matrix products (2 under autocast), r bytes in the residual
stream (those of the weights).

Activations: Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1) count what the backward pass needs of each
operator of a GPT layer, 34 s B h bytes and 5 a s^2 B of attention. The same count for a layer with RMSNorm, rotary
positions and a gated MLP, whose attention kernel keeps no matrix (SDPA, FlashAttention):

    norms   r m (1 + its weight trains) for a norm over m numbers: its input, and its output before the weight
    attn    4 c a d + 4 a: query, key, value (repeated to a heads) and output, and one logsumexp a head
    MLP     3 c f: gate before and after the activation, up
    linear  c in_features, only of linear layers whose weight trains; layers that read the same share it, unless
            autocast casts it for each; and 1 byte in front of an adapter with dropout

a token, summed over the layers. Eager attention adds 4 a s^2 B a layer, softmax in fp32, and its copy of c under
autocast. With gradient checkpointing r h a token and layer are kept, and everything of one layer at a time.
Mixed precision: autocast casts fp32 weights of linear layers for each forward pass, and the graph keeps the copies.
Logits exist at labels only: n V (8 + 4) bytes in fp32 (logits, log-probabilities, gradient), (2 c + 12) n V mixed.
Generation: a cache of L k d (r + c) bytes a token (keys leave the rotary positions in r bytes), and a prefill pass.
FLOPs a token: forward F = 2 x weights of the linear layers in the layers + 4 L a d s + 2 h V at labels; training 2 F
and 2 x weights of linear layers that train (6 x weights in all for full tuning, 4 x for an adapter); F again with
gradient checkpointing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from trace_hydra.cost_rows import RunRows
from trace_hydra.sizes import RunSize


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, adapters included."""

    width: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    mlp: int
    vocabulary: int
    weights: dict[str, tuple[int, ...]]
    """By name; a weight that is shared is there once."""
    bytes_of: dict[str, int]
    """Bytes of one number of each."""
    trainable: frozenset[str]
    linear: frozenset[str]
    """Weights of linear layers but the output layer's."""
    other_bytes: int
    """Buffers."""
    norms: int
    """Numbers a token that go through norms with a weight that is frozen."""
    trained_norms: int
    """Numbers a token that go through norms with a weight that trains."""
    trained_inputs: int
    """Sum of in_features of linear layers that train, but the output layer's."""
    shared_inputs: int
    """Likewise, counted once for layers of one block that read as many."""
    dropped: int
    """Numbers a token that go through dropout."""

    def count(self, names: Any) -> int:
        """Numbers of some weights."""
        return sum(prod(self.weights[name]) for name in names)


@dataclass(frozen=True)
class Precision:
    """Bytes of numbers, as the trainer's precision and the model's dtype make them."""

    weights: int | None
    """Of all weights, where the trainer converts them; None: as they are loaded."""
    compute: int | None
    """In matrix products; None: as the weights."""

    @staticmethod
    def of(name: str) -> "Precision":
        """Read a precision of Lightning's, such as bf16-mixed or 32-true."""
        text = str(name)
        if text.endswith("mixed"):
            return Precision(None, 2)
        return Precision(2 if "16" in text else 8 if "64" in text else None, None)


def shape_of(model: Any) -> Shape:
    """Read the sizes of a model, on the meta device or any other."""
    config: Any = model.config.get_text_config()
    heads = config.num_attention_heads
    named = dict(model.named_parameters())
    output = model.get_output_embeddings()
    layers = [
        (f"{name}.weight", module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output and f"{name}.weight" in named
    ]
    trained = [(name, layer) for name, layer in layers if layer.weight.requires_grad]
    norms = [module.weight for name, module in model.named_modules() if _is_norm(name, module)]
    repeated = [heads * one.numel() if one.numel() == _head_size(config) else one.numel() for one in norms]
    return Shape(
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=_head_size(config),
        mlp=config.intermediate_size,
        vocabulary=model.get_input_embeddings().num_embeddings,
        weights={name: tuple(weight.shape) for name, weight in named.items()},
        bytes_of={name: weight.element_size() for name, weight in named.items()},
        trainable=frozenset(name for name, weight in named.items() if weight.requires_grad),
        linear=frozenset(name for name, _ in layers),
        other_bytes=sum(one.numel() * one.element_size() for one in model.buffers()),
        norms=sum(count for count, one in zip(repeated, norms, strict=True) if not one.requires_grad),
        trained_norms=sum(count for count, one in zip(repeated, norms, strict=True) if one.requires_grad),
        trained_inputs=sum(layer.in_features for _, layer in trained),
        shared_inputs=sum(width for _, width in {(name.rsplit(".", 2)[0], one.in_features) for name, one in trained}),
        dropped=sum(_dropped(model)),
    )


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _is_norm(name: str, module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in name.rpartition(".")[2] and isinstance(weight, nn.Parameter) and weight.ndim == 1


def _dropped(model: nn.Module) -> Iterator[int]:
    """In features of every adapter with dropout."""
    for module in model.modules():
        drops = getattr(module, "lora_dropout", None)
        if isinstance(drops, nn.ModuleDict):
            inside = module.in_features  # type: ignore[union-attr]
            yield from (int(inside) for one in drops.values() if isinstance(one, nn.Dropout) and one.p > 0)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Memory:
    """The formulas of the module's docstring for one shape; all results in bytes."""

    shape: Shape
    precision: Precision
    eager: bool
    checkpointing: bool

    def bytes_of(self, name: str) -> int:
        """Bytes of one number of a weight."""
        return self.precision.weights or self.shape.bytes_of[name]

    @property
    def residual(self) -> int:
        """Bytes of a number of the residual stream: those of the first weight, the embedding."""
        return self.bytes_of(next(iter(self.shape.weights)))

    @property
    def compute(self) -> int:
        """Bytes of a number in matrix products."""
        return self.precision.compute or self.residual

    def weights(self) -> float:
        """The model."""
        numbers = self.shape.weights.items()
        return self.shape.other_bytes + sum(self.bytes_of(name) * prod(shape) for name, shape in numbers)

    def trained(self, names: Any) -> float:
        """Some weights, or as many gradients."""
        return sum(self.bytes_of(name) * prod(self.shape.weights[name]) for name in names)

    def copies(self) -> float:
        """Copies that autocast makes of the weights of linear layers."""
        if self.compute >= self.residual:
            return 0
        inner = self.shape.count(self.shape.linear) / (self.shape.layers if self.checkpointing else 1)
        return self.compute * (inner + self.shape.vocabulary * self.shape.width)

    def activations(self, rows: int, length: float) -> float:
        """What one micro-batch keeps for its backward pass, logits not included."""
        shape, compute, residual = self.shape, self.compute, self.residual
        tokens = rows * length
        mixed = compute < residual
        inputs = shape.trained_inputs if mixed else shape.shared_inputs
        token = residual * (shape.norms + 2 * shape.trained_norms) + compute * inputs + shape.dropped
        token += shape.layers * (4 * compute * shape.heads * shape.head_size + 4 * shape.heads)
        token += shape.layers * 3 * compute * shape.mlp
        kept = tokens * token
        if self.eager:
            kept += shape.layers * shape.heads * (4 + compute * mixed) * rows * length**2
        if self.checkpointing:
            kept = tokens * residual * shape.width * shape.layers + kept / shape.layers
        return kept

    def logits(self, labels: float) -> float:
        """Logits, log-probabilities and their gradients at labels."""
        half = 2 * self.compute if self.compute < 4 else 0
        return labels * self.shape.vocabulary * (12 + half)

    def generation(self, tokens: float) -> float:
        """Cache and prefill of a generation batch of that many tokens, padding included."""
        shape = self.shape
        cache = shape.layers * shape.key_heads * shape.head_size * (self.residual + self.compute)
        prefill = 4 * self.residual * shape.width + 2 * self.compute * shape.mlp
        return tokens * (cache + prefill)

    def forward_flops(self, length: float, labels: float) -> float:
        """FLOPs of a forward pass over a row of `length` tokens with `labels` labels."""
        shape = self.shape
        attention = 4 * shape.layers * shape.heads * shape.head_size * length
        return length * (2 * shape.count(shape.linear) + attention) + labels * 2 * shape.width * shape.vocabulary

    def train_flops(self, length: float, labels: float) -> float:
        """FLOPs of a training pass over a row of `length` tokens with `labels` labels."""
        trained = self.shape.trainable & self.shape.linear
        if not self.shape.trainable:
            return 0
        passes = 2 + self.checkpointing
        return passes * self.forward_flops(length, labels) + 2 * length * self.shape.count(trained)


def optimizer_bytes(build: Callable[..., torch.optim.Optimizer], bytes_of_number: int) -> float:
    """Bytes of state per trained number, seen by a step of the optimizer on a small weight; AdamW: two numbers."""
    dtype = {2: torch.bfloat16, 8: torch.float64}.get(bytes_of_number, torch.float32)
    weight = nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    optimizer = build([weight])
    optimizer.step()
    tensors = [one for one in optimizer.state[weight].values() if isinstance(one, torch.Tensor) and one.ndim]
    return sum(one.numel() * one.element_size() for one in tensors) / weight.numel()


def run_size(memory: Memory, rows: RunRows, micro_batch: int, prefix: int = 0) -> RunSize:
    """Say what methods may ask of a run; a soft prompt makes rows `prefix` tokens longer."""
    shape, tasks = memory.shape, rows.tasks
    trained = shape.trainable
    longest = max(task.longest_row for task in tasks) + prefix
    return RunSize(
        weights=shape.weights,
        trainable=trained,
        linear=frozenset(name for name in trained if name in shape.linear or name == "lm_head.weight"),
        rows=[task.train for task in tasks],
        row_bytes=[task.row_bytes for task in tasks],
        row_tokens=[task.row_tokens + prefix for task in tasks],
        answer_tokens=[task.answer_tokens for task in tasks],
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        vocabulary=shape.vocabulary,
        micro_batch=micro_batch,
        alignment=rows.alignment,
        longest_row=longest,
        weight_bytes=max((memory.bytes_of(name) for name in trained), default=4),
        activation_bytes=memory.activations(micro_batch, longest),
    )
