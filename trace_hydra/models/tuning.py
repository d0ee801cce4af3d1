"""Which weights train: all, none, a LoRA adapter (PEFT), or a soft prompt."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trace_hydra.errors import ConfigError
from trace_hydra.models import prompts


class Tuning(ABC):
    """Decides what trains. `apply` is called once, before the first stage."""

    name: str
    prefix_length = 0
    """Virtual tokens before every row."""
    adds = True
    """Whether `apply` changes what the model answers, or might."""

    @abstractmethod
    def apply(self, model: nn.Module) -> nn.Module:
        """Return the model to train, its `requires_grad` flags set."""

    def prefix(self, model: nn.Module) -> list[int]:
        """List the ids that stand before every row of the model that `apply` returned, in training and generation."""
        return []


class Full(Tuning):
    """All weights train."""

    name = "full"
    adds = False

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the model itself, everything trainable."""
        model.requires_grad_(True)
        return model


class Frozen(Tuning):
    """No weight trains."""

    name = "frozen"
    adds = False

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the model itself, nothing trainable."""
        model.requires_grad_(False)
        return model


class Lora(Tuning):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W + alpha / r * B A, A and B train, W is frozen.

    Args:
        r: Rank, at least 1.
        alpha: Numerator of the scale.
        dropout: Dropout before A, in [0, 1).
        target_modules: Endings of the names of the linear layers that get an adapter.

    Raises:
        ConfigError: If a value is out of range.
    """

    name = "lora"

    def __init__(self, *, r: int, alpha: float, dropout: float, target_modules: Sequence[str]):
        if r < 1:
            raise ConfigError(f"tuning.r={r} must be at least 1.")
        if not 0 <= dropout < 1:
            raise ConfigError(f"tuning.dropout={dropout} must be in [0, 1).")
        if not target_modules:
            raise ConfigError("tuning.target_modules is empty; name the layers that get an adapter, such as q_proj.")
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.target_modules = list(target_modules)

    def config(self):
        """Build PEFT's configuration of one adapter."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT divides by r, a float is as good
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            bias="none",
            task_type="CAUSAL_LM",
        )  # type: ignore[arg-type]

    def apply(self, model: nn.Module) -> nn.Module:
        """Return a PEFT model with one trainable adapter named "default".

        Raises:
            ConfigError: If no layer of the model ends in one of the target names.
        """
        from peft import get_peft_model

        endings = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        if absent := [name for name in self.target_modules if name.rsplit(".", 1)[-1] not in endings]:
            raise ConfigError(
                f"tuning.target_modules={absent}: the model has no linear layer of that name. It has: "
                f"{', '.join(sorted(endings))}."
            )
        return get_peft_model(model, self.config())  # type: ignore[arg-type]


class Prompt(Tuning):
    """A soft prompt before every row (Lester et al. 2021, arXiv:2104.08691); the model itself is frozen.

    PEFT's prompt tuning knows one prompt for all rows and keeps it apart from the ids; methods that select prompts by
    row or join those of several tasks need what `models.prompts` has.

    Args:
        length: Virtual tokens, at least 1.
        init: Their first values: "vocabulary", vectors of random tokens of the model (section 3.2 of the paper), or
            "normal", mean 0 and the standard deviation of the model's embedding.

    Raises:
        ConfigError: If a value is out of range.
    """

    name = "prompt"

    def __init__(self, *, length: int, init: str):
        if length < 1:
            raise ConfigError(f"tuning.length={length} must be at least 1; it is the soft prompt's virtual tokens.")
        if init not in ("vocabulary", "normal"):
            raise ConfigError(f"tuning.init={init!r} must be 'vocabulary' or 'normal'.")
        self.length, self.init = length, init
        self.prefix_length = length

    def first_values(self, tokens: prompts.VirtualTokens, count: int) -> Tensor:
        """Draw (count, width) first values from the global generator."""
        if self.init == "vocabulary":
            return tokens.sample(count)
        drawn = torch.randn(count, tokens.weight.shape[1]).to(tokens.weight.device)
        return drawn * tokens.weight.float().std()

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the model with one trainable table named "default"."""
        model.requires_grad_(False)
        tokens = prompts.install(model)
        tokens.add("default", self.first_values(tokens, self.length))
        return model

    def prefix(self, model: nn.Module) -> list[int]:
        """List the ids of the table."""
        return prompts.virtual_tokens(model).ids("default")
