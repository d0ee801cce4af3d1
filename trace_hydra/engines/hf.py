"""The engine `hf`: the model in this process, through `models.generate`."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from trace_hydra.engines.base import Engine
from trace_hydra.models.generate import Decoding, Generated, generate_shared


class HF(Engine):
    """Serves every method; nothing is copied or handed over."""

    name = "hf"
    shared = True

    def identity(self) -> dict[str, Any]:
        """The versions of torch and transformers are in every key of answers anyway."""
        return {"name": self.name}

    def generate(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        decoding: Decoding,
        batch_tokens: int,
        stop: Sequence[str] = (),
        seed: int = 0,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> list[Generated]:
        """Answer prompts in the order given; several processes share them."""
        return generate_shared(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            decoding=decoding,
            batch_tokens=batch_tokens,
            stop=stop,
            seed=seed,
            on_batch=on_batch,
        )
