"""Engines with settings in haste, and a model whose answers differ from prompt to prompt."""

from pathlib import Path
from typing import Any

import torch
from conftest import compose_config

from trace_hydra.engines.openai import OpenAIEngine
from trace_hydra.models.generate import Decoding
from trace_hydra.models.tiny import Tiny
from trace_hydra.models.tuning import Lora
from trace_hydra.targets import instantiate

GREEDY = Decoding(False, 1.0, 1.0)
TEXTS = ("Dogs bark.", "Is it so?", "1 + 1 =", "A", "Größe: 5", "Dogs bark. Cats", "what", "Dogs bark. " * 9)


def tiny(*, std: float = 0.3, **changes: Any) -> tuple[Any, Any]:
    """The tiny model with weights so large that it says something, and its tokenizer."""
    node = compose_config(["model=tiny", *(f"model.{key}={value}" for key, value in changes.items())]).model
    source = Tiny(**{key: value for key, value in node.items() if not key.startswith("_")})
    model, generator = source.load(), torch.Generator().manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=std, generator=generator)
    return model, source.load_tokenizer()


def with_adapters(model: Any, names: tuple[str, ...] = ("default",)) -> Any:
    """Put LoRA adapters around a model; none of them is zero, all are active."""
    tuning = Lora(r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"])
    wrapped: Any = tuning.apply(model)
    for name in names[1:]:
        wrapped.add_adapter(name, tuning.config())
    generator = torch.Generator().manual_seed(1)
    for name, weight in wrapped.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(weight, std=0.3, generator=generator)
    wrapped.base_model.set_adapter(list(names))
    return wrapped.eval()


def ids_of(tokenizer: Any, texts: tuple[str, ...] = TEXTS) -> list[list[int]]:
    """Token ids of prompts."""
    return [tokenizer(text)["input_ids"] for text in texts]


def asked(engine: Any, model: Any, tokenizer: Any, **changes: Any) -> list[Any]:
    """What an engine answers to `TEXTS`."""
    settings: dict[str, Any] = {"max_new_tokens": 12, "decoding": GREEDY, "batch_tokens": 600, **changes}
    return engine.generate(model, tokenizer, settings.pop("prompts", None) or ids_of(tokenizer), **settings)


def openai_engine(url: str | None, folder: Path, **changes: Any) -> OpenAIEngine:
    """An engine that does not wait long."""
    node = compose_config(["engine=openai"]).engine
    settings = {"base_url": url, "timeout_s": 10.0, "retries": 2, "backoff_s": 0.01, "folder": str(folder)}
    return instantiate({**node, **settings, **changes})
