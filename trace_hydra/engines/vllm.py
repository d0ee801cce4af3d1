"""The engine `vllm`: vLLM in this process, which takes the weights from the model beside it.

vLLM starts with an empty model (`load_format="dummy"`), on a folder of configuration and tokenizer. Trained weights
are handed over tensor by tensor through `reload_weights`, so no second copy is written to disk; one plain LoRA adapter
goes as a `LoRARequest`, several active ones are merged on the way. While the model trains, vLLM sleeps and its memory
is free.

It follows vLLM's documentation (docs/training/layerwise.md, docs/features/sleep_mode.md). It was run with vLLM 0.32
built for CPUs; it has not been run on a GPU here, and so neither has its sleep, which CPUs lack.
"""

import gc
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trace_hydra.engines.base import ADAPTERS, WEIGHTS, Needs, OneByOne, Settings, State, package_version
from trace_hydra.engines.handover import Folders, active_adapters, base_model, changes, plain_weights, write_model
from trace_hydra.errors import EngineError
from trace_hydra.models.generate import Generated, end_ids, finish

log = logging.getLogger(__name__)

INSTALL = "pip install -r requirements-vllm.txt, in an environment of its own, for it wants another torch"
_IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"
"""0: vLLM's core runs in this process, and tensors reach it without being copied or pickled."""


