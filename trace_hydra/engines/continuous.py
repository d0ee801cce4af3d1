"""The engine `continuous`: transformers' continuous batching with a paged cache, on the model in this process.

The model computes in the type of its weights, not under the trainer's autocast: its forward passes run in a thread of
the library's, and autocast belongs to a thread. Greedy answers are those of `hf` but for rounding; sampled ones depend
on which prompts are asked together.
"""

from collections.abc import Callable, Iterator, Sequence
from math import ceil
from typing import Any

import torch
from torch import nn

from trace_hydra.engines.base import Needs, OneByOne, Settings, package_version
from trace_hydra.errors import EngineError
from trace_hydra.models.attention import by_pytorch
from trace_hydra.models.generate import Generated, StopStrings, end_ids, finish

SHORTEST_PAGE = 4
"""transformers takes no smaller ones."""
_PATIENCE_S = 1.0
"""How often to look whether the library's thread is still alive."""


class Continuous(OneByOne):
    """Reads weights in place, so it serves every method.

    Args:
        page_size: Tokens of a page of the cache; flash attention's decoding kernels want multiples of 256.
    """

    name = "continuous"

    def __init__(self, *, page_size: int):
        self.page_size = page_size

    def problems(self, needs: Needs) -> list[str]:
        """Also a page that is too small."""
        found = super().problems(needs)
        if self.page_size < SHORTEST_PAGE:
            found.append(f"engine.page_size={self.page_size} must be at least {SHORTEST_PAGE}.")
        return found

    def identity(self) -> dict[str, Any]:
        """Pages decide how sums over positions are rounded."""
        return {"name": self.name, "transformers": package_version("transformers"), "page_size": self.page_size}

    def answer(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        settings: Settings,
        ended: Callable[[int, Generated], None],
    ) -> None:
        """Answer prompts; `batch_tokens` are the tokens that the cache holds, at least those of one row."""
        inner = _transformers_model(model)
        ends = end_ids(model, tokenizer)
        cut = StopStrings(tokenizer, settings.stop, 0).ends if settings.stop else None
        was_training = [(one, one.training) for one in model.modules()]
        device = next(model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), by_pytorch(inner):
            try:
                manager = inner.init_continuous_batching(
                    generation_config=_generation_config(settings, ends),
                    continuous_batching_config=self._sizes(inner, prompts, settings),
                )
                for index, tokens in _answers(manager, prompts, settings.max_new_tokens, cut):
                    ended(index, finish(tokenizer, len(prompts[index]), tokens, ends, settings.stop))
            except (ValueError, NotImplementedError, AttributeError, MemoryError) as error:
                raise EngineError(
                    f"engine=continuous: transformers' continuous batching does not take this model: {error}. Use "
                    "engine=hf."
                ) from error
            finally:
                for module, mode in was_training:
                    module.training = mode

    def _sizes(self, model: Any, prompts: Sequence[Sequence[int]], settings: Settings) -> Any:
        from transformers import ContinuousBatchingConfig

        longest = max(map(len, prompts)) + settings.max_new_tokens
        row = ceil(longest / self.page_size) + 1  # pages; at least one row fits
        return ContinuousBatchingConfig(
            page_size=self.page_size,
            num_blocks=max(ceil(settings.batch_tokens / self.page_size), row),
            max_batch_tokens=max(settings.batch_tokens, 1),
            max_requests_per_batch=len(prompts),
            max_blocks_per_request=row + row % 2 if "flash" in model.config._attn_implementation else 0,
            seed=settings.seed % 2**32,
            auto_switch_to_flash=False,  # model.attn_implementation says which
        )


def _transformers_model(model: nn.Module) -> Any:
    """Take the model out of PEFT's wrapper; its layers keep their adapters."""
    inner: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    if not hasattr(inner, "init_continuous_batching"):
        raise EngineError(
            f"engine=continuous: {type(inner).__name__} is no model of transformers, which batches here. Use engine=hf."
        )
    return inner


def _generation_config(settings: Settings, ends: list[int]) -> Any:
    from transformers import GenerationConfig

    decoding = settings.decoding
    sampling: dict[str, Any] = {"do_sample": False}
    if decoding.do_sample:
        sampling = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    return GenerationConfig(max_new_tokens=settings.max_new_tokens, eos_token_id=ends, pad_token_id=ends[0], **sampling)


def _answers(
    manager: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ended: Callable[[Sequence[int]], bool] | None,
) -> Iterator[tuple[int, list[int]]]:
    """Yield index and new tokens as answers end.

    The library knows no stop strings, so with them tokens are looked at as they come, and a row that has ended is
    called off.

    Raises:
        EngineError: If the library lost a request.
    """
    manager.start()
    done = False
    try:
        names = manager.add_requests(
            [list(ids) for ids in prompts], max_new_tokens=max_new_tokens, streaming=ended is not None
        )
        waiting = {name: index for index, name in enumerate(names)}
        seen = dict.fromkeys(names, 0)
        while waiting:
            result = manager.get_result(timeout=_PATIENCE_S)
            if result is None:
                if not manager.is_running():
                    raise EngineError(f"engine=continuous: generation broke off: {_reason(manager)}. Use engine=hf.")
                continue
            name, tokens = result.request_id, list(result.generated_tokens)
            if name not in waiting:  # called off, and a token late
                continue
            if result.error is not None:
                raise EngineError(f"engine=continuous: prompt {waiting[name]}: {result.error}. Use engine=hf.")
            cut = _first_end(tokens, seen[name], ended)
            seen[name] = len(tokens)
            if cut is None and not result.is_finished():
                continue
            if not result.is_finished():
                manager.cancel_request(name)
            yield waiting.pop(name), tokens[:cut]
        done = True
    finally:
        manager.stop(block=True, hard_stop=not done)
        manager.destroy()


def _first_end(tokens: list[int], seen: int, ended: Callable[[Sequence[int]], bool] | None) -> int | None:
    """Count the tokens up to the one that completes a stop string; None: there is none."""
    if ended is None:
        return None
    return next((count for count in range(seen + 1, len(tokens) + 1) if ended(tokens[:count])), None)


def _reason(manager: Any) -> str:
    return str(getattr(manager.background_thread_status, "fatal_error", None) or "its thread ended")
