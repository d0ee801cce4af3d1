"""The engine `hf`: the model in this process, through `models.generate`."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from trace_hydra.engines.base import Engine
from trace_hydra.models.generate import Generated, generate_shared


class HF(Engine):
    """Serves every method; nothing is copied or handed over."""

    name = "hf"
    shared = True

    def identity(self) -> dict[str, Any]:
        """The versions of torch and transformers are in every key of answers anyway."""
        return {"name": self.name}

    def generate(
        self, model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], **settings: Any
    ) -> list[Generated]:
        """Answer prompts in the order given; several processes share them."""
        return generate_shared(model, tokenizer, prompts, **settings)