class VLLM(OneByOne):
    """Computes with vLLM's kernels: greedy answers are those of `hf` up to near ties.

    Args:
        dtype: Of vLLM's weights; "auto": of the model's.
        gpu_memory_utilization: Share of the GPU's memory that vLLM may take; the model beside it needs the rest.
        max_lora_rank: Adapters of a higher rank are merged.
        enforce_eager: No CUDA graphs: starts sooner, answers slower.
        sleep: Whether vLLM gives its memory back while the model trains.
        folder: The store, where configuration and adapters are written for vLLM.
    """

    name = "vllm"
    serves = frozenset({ADAPTERS, WEIGHTS})

    def __init__(
        self,
        *,
        dtype: str,
        gpu_memory_utilization: float,
        max_lora_rank: int,
        enforce_eager: bool,
        sleep: bool,
        folder: str,
    ):
        self.dtype, self.gpu_memory_utilization, self.max_lora_rank = dtype, gpu_memory_utilization, max_lora_rank
        self.enforce_eager, self.sleep = enforce_eager, sleep
        self.folders = Folders(folder, keep=False)
        self._llm: Any = None
        self._asleep = self._takes_loras = False
        self._loaded: tuple[Any, ...] | None = None
        """What weights vLLM has: none yet, or a state and the adapters merged into it."""
        self._lora: tuple[Any, Any] | None = None
        """The adapter in vLLM: (what it is, its request)."""
        self._num_loras = 0
        self._own: list[Path] = []
        """Folders to take away."""

    def identity(self) -> dict[str, Any]:
        """Its version, and what decides how it computes."""
        return {
            "name": self.name,
            "vllm": package_version("vllm"),
            "dtype": self.dtype,
            "max_lora_rank": self.max_lora_rank,
            "enforce_eager": self.enforce_eager,
        }

    def problems(self, needs: Needs) -> list[str]:
        """Also a missing package, and settings out of range."""
        found = super().problems(needs)
        if find_spec("vllm") is None:
            found.append(f"engine=vllm needs the package vllm: {INSTALL}; or engine=hf.")
        if not 0 < self.gpu_memory_utilization < 1:
            found.append(f"engine.gpu_memory_utilization={self.gpu_memory_utilization} must be in (0, 1).")
        if self.max_lora_rank < 1:
            found.append(f"engine.max_lora_rank={self.max_lora_rank} must be at least 1.")
        return found

    def at(self, state: State | None) -> None:
        """Sleep while nobody knows the weights: the model trains, and needs the memory."""
        super().at(state)
        if state is None and self._llm is not None and self.sleep and not self._asleep:
            self._llm.sleep(level=2)  # weights and cache are dropped
            self._asleep, self._loaded, self._lora = True, None, None

    def close(self) -> None:
        """Give vLLM's memory back."""
        self._llm, self._loaded, self._lora, self._asleep = None, None, None, False
        for folder in self._own:
            shutil.rmtree(folder, ignore_errors=True)
        self._own.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def answer(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        settings: Settings,
        ended: Callable[[int, Generated], None],
    ) -> None:
        """Answer prompts; `batch_tokens` has no part, vLLM batches by its memory."""
        from vllm import SamplingParams, TokensPrompt  # type: ignore[import-not-found]

        ends, decoding = end_ids(model, tokenizer), settings.decoding
        shared = {
            "max_tokens": settings.max_new_tokens,
            "stop_token_ids": ends,
            "stop": list(settings.stop) or None,
            "include_stop_str_in_output": True,
            "temperature": decoding.temperature if decoding.do_sample else 0.0,
            "top_p": decoding.top_p if decoding.do_sample else 1.0,
        }
        params = [SamplingParams(**shared, **settings.seed_of(index)) for index in range(len(prompts))]
        asked = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
        with _random_states_kept():
            llm, lora = self._ready(model, tokenizer)
            outputs = llm.generate(asked, params, use_tqdm=False, lora_request=lora)
        if len(outputs) != len(prompts):
            raise EngineError(f"engine=vllm gave {len(outputs)} answers to {len(prompts)} prompts.")
        for index, output in enumerate(outputs):
            tokens = list(output.outputs[0].token_ids)
            ended(index, finish(tokenizer, len(prompts[index]), tokens, ends, settings.stop))

    def _ready(self, model: nn.Module, tokenizer: Any) -> tuple[Any, Any]:
        """Start vLLM or wake it up, with the model's weights; returns it and the adapter to ask for."""
        if self._llm is None or (hasattr(model, "peft_config") and not self._takes_loras):
            self.close()  # the start model was asked before adapters were added
            self._llm = self._start(model, tokenizer)
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        single = self._single_adapter(model)
        wanted = ("base",) if single else (self.state and self.state.key, *active_adapters(model), changes(model))
        if self.state is None or self._loaded != wanted:
            weights = _bare_weights(model) if single else plain_weights(model)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self._loaded = wanted
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        else:
            self._llm.reset_prefix_cache()
        return self._llm, self._request(model, single) if single else None

    def _start(self, model: nn.Module, tokenizer: Any) -> Any:
        from vllm import LLM  # type: ignore[import-not-found]

        inner = base_model(model)
        folder = self.folders.other(lambda draft: write_model(model, tokenizer, draft, weights=False))
        self._own.append(folder)
        self._takes_loras = hasattr(model, "peft_config")
        lora = {"enable_lora": True, "max_lora_rank": _allowed(self.max_lora_rank), "max_loras": 1}
        with _in_process():
            return LLM(
                model=str(folder),
                load_format="dummy",
                dtype=str(inner.dtype).removeprefix("torch.") if self.dtype == "auto" else self.dtype,
                gpu_memory_utilization=self.gpu_memory_utilization,
                enforce_eager=self.enforce_eager,
                enable_sleep_mode=self.sleep,
                generation_config="vllm",  # nothing of the folder's
                **(lora if self._takes_loras else {}),
            )

    def _single_adapter(self, model: nn.Module) -> str | None:
        """Name the adapter that can go as it is: the only active one, plain LoRA, on the start model's own weights."""
        active = active_adapters(model)
        if len(active) != 1 or self.state is None or any(".lora_" not in name for name in self.state.changed):
            return None
        config: Any = model.peft_config[active[0]]  # type: ignore[index]
        plain = config.peft_type == "LORA" and config.bias == "none" and not (config.use_dora or config.use_rslora)
        return active[0] if plain and config.r <= self.max_lora_rank else None

    def _request(self, model: Any, adapter: str) -> Any:
        """Write the adapter for vLLM, once for each state."""
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

        assert self.state is not None
        what = (self.state.key, adapter, changes(model))
        if self._lora is None or self._lora[0] != what:
            folder = self.folders.other(
                lambda draft: model.save_pretrained(draft, selected_adapters=[adapter], save_embedding_layers=False)
            )
            self._own.append(folder)
            self._num_loras += 1
            path = folder if adapter == "default" else folder / adapter
            self._lora = (what, LoRARequest(f"adapter{self._num_loras}", self._num_loras, str(path)))
        return self._lora[1]


def _bare_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the start model's weights without the adapters."""
    with model.disable_adapter():
        yield from plain_weights(model)


def _allowed(rank: int) -> int:
    """Round a rank up to one that vLLM has kernels for."""
    return next((one for one in (8, 16, 32, 64, 128, 256, 320, 512) if one >= rank), rank)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Put the random states back: vLLM seeds them all where its core runs in this process."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


@contextmanager
def _in_process() -> Iterator[None]:
    """Have vLLM start its core in this process; the environment is as before afterwards."""
    before = os.environ.get(_IN_PROCESS)
    os.environ[_IN_PROCESS] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_IN_PROCESS]
        else:
            os.environ[_IN_PROCESS] = before
